"""Shadows: what clients would have left that had, or had not, learnt from a row.

Of every client that is attacked there are as many shadows as asked for; half of them learnt from a
candidate, half did not. A shadow is either the client's architecture, trained as long on rows of
its own (``models``), or the client in the whole federation, run again (``federations``).
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedkd.data import FederatedData
from fedkd.exchange.adversaries import Adversary, Controlling, NoAdversary
from fedkd.exchange.payload import Payload
from fedkd.exchange.payloads import Predictions
from fedkd.exchange.pipeline import (
    BadPayloadError,
    ClientTurn,
    ExchangeState,
    ServerTurn,
    Stages,
    Standing,
)
from fedkd.exchange.release import NoRelease
from fedkd.models import ModelSettings
from fedkd.randomness import Purpose, generator_for
from fedkd.targets import soften
from fedkd.tensors import as_tensor
from fedkd.training import Arrays
from sim.attacks.bench import Bench, SoftLabels
from sim.attacks.candidates import Candidates, Pool
from sim.attacks.evidence import Counter, Evidence, Tell, observed
from sim.attacks.readings import Reading, SentModel, UnreadableError, reading_of
from sim.devices.clock import ClockSettings
from sim.devices.presence import PresenceSettings
from sim.engine.inline import InlineGrid
from sim.server.rounds import RoundLoop
from sim.settings.schema import (
    CounterfactualSettings,
    ExchangeSettings,
    PrivacySettings,
    Settings,
)
from strategies.baselines.local import LocalSettings


@dataclass(frozen=True)
class Target:
    """A client that is attacked.

    Attributes:
        candidates: rows whose membership is to be told.
        inside: bool ``[shadows, candidates]``, which of them each shadow learnt from.
        model: architecture of its judged model.
    """

    candidates: Candidates
    inside: np.ndarray
    model: ModelSettings

    @property
    def client(self) -> int:
        """Partition id."""
        return self.candidates.client

    def rows_of_shadow(self, shadow: int) -> np.ndarray:
        """Return the rows of the pool that a shadow learns from."""
        return self.candidates.learnt(self.inside[shadow])


Made = list[Arrays | None]
"""Weights of shadows; None of one that never had its turn (``clients.participation``,
``presence``): it tells nothing of any row, and is left aside."""


class Shadows(ABC):
    """Where shadows come from; what is made once is kept. None: a shadow never had its turn.

    Args:
        settings: of the run.
        data: of the run.
        pool: holds the candidates.
        targets: who is attacked.
        bench: the attacker's models.
        tell: is told of progress.
    """

    def __init__(
        self,
        settings: Settings,
        data: FederatedData,
        pool: Pool,
        targets: Sequence[Target],
        bench: Bench,
        tell: Tell,
    ) -> None:
        self._settings = settings
        self._data = data
        self._pool = pool
        self._targets = list(targets)
        self._bench = bench
        self._tell = tell
        self._count = len(targets[0].inside)

    @abstractmethod
    def models(self, target: Target, model: ModelSettings) -> Sequence[Arrays | None]:
        """Return the weights of a target's shadows."""

    @abstractmethod
    def sent(self, target: Target, like: Reading) -> Sequence[Reading | None]:
        """Return what a target's shadows send last, which for the target was ``like``.

        Raises:
            UnreadableError: shadows of this kind cannot tell.
        """

    @abstractmethod
    def received(self, receiver: int, like: Reading) -> Sequence[Reading | None]:
        """Return what a client receives last from shadows, which in the run was ``like``.

        Raises:
            UnreadableError: shadows of this kind cannot tell.
        """


# -- alone ---------------------------------------------------------------------------------------


def learn_alone(
    settings: Settings,
    data: FederatedData,
    pool: Pool,
    models: Sequence[ModelSettings],
    rows: Sequence[np.ndarray],
    seed: int,
    tell: Tell,
) -> Made:
    """Train models by themselves, as many rounds as a run has and by its optimizer.

    Under ``privacy.mechanism: dp_sgd`` they learn by it as well.

    Args:
        settings: of the run.
        data: of the run.
        pool: holds their rows.
        models: of each.
        rows: positions in the pool, of each.
        seed: of what they draw.
        tell: is told of progress.

    Returns:
        The weights of each, None where it was never drawn.
    """
    count = len(models)
    private = settings.privacy if settings.privacy.mechanism.learns else PrivacySettings()
    clients = settings.clients.model_copy(
        update={
            "count": count,
            "models": tuple(models),
            "participation": settings.participation,
            "participants": None,
            "first_weights": _beginnings(settings, models),
        }
    )
    alone = settings.model_copy(
        update={
            "seed": seed,
            "clients": clients,
            "strategy": LocalSettings(),
            "exchange": ExchangeSettings(),
            "privacy": private,
            "adversary": NoAdversary(),
            "counterfactual": CounterfactualSettings(),
            "clock": ClockSettings(),
            "presence": PresenceSettings(),
            "faults": (),
            "engine": settings.engine.model_copy(update={"backend": "inline"}),
            "evaluation": settings.evaluation.model_copy(
                update={"every": settings.rounds, "clients": 1}
            ),
        }
    )
    own = replace(
        data,
        train_inputs=pool.inputs,
        train_labels=pool.labels,
        client_rows=tuple(rows),
        client_names=(),
        wrong_labels=None,
        # Nobody is judged by these; one row of each is enough to see that models predict.
        test_inputs=data.test_inputs[:1],
        test_labels=data.test_labels[:1],
        validation_inputs=data.validation_inputs[:1],
        validation_labels=data.validation_labels[:1],
    )
    grid = InlineGrid(alone, own)
    observer = Counter(alone.rounds, tell, f"{count} shadow models")
    loop = RoundLoop(grid, alone, own, [observer])
    loop.run()
    return [
        None if state is None else next(iter(state.models.values())).weights
        for state in grid.client_states(range(count))
    ]


def _beginnings(settings: Settings, models: Sequence[ModelSettings]) -> tuple[Path | None, ...]:
    """Return the files that models start from, where clients of the run start from some."""
    clients = settings.clients
    files = {m.key: path for m, path in zip(clients.models, clients.beginnings, strict=True)}
    return tuple(files.get(model.key) for model in models) if clients.first_weights else ()


class ShadowModels(Shadows):
    """Models that learn alone: made once for all runs whose clients learn alike.

    What they send is what they say of the public rows, after the run's codec and mechanism. What
    is received is the mean of that, or a model that learns from all their rows at once.
    """

    def __init__(
        self,
        settings: Settings,
        data: FederatedData,
        pool: Pool,
        targets: Sequence[Target],
        bench: Bench,
        tell: Tell,
        *,
        evidence: Evidence,
        keep: Callable[[str, Callable[[], Made]], Made],
    ) -> None:
        super().__init__(settings, data, pool, targets, bench, tell)
        self._evidence = evidence
        self._keep = keep
        self._made: dict[tuple[int, str], Made] = {}
        self._said: dict[int, list[np.ndarray | None]] = {}

    def models(self, target: Target, model: ModelSettings) -> Sequence[Arrays | None]:
        """Return them; those of all targets are trained together."""
        if (target.client, model.key) not in self._made:
            # Judged models are asked for first, all with their own architecture.
            wanted = [
                (other, other.model if model.key == target.model.key else model)
                for other in self._targets
            ]
            wanted = [(o, m) for o, m in wanted if (o.client, m.key) not in self._made]
            made = self._trained(
                "models",
                [m for _ in range(self._count) for _, m in wanted],
                [o.rows_of_shadow(s) for s in range(self._count) for o, _ in wanted],
            )
            for place, (other, own) in enumerate(wanted):
                self._made[other.client, own.key] = made[place :: len(wanted)]
        return self._made[target.client, model.key]

    def sent(self, target: Target, like: Reading) -> Sequence[Reading | None]:
        """Return their models, or what these say of public rows."""
        if isinstance(like, SentModel):
            return _as_sent(like.model, self.models(target, like.model))
        logits = self._public_logits(target, like.rows)
        payload = self._evidence.last_sent(target.client)
        stages = replace(
            self._settings.stages, adversary=NoAdversary(), controlled=frozenset(), budget=None
        )
        return [
            None
            if own is None
            else SoftLabels(
                like.rows, through(stages, own, like.rows, payload, shadow, self._bench)
            )
            for shadow, own in enumerate(logits)
        ]

    def received(self, receiver: int, like: Reading) -> Sequence[Reading | None]:
        """Return the mean of what the others' shadows say, or a model of all their rows."""
        stages = self._settings.stages
        if stages.where == "server" and not isinstance(stages.release, NoRelease):
            raise UnreadableError(
                "a trusted server's noise is in what was received, and not in shadows that learn "
                "alone: attacks.train=federations runs everything again"
            )
        if isinstance(like, SentModel):
            attacked = {target.client for target in self._targets}
            of_others = [
                own for client, own in enumerate(self._data.client_rows) if client not in attacked
            ]
            rows = [
                np.sort(np.concatenate([*of_others, *(o.rows_of_shadow(s) for o in self._targets)]))
                for s in range(self._count)
            ]
            made = self._trained("pooled", [like.model] * self._count, rows)
            return _as_sent(like.model, made)
        payload = self._evidence.last_received(receiver)
        temperature = payload.temperature if isinstance(payload, Predictions) else 1.0
        others = [target for target in self._targets if target.client != receiver]
        found: list[Reading | None] = []
        for of_shadow in zip(*(self._public_logits(o, like.rows) for o in others), strict=True):
            said = [
                soften(as_tensor(own), temperature=temperature).numpy()
                for own in of_shadow
                if own is not None
            ]
            mean = np.stack(said).mean(axis=0, dtype=np.float64) if said else None
            found.append(None if mean is None else SoftLabels(like.rows, mean.astype(np.float32)))
        return found

    def _public_logits(self, target: Target, rows: np.ndarray) -> list[np.ndarray | None]:
        """Return what each shadow says of public rows."""
        models = self.models(target, target.model)
        if target.client not in self._said:
            there = [own for own in models if own is not None]
            said = iter(self._bench.predict(target.model, there, self._data.public_inputs))
            self._said[target.client] = [None if own is None else next(said) for own in models]
        return [None if own is None else own[rows] for own in self._said[target.client]]

    def _trained(
        self, what: str, models: Sequence[ModelSettings], rows: Sequence[np.ndarray]
    ) -> Made:
        # Who is attacked depends on more than settings: on liars, on who had a turn.
        learnt = hashlib.sha256()
        for model, own in zip(models, rows, strict=True):
            learnt.update(f"{model.key} {len(own)} ".encode() + own.tobytes())
        return self._keep(
            f"{what} {learnt.hexdigest()}",
            lambda: learn_alone(
                self._settings, self._data, self._pool, models, rows, self._seed, self._tell
            ),
        )

    @property
    def _seed(self) -> int:
        return shadow_seed(self._settings, 0)


def through(
    stages: Stages,
    logits: np.ndarray,
    rows: np.ndarray,
    like: Payload | None,
    shadow: int,
    bench: Bench,
) -> np.ndarray:
    """Return what a server decodes of a shadow's answer, as soft labels ``[rows, classes]``.

    Args:
        stages: that it passes.
        logits: what the shadow says.
        rows: positions in the public set.
        like: what the client sent.
        shadow: the so many-th.
        bench: of the attacker.
    """
    scale = like.scale if isinstance(like, Predictions) else "logits"
    values = logits
    if scale == "probabilities":
        values = soften(as_tensor(logits), temperature=1.0).numpy()
    answer = Predictions(rows=rows, values=values, scale=scale)
    asked = Predictions.asked(rows, logits.shape[1], scale=scale)
    client = ClientTurn(stages, seed=bench.seed, round=1, attempt=1, clients={shadow: Standing()})
    server = ServerTurn(stages, ExchangeState(), seed=bench.seed, round=1)
    try:
        payload = server.receive(shadow, client.send({shadow: answer})[shadow], asked)
    except BadPayloadError as error:
        raise UnreadableError(f"a shadow's answer: {error}") from None
    reading = reading_of(payload, (), bench)
    assert isinstance(reading, SoftLabels)  # noqa: S101
    return reading.probabilities


def _as_sent(model: ModelSettings, made: Sequence[Arrays | None]) -> list[SentModel | None]:
    return [None if own is None else SentModel(model, own) for own in made]


# -- in federations ------------------------------------------------------------------------------


class ShadowFederations(Shadows):
    """The whole run again, with half of each target's candidates: exact, and as slow as that."""

    def __init__(
        self,
        settings: Settings,
        data: FederatedData,
        pool: Pool,
        targets: Sequence[Target],
        bench: Bench,
        tell: Tell,
        *,
        models: Sequence[ModelSettings],
    ) -> None:
        super().__init__(settings, data, pool, targets, bench, tell)
        self._models = models
        self._left: list[Evidence] = []

    def models(self, target: Target, model: ModelSettings) -> Sequence[Arrays | None]:
        """Return the client's judged model in each federation."""
        return [left.models.get(target.client) for left in self._all]

    def sent(self, target: Target, like: Reading) -> Sequence[Reading | None]:
        """Return what the client sent last in each federation."""
        return [self._read(left.last_sent(target.client)) for left in self._all]

    def received(self, receiver: int, like: Reading) -> Sequence[Reading | None]:
        """Return what a client received last in each federation."""
        return [self._read(left.last_received(receiver)) for left in self._all]

    def _read(self, payload: Payload | None) -> Reading | None:
        return None if payload is None else reading_of(payload, self._models, self._bench)

    @property
    def _all(self) -> list[Evidence]:
        for shadow in range(len(self._left), self._count):
            self._tell(f"shadow federation {shadow + 1} of {self._count}")
            rows = list(self._data.client_rows)
            for target in self._targets:
                rows[target.client] = target.rows_of_shadow(shadow)
            settings = self._settings.model_copy(
                update={
                    "seed": shadow_seed(self._settings, shadow),
                    "faults": (),
                    "adversary": _same_clients(self._settings),
                    "evaluation": self._settings.evaluation.model_copy(
                        update={"every": self._settings.rounds, "clients": 1}
                    ),
                }
            )
            data = replace(
                self._data,
                train_inputs=self._pool.inputs,
                train_labels=self._pool.labels,
                client_rows=tuple(rows),
                wrong_labels=None,
            )
            # All rounds of all federations would not fit into memory.
            self._left.append(observed(settings, data).last())
        return self._left


def _same_clients(settings: Settings) -> Adversary:
    """Return the run's adversary with the clients that it controls there, whatever the seed."""
    adversary = settings.adversary
    if not isinstance(adversary, Controlling):
        return adversary
    clients = tuple(sorted(settings.stages.controlled))
    named: Adversary = adversary.model_copy(update={"fraction": None, "clients": clients})
    return named


def shadow_seed(settings: Settings, shadow: int) -> int:
    """Return a seed that no client of the run has."""
    rng = generator_for(settings.seed, Purpose.ATTACK, 1, shadow)
    return int(rng.integers(2**32 - 1))


def target_of(
    candidates: Candidates, pool: Pool, shadows: int, model: ModelSettings, seed: int
) -> Target:
    """Return a client as it is attacked, with what each of its shadows learns from."""
    rng = generator_for(seed, Purpose.ATTACK, 2, candidates.client)
    return Target(candidates, candidates.halves(pool.labels, shadows, rng), model)


def learnt_by_anybody(targets: Sequence[Target], rows: np.ndarray) -> np.ndarray:
    """Return which rows each shadow federation learnt from, bool ``[shadows, rows]``."""
    shadows = len(targets[0].inside)
    inside = np.zeros((shadows, len(rows)), dtype=bool)
    for shadow in range(shadows):
        learnt = np.concatenate([target.rows_of_shadow(shadow) for target in targets])
        inside[shadow] = np.isin(rows, learnt)
    return inside
