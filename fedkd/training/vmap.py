"""The vmap backend: a cohort's members train as one stacked model, in one stream of operations.

Equal to the loop backend up to rounding (about 1e-6 a step); the same cohort gives the same bits.
Members may have different numbers of rows: they stand in the order of their sizes, so that those
that still train come first, and batches are padded with rows that count for nothing.

What a model of one's own has to keep to: no control flow that depends on numbers, no mixing of
the rows of a batch except by torch's BatchNorm (padded rows would take part). Random functions
such as ``F.dropout`` draw for each member on its own, from one generator that the cohort's seeds
seed: repeatable, but not what the loop draws; ``nn.Dropout`` layers draw the same in both.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
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
from fedkd.training.objectives import Batch, JointObjective, Objective, Outputs, total
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.pool import PREDICT_ROWS, ModelPool, parts_of, states_of, with_parts
from fedkd.training.stacking import Skeleton, Stack, StackedOptimizer, VmapUnsupportedError
from fedkd.training.state import Arrays, ClientState, ModelState

FEW_ROWS = 64
"""Rows up to which stacked models predict faster on a CPU; beyond, each keeps it busy alone."""

TRY_LOOP = "engine.vectorize: loop trains one client at a time"

STACKED_PREDICT_ROWS = 8192
"""Rows times members that go through the stacked model at once, to bound its memory."""


class VmapCohort(Cohort):
    """Members train together, stacked along a first dimension.

    Raises:
        VmapUnsupportedError: if a model cannot be stacked.
    """

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
        # Members with fewer rows take fewer steps: whoever still trains is in front.
        self._order = sorted(range(len(members)), key=lambda at: -len(members[at].rows))
        self._places = np.argsort(self._order)
        self._members = [members[at] for at in self._order]
        self._optimizer_settings = optimizer
        self._data = data
        self._device = data.train_inputs.device
        self._streams = streams
        self._fit_keys = FitKeys(streams)
        self._terms: list[dict[str, list[Tensor]]] = [{} for _ in members]
        self._pool = pool
        self._models = named_models(model)
        self._first = next(iter(self._models))
        self._has_own_code = any(settings.is_own for settings in self._models.values())
        states = states_of(self._members, model, pool, streams.seed)
        self._parts: list[ModelState | None] = [state.models.get(PARTS) for state in states]
        self._stacks = {
            name: Stack.of(
                pool.skeleton(settings), [state.models[name] for state in states], self._device
            )
            for name, settings in self._models.items()
        }

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
            stacks = {name: self._stacks[name] for name in names}
            step = _Step(stacks, _on_outputs(objective))
            self._fit_stacks(step, self._steps(key, names, private, public))
            return
        if objective.idle:
            return
        names = tuple(objective.learners)
        bound = self._pool.bound(objective, self._models)
        if bound.stacking.obstacle:
            raise VmapUnsupportedError(f"{bound.stacking.obstacle}; {TRY_LOOP}")
        steps = self._steps(key, names, private, public)
        if steps.padded and bound.stacking.mixes_rows:
            raise VmapUnsupportedError(
                f"{bound.stacking.mixes_rows} compares the rows of a batch with each other and "
                f"cannot leave out those that pad the batches of clients with fewer; {TRY_LOOP}"
            )
        parts = self._stacked_parts(objective)
        with ExitStack() as taps:
            features = {
                name: taps.enter_context(tapped(self._stacks[name].skeleton.module, layers))
                for name, layers in bound.layers.items()
                if layers
            }
            stacks = {name: self._stacks[name] for name in names}
            losses_of = partial(bound.losses, objective)
            self._fit_stacks(_Step(stacks, losses_of, features, parts, bound.parts_with), steps)
        if parts is not None:
            self._parts = [
                with_parts(own, parts.state(place)) for place, own in enumerate(self._parts)
            ]

    def _stacked_parts(self, objective: ComposedObjective) -> Stack | None:
        skeleton = self._pool.parts_skeleton(objective, self._models)
        if skeleton is None:
            return None
        bound = self._pool.bound(objective, self._models)
        states = [
            parts_of(bound, own, self._streams.seed, member.client)
            for own, member in zip(self._parts, self._members, strict=True)
        ]
        return Stack.of(skeleton, states, self._device)

    def _steps(
        self,
        key: FitKey,
        names: Sequence[str],
        private: Passes | None,
        public: PublicLesson | None,
    ) -> "_StackedSteps":
        feeds, seeds = [], []
        for member in self._members:
            seed, feed = Feed.drawn(member, self._streams, key, private, public)
            seeds.append(seed)
            feeds.append(feed)
        has_dropout = any(self._stacks[name].skeleton.dropout for name in names)
        return _StackedSteps(self._data, feeds, public, self._order, seeds, has_dropout)

    def _fit_stacks(self, step: "_Step", steps: "_StackedSteps") -> None:
        optimizers = [
            StackedOptimizer(stack, self._optimizer_settings, steps.counts)
            for stack in step.learning
        ]
        for stack in step.learning:
            stack.skeleton.module.train()
        with seeded_for(own_code=self._has_own_code, seed=steps.seed):
            start = 0
            while start < steps.total:
                active = steps.active(start)
                stop = start + 1
                while stop < steps.total and steps.active(stop) == active:
                    stop += 1
                self._fit_together(step, optimizers, steps, active, range(start, stop))
                start = stop
        for optimizer in optimizers:
            optimizer.give_back()
        for stack in step.learning:
            if stack.skeleton.dropout is not None:
                stack.skeleton.dropout.end()

    def _fit_together(
        self,
        step: "_Step",
        optimizers: Sequence[StackedOptimizer],
        steps: "_StackedSteps",
        active: int,
        numbers: range,
    ) -> None:
        """Take steps that the same first ``active`` members take."""
        stacks = step.learning
        handed = [
            {name: tensor[:active].detach() for name, tensor in stack.tensors.items()}
            for stack in stacks
        ]
        leaves = [
            [tensors[name].requires_grad_() for name in stack.skeleton.trainable]
            for stack, tensors in zip(stacks, handed, strict=True)
        ]
        every_leaf = [leaf for own in leaves for leaf in own]
        step_losses = torch.vmap(partial(step.losses, steps), randomness="different")
        kept: dict[str, list[Tensor]] = {}
        for number in numbers:
            for optimizer in optimizers:
                optimizer.set_learning_rates(partial(self._streams.progress, number))
            losses: dict[str, Tensor] = step_losses(handed, steps.take(number, active))
            # A member's losses reach its own tensors only, so one backward pass serves all.
            gradients = iter(
                torch.autograd.grad(total(losses).sum(), every_leaf, allow_unused=True)
            )
            for stack, optimizer in zip(stacks, optimizers, strict=True):
                own = {name: next(gradients) for name in stack.skeleton.trainable}
                optimizer.step(own, active)
            for name, loss in losses.items():
                kept.setdefault(name, []).append(loss.detach())
        for name, values in kept.items():
            for position, of_member in enumerate(torch.stack(values, dim=1)):
                self._terms[position].setdefault(name, []).append(of_member)

    def predict(  # noqa: D102
        self,
        inputs: Float[Tensor, "rows channels height width"],
        *,
        model: str | None = None,
    ) -> Float[np.ndarray, "members rows classes"]:
        stack = self._stacks[model or self._first]
        stack.skeleton.module.eval()
        # Every row counts here, whatever the last step of a fit was padded with.
        stack.skeleton.counted.weights = None
        members = len(self._members)
        out = np.empty((members, len(inputs), self._data.num_classes), np.float32)
        own_code = self._models[model or self._first].is_own
        if self._device.type == "cpu" and len(inputs) > FEW_ROWS:
            for place, position in enumerate(self._order):
                own = {name: tensor[place] for name, tensor in stack.tensors.items()}
                with predicting(self._streams, self._members[place], own_code=own_code):
                    for start in range(0, len(inputs), PREDICT_ROWS):
                        logits = stack.skeleton.logits(own, inputs[start : start + PREDICT_ROWS])
                        out[position, start : start + PREDICT_ROWS] = logits.numpy()
            return out
        with predicting(self._streams, self._members[0], own_code=own_code):
            # The rows are the same for all members and are read once.
            logits_of = torch.vmap(stack.skeleton.logits, in_dims=(0, None))
            width = max(FEW_ROWS, STACKED_PREDICT_ROWS // members)
            for start in range(0, len(inputs), width):
                logits = logits_of(stack.tensors, inputs[start : start + width])
                out[self._order, start : start + width] = logits.cpu().numpy()
        return out

    def predict_public(  # noqa: D102
        self, rows: np.ndarray, *, model: str | None = None
    ) -> Float[np.ndarray, "members rows classes"]:
        return self.predict(public_inputs(self._data, rows), model=model)

    def weights(self, *, model: str | None = None) -> list[Arrays]:  # noqa: D102
        stack = self._stacks[model or self._first]
        return [stack.weights(int(place)) for place in self._places]

    def load_weights(  # noqa: D102
        self, weights: Mapping[str, np.ndarray], *, model: str | None = None
    ) -> None:
        self._stacks[model or self._first].load_weights(weights)

    def reset_optimizers(self, *, model: str | None = None) -> None:  # noqa: D102
        for name, stack in self._stacks.items():
            if model in (None, name):
                stack.forget()
        if model is None:
            self._parts = [None if own is None else ModelState(own.weights) for own in self._parts]

    def states(self) -> list[ClientState]:  # noqa: D102
        states = []
        for place in map(int, self._places):
            own = {name: stack.state(place) for name, stack in self._stacks.items()}
            parts = self._parts[place]
            states.append(ClientState(own if parts is None else {**own, PARTS: parts}))
        return states

    def metrics(self) -> list[dict[str, float]]:  # noqa: D102
        return [
            {
                f"loss/{name}": float(torch.cat(losses).mean())
                for name, losses in self._terms[place].items()
            }
            for place in self._places
        ]


class _Step:
    """What the stacks of a fit compute in each of its steps.

    Attributes:
        learning: every stack that learns: the models', then that of the parts.
    """

    def __init__(
        self,
        models: Mapping[str, Stack],
        losses_of: Callable[..., dict[str, Tensor]],
        features: Mapping[str, dict[str, Tensor]] | None = None,
        parts: Stack | None = None,
        parts_with: Callable[..., Any] | None = None,
    ) -> None:
        self._skeletons = {name: stack.skeleton for name, stack in models.items()}
        self._losses_of = losses_of
        self._features = features or {}
        self._parts = parts
        self._parts_with = parts_with
        self.learning = [*models.values(), *([] if parts is None else [parts])]

    def losses(
        self,
        steps: "_StackedSteps",
        handed: Sequence[dict[str, Tensor]],
        rows: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return one member's losses from its tensors and its rows; this is what vmap runs."""
        outputs = {}
        for number, ((name, skeleton), tensors) in enumerate(
            zip(self._skeletons.items(), handed, strict=False)
        ):
            if skeleton.dropout is not None:
                skeleton.dropout.begin(rows["key"], rows=rows.get("numbers"), model=number)
            # Copies: models of one architecture share a skeleton, and with it the taps.
            seen = self._features.get(name, NO_FEATURES)
            if steps.apart:
                passes = []
                for kind, inputs in (
                    ("private", rows["inputs"][: steps.num_private]),
                    ("public", rows["inputs"][steps.num_private :]),
                ):
                    skeleton.counted.weights = rows.get(f"{kind}_counted")
                    skeleton.counted.fewest = steps.fewest_of[kind]
                    if skeleton.dropout is not None:
                        # Each pass has its padding at its end, where it moves no row.
                        skeleton.dropout.rows = None
                    passes.append((skeleton.logits(tensors, inputs), dict(seen)))
                outputs[name] = Outputs.of_passes(*passes)
                continue
            _tell_what_counts(skeleton, steps, rows)
            logits = skeleton.logits(tensors, rows["inputs"])
            outputs[name] = Outputs.split(logits, steps.num_private, dict(seen))
        batch = Batch(
            labels=rows.get("labels"),
            targets=None if steps.targets is None else steps.targets.of(rows["targets"]),
            public_labels=rows.get("public_labels"),
            private_counted=rows.get("private_counted"),
            public_counted=rows.get("public_counted"),
            private_rows=rows.get("private_rows"),
            public_rows=rows.get("public_rows"),
        )
        if self._parts is None or self._parts_with is None:
            losses = self._losses_of(outputs, batch)
        else:
            skeleton = self._parts.skeleton
            _tell_what_counts(skeleton, steps, rows)
            run = partial(skeleton.run_at, handed[-1])
            losses = self._losses_of(outputs, batch, self._parts_with(run))
        for table in self._features.values():
            # A member's tensors mean nothing outside of vmap.
            table.clear()
        return losses


def _tell_what_counts(
    skeleton: Skeleton, steps: "_StackedSteps", rows: Mapping[str, Tensor]
) -> None:
    skeleton.counted.weights = rows.get("counted")
    skeleton.counted.fewest = steps.fewest


def _on_outputs(objective: Objective | JointObjective) -> Callable[..., dict[str, Tensor]]:
    """Hand an objective what it expects: one model's outputs, or those of several by name."""
    of_step: Any = objective

    def losses(outputs: Mapping[str, Outputs], batch: Batch) -> dict[str, Tensor]:
        seen = outputs if len(outputs) > 1 else next(iter(outputs.values()))
        named: dict[str, Tensor] = of_step(seen, batch)
        return named

    return losses


class _Padded:
    """One kind of rows: every member's batches as one table ``[members, steps, width]``."""

    def __init__(self, batches: Sequence[Sequence[np.ndarray]], device: torch.device) -> None:
        steps = max(len(own) for own in batches)
        self.sizes = np.zeros((len(batches), steps), np.int64)
        for position, own in enumerate(batches):
            self.sizes[position, : len(own)] = [len(batch) for batch in own]
        width = int(self.sizes.max(initial=0))
        table = np.zeros((len(batches), steps, width), np.int64)
        real = np.arange(width) < self.sizes[:, :, None]
        # Padding repeats row 0: any finite numbers do, for they count for nothing.
        table[real] = np.concatenate(
            [np.empty(0, np.int64), *(batch for own in batches for batch in own)]
        )
        self._table = as_tensor(table).to(device)
        self._device = device

    def is_padded(self, step: int, active: int) -> bool:
        """Tell whether a step has rows that do not count."""
        sizes = self.sizes[:active, step]
        return int(sizes.min()) < int(sizes.max())

    def take(self, step: int, active: int) -> tuple[Tensor, Tensor | None]:
        """Return a step's rows ``[active, width]``, and which count unless all do."""
        sizes = self.sizes[:active, step]
        widest = int(sizes.max())
        rows = self._table[:active, step, :widest]
        if int(sizes.min()) == widest:
            return rows, None
        counted = np.arange(widest) < sizes[:, None]
        return rows, torch.from_numpy(counted.astype(np.float32)).to(self._device)


class _StackedSteps:
    """All members' batches, one step at a time.

    Attributes:
        counts: steps of each member, never rising.
        total: steps of the member that takes most.
        seed: of torch's global generators during the fit.
        padded: whether any step has rows that do not count.
        apart: whether private and public rows go through the models one after the other.
        targets: of the lesson, every member's below one another where each has its own.
        num_private, fewest: of the step last taken: private rows of its width, and rows of its
            smallest batch.
        fewest_of: the latter for private and public rows alone.
    """

    def __init__(
        self,
        data: TrainingData,
        feeds: Sequence[Feed],
        public: PublicLesson | None,
        order: Sequence[int],
        seeds: Sequence[int],
        has_dropout: bool,
    ) -> None:
        self.counts = [feed.steps for feed in feeds]
        if any(later > earlier for earlier, later in pairwise(self.counts)):
            raise ValueError(f"members with fewer rows must not take more steps: {self.counts}")
        self.total = self.counts[0]
        self.seed = int(np.bitwise_xor.reduce(seeds))
        self.num_private = self.fewest = 0
        self.fewest_of: dict[str, int] = {}
        self._data = data
        device = data.train_inputs.device
        self._private = self._public = None
        own = [feed.private for feed in feeds if feed.private is not None]
        if own:
            self._private = _Padded(own, device)
        shared = [feed.public for feed in feeds if feed.public is not None]
        self.targets: Targets | None = None
        self._first_targets: Tensor | None = None
        self.apart = public is not None and public.apart and bool(own) and bool(shared)
        if public is not None and shared:
            self._public = _Padded(shared, device)
            self._public_rows = as_tensor(public.rows).to(device)
            if public.targets is not None:
                targets = public.targets.tensor.to(device)
                if targets.ndim == 3:
                    # Each member's targets below one another, found by where they begin.
                    self._first_targets = torch.tensor(order, device=device)[:, None] * len(
                        public.rows
                    )
                self.targets = public.targets.of(targets.flatten(0, -2))
        self._keys: Tensor | None = None
        if has_dropout:
            keys = np.stack([step_keys(seed, self.total) for seed in seeds], axis=1)
            self._keys = as_tensor(keys).to(device)

    @property
    def padded(self) -> bool:
        tables = [table for table in (self._private, self._public) if table is not None]
        return any(
            table.is_padded(step, self.active(step))
            for table in tables
            for step in range(self.total)
        )

    def active(self, step: int) -> int:
        """Return how many members take this step; they come first."""
        return sum(count > step for count in self.counts)

    def take(self, step: int, active: int) -> dict[str, Tensor]:
        """Return a step's rows by what they are, each with the members as first dimension."""
        rows: dict[str, Tensor] = {}
        if self._keys is not None:
            rows["key"] = self._keys[step, :active]
        inputs: list[Tensor] = []
        counted: list[Tensor | None] = []
        sizes = np.zeros(active, np.int64)
        self.num_private = 0
        if self._private is not None:
            own, weights = self._private.take(step, active)
            inputs.append(_rows_of(self._data.train_inputs, own))
            rows["labels"] = _rows_of(self._data.train_labels, own)
            rows["private_rows"] = own
            counted.append(weights)
            self.num_private = own.shape[1]
            sizes += self._private.sizes[:active, step]
            self.fewest_of["private"] = int(self._private.sizes[:active, step].min())
            if weights is not None:
                rows["private_counted"] = weights
        if self._public is not None:
            positions, weights = self._public.take(step, active)
            shared = _rows_of(self._public_rows, positions)
            inputs.append(_rows_of(self._data.public_inputs, shared))
            rows["public_rows"] = shared
            counted.append(weights)
            sizes += self._public.sizes[:active, step]
            self.fewest_of["public"] = int(self._public.sizes[:active, step].min())
            if weights is not None:
                rows["public_counted"] = weights
            if self.targets is not None:
                if self._first_targets is not None:
                    positions = positions + self._first_targets[:active]
                rows["targets"] = _rows_of(self.targets.tensor, positions)
            if self._data.public_labels is not None:
                rows["public_labels"] = _rows_of(self._data.public_labels, shared)
        rows["inputs"] = torch.cat(inputs, dim=1) if len(inputs) > 1 else inputs[0]
        self.fewest = int(sizes.min())
        if any(weights is not None for weights in counted):
            every = torch.cat(
                [
                    torch.ones(part.shape[:2], device=part.device) if weights is None else weights
                    for part, weights in zip(inputs, counted, strict=True)
                ],
                dim=1,
            )
            rows["counted"] = every
            # A row's number among the rows that count: padding in front of it moves no mask.
            rows["numbers"] = every.cumsum(1).long() - 1
        return rows


def _rows_of(table: Tensor, rows: Tensor) -> Tensor:
    """Return ``table[rows]``; one flat selection is several times as fast."""
    picked: Tensor = table.index_select(0, rows.reshape(-1)).unflatten(0, rows.shape)
    return picked
