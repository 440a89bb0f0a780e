"""What a run under ``exchange.budget_kb`` will transfer, asked of its algorithm before it runs."""

from dataclasses import replace
from typing import Any

from fedkd.exchange.budget import NOTHING, BudgetError, Form, Plan, SmallBudgetError, example_of
from fedkd.exchange.payload import Asked, Payload
from fedkd.exchange.payloads import Predictions
from sim.engine.runtime import build_strategy, server_tools
from sim.server.validation import authors_code
from sim.settings import Settings, SettingsError
from strategies.contract import ServerTools, Strategy


def plan_of(settings: Settings, strategy: Strategy[Any, Any], server: ServerTools) -> Plan | None:
    """Return what is planned before the first round; None without a budget.

    Raises:
        SettingsError: the budget cannot be kept, or the algorithm's transfers are not known.
        AuthorError: the algorithm's own code is wrong.
    """
    if settings.exchange.budget_kb is None:
        return None
    try:
        refused: BudgetError | None = None
        with authors_code("before round 1, the server's half"):
            try:
                plan = _planned(settings, strategy, server)
            except BudgetError as error:
                refused = error
        if refused is not None:
            raise BudgetError(f"exchange.budget_kb: {refused}")
        try:
            plan.check()
        except SmallBudgetError as error:
            raise BudgetError(f"{error}{_fewer_rows(plan, settings, strategy, server)}") from error
    except BudgetError as error:
        raise SettingsError(str(error)) from error
    return plan


def _fewer_rows(
    plan: Plan, settings: Settings, strategy: Strategy[Any, Any], server: ServerTools
) -> str:
    """Say with how many public rows a round a budget can be kept that is too small for the plan.

    Each number is tried. Nothing is said where fewer rows do not help: what travels is no
    prediction of theirs.
    """
    federation = strategy.federation
    now = federation.rows_per_round
    # Bytes are in proportion to the rows, but for what is sent whatever their number.
    most = now * plan.budget // plan.smallest
    for rows in dict.fromkeys((most, most * 9 // 10, most * 3 // 4, most // 2, most // 4)):
        if not 0 < rows < now:
            continue
        fewer = replace(federation, rows_per_round=rows)
        try:
            other = build_strategy(settings, fewer)
            tried = _planned(settings, other, server_tools(settings, other, server.data))
        except ValueError:
            continue
        if tried.smallest <= plan.budget:
            ways = [f"exchange.rows_per_round={rows}"]
            if settings.exchange.rows_per_round is None:
                ways.append(f"data.public.size={rows}")
            return f"; {' or '.join(ways)} fits it (now {now} rows a round)"
    return ""


def _planned(settings: Settings, strategy: Strategy[Any, Any], server: ServerTools) -> Plan:
    """Ask an algorithm what it will transfer.

    The server's state before the first round says what clients answer and receive. Where they
    receive nothing then, what comes down later is taken to be as large as what goes up, as it is
    with the mean of predictions. Equal settings give equal plans, also in a resumed run.

    Raises:
        BudgetError: the algorithm's transfers are not known before a run.
    """
    federation = strategy.federation
    state = strategy.begin(server)
    first = federation.round(1)
    made: dict[Any, Form] = {}
    up, down = {}, {}
    for client in range(federation.num_clients):
        asked = strategy.asks(state, client, first, server)
        form = NOTHING
        if asked is not None:
            key: Any = ("up", asked.kind, repr(asked.limits))
            if key not in made:
                made[key] = Form.of(example_of(asked), asked)
            form = made[key]
        up[client] = form
        orders = strategy.orders(state, client, first)
        more = 0 if orders is None else orders.payload_bytes
        received = strategy.receives(state, client, first)
        key = "down", received, asked and (asked.kind, repr(asked.limits)), more
        if key not in made:
            example = (
                _mirrored(strategy, asked)
                if received is None
                else strategy.payload(state, received)
            )
            made[key] = _down(strategy, example, more)
        down[client] = made[key]
    rounds = [
        strategy.participants(state, federation.round(number))
        for number in range(1, federation.rounds + 1)
    ]
    asked_each = sum(map(len, rounds)) / max(len(rounds), 1)
    by_rows = "examples" in (strategy.sums, getattr(strategy.settings, "weighting", None))
    rows = federation.num_examples
    mean = sum(rows) / len(rows)
    return Plan(
        budget=int((settings.exchange.budget_kb or 0) * 1000),
        rule=settings.exchange.allocation,
        participants=rounds,
        up=up,
        down=down,
        weights={
            client: (own / mean if by_rows else 1.0) / max(asked_each, 1)
            for client, own in enumerate(rows)
        },
    )


def _down(strategy: Strategy[Any, Any], example: Payload | None, more: int) -> Form:
    if example is None:
        return Form(NOTHING.levels, (more,), NOTHING.errors)
    others = {kind.kind for kind in strategy.down} - {example.kind}
    if others:
        raise BudgetError(
            f"{strategy.settings.name} sends {example.kind} in the first round and "
            f"{' or '.join(sorted(others))} later, of a size that is not known before"
        )
    return Form.of(example, more_bytes=more)


def _mirrored(strategy: Strategy[Any, Any], asked: Asked | None) -> Payload | None:
    """Return what comes down of what goes up, where nothing comes down in the first round."""
    kinds = set(strategy.down)
    if not kinds:
        return None
    if asked is not None and kinds == {asked.kind}:
        return example_of(asked)
    parts = [] if asked is None or kinds != {Predictions} else asked.parts.values()
    for part in parts:
        if part.kind is Predictions:
            return example_of(part)
    raise BudgetError(
        f"what {strategy.settings.name} sends down ({', '.join(k.kind for k in strategy.down)}) is "
        "not known before a run"
    )
