"""What every backend does alike: what a fit was asked for, what members keep, what never trains."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedkd.models import ModelSettings
from fedkd.objectives import tapped
from fedkd.objectives.taps import Features
from fedkd.objectives.view import NO_FEATURES
from fedkd.randomness import Purpose, torch_seed_for
from fedkd.tensors import as_tensor
from fedkd.training.batches import Passes
from fedkd.training.cohort import (
    Architecture,
    Average,
    Cohort,
    Examples,
    Layers,
    Member,
    Mode,
    PublicLesson,
    RowChoice,
    RowOutputs,
    Streams,
    TrainingData,
    WeightsForMembers,
    named_models,
    public_inputs,
)
from fedkd.training.feeds import Feed, FitKey, FitKeys
from fedkd.training.frozen import FrozenModel, KeptArrays, frozen_model
from fedkd.training.gradients import Clipped, GradientRule, Noised, Rules, rules_of
from fedkd.training.learners import ComposedObjective
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.parts import NewParts
from fedkd.training.pool import PREDICT_ROWS, ModelPool
from fedkd.training.private import PrivateCall, PrivateLearning, check_fit, check_rows_chosen
from fedkd.training.state import Arrays, ClientState, copy_to_numpy
from fedkd.training.tables import Table
from fedkd.training.work import Network, Work

Paths = Mapping[str, str]
"""Layers of one model: their module paths by the names they were asked for."""

NO_PATHS: Paths = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a fit was asked for, with every name resolved.

    Attributes:
        key: tells its streams from those of other fits.
        learning: models that learn, by name.
        frozen: models that do not, and whose outputs the objective sees: their name, and the
            model whose architecture they have.
        averages: running averages that follow the fit; all name their model.
        paths: layers to tap, by model, frozen ones included.
        rules: the gradient rule of each model that learns.
        heads: module paths of the heads that the objective may run, by model.
    """

    key: FitKey
    learning: tuple[str, ...]
    private: Passes | Sequence[Passes] | None
    public: PublicLesson | None
    frozen: Mapping[str, str]
    averages: Mapping[str, Average]
    paths: Mapping[str, Paths]
    tables: Mapping[str, Table]
    optimizer: OptimizerSettings | None
    rules: Mapping[str, GradientRule]
    heads: Mapping[str, str]
    keep_outputs: bool

    @property
    def private_models(self) -> tuple[str, ...]:
        """The models that learn by DP-SGD."""
        return tuple(name for name, rule in self.rules.items() if isinstance(rule, Noised))

    def with_layers(self, layers: Mapping[str, Sequence[str]]) -> "Fit":
        """Return the same with more layers to tap, given by their module paths."""
        if not any(layers.values()):
            return self
        paths = dict(self.paths)
        for name, own in layers.items():
            if own:
                paths[name] = {**paths.get(name, {}), **{path: path for path in own}}
        return replace(self, paths=paths)

    def passes(self, position: int) -> Passes | None:
        """Return how one member walks through its own rows."""
        if self.private is None or isinstance(self.private, Passes):
            return self.private
        return self.private[position]

    def lesson(self, position: int) -> PublicLesson | None:
        """Return one member's public lesson."""
        return None if self.public is None else self.public.own(position)


class BackendCohort(Cohort):
    """What both backends hold of their members, in the order in which they were given."""

    def __init__(
        self,
        members: Sequence[Member],
        states: Sequence[ClientState],
        *,
        model: Architecture,
        optimizer: OptimizerSettings,
        data: TrainingData,
        pool: ModelPool,
        streams: Streams,
        private: PrivateLearning | None,
    ) -> None:
        self.clients = tuple(member.client for member in members)
        self._given = tuple(members)
        self._optimizer_settings = optimizer
        self._data = data
        self._device = data.train_inputs.device
        self._streams = streams
        self._fit_keys = FitKeys(streams)
        self._private = None if private is None else PrivateCall(private, members, streams)
        self._pool = pool
        self._models = named_models(model)
        self._first = next(iter(self._models))
        self._has_own_code = any(settings.is_own for settings in self._models.values())
        self._kept = KeptArrays(states)
        self._frozen: dict[str, FrozenModel] = {}
        self._trainings_seen = 0
        self.work = [Work() for _ in members]

    @property
    def private_rows(self) -> list[np.ndarray]:  # noqa: D102
        return [member.rows for member in self._given]

    def freeze(  # noqa: D102
        self, name: str, weights: WeightsForMembers, *, like: str | None = None
    ) -> None:
        like = like or self._first
        self._frozen[name] = frozen_model(
            name,
            weights,
            like,
            models=list(self._models),
            shapes=self._pool.frozen_skeleton(self._settings_of(like)).shapes,
            members=len(self.clients),
        )

    def keep(self, name: str, values: Sequence[np.ndarray | None]) -> None:  # noqa: D102
        self._kept.keep(name, values)

    def kept(self, name: str) -> list[np.ndarray | None]:  # noqa: D102
        return self._kept.kept(name)

    def layer_shape(  # noqa: D102
        self, layer: str, *, model: str | None = None
    ) -> tuple[int, ...]:
        settings = self._settings_of(model or self._first)
        path = self._pool.layer_paths(settings, [layer])[layer]
        return self._pool.layer_shapes(settings)[path]

    def _row_outputs(
        self,
        rows: np.ndarray,
        labels: Tensor | None,
        parts: Sequence[tuple[Tensor, Mapping[str, Tensor]]],
        settings: ModelSettings,
        paths: Paths,
    ) -> RowOutputs:
        """Put together what a model put out for rows, part by part."""
        none = (0, self._data.num_classes)
        logits = copy_to_numpy(torch.cat([each for each, _ in parts])) if parts else np.zeros(none)
        if parts:
            features = {
                name: copy_to_numpy(torch.cat([features[name] for _, features in parts]))
                for name in parts[0][1]
            }
        else:
            shapes = self._pool.layer_shapes(settings) if paths else {}
            features = {
                name: np.zeros((0, *shapes[path]), np.float32) for name, path in paths.items()
            }
        return RowOutputs(
            rows=rows,
            labels=None if labels is None else copy_to_numpy(labels),
            logits=logits.astype(np.float32, copy=False),
            features=features,
        )

    def _kept_rows(
        self,
        fit: Fit,
        rows: np.ndarray,
        parts: Sequence[tuple[Tensor, Mapping[str, Tensor]]],
    ) -> RowOutputs:
        """Put together what the first model of a fit put out for private rows."""
        labels = self._data.train_labels[as_tensor(rows).to(self._device)]
        first = fit.learning[0]
        paths = fit.paths.get(first, NO_PATHS)
        return self._row_outputs(rows, labels, parts, self._models[first], paths)

    # -- work ------------------------------------------------------------------------------

    def _network(self, model: str) -> Network:
        return Network(self._models[model], self._data.input_shape)

    def _count_fit(self, position: int, fit: Fit, feed: Feed) -> None:
        """Note that a member takes these steps."""
        rows = sum(len(batch) for batch in feed.public or [])
        if fit.private_models:
            # Expected rows, not those that were drawn: how long a client takes is seen by others.
            own = fit.passes(position)
            assert own is not None and feed.private is not None  # noqa: S101, PT018
            rows += len(feed.private) * min(own.batch_size, len(self._given[position].rows))
        else:
            rows += sum(len(batch) for batch in feed.private or [])
        work = self.work[position]
        work.steps += feed.steps * len(fit.learning)
        for name in fit.learning:
            work.trained[self._network(name)] += rows
        for like in fit.frozen.values():
            work.predicted[self._network(like)] += rows

    def _count_predicted(self, position: int, like: str, rows: int) -> None:
        """Note that so many rows went through a member's model, or one built like it."""
        self.work[position].predicted[self._network(like)] += rows

    # -- names -----------------------------------------------------------------------------

    def _settings_of(self, model: str) -> ModelSettings:
        if model not in self._models:
            raise ValueError(f"unknown model {model!r}; known: {', '.join(self._models)}")
        return self._models[model]

    def _like(self, name: str, averages: Mapping[str, Average]) -> str:
        """Return the model whose architecture a model has that does not train.

        Raises:
            ValueError: if nobody has such a model.
        """
        if name in self._frozen:
            return self._frozen[name].like
        if name in averages:
            return averages[name].model or self._first
        model = self._kept.averaged_model(name)
        if model is None:
            known = [*self._frozen, *averages]
            raise ValueError(
                f"no frozen model {name!r}; `freeze` brings one in, `averages` keeps one; known "
                f"here: {', '.join(known) or 'none'}"
            )
        return model

    def _learning(self, objective: object, models: Sequence[str] | None) -> Sequence[str]:
        """Return the models that learn; a composed objective says itself which."""
        if isinstance(objective, ComposedObjective):
            return tuple(objective.learners)
        return tuple(models or (self._first,))

    def _teachers(self, objective: object) -> Sequence[str]:
        """Return the models that a composed objective cannot do without."""
        return objective.models if isinstance(objective, ComposedObjective) else ()

    def _models_of(self, fit: Fit) -> dict[str, ModelSettings]:
        """Return the architectures of all models by name, those that never train included."""
        return self._models | {name: self._models[like] for name, like in fit.frozen.items()}

    def _resolved(
        self,
        objective: object,
        models: Sequence[str] | None,
        *,
        private: Passes | Sequence[Passes] | None,
        public: PublicLesson | None,
        frozen: Sequence[str],
        layers: Layers,
        tables: Mapping[str, Table] | None,
        optimizer: OptimizerSettings | None,
        gradient: Rules,
        averages: Mapping[str, Average] | None,
        parts: NewParts | None,
        heads: bool,
        keep_outputs: bool,
    ) -> Fit:
        """Look at everything that `fit` was given, before the first step.

        Raises:
            ValueError: naming what does not fit.
        """
        composed = isinstance(objective, ComposedObjective)
        learning, teachers = self._learning(objective, models), self._teachers(objective)
        for name in learning:
            self._settings_of(name)
        if parts and composed:
            raise ValueError(
                f"parts are of a bare objective, and terms bring their own: got {', '.join(parts)}"
            )
        absent = [name for name in teachers if name not in (*learning, *frozen)]
        if absent:
            raise ValueError(
                f"{absent[0]!r} teaches in this fit and is not in it: it must learn as well, or "
                f"be named in frozen; there are {', '.join([*learning, *frozen])}"
            )
        followed = {}
        for name, average in (averages or {}).items():
            model = average.model or self._first
            if model not in learning:
                raise ValueError(
                    f"running average {name!r} follows {model!r}, which does not learn in this "
                    f"fit; these do: {', '.join(learning)}"
                )
            if name in self._models or name in self._frozen or not name or "/" in name:
                raise ValueError(
                    f"a running average needs a name without '/' that no other model has, got "
                    f"{name!r}"
                )
            followed[name] = replace(average, model=model)
        like = {name: self._like(name, followed) for name in frozen}
        architectures = {name: name for name in learning} | like
        if not isinstance(layers, Mapping):
            layers = dict.fromkeys(architectures, layers)
        odd = sorted(layers.keys() - architectures.keys())
        if odd:
            raise ValueError(
                f"layers of {odd[0]!r}, which is not in this fit; there are "
                f"{', '.join(architectures)}"
            )
        members = self._given
        if not (private is None or isinstance(private, Passes) or len(private) == len(members)):
            raise ValueError(
                f"private must be passes for all or one for each of {len(members)} members, got "
                f"{len(private)}"
            )
        if public is not None:
            public.check(len(members))
        for name, table in (tables or {}).items():
            table.check(
                name,
                members=len(members),
                private=None if private is None else [len(member.rows) for member in members],
                public=None
                if public is None
                else [len(public.rows_of(position)) for position in range(len(members))],
            )
        rules = rules_of(gradient, learning)
        key: FitKey | None = None
        # An objective without a term in force takes no step.
        idle = isinstance(objective, ComposedObjective) and objective.idle
        if self._private is not None and private is not None and not idle:
            has_parts = bool(parts)
            if isinstance(objective, ComposedObjective):
                bound = self._pool.bound(
                    objective,
                    self._models | {name: self._models[own] for name, own in like.items()},
                )
                has_parts = bool(len(bound.parts))
            check_fit(learning, tables or {}, has_parts=has_parts, keep_outputs=keep_outputs)
            (name,) = learning
            method = "vmap" if heads else self._pool.private_method(name, self._models[name])
            private = self._private.passes(private)
            key = self._fit_keys.next(private=True, attempt=self._private.attempt)
            rules = {name: self._private.rule(rules[name], key, method)}
        for rule in rules.values():
            if isinstance(rule, Clipped):
                rule.check(len(members))
        measured = [
            name
            for name, rule in rules.items()
            if heads and isinstance(rule, Clipped) and rule.method == "norms"
        ]
        if measured:
            raise ValueError(
                f"gradient Clipped cannot measure model {measured[0]!r} in a fit with heads, which "
                "run a layer more than once in a step: method='vmap' works for it"
            )
        if keep_outputs and private is None:
            raise ValueError("keep_outputs keeps outputs for private rows, and the fit has none")
        return Fit(
            key=key or self._fit_keys.next(private=private is not None),
            learning=tuple(learning),
            private=private,
            public=public,
            frozen=like,
            averages=followed,
            paths={
                name: self._pool.layer_paths(self._models[architectures[name]], own)
                for name, own in layers.items()
                if own
            },
            tables=tables or {},
            optimizer=optimizer,
            rules=rules,
            heads={name: self._pool.head(self._models[name]) for name in learning if heads},
            keep_outputs=keep_outputs,
        )

    def _nothing_kept(self, fit: Fit) -> list[RowOutputs]:
        """Return what a fit without a step put out."""
        members = range(len(self.clients) if fit.keep_outputs else 0)
        return [self._kept_rows(fit, np.zeros(0, np.int64), []) for _ in members]

    def _weights_at_rest(self, name: str) -> list[Arrays]:
        """Return copies of each member's weights of a model that never trains."""
        weights = [
            self._frozen_weights(name, self._like(name, {}), position)
            for position in range(len(self.clients))
        ]
        return [{key: array.copy() for key, array in own.items()} for own in weights]

    def _frozen_weights(self, name: str, like: str, position: int) -> Mapping[str, np.ndarray]:
        if name in self._frozen:
            return self._frozen[name].own(position)
        known = self._kept.average(name, like, position)
        assert known is not None  # noqa: S101 (its name was looked up)
        return known[0]

    # -- rows as they are, or to put through a model ---------------------------------------

    def examples(  # noqa: D102
        self, *, on: Literal["private"] | np.ndarray | Sequence[np.ndarray]
    ) -> list[Examples]:
        found = []
        for position in range(len(self.clients)):
            rows, inputs, labels = self._asked(on, position)
            known = None if labels is None else copy_to_numpy(labels)
            own = copy_to_numpy(inputs)
            found.append(Examples(rows=rows, inputs=own, labels=known))
        return found

    def _asked(
        self, on: RowChoice, position: int
    ) -> tuple[np.ndarray, Float[Tensor, "rows *shape"], Tensor | None]:
        """Return one member's row ids, inputs and labels.

        Raises:
            ValueError: for something else than rows.
        """
        data = self._data
        if self._private is not None:
            check_rows_chosen(on)
        if isinstance(on, Tensor):
            return np.arange(len(on)), on, None
        if isinstance(on, str):
            if on != "private":
                raise ValueError(
                    f"outputs are on 'private', positions in the public set or inputs, got {on!r}"
                )
            rows = self._given[position].rows
            places = as_tensor(rows).to(self._device)
            return rows, data.train_inputs[places], data.train_labels[places]
        if not isinstance(on, np.ndarray) and len(on) != len(self.clients):
            raise ValueError(
                f"public rows must be one array or one for each of {len(self.clients)} members, "
                f"got {len(on)}"
            )
        rows = np.asarray(on if isinstance(on, np.ndarray) else on[position])
        if rows.dtype.kind not in "iu" or rows.ndim != 1:
            raise ValueError(
                "positions in the public set must be a list of whole numbers, got "
                f"{rows.dtype} {rows.shape}"
            )
        labels = data.public_labels
        if labels is not None:
            labels = labels[as_tensor(rows).to(self._device)]
        return rows, public_inputs(data, rows), labels

    def _next_training_mode(self, mode: Mode) -> int:
        """Count the calls that drop units, and refuse modes that there are not."""
        if mode not in ("eval", "train"):
            raise ValueError(f"mode must be eval or train, got {mode!r}")
        self._trainings_seen += mode == "train"
        return self._trainings_seen

    def _mode_seed(self, client: int, number: int) -> int:
        """Return what a member's dropout is seeded with in a call of `outputs`."""
        return torch_seed_for(
            self._streams.seed, Purpose.EVALUATION, self._streams.round, client, number
        )


def blanked(values: Tensor, counted: Float[Tensor, "*members rows"] | None) -> Tensor:
    """Return the values with 0 in rows that do not count."""
    if counted is None:
        return values
    counts = counted.reshape(*counted.shape, *[1] * (values.ndim - counted.ndim)) > 0
    return torch.where(counts, values, torch.zeros((), dtype=values.dtype, device=values.device))


def chunks(rows: int, batch_rows: int | None, mode: Mode) -> list[slice]:
    """Cut rows into what goes through a model at once; a lone last row stays with those before."""
    if batch_rows is not None and batch_rows < 1:
        raise ValueError(f"batch_rows must be >= 1, got {batch_rows}")
    width = batch_rows or (PREDICT_ROWS if mode == "eval" else max(rows, 1))
    starts = list(range(0, rows, width))
    if mode == "train" and width > 1 and len(starts) > 1 and rows - starts[-1] == 1:
        starts.pop()
    ends = [*starts[1:], rows] if starts else []
    return [slice(*cut) for cut in zip(starts, ends, strict=True)]


def named(seen: Mapping[str, Tensor], paths: Paths) -> Mapping[str, Tensor]:
    """Return what tapped layers have just put out, by the names they were asked for."""
    if not paths:
        return NO_FEATURES
    return {name: seen[path] for name, path in paths.items() if path in seen}


@contextmanager
def tapping(module: object, paths: Paths) -> Iterator[Features]:
    """Record what layers put out, by module path."""
    with tapped(module, list(dict.fromkeys(paths.values()))) as features:  # type: ignore[arg-type]
        yield features
