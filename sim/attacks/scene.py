"""The scene of an attack: a run, who is attacked, and what is seen of them from three places."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from fedkd.data import FederatedData
from fedkd.exchange.payload import Payload
from fedkd.models import ModelSettings
from fedkd.training import Arrays
from fedkd.training.cohort import named_models
from sim.attacks.bench import Bench, SoftLabels
from sim.attacks.candidates import Pool, candidates_of
from sim.attacks.evidence import Evidence, Tell
from sim.attacks.membership import Seen
from sim.attacks.readings import Reading, SentModel, UnreadableError, reading_of
from sim.attacks.settings import AttackSettings
from sim.attacks.shadows import (
    Made,
    ShadowFederations,
    ShadowModels,
    Shadows,
    Target,
    learnt_by_anybody,
    shadow_seed,
    target_of,
)
from sim.engine.runtime import build_strategy, federation_of
from sim.settings import Settings, SettingsError
from strategies.contract import Strategy

Place = Literal["model", "upload", "consensus"]
PLACES: tuple[Place, ...] = get_args(Place)
"""``model``: the client's own, as it is after the run; ``upload``: what it sent last, which a
curious server sees; ``consensus``: what another client received last."""

Keep = Callable[[str, Callable[[], Made]], Made]


@dataclass(frozen=True)
class Scene:
    """Everything that attacks on one run need; costly parts are made when they are first asked for.

    Attributes:
        settings: of the run.
        wanted: what is to be attacked, and how.
        data: of the run.
        evidence: what it left.
        tell: is told of progress.
        keep: returns what was made under a name before, or makes it.
    """

    settings: Settings
    wanted: AttackSettings
    data: FederatedData
    evidence: Evidence
    tell: Tell
    keep: Keep

    @cached_property
    def pool(self) -> Pool:
        """All rows that can be candidates."""
        return Pool.of(self.data)

    @cached_property
    def bench(self) -> Bench:
        """The attacker's models."""
        return Bench(self.data, self.settings.clients.optimizer, self.seed)

    @property
    def seed(self) -> int:
        """What an attacker draws from."""
        return shadow_seed(self.settings, 0)

    @cached_property
    def _strategy(self) -> Strategy[Any, Any]:
        return build_strategy(self.settings, federation_of(self.settings, self.data))

    @cached_property
    def models(self) -> tuple[ModelSettings, ...]:
        """Every architecture that a client may send weights of."""
        strategy = self._strategy
        found: dict[str, ModelSettings] = {}
        for client in strategy.federation.first_clients.values():
            for model in named_models(strategy.architecture(client)).values():
                found.setdefault(model.key, model)
        return tuple(found.values())

    def model_of(self, client: int) -> ModelSettings:
        """Return the architecture of a client's judged model."""
        return next(iter(named_models(self._strategy.architecture(client)).values()))

    @cached_property
    def clients(self) -> tuple[int, ...]:
        """Who is attacked: the honest clients that trained, or those that were asked for.

        Raises:
            SettingsError: there is no such client, or nobody honest has trained.
        """
        count = self.settings.clients.count
        liars = self.settings.stages.controlled
        trained = [c for c in range(count) if c in self.evidence.models and c not in liars]
        if not trained:
            raise SettingsError(
                f"attacks.clients: none of {count} clients is honest and has trained, so there is "
                "nobody to attack; attack a run with more rounds or fewer liars"
            )
        asked = self.wanted.clients
        if isinstance(asked, tuple):
            strangers = [client for client in asked if client not in trained]
            if strangers:
                raise SettingsError(
                    f"attacks.clients must name clients from 0 to {count - 1} that have trained "
                    f"and are honest, got {strangers[0]}"
                )
            return asked
        return tuple(trained if asked is None else trained[:asked])

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """Them, with the rows whose membership is to be told.

        Raises:
            SettingsError: no client has a class in common with the test set.
        """
        found = [
            target_of(
                candidates,
                self.pool,
                self.wanted.shadows,
                self.model_of(candidates.client),
                self.settings.seed,
            )
            for candidates in candidates_of(self.data, self.clients, self.settings.seed)
        ]
        if not found:
            raise SettingsError(
                "attacks.clients: none of them has a class in common with the test set, so nothing "
                "can be told of their rows"
            )
        return tuple(found)

    @cached_property
    def shadows(self) -> Shadows:
        """Their shadows."""
        common = self.settings, self.data, self.pool, self.targets, self.bench, self.tell
        if self.wanted.train == "federations":
            return ShadowFederations(*common, models=self.models)
        return ShadowModels(*common, evidence=self.evidence, keep=self.keep)

    def reading(self, payload: Payload | None) -> Reading:
        """Return what can be read from a payload.

        Raises:
            UnreadableError: nothing can.
        """
        return reading_of(payload, self.models, self.bench)

    # -- places ------------------------------------------------------------------------------

    def seen_from(self, place: Place) -> list[Seen]:
        """Return what an attacker at a place can judge each target's candidates by.

        Raises:
            UnreadableError: nothing travelled there that can be read.
        """
        match place:
            case "model":
                return [self._seen_model(target) for target in self.targets]
            case "upload":
                return [self._seen_upload(target) for target in self.targets]
            case "consensus":
                return self._seen_consensus()

    def _seen_model(self, target: Target) -> Seen:
        own = self.evidence.models[target.client]
        shadows = self.shadows.models(target, target.model)
        weights = [own, *(each for each in shadows if each is not None)]
        return self._seen(target, target.model, weights, target.inside[_there(shadows)])

    def _seen_upload(self, target: Target) -> Seen:
        reading = self.reading(self.evidence.last_sent(target.client))
        shadows = self.shadows.sent(target, reading)
        readings = [reading, *(each for each in shadows if each is not None)]
        self.tell(f"upload of client {target.client}: {len(readings)} readings")
        model, weights = self._as_models(target.model, readings)
        return self._seen(target, model, weights, target.inside[_there(shadows)])

    def _seen_consensus(self) -> list[Seen]:
        found: dict[int, tuple[ModelSettings, list[Arrays]]] = {}
        there: dict[int, np.ndarray] = {}
        seen = []
        for target in self.targets:
            receiver = self._receiver(target.client)
            if receiver not in found:
                reading = self.reading(self.evidence.last_received(receiver))
                shadows = self.shadows.received(receiver, reading)
                there[receiver] = _there(shadows)
                readings = [reading, *(each for each in shadows if each is not None)]
                self.tell(f"consensus that client {receiver} received: {len(readings)} readings")
                found[receiver] = self._as_models(self.model_of(receiver), readings)
            inside = learnt_by_anybody(self.targets, target.candidates.rows)
            seen.append(self._seen(target, *found[receiver], inside[there[receiver]]))
        return seen

    def _receiver(self, client: int) -> int:
        """Return the first other client of those that received anything last."""
        for exchanged in reversed(self.evidence.rounds):
            for other in sorted(exchanged.down):
                if other != client and exchanged.received(other) is not None:
                    return other
        raise UnreadableError("no client received anything")

    def _as_models(
        self, student: ModelSettings, readings: Sequence[Reading]
    ) -> tuple[ModelSettings, list[Arrays]]:
        """Return models: those that were read, or students of the labels that were."""
        first = readings[0]
        if isinstance(first, SentModel):
            same = [own for own in readings if isinstance(own, SentModel)]
            return first.model, [own.weights for own in same]
        labels = [own for own in readings if isinstance(own, SoftLabels)]
        return student, self.bench.taught(student, labels, self.wanted.student_epochs)

    def _seen(
        self,
        target: Target,
        model: ModelSettings,
        weights: Sequence[Mapping[str, np.ndarray]],
        inside: np.ndarray,
    ) -> Seen:
        rows = target.candidates.rows
        inputs = np.concatenate([self.pool.inputs[rows], self.data.validation_inputs])
        logits = self.bench.predict(model, weights, inputs)
        known, unknown = logits[:, : len(rows)], logits[:, len(rows) :]
        return Seen(
            known[0],
            known[1:],
            self.pool.labels[rows],
            target.candidates.members,
            inside,
            unknown[0],
            unknown[1:],
            self.data.validation_labels,
        )


def _there(shadows: Sequence[object | None]) -> np.ndarray:
    """Return which shadows had their turn: others would have learnt, and tell nothing."""
    return np.array([own is not None for own in shadows], dtype=bool)
