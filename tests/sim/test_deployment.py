"""Flower's deployment runtime on loopback: a SuperLink, SuperNodes, and processes that are killed.

Everything is started by the commands of docs/flower.md and listens on 127.0.0.1 only.
"""

import contextlib
import datetime
import ipaddress
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sim.commands.running import run
from sim.keeping.records import read_rows
from sim.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PATIENCE_S = 480.0
"""Longer than a test here takes on a machine that has other things to do."""

pytestmark = pytest.mark.xdist_group("flower")


class Deployment:
    """The processes of a federation, each with a log, all of them gone when the test is over."""

    def __init__(self, folder: Path, *, secure: bool, apart: bool) -> None:
        self.folder = folder
        self.secure = secure
        self.apart = apart
        self.port = free_port()
        self._groups: dict[str, list[subprocess.Popen[bytes]]] = {}
        self._until = time.monotonic() + PATIENCE_S
        if secure:
            write_certificates(folder)
            tls = ["--root-certificates", str(folder / "ca.crt")]
            connection = f'root-certificates = "{folder / "ca.crt"}"'
        else:
            tls = ["--insecure"]
            connection = "insecure = true"
        self._tls = tls
        home = folder / "homes" / "user"
        home.mkdir(parents=True)
        (home / "config.toml").write_text(
            f'[superlink.test]\naddress = "127.0.0.1:{self.port}"\n{connection}\n'
        )

    def start(self, name: str, *command: object) -> subprocess.Popen[bytes]:
        """Start one of Flower's commands as a member of a group, with the group's own home."""
        words = [str(BIN / str(command[0])), *map(str, command[1:])]
        log = self.folder / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                words,
                cwd=self.folder,
                env=self._environment(name),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._groups.setdefault(name, []).append(process)
        return process

    def superlink(self) -> None:
        isolation = ["--isolation", "process"] if self.apart else []
        security: list[object] = ["--insecure"]
        if self.secure:
            security = ["--ssl-ca-certfile", self.folder / "ca.crt"]
            security += ["--ssl-certfile", self.folder / "server.crt"]
            security += ["--ssl-keyfile", self.folder / "server.key", "--enable-supernode-auth"]
        self.start(
            "superlink",
            *("flower-superlink", *security, *isolation),
            *("--host", "127.0.0.1", "--port", self.port),
            "--disable-runtime-dependency-installation",
        )
        if self.apart:
            self._superexec("superlink", self.port, self._tls)
        self.wait_for("the SuperLink's port", lambda: is_open(self.port))

    def register(self, *partitions: int) -> None:
        """Make a key for each node and let the SuperLink know it."""
        processes = []
        for partition in partitions:
            write_key(self.folder / f"node{partition}")
            processes.append(
                self.start(
                    "user",
                    *("flwr", "supernode", "register", self.folder / f"node{partition}.pub"),
                    *("test", "--name", f"node{partition}"),
                )
            )
        for process in processes:
            assert process.wait(PATIENCE_S) == 0, self.logs()

    def node(self, partition: int, count: int) -> subprocess.Popen[bytes]:
        port = free_port()
        key = self.folder / f"node{partition}"
        name = f"node{partition}"
        process = self.start(
            name,
            *("flower-supernode", *self._tls, "--superlink", f"127.0.0.1:{self.port}"),
            *(("--auth-supernode-private-key", key) if key.exists() else ()),
            *(("--isolation", "process") if self.apart else ()),
            *("--host", "127.0.0.1", "--port", port),
            *("--node-config", f"partition-id={partition} num-partitions={count}"),
        )
        if self.apart:
            # It stops where its SuperNode does.
            self._superexec(name, port, ["--insecure", "--parent-pid", process.pid])
        return process

    def _superexec(self, name: str, port: int, words: list[object] | list[str]) -> None:
        self.start(name, "flower-superexec", *words, "--runtime-api-address", f"127.0.0.1:{port}")

    def run(self, *overrides: str) -> None:
        words = [*overrides, f"output={self.folder / 'runs'}"]
        self.start(
            "run",
            *("flwr", "run", ROOT, "test", "--stream"),
            *("--run-config", f"overrides={json.dumps(shlex.join(words))}"),
        )

    def stop(self, name: str, how: int) -> None:
        """End a node: its SuperNode, its SuperExec, and the ClientApp that it is at."""
        self._signal(name, how)
        for process in self._groups[name]:
            process.wait(30)

    def close(self) -> None:
        """Leave no process behind."""
        self._signal("", signal.SIGKILL)
        for group in self._groups.values():
            for process in group:
                process.wait(30)

    def _signal(self, name: str, how: int) -> None:
        """Signal the processes of a group, or of all, and those that they start meanwhile."""
        signalled: set[psutil.Process] = set()
        deadline = time.monotonic() + 30
        while left := self._processes(name):
            assert time.monotonic() < deadline, f"left behind: {left}\n{self.logs()}"
            for process in set(left) - signalled:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(how)
                signalled.add(process)
            time.sleep(0.1)

    def _processes(self, name: str = "") -> list[psutil.Process]:
        """Return the living processes of a group, or of all, by the home that they were given."""
        homes = str(self.folder / "homes" / name)
        found = []
        for process in psutil.process_iter():
            try:
                home = process.environ().get("FLWR_HOME", "")
                alive = process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error:
                continue
            if alive and (home == homes if name else home.startswith(homes)):
                found.append(process)
        return found

    def _environment(self, name: str) -> dict[str, str]:
        home = self.folder / "homes" / ("user" if name == "run" else name)
        home.mkdir(parents=True, exist_ok=True)
        return {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
            "OMP_NUM_THREADS": "1",
        }

    def log(self, name: str) -> str:
        try:
            return (self.folder / f"{name}.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    def logs(self) -> str:
        """Return the ends of all logs: what there is to say where something went wrong."""
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def wait_for(self, what: str, done: Callable[[], object]) -> None:
        while not done():
            assert time.monotonic() < self._until, f"no {what}\n{self.logs()}"
            time.sleep(0.1)

    def is_at(self, partition: int, phase: str, round: int) -> bool:
        """Tell whether a node has received the message of a phase of a round."""
        received = rf"ROUND {round}\].*\n.*Receiving: {phase} message"
        return re.search(received, self.log(f"node{partition}")) is not None

    def finished(self) -> dict[str, Any]:
        """Wait for the run's result, and return what is in its folder."""
        found: list[Path] = []

        def done() -> bool:
            found[:] = self.folder.glob("runs/*/*/result.json")
            (submission,) = self._groups["run"]
            assert submission.poll() in (None, 0), self.logs()
            return bool(found)

        self.wait_for("result", done)
        return left_in(found[0].parent)


def left_in(folder: Path) -> dict[str, Any]:
    return {
        "metrics": [
            {key: value for key, value in row.items() if "seconds" not in key}
            for row in read_rows(folder / "metrics.jsonl")
        ],
        "exchange": read_rows(folder / "exchange.jsonl"),
        "events": read_rows(folder / "events.jsonl"),
        "result": json.loads((folder / "result.json").read_text()),
    }


def kinds(events: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["round"], row.get("client"), row["event"]) for row in events]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def is_open(port: int) -> bool:
    with socket.socket() as caller:
        caller.settimeout(1)
        return caller.connect_ex(("127.0.0.1", port)) == 0


def write_key(path: Path) -> None:
    """Write an ECDSA key as ``ssh-keygen -t ecdsa -b 384`` does."""
    key = ec.generate_private_key(ec.SECP384R1())
    ssh = serialization.PrivateFormat.OpenSSH
    none = serialization.NoEncryption()
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, ssh, none))
    path.chmod(0o600)
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    path.with_name(f"{path.name}.pub").write_bytes(public)


def write_certificates(folder: Path) -> None:
    """Write ca.crt, server.crt and server.key: a CA of one's own, and a server on loopback."""
    ca_key, server_key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedkd CA")])
    server = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)

    def certificate(subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> Any:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    usage = dict.fromkeys(
        (
            "digital_signature",
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    of_ca = (
        certificate(ca, ca_key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    of_server = (
        certificate(server, server_key)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(of_ca.public_bytes(pem))
    (folder / "server.crt").write_bytes(of_server.public_bytes(pem))
    (folder / "server.key").write_bytes(
        server_key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


@pytest.fixture
def deploy(tmp_path: Path) -> Iterator[Callable[..., Deployment]]:
    """Start a SuperLink, with nothing on it yet."""
    deployments = []

    def start(*, secure: bool = True, apart: bool = False) -> Deployment:
        deployments.append(Deployment(tmp_path, secure=secure, apart=apart))
        deployments[-1].superlink()
        return deployments[-1]

    try:
        yield start
    finally:
        for deployment in deployments:
            deployment.close()


TINY = (
    "rounds=2",
    "clients.count=3",
    "clients.models=[mlp,cnn]",
    "clients.local.epochs=1",
    "data.private_rows=200",
    "data.test_rows=100",
    "data.public.size=60",
    "data.partition.min_rows=2",
    "engine.vectorize=loop",
    f"nodes.wait_s={PATIENCE_S:g}",
)


def of_run(tmp_path: Path, *overrides: str) -> dict[str, Any]:
    """Return what ``fedkd run`` leaves behind for the same settings."""
    words = [*TINY, "engine.backend=inline", f"output={tmp_path / 'ours'}", *overrides]
    return left_in(run(load_settings(None, words)).folder)


def test_a_federation_with_tls_and_keys_goes_on_without_a_node_that_is_killed(
    deploy: Callable[..., Deployment], tmp_path: Path
) -> None:
    deployment = deploy(secure=True, apart=True)
    deployment.register(0, 1, 2)
    for partition in range(3):
        deployment.node(partition, 3)
    # A process a message: judging once is what keeps this short.
    settings = ("strategy.name=dsfl", "evaluation.every=2")
    deployment.run(*TINY, *settings)
    # What the same settings give where client 2 fails in round 2 is computed meanwhile.
    lost = "{kind: crash, clients: [2], rounds: [2], phases: [train, evaluate], attempts: null}"
    ours = of_run(tmp_path, *settings, f"faults=[{lost}]")
    deployment.wait_for("training in round 2", lambda: deployment.is_at(2, "train", 2))
    deployment.stop("node2", signal.SIGKILL)
    theirs = deployment.finished()
    assert theirs["metrics"] == ours["metrics"], deployment.logs()
    assert theirs["exchange"] == ours["exchange"]
    assert kinds(theirs["events"]) == [(2, 2, "rejected"), (2, 2, "evaluation failed")]
    assert "its node is gone" in theirs["events"][0]["reason"]
    assert theirs["result"]["status"] == "finished"
    replies = [row["replies"] for row in theirs["metrics"] if row["scope"] == "federation"]
    assert replies == [3, 2]


# -- slow: the whole matrix --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["dml", "fedmd", "fedgkt"])
@pytest.mark.parametrize("secure", [False, True], ids=["insecure", "tls"])
def test_the_deployment_runtime_computes_what_fedkd_run_computes(
    deploy: Callable[..., Deployment], tmp_path: Path, secure: bool, strategy: str
) -> None:
    deployment = deploy(secure=secure)
    if secure:
        deployment.register(0, 1)
    for partition in range(2):
        deployment.node(partition, 2)
    settings = ("clients.count=2", f"strategy.name={strategy}")
    deployment.run(*TINY, *settings)
    ours = of_run(tmp_path, *settings)
    theirs = deployment.finished()
    assert {**theirs, "result": None} == {**ours, "result": None}, deployment.logs()
    assert theirs["result"]["status"] == "finished"


@pytest.mark.slow
def test_a_late_node_joins_a_running_federation(deploy: Callable[..., Deployment]) -> None:
    deployment = deploy(secure=False)
    for partition in range(2):
        deployment.node(partition, 3)
    deployment.run(*TINY, "rounds=4", "nodes.wait_s=60")
    deployment.wait_for("training in round 1", lambda: deployment.is_at(0, "train", 1))
    deployment.node(2, 3)
    left = deployment.finished()
    assert kinds(left["events"])[:2] == [(1, 2, "absent"), (1, 2, "rejected")]
    (joined,) = [row["round"] for row in left["events"] if row["event"] == "joined"]
    replies = [row["replies"] for row in left["metrics"] if row["scope"] == "federation"]
    assert replies == [2] * (joined - 1) + [3] * (5 - joined), deployment.logs()


@pytest.mark.slow
def test_a_node_that_was_restarted_has_lost_its_client_s_state(
    deploy: Callable[..., Deployment],
) -> None:
    deployment = deploy(secure=True)
    deployment.register(0, 1)
    for partition in range(2):
        deployment.node(partition, 2)
    deployment.run(*TINY, "rounds=4", "clients.count=2")
    deployment.wait_for("judging in round 1", lambda: deployment.is_at(1, "evaluate", 1))
    deployment.stop("node1", signal.SIGTERM)
    deployment.node(1, 2)
    left = deployment.finished()
    assert [row["client"] for row in left["events"] if row["event"] == "state lost"] == [1]
    replies = [row["replies"] for row in left["metrics"] if row["scope"] == "federation"]
    assert (replies[0], replies[-1]) == (2, 2), deployment.logs()


@pytest.mark.slow
def test_a_key_that_is_not_registered_is_refused(
    deploy: Callable[..., Deployment],
) -> None:
    deployment = deploy(secure=True)
    write_key(deployment.folder / "node0")
    stranger = deployment.node(0, 1)
    assert stranger.wait(PATIENCE_S) != 0
    assert "Failed to initialize the connection to the SuperLink" in deployment.log("node0")


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        *("dml", "fd", "fedproto", "dsfl", "scarlet", "feddf", "fedgkt", "fedntd", "fedprox"),
        *("proxyfl", "own_ballots:Ballots"),
    ],
)
def test_flwr_run_simulates_as_many_clients_as_the_settings_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    # What people bring is installed where the runtime is.
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "own"))
    left = simulated(tmp_path, monkeypatch, 2, "rounds=2", f"strategy.name={strategy}")
    assert left["result"]["rounds"] == 2
    assert left["events"] == []


@pytest.mark.slow
def test_flwr_run_simulates_clients_that_differ_under_a_budget_and_a_clock(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small: Callable[..., Settings],
    small_words: tuple[str, ...],
    on_wards: tuple[str, ...],
) -> None:
    left = simulated(tmp_path, monkeypatch, 4, *small_words, *on_wards)
    # Nodes are never stacked.
    ours = left_in(run(small(*on_wards, "engine.vectorize=loop")).folder)
    for kind in ("metrics", "exchange", "events"):
        assert left[kind] == ours[kind]


def simulated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, count: int, *overrides: str
) -> dict[str, Any]:
    """Let Flower's simulation runtime run a federation of so many clients."""
    words = [*overrides, f"clients.count={count}", f"output={folder}/runs"]
    deployment = Deployment(folder, secure=False, apart=False)
    # Flower's local SuperLink listens at the same ports of a machine for everybody.
    monkeypatch.setenv("FLWR_LOCAL_SUPERLINK_HTTP_API_PORT", str(free_port()))
    monkeypatch.setenv("FLWR_LOCAL_CONTROL_API_PORT", str(free_port()))
    home = folder / "homes" / "user" / "config.toml"
    home.write_text(
        '[superlink]\ndefault = "local"\n\n[superlink.local]\n'
        f'options.num-supernodes = {count}\naddress = ":local:"\n'
    )
    try:
        deployment.start(
            "run",
            *("flwr", "run", ROOT, "--stream", "--run-config"),
            f"overrides={json.dumps(shlex.join(words))}",
        )
        return deployment.finished()
    finally:
        deployment.close()
