"""Bad replies in a run: each is named, and counts no more than an answer that never came."""

import pytest

from sim.adversity.bad_replies import BAD_REPLIES
from sim.engine.inline import InlineGrid

STRATEGIES = (
    "dml",
    "fedavg",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("fedmd", "local")),
)


@pytest.fixture
def struck(tiny_settings, tiny_data, simulate):
    """Run two rounds in which client 2 fails in some way in the first."""

    def run(strategy, kind, **fault):
        faults = [{"kind": kind, "clients": [2], "rounds": [1], **fault}]
        settings, data = tiny_settings(strategy, faults=faults, rounds=2), tiny_data()
        return simulate(settings, data, InlineGrid(settings, data))

    return run


@pytest.fixture(scope="module")
def lost_digests():
    return {}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_bad_reply_is_named_and_the_rest_goes_on_without_it(struck, lost_digests, strategy, name):
    run = struck(strategy, "bad_reply", reply=name)
    (event,) = run.events
    assert (event["round"], event["client"], event["event"]) == (1, 2, "rejected")
    assert event["reason"]
    assert "Traceback" not in event["reason"]
    assert [row["replies"] for row in run.history.federation] == [3, 4]
    if strategy not in lost_digests:
        # What the aggregate over the rest is: the client trains, but its answer never arrives.
        lost_digests[strategy] = struck(strategy, "bad_reply", reply="no_round").digest
    assert run.digest == lost_digests[strategy]


@pytest.mark.parametrize("name", BAD_REPLIES)
def test_a_bad_judgement_is_named_and_left_out_of_the_averages(struck, name):
    run = struck("dml", "bad_reply", reply=name, phases=["evaluate"])
    (event,) = run.events
    assert (event["round"], event["client"], event["event"]) == (1, 2, "evaluation failed")
    judged = [
        row["client"] for row in run.metrics if row["scope"] == "client" and "accuracy" in row
    ]
    assert judged == [0, 1, 3, 0, 1, 2, 3]
    assert all(0 <= row["accuracy"] <= 1 for row in run.history.federation)
