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
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedkd.models.dropout import step_keys
from fedkd.objectives import Parts
from fedkd.randomness import seeded_for
from fedkd.tensors import as_tensor
from fedkd.training.batches import Passes
from fedkd.training.binding import BoundLearners
from fedkd.training.cohort import (
    PARTS,
    Architecture,
    Average,
    Layers,
    Member,
    Mode,
    PublicLesson,
    RowChoice,
    RowOutputs,
    Streams,
    TrainingData,
    WeightsForMembers,
    predicting,
    public_inputs,
    weights_of_each,
)
from fedkd.training.common import BackendCohort, Fit, chunks, named, tapping
from fedkd.training.feeds import Feed
from fedkd.training.gradients import PLAIN, Anchor, Noise, Rules
from fedkd.training.learners import ComposedObjective
from fedkd.training.objectives import (
    NO_PARTS,
    Batch,
    JointObjective,
    Losses,
    ObjectiveFunction,
    Outputs,
)
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.parts import FitParts, NewParts, part_in
from fedkd.training.pool import PREDICT_ROWS, ModelPool, parts_of, states_of, with_parts
from fedkd.training.private import PrivateLearning, StillBuffers
from fedkd.training.stacked_batches import StackedBatches
from fedkd.training.stacked_frozen import StackedAverage, StackedFrozen
from fedkd.training.stacked_step import TRY_LOOP, ActiveMembers, StackedStep, assign, differentiate
from fedkd.training.stacking import (
    Skeleton,
    Stack,
    StackedOptimizer,
    VmapUnsupportedError,
    stacked_tensors,
)
from fedkd.training.state import Arrays, ClientState, ModelState
from fedkd.training.steps import Steps
from fedkd.training.tables import Table

FEW_ROWS = 64
"""Rows up to which stacked models predict faster on a CPU; beyond, each keeps it busy alone."""


STACKED_PREDICT_ROWS = 8192
"""Rows times members that go through the stacked model at once, to bound its memory."""


class VmapCohort(BackendCohort):
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
        private: PrivateLearning | None = None,
    ) -> None:
        given = states_of(members, model, pool, streams.seed)
        super().__init__(
            members,
            given,
            model=model,
            optimizer=optimizer,
            data=data,
            pool=pool,
            streams=streams,
            private=private,
        )
        # Members with fewer rows take fewer steps: whoever still trains is in front.
        self._order = sorted(range(len(members)), key=lambda at: -len(members[at].rows))
        self._places = np.argsort(self._order)
        self._members = [members[at] for at in self._order]
        self._terms: list[dict[str, list[Tensor]]] = [{} for _ in members]
        states = [given[at] for at in self._order]
        self._parts: list[ModelState | None] = [state.models.get(PARTS) for state in states]
        self._stacks = {
            name: Stack.of(
                pool.skeleton(settings), [state.models[name] for state in states], self._device
            )
            for name, settings in self._models.items()
        }

    def fit(  # noqa: D102
        self,
        objective: ObjectiveFunction | JointObjective | ComposedObjective,
        *,
        private: Passes | Sequence[Passes] | None = None,
        public: PublicLesson | None = None,
        models: Sequence[str] | None = None,
        frozen: Sequence[str] = (),
        layers: Layers = (),
        tables: Mapping[str, Table] | None = None,
        optimizer: OptimizerSettings | None = None,
        gradient: Rules = PLAIN,
        averages: Mapping[str, Average] | None = None,
        parts: NewParts | None = None,
        heads: bool = False,
        keep_outputs: bool = False,
    ) -> list[RowOutputs]:
        fit = self._resolved(
            objective,
            models,
            private=private,
            public=public,
            frozen=frozen,
            layers=layers,
            tables=tables,
            optimizer=optimizer,
            gradient=gradient,
            averages=averages,
            parts=parts,
            heads=heads,
            keep_outputs=keep_outputs,
        )
        if not isinstance(objective, ComposedObjective):
            beside = FitParts(parts) if parts else None
            losses_of, runs = _on_outputs(objective), self._runs(fit)
            if beside is None:
                return self._fit_stacks(fit, runs, losses_of, None)
            stack = self._stacked_parts(Skeleton(beside.parts, self._device), beside)
            kept = self._fit_stacks(fit, runs, losses_of, None, stack, beside.parts_with)
            self._keep_parts(stack)
            return kept
        if objective.idle:
            return self._nothing_kept(fit)
        architectures = self._models_of(fit)
        bound = self._pool.bound(objective, architectures)
        if bound.stacking.obstacle:
            raise VmapUnsupportedError(f"{bound.stacking.obstacle}; {TRY_LOOP}")
        runs = self._runs(fit)
        skeleton = self._pool.parts_skeleton(objective, architectures)
        of_terms = None if skeleton is None else self._stacked_parts(skeleton, bound)
        kept = self._fit_stacks(
            fit.with_layers(bound.layers),
            runs,
            partial(bound.losses, objective),
            bool(bound.stacking.mixes_rows),
            of_terms,
            bound.parts_with,
        )
        if of_terms is not None:
            self._keep_parts(of_terms)
        return kept

    def _stacked_parts(self, skeleton: Skeleton, beside: BoundLearners | FitParts) -> Stack:
        states = [
            parts_of(beside, own, self._streams.seed, member.client)
            for own, member in zip(self._parts, self._members, strict=True)
        ]
        return Stack.of(skeleton, states, self._device)

    def _keep_parts(self, stack: Stack) -> None:
        self._parts = [
            with_parts(own, made) for own, made in zip(self._parts, stack.states(), strict=True)
        ]

    def _runs(self, fit: Fit) -> list[StackedBatches]:
        """Cut the fit into runs of neighbours whose steps have the same kinds of rows.

        Members whose steps do not fall in the order of the stack change their places first.
        """
        drawn = [
            Feed.drawn(member, self._streams, fit.key, fit.passes(position), fit.lesson(position))
            for member, position in zip(self._members, self._order, strict=True)
        ]
        for position, (_, feed) in zip(self._order, drawn, strict=True):
            self._count_fit(position, fit, feed)
        ranks = sorted(
            range(len(drawn)), key=lambda at: (drawn[at][1].public is None, -drawn[at][1].steps)
        )
        if any(later < earlier for earlier, later in pairwise(ranks)):
            self._rearrange(ranks)
            drawn = [drawn[at] for at in ranks]
        has_dropout = any(self._stacks[name].skeleton.dropout for name in fit.learning)
        runs = []
        first = 0
        for _, neighbours in groupby(drawn, key=lambda own: own[1].public is None):
            seeds, feeds = zip(*neighbours, strict=True)
            order = self._order[first : first + len(feeds)]
            runs.append(StackedBatches(self._data, feeds, fit, first, order, seeds, has_dropout))
            first += len(feeds)
        return runs

    def _rearrange(self, ranks: Sequence[int]) -> None:
        """Give the members other places in the stack: those at ``ranks``, in that order."""
        self._order = [self._order[at] for at in ranks]
        self._places = np.argsort(self._order)
        self._members = [self._members[at] for at in ranks]
        self._terms = [self._terms[at] for at in ranks]
        self._parts = [self._parts[at] for at in ranks]
        for stack in self._stacks.values():
            stack.rearrange(ranks)

    def _fit_stacks(
        self,
        fit: Fit,
        runs: Sequence[StackedBatches],
        losses_of: Callable[..., Losses],
        compares_rows: bool | None,
        parts: Stack | None = None,
        parts_with: Callable[..., Any] | None = None,
    ) -> list[RowOutputs]:
        models = {name: self._stacks[name] for name in fit.learning}
        still = {name: StillBuffers(self._stacks[name].buffers) for name in fit.private_models}
        averages = {name: self._average(name, average) for name, average in fit.averages.items()}
        counts = [count for steps in runs for count in steps.counts]
        run_of = [number for number, steps in enumerate(runs) for _ in steps.counts]
        settings = fit.optimizer or self._optimizer_settings
        optimizers = [
            StackedOptimizer(
                stack, settings, counts, runs=run_of, passing=fit.optimizer is not None
            )
            for stack in [*models.values(), *([] if parts is None else [parts])]
        ]
        kept = _Kept(len(self._members)) if fit.keep_outputs else None
        with ExitStack() as taps:
            frozen = {
                name: self._frozen_of(name, like, averages) for name, like in fit.frozen.items()
            }
            modules = {name: stack.skeleton.module for name, stack in models.items()}
            modules |= {name: each.skeleton.module for name, each in frozen.items()}
            features = {
                name: taps.enter_context(tapping(module, fit.paths[name]))
                for name, module in modules.items()
                if name in fit.paths
            }
            step = StackedStep(
                models, losses_of, compares_rows, fit, features, frozen, parts, parts_with
            )
            for stack in step.learning:
                stack.skeleton.module.train()
            taps.enter_context(step.watching())
            anchor = Anchor.of(
                fit.rules,
                {
                    name: [stack.tensors[each] for each in stack.skeleton.trainable]
                    for name, stack in models.items()
                },
            )
            noise = step.noise(self._order)
            for steps in runs:
                with seeded_for(own_code=self._has_own_code, seed=steps.seed):
                    start = 0
                    while start < steps.total:
                        active = steps.active(start)
                        stop = start + 1
                        while stop < steps.total and steps.active(stop) == active:
                            stop += 1
                        self._fit_together(
                            step,
                            optimizers,
                            steps,
                            active,
                            range(start, stop),
                            averages,
                            kept,
                            anchor,
                            noise,
                        )
                        start = stop
        for optimizer in optimizers:
            optimizer.give_back()
        for stack in step.learning:
            if stack.skeleton.dropout is not None:
                stack.skeleton.dropout.end()
        for name, before in still.items():
            before.check(name, self._stacks[name].buffers)
        for name, average in averages.items():
            for place, position in enumerate(self._order):
                self._kept.keep_average(
                    name,
                    average.model,
                    position,
                    self._stacks[average.model].weights_of(average.tensors, place),
                    int(average.updates[place]),
                )
        if kept is None:
            return []
        rows = [own for steps in runs for own in steps.private_rows]
        return [self._kept_rows(fit, rows[place], kept.parts[place]) for place in self._places]

    def _fit_together(
        self,
        step: "StackedStep",
        optimizers: Sequence[StackedOptimizer],
        steps: StackedBatches,
        active: int,
        numbers: range,
        averages: Mapping[str, "StackedAverage"],
        kept: "_Kept | None",
        anchor: Anchor | None,
        noise: Noise | None,
    ) -> None:
        """Take steps that the same ``active`` members take, which stand first in their run."""
        stacks = step.learning
        here = slice(steps.first, steps.first + active)
        handed = [
            {name: tensor[here].detach() for name, tensor in stack.tensors.items()}
            for stack in stacks
        ]
        resting = {
            name: {key: tensor[here] for key, tensor in model.own.items()}
            for name, model in step.frozen.items()
        }
        leaves = [
            [tensors[name].requires_grad_() for name in stack.skeleton.trainable]
            for stack, tensors in zip(stacks, handed, strict=True)
        ]
        moving = [
            ActiveMembers(optimizer, own, stack.skeleton.trainable, steps.first, active)
            for stack, optimizer, own in zip(stacks, optimizers, leaves, strict=True)
        ]
        # The last stack may be that of the parts, which no anchor holds.
        held = [leaf for own in leaves[: step.num_models] for leaf in own]
        anchor = None if anchor is None else anchor.of_members(here)
        training = Steps(
            moving,
            steps.total,
            numbers=numbers,
            progress=self._streams.progress,
            gradient=partial(differentiate, moving, anchor, held),
        )
        for number, *_ in training:
            rows = steps.take(number, active)
            gradient = None
            if step.clipping:
                losses, seen, gradients = step.clipped(steps, handed, resting, rows, leaves)
                noised = gradients if noise is None else noise.onto(gradients, here)
                gradient = partial(assign, moving, anchor, held, noised)
            else:
                losses, seen = step.run(steps, number, handed, resting, rows)
            if anchor is not None and losses:
                losses["proximal"] = anchor.penalty(held, stacked=True)
            training.descend(losses, gradient)
            if kept is not None:
                kept.add(seen, steps.private_sizes(number, active), steps.first)
            for average in averages.values():
                average.update(self._stacks[average.model], here)
        for name, values in training.records.take().items():
            for at, of_member in enumerate(values.t().contiguous(), start=steps.first):
                self._terms[at].setdefault(name, []).append(of_member)

    # -- models that never train -----------------------------------------------------------

    def _average(self, name: str, average: Average) -> "StackedAverage":
        """Return all members' running averages, each of which begins as its model is."""
        model = average.model or self._first
        stack = self._stacks[model]
        tensors = {key: tensor.clone() for key, tensor in stack.tensors.items()}
        updates = np.zeros(len(self._members), np.int64)
        for place, position in enumerate(self._order):
            known = self._kept.average(name, model, position)
            if known is not None:
                weights, updates[place] = known
                for key, tensor in tensors.items():
                    tensor[place].copy_(as_tensor(stack.skeleton.turned(key, weights[key])))
        return StackedAverage(average, model, tensors, updates)

    def _frozen_of(
        self, name: str, like: str, averages: Mapping[str, "StackedAverage"]
    ) -> StackedFrozen:
        """Return a model that never trains: one for all members, or one for each."""
        settings = self._models[like]
        skeleton = self._pool.frozen_skeleton(settings)
        if name in averages:
            return StackedFrozen(skeleton, {}, averages[name].tensors, settings.is_own)
        given = self._frozen.get(name)
        if given is not None and given.is_shared:
            shared = stacked_tensors(skeleton, [given.own(0)], self._device)
            tensors = {key: tensor[0] for key, tensor in shared.items()}
            return StackedFrozen(skeleton, tensors, {}, settings.is_own)
        weights = [self._frozen_weights(name, like, position) for position in self._order]
        own = stacked_tensors(skeleton, weights, self._device)
        return StackedFrozen(skeleton, {}, own, settings.is_own)

    # -- outputs ---------------------------------------------------------------------------

    def outputs(  # noqa: D102
        self,
        *,
        on: RowChoice,
        mode: Mode = "eval",
        layers: Sequence[str] = (),
        model: str | None = None,
        batch_rows: int | None = None,
    ) -> list[RowOutputs]:
        name = model or self._first
        like = name if name in self._models else self._like(name, {})
        settings = self._models[like]
        paths = self._pool.layer_paths(settings, layers)
        number = self._next_training_mode(mode)
        trains = mode == "train" and name in self._models
        skeleton = self._stacks[like].skeleton
        if name not in self._models:
            skeleton = self._pool.frozen_skeleton(settings)
        skeleton.module.train(trains)
        # Every row counts here, whatever the last step of a fit was padded with.
        skeleton.counted.weights = None
        results = []
        for position, member in enumerate(self._given):
            rows, inputs, labels = self._asked(on, position)
            self._count_predicted(position, like, len(inputs))
            if name in self._models:
                place = self._places[position]
                tensors = {key: each[place] for key, each in self._stacks[like].tensors.items()}
            else:
                weights = self._frozen_weights(name, like, position)
                stacked = stacked_tensors(skeleton, [weights], self._device)
                tensors = {key: each[0] for key, each in stacked.items()}
            # Buffers are copies, so those of the member stay as they are.
            tensors = {
                key: each if key in skeleton.first_names else each.clone()
                for key, each in tensors.items()
            }
            seed = self._mode_seed(member.client, number)
            cuts = chunks(len(inputs), batch_rows, mode)
            keys = as_tensor(step_keys(seed, len(cuts))).to(self._device)
            parts = []
            with (
                tapping(skeleton.module, paths) as seen,
                seeded_for(own_code=settings.is_own, seed=seed),
                torch.inference_mode(),
            ):
                for key, cut in zip(keys, cuts, strict=True):
                    if skeleton.dropout is not None and trains:
                        skeleton.dropout.begin(key)
                    logits = skeleton.logits(tensors, inputs[cut])
                    parts.append((logits, named(seen, paths)))
            if skeleton.dropout is not None:
                skeleton.dropout.end()
            results.append(self._row_outputs(rows, labels, parts, settings, paths))
        return results

    def predict(  # noqa: D102
        self,
        inputs: Float[Tensor, "rows *shape"],
        *,
        model: str | None = None,
    ) -> Float[np.ndarray, "members rows classes"]:
        if model is not None and model not in self._models:
            return np.stack([own.logits for own in self.outputs(on=inputs, model=model)])
        stack = self._stacks[model or self._first]
        stack.skeleton.module.eval()
        # Every row counts here, whatever the last step of a fit was padded with.
        stack.skeleton.counted.weights = None
        members = len(self._members)
        for position in range(members):
            self._count_predicted(position, model or self._first, len(inputs))
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

    # -- weights and states ----------------------------------------------------------------

    def weights(self, *, model: str | None = None) -> list[Arrays]:  # noqa: D102
        if model is not None and model not in self._models:
            return self._weights_at_rest(model)
        stack = self._stacks[model or self._first]
        weights = stack.weights()
        return [weights[place] for place in self._places]

    def load_weights(  # noqa: D102
        self, weights: WeightsForMembers, *, model: str | None = None
    ) -> None:
        each = weights_of_each(weights, len(self._members))
        self._stacks[model or self._first].load_weights([each[at] for at in self._order])

    def reset_optimizers(self, *, model: str | None = None) -> None:  # noqa: D102
        for name, stack in self._stacks.items():
            if model in (None, name):
                stack.forget()
        if model is None:
            self._parts = [None if own is None else ModelState(own.weights) for own in self._parts]

    def parts(self, name: str) -> list[Arrays | None]:  # noqa: D102
        weights = [None if own is None else own.weights for own in self._parts]
        each = [None if own is None else part_in(own, name) for own in weights]
        return [each[place] for place in self._places]

    def states(self) -> list[ClientState]:  # noqa: D102
        states = []
        of_stacks = {name: stack.states() for name, stack in self._stacks.items()}
        for position, place in enumerate(map(int, self._places)):
            own = {name: each[place] for name, each in of_stacks.items()}
            parts = self._parts[place]
            models = own if parts is None else {**own, PARTS: parts}
            states.append(ClientState(models, self._kept.of(position)))
        return states

    def metrics(self) -> list[dict[str, float]]:  # noqa: D102
        return [
            {
                f"loss/{name}": float(torch.cat(losses).mean())
                for name, losses in self._terms[place].items()
            }
            for place in self._places
        ]


class _Kept:
    """What the stack's members put out for private rows while they train.

    Attributes:
        parts: for each member, logits and features of its rows, step by step.
    """

    def __init__(self, members: int) -> None:
        self.parts: list[list[tuple[Tensor, Mapping[str, Tensor]]]] = [[] for _ in range(members)]

    def add(self, seen: Mapping[str, Tensor], sizes: np.ndarray, first: int) -> None:
        """Keep a step's outputs ``[members, width, ...]`` without the rows that pad them."""
        for at, size in enumerate(sizes):
            own = {name: tensor[at, :size].detach() for name, tensor in seen.items()}
            self.parts[first + at].append((own.pop(""), own))


def _on_outputs(objective: ObjectiveFunction | JointObjective) -> Callable[..., Losses]:
    """Hand an objective what it expects: one model's outputs, or those of several by name."""
    of_step: Any = objective

    def losses(
        outputs: Mapping[str, Outputs],
        batch: Batch,
        parts: Parts = NO_PARTS,
        *,
        alone: bool,  # noqa: ARG001
    ) -> Losses:
        batch = batch._replace(parts=parts)
        seen = outputs if len(outputs) > 1 else next(iter(outputs.values()))
        named: Losses = of_step(seen, batch)
        return named

    return losses
