"""An author's exception ends the run with its traceback; a misfortune does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sim
from sim.engine.session import RaySession
from sim.server.replies import QuorumError
from sim.server.validation import AuthorError, authors_code
from sim.settings import EngineSettings

BALLOTS = "own_ballots:Ballots"
HALVES = {
    "client": "round 1, a client's half",
    "judging": "round 1, the judging of a client",
    "begin": "before round 1, the server's half",
    "participants": "round 1, the server's half",
    "receives": "round 1, the server's half",
    "payload": "round 2, the server's half",
    "asks": "round 1, the server's half",
    "aggregate": "round 1, the server's half",
    "judged_models": "round 1, the server's half",
}


@pytest.mark.parametrize("slip", HALVES)
def test_an_exception_of_an_algorithm_ends_the_run_at_once(
    slip, tiny_settings, tiny_data, simulate
):
    settings = tiny_settings(BALLOTS, options={"slip": slip})
    with pytest.raises(AuthorError) as raised:
        simulate(settings, tiny_data())
    told = str(raised.value)
    assert told.startswith(f"{HALVES[slip]}: an algorithm's or a model's own code failed\n")
    assert "own_ballots.py" in told
    assert told.endswith("KeyError: 'there is no such key'")


@pytest.mark.parametrize("below_quorum", ["retry", "skip", "abort"])
def test_no_quorum_makes_a_mistake_an_event(below_quorum, tiny_settings, tiny_data, simulate):
    engine = {"backend": "inline", "below_quorum": below_quorum, "quorum": 0.0}
    with pytest.raises(AuthorError):
        simulate(tiny_settings(BALLOTS, options={"slip": "client"}, engine=engine), tiny_data())


def answering(kind):
    """A client half that answers something odd."""

    def client(self, cohort, received, call):
        cohort.predict_public(call.public_rows)
        return kind(len(cohort.clients))

    return client


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (lambda members: [1.0] * members, "client answered a float, expected a payload"),
        (lambda members: [None] * members, "client answered a NoneType, expected a payload"),
        (lambda members: "oddity", "answered 6 payloads for 1 clients"),
    ],
)
def test_an_answer_that_is_no_payload_is_the_author_s_mistake(
    kind, told, tiny_settings, tiny_data, simulate, monkeypatch
):
    import own_ballots

    monkeypatch.setattr(own_ballots.Ballots, "client", answering(kind))
    with pytest.raises(AuthorError, match=told):
        simulate(tiny_settings(BALLOTS), tiny_data())


def test_a_state_of_another_class_is_the_author_s_mistake(
    tiny_settings, tiny_data, simulate, monkeypatch
):
    import own_ballots

    monkeypatch.setattr(own_ballots.Ballots, "aggregate", lambda self, *_: {"votes": 1})
    with pytest.raises(AuthorError, match="aggregate gave a dict, expected its State, Votes"):
        simulate(tiny_settings(BALLOTS), tiny_data())


def test_a_key_that_cannot_be_looked_up_is_the_author_s_mistake(
    tiny_settings, tiny_data, simulate, monkeypatch
):
    import own_ballots

    monkeypatch.setattr(own_ballots.Ballots, "receives", lambda self, *_: ["all"])
    with pytest.raises(AuthorError, match="receives gave a list, expected a key such as a word"):
        simulate(tiny_settings(BALLOTS), tiny_data())


def test_a_class_of_states_that_is_no_value_is_refused_by_name(tiny_settings, monkeypatch):
    import own_ballots

    monkeypatch.setattr(own_ballots.Ballots, "State", dict)
    with pytest.raises(ValueError, match=r"its State must be a frozen dataclass.*got dict"):
        tiny_settings(BALLOTS)


def test_an_exception_of_a_model_ends_the_run_as_well(
    tiny_settings, tiny_data, simulate, monkeypatch
):
    import odd_models

    model = {"name": "odd_models:make", "options": {"kind": "Plain"}}
    forward = odd_models.Plain.forward

    def broken(self, inputs):
        # Where it is tried there are two rows.
        if self.training and len(inputs) > 2:
            raise ZeroDivisionError("in a forward pass")
        return forward(self, inputs)

    monkeypatch.setattr(odd_models.Plain, "forward", broken)
    with pytest.raises(AuthorError, match="ZeroDivisionError: in a forward pass"):
        simulate(tiny_settings("local", clients={"models": [model]}), tiny_data())


@pytest.mark.parametrize("kind", ["crash", "memory", "hang", "bad_reply", "dropout"])
def test_an_injected_fault_is_an_event(kind, tiny_settings, tiny_data, simulate):
    fault = {"kind": kind, "clients": [1], "rounds": [1]}
    engine = {"backend": "inline", "deadline_s": 20.0 if kind != "hang" else 1.0}
    run = simulate(tiny_settings(BALLOTS, faults=[fault], engine=engine), tiny_data())
    (event,) = run.events
    assert (event["round"], event["client"], event["event"]) == (1, 1, "rejected")
    assert len(run.history.federation) == 3


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("no room"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["Python", "device", "torch"],
)
def test_a_client_without_memory_is_an_event(
    error, tiny_settings, tiny_data, simulate, monkeypatch
):
    import own_ballots

    learn = own_ballots.Ballots.client

    def client(self, cohort, received, call):
        if cohort.clients == (2,) and call.number == 2:
            raise error
        return learn(self, cohort, received, call)

    monkeypatch.setattr(own_ballots.Ballots, "client", client)
    run = simulate(tiny_settings(BALLOTS), tiny_data())
    assert [(e["round"], e["client"], e["event"]) for e in run.events] == [(2, 2, "rejected")]


def test_a_model_that_diverged_is_an_event(tiny_settings, tiny_data, simulate, monkeypatch):
    import own_ballots

    def spoil(self, cohort, received, call):
        if cohort.clients == (1,):
            (weights,) = cohort.weights()
            cohort.load_weights({name: array * float("nan") for name, array in weights.items()})

    monkeypatch.setattr(own_ballots.Ballots, "before_evaluation", spoil)
    run = simulate(tiny_settings(BALLOTS, rounds=1), tiny_data())
    assert [(e["client"], e["event"]) for e in run.events] == [(1, "evaluation failed")]
    assert "predicts NaN" in run.events[0]["reason"]


def test_a_quorum_that_fails_inside_aggregate_is_no_mistake_of_its_author(
    tiny_settings, tiny_data, simulate
):
    fault = {"kind": "crash", "attempts": None}
    with pytest.raises(QuorumError):
        simulate(tiny_settings(BALLOTS, faults=[fault]), tiny_data())


def test_what_is_handed_on_and_what_happens_to_right_code_stays_what_it_is():
    handed_on = OSError("the disk is full")
    with pytest.raises(OSError, match="disk"), authors_code("here", lambda: handed_on):
        raise handed_on
    with pytest.raises(MemoryError), authors_code("here"):
        raise MemoryError
    with pytest.raises(KeyboardInterrupt), authors_code("here"):
        raise KeyboardInterrupt
    with pytest.raises(AuthorError, match="here: ") as raised, authors_code("here"):
        raise OSError("of the author's own")
    assert isinstance(raised.value.__cause__, OSError)


# -- what a user sees --------------------------------------------------------------------------

ROOT = Path(sim.__file__).parents[1]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "own")])


def fedkd(*words, cwd):
    return subprocess.run(
        [sys.executable, "-m", "fedkd", "run", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": PATHS},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("backend", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
@pytest.mark.parametrize("slip", ["client", "aggregate"])
def test_a_user_sees_the_author_s_traceback_and_nothing_of_ours(
    slip, backend, small_words, tmp_path
):
    if backend == "ray" and slip == "aggregate":
        pytest.skip("the server's half runs in the same process")
    words = [word for word in small_words if not word.startswith("engine.")]
    done = fedkd(
        *words,
        f"strategy.name={BALLOTS}",
        f"strategy.slip={slip}",
        f"engine.backend={backend}",
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    told = done.stderr[done.stderr.index("fedkd: ") :].splitlines()
    assert told[0] == f"fedkd: {HALVES[slip]}: an algorithm's or a model's own code failed"
    assert told[1] == "Traceback (most recent call last):"
    assert told[-1] == "KeyError: 'there is no such key'"
    files = [line for line in told if line.strip().startswith("File ")]
    assert len(files) == 2
    assert all("own_ballots.py" in line for line in files)
    assert "--resume" not in done.stderr


@pytest.mark.xdist_group("ray")
def test_on_ray_a_mistake_ends_the_run_and_a_killed_worker_does_not(small, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", PATHS)
    with RaySession(EngineSettings()) as session:
        words = ["engine.backend=ray", f"strategy.name={BALLOTS}"]
        kill = "faults=[{kind: kill, clients: [1], rounds: [1]}]"
        done = sim.run(small(*words, kill), session=session)
        assert done.status == "finished"
        with pytest.raises(AuthorError, match="KeyError: 'there is no such key'"):
            sim.run(small(*words, "strategy.slip=client"), session=session)
