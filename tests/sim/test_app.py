"""The same federation in Flower's own runtimes, over a grid that stands for them."""

import itertools
import json
import random
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from sim import app
from sim.commands.running import run
from sim.engine.nodes import NodesError
from sim.keeping.records import read_rows
from sim.server.replies import QuorumError
from sim.server.validation import AuthorError
from sim.settings import Settings, SettingsError, load_settings
from sim.wire.flower import Run, empty_run, identify_process, set_message_id
from sim.wire.messages import MISTAKE
from strategies.contract import Call
from strategies.mutual.dml import DML


def over_the_wire(message: Message) -> Message:
    """Return what arrives where a message was sent to."""
    objects = get_all_nested_objects(message)
    identity = message.object_id
    contents = {name: each.deflate() for name, each in objects.items()}
    arrived = inflate_object_from_contents(identity, contents)
    assert isinstance(arrived, Message)
    set_message_id(arrived, message.metadata.message_id)
    return arrived


@dataclass
class Node:
    """A SuperNode: what it was started with, and what its client left there."""

    id: int
    config: dict[str, Any]
    state: RecordDict = field(default_factory=RecordDict)


class Runtime(Grid):
    """Stands for Flower's runtime: odd node ids, replies in any order, errors in its own name.

    ``happens(phase, round, partition, node)`` is asked before a node gets a message: ``"dies"``
    takes the node away for good, ``"sleeps"`` for this message, ``"crashes"`` ends its ClientApp,
    ``"restarts"`` empties its state, ``"says mistake"`` has it say that an author's code failed.
    """

    def __init__(self, partitions: Iterable[int], count: int) -> None:
        identify_process(1)
        self._ids = itertools.count(1)
        self._node_ids = itertools.count(1000, 37)
        self._waiting: dict[str, Message] = {}
        self.config: dict[str, str] = {}
        self.nodes: dict[int, Node] = {}
        self.happens: Callable[[str, int, int], str] = lambda *_: ""
        self.asked: list[tuple[str, int, int]] = []
        for partition in partitions:
            self.join(partition, count)

    def join(self, partition: object, count: int) -> Node:
        node = Node(next(self._node_ids), {"partition-id": partition, "num-partitions": count})
        self.nodes[node.id] = node
        return node

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return empty_run(1)

    def create_message(self, *_: object, **__: object) -> Message:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        for message in messages:
            set_message_id(message, f"message {next(self._ids)}")
            if message.metadata.dst_node_id in self.nodes:
                self._waiting[message.metadata.message_id] = message
        return [
            m.metadata.message_id if m.metadata.message_id in self._waiting else ""
            for m in messages
        ]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = [self._reply(self._waiting.pop(each)) for each in list(message_ids)]
        random.shuffle(replies)
        return [over_the_wire(reply) for reply in replies]

    def _reply(self, message: Message) -> Message:
        message = over_the_wire(message)
        node = self.nodes.get(message.metadata.dst_node_id)
        if node is None:
            return self._error(message, ErrorCode.NODE_UNAVAILABLE)
        phase, round = message.metadata.message_type, int(message.metadata.group_id or 0)
        partition = node.config["partition-id"]
        self.asked.append((phase, round, partition))
        match self.happens(phase, round, partition):
            case "dies":
                del self.nodes[node.id]
                return self._error(message, ErrorCode.NODE_UNAVAILABLE)
            case "sleeps":
                return self._error(message, ErrorCode.MESSAGE_UNAVAILABLE)
            case "crashes":
                return self._error(message, ErrorCode.CLIENT_APP_CRASHED)
            case "says mistake":
                told = "Traceback\n  somewhere\nKeyError: 'forged'"
                return Message(Error(MISTAKE, told), reply_to=message)
            case "restarts":
                node.state = RecordDict()
        context = Context(1, node.id, dict(node.config), node.state, dict(self.config))
        reply = app.client_app(message, context)
        node.state = context.state
        return reply

    def _error(self, message: Message, code: int) -> Message:
        reply = Message(Error(code, "as the SuperLink says it"), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = 1
        return reply


@pytest.fixture
def words(small_words: tuple[str, ...], tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Write settings as ``flwr run --run-config`` hands them over."""

    def config(*more: str) -> dict[str, str]:
        given = [*small_words, "nodes.wait_s=0.3", f"output={tmp_path / 'flower'}", *more]
        return {"config": "", "overrides": shlex.join(given)}

    return config


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Run the ServerApp, and return what is in the run's folder."""
    monkeypatch.setattr(sys, "tracebacklimit", None, raising=False)

    def run_app(grid: Runtime, config: dict[str, str]) -> dict[str, Any]:
        grid.config = config
        app.server_app(grid, Context(1, 1, {}, RecordDict(), dict(config)))
        return left_behind(tmp_path)

    return run_app


def left_behind(tmp_path: Path) -> dict[str, Any]:
    (folder,) = (tmp_path / "flower" / "default").iterdir()
    return {
        "folder": folder,
        "metrics": [timeless(row) for row in read_rows(folder / "metrics.jsonl")],
        "exchange": read_rows(folder / "exchange.jsonl"),
        "events": read_rows(folder / "events.jsonl"),
        "result": json.loads((folder / "result.json").read_text()),
    }


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if "seconds" not in key}


def of_run(settings: Settings) -> dict[str, Any]:
    """Return what `fedkd run` leaves behind."""
    folder = run(settings).folder
    return {
        "metrics": [timeless(row) for row in read_rows(folder / "metrics.jsonl")],
        "exchange": read_rows(folder / "exchange.jsonl"),
        "events": read_rows(folder / "events.jsonl"),
    }


def kinds(events: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["round"], row.get("client"), row["event"]) for row in events]


# -- the same numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["dml", "fedavg", "own_ballots:Ballots"])
def test_flower_s_runtimes_compute_what_fedkd_run_computes(
    small: Callable[..., Settings], words: Any, serve: Any, strategy: str
) -> None:
    ours = of_run(small(f"strategy.name={strategy}"))
    theirs = serve(Runtime(range(4), 4), words(f"strategy.name={strategy}"))
    assert {key: theirs[key] for key in ours} == ours
    assert theirs["result"]["status"] == "finished"


def test_nodes_see_the_data_of_their_ward_and_keep_the_budget_and_the_clock(
    small: Callable[..., Settings], words: Any, serve: Any, on_wards: tuple[str, ...]
) -> None:
    # Nodes are never stacked.
    ours = of_run(small(*on_wards, "engine.vectorize=loop"))
    theirs = serve(Runtime(range(4), 4), words(*on_wards))
    assert {key: theirs[key] for key in ours} == ours
    assert theirs["result"]["status"] == "finished"


@pytest.mark.parametrize(
    "mechanism",
    ["privacy={mechanism: dp_sgd, noise: 1}", "privacy={mechanism: gaussian, noise: 1}"],
)
def test_nodes_protect_what_they_send_as_workers_do(
    small: Callable[..., Settings], words: Any, serve: Any, mechanism: str
) -> None:
    protected = mechanism, "strategy.name=dml", "clients.models=[mlp]"
    ours = of_run(small(*protected, "engine.vectorize=loop"))
    theirs = serve(Runtime(range(4), 4), words(*protected))
    assert {key: theirs[key] for key in ours} == ours
    assert theirs["result"]["privacy"]["epsilon"] > 0
    charged = [row for row in theirs["exchange"] if row["direction"] == "release"]
    # Once a round for each client, in as many entries as there are noises.
    told = sorted((row["round"], client) for row in charged for client in row["clients"])
    assert told == [(round, client) for round in (1, 2) for client in range(4)]


@pytest.mark.parametrize("kind", ["lma", "shuffled", "backdoor"])
def test_nodes_have_the_adversaries_that_workers_have(
    small: Callable[..., Settings], words: Any, serve: Any, kind: str
) -> None:
    """At the server, at clients, and in private rows."""
    attacked = f"adversary={{kind: {kind}, fraction: 0.5}}", "strategy.name=dsfl"
    ours = of_run(small(*attacked))
    theirs = serve(Runtime(range(4), 4), words(*attacked))
    assert {key: theirs[key] for key in ours} == ours
    assert theirs["result"]["adversary"]["kind"] == kind
    assert ours["metrics"] != of_run(small("strategy.name=dsfl"))["metrics"]


def test_the_server_s_models_are_kept_and_those_of_nodes_are_not(words: Any, serve: Any) -> None:
    of_server = words("strategy.name=fedavg", "rounds=1", "keep_models=server")
    left = serve(Runtime(range(4), 4), of_server)
    assert set(left["result"]["models"]) == {"server-mlp", "server-cnn"}
    assert (left["folder"] / "models" / "server-cnn.safetensors").is_file()
    with pytest.raises(SettingsError, match="keep_models must be auto, server or none where"):
        serve(Runtime(range(4), 4), words("keep_models=best"))


@pytest.mark.parametrize("slip", ["client", "judging", "aggregate"])
def test_an_author_s_exception_ends_the_run_with_the_author_s_traceback(
    words: Any, serve: Any, tmp_path: Path, slip: str
) -> None:
    config = words("strategy.name=own_ballots:Ballots", f"strategy.slip={slip}")
    with pytest.raises(AuthorError, match=r"own_ballots\.py.*\n(.*\n)*KeyError: 'there"):
        serve(Runtime(range(4), 4), config)
    left = left_behind(tmp_path)
    assert left["result"]["status"] == "failed"
    # A mistake of a client's half counts once more than half of the nodes report it.
    assert len(left["events"]) <= 2
    assert {row["event"] for row in left["events"]} <= {"rejected", "evaluation failed"}
    # Flower's log shows the text and no traceback of ours.
    assert sys.tracebacklimit == 0


@pytest.mark.parametrize("below_quorum", ["abort", "retry"])
def test_a_node_that_says_that_the_code_is_wrong_does_not_end_the_run(
    words: Any, serve: Any, caplog: pytest.LogCaptureFixture, below_quorum: str
) -> None:
    grid = Runtime(range(4), 4)
    grid.happens = lambda phase, *_: "says mistake" if _[1] == 2 and phase != "query" else ""
    left = serve(grid, words(f"engine.below_quorum={below_quorum}", "engine.quorum=0.5"))
    assert left["result"]["status"] == "finished"
    assert kinds(left["events"]) == [
        (round, 2, event) for round in (1, 2) for event in ("rejected", "evaluation failed")
    ]
    assert left["events"][0]["reason"].endswith("KeyError: 'forged'")
    assert "client 2: its node reports a mistake" in caplog.text
    assert "1 of 4 nodes do; the run ends when more than half do:\nTraceback" in caplog.text


def test_a_mistake_that_most_nodes_report_ends_the_run_also_over_several_rounds(
    words: Any, serve: Any
) -> None:
    grid = Runtime(range(4), 4)
    grid.happens = lambda phase, *_: "says mistake" if _[1] != 2 and phase == "train" else ""
    with pytest.raises(AuthorError, match=r"round \d+, a client's half.*\n(.*\n)*KeyError"):
        serve(grid, words("clients.participants=2", "engine.below_quorum=skip", "rounds=8"))


def test_planned_faults_strike_nodes_as_they_strike_workers(
    small: Callable[..., Settings], words: Any, serve: Any
) -> None:
    faults = (
        "faults=[{kind: crash, clients: [1], rounds: [1]}, {kind: dropout, clients: [2]}, "
        "{kind: bad_reply, clients: [3], rounds: [2]}]"
    )
    ours = of_run(small(faults, "engine.quorum=0"))
    theirs = serve(Runtime(range(4), 4), words(faults, "engine.quorum=0"))
    assert theirs["metrics"] == ours["metrics"]
    assert theirs["exchange"] == ours["exchange"]
    assert kinds(theirs["events"]) == kinds(ours["events"])


def test_the_clock_shows_nodes_the_same_time_and_asks_the_same_ones(
    small: Callable[..., Settings], words: Any, serve: Any
) -> None:
    slow = (
        "clock.speed=[1e9,1e9,1]",
        "clock.up=1e5",
        "clock.deadline_s=30",
        "presence.join_rounds=[1,1,1,2]",
    )
    ours = of_run(small(*slow))
    theirs = serve(Runtime(range(4), 4), words(*slow))
    assert theirs["metrics"] == ours["metrics"]
    assert theirs["exchange"] == ours["exchange"]
    assert (
        kinds(theirs["events"])
        == kinds(ours["events"])
        == [
            (1, 2, "rejected"),
            (2, 2, "rejected"),
        ]
    )


# -- nodes that are not there ------------------------------------------------------------------


@pytest.mark.parametrize("how", ["dies", "sleeps"])
def test_a_node_that_is_lost_in_training_is_a_lost_client_and_the_round_goes_on(
    small: Callable[..., Settings], words: Any, serve: Any, how: str
) -> None:
    crash = (
        "faults=[{kind: crash, clients: [2], rounds: [2], phases: [train, evaluate], "
        "attempts: null}]"
    )
    ours = of_run(small(crash))
    grid = Runtime(range(4), 4)
    grid.happens = lambda phase, round, partition: (
        how if (phase, round, partition) == ("train", 2, 2) else ""
    )
    theirs = serve(grid, words())
    assert theirs["metrics"] == ours["metrics"]
    assert theirs["exchange"] == ours["exchange"]
    assert kinds(theirs["events"]) == [(2, 2, "rejected"), (2, 2, "evaluation failed")]
    reason = {"dies": "its node is gone", "sleeps": "no answer within engine.deadline_s = 3600"}
    assert reason[how] in theirs["events"][0]["reason"]
    assert theirs["result"]["status"] == "finished"


def test_an_absent_node_is_named_and_changes_nobody_s_split(words: Any, serve: Any) -> None:
    whole = serve_apart(serve, Runtime(range(4), 4), words(), "whole")
    part = serve_apart(serve, Runtime([0, 1, 3], 4), words(), "part")
    assert load_settings(part["folder"] / "settings.yaml").clients.count == 4
    assert kinds(part["events"])[:1] == [(1, 2, "absent")]
    assert "partition-id is 2" in part["events"][0]["reason"]
    # In round 1 nobody has heard of anybody: who is there computes what it would have.
    first = {
        name: {
            row["client"]: row["accuracy"]
            for row in rows["metrics"]
            if row["scope"] == "client" and row["round"] == 1
        }
        for name, rows in (("whole", whole), ("part", part))
    }
    assert first["part"] == {key: value for key, value in first["whole"].items() if key != 2}


def serve_apart(serve: Any, grid: Runtime, config: dict[str, str], name: str) -> dict[str, Any]:
    """Run the ServerApp into a folder of its own."""
    at = config["overrides"].index("output=")
    end = config["overrides"].find(" ", at)
    output = config["overrides"][at : end if end > 0 else None].removeprefix("output=")
    serve(grid, config)
    (folder,) = (Path(output) / "default").iterdir()
    moved = folder.parents[2] / name
    folder.rename(moved)
    return {
        "folder": moved,
        "metrics": read_rows(moved / "metrics.jsonl"),
        "events": read_rows(moved / "events.jsonl"),
    }


def test_a_late_node_is_asked_from_the_round_after_it_came(words: Any, serve: Any) -> None:
    grid = Runtime([0, 1, 3], 4)

    def happens(phase: str, round: int, partition: int) -> str:
        if (phase, round, partition) == ("train", 1, 3):
            grid.join(2, 4)
        return ""

    grid.happens = happens
    left = serve(grid, words("rounds=3"))
    assert kinds(left["events"]) == [
        (1, 2, "absent"),
        (1, 2, "rejected"),
        (1, 2, "evaluation failed"),
        (2, 2, "joined"),
    ]
    assert [row["replies"] for row in left["metrics"] if row["scope"] == "federation"] == [3, 4, 4]


def test_a_node_that_was_slow_for_a_round_is_asked_again(words: Any, serve: Any) -> None:
    grid = Runtime(range(4), 4)
    grid.happens = lambda phase, round, partition: (
        "sleeps" if (phase, round, partition) == ("train", 1, 0) else ""
    )
    left = serve(grid, words("rounds=3"))
    assert (2, 0, "joined") in kinds(left["events"])
    assert [row["replies"] for row in left["metrics"] if row["scope"] == "federation"] == [3, 4, 4]


def test_a_round_below_the_quorum_waits_for_nodes(words: Any, serve: Any) -> None:
    grid = Runtime(range(4), 4)

    def happens(phase: str, round: int, partition: int) -> str:
        if (phase, round) != ("train", 2) or grid.asked.count(("train", 2, partition)) > 1:
            return ""
        if partition:
            grid.join(partition, 4)
            return "dies"
        return ""

    grid.happens = happens
    left = serve(grid, words("nodes.wait_s=20"))
    assert left["result"]["status"] == "finished"
    assert "round retried" in [row["event"] for row in left["events"]]
    # They are other nodes: what their clients had learnt in round 1 is gone.
    lost = {row["client"] for row in left["events"] if row["event"] == "state lost"}
    assert len(lost) >= 2


def test_no_quorum_ends_the_run_with_the_reasons(words: Any, serve: Any, tmp_path: Path) -> None:
    grid = Runtime([1], 4)
    with pytest.raises(QuorumError, match="client 0: it has no node now"):
        serve(grid, words())
    assert left_behind(tmp_path)["result"]["status"] == "failed"
    # Flower's log shows the line and no traceback.
    assert sys.tracebacklimit == 0


def test_a_runtime_without_nodes_is_refused_in_one_line(words: Any, serve: Any) -> None:
    with pytest.raises(NodesError, match=r"no node came within nodes\.wait_s = 0\.3 seconds"):
        serve(Runtime([], 4), words())


# -- nodes that lost what they had -------------------------------------------------------------


def restarting(phase: str, round: int, partition: int) -> str:
    return "restarts" if (phase, round, partition) == ("train", 2, 1) else ""


def test_a_restarted_node_starts_anew_and_is_named(words: Any, serve: Any) -> None:
    grid = Runtime(range(4), 4)
    grid.happens = restarting
    left = serve(grid, words())
    (event,) = left["events"]
    assert (event["round"], event["client"], event["event"]) == (2, 1, "state lost")
    assert "the state of round 1" in event["reason"]
    assert left["metrics"][-4 - 1]["replies"] == 4


def test_a_client_knows_whether_it_has_lost_its_state(
    words: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh: list[tuple[int, int, bool]] = []
    client = DML.client

    def watched(self: DML, cohort: Any, received: Any, call: Call) -> Any:
        fresh.extend(
            (call.number, member, call.fresh[position])
            for position, member in enumerate(cohort.clients)
        )
        return client(self, cohort, received, call)

    monkeypatch.setattr(DML, "client", watched)
    grid = Runtime(range(4), 4)
    grid.happens = restarting
    serve(grid, words("rounds=3"))
    # All are in their first call, and later the one whose node was restarted.
    assert sorted(call[:2] for call in fresh if call[2]) == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 1)]
    assert len(fresh) == 12


@pytest.mark.parametrize(
    ("strategy", "options"),
    [("fedkd", []), ("scarlet", []), ("codistillation", ["strategy.interval=4"])],
)
def test_who_lost_its_state_is_sent_in_the_next_round_what_it_lacks(
    words: Any, serve: Any, strategy: str, options: list[str]
) -> None:
    grid = Runtime(range(4), 4)
    grid.happens = lambda phase, round, partition: (
        "restarts" if (phase, round, partition) == ("train", 3, 1) else ""
    )
    left = serve(grid, words(f"strategy.name={strategy}", "rounds=4", *options))
    assert (3, 1, "state lost") in kinds(left["events"])
    down = dict.fromkeys(range(4), 0)
    for row in left["exchange"]:
        if (row["round"], row["direction"]) == (4, "down"):
            down[row["client"]] += row["bytes"]
    # The others lack only what is new, or nothing.
    assert down.pop(1) > max(down.values())
    (last,) = [r for r in left["metrics"] if (r["round"], r["scope"]) == (4, "federation")]
    assert last["replies"] == 4


def test_a_node_that_was_restarted_before_it_is_judged_is_heard_too(words: Any, serve: Any) -> None:
    grid = Runtime(range(4), 4)
    grid.happens = lambda phase, round, partition: (
        "restarts" if (phase, round, partition) == ("evaluate", 2, 1) else ""
    )
    left = serve(grid, words("strategy.name=fedkd", "rounds=3"))
    assert (2, 1, "state lost") in kinds(left["events"])
    (last,) = [r for r in left["metrics"] if (r["round"], r["scope"]) == (3, "federation")]
    assert last["replies"] == 4


def test_a_restarted_node_is_refused_where_the_settings_say_so(words: Any, serve: Any) -> None:
    grid = Runtime(range(4), 4)
    grid.happens = restarting
    left = serve(grid, words("nodes.restarted=refuse", "rounds=3"))
    assert kinds(left["events"]) == [
        (2, 1, "rejected"),
        (2, 1, "evaluation failed"),
        (3, 1, "rejected"),
        (3, 1, "evaluation failed"),
    ]
    assert "nodes.restarted: refuse" in left["events"][0]["reason"]


# -- nodes that cannot be a client -------------------------------------------------------------


def test_a_node_that_cuts_the_data_otherwise_is_refused_by_name(words: Any, serve: Any) -> None:
    grid = Runtime([0, 1, 2], 4)
    other = grid.join(3, 5)
    left = serve(grid, words())
    assert kinds(left["events"])[:2] == [(1, None, "node refused"), (1, 3, "absent")]
    reason = left["events"][0]["reason"]
    assert str(other.id) in reason
    assert "num-partitions=5" in reason
    assert "clients.count is 4" in reason


def test_a_runtime_of_another_size_is_refused_at_once(words: Any, serve: Any) -> None:
    with pytest.raises(NodesError, match=r"clients.count is 4.*--num-supernodes 4"):
        serve(Runtime(range(2), 2), words("nodes.wait_s=600"))


@pytest.mark.parametrize(
    ("config", "words_of_it"),
    [
        ({"partition-id": 3}, "num-partitions=None"),
        ({"partition-id": "3", "num-partitions": 4}, "partition-id='3'"),
        ({"partition-id": 7, "num-partitions": 4}, "partition-id must be 0 to 3"),
    ],
)
def test_a_node_that_does_not_say_which_client_it_is_is_refused(
    words: Any, serve: Any, config: dict[str, Any], words_of_it: str
) -> None:
    grid = Runtime([0, 1, 2], 4)
    grid.join(3, 4).config = config
    left = serve(grid, words())
    (event,) = [row for row in left["events"] if row["event"] == "node refused"]
    assert words_of_it in event["reason"]
    assert "Traceback" not in event["reason"]


def test_a_node_whose_process_did_not_start_in_time_is_asked_again(words: Any, serve: Any) -> None:
    grid = Runtime(range(4), 4)
    grid.happens = lambda phase, round, partition: (
        "crashes" if partition == 1 and grid.asked.count(("query", 0, 1)) == 1 else ""
    )
    left = serve(grid, words("nodes.wait_s=20", "rounds=1"))
    assert kinds(left["events"]) == [(1, None, "node asked again")]
    assert left["metrics"][0]["replies"] == 4


def test_a_second_node_for_a_client_is_named_and_takes_over_when_the_first_is_gone(
    words: Any, serve: Any
) -> None:
    grid = Runtime(range(4), 4)
    second = grid.join(2, 4)
    first = min(node for node, each in grid.nodes.items() if each.config["partition-id"] == 2)
    grid.happens = lambda phase, round, partition: (
        "dies" if (phase, round, partition) == ("train", 1, 2) and first in grid.nodes else ""
    )
    left = serve(grid, words("rounds=3"))
    named = [row for row in left["events"] if row["event"] == "second node"]
    assert [row["client"] for row in named] == [2]
    assert (2, 2, "joined") in kinds(left["events"])
    assert len({first, second.id} & set(grid.nodes)) == 1


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"data": "other"}, "its data is not what the server has (data.source 'digits'"),
        ({"code": '{"mine/nets.py": "1234"}'}, "mine/nets.py is new"),
        ({"code": "[]"}, "it does not say which code it has"),
    ],
)
def test_a_node_with_other_data_or_code_is_refused(
    words: Any, serve: Any, monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], reason: str
) -> None:
    introduction = app.introduction

    def changed_on_node_3(settings: Settings, data: Any, partition: int) -> Any:
        said = introduction(settings, data, partition)
        if partition != 3:
            return said
        if "mine" in changed.get("code", ""):
            return replace(
                said, code=json.dumps(json.loads(said.code) | json.loads(changed["code"]))
            )
        return replace(said, **changed)

    monkeypatch.setattr(app, "introduction", changed_on_node_3)
    left = serve(Runtime(range(4), 4), words("rounds=1"))
    assert kinds(left["events"])[:2] == [(1, None, "node refused"), (1, 3, "absent")]
    assert reason in left["events"][0]["reason"]


@pytest.mark.parametrize(
    "said",
    [{}, {"partition": "3", "partitions": 4, "data": "", "code": "", "versions": ""}, {"round": 1}],
)
def test_a_node_that_introduces_itself_in_other_words_is_refused(
    words: Any, serve: Any, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any]
) -> None:
    content = app.introduction_content
    monkeypatch.setattr(
        app,
        "introduction_content",
        lambda words: (
            RecordDict({"node": ConfigRecord(said)}) if words.partition == 3 else content(words)
        ),
    )
    left = serve(Runtime(range(4), 4), words("rounds=1"))
    assert kinds(left["events"])[:2] == [(1, None, "node refused"), (1, 3, "absent")]
    assert "it introduces itself as" in left["events"][0]["reason"]


def test_other_versions_of_packages_are_told(
    words: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    introduction = app.introduction
    monkeypatch.setattr(
        app, "introduction", lambda *its: replace(introduction(*its), versions="torch 1.0")
    )
    left = serve(Runtime(range(4), 4), words("rounds=1"))
    assert [row["event"] for row in left["events"]] == ["other versions"] * 4
    assert "has torch 1.0, the server has fedkd" in left["events"][0]["reason"]


CODE = "tests_of_nodes:net"


@pytest.fixture
def package_of_net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `CODE` importable, and let nobody allow it yet."""
    source = "from torch import nn\n\ndef net(input_shape, num_classes):\n"
    source += "    channels, height, width = input_shape\n"
    source += "    rows = channels * height * width\n"
    source += "    return nn.Sequential(nn.Flatten(), nn.Linear(rows, num_classes))\n"
    (tmp_path / "tests_of_nodes.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("FEDKD_ALLOW", raising=False)


@pytest.mark.usefixtures("package_of_net")
def test_code_that_the_words_of_a_run_name_is_allowed_on_its_nodes(words: Any, serve: Any) -> None:
    left = serve(Runtime(range(4), 4), words("rounds=1", f"clients.models=[{CODE}]"))
    assert left["events"] == []
    assert left["result"]["status"] == "finished"


@pytest.mark.usefixtures("package_of_net")
def test_a_node_runs_no_code_that_only_a_file_of_the_server_s_names(
    words: Any, serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"clients: {{models: ['{CODE}']}}\n")
    config = words("rounds=1")
    config["overrides"] = config["overrides"].replace("'clients.models=[mlp,cnn]' ", "")
    config["config"] = str(file)
    monkeypatch.setenv("FEDKD_ALLOW", "tests_of_nodes")
    grid = Runtime(range(4), 4)

    def happens(phase: str, round: int, partition: int) -> str:
        # The nodes' environment is not the server's: only node 0 has been told.
        monkeypatch.setenv("FEDKD_ALLOW", "" if partition else "tests_of_nodes")
        return ""

    grid.happens = happens
    config["overrides"] += " engine.quorum=0.25"
    left = serve(grid, config)
    refused = [row for row in left["events"] if row["event"] == "node refused"]
    assert len(refused) == 3
    assert f"'{CODE}' is code that only a file names" in refused[0]["reason"]
    assert left["result"]["status"] == "finished"


# -- settings ----------------------------------------------------------------------------------


def context(config: str = "", overrides: str = "") -> Context:
    return Context(1, 1, {}, RecordDict(), {"config": config, "overrides": overrides})


def test_overrides_are_words_of_a_shell() -> None:
    settings = app.read_settings(
        context(
            overrides="name='my run' data.partition='{kind: dirichlet, alpha: 0.3}'".replace(
                "my run", "my_run"
            )
        )
    )
    assert settings.name == "my_run"
    assert settings.data.partition.alpha == 0.3


def test_an_open_quote_is_one_line() -> None:
    with pytest.raises(SettingsError, match='No closing quotation in "name=\'x"'):
        app.read_settings(context(overrides="name='x"))


def test_a_file_of_settings_is_that_of_the_project_wherever_the_server_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app.read_settings(context("conf/quickstart.yaml")).name == "quickstart"


def test_a_file_that_only_the_server_has_is_enough(
    tmp_path: Path, words: Any, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "only_here.yaml"
    file.write_text("rounds: 1\nclients: {optimizer: {lr: 0.123}}\n")
    config = words()
    config["overrides"] = config["overrides"].replace("rounds=2 ", "")
    config["config"] = str(file)
    grid = Runtime(range(4), 4)

    def happens(phase: str, *_: object) -> str:
        # The file is gone before any node could look at it.
        file.unlink(missing_ok=True)
        return ""

    grid.happens = happens
    left = serve(grid, config)
    assert left["result"]["rounds"] == 1
    assert left["events"] == []
