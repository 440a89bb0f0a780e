"""Privacy of a run: which algorithms a mechanism can protect, and what each client is to release.

Whatever would break a promise is refused before the run, with the reason and what would be sound.
"""

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from fedkd.data import FederatedData
from fedkd.exchange.budget import LADDER
from fedkd.exchange.ledger import Ledger
from fedkd.exchange.mechanisms import DPSGD, WantedNoise
from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads import Prototypes
from fedkd.exchange.pipeline import Planned
from fedkd.exchange.release import NoRelease, PrivateSteps, ReleaseRule, Where
from fedkd.models import build_model
from sim.settings import Settings
from strategies.contract import PrivateUse, Strategy

OF_ONE_SIZE = frozenset({"float32", "float16", "int8"})
"""Codecs that write any numbers of one form in as many bytes."""

SOUND = "use an algorithm in which nothing but predictions of public rows is sent, such as dml"


def unsound(strategy: Strategy[Any, Any], rule: ReleaseRule, where: Where) -> str | None:
    """Return why a mechanism cannot protect an algorithm, and what would be sound; None: it can.

    Args:
        strategy: the algorithm with its settings.
        rule: the mechanism.
        where: who applies it.
    """
    if isinstance(rule, NoRelease):
        return None
    if rule.learns and not isinstance(rule, DPSGD):
        return (
            "it says that it protects how clients learn, and they learn by none but DP-SGD; use a "
            "subclass of fedkd.exchange.mechanisms.DPSGD, or learns = False and protect what is "
            "sent"
        )
    if rule.learns and where == "server":
        # Also where nothing is sent: the models that a run keeps are protected.
        return rule.refuses(Payload, where)
    use = strategy.private_use
    first = _first(
        _pooled(use),
        _counted(use, strategy),
        _validated(use),
        _refused_kinds(strategy.up, rule, where),
    )
    if first is not None or not isinstance(rule, WantedNoise):
        return first
    if rule.learns:
        return _first(_sent(use), _peer(use))
    if where == "server" and strategy.sums is None:
        return _needs_each(strategy, rule)
    if not strategy.up:
        return (
            "nothing that clients send is released in it; use privacy.mechanism: dp_sgd, which "
            "protects the models themselves"
        )
    return None


def _first(*reasons: str | None) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def _pooled(use: PrivateUse) -> str | None:
    if not use.pooled:
        return None
    return (
        f"{use.pooled}, and no mechanism protects that; use another algorithm, or a teacher of "
        "labelled public rows (strategy.teacher_data: public)"
    )


def _counted(use: PrivateUse, strategy: Strategy[Any, Any]) -> str | None:
    # The noise on a mean is that of equal weights, whatever an algorithm says of itself.
    counts = use.counts or ("its mean" if strategy.sums == "examples" else "")
    if not counts:
        return None
    return (
        f"{counts} weighs clients by how many private rows they have, which is private itself; "
        "use strategy.weighting: equal"
    )


def _validated(use: PrivateUse) -> str | None:
    if not use.validation:
        return None
    return (
        f"{use.validation} is chosen by validation rows, which nothing protects; use an algorithm "
        "that looks at none, such as dml or fedavg"
    )


def _sent(use: PrivateUse) -> str | None:
    if not use.sent:
        return None
    return (
        f"clients also send {use.sent}, which a protected model does not protect; {SOUND}, or a "
        "mechanism that protects what is sent (gaussian, laplace), where it takes this payload"
    )


def _peer(use: PrivateUse) -> str | None:
    if not use.peer:
        return None
    return (
        f"{use.peer}: what travels would be made of private rows past all noise; {SOUND}, whose "
        "peers teach each other on public rows"
    )


def _refused_kinds(kinds: Iterable[type[Payload]], rule: ReleaseRule, where: Where) -> str | None:
    return _first(*(rule.refuses(kind, where) for kind in kinds))


def _needs_each(strategy: Strategy[Any, Any], rule: WantedNoise) -> str | None:
    if strategy.leaves_one_out and rule.adds_noise:
        return None
    if strategy.leaves_one_out:
        return "each client gets a mean of its own, of which votes have none; use gaussian"
    aggregation = getattr(strategy.settings, "aggregation", "mean")
    if aggregation != "mean":
        return (
            "a trusted server adds noise to the mean of all answers, and strategy.aggregation is "
            f"{aggregation}: use mean, or privacy.where: client"
        )
    return (
        "a trusted server adds noise to the mean of all answers, and this algorithm needs each of "
        "them; use privacy.where: client, or an algorithm that needs the mean alone, such as fedmd "
        "or dsfl (dml: strategy.average=logit)"
    )


def check_privacy(
    settings: Settings, strategy: Strategy[Any, Any], data: FederatedData, *, nodes: bool
) -> None:
    """Refuse, before any worker starts, what would break the promise of a mechanism.

    Args:
        settings: of the run.
        strategy: its algorithm.
        data: of the run.
        nodes: whether clients are nodes of Flower's own runtimes.

    Raises:
        ValueError: naming the setting, the reason and what would be sound.
    """
    privacy = settings.privacy
    rule = privacy.mechanism
    if isinstance(rule, NoRelease):
        if privacy.budget is not None:
            raise ValueError(
                f"privacy.budget {privacy.budget:g} needs a mechanism that is accounted for, and "
                "privacy.mechanism is none: set it to dp_sgd, gaussian, laplace, votes or "
                "randomized_response, or leave the budget out"
            )
        return
    named = f"privacy.mechanism {rule.kind}"
    if settings.strategy.as_published:
        raise ValueError(
            f"{named} with strategy.as_published {list(settings.strategy.as_published)}: nobody "
            "has looked at what a fault does to the promise; leave one of them out"
        )
    reason = unsound(strategy, rule, privacy.where)
    if reason is not None:
        raise ValueError(f"{named} with strategy {settings.strategy.name}: {reason}")
    if settings.adversary.together and not rule.learns:
        raise ValueError(
            f"{named} with adversary {settings.adversary.kind}: what it sends is made of answers "
            "of others "
            + (
                "before they are protected, and is charged to none of them"
                if privacy.where == "server"
                else "as they travel, with their noise, which are no scores yet"
            )
            + "; use an adversary whose clients act each alone, such as fdla or sign_flip with "
            "mode: naive, or privacy.mechanism: dp_sgd"
        )
    _check_rows_owned(strategy, data, f"{named} with strategy {settings.strategy.name}")
    if privacy.where == "server":
        _check_sizes_untold(settings, strategy, named)
    if settings.keep_round == "selected":
        raise ValueError(
            f"keep_round: selected chooses by validation rows, which {named} does not protect; use "
            "keep_round: last"
        )
    if settings.keep_models == "best":
        raise ValueError(
            f"keep_models: best chooses by validation rows, which {named} does not protect; name "
            "clients, or use server, clients or none"
        )
    if settings.exchange.budget_kb is not None and privacy.where == "client" and rule.codecs:
        unfit = sorted({codec.kind for codec in LADDER} - rule.codecs)
        if unfit:
            raise ValueError(
                f"exchange.budget_kb {settings.exchange.budget_kb:g} may choose {unfit[0]}, which "
                f"cannot write what {named} releases; leave the budget out and use exchange.up: "
                f"{sorted(rule.codecs)[-1]} or {', '.join(sorted(rule.codecs)[:-1])}, or "
                "privacy.mechanism: dp_sgd"
            )
    if rule.learns:
        first, later = (strategy.private_passes(first=each) for each in (True, False))
        forgets = (
            nodes or settings.engine.below_quorum == "skip" or settings.clock.deadline_s is not None
        )
        if first != later and forgets:
            raise ValueError(
                f"{named} with strategy {settings.strategy.name}, whose clients train longer when "
                "they are new: a client that lost its state, was late, or whose round was left "
                "out, would train so again without being charged; use engine.below_quorum: retry "
                "or abort, no clock.deadline_s and fedkd run, or no training before the first round"
            )
        _check_rows_apart(strategy, data, named)


def _check_rows_owned(strategy: Strategy[Any, Any], data: FederatedData, named: str) -> None:
    """Refuse clients that learn from other rows than their own: their number says what rows cost.

    A row that two clients hold, or that one holds twice, is learnt from more often than is charged.
    """
    views = strategy.federation.view_of
    held: dict[int, list[np.ndarray]] = {}
    for client, own in enumerate(data.client_rows):
        held.setdefault(views(client), []).append(own)
        learnt = strategy.private_rows(client, data)
        if not np.array_equal(np.sort(learnt), np.sort(own)):
            raise ValueError(
                f"{named}: client {client} learns from {len(learnt)} rows that are not the "
                f"{len(own)} rows of its own, by which is charged; leave Strategy.private_rows as "
                "it is"
            )
    for rows in map(np.concatenate, held.values()):
        values, counts = np.unique(rows, return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"{named}: row {values[counts.argmax()]} of the data is dealt out "
                f"{counts.max()} times, and charged for once; deal out each row once"
            )


def _check_sizes_untold(settings: Settings, strategy: Strategy[Any, Any], named: str) -> None:
    """Refuse a clock that lets others see how many bytes an answer has before it is protected."""
    seen = settings.clock.on and (settings.clock.deadline_s is not None or settings.presence.on)
    sizes = settings.exchange.up.kind
    if not seen or (sizes in OF_ONE_SIZE and Prototypes not in strategy.up):
        return
    raise ValueError(
        f"{named} with privacy.where: server and exchange.up: {sizes}: by the simulated clock who "
        "is late, or there, depends on how many bytes an answer has before it is protected; use "
        f"exchange.up: {' or '.join(sorted(OF_ONE_SIZE))} and answers of one size, or no "
        "clock.deadline_s and no presence"
    )


def _check_rows_apart(strategy: Strategy[Any, Any], data: FederatedData, named: str) -> None:
    """Refuse what compares the rows of a step: no row has a gradient of its own there."""
    federation = strategy.federation
    for client in federation.first_clients.values():
        model = federation.models[client]
        built = build_model(
            model,
            input_shape=federation.shape_of(client),
            num_classes=federation.num_classes,
            seed=0,
        )
        for layer in built.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                raise ValueError(
                    f"{named}: {model.label} of clients.models has a {type(layer).__name__}, "
                    "which mixes the rows of a step, so that no row has a gradient of its own; use "
                    f"clients.models=[{{name: {model.name}, options: {{norm: group}}}}]"
                )
    for stacking in strategy.stackings(data.input_shape).values():
        if stacking.mixes_rows:
            raise ValueError(
                f"{named}: {stacking.mixes_rows}, so no row has a gradient of its own; use terms "
                "of each row, such as ce and kd"
            )


class PrivacyPlan:
    """What each client is to release in a run: pure functions of the settings.

    Args:
        settings: of the run.
        strategy: its algorithm.
    """

    def __init__(self, settings: Settings, strategy: Strategy[Any, Any]) -> None:
        self._settings = settings
        self._strategy = strategy
        self._federation = strategy.federation
        self.rule = settings.privacy.mechanism

    @cached_property
    def _taking_part(self) -> list[int]:
        """In how many rounds each client takes part at most."""
        federation, rounds = self._federation, self._federation.rounds
        chooses = type(self._strategy).participants is not Strategy.participants
        # Without a promise nothing is shared out, and draws of all rounds are work for nothing.
        if (
            not self._settings.privacy.on
            or chooses
            or self._settings.presence.on
            or federation.participation == 1
        ):
            # Who is asked may depend on what nobody knows yet.
            return [rounds] * federation.num_clients
        counts = [0] * federation.num_clients
        for number in range(1, rounds + 1):
            for client in federation.round(number).drawn():
                counts[client] += 1
        return counts

    def releases(self, client: int) -> int:
        """Return in how many rounds a client is asked at most; 1 for one that never is."""
        return max(self._taking_part[client], 1)

    def learning(self, client: int, *, first: bool) -> PrivateSteps:
        """Return how a client learns from its private rows.

        Args:
            client: its partition id.
            first: whether it was never called before.
        """
        rows = self._federation.num_examples[client]
        once, again = (
            sum(passes.count(rows) for passes in self._strategy.private_passes(first=each))
            for each in (True, False)
        )
        rounds = self.releases(client)
        return PrivateSteps(
            rows=rows,
            batch_size=self._federation.local.batch_size,
            steps=once if first else again,
            steps_of_run=once + (rounds - 1) * again,
        )

    def noise(self, client: int) -> float:
        """Return the noise multiplier of a client that learns by DP-SGD."""
        learning = self.learning(client, first=True)
        found: float = self.rule.noise_of(learning, self._settings.privacy.delta)  # type: ignore[attr-defined]
        return found

    def after(self, ledger: Ledger) -> Callable[[int], Planned]:
        """Return what each client releases in the round after those that a ledger knows."""
        if not self.rule.learns:
            return lambda client: Planned(self.releases(client))
        called = {client for charge in ledger.charges for client in charge.clients.tolist()}
        return lambda client: Planned(
            self.releases(client), self.learning(client, first=client not in called)
        )
