"""The vmap backend: a cohort's members train as one stacked model, in one stream of operations.

Equal to the loop backend up to rounding (about 1e-6 a step); the same cohort gives the same bits.
Members may have different numbers of rows: they stand in the order of their sizes, so that those
that still train come first, and batches are padded with rows that count for nothing.

What a model of one's own has to keep to: no control flow that depends on numbers, no mixing of
the rows of a batch except by torch's BatchNorm (padded rows would take part). Random functions
such as ``F.dropout`` draw for each member on its own, from one generator that the cohort's seeds
seed: repeatable, but not what the loop draws; ``nn.Dropout`` layers draw the same in both.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fedkd.losses.reduction import RowKind, StepRows, WholeStep
from fedkd.models.dropout import step_keys
from fedkd.objectives import Parts
from fedkd.objectives.view import NO_FEATURES
from fedkd.randomness import seeded_for
from fedkd.targets import Targets
from fedkd.tensors import as_tensor
from fedkd.training.batches import Passes
from fedkd.training.binding import BoundLearners
from fedkd.training.cohort import (
    PARTS,
    Architecture,
    Asked,
    Average,
    Layers,
    Member,
    Mode,
    PublicLesson,
    RowOutputs,
    Streams,
    TrainingData,
    WeightsForMembers,
    predicting,
    public_inputs,
    weights_of_each,
)
from fedkd.training.common import (
    NO_PATHS,
    BackendCohort,
    Fit,
    chunks,
    named,
    tapping,
)
from fedkd.training.feeds import Feed
from fedkd.training.frozen import fold_in
from fedkd.training.gradients import (
    PLAIN,
    Anchor,
    Clipping,
    RowNorms,
    Rules,
    SplitLosses,
    clipped_sums,
    plain_gradients,
)
from fedkd.training.learners import ComposedObjective
from fedkd.training.objectives import (
    NO_PARTS,
    Batch,
    JointObjective,
    Losses,
    Objective,
    Outputs,
)
from fedkd.training.optimizers import OptimizerSettings
from fedkd.training.parts import FitParts, NewParts, part_in
from fedkd.training.pool import PREDICT_ROWS, ModelPool, parts_of, states_of, with_parts
from fedkd.training.stacking import (
    Skeleton,
    Stack,
    StackedOptimizer,
    VmapUnsupportedError,
    stacked_tensors,
)
from fedkd.training.state import Arrays, ClientState, ModelState
from fedkd.training.steps import LossTerms, Steps, total
from fedkd.training.tables import Table

FEW_ROWS = 64
"""Rows up to which stacked models predict faster on a CPU; beyond, each keeps it busy alone."""

TRY_LOOP = "engine.vectorize: loop trains one client at a time"

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
        objective: Objective | JointObjective | ComposedObjective,
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
        self._parts = [with_parts(own, stack.state(at)) for at, own in enumerate(self._parts)]

    def _runs(self, fit: Fit) -> list["_StackedSteps"]:
        """Cut the fit into runs of neighbours whose steps have the same kinds of rows.

        Members whose steps do not fall in the order of the stack change their places first.
        """
        drawn = [
            Feed.drawn(member, self._streams, fit.key, fit.passes(position), fit.lesson(position))
            for member, position in zip(self._members, self._order, strict=True)
        ]
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
            runs.append(_StackedSteps(self._data, feeds, fit, first, order, seeds, has_dropout))
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
        runs: Sequence["_StackedSteps"],
        losses_of: Callable[..., Losses],
        compares_rows: bool | None,
        parts: Stack | None = None,
        parts_with: Callable[..., Any] | None = None,
    ) -> list[RowOutputs]:
        models = {name: self._stacks[name] for name in fit.learning}
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
            step = _Step(models, losses_of, compares_rows, fit, features, frozen, parts, parts_with)
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
                        )
                        start = stop
        for optimizer in optimizers:
            optimizer.give_back()
        for stack in step.learning:
            if stack.skeleton.dropout is not None:
                stack.skeleton.dropout.end()
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
        step: "_Step",
        optimizers: Sequence[StackedOptimizer],
        steps: "_StackedSteps",
        active: int,
        numbers: range,
        averages: Mapping[str, "_StackedAverage"],
        kept: "_Kept | None",
        anchor: Anchor | None,
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
            _ActiveMembers(optimizer, own, stack.skeleton.trainable, steps.first, active)
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
            gradient=partial(_differentiate, moving, anchor, held),
        )
        for number, *_ in training:
            rows = steps.take(number, active)
            gradient = None
            if step.clipping:
                losses, seen, gradients = step.clipped(steps, handed, resting, rows, leaves)
                gradient = partial(_assign, moving, anchor, held, gradients)
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

    def _average(self, name: str, average: Average) -> "_StackedAverage":
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
        return _StackedAverage(average, model, tensors, updates)

    def _frozen_of(
        self, name: str, like: str, averages: Mapping[str, "_StackedAverage"]
    ) -> "_Frozen":
        """Return a model that never trains: one for all members, or one for each."""
        settings = self._models[like]
        skeleton = self._pool.frozen_skeleton(settings)
        if name in averages:
            return _Frozen(skeleton, {}, averages[name].tensors, settings.is_own)
        given = self._frozen.get(name)
        if given is not None and given.is_shared:
            shared = stacked_tensors(skeleton, [given.own(0)], self._device)
            tensors = {key: tensor[0] for key, tensor in shared.items()}
            return _Frozen(skeleton, tensors, {}, settings.is_own)
        weights = [self._frozen_weights(name, like, position) for position in self._order]
        own = stacked_tensors(skeleton, weights, self._device)
        return _Frozen(skeleton, {}, own, settings.is_own)

    # -- outputs ---------------------------------------------------------------------------

    def outputs(  # noqa: D102
        self,
        *,
        on: Asked,
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
        inputs: Float[Tensor, "rows channels height width"],
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
        return [stack.weights(int(place)) for place in self._places]

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
        for position, place in enumerate(map(int, self._places)):
            own = {name: stack.state(place) for name, stack in self._stacks.items()}
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


class _Step:
    """What the stacks of a fit compute in each of its steps.

    Attributes:
        learning: every stack that learns: the models', then that of the parts.
        num_models: how many of them are models'.
        clipping: which of these have the gradients of their rows clipped.
        frozen: the models that do not, by name.
    """

    def __init__(
        self,
        models: Mapping[str, Stack],
        losses_of: Callable[..., Losses],
        compares_rows: bool | None,
        fit: Fit,
        features: Mapping[str, dict[str, Tensor]],
        frozen: Mapping[str, "_Frozen"],
        parts: Stack | None,
        parts_with: Callable[..., Any] | None,
    ) -> None:
        self._skeletons = {name: stack.skeleton for name, stack in models.items()}
        self._losses_of = losses_of
        self._compares_rows = compares_rows
        self._features = features
        self._paths = fit.paths
        self._tables_of = {name: table.of for name, table in fit.tables.items()}
        self._kept = fit.learning[0] if fit.keep_outputs else None
        self._nudges: dict[str, dict[str, Tensor]] = {}
        self._parts = parts
        self._parts_with = parts_with
        self.learning = [*models.values(), *([] if parts is None else [parts])]
        self.num_models = len(models)
        self._heads = fit.heads
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        modules = {name: skeleton.module for name, skeleton in self._skeletons.items()}
        self.clipping = Clipping(fit.rules, modules, has_parts=parts is not None)
        self.frozen = frozen

    def run(
        self,
        steps: "_StackedSteps",
        number: int,
        handed: Sequence[dict[str, Tensor]],
        resting: Mapping[str, dict[str, Tensor]],
        rows: dict[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return all members' losses ``[members]``, and what is kept of their outputs.

        Args:
            steps: where the step is one of.
            number: which of them.
            handed: all members' tensors, of each stack that learns.
            resting: the same of each frozen model of which every member has its own.
            rows: all members' rows.
        """
        if "counted" not in rows or self._compares_rows is False:
            at_once = torch.vmap(partial(self._losses, steps), randomness="different")
            losses, kept = at_once(handed, resting, rows)
            return losses, kept
        forward = torch.vmap(partial(self._forward, steps), randomness="different")
        outputs, kept = forward(handed, resting, rows)
        if self._compares_rows is None:
            try:
                judge = torch.vmap(partial(self._judged, steps), randomness="different")
                losses = judge(outputs, handed, rows)
            except _ComparesRowsError:
                self._compares_rows = True
            else:
                return losses, kept
        return self._one_by_one(steps, number, outputs, handed, rows), kept

    def _losses(
        self,
        steps: "_StackedSteps",
        handed: Sequence[dict[str, Tensor]],
        resting: Mapping[str, dict[str, Tensor]],
        rows: dict[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Do for one member what `run` does; this is what vmap runs."""
        outputs, kept = self._forward(steps, handed, resting, rows)
        return self._judged(steps, outputs, handed, rows), kept

    def _forward(
        self,
        steps: "_StackedSteps",
        handed: Sequence[dict[str, Tensor]],
        resting: Mapping[str, dict[str, Tensor]],
        rows: dict[str, Tensor],
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Return what every model puts out for one member, and what is kept of it."""
        outputs = self._outputs(steps, handed, rows)
        for name, model in self.frozen.items():
            logits = model.logits(resting[name], rows["inputs"])
            outputs[name] = Outputs.split(logits, steps.num_private, self._seen(name))
        kept = {} if self._kept is None else _private(outputs[self._kept], steps)
        for table in self._features.values():
            # A member's tensors mean nothing outside of vmap.
            table.clear()
        return {name: _packed(own, rows) for name, own in outputs.items()}, kept

    def _judged(
        self,
        steps: "_StackedSteps",
        outputs: Mapping[str, dict[str, Tensor]],
        handed: Sequence[dict[str, Tensor]],
        rows: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return one member's losses."""
        of_step = steps.rows_of(rows)
        batch = steps.batch_of(rows)
        losses = self._of_objective(
            {name: _unpacked(own) for name, own in outputs.items()}, batch, steps, handed, rows
        )
        read = {name: of_step.read(name, loss) for name, loss in losses.items()}
        whole = [name for name, loss in read.items() if isinstance(loss, WholeStep)]
        if whole and of_step.counted:
            raise _ComparesRowsError(
                f"loss {whole[0]!r} was of each row in earlier steps and is of the whole step now, "
                f"which has rows that pad it; {TRY_LOOP}"
            )
        if self._compares_rows is None:
            self._compares_rows = bool(whole)
        return of_step.means(read)

    def _one_by_one(
        self,
        steps: "_StackedSteps",
        number: int,
        outputs: Mapping[str, dict[str, Tensor]],
        handed: Sequence[dict[str, Tensor]],
        rows: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Return all members' losses, each of which sees the rows that count and no others."""
        each = []
        for at, sizes in enumerate(steps.sizes_of(number, len(rows["inputs"]))):
            cut = partial(_cut, at=at, sizes=sizes, num_private=steps.num_private)
            own = {name: cut(_ROW_KINDS, packed) for name, packed in outputs.items()}
            seen = {name: each for name, each in rows.items() if not name.endswith("counted")}
            own_rows = cut({**_ROW_KINDS, **self._table_kinds()}, seen)
            tensors = [{name: each[at] for name, each in stack.items()} for stack in handed]
            losses = self._of_objective(
                {name: _unpacked(packed) for name, packed in own.items()},
                steps.batch_of(own_rows),
                steps,
                tensors,
                {},
            )
            each.append(StepRows(sizes).means(losses))
        return {name: torch.stack([losses[name] for losses in each]) for name in each[0]}

    # -- clipped gradients of rows ---------------------------------------------------------

    def watching(self) -> AbstractContextManager[None]:
        """Measure what comes back to the layers inside the block, where the rule needs it."""
        norms = self.clipping.norms
        return nullcontext() if norms is None else norms.watching()

    def clipped(
        self,
        steps: "_StackedSteps",
        handed: Sequence[dict[str, Tensor]],
        resting: Mapping[str, dict[str, Tensor]],
        rows: dict[str, Tensor],
        leaves: Sequence[Sequence[Tensor]],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor | None]]:
        """Do what `run` does where a rule clips the gradients of rows.

        Returns:
            The means of all losses, what is kept of the outputs, and the gradients of all leaves,
            those of each model by its own rule.
        """
        own_leaves = dict(zip(self._skeletons, leaves, strict=False))
        gradients: dict[str, Sequence[Tensor | None]] = {}
        norms = self.clipping.norms
        if norms is not None:
            outputs, kept, split = self._by_norms(
                norms, steps, handed, resting, rows, own_leaves, gradients
            )
        else:
            forward = torch.vmap(partial(self._forward, steps), randomness="different")
            outputs, kept = forward(handed, resting, rows)
            split = self._split(steps, outputs, handed, rows)
        if self.clipping.row_by_row:
            self._by_rows(split, outputs, steps, handed, resting, rows, own_leaves, gradients)
        for name, own in own_leaves.items():
            if name not in gradients:
                gradients[name] = plain_gradients(split.means, own)
        return split.means, kept, [each for name in own_leaves for each in gradients[name]]

    def _by_rows(
        self,
        split: SplitLosses,
        outputs: Mapping[str, dict[str, Tensor]],
        steps: "_StackedSteps",
        handed: Sequence[dict[str, Tensor]],
        resting: Mapping[str, dict[str, Tensor]],
        rows: dict[str, Tensor],
        leaves: Mapping[str, Sequence[Tensor]],
        gradients: dict[str, Sequence[Tensor | None]],
    ) -> None:
        """Add the gradients of the models for which every row's gradient is made."""
        trainable = {
            name: {each: stack[each].detach() for each in skeleton.trainable}
            for (name, skeleton), stack in zip(self._skeletons.items(), handed, strict=False)
            if name in self.clipping.row_by_row
        }
        constants = {
            name: {key: each.detach() for key, each in own.items()} for name, own in outputs.items()
        }
        each_row = torch.vmap(partial(self._each_row, steps), randomness="different")(
            trainable, handed, resting, rows, constants
        )
        for name, rule in self.clipping.row_by_row.items():
            sums = clipped_sums(rule, each_row[name], stacked=True)
            public = split.public_gradients(leaves[name])
            gradients[name] = [
                clipped if more is None else clipped + more
                for clipped, more in zip(sums.values(), public, strict=True)
            ]

    def _by_norms(
        self,
        norms: RowNorms,
        steps: "_StackedSteps",
        handed: Sequence[dict[str, Tensor]],
        resting: Mapping[str, dict[str, Tensor]],
        rows: dict[str, Tensor],
        leaves: Mapping[str, Sequence[Tensor]],
        gradients: dict[str, Sequence[Tensor | None]],
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], SplitLosses]:
        """Take the models' step, and add the gradients of those whose norms are measured."""
        if not self._shapes:
            self._shapes = self._layer_shapes(norms, handed, rows)
        members, width = rows["inputs"].shape[:2]
        noted = steps.num_private if steps.apart else width
        nudges = {
            name: {
                path: rows["inputs"].new_zeros(()).expand(members, noted, *shape).requires_grad_()
                for path, shape in shapes.items()
            }
            for name, shapes in self._shapes.items()
        }

        def forward(*given: Any) -> Any:
            *of_step, self._nudges = given
            outputs, kept = self._forward(steps, *of_step)
            return outputs, kept, {name: dict(own) for name, own in norms.read.items()}

        outputs, kept, read = torch.vmap(forward, randomness="different")(
            handed, resting, rows, nudges
        )
        norms.end()
        split = self._split(steps, outputs, handed, rows)
        norms.nudges = nudges
        came_back = norms.came_back(split.private)
        for name, rule in self.clipping.by_norms.items():
            size = norms.norms(name, read[name], came_back[name], steps.num_private, stacked=True)
            gradients[name] = split.weighted_gradients(rule.shares(size), leaves[name])
        norms.end()
        return outputs, kept, split

    def _layer_shapes(
        self,
        norms: RowNorms,
        handed: Sequence[dict[str, Tensor]],
        rows: Mapping[str, Tensor],
    ) -> dict[str, dict[str, tuple[int, ...]]]:
        """Return what each layer of each model puts out for one row."""
        shapes = {}
        for (name, skeleton), stack in zip(self._skeletons.items(), handed, strict=False):
            if name not in self.clipping.by_norms:
                continue
            tensors = {key: each[0].detach() for key, each in stack.items()}
            # Not the training mode, in which dropout would draw.
            skeleton.module.eval()
            shapes[name] = norms.shapes(
                name, partial(skeleton.logits, tensors, rows["inputs"][0, :1])
            )
            skeleton.module.train()
        return shapes

    def _split(
        self,
        steps: "_StackedSteps",
        outputs: Mapping[str, dict[str, Tensor]],
        handed: Sequence[dict[str, Tensor]],
        rows: dict[str, Tensor],
    ) -> SplitLosses:
        """Return all members' losses, of private rows and of public ones."""

        def of_member(outputs: Any, handed: Any, rows: Any) -> dict[str, Any]:
            seen = {name: _unpacked(own) for name, own in outputs.items()}
            losses = self._of_objective(seen, steps.batch_of(rows), steps, handed, rows)
            split = SplitLosses.of(losses, steps.rows_of(rows))
            public = {} if split.public is None else {"public": split.public}
            return {"private": split.private, "means": split.means, **public}

        found = torch.vmap(of_member, randomness="different")(outputs, handed, rows)
        return SplitLosses(found["private"], found.get("public"), found["means"])

    def _each_row(
        self,
        steps: "_StackedSteps",
        trainable: dict[str, dict[str, Tensor]],
        handed: Sequence[dict[str, Tensor]],
        resting: Mapping[str, dict[str, Tensor]],
        rows: dict[str, Tensor],
        whole: Mapping[str, dict[str, Tensor]],
    ) -> dict[str, dict[str, Tensor]]:
        """Return one member's gradient of every private row's loss, for each model by name."""
        one_row = copy.copy(steps)
        one_row.num_private = one_row.fewest = 1
        one_row.apart = False
        kinds = {**_ROW_KINDS, **self._table_kinds()}
        private = {
            name: each
            for name, each in rows.items()
            if kinds.get(name) == "private" or name == "private_counted"
        }
        private["inputs"] = rows["inputs"][: steps.num_private]
        private["numbers"] = torch.arange(steps.num_private, device=rows["inputs"].device)
        others = {name: each for name, each in rows.items() if name not in (*private, "counted")}

        def of_row(trainable: dict[str, dict[str, Tensor]], row: dict[str, Tensor]) -> Tensor:
            own = {**others, **{name: each[None] for name, each in row.items()}}
            tensors = [
                {**stack, **trainable.get(name, {})}
                for name, stack in zip(self._skeletons, handed, strict=True)
            ]
            outputs, _ = self._forward(one_row, tensors, resting, own)
            together = {
                name: _unpacked(packed).beside_public(_unpacked(whole[name]), steps.num_private)
                for name, packed in outputs.items()
            }
            losses = self._of_objective(together, steps.batch_of(own), steps, tensors, own)
            return SplitLosses.of(losses, steps.rows_of(own)).private.sum()

        found: dict[str, dict[str, Tensor]] = torch.vmap(
            torch.func.grad(of_row), in_dims=(None, 0), randomness="different"
        )(trainable, private)
        return found

    def _table_kinds(self) -> dict[str, str]:
        return {f"table {name}": of for name, of in self._tables_of.items()}

    def _of_objective(
        self,
        outputs: Mapping[str, Outputs],
        batch: Batch,
        steps: "_StackedSteps",
        handed: Sequence[dict[str, Tensor]],
        rows: Mapping[str, Tensor],
    ) -> Losses:
        """Ask the objective about one member; without ``rows`` that count, all of them do."""
        if self._heads:
            outputs = self._with_heads(outputs, handed)
        if self._parts is None or self._parts_with is None:
            return self._losses_of(outputs, batch, alone=steps.alone)
        skeleton = self._parts.skeleton
        _tell_what_counts(skeleton, steps, rows)
        run = partial(skeleton.run_at, handed[-1])
        return self._losses_of(outputs, batch, self._parts_with(run), alone=steps.alone)

    def _with_heads(
        self, outputs: Mapping[str, Outputs], handed: Sequence[dict[str, Tensor]]
    ) -> dict[str, Outputs]:
        """Let the objective run the heads of one member's models."""
        heads = {
            name: partial(skeleton.run_at, tensors, self._heads[name])
            for (name, skeleton), tensors in zip(self._skeletons.items(), handed, strict=False)
        }
        return {
            name: own._replace(head=heads[name]) if name in heads else own
            for name, own in outputs.items()
        }

    def _outputs(
        self,
        steps: "_StackedSteps",
        handed: Sequence[dict[str, Tensor]],
        rows: dict[str, Tensor],
    ) -> dict[str, Outputs]:
        """Return what the models that learn put out, by name."""
        outputs = {}
        for number, ((name, skeleton), tensors) in enumerate(
            zip(self._skeletons.items(), handed, strict=False)
        ):
            self.clipping.begin(name, self._nudges.get(name), apart=steps.apart)
            if skeleton.dropout is not None:
                skeleton.dropout.begin(rows["key"], rows=rows.get("numbers"), model=number)
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
                    passes.append((skeleton.logits(tensors, inputs), self._seen(name)))
                outputs[name] = Outputs.of_passes(*passes)
                continue
            _tell_what_counts(skeleton, steps, rows)
            logits = skeleton.logits(tensors, rows["inputs"])
            outputs[name] = Outputs.split(logits, steps.num_private, self._seen(name))
        return outputs

    def _seen(self, name: str) -> Mapping[str, Tensor]:
        """Return a copy: models of one architecture share a skeleton, and with it the taps."""
        return named(self._features.get(name, NO_FEATURES), self._paths.get(name, NO_PATHS))


def _private(outputs: Outputs, steps: "_StackedSteps") -> dict[str, Tensor]:
    """Return logits and features of the private rows; "" stands for the logits."""
    assert outputs.private is not None  # noqa: S101 (a fit without private rows keeps nothing)
    features = {name: each[: steps.num_private] for name, each in outputs.features.items()}
    return {"": outputs.private, **features}


class _ActiveMembers:
    """A stack's optimizer, as far as it moves the members that take a step together."""

    def __init__(
        self,
        optimizer: StackedOptimizer,
        leaves: Sequence[Tensor],
        names: Sequence[str],
        first: int,
        active: int,
    ) -> None:
        self.leaves = leaves
        self.gradients: Sequence[Tensor | None] = ()
        self._optimizer, self._names = optimizer, names
        self._first, self._active = first, active

    def set_rate(self, progress: Callable[[int], float]) -> None:
        """Give every member the learning rate of where it is in the run."""
        self._optimizer.set_learning_rates(progress)

    def zero_grad(self) -> None:
        """Do nothing: gradients are made anew in every step."""

    def step(self) -> None:
        """Move the members by their gradients."""
        own = dict(zip(self._names, self.gradients, strict=True))
        self._optimizer.step(own, self._first, self._active)


def _differentiate(
    moving: Sequence[_ActiveMembers],
    anchor: Anchor | None,
    held: Sequence[Tensor],
    losses: LossTerms,
) -> None:
    """Give all stacks the gradients of all members' losses.

    A member's losses reach its own tensors only, so one backward pass serves all.

    Args:
        moving: the stacks, in the order of their tensors.
        anchor: pulls at what is held; None: nothing does.
        held: the first of all tensors.
        losses: of all members.
    """
    leaves = [leaf for own in moving for leaf in own.leaves]
    gradients: list[Tensor | None] = list(
        torch.autograd.grad(total(losses), leaves, allow_unused=True)
    )
    _assign(moving, anchor, held, gradients, losses)


def _assign(
    moving: Sequence[_ActiveMembers],
    anchor: Anchor | None,
    held: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    _: LossTerms,
) -> None:
    """Give all stacks their gradients, which stand in the order of their tensors.

    Args:
        moving: the stacks.
        anchor: pulls at what is held; None: nothing does.
        held: the first of all tensors.
        gradients: of all tensors.
    """
    gradients = list(gradients)
    if anchor is not None:
        gradients[: len(held)] = anchor.pulled(gradients[: len(held)], held)
    start = 0
    for own in moving:
        own.gradients = list(gradients[start : start + len(own.leaves)])
        start += len(own.leaves)


class _ComparesRowsError(VmapUnsupportedError):
    """A loss of the step as a whole, in a step with rows that do not count."""


_ROW_KINDS = {
    "labels": "private",
    "private_rows": "private",
    "private": "private",
    "targets": "public",
    "public_labels": "public",
    "public_rows": "public",
    "public": "public",
}
"""Of which rows the entries of a step are; others are of all rows, or of none."""


def _packed(outputs: Outputs, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return outputs as tensors by name; those of rows that do not count become 0.

    So whatever an objective makes of them, no gradient of it comes back.
    """
    packed = {}
    for kind, logits in (("private", outputs.private), ("public", outputs.public)):
        if logits is not None:
            packed[kind] = _blanked(logits, rows.get(f"{kind}_counted"))
    for name, features in outputs.features.items():
        packed[f"layer {name}"] = _blanked(features, rows.get("counted"))
    return packed


def _unpacked(packed: Mapping[str, Tensor]) -> Outputs:
    features = {
        name.removeprefix("layer "): tensor
        for name, tensor in packed.items()
        if name.startswith("layer ")
    }
    return Outputs(packed.get("private"), packed.get("public"), features or NO_FEATURES)


def _blanked(values: Tensor, counted: Tensor | None) -> Tensor:
    """Return the values with 0 in rows that do not count."""
    if counted is None:
        return values
    counts = counted.reshape(-1, *[1] * (values.ndim - 1)) > 0
    return torch.where(counts, values, torch.zeros((), dtype=values.dtype, device=values.device))


def _cut(
    kinds: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    *,
    at: int,
    sizes: Mapping[RowKind, int],
    num_private: int,
) -> dict[str, Tensor]:
    """Return one member's rows that count, of tensors of all members."""
    private, public = sizes.get("private", 0), sizes.get("public", 0)
    cut = {}
    for name, tensor in tensors.items():
        own = tensor[at]
        if name.startswith("layer "):
            cut[name] = torch.cat([own[:private], own[num_private : num_private + public]])
        elif kinds.get(name) == "private":
            cut[name] = own[:private]
        elif kinds.get(name) == "public":
            cut[name] = own[:public]
        else:
            cut[name] = own
    return cut


class _Frozen:
    """A model that never trains, for all members.

    Attributes:
        skeleton: its module, always in evaluation mode.
        own: tensors ``[members, ...]`` where each member has its own.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        shared: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        own_code: bool,
    ) -> None:
        self.skeleton, self.own = skeleton, own
        self._shared = shared
        self._own_code = own_code

    def logits(self, own: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Return what it says about one member's rows."""
        tensors = own or self._shared
        if self._own_code:
            # Somebody else's module may write to its buffers in evaluation mode as well.
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        with torch.no_grad():
            self.skeleton.module.eval()
            return self.skeleton.logits(tensors, inputs)


class _StackedAverage:
    """All members' running averages of one model while it trains.

    Attributes:
        model: whose weights.
        tensors: ``[members, ...]`` by name, as the model's stack keeps its own.
        updates: how many there were, ``[members]``.
    """

    def __init__(
        self, average: Average, model: str, tensors: dict[str, Tensor], updates: np.ndarray
    ) -> None:
        self.model, self.tensors, self.updates = model, tensors, updates
        self._average = average

    def update(self, stack: Stack, here: slice) -> None:
        """Follow the members that have just taken a step."""
        shares = [self._average.share_of_new(int(count)) for count in self.updates[here]]
        device = next(iter(self.tensors.values())).device
        fold_in(
            {name: tensor[here] for name, tensor in self.tensors.items()},
            {name: tensor[here] for name, tensor in stack.tensors.items()},
            torch.tensor(shares, dtype=torch.float64, device=device),
        )
        self.updates[here] += 1


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


def _tell_what_counts(
    skeleton: Skeleton, steps: "_StackedSteps", rows: Mapping[str, Tensor]
) -> None:
    skeleton.counted.weights = rows.get("counted")
    skeleton.counted.fewest = steps.fewest


def _on_outputs(objective: Objective | JointObjective) -> Callable[..., Losses]:
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
        # Padding repeats row 0: any numbers do, for they count for nothing.
        table[real] = np.concatenate(
            [np.empty(0, np.int64), *(batch for own in batches for batch in own)]
        )
        self._table = as_tensor(table).to(device)
        self._device = device

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
    """The batches of neighbours in a stack, one step at a time.

    Args:
        data: the run's rows.
        feeds: which rows each member takes.
        fit: the fit.
        first: place of the first member in the stack.
        order: which members they are: their positions in the cohort.
        seeds: the members' seeds for torch in this fit.
        has_dropout: whether a model needs a key for each step.

    Attributes:
        first: place of the first member in the stack.
        counts: steps of each member, never rising.
        total: steps of the member that takes most.
        seed: of torch's global generators during the fit.
        apart: whether private and public rows go through the models one after the other.
        alone: whether these members have no public rows, though others have.
        targets: what tells the scale of the lesson's targets.
        private_rows: ids of all private rows of each member, in the order of its steps.
        num_private, fewest: of the step last taken: private rows of its width, and rows of its
            smallest batch.
        fewest_of: the latter for private and public rows alone.
    """

    def __init__(
        self,
        data: TrainingData,
        feeds: Sequence[Feed],
        fit: Fit,
        first: int,
        order: Sequence[int],
        seeds: Sequence[int],
        has_dropout: bool,
    ) -> None:
        self.first = first
        self.counts = [feed.steps for feed in feeds]
        self.total = self.counts[0]
        self.seed = int(np.bitwise_xor.reduce(seeds))
        self.num_private = self.fewest = 0
        self.fewest_of: dict[str, int] = {}
        self._data = data
        self._device = device = data.train_inputs.device
        self._private = self._public = self._private_places = None
        own = [feed.private for feed in feeds if feed.private is not None]
        if own:
            self._private = _Padded(own, device)
        shared = [feed.public for feed in feeds if feed.public is not None]
        public = fit.public
        self.targets: Targets | None = None
        self._targets: _OfMembers | None = None
        self.apart = public is not None and public.apart and bool(own) and bool(shared)
        self.alone = public is not None and not shared
        if public is not None and shared:
            self._public = _Padded(shared, device)
            self._public_rows = _tensors_of_members(public.rows, order, device)
            if public.targets is not None:
                each = [own for own in map(public.targets_of, order) if own is not None]
                self.targets = each[0]
                rows_of_targets = [own.tensor for own in each]
                self._targets = _OfMembers(
                    rows_of_targets if public.has_own_targets else rows_of_targets[0], device
                )
        self._keys: Tensor | None = None
        if has_dropout:
            keys = np.stack([step_keys(seed, self.total) for seed in seeds], axis=1)
            self._keys = as_tensor(keys).to(device)
        self._tables: dict[str, tuple[str, _OfMembers]] = {}
        self._shared_tables: dict[str, Tensor] = {}
        for name, table in fit.tables.items():
            if table.of == "whole" and table.is_shared:
                self._shared_tables[name] = as_tensor(table.own(0)).to(device)
            elif table.of == "whole":
                own_tables = np.stack([table.own(at) for at in order])
                self._tables[name] = table.of, _OfMembers(as_tensor(own_tables), device)
            elif table.of == "private" or shared:
                self._tables[name] = table.of, _tensors_of_members(table.values, order, device)
        places = [feed.places for feed in feeds if feed.places is not None]
        if places and any(of == "private" for of, _ in self._tables.values()):
            self._private_places = _Padded(places, device)
        self._feeds = feeds

    @property
    def private_rows(self) -> list[np.ndarray]:
        return [
            np.concatenate([np.empty(0, np.int64), *(feed.private or [])]) for feed in self._feeds
        ]

    def private_sizes(self, step: int, active: int) -> np.ndarray:
        """Return how many private rows each member takes in a step."""
        if self._private is None:
            return np.zeros(active, np.int64)
        sizes: np.ndarray = self._private.sizes[:active, step]
        return sizes

    def tables_of(self, rows: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return what one member's step sees of the tables."""
        if not self._tables:
            return self._shared_tables
        own = {name: rows[f"table {name}"] for name in self._tables}
        return {**self._shared_tables, **own}

    def rows_of(self, rows: Mapping[str, Tensor]) -> StepRows:
        """Return how many rows of each kind a step has, and which count for one member."""
        sizes: dict[RowKind, int] = {}
        if "private_rows" in rows:
            sizes["private"] = len(rows["private_rows"])
        if "public_rows" in rows:
            sizes["public"] = len(rows["public_rows"])
        return StepRows(
            sizes, {kind: rows[f"{kind}_counted"] for kind in sizes if f"{kind}_counted" in rows}
        )

    def batch_of(self, rows: Mapping[str, Tensor]) -> Batch:
        """Return what one member's objective knows beside the outputs."""
        targets = None
        if self.targets is not None:
            targets = self.targets.of(_blanked(rows["targets"], rows.get("public_counted")))
        return Batch(
            labels=rows.get("labels"),
            targets=targets,
            public_labels=rows.get("public_labels"),
            private_rows=rows.get("private_rows"),
            public_rows=rows.get("public_rows"),
            tables=self.tables_of(rows),
        )

    def sizes_of(self, step: int, active: int) -> list[dict[RowKind, int]]:
        """Return how many rows of each kind each member takes in a step."""
        tables: dict[RowKind, _Padded | None] = {"private": self._private, "public": self._public}
        return [
            {
                kind: int(table.sizes[at, step])
                for kind, table in tables.items()
                if table is not None
            }
            for at in range(active)
        ]

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
            shared = self._public_rows.take(positions)
            inputs.append(_rows_of(self._data.public_inputs, shared))
            rows["public_rows"] = shared
            counted.append(weights)
            sizes += self._public.sizes[:active, step]
            self.fewest_of["public"] = int(self._public.sizes[:active, step].min())
            if weights is not None:
                rows["public_counted"] = weights
            if self._targets is not None:
                rows["targets"] = self._targets.take(positions)
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
        for name, (of, values) in self._tables.items():
            if of == "whole":
                rows[f"table {name}"] = values.table[:active]
                continue
            padded = self._public if of == "public" else self._private_places
            assert padded is not None  # noqa: S101 (a table is of rows that the fit has)
            rows[f"table {name}"] = values.take(padded.take(step, active)[0])
        return rows


class _OfMembers:
    """Rows of all members below one another, or the same rows for all.

    Args:
        rows: the same for all, or those of each member.
        device: where they go.

    Attributes:
        table: the rows.
    """

    def __init__(self, rows: Tensor | Sequence[Tensor], device: torch.device) -> None:
        self._starts: Tensor | None = None
        if isinstance(rows, Tensor):
            self.table = rows.to(device)
            return
        self.table = torch.cat(list(rows)).to(device)
        starts = np.cumsum([0, *(len(own) for own in rows[:-1])])
        self._starts = as_tensor(starts).to(device)[:, None]

    def take(self, positions: Tensor) -> Tensor:
        """Return the entries at positions ``[members, width]`` among each member's own."""
        if self._starts is not None:
            positions = positions + self._starts[: len(positions)]
        return _rows_of(self.table, positions)


def _tensors_of_members(
    values: np.ndarray | Sequence[np.ndarray], order: Sequence[int], device: torch.device
) -> _OfMembers:
    """Return rows that are the same for all members, or those of each, in the order of a stack."""
    if isinstance(values, np.ndarray):
        return _OfMembers(as_tensor(values), device)
    return _OfMembers([as_tensor(values[at]) for at in order], device)


def _rows_of(table: Tensor, rows: Tensor) -> Tensor:
    """Return ``table[rows]``; one flat selection is several times as fast."""
    picked: Tensor = table.index_select(0, rows.reshape(-1)).unflatten(0, rows.shape)
    return picked
