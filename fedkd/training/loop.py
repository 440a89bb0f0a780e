"""The loop backend: a cohort's members train one after the other. The reference for any other."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedkd.models.dropout import step_keys
from fedkd.objectives import tapped
from fedkd.objectives.view import NO_FEATURES
from fedkd.randomness import seeded_for
from fedkd.targets import Targets
from fedkd.tensors import as_tensor
from fedkd.training.batches import Passes
from fedkd.training.cohort import (
    PARTS,
    Architecture,
    Cohort,
    Member,
    PublicLesson,
    Streams,
    TrainingData,
    named_models,
    predicting,
    public_inputs,
)
from fedkd.training.feeds import Feed, FitKey, FitKeys
from fedkd.training.learners import ComposedObjective
from fedkd.training.objectives import (
    Batch,
    JointObjective,
    Losses,
    Objective,
    Outputs,
    total,
)
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.pool import (
    PREDICT_ROWS,
    ModelPool,
    Slot,
    parts_of,
    states_of,
    with_parts,
)
from fedkd.training.state import Arrays, ClientState, ModelState

StepLosses = Callable[[Mapping[str, Outputs], Batch], Losses]
"""One step's named losses from the outputs of every model that trains, by name."""

NOT_TAPPED: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({})


class LoopCohort(Cohort):
    """Members train one after the other; each has models of its own while the call lasts."""

    def __init__(
        self,
        members: Sequence[Member],
        *,
        model: Architecture,
        optimizer: OptimizerSettings,
        data: TrainingData,
        pool: ModelPool,
        streams: Streams,
    ) -> None:
        self.clients = tuple(member.client for member in members)
        self._members = tuple(members)
        self._optimizer_settings = optimizer
        self._data = data
        self._streams = streams
        self._fit_keys = FitKeys(streams)
        self._terms: list[dict[str, list[Tensor]]] = [{} for _ in members]
        self._pool = pool
        self._models = named_models(model)
        self._first = next(iter(self._models))
        self._has_own_code = any(settings.is_own for settings in self._models.values())
        self._slots = {
            name: pool.slots(name, settings, len(members))
            for name, settings in self._models.items()
        }
        self._parts: list[ModelState | None] = []
        for position, state in enumerate(states_of(members, model, pool, streams.seed)):
            for name, slots in self._slots.items():
                slots[position].load(state.models[name])
            self._parts.append(state.models.get(PARTS))

    def fit(  # noqa: D102
        self,
        objective: Objective | JointObjective | ComposedObjective,
        *,
        private: Passes | None = None,
        public: PublicLesson | None = None,
        models: Sequence[str] | None = None,
    ) -> None:
        key = self._fit_keys.next(private=private is not None)
        if not isinstance(objective, ComposedObjective):
            names = tuple(models) if models is not None else (self._first,)
            for position in range(len(self._members)):
                self._fit_member(key, position, names, _on_outputs(objective), private, public)
            return
        if objective.idle:
            return
        names = tuple(objective.learners)
        bound = self._pool.bound(objective, self._models)
        parts = self._pool.parts_slot(objective, self._models)
        losses_of = partial(bound.losses, objective)
        for position, member in enumerate(self._members):
            if parts is not None:
                kept = self._parts[position]
                parts.load(parts_of(bound, kept, self._streams.seed, member.client))
            with ExitStack() as taps:
                features = {
                    name: taps.enter_context(tapped(self._slots[name][position].module, layers))
                    for name, layers in bound.layers.items()
                    if layers
                }
                self._fit_member(key, position, names, losses_of, private, public, features, parts)
            if parts is not None:
                self._parts[position] = with_parts(self._parts[position], parts.state())

    def _fit_member(
        self,
        key: FitKey,
        position: int,
        names: Sequence[str],
        losses_of: StepLosses,
        private: Passes | None,
        public: PublicLesson | None,
        features: Mapping[str, Mapping[str, Tensor]] = NOT_TAPPED,
        parts: Slot | None = None,
    ) -> None:
        """Train one member's models, and the parts in a slot."""
        seed, feed = Feed.drawn(self._members[position], self._streams, key, private, public)
        slots = {name: self._slots[name][position] for name in names}
        steps = _Steps(self._data, feed, public, position)
        # Functions such as F.dropout draw from torch's global generator, a model of one's own
        # from wherever it likes.
        with seeded_for(own_code=self._has_own_code, seed=seed):
            self._take_steps(slots, steps, losses_of, seed, self._terms[position], features, parts)

    def _take_steps(
        self,
        slots: Mapping[str, Slot],
        steps: "_Steps",
        losses_of: StepLosses,
        seed: int,
        terms: dict[str, list[Tensor]],
        features: Mapping[str, Mapping[str, Tensor]],
        parts: Slot | None,
    ) -> None:
        learning = [*slots.values(), *([] if parts is None else [parts])]
        device = self._data.train_inputs.device
        has_dropout = any(slot.dropout for slot in slots.values())
        keys = as_tensor(step_keys(seed, steps.count)).to(device) if has_dropout else None
        schedule = None if self._optimizer_settings.constant else self._streams.progress
        for slot in learning:
            # Every fit, because an evaluation in between leaves the model in evaluation mode.
            slot.module.train()
            slot.set_learning_rate(self._optimizer_settings.learning_rate(0.0))
        for step in range(steps.count):
            inputs, num_private, batch = steps.take(step)
            if schedule is not None:
                rate = self._optimizer_settings.learning_rate(schedule(step, steps.count))
                for slot in learning:
                    slot.set_learning_rate(rate)
            outputs = {}
            for number, (name, slot) in enumerate(slots.items()):
                if slot.dropout is not None and keys is not None:
                    slot.dropout.begin(keys[step], model=number)
                seen = features.get(name, NO_FEATURES)
                if steps.apart:
                    outputs[name] = Outputs.of_passes(
                        (slot.module(inputs[:num_private]), dict(seen)),
                        (slot.module(inputs[num_private:]), dict(seen)),
                    )
                else:
                    outputs[name] = Outputs.split(slot.module(inputs), num_private, seen)
            losses = losses_of(outputs, batch)
            for slot in learning:
                slot.optimizer.zero_grad()
            total(losses).backward()
            for slot in learning:
                slot.optimizer.step()
            for name, loss in losses.items():
                # Kept as they are: to read or add up numbers here would hold up every step.
                terms.setdefault(name, []).append(loss.detach())
        for slot in learning:
            slot.keep_buffers()
            if slot.dropout is not None:
                slot.dropout.end()

    def predict(  # noqa: D102
        self,
        inputs: Float[Tensor, "rows channels height width"],
        *,
        model: str | None = None,
    ) -> Float[np.ndarray, "members rows classes"]:
        slots = self._slots[model or self._first]
        out = np.empty((len(slots), len(inputs), self._data.num_classes), np.float32)
        for position, slot in enumerate(slots):
            slot.module.eval()
            with predicting(
                self._streams, self._members[position], own_code=slot.outside is not None
            ):
                for start in range(0, len(inputs), PREDICT_ROWS):
                    chunk = inputs[start : start + PREDICT_ROWS]
                    out[position, start : start + PREDICT_ROWS] = slot.module(chunk).cpu().numpy()
                slot.keep_buffers()
        return out

    def predict_public(  # noqa: D102
        self, rows: np.ndarray, *, model: str | None = None
    ) -> Float[np.ndarray, "members rows classes"]:
        return self.predict(public_inputs(self._data, rows), model=model)

    def weights(self, *, model: str | None = None) -> list[Arrays]:  # noqa: D102
        return [slot.weights() for slot in self._slots[model or self._first]]

    def load_weights(  # noqa: D102
        self, weights: Mapping[str, np.ndarray], *, model: str | None = None
    ) -> None:
        for slot in self._slots[model or self._first]:
            slot.load_weights(weights)

    def reset_optimizers(self, *, model: str | None = None) -> None:  # noqa: D102
        for name, slots in self._slots.items():
            if model in (None, name):
                for slot in slots:
                    slot.optimizer.state.clear()
        if model is None:
            self._parts = [None if own is None else ModelState(own.weights) for own in self._parts]

    def states(self) -> list[ClientState]:  # noqa: D102
        states = []
        for position, parts in enumerate(self._parts):
            own = {name: slots[position].state() for name, slots in self._slots.items()}
            states.append(ClientState(own if parts is None else {**own, PARTS: parts}))
        return states

    def metrics(self) -> list[dict[str, float]]:  # noqa: D102
        return [
            {f"loss/{name}": float(torch.stack(losses).mean()) for name, losses in terms.items()}
            for terms in self._terms
        ]


def _on_outputs(objective: Objective | JointObjective) -> StepLosses:
    """Hand an objective what it expects: one model's outputs, or those of several by name."""
    of_step: Any = objective

    def losses(outputs: Mapping[str, Outputs], batch: Batch) -> Losses:
        seen = outputs if len(outputs) > 1 else next(iter(outputs.values()))
        named: Losses = of_step(seen, batch)
        return named

    return losses


class _Steps:
    """A member's batches as tensors, one step at a time.

    Attributes:
        count: how many there are.
        apart: whether private and public rows go through the model one after the other.
    """

    def __init__(
        self, data: TrainingData, feed: Feed, public: PublicLesson | None, position: int
    ) -> None:
        self.count = feed.steps
        self.apart = public is not None and public.apart and feed.private is not None
        self._data = data
        self._private: Sequence[Tensor] | None = None
        self._public: Sequence[tuple[Tensor, Tensor]] | None = None
        self._targets: Targets | None = None
        device = data.train_inputs.device
        if feed.private is not None:
            self._private = _on_device(feed.private, device)
        if public is not None and feed.public is not None:
            rows = [public.rows[batch] for batch in feed.public]
            self._public = list(
                zip(_on_device(rows, device), _on_device(feed.public, device), strict=True)
            )
            if public.targets is not None:
                values = public.targets.tensor
                own = values[position] if values.ndim == 3 else values
                self._targets = public.targets.of(own.to(device))

    def take(self, step: int) -> tuple[Tensor, int, Batch]:
        """Return a step's inputs, how many of them are private, and the batch."""
        inputs: list[Tensor] = []
        num_private = 0
        labels = targets = public_labels = private_rows = public_rows = None
        if self._private is not None:
            private_rows = self._private[step]
            inputs.append(self._data.train_inputs.index_select(0, private_rows))
            labels = self._data.train_labels.index_select(0, private_rows)
            num_private = len(private_rows)
        if self._public is not None:
            public_rows, positions = self._public[step]
            inputs.append(self._data.public_inputs.index_select(0, public_rows))
            if self._targets is not None:
                targets = self._targets.of(self._targets.tensor.index_select(0, positions))
            if self._data.public_labels is not None:
                public_labels = self._data.public_labels.index_select(0, public_rows)
        batch = Batch(
            labels=labels,
            targets=targets,
            public_labels=public_labels,
            private_rows=private_rows,
            public_rows=public_rows,
        )
        return torch.cat(inputs) if len(inputs) > 1 else inputs[0], num_private, batch


def _on_device(batches: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, ...]:
    """Return each batch as a tensor; all of them go to the device in one piece."""
    if not batches:
        return ()
    together = as_tensor(np.concatenate(batches)).to(device)
    parts: tuple[Tensor, ...] = together.split([len(batch) for batch in batches])
    return parts
