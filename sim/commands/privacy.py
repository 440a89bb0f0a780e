"""`privacy`: what a configuration would spend, and the noise that a wanted epsilon takes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fedkd.data import FederatedData
from fedkd.exchange.ledger import Cost
from fedkd.exchange.mechanisms import DPSGD, Votes
from fedkd.exchange.mechanisms.noise import GaussianRelease, LaplaceRelease
from fedkd.exchange.mechanisms.randomized import RandomizedAnswers
from fedkd.exchange.mechanisms.sensitivity import form_of, sensitivity
from fedkd.exchange.payload import Asked
from fedkd.exchange.release import NoRelease, Occasion, PrivateSteps
from fedkd.exchange.spending import spent_of
from fedkd.exchange.values import Value
from fedkd.privacy import Spent
from sim.commands.running import load_data
from sim.engine.runtime import build_strategy, federation_of, server_tools
from sim.reports.terminal import Column, FittedTable
from sim.server.audit import audit_told
from sim.server.observers import Row
from sim.server.privacy import PrivacyPlan
from sim.server.validation import authors_code
from sim.settings import Settings, SettingsError
from strategies.contract import ServerTools, Strategy

OUTSIDE = (
    "Noise is pseudo-random and comes from the run's seed: whoever knows the seed can take it off.",
    "Floating-point arithmetic is not hidden, see Mironov, 2012.",
    "What is known of all rows before learning is taken for public: how inputs are standardised, "
    "categories of tables, and how many rows each client has.",
    "So are weights that were trained before the run, such as those of clients.first_weights: what "
    "they know of private rows is not counted.",
    "Metrics, test accuracy and models that a run keeps of clients (but for dp_sgd) are outside of "
    "the guarantee: they are for whoever simulates. Under flwr run they do reach the server: "
    "losses on private rows, accuracies under a client's mix of classes, predictions of test rows.",
)
"""What no mechanism here promises."""


@dataclass(frozen=True, slots=True)
class Planned:
    """What clients that do alike will release and spend.

    Attributes:
        clients: partition ids.
        rows: private rows of each.
        releases: of each in the whole run, at most.
        noise: per unit of sensitivity; of randomised response: epsilon of one answer.
        figures: what else there is to know of the mechanism.
        spent: of each in the whole run; of votes with a threshold, if every row is answered.
    """

    clients: tuple[int, ...]
    rows: tuple[int, int]
    releases: int
    noise: float
    figures: Mapping[str, int | float]
    spent: Spent


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a run will release and spend; nothing was run for it.

    Attributes:
        name: of the arm, or empty.
        mechanism: that protects, or ``none``.
        delta: of the guarantee.
        unit: whose presence is protected.
        where: who protects.
        groups: clients that do alike.
        budget: epsilon after which the run ends; None: never.
        assumptions: in words.
    """

    name: str
    mechanism: str
    where: str
    unit: str
    delta: float
    groups: tuple[Planned, ...]
    budget: float | None
    assumptions: tuple[str, ...]

    @property
    def epsilon(self) -> float | None:
        """The largest epsilon of any client; None where nothing is promised."""
        return max((group.spent.epsilon for group in self.groups), default=None)

    def to_row(self) -> Row:
        """Return it as plain values."""
        return {
            **asdict(self),
            "epsilon": self.epsilon,
            "groups": [
                {
                    **asdict(group),
                    "clients": list(group.clients),
                    "rows": list(group.rows),
                    "spent": group.spent._asdict(),
                }
                for group in self.groups
            ],
            "assumptions": list(self.assumptions),
        }

    def table(self) -> FittedTable:
        """Return a line for each group of clients."""
        names = list(dict.fromkeys(name for group in self.groups for name in group.figures))
        cells: dict[str, list[str]] = {
            "rows": [_span(group.rows) for group in self.groups],
            "epsilon": [f"{group.spent.epsilon:.4g}" for group in self.groups],
            "noise": [f"{group.noise:.4g}" for group in self.groups],
            "releases": [str(group.releases) for group in self.groups],
            **{
                name: [f"{group.figures.get(name, 0):.4g}" for group in self.groups]
                for name in names
            },
            "Renyi": [f"{group.spent.renyi:.4g}" for group in self.groups],
            "pure": [f"{group.spent.pure:.4g}" for group in self.groups],
        }
        return FittedTable(
            label="clients",
            labels=[_listed(group.clients) for group in self.groups],
            columns=[
                Column(title=title, cells=own, rank=rank)
                for rank, (title, own) in enumerate(cells.items())
            ],
            title=f"{self.name + ': ' if self.name else ''}{self.mechanism}, where: {self.where}, "
            f"unit: {self.unit}, delta {self.delta:g}",
        )


def privacy(settings: Settings, name: str = "") -> Outlook:
    """Say what a run would spend of each client's privacy, without running it.

    Args:
        settings: of the run.
        name: of the arm, where it is one of several.

    Raises:
        SettingsError: names the setting that cannot work, such as a mechanism that cannot protect
            the algorithm.
    """
    data = load_data(settings)
    strategy = build_strategy(settings, federation_of(settings, data))
    rule, own = settings.privacy.mechanism, settings.privacy
    limit = own.limit
    groups: tuple[Planned, ...] = ()
    if not isinstance(rule, NoRelease):
        groups = tuple(_groups(settings, strategy, data))
    return Outlook(
        name=name,
        mechanism=rule.kind,
        where=own.where,
        unit=own.promised,
        delta=own.delta,
        groups=groups,
        budget=None if limit is None else limit.epsilon,
        assumptions=(*_too_large(own.delta, groups), *_audit(settings), *assumptions(settings)),
    )


def _too_large(delta: float, groups: Sequence[Planned]) -> tuple[str, ...]:
    """Say where a guarantee may be empty: with probability delta anything may be told.

    Source:
        Dwork and Roth, 2014, section 2.3: delta is to be below the inverse of the number of rows.
    """
    rows = max((group.rows[1] for group in groups), default=0)
    if not rows or delta < 1 / rows:
        return ()
    return (
        f"privacy.delta {delta:g} is no less than 1 / rows ({rows} rows of a client): to publish a "
        f"row at random would keep such a promise; choose one far below {1 / rows:.1g}.",
    )


def _audit(settings: Settings) -> tuple[str, ...]:
    told = audit_told(settings)
    return (f"{told[0].upper()}{told[1:]}.",) if told else ()


def assumptions(settings: Settings) -> tuple[str, ...]:
    """Return in words what the figures rest on."""
    own = settings.privacy
    rule = own.mechanism
    if isinstance(rule, NoRelease):
        return (
            "privacy.mechanism is none: nothing is promised, whatever clients send. Try "
            "privacy.mechanism=dp_sgd privacy.epsilon=8",
        )
    neighbours = {
        "example": "Two federations are neighbours where a client has one private row more or less",
        "client": "Two federations are neighbours where a client has other private rows, all of "
        "them",
    }[own.promised]
    return (
        rule.told(own.where)[0].upper() + rule.told(own.where)[1:] + ".",
        f"{neighbours}; epsilon is of one client over the whole run, at delta {own.delta:g}.",
        "A client is taken to answer in every round in which it may be drawn; an answer that is "
        "asked for again costs again.",
        *OUTSIDE,
    )


def _groups(settings: Settings, strategy: Strategy[Any, Any], data: FederatedData) -> list[Planned]:
    plan = PrivacyPlan(settings, strategy)
    server = server_tools(settings, strategy, data)
    with authors_code("before round 1, the server's half"):
        state = strategy.begin(server)
        asked = {
            client: _first_asked(strategy, state, client, server)
            for client in range(strategy.federation.num_clients)
        }
    alike: dict[Any, list[int]] = {}
    for client, answer in asked.items():
        reason = None if answer is None else plan.rule.refuses_asked(answer)
        if reason is not None:
            raise SettingsError(f"privacy.mechanism {plan.rule.kind}: {reason}")
        learning = plan.learning(client, first=True) if plan.rule.learns else None
        form = None if answer is None else form_of(answer)
        alike.setdefault((plan.releases(client), learning, form), []).append(client)
    found = []
    for (releases, learning, form), clients in alike.items():
        occasion = Occasion(
            where=settings.privacy.where,
            round=1,
            releases=releases,
            delta=settings.privacy.delta,
            clients=1,
            form=form,
            learning=learning,
        )
        found.append(_planned(settings, clients, occasion, strategy))
    return found


def _first_asked(
    strategy: Strategy[Any, Any], state: Value, client: int, server: ServerTools
) -> Asked | None:
    """Return what a client is asked for first, rounds that ask for no row left out."""
    answers = (
        strategy.asks(state, client, strategy.federation.round(number), server)
        for number in range(1, strategy.federation.rounds + 1)
    )
    first = asked = next(answers)
    while asked is not None and (form := form_of(asked)) is not None and not form.rows:
        asked = next(answers, None)
    return first if asked is None else asked


def _planned(
    settings: Settings,
    clients: Sequence[int],
    occasion: Occasion,
    strategy: Strategy[Any, Any],
) -> Planned:
    rule, learning = settings.privacy.mechanism, occasion.learning
    costs: list[tuple[Cost, int]] = []
    figures: dict[str, int | float] = {}
    noise = 0.0
    if isinstance(rule, DPSGD) and learning is not None:
        noise = rule.noise_of(learning, occasion.delta)
        figures = {"rate": learning.sample_rate, "steps": learning.steps_of_run}
        whole = rule.cost(_over(occasion, learning))
        costs = [] if whole is None else [(whole, 1)]
    else:
        cost = rule.cost(occasion)
        costs = [] if cost is None else [(cost, occasion.releases)]
    if isinstance(rule, GaussianRelease | LaplaceRelease) and occasion.form is not None:
        noise = rule.multiplier(occasion)
        bound = sensitivity(occasion.form, clip=rule.clip, norm=type(rule).norm)
        federation = strategy.federation
        drawn = max(1, round(federation.participation * federation.num_clients))
        of = 1 if occasion.where == "client" else drawn
        figures = {"sensitivity": bound, "per number": noise * bound / of}
    elif isinstance(rule, RandomizedAnswers):
        answer = rule.answer(occasion)
        noise = answer.epsilon
        figures = {"answers": answer.count * occasion.releases, "kept": answer.keep}
    elif isinstance(rule, Votes):
        noise = rule.multiplier(occasion)
        figures = {"per count": noise * np.sqrt(2)}
    rows = [strategy.federation.num_examples[client] for client in clients]
    return Planned(
        clients=tuple(clients),
        rows=(min(rows), max(rows)),
        releases=occasion.releases,
        noise=noise,
        figures=figures,
        spent=spent_of(costs, delta=occasion.delta),
    )


def _over(occasion: Occasion, learning: PrivateSteps) -> Occasion:
    """Return one occasion for all steps of the run."""
    return replace(occasion, learning=learning._replace(steps=learning.steps_of_run))


def _span(rows: tuple[int, int]) -> str:
    low, high = rows
    return str(low) if low == high else f"{low}-{high}"


def _listed(clients: Sequence[int]) -> str:
    """Return client numbers, neighbours as a span; many as their count."""
    spans: list[list[int]] = []
    for client in clients:
        if spans and client == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], client]
        else:
            spans.append([client, client])
    told = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return told if len(told) <= 24 else f"{len(clients)} clients"
