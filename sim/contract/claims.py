"""What every algorithm keeps to, whatever it does: one function for each claim.

A claim is handed a `Case` and raises `BrokenError` where it does not hold.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, get_args

import numpy as np
import torch
from flwr.app import Message, RecordDict
from pydantic import ValidationError

from fedkd.data import FederatedData
from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.pipeline import ClientTurn, Standing
from fedkd.exchange.values import Value, digest, flatten, unflatten
from fedkd.training import LoopCohort, Member, ModelPool, Streams, TrainingData, weights_digest
from sim.contract.replay import ReplayedServer
from sim.contract.toy import (
    PUBLIC_ROWS,
    ROWS,
    ListeningGrid,
    Simulated,
    final_states,
    losing,
    simulate,
    toy_data,
    toy_parts,
    toy_table,
)
from sim.engine.inline import InlineGrid
from sim.engine.runtime import with_exchange
from sim.server.rounds import Boundary, RoundLoop
from sim.settings import Settings, merge_tables, settings_from_table
from sim.wire.messages import read_reply
from sim.wire.records import read_payload, write_payload
from strategies import strategy_class
from strategies.contract import Call, Received, Round, ServerTools, Strategy

CLIENTS = len(ROWS)
ATOL, RTOL = 2e-5, 1e-4
"""A few steps of float32 with SGD; loop and stack only round differently."""


class BrokenError(AssertionError):
    """An algorithm does not keep to a claim; the text says in what."""


@dataclass(frozen=True)
class Case:
    """An algorithm with some settings, in a toy federation.

    Attributes:
        strategy: its name.
        options: its settings.
        sections: other sections of settings, as far as they differ from those of `toy_table`.
    """

    strategy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, **sections: Any) -> Settings:
        """Return settings of a run.

        Args:
            sections: over those of the case.
        """
        table = toy_table(self.strategy, options=self.options)
        return settings_from_table(merge_tables(merge_tables(table, sections), self.sections))

    def data(self, rows: Sequence[int] = ROWS) -> FederatedData:
        """Return the rows, with a labelled public set where the case asks for one."""
        labelled = self.settings().data.public.labelled
        return toy_data(rows=rows, public=PUBLIC_ROWS, labelled=labelled)

    def parts(self, settings: Settings) -> tuple[Strategy[Any, Any], ServerTools]:
        """Return the algorithm, and what its server half may use."""
        return toy_parts(settings, self.data())

    def whole(self) -> "Whole":
        """Return one run of `Whole.ROUNDS` rounds, the same one for every claim that looks on."""
        sections = json.dumps(self.sections, sort_keys=True, default=str)
        options = json.dumps(dict(self.options), default=str)
        return _whole(strategy_class(self.strategy), self.strategy, options, sections)

    def run(self, grid: InlineGrid | None = None, **sections: Any) -> Simulated:
        """Run a federation."""
        return simulate(self.settings(**sections), self.data(), grid)


@dataclass(frozen=True)
class Whole:
    """A run, what went out and came back in it; nobody changes any of it.

    Attributes:
        settings: of the run.
        run: what happened.
        grid: what went out and came back.
    """

    ROUNDS: ClassVar[int] = 4

    settings: Settings
    run: Simulated
    grid: ListeningGrid


@lru_cache(maxsize=2)
def _whole(_: type[Strategy[Any, Any]], strategy: str, options: str, sections: str) -> Whole:
    # The class is asked for, because a name may come to stand for another one.
    case = Case(strategy, json.loads(options), json.loads(sections))
    settings = case.settings(rounds=Whole.ROUNDS)
    grid = ListeningGrid(settings, case.data())
    return Whole(settings, simulate(settings, case.data(), grid), grid)


Claim = Callable[[Case], None]
CLAIMS: dict[str, Claim] = {}
"""Every claim by its name, in the order in which they are looked at."""


def claim(function: Claim) -> Claim:
    """Put a claim on the list."""
    CLAIMS[function.__name__] = function
    return function


def require(holds: object, told: str) -> None:
    """Refuse to go on where something does not hold.

    Raises:
        BrokenError: with what is told.
    """
    if not holds:
        raise BrokenError(told)


# -- settings ----------------------------------------------------------------------------------


@claim
def its_settings_survive_the_way_through_a_file(case: Case) -> None:
    """Saved and read again they are the same, of the same class."""
    settings = case.settings()
    again = settings_from_table(json.loads(json.dumps(settings.to_table())))
    require(again == settings, f"became {again.strategy!r}, were {settings.strategy!r}")
    require(
        type(again.strategy) is strategy_class(case.strategy).Settings,
        f"became a {type(again.strategy).__name__}",
    )


@claim
def its_settings_are_frozen_and_refuse_what_they_do_not_know(case: Case) -> None:
    """A slip in a name is told, and nobody changes settings while a run goes on."""
    settings = case.settings().strategy
    try:
        settings.name = "other"  # type: ignore[misc]
    except ValidationError:
        pass
    else:
        raise BrokenError("they can be changed: keep the model_config of StrategySettings")
    try:
        type(settings).model_validate({**settings.model_dump(), "not_a_setting": 1})
    except ValidationError:
        pass
    else:
        raise BrokenError("an unknown one is taken: keep the model_config of StrategySettings")


@claim
def it_says_whose_idea_it_is(case: Case) -> None:
    """Its class has a docstring."""
    require((strategy_class(case.strategy).__doc__ or "").strip(), "the class has no docstring")


# -- a whole federation ------------------------------------------------------------------------


@claim
def mixed_architectures_learn_for_some_rounds(case: Case) -> None:
    """Everybody is judged, nothing happens on the way, and it is better than chance."""
    run = case.whole().run
    rounds = [row["round"] for row in run.history.federation]
    require(rounds == [1, 2, 3, 4], f"the rounds were {rounds}")
    _require_no_events(run)
    judged = sorted(run.history.clients)
    require(judged == list(range(CLIENTS)), f"judged were {judged}")
    last = run.history.federation[-1]["accuracy"]
    require(last > 1 / 3, f"the accuracy is {last:.2f}, which is no better than chance")


@claim
def the_same_seed_gives_the_same_bits_and_another_others(case: Case) -> None:
    """Every draw comes from the run's seed, and from nowhere else."""
    one, same, other = (case.run(rounds=2, seed=seed) for seed in (3, 3, 4))
    require(one.digest == same.digest, "the same seed gave other weights")
    require(one.digest != other.digest, "another seed gave the same weights")
    require(_timeless(one) == _timeless(same), "the same seed measured something else")


@claim
def results_do_not_depend_on_how_cohorts_are_cut(case: Case) -> None:
    """The size of cohorts that train in a loop changes no bit; stacked, one changes the last."""
    engines = ({"cohort_size": size, "vectorize": "loop"} for size in (1, 16))
    digests = {case.run(rounds=2, engine=engine).digest for engine in engines}
    require(len(digests) == 1, "cohorts of 1 and of 16 ended with other weights")


@claim
def loop_and_stack_agree(case: Case) -> None:
    """The client half does the same for one client and for several stacked ones.

    Terms that say that they cannot be stacked are trained in a loop anyway.
    """
    strategy, _ = case.parts(case.settings())
    if any(each.obstacle for each in strategy.stackings(case.data().input_shape).values()):
        return
    optimizer = {"name": "sgd", "lr": 0.05, "momentum": 0.5}
    looped, stacked = (
        case.run(rounds=2, clients={"optimizer": optimizer}, engine={"vectorize": how})
        for how in ("loop", "vmap")
    )
    for client, (one, other) in enumerate(zip(looped.states, stacked.states, strict=True)):
        ours, theirs = one.to_arrays(), other.to_arrays()
        require(
            ours.keys() == theirs.keys(),
            f"client {client} keeps {sorted(ours.keys() ^ theirs.keys())} in one of them only",
        )
        for name, array in ours.items():
            # What a client keeps of its own may have rows in another place, but not other numbers.
            require(
                array.shape == theirs[name].shape and np.allclose(array, theirs[name], RTOL, ATOL),
                f"client {client}: {name} differs between loop and stack",
            )


@claim
def few_participants_are_enough(case: Case) -> None:
    """One or two clients a round do; who was never asked is judged all the same."""
    for participants, rounds in ((1, 3), (2, 2)):
        run = case.run(rounds=rounds, clients={"participants": participants})
        _require_no_events(run)
        asked = [row["participants"] for row in run.history.federation]
        replies = [row["replies"] for row in run.history.federation]
        require(asked == replies, f"of {asked} clients asked {replies} answered")
        judged = sorted(run.history.clients)
        require(judged == list(range(CLIENTS)), f"judged were {judged}")


@claim
def a_federation_of_one_runs(case: Case) -> None:
    """A client without peers is no error."""
    settings = case.settings(rounds=2, clients={"count": 1})
    run = simulate(settings, case.data(rows=(20,)))
    replies = [row["replies"] for row in run.history.federation]
    require(replies == [1, 1], f"replies were {replies}")


# -- what is sent ------------------------------------------------------------------------------


@claim
def bytes_are_those_of_what_travels(case: Case) -> None:
    """Every payload is counted, with all its numbers; ids and plain values may cost less."""
    settings = case.settings(rounds=2, exchange={"rows_per_round": 9})
    grid = ListeningGrid(settings, case.data())
    run = simulate(settings, case.data(), grid)
    _require_no_events(run)
    counted: dict[tuple[int, int, str], int] = {}
    for row in run.exchange:
        key = (row["round"], row["client"], row["direction"])
        counted[key] = counted.get(key, 0) + row["bytes"]
    travelled: dict[tuple[int, int, str], list[Payload]] = {}
    for number in range(settings.rounds):
        for client, reply in grid.replies["train"][number].items():
            answer = read_reply(reply.content).payload
            travelled[number + 1, client, "up"] = [] if answer is None else [answer]
        for client, told in grid.told["train"][number].items():
            both = (told.payload, told.orders)
            travelled[number + 1, client, "down"] = [piece for piece in both if piece is not None]
    for key, pieces in travelled.items():
        round, client, direction = key
        where = f"round {round}, client {client}, {direction}"
        if not pieces:
            require(key not in counted, f"{where}: nothing travelled, and bytes were counted")
            continue
        arrays = [array for piece in pieces for array in flatten(piece).arrays.values()]
        least = sum(array.nbytes for array in arrays if array.dtype.kind == "f")
        most = sum(array.nbytes for array in arrays) + PUBLIC_ROWS
        found = counted.get(key, 0)
        require(
            least <= found <= most,
            f"{where}: {found} bytes were counted; its numbers alone are {least}, all {most}",
        )


@claim
def everything_that_travels_survives_it_bit_for_bit(case: Case) -> None:
    """Payloads are the same after the wire."""
    grid = case.whole().grid
    answers = [
        read_reply(reply.content).payload
        for each in grid.replies["train"]
        for reply in each.values()
    ]
    for payload in (*answers, *(p for each in grid.sent["train"] for p in each.values())):
        if payload is None:
            continue
        records = RecordDict()
        write_payload(records, "payload", payload)
        arrived = read_payload(records, "payload")
        require(
            arrived is not None and digest(arrived) == digest(payload),
            f"{payload.kind} is another one after the wire",
        )


# -- lost clients ------------------------------------------------------------------------------


@claim
def a_client_that_is_left_out_leaves_the_aggregate_of_the_rest(case: Case) -> None:
    """Be it lost or spoilt, the others learn what they would have learnt without it."""
    for how in ("lost", "spoilt"):
        settings = case.settings(rounds=2)
        replayed = ReplayedServer(*case.parts(settings), settings)
        strategy, first = replayed.strategy, replayed.round
        asked = strategy.participants(replayed.state, first)
        lost = asked[-1]
        grid = ListeningGrid(settings, case.data(), losing([lost], how))
        run = simulate(settings, case.data(), grid)
        events = [(event.get("client"), event["event"]) for event in run.events]
        require(events == [(lost, "rejected")], f"{how}: the events were {events}")
        replies = run.history.federation[0]["replies"]
        require(replies == len(asked) - 1, f"{how}: {replies} of {len(asked)} replies counted")
        opened = replayed.open()
        for client in asked:
            opened.tell(client)
        rest = opened.shown(opened.received(grid.replies["train"][0], without=lost))
        after = strategy.aggregate(replayed.state, rest, first, replayed.server)
        replayed.close(opened, after)
        second = replayed.open()
        for client, received in grid.sent["train"][1].items():
            require(
                _same(received, second.tell(client).payload),
                f"{how}: client {client} received something else than the rest's aggregate",
            )


@claim
def a_round_without_uploads_is_no_error(case: Case) -> None:
    """Where nobody answers, the server goes on with what it has."""
    strategy, server = case.parts(case.settings())
    round = strategy.federation.round(1)
    state = strategy.aggregate(strategy.begin(server), iter(()), round, server)
    told = _told_in(strategy, state, round.next())
    for client in range(CLIENTS):
        told(client)


# -- rules against clients that lie ------------------------------------------------------------

RULES_THAT_COUNT = {"dishonest": 0.9, "trim": 0.4, "factor": 1.0}
"""Settings with which every rule leaves out somebody of three or four clients, honest or not."""


@claim
def its_rules_of_aggregation_are_followed(case: Case) -> None:
    """Each value of ``strategy.aggregation``, and trust, makes something else of the same answers.

    Looked at where ``mean`` is one of them; a rule may be refused beside other settings.
    """
    known = type(case.settings().strategy).model_fields
    rules = get_args(known["aggregation"].annotation) if "aggregation" in known else ()
    if "mean" not in rules:
        return
    counting = {name: value for name, value in RULES_THAT_COUNT.items() if name in known}
    variants = [{**counting, "aggregation": rule} for rule in rules if rule != "mean"]
    if "trust_rate" in known:
        variants.append({"aggregation": "mean", "trust_rate": 10.0})
    plain = replace(case, options={**case.options, "aggregation": "mean"})
    sent: Mapping[int, Message] | None = None
    mean = ""
    for options in variants:
        robust = replace(case, options={**case.options, **options})
        try:
            robust.parts(robust.settings())
        except ValueError:
            continue
        if sent is None:
            grid = ListeningGrid(plain.settings(rounds=1), case.data())
            simulate(plain.settings(rounds=1), case.data(), grid)
            sent = grid.replies["train"][0]
            mean = _made_of(sent, plain)
        if mean == _made_of({}, plain) or _of_different_rows(sent):
            # Nothing was sent, or the mean of it is of no use; or a row may have two answers, whose
            # mean is what most rules make of them.
            return
        told = f"{options} makes of the first answers what the mean makes of them"
        require(_made_of(sent, robust) != mean, told)


def _of_different_rows(replies: Mapping[int, Message]) -> bool:
    sent = [read_reply(reply.content).payload for reply in replies.values()]
    rows = {payload.rows.tobytes() for payload in sent if isinstance(payload, Predictions)}
    return len(rows) > 1


def _made_of(replies: Mapping[int, Message], case: Case) -> str:
    """Return a digest of what a server makes of the first round's replies."""
    settings = case.settings(rounds=1)
    replayed = ReplayedServer(*case.parts(settings), settings)
    first, opened = replayed.round, replayed.open()
    for client in replayed.strategy.participants(replayed.state, first):
        opened.tell(client)
    shown = opened.shown(opened.received(replies))
    return digest(replayed.strategy.aggregate(replayed.state, shown, first, replayed.server))


# -- state -------------------------------------------------------------------------------------


class _EnoughError(Exception):
    """Ends a run between two rounds."""


@claim
def its_state_is_all_that_is_needed_to_go_on(case: Case) -> None:
    """A run that goes on from a file, in another process, ends with the same bits."""
    settings, data = case.whole().settings, case.data()
    whole = case.whole().run
    grid = InlineGrid(settings, data)
    before = RoundLoop(grid, settings, data, [])

    def enough() -> None:
        if before.boundary is not None and before.boundary.round == 2:
            raise _EnoughError

    with suppress(_EnoughError):
        before.run(enough)
    boundary = before.boundary
    if boundary is None:
        raise BrokenError("the run did not stand between two rounds")
    clients = grid.trained_clients()
    states = zip(clients, grid.client_states(clients), strict=True)
    resumed = InlineGrid(settings, data)
    resumed.load_states([(client, state) for client, state in states if state is not None])
    loop = RoundLoop(resumed, settings, data, [])
    loop.check_boundary(_through_a_file(boundary.state), boundary.exchange)
    kept = Boundary(2, _through_a_file(boundary.state), _through_a_file(boundary.exchange))
    loop.go_back(kept, before.history)
    loop.run()
    require(
        weights_digest(final_states(settings, data, resumed)) == whole.digest,
        "it ended with other weights than the run that was not interrupted",
    )
    measured = _without_seconds(loop.history.federation)
    require(measured == _without_seconds(whole.history.federation), "it measured something else")
    ends = [end.boundary.state for end in (loop, whole.loop) if end.boundary is not None]
    require(len({digest(end) for end in ends}) == 1, "the server's state ended as another one")


@claim
def nothing_is_changed_in_place(case: Case) -> None:
    """Aggregating leaves the state, the uploads and the algorithm itself as they were."""
    settings, grid = case.whole().settings, case.whole().grid
    replayed = ReplayedServer(*case.parts(settings), settings)
    strategy, server = replayed.strategy, replayed.server
    for number in (0, 1):
        opened, round, state = replayed.open(), replayed.round, replayed.state
        for client in grid.told["train"][number]:
            opened.tell(client)
        uploads = opened.shown(opened.received(grid.replies["train"][number]))
        known = [digest(upload.payload) for upload in uploads]
        was, itself = digest(state), _attributes(strategy)
        results = [
            strategy.aggregate(state, iter(uploads), round, server) for _ in ("once", "again")
        ]
        require(digest(state) == was, "aggregate changed the state that it was handed")
        require(
            [digest(upload.payload) for upload in uploads] == known,
            "aggregate changed an upload",
        )
        require(
            _attributes(strategy) == itself,
            "aggregate changed an attribute of the algorithm: what it remembers belongs into its "
            "State",
        )
        require(
            digest(results[0]) == digest(results[1]),
            "aggregate gave another state for the same state and uploads",
        )
        replayed.close(opened, results[0])


@claim
def its_state_is_frozen(case: Case) -> None:
    """Nobody can put something else into a state, or into a part of it."""
    strategy, server = case.parts(case.settings())
    for part in _parts(strategy.begin(server)):
        require(
            is_dataclass(part) and type(part).__dataclass_params__.frozen,
            f"{type(part).__name__} is no frozen dataclass: write @dataclass(frozen=True)",
        )


@claim
def the_server_half_answers_by_the_state_alone(case: Case) -> None:
    """Asked again, and in another order, it tells the same, and nothing is left of being asked."""
    settings, grid = case.whole().settings, case.whole().grid
    replayed = ReplayedServer(*case.parts(settings), settings)
    strategy, server = replayed.strategy, replayed.server
    for number in range(3):
        opened, round, state = replayed.open(), replayed.round, replayed.state
        was, itself = digest(state), _attributes(strategy)
        first = _answers(strategy, state, round, server, range(CLIENTS))
        again = _answers(strategy, state, round, server, reversed(range(CLIENTS)))
        require(
            first == again, "receives, payload, orders, asks or participants answer differently"
        )
        require(digest(state) == was, "the state was changed by asking what clients are told")
        require(
            _attributes(strategy) == itself,
            "an attribute of the algorithm was changed by asking what clients are told",
        )
        strategy.judged_models(state)
        for client, told in grid.told["train"][number].items():
            again_told = opened.tell(client)
            require(
                _same(told.payload, again_told.payload) and _same(told.orders, again_told.orders),
                f"round {number + 1}: client {client} was told something else than the state says",
            )
        uploads = opened.shown(opened.received(grid.replies["train"][number]))
        replayed.close(opened, strategy.aggregate(state, iter(uploads), round, server))


def _answers(
    strategy: Strategy[Any, Any],
    state: Value,
    round: Round,
    server: ServerTools,
    clients: Iterable[int],
) -> dict[int, Any]:
    """Return what is told to each client and asked of it, as what can be compared."""
    found: dict[int, Any] = {-1: strategy.participants(state, round)}
    for client in clients:
        key = strategy.receives(state, client, round)
        orders = strategy.orders(state, client, round)
        asked = strategy.asks(state, client, round, server)
        found[client] = (
            key if key is None else (hash(key), digest(strategy.payload(state, key))),
            orders and digest(orders),
            asked and (asked.kind, repr(asked.limits)),
        )
    return found


def _parts(held: Any) -> Iterator[Value]:
    """Yield every value within a value, itself included."""
    if isinstance(held, Value):
        yield held
        held = vars(held)
    if isinstance(held, Mapping):
        held = tuple(held.values())
    if isinstance(held, tuple):
        for inner in held:
            yield from _parts(inner)


@claim
def the_client_half_uses_nothing_but_its_arguments(case: Case) -> None:
    """Workers come and go: a new algorithm object for every call gives the same bits."""
    settings, data = case.settings(rounds=2, engine={"vectorize": "loop"}), case.data()
    replayed = ReplayedServer(*case.parts(settings), settings)
    strategy = replayed.strategy
    tensors = TrainingData.from_arrays(data, torch.device("cpu"))
    pool = ModelPool(tensors, settings.clients.optimizer)
    states: dict[int, Any] = {}
    for number in (1, 2):
        opened, round = replayed.open(), replayed.round
        sent: dict[int, Payload | None] = {}
        for client in strategy.participants(replayed.state, round):
            half, told, state = case.parts(settings)[0], opened.tell(client), states.get(client)
            turn = ClientTurn(
                settings.stages,
                seed=settings.seed,
                round=number,
                attempt=1,
                clients={client: Standing({} if state is None else state.arrays, told.since)},
            )
            cohort = LoopCohort(
                [Member(client, half.private_rows(client, data), state)],
                model=half.architecture(client),
                optimizer=settings.clients.optimizer,
                data=tensors,
                pool=pool,
                streams=Streams(seed=settings.seed, round=number, rounds=settings.rounds),
            )
            call = Call(half.federation, number, (told.orders,), (state is None,))
            # Writeable, which what travels is not everywhere.
            received = _through_a_file(turn.open({client: told.payload})[client])
            known, itself = received and digest(received), _attributes(half)
            answers = half.client(cohort, Received([received]), call)
            require(
                (received and digest(received)) == known,
                "the client half changed what it received, which others may share",
            )
            require(
                _attributes(half) == itself,
                "the client half changed an attribute of the algorithm: what a client remembers "
                "is kept with cohort.keep",
            )
            sent |= turn.send({client: answers[0]} if answers else {client: None})
            kept = turn.kept()
            states[client] = cohort.states()[0]
            if client in kept:
                states[client] = with_exchange(states[client], kept[client])
        uploads = opened.shown(opened.decoded(sent))
        after = strategy.aggregate(replayed.state, iter(uploads), round, replayed.server)
        replayed.close(opened, after)
    run = simulate(settings, data)
    every = [states.get(client, run.states[client]) for client in range(CLIENTS)]
    require(weights_digest(every) == run.digest, "the clients ended with other weights")


# -- helpers -----------------------------------------------------------------------------------


def _require_no_events(run: Simulated) -> None:
    told = [f"{event['event']}: {event.get('reason')}" for event in run.events]
    require(not told, f"there were events: {'; '.join(told)}")


def _without_seconds(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row[key] for key in row if "seconds" not in key} for row in rows]


def _timeless(run: Simulated) -> list[dict[str, Any]]:
    return _without_seconds(run.history.federation)


def _told_in(
    strategy: Strategy[Any, Any], state: Value, round: Any
) -> Callable[[int], Payload | None]:
    def told(client: int) -> Payload | None:
        key = strategy.receives(state, client, round)
        return None if key is None else strategy.payload(state, key)

    return told


def _same(one: Payload | None, other: Payload | None) -> bool:
    if one is None or other is None:
        return one is other
    return digest(one) == digest(other)


def _through_a_file(value: Any) -> Any:
    """Return a value as a checkpoint would give it back; None stays None."""
    if value is None:
        return None
    flat = flatten(value)
    arrays = {name: np.array(array) for name, array in flat.arrays.items()}
    return unflatten(arrays, json.loads(json.dumps(flat.plain)))


def _attributes(strategy: Strategy[Any, Any]) -> str:
    """Return what an algorithm holds itself, as text that changes with it."""
    return repr({name: _plain(value) for name, value in vars(strategy).items()})


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | torch.Tensor):
        array = np.asarray(value)
        return str(array.dtype), array.shape, array.tobytes()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return digest(value) if isinstance(value, Value) else repr(value)
