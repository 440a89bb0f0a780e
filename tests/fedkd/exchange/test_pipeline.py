"""The pipeline with a codec, a rule and an adversary that are defined here and nowhere else."""

import itertools
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.bounds import PositiveWeight
from fedkd.exchange.adversaries import Adversary
from fedkd.exchange.budget import NO_BUDGET
from fedkd.exchange.codecs import Codec, Float16, Float32, SoftLabelDeltas, TopK
from fedkd.exchange.ledger import Cost
from fedkd.exchange.payload import FLOAT32, Asked
from fedkd.exchange.payloads import ClassTable, Encoded, LowRank, Predictions, Weights
from fedkd.exchange.pipeline import (
    BadPayloadError,
    ClientTurn,
    ExchangeState,
    MemoryLostError,
    ServerTurn,
    Stages,
    Standing,
)
from fedkd.exchange.release import ReleaseRule
from fedkd.exchange.values import digest, flatten, unflatten
from fedkd.exchange.views import Sum, Upload

ROWS = np.arange(3)
ASKED = Predictions.asked(ROWS, 2)
SEED, ROUNDS = 5, 20


def predictions(*numbers: float) -> Predictions:
    return Predictions(rows=ROWS, values=np.array(numbers, np.float32).reshape(3, 2))


class Delta(Codec):
    """Sends what changed since the last time, rounded to halves.

    The first number says how often the sender has sent: one step off, and the receiver notices.
    """

    remembers: ClassVar[bool] = True

    def asked(self, asked: Asked) -> Asked:
        limit = asked.limits["values"]
        words = {"": limit, "times": replace(limit, shape=(1,), largest=1e6)}
        return Encoded.asked(self.kind, asked, {"values": words})

    def encode(self, payload, memory, rng):
        times = memory.get("times", np.zeros(1, np.float32)) + np.float32(1)
        before = memory.get("values", np.zeros_like(payload.values))
        change = (np.rint(2 * (payload.values - before)) / 2).astype(np.float32)
        coded = {"values": {"": change, "times": times}}
        return Encoded.of(self.kind, payload, coded), {"values": before + change, "times": times}

    def decode(self, encoded, memory):
        times = memory.get("times", np.zeros(1, np.float32)) + np.float32(1)
        if times != encoded.array("values", "times"):
            raise AssertionError("the two sides are a step apart")
        values = memory.get("values", np.float32(0)) + encoded.array("values")
        return encoded.payload({"values": values}), {"values": values, "times": times}


class Noise(ReleaseRule):
    """Adds Gaussian noise, and says how much."""

    sigma: PositiveWeight

    def refuses(self, kind, where):
        return None if kind is Predictions else f"noise is for predictions, got {kind.kind}"

    def cost(self, occasion):
        return Cost("gaussian", {"sigma": self.sigma, "clients": float(occasion.clients)})

    def release(self, payload, occasion, rng):
        noise = rng.normal(scale=self.sigma, size=payload.values.shape).astype(np.float32)
        return replace(payload, values=payload.values + noise)


class Flip(Adversary):
    """Sends the opposite of what an honest client would send, and a random number in front."""

    client: int

    def controlled(self, clients, *, seed):
        return frozenset({self.client})

    def replaces(self, seen, rng):
        assert seen.own.keys() == {self.client}
        assert not seen.others
        values = -seen.own[self.client].values
        values[0, 0] = rng.normal()
        return {self.client: replace(seen.own[self.client], values=values)}


class Copycat(Adversary):
    """Sends the mean of what honest clients have sent."""

    together: ClassVar[bool] = True

    def controlled(self, clients, *, seed):
        return frozenset(range(0, clients, 2))

    def replaces(self, seen, rng):
        mean = np.mean([payload.values for payload in seen.others.values()], axis=0)
        return {client: replace(payload, values=mean) for client, payload in seen.own.items()}


class Echo(Flip):
    """Sends what it received."""

    def replaces(self, seen, rng):
        return dict(seen.received)


DELTA = Delta(kind="delta")


def client_turn(stages, *, clients, round=1, attempt=1) -> ClientTurn:
    standing = {client: Standing() for client in clients} if isinstance(clients, tuple) else clients
    return ClientTurn(stages, seed=SEED, round=round, attempt=attempt, clients=standing)


def server_turn(stages, before=None, *, round=1) -> ServerTurn:
    return ServerTurn(stages, before or ExchangeState(), seed=SEED, round=round)


def never(_key: object) -> Predictions:
    raise AssertionError("nothing is to be made")


# -- order ---------------------------------------------------------------------------------------


def test_by_default_the_same_objects_pass_and_nothing_is_kept():
    stages = Stages()
    server = server_turn(stages)
    sent_down = predictions(1, 2, 3, 4, 5, 6)
    outgoing = server.send(3, "mean", lambda key: sent_down, asked=ASKED)
    assert outgoing == (sent_down, 0, NO_BUDGET)
    client = client_turn(stages, clients=(3,))
    assert client.open({3: outgoing.payload, 4: None}) == {3: sent_down, 4: None}
    answer = predictions(6, 5, 4, 3, 2, 1)
    sent = client.send({3: answer})
    assert sent[3] is answer
    assert client.kept() == {}
    assert server.receive(3, sent[3], ASKED) is answer
    after = server.committed()
    assert (after.changed, dict(after.clients)) == (1, {})
    assert after.ledger.charges == ()


def test_an_adversary_comes_before_release_and_release_before_the_codec():
    stages = Stages(
        up=Float16(),
        release=Noise(kind="noise", sigma=0.1),
        adversary=Flip(kind="flip", client=1),
        controlled=frozenset({1}),
    )
    honest = {0: predictions(*[100] * 6), 1: predictions(*[100] * 6)}
    sent = client_turn(stages, clients=(0, 1)).send(honest)
    assert all(payload.coded["values"].dtype == np.float16 for payload in sent.values())
    values = {client: Float16().decode(p, {})[0].values for client, p in sent.items()}
    # Noise of 0.1 on 100 and on -100, and none of it lost in rounding to 1/16.
    assert np.abs(values[0] - 100).max() < 1
    assert np.abs(values[1][1:] + 100).max() < 1
    assert len(np.unique(values[0])) > 1
    assert len(np.unique(values[1][1:])) > 1


def test_an_adversary_that_acts_alone_sends_the_same_in_any_cohort():
    stages = Stages(adversary=Flip(kind="flip", client=1), controlled=frozenset({1}))
    honest = {client: predictions(*[client] * 6) for client in range(3)}
    alone = client_turn(stages, clients=(1,)).send({1: honest[1]})
    in_cohort = client_turn(stages, clients=(0, 1, 2)).send(honest)
    assert digest(alone[1]) == digest(in_cohort[1])
    assert in_cohort[0] is honest[0]
    later = client_turn(stages, clients=(1,), round=2).send({1: honest[1]})
    assert later[1].values[0, 0] != alone[1].values[0, 0]


def test_who_acts_alone_knows_what_it_has_received():
    stages = Stages(
        down=Float16(), adversary=Echo(kind="echo", client=1), controlled=frozenset({1})
    )
    came = Float16().encode(predictions(1, 2, 3, 4, 5, 6), {}, np.random.default_rng(0))[0]
    turn = client_turn(stages, clients=(0, 1))
    turn.open({0: came, 1: came})
    honest = {client: predictions(*[9] * 6) for client in (0, 1)}
    sent = turn.send(honest)
    assert sent[0] is honest[0]
    assert sent[1].values.ravel().tolist() == [1, 2, 3, 4, 5, 6]
    assert client_turn(stages, clients=(0, 1)).send(honest) == honest


def test_adversaries_together_sit_at_the_server_and_replace_only_their_own():
    honest = {client: predictions(*[client] * 6) for client in (1, 2, 3, 6)}
    stages = Stages(adversary=Copycat(kind="copy"), controlled=frozenset({0, 2, 6}))
    assert client_turn(stages, clients=(1, 2, 3, 6)).send(honest) == honest
    server = server_turn(stages)
    assert server.gathers([1, 2])
    assert not server.gathers([1, 3])
    lies = server.lies(honest)
    assert {client: lie.values[0, 0] for client, lie in lies.items()} == {2: 2, 6: 2}
    server.check_lie(lies[2], ASKED)
    with pytest.raises(BadPayloadError, match="NaN or infinity among the scores"):
        server.check_lie(predictions(np.nan, 2, 3, 4, 5, 6), ASKED)
    with pytest.raises(BadPayloadError, match="expected predictions, got class_table"):
        server.check_lie(ClassTable(values=np.zeros((2, 2), np.float32)), ASKED)

    class Greedy(Copycat):
        def replaces(self, seen, rng):
            return {1: honest[1]}

    greedy = server_turn(replace(stages, adversary=Greedy(kind="greedy")))
    with pytest.raises(ValueError, match="what client 1 sends, which it does not control"):
        greedy.lies(honest)


def test_what_is_no_answer_passes_as_none():
    stages = Stages(up=Float16(), release=Noise(kind="noise", sigma=1.0))
    assert client_turn(stages, clients=(0,)).send({0: None}) == {0: None}


# -- release and the ledger ----------------------------------------------------------------------


def test_a_clients_release_is_charged_before_it_is_asked():
    rule = Noise(kind="noise", sigma=2.0)
    server = server_turn(Stages(release=rule))
    for client in (4, 7):
        server.send(client, None, never, asked=ASKED)
    # Nothing was answered: what a client may send now counts already.
    assert server.skipped().ledger.of_client(4) == [
        (1, Cost("gaussian", {"sigma": 2.0, "clients": 1.0}))
    ]
    server.send(4, None, never, asked=ASKED, attempt=2)
    ledger = server.committed().ledger
    (charge,) = ledger.charges
    assert (charge.clients.tolist(), charge.attempts.tolist()) == ([4, 7, 4], [1, 1, 2])


def test_who_is_not_asked_or_releases_at_the_server_is_not_charged():
    server = server_turn(Stages(release=Noise(kind="noise", sigma=2.0)))
    server.send(4, None, never, asked=None)
    assert server.committed().ledger.charges == ()
    trusted = server_turn(Stages(release=Noise(kind="noise", sigma=2.0), where="server"))
    trusted.send(4, None, never, asked=ASKED)
    assert trusted.committed().ledger.charges == ()


def test_a_skipped_round_has_cost_what_it_cost():
    stages = Stages(release=Noise(kind="noise", sigma=2.0))
    server = server_turn(stages, ExchangeState(changed=3), round=4)
    server.send(1, None, never, asked=ASKED)
    after = server.skipped()
    assert len(after.ledger.charges) == 1
    assert after.changed == 3


def test_every_attempt_of_a_client_has_noise_of_its_own():
    stages = Stages(release=Noise(kind="noise", sigma=1.0))
    honest = {0: predictions(*[0] * 6), 1: predictions(*[0] * 6)}

    def values(**given):
        return client_turn(stages, clients=(0, 1), **given).send(honest)

    first, again, second = values(), values(), values(attempt=2)
    assert digest(first[0]) == digest(again[0])
    assert np.abs(first[0].values - first[1].values).min() > 1e-4
    assert np.abs(first[0].values - second[0].values).min() > 1e-4
    assert np.abs(first[0].values - values(round=2)[0].values).min() > 1e-4


def test_a_trusted_server_protects_the_mean_of_those_who_answered():
    stages = Stages(release=Noise(kind="noise", sigma=2.0), where="server")
    uploads = [Upload(client, predictions(*[client] * 6), 10) for client in (0, 2, 4)]

    def shown(round=5, uploads=uploads, before=None):
        server = server_turn(stages, before, round=round)
        (mean,) = server.view(uploads, sums="equal")
        return mean, server.committed()

    mean, after = shown()
    assert (mean.client, mean.clients) == (0, 3)
    assert np.abs(mean.payload.values - 2).min() > 1e-6
    cost = Cost("gaussian", {"sigma": 2.0, "clients": 3.0})
    assert [after.ledger.of_client(client) for client in (0, 1, 2, 4)] == [
        [(5, cost)],
        [],
        [(5, cost)],
        [(5, cost)],
    ]
    # Done once more, as after a crash: the same noise. Of other answers, or a round later: another.
    assert digest(shown()[0].payload) == digest(mean.payload)
    noise = mean.payload.values - 2
    for other, exact in ((shown(uploads=uploads[:2])[0], 1), (shown(round=6)[0], 2)):
        assert np.abs(other.payload.values - exact - noise).min() > 1e-4
    with pytest.raises(ValueError, match="sum needs an algorithm that takes sums"):
        list(server_turn(stages).view(uploads))


def test_clients_do_not_release_what_a_trusted_server_does():
    stages = Stages(release=Noise(kind="noise", sigma=2.0), where="server")
    answer = predictions(*[0] * 6)
    assert client_turn(stages, clients=(0,)).send({0: answer})[0] is answer


# -- what is made, encoded and decoded once ------------------------------------------------------


def test_equal_keys_are_made_and_encoded_once_and_opened_once():
    stages = Stages(down=Float16())
    server = server_turn(stages)
    made = []

    def make(key: str) -> Predictions:
        made.append(key)
        return predictions(*range(6))

    sent = {
        client: server.send(client, key, make, asked=ASKED).payload
        for client, key in enumerate(["a", "a", "b"])
    }
    assert made == ["a", "b"]
    assert sent[0] is sent[1]
    assert sent[0].payload_bytes == 12
    opened = client_turn(stages, clients=(0, 1, 2)).open(sent)
    assert opened[0] is opened[1]
    assert opened[2] is not opened[0]
    assert opened[0].values.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_what_a_codec_that_remembers_sends_is_made_once_as_well():
    server = server_turn(Stages(down=DELTA), ExchangeState(changed=1), round=2)
    made = []

    def make(key: str) -> Predictions:
        made.append(key)
        return predictions(*range(6))

    sent = [server.send(client, "a", make, asked=ASKED).payload for client in (0, 1)]
    assert made == ["a"]
    assert sent[0].coded["values"].tolist() == sent[1].coded["values"].tolist()


# -- checks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "change", "told"),
    [
        (Float32(), lambda sent: None, "expected predictions, got nothing"),
        (Float32(), lambda sent: Weights(arrays={}), "expected predictions, got weights"),
        (Float16(), lambda sent: predictions(*[0] * 6), "expected predictions encoded"),
        (Float16(), lambda sent: replace(sent, codec="top_k"), "coded by 'top_k'"),
        (Float16(), lambda sent: replace(sent, since=3), "coded on from round 3, expected 0 or 0"),
        (Float32(), lambda sent: replace(sent, values=sent.values * np.nan), "NaN or infinity"),
        (
            Float16(),
            lambda sent: replace(sent, coded={"values": sent.coded["values"] * np.float16("nan")}),
            "NaN or infinity",
        ),
        # Looked at once more when it is decoded.
        (Float16(), lambda sent: replace(sent, inner=replace(sent.inner, temperature=2.0)), "temp"),
        (
            TopK(k=1),
            lambda sent: replace(
                sent, coded={**sent.coded, "values/classes": np.full((3, 1), 2, np.uint8)}
            ),
            "a class of size 2, expected at most 1",
        ),
        (
            TopK(k=2),
            lambda sent: replace(
                sent, coded={**sent.coded, "values/classes": np.array([[1, 0]] * 3, np.uint8)}
            ),
            "not in order",
        ),
    ],
)
def test_a_bad_answer_is_named_and_nothing_is_remembered_of_it(codec, change, told):
    stages = Stages(up=codec)
    server = server_turn(stages)
    server.send(0, None, never, asked=ASKED)
    sent = client_turn(stages, clients=(0,)).send({0: predictions(*range(6))})[0]
    with pytest.raises(BadPayloadError, match=told):
        server.receive(0, change(sent), ASKED)
    assert server.committed().clients == {}
    assert server.receive(0, sent, ASKED).values.shape == (3, 2)


def test_an_answer_that_was_not_asked_for_is_named():
    with pytest.raises(BadPayloadError, match="expected nothing, got predictions"):
        server_turn(Stages()).receive(0, predictions(*range(6)), None)
    assert server_turn(Stages()).receive(0, None, None) is None


def test_what_cannot_work_is_refused_before_the_run_by_the_setting():
    for stages, told in (
        (Stages(up=TopK(k=1)), "exchange.up top_k: .* got weights"),
        (Stages(down=TopK(k=1)), "exchange.down top_k: .* got class_table"),
        (Stages(view=Sum()), "exchange.view sum: .* needs each client's answer"),
        (Stages(release=Noise(kind="noise", sigma=1)), "privacy.mechanism noise: .* got weights"),
        (
            Stages(release=Noise(kind="noise", sigma=1), where="server"),
            "privacy.mechanism noise: .* got weights",
        ),
    ):
        with pytest.raises(ValueError, match=told):
            stages.check(up=[Weights], down=[ClassTable], sums=None)
    Stages(up=Float16(), view=Sum()).check(up=[Weights], down=[ClassTable], sums="equal")
    with pytest.raises(ValueError, match=r"exchange.view sum: a sum of class_table"):
        Stages(view=Sum()).check_asked(ClassTable.asked(3))
    with pytest.raises(ValueError, match=r"exchange.up top_k: .* got class_table"):
        Stages(up=TopK(k=1)).check_asked(ClassTable.asked(3))


def test_what_is_added_from_round_to_round_comes_down_as_it_is():
    with pytest.raises(ValueError, match=r"exchange.down float16: clients add every low_rank to"):
        Stages(down=Float16()).check(up=[LowRank], down=[LowRank], sums=None)
    # An update that goes up is averaged once: what is rounded on its way does not add up.
    Stages(up=Float16()).check(up=[LowRank], down=[LowRank], sums=None)


def test_the_aggregator_sees_what_the_view_shows():
    uploads = [Upload(c, predictions(*[c] * 6), 1) for c in (1, 2, 3)]
    turn = server_turn(Stages(view=Sum()))
    shown = list(turn.view(iter(uploads), sums="equal", group=lambda client: client == 3))
    assert [(u.client, u.clients, u.payload.values[0, 0]) for u in shown] == [
        (1, 2, 1.5),
        (3, 1, 3),
    ]
    assert list(server_turn(Stages()).view(iter(uploads))) == uploads


# -- what codecs remember ------------------------------------------------------------------------


SOFT = Predictions.asked(ROWS, 2, scale="probabilities")
DELTAS = Stages(up=SoftLabelDeltas(bits=2), down=SoftLabelDeltas())


def soft_labels(number: int) -> Predictions:
    """Return labels that no quantiser rounds, of which one row differs from the number before."""
    sure = np.array([[(number + 2 - row) // 3 % 2] for row in range(3)], np.float32)
    values = np.concatenate([sure, 1 - sure], axis=1)
    return Predictions(rows=ROWS, values=values, scale="probabilities")


@dataclass
class Federation:
    """Server and clients around the pipeline, with all that can go wrong between them.

    Attributes:
        takes_back: whether clients' states are those of the round's end, as on a grid: another
            attempt and the round after one that is left out go on from those of the round before.
            If not, what a client has after a call it has, as on a node.
        soft: whether soft labels are exchanged, of which some rows change from round to round.
    """

    stages: Stages
    takes_back: bool = False
    soft: bool = False
    state: ExchangeState = field(default_factory=ExchangeState)
    kept: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)
    round: int = 0
    before: dict[int, dict[str, np.ndarray]] = field(default_factory=dict)

    def play(self, fates: dict[int, str], *, skip: bool = False) -> None:
        """Run a round in which each client that is there meets a fate, and commit or skip it."""
        self.round += 1
        self.before = dict(self.kept)
        turn = server_turn(self.stages, self.state, round=self.round)
        waiting = {client: fate for client, fate in fates.items() if fate != "away"}
        for attempt in (1, 2):
            for client, fate in list(waiting.items()):
                if self.call(turn, client, fate if attempt == 1 else "good", attempt):
                    del waiting[client]
        assert not waiting or "dead" in waiting.values()
        self.state = turn.skipped() if skip else turn.committed()
        if skip and self.takes_back:
            self.kept = self.before
        arrays, plain = flatten(self.state)
        self.state = unflatten(arrays, plain)

    def call(self, turn: ServerTurn, client: int, fate: str, attempt: int) -> bool:
        """Ask one client; tell whether its answer came."""
        asked = SOFT if self.soft else ASKED
        down = predictions(*(self.round * 7.5 + number for number in range(6)))
        answer = predictions(*(self.round * 3 + client + number / 2 for number in range(6)))
        if self.soft:
            down, answer = soft_labels(self.round // 2), soft_labels(self.round + client)
        told = turn.send(client, "mean", lambda key: down, asked=asked, attempt=attempt)
        if fate in ("unreached", "dead"):
            return False
        if fate == "restarted":
            self.kept.pop(client, None)
            self.before.pop(client, None)
        held = self.before if self.takes_back else self.kept
        standing = {client: Standing(held.get(client, {}), told.since)}
        called = client_turn(self.stages, clients=standing, round=self.round, attempt=attempt)
        try:
            received = called.open({client: told.payload})[client]
        except MemoryLostError:
            assert fate == "restarted" or self.kept.get(client) is None
            turn.forget(client)
            return False
        # Halves are what `Delta` does not round.
        assert received.values.tolist() == down.values.tolist()
        sent = called.send({client: answer})[client]
        self.kept[client] = called.kept().get(client, {})
        if fate == "lost":
            return False
        if fate == "damaged":
            tables = flatten(sent).arrays
            spoilt = {p: np.full_like(a, np.nan) for p, a in tables.items() if a.dtype == FLOAT32}
            spoilt |= {p: np.append(a, a[:1]) for p, a in tables.items() if a.dtype == np.uint8}
            with pytest.raises(BadPayloadError):
                turn.receive(client, sent.with_arrays(spoilt), asked)
            return False
        assert turn.receive(client, sent, asked).values.tolist() == answer.values.tolist()
        return True


BOTH = Stages(up=DELTA, down=DELTA)


def test_what_changed_is_sent_and_both_sides_remember_it():
    federation = Federation(BOTH)
    federation.play({0: "good", 1: "good"})
    federation.play({0: "good", 1: "good"})
    held = federation.state.clients[0]
    assert held.round == 2
    assert held.up["values"].tolist() == [[6, 6.5], [7, 7.5], [8, 8.5]]
    # The client has the same, beside what it had before.
    kept = federation.kept[0]
    assert kept["exchange/rounds"].tolist() == [1, 2]
    assert kept["exchange/2/up/values"].tolist() == held.up["values"].tolist()
    assert kept["exchange/2/down/values"].tolist() == held.down["values"].tolist()


@pytest.mark.parametrize(
    "fate", ["away", "unreached", "lost", "damaged", "restarted", "dead", "good"]
)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize("takes_back", [False, True])
@pytest.mark.parametrize("stages", [BOTH, DELTAS])
def test_no_misfortune_brings_the_two_sides_apart(fate, skip, first, takes_back, stages):
    federation = Federation(stages, takes_back, soft=stages is DELTAS)
    for _ in range(first - 1):
        federation.play({0: "good", 1: "good"})
    federation.play({0: fate, 1: "good"}, skip=skip)
    for _ in range(2):
        federation.play({0: "good", 1: "good"})
    if stages is BOTH:
        assert federation.state.clients[0].up["times"] >= 2
    else:
        assert federation.state.clients[0].up["numbers"].shape == (3, 2)


FATES = st.sampled_from(["good", "away", "unreached", "lost", "damaged", "restarted"])


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(FATES, FATES, st.booleans()), min_size=1, max_size=8),
    st.sampled_from(
        [
            BOTH,
            Stages(up=DELTA),
            Stages(down=DELTA),
            Stages(up=DELTA, down=Float16()),
            DELTAS,
        ]
    ),
    st.booleans(),
)
def test_no_run_of_misfortunes_brings_the_two_sides_apart(rounds, stages, takes_back):
    federation = Federation(stages, takes_back, soft=stages is DELTAS)
    for first, second, skip in rounds:
        federation.play({0: first, 1: second}, skip=skip)
    federation.play({0: "good", 1: "good"})


def test_a_client_that_lost_its_memory_starts_anew_without_being_told():
    federation = Federation(Stages(up=DELTA))
    federation.play({0: "good"})
    federation.play({0: "restarted"})
    assert federation.state.clients[0].up["times"] == 1
    federation.play({0: "good"})
    assert federation.state.clients[0].up["times"] == 2


def test_a_memory_that_is_lost_stays_lost_when_the_round_is_left_out():
    federation = Federation(BOTH)
    federation.play({0: "good"})
    turn = server_turn(BOTH, federation.state, round=2)
    assert turn.send(0, "mean", lambda key: predictions(*range(6)), asked=ASKED).since == 1
    turn.forget(0)
    assert dict(turn.skipped().clients) == {}
    again = turn.send(0, "mean", lambda key: predictions(*range(6)), asked=ASKED, attempt=2)
    assert (again.since, again.payload.since) == (0, 0)


def test_judging_moves_no_memory():
    federation = Federation(BOTH)
    federation.play({0: "good"})
    down = predictions(*range(6))
    sent = []
    for _ in range(2):
        turn = server_turn(BOTH, federation.state, round=2)
        told = turn.send(0, "mean", lambda key: down, asked=None)
        called = client_turn(BOTH, clients={0: Standing(federation.kept[0], told.since)}, round=2)
        assert called.open({0: told.payload})[0].values.tolist() == down.values.tolist()
        assert digest(turn.skipped()) == digest(federation.state)
        sent.append(told.payload)
    assert digest(sent[0]) == digest(sent[1])
    federation.play({0: "good"})


def test_other_arrays_of_a_client_are_passed_over():
    kept = {"cache": np.ones(3), "exchange_rate": np.ones(1)}
    called = client_turn(BOTH, clients={0: Standing(kept, 0)})
    called.send({0: predictions(*range(6))})
    assert set(called.kept()[0]) == {
        "exchange/rounds",
        "exchange/1/up/values",
        "exchange/1/up/times",
    }


def test_each_codec_draws_from_a_stream_of_its_own():
    class Dither(Float16):
        kind: str  # type: ignore[assignment]

        def encode(self, payload, memory, rng):
            drawn = rng.random(payload.values.shape).astype(np.float32)
            return super().encode(replace(payload, values=payload.values + drawn), memory, rng)

    stages = Stages(up=Dither(kind="dither"), down=Dither(kind="dither"))
    answers = {client: predictions(*[0] * 6) for client in (0, 1)}
    up = client_turn(stages, clients=(0, 1)).send(answers)
    server = server_turn(stages, ExchangeState(changed=1), round=2)
    down = [server.send(0, key, lambda key: answers[0], asked=None).payload for key in ("a", "b")]
    tables = [payload.coded["values"] for payload in (*up.values(), *down)]
    assert all(not np.array_equal(one, other) for one, other in itertools.combinations(tables, 2))
    assert digest(up[0]) == digest(client_turn(stages, clients=(0, 1)).send(answers)[0])


def test_limits_say_what_travels():
    limits = server_turn(Stages(up=Float16())).asked(ASKED, 0).limits
    assert limits["coded/values"].dtype == np.float16
    assert limits["inner/values"].dtype == FLOAT32
    assert server_turn(Stages()).asked(ASKED, 0) is ASKED
