"""The same federated rounds in three simulators: fedkd, Flower's own runtime, and pfl.

Cases: FedAvg and FedMD, each with LeNet clients on 28x28 pixels (61,706 parameters) and with MLP
clients (64-64-10) on 8x8 pixels. 100 clients with 50 rows, batch 10, one local epoch of SGD, all
clients in every round, no evaluation inside the clock. In FedMD a client digests the consensus on
200 public rows (one epoch of batch 10), revisits its own rows and predicts the public rows.

- fedkd: `RoundLoop` over `RayGrid`, as `fedkd run` does it; ``engine.vectorize`` as by default.
- Flower: a `ClientApp` and a `ServerApp` under `run_simulation`, written as its tutorials do;
  FedAvg is Flower's own strategy, a FedMD client keeps its model in ``context.state``.
- pfl (pfl-research 0.6.0): its `FederatedAveraging` in one process. It aggregates sums of model
  updates and keeps no client's model between rounds, so it has no natural FedMD. Its dependencies
  contradict fedkd's pinned set; it lives in a virtual environment of its own:

      python -m venv .venv-pfl && .venv-pfl/bin/pip install pfl==0.6.0 torch==2.13.0

Every measurement is a process of its own that starts the simulator, discards the first round and
contributes the median of the next ones as one repeat; the sides take turns. All see the same
arrays and, in FedAvg, start from the same weights; each shuffles in its own way (pfl not at all).
That the work is equal is checked: the steps that were taken, and the accuracy in the end.

    python benchmarks/simulators.py              # about 20 minutes
    python benchmarks/simulators.py --workers 2 --cases fedavg-mlp fedmd-mlp
    python benchmarks/simulators.py --check      # exit status 1 where a target is missed
    python benchmarks/simulators.py --quick      # tiny, to see that it runs; says nothing
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measurement import Samples, describe, exit_status, machine, ratios, row, verdict
from torch import nn

HERE = Path(__file__).resolve().parent
PFL_PYTHON = HERE.parent / ".venv-pfl" / "bin" / "python"
SIDES = ("fedkd", "flower", "pfl")
CASES = ("fedavg-lenet", "fedavg-mlp", "fedmd-lenet", "fedmd-mlp")
AT_MOST = {
    ("flower", "lenet"): 1 / 2.5,
    ("flower", "mlp"): 1 / 10,
    ("pfl", "lenet"): 1.0,
    ("pfl", "mlp"): 1.0,
}
"""Targets: fedkd's time as a fraction of the other's."""

SIDE_PIXELS = {"lenet": 28, "mlp": 8}
CONTRAST = {"lenet": 1.2, "mlp": 0.5}
"""Of the patterns over the noise: a few rounds teach either model something, not everything."""
CLASSES = 10
ROWS_PER_CLIENT = 50
PUBLIC_ROWS = 200
TEST_ROWS = 500
BATCH_ROWS = 10
LEARNING_RATE = 0.1
LONGEST_START_S = 900
"""A client app that fails keeps Flower's server waiting for an hour."""
SAME_ACCURACY = 0.1
"""Shuffling differs from side to side and costs a few points at most; other steps cost more."""


@dataclass(frozen=True)
class Task:
    """What one process measures."""

    side: str
    case: str
    clients: int
    rounds: int
    workers: int
    folder: str

    @property
    def algorithm(self) -> str:
        return self.case.split("-")[0]

    @property
    def model(self) -> str:
        return self.case.split("-")[1]


@dataclass(frozen=True)
class Measured:
    """What it found: seconds of each round, steps of all clients in the last, final accuracy."""

    seconds: list[float]
    steps: int
    accuracy: float


def arguments() -> Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1, help="of fedkd and Flower; pfl has one")
    parser.add_argument("--rounds", type=int, default=4, help="timed rounds in each start")
    parser.add_argument("--pfl-python", type=Path, default=PFL_PYTHON, help="of pfl's environment")
    parser.add_argument("--repeats", type=int, default=5, help="starts of each side")
    parser.add_argument("--check", action="store_true", help="exit status 1 above a target")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no verdict")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON as well")
    options = parser.parse_args()
    if options.quick:
        options.clients, options.rounds, options.repeats = 4, 1, 1
        options.cases = ["fedavg-mlp", "fedmd-mlp"]
    return options


def main() -> int:
    options = arguments()
    sides = [side for side in SIDES if side in options.sides]
    if "pfl" in sides and not options.pfl_python.exists():
        print(f"pfl is left out: there is no {options.pfl_python}")
        sides.remove("pfl")
    before = machine()
    missed = 0
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            write_inputs(case, options.clients, Path(folder))
            found = measure_case(case, sides, options, folder)
        print(f"{case}, {options.clients} clients, workers: {options.workers}; seconds a round:")
        for side, samples in found.items():
            print(f"  {side:<8}{samples.text()}")
        for other in [side for side in found if side != "fedkd" and "fedkd" in found]:
            ratio = ratios(found["fedkd"], found[other])
            target = Namespace(**vars(options), at_most=AT_MOST[other, case.split("-")[1]])
            missed |= exit_status(ratio, target)
            print(
                f"ratio {ratio.text()} of fedkd to {other}, {1 / ratio.median:.2f} times as fast; "
                f"{verdict(ratio, target)}"
            )
            row(
                "B3",
                f"{case} round against {other}, workers: {options.workers}",
                f"{1 / ratio.median:.2f} times as fast",
                f"at least {1 / target.at_most:g} times",
                ratio.median <= target.at_most,
                options,
            )
        if options.json:
            tables = {side: samples.to_table() for side, samples in found.items()}
            print(json.dumps({"case": case, **before, **tables}))
    # The last line of a benchmark is a ratio.
    print(describe(before, os.getloadavg()[0]), file=sys.stderr)
    return missed


def measure_case(
    case: str, sides: Sequence[str], options: Namespace, folder: str
) -> dict[str, Samples]:
    """Measure every side in turn; leave the program where they did not do the same work."""
    samples: dict[str, Samples] = {}
    last: dict[str, Measured] = {}
    # One round warms up; fedkd judges its models in the last one.
    rounds = options.rounds + 2
    for repeat in range(options.repeats):
        # Turned round each time, so that no side always follows the same other one.
        for side in sides if repeat % 2 == 0 else reversed(sides):
            if side == "pfl" and case.startswith("fedmd"):
                continue
            task = Task(side, case, options.clients, rounds, options.workers, folder)
            last[side] = in_a_process(task, options.pfl_python)
            seconds = median(last[side].seconds[1:-1])
            samples.setdefault(side, Samples()).values.append(seconds)
    steps = {side: measured.steps for side, measured in last.items()}
    accuracies = {side: round(measured.accuracy, 3) for side, measured in last.items()}
    print(f"{case}: steps a round {steps}, accuracy after {rounds} rounds {accuracies}")
    close = max(accuracies.values()) - min(accuracies.values()) <= SAME_ACCURACY
    if len(set(steps.values())) > 1 or not (close or options.quick):
        raise SystemExit(f"{case}: the simulators did not do the same work, the ratio is void")
    return samples


def in_a_process(task: Task, pfl_python: Path) -> Measured:
    python = str(pfl_python) if task.side == "pfl" else sys.executable
    # Imported by name, so that the functions of a client app can be found in Ray's workers.
    program = "import simulators; simulators.serve()"
    # Nothing is reported to anybody; every Ray is one of its own, stays on the loopback and at the
    # driver's priority; a process computes with one thread.
    environment = {
        "FLWR_TELEMETRY_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE),
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_ADDRESS": "local",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "SIMULATORS_TASK": json.dumps(asdict(task)),
    }
    done = subprocess.run(
        [python, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=LONGEST_START_S,
    )
    if done.returncode:
        raise SystemExit(f"the side {task.side!r} failed:\n{done.stderr}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def serve() -> None:
    """Measure what the environment asks for."""
    torch.set_num_threads(1)
    side = {"fedkd": fedkd_side, "flower": flower_side, "pfl": pfl_side}[the_task().side]
    sys.stdout.write("\n" + json.dumps(asdict(side(the_task()))) + "\n")


@cache
def the_task() -> Task:
    """Return what this process, or the driver of this Ray worker, was asked for."""
    return Task(**json.loads(os.environ["SIMULATORS_TASK"]))


# -- what all sides share ----------------------------------------------------------------------


def write_inputs(case: str, clients: int, folder: Path) -> None:
    """Write noisy pictures of ten patterns, and the weights that FedAvg starts from."""
    from fedkd.models import ModelSettings, build_model
    from fedkd.training import initial_model_seed

    name = case.split("-")[1]
    pixels = SIDE_PIXELS[name]
    rng = np.random.default_rng(0)
    patterns = rng.standard_normal((CLASSES, 1, pixels, pixels))

    def draw(rows: int) -> tuple[np.ndarray, np.ndarray]:
        labels = rng.permutation(np.arange(rows) % CLASSES)
        noise = rng.standard_normal((rows, 1, pixels, pixels))
        return (CONTRAST[name] * patterns[labels] + noise).astype(np.float32), labels

    inputs, labels = draw(clients * ROWS_PER_CLIENT)
    test_inputs, test_labels = draw(TEST_ROWS)
    public, _ = draw(PUBLIC_ROWS)
    tables = {
        "inputs": inputs,
        "labels": labels,
        "public": public,
        "test_inputs": test_inputs,
        "test_labels": test_labels,
    }
    for table, values in tables.items():
        np.save(folder / f"{table}.npy", values)
    model = build_model(
        ModelSettings(name=name),
        input_shape=(1, pixels, pixels),
        num_classes=CLASSES,
        seed=initial_model_seed(0, 0),
    )
    torch.save(model.state_dict(), folder / "weights.pt")


@cache
def array(name: str) -> np.ndarray:
    """Return one of the task's arrays; a process reads it once."""
    loaded: np.ndarray = np.load(Path(the_task().folder) / f"{name}.npy")
    return loaded


@cache
def tensor(name: str) -> torch.Tensor:
    return torch.from_numpy(array(name))


def rows_of(client: int) -> slice:
    return slice(client * ROWS_PER_CLIENT, (client + 1) * ROWS_PER_CLIENT)


def initial_weights() -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(Path(the_task().folder) / "weights.pt")
    return weights


def plain_model(name: str) -> nn.Sequential:
    """Return the model as one would write it by hand; its parameters have fedkd's names."""
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    return nn.Sequential(
        nn.Conv2d(1, 6, kernel_size=5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, kernel_size=5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, CLASSES),
    )


def accuracy_of(model: nn.Module) -> float:
    model.eval()
    with torch.inference_mode():
        classes = model(tensor("test_inputs")).argmax(-1)
    return float((classes == tensor("test_labels")).float().mean())


class Clock:
    """Seconds between one round's end and the next's."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start()

    def start(self) -> None:
        self._last = time.perf_counter()

    def tick(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now


# -- fedkd -------------------------------------------------------------------------------------


def fedkd_side(task: Task) -> Measured:
    from fedkd.data import FederatedData
    from sim.commands.running import open_grid
    from sim.engine.resources import available_cpus
    from sim.server.rounds import RoundLoop
    from sim.settings import settings_from_table

    strategies = {
        "fedavg": {"name": "fedavg"},
        "fedmd": {"name": "fedmd", "transfer_epochs": 0, "digest_epochs": 1},
    }
    settings = settings_from_table(
        {
            "rounds": task.rounds,
            "data": {"public": {"size": PUBLIC_ROWS}, "test_rows": TEST_ROWS},
            "clients": {
                "count": task.clients,
                "models": [task.model],
                "batch_size": BATCH_ROWS,
                "optimizer": {"name": "sgd", "lr": LEARNING_RATE},
                "local": {"epochs": 1},
            },
            "strategy": strategies[task.algorithm],
            "engine": {"cpus_per_worker": available_cpus() / task.workers},
            "evaluation": {"every": task.rounds},
        }
    )
    data = FederatedData(
        name="patterns",
        class_names=tuple("0123456789"),
        channel_mean=np.zeros(1, np.float32),
        channel_std=np.ones(1, np.float32),
        train_inputs=array("inputs"),
        train_labels=array("labels"),
        client_rows=tuple(np.arange(len(array("labels"))).reshape(task.clients, -1)),
        public_inputs=array("public"),
        public_labels=None,
        validation_inputs=array("test_inputs")[:CLASSES],
        validation_labels=array("test_labels")[:CLASSES],
        test_inputs=array("test_inputs"),
        test_labels=array("test_labels"),
    )
    with open_grid(settings, data) as grid:
        clock = Clock()
        history = RoundLoop(grid, settings, data, []).run(clock.tick)
    rng = np.random.default_rng(0)
    passes = settings.local
    steps = sum(len(passes.batches(len(rows), rng)) for rows in data.client_rows)
    if task.algorithm == "fedmd":
        steps += task.clients * len(passes.batches(PUBLIC_ROWS, rng))
    return Measured(clock.seconds, steps, float(history.federation[-1]["accuracy"]))


# -- Flower ------------------------------------------------------------------------------------


def flower_side(task: Task) -> Measured:
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    client, server = ClientApp(), ServerApp()
    measured: list[Measured] = []
    client.train()({"fedavg": flower_fedavg_client, "fedmd": flower_fedmd_client}[task.algorithm])
    run = {"fedavg": flower_fedavg_server, "fedmd": flower_fedmd_server}[task.algorithm]
    server.main()(lambda grid, _: measured.append(run(grid)))
    run_simulation(
        server_app=server,
        client_app=client,
        num_supernodes=task.clients,
        backend_config={
            "init_args": {"num_cpus": task.workers},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    return measured[0]


def flower_epoch(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, loss: Any) -> int:
    """Train for one epoch, as in Flower's PyTorch tutorial; return the steps taken."""
    from torch.utils.data import DataLoader, TensorDataset

    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    batches = DataLoader(TensorDataset(inputs, targets), batch_size=BATCH_ROWS, shuffle=True)
    model.train()
    for batch, target in batches:
        optimizer.zero_grad()
        loss(model(batch), target).backward()
        optimizer.step()
    return len(batches)


def flower_private_epoch(model: nn.Module, client: int) -> int:
    rows = rows_of(client)
    return flower_epoch(model, tensor("inputs")[rows], tensor("labels")[rows], F.cross_entropy)


def flower_fedavg_client(message: Any, context: Any) -> Any:
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    torch.set_num_threads(1)
    model = plain_model(the_task().model)
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    steps = flower_private_epoch(model, int(context.node_config["partition-id"]))
    metrics = MetricRecord({"num-examples": ROWS_PER_CLIENT, "steps": steps})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)


def flower_fedavg_server(grid: Any) -> Measured:
    from flwr.app import ArrayRecord
    from flwr.serverapp.strategy import FedAvg

    task, clock = the_task(), Clock()
    steps: list[int] = []

    class Timed(FedAvg):
        """Flower's strategy; a round ends when it has aggregated."""

        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            replies = list(replies)
            aggregated = super().aggregate_train(server_round, replies)
            steps.append(sum(reply.content["metrics"]["steps"] for reply in replies))
            clock.tick()
            return aggregated

    strategy = Timed(fraction_evaluate=0.0, min_available_nodes=task.clients)
    wait_for_clients(grid)
    clock.start()
    result = strategy.start(
        grid=grid, initial_arrays=ArrayRecord(initial_weights()), num_rounds=task.rounds
    )
    model = plain_model(task.model)
    model.load_state_dict(result.arrays.to_torch_state_dict())
    return Measured(clock.seconds, int(steps[-1]), accuracy_of(model))


def flower_fedmd_client(message: Any, context: Any) -> Any:
    from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict

    torch.set_num_threads(1)
    client = int(context.node_config["partition-id"])
    model = plain_model(the_task().model)
    if "model" in context.state:
        model.load_state_dict(context.state["model"].to_torch_state_dict())
    steps = 0
    if "consensus" in message.content:
        consensus = torch.from_numpy(message.content["consensus"]["logits"].numpy())
        steps += flower_epoch(model, tensor("public"), consensus, F.l1_loss)
    steps += flower_private_epoch(model, client)
    model.eval()
    with torch.inference_mode():
        logits = model(tensor("public")).numpy()
    context.state["model"] = ArrayRecord(model.state_dict())
    content = RecordDict({"logits": ArrayRecord({"logits": Array(logits)})})
    metrics = {"steps": steps}
    if message.content["config"]["round"] == the_task().rounds:
        metrics["accuracy"] = accuracy_of(model)
    content["metrics"] = MetricRecord(metrics)
    return Message(content, reply_to=message)


def flower_fedmd_server(grid: Any) -> Measured:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

    wait_for_clients(grid)
    clock = Clock()
    consensus: ArrayRecord | None = None
    metrics: list[Any] = []
    for number in range(1, the_task().rounds + 1):
        content = RecordDict({"config": ConfigRecord({"round": number})})
        if consensus is not None:
            content["consensus"] = consensus
        messages = [
            Message(content, node, "train", group_id=str(number)) for node in grid.get_node_ids()
        ]
        replies = list(grid.send_and_receive(messages))
        logits = [reply.content["logits"]["logits"].numpy() for reply in replies]
        consensus = ArrayRecord({"logits": Array(np.stack(logits).mean(axis=0))})
        metrics = [reply.content["metrics"] for reply in replies]
        clock.tick()
    steps = int(sum(record["steps"] for record in metrics))
    accuracy = float(np.mean([record["accuracy"] for record in metrics]))
    return Measured(clock.seconds, steps, accuracy)


def wait_for_clients(grid: Any) -> None:
    while len(list(grid.get_node_ids())) < the_task().clients:
        time.sleep(0.1)


# -- pfl ---------------------------------------------------------------------------------------


def pfl_side(task: Task) -> Measured:
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    network = plain_model(task.model)
    network.load_state_dict(initial_weights())
    steps: list[int] = [0]

    def loss(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        network.train()
        steps[-1] += 1
        return F.cross_entropy(network(inputs), labels)

    def metrics(inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        network.eval()
        with torch.inference_mode():
            correct = int((network(inputs).argmax(-1) == labels).sum())
        return {"accuracy": Weighted(correct, len(labels))}

    network.loss, network.metrics = loss, metrics
    users = {
        client: Dataset(
            raw_data=[tensor("inputs")[rows_of(client)], tensor("labels")[rows_of(client)]]
        )
        for client in range(task.clients)
    }
    sampler = get_user_sampler("minimize_reuse", list(users))
    data = FederatedDataset(users.__getitem__, sampler)
    model = PyTorchModel(
        network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0),
    )
    clock = Clock()

    class Timed(TrainingProcessCallback):
        def after_central_iteration(
            self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
        ) -> tuple[bool, Metrics]:
            clock.tick()
            steps.append(0)
            return False, Metrics()

    clock.start()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=task.rounds,
            evaluation_frequency=task.rounds,
            train_cohort_size=task.clients,
            val_cohort_size=0,
        ),
        SimulatedBackend(training_data=data, val_data=data),
        model,
        NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=LEARNING_RATE, local_batch_size=BATCH_ROWS
        ),
        NNEvalHyperParams(local_batch_size=ROWS_PER_CLIENT),
        callbacks=[Timed()],
    )
    return Measured(clock.seconds, steps[-2], accuracy_of(network))


if __name__ == "__main__":
    sys.exit(main())
