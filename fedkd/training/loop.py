"""The loop backend: a cohort's members train one after the other. The reference for any other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from fedkd.losses.reduction import RowKind, StepRows
from fedkd.models.dropout import step_keys
from fedkd.objectives.view import NO_FEATURES
from fedkd.randomness import seeded_for
from fedkd.targets import Targets
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
from fedkd.training.common import (
    NO_PATHS,
    BackendCohort,
    Fit,
    Paths,
    blanked,
    chunks,
    named,
    tapping,
)
from fedkd.training.feeds import Feed
from fedkd.training.frozen import copied_tensors, fold_in
from fedkd.training.gradients import (
    PLAIN,
    Anchor,
    Clipped,
    Clipping,
    RowNorms,
    Rules,
    SplitLosses,
    check_rows_alone,
    clipped_sums,
    gradient_norms,
    not_finite,
    plain_gradients,
)
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
from fedkd.training.pool import (
    PREDICT_ROWS,
    ModelPool,
    Slot,
    parts_of,
    states_of,
    with_parts,
)
from fedkd.training.private import PrivateLearning, StillBuffers
from fedkd.training.state import Arrays, ClientState, ModelState, to_arrays
from fedkd.training.steps import LossTerms, RatedOptimizer, StepRecords, Steps, backward
from fedkd.training.tables import Table

StepLosses = Callable[[Mapping[str, Outputs], Batch], Losses]
"""One step's named losses from the outputs of every model in it, by name."""


class LoopCohort(BackendCohort):
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
        private: PrivateLearning | None = None,
    ) -> None:
        states = states_of(members, model, pool, streams.seed)
        super().__init__(
            members,
            states,
            model=model,
            optimizer=optimizer,
            data=data,
            pool=pool,
            streams=streams,
            private=private,
        )
        self._members = self._given
        self._records = [StepRecords() for _ in members]
        self._slots = {
            name: pool.slots(name, settings, len(members))
            for name, settings in self._models.items()
        }
        self._parts: list[ModelState | None] = []
        for position, state in enumerate(states):
            for name, slots in self._slots.items():
                slots[position].load(state.models[name])
            self._parts.append(state.models.get(PARTS))

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
            losses_of = _on_outputs(objective, beside)
            slot = None if beside is None else self._pool.slot_of(beside)
            kept = [
                self._fit_with_parts(fit, position, losses_of, beside, slot)
                for position in range(len(self._members))
            ]
        elif objective.idle:
            return self._nothing_kept(fit)
        else:
            architectures = self._models_of(fit)
            bound = self._pool.bound(objective, architectures)
            slot = self._pool.parts_slot(objective, architectures)
            fit = fit.with_layers(bound.layers)
            kept = []
            for position in range(len(self._members)):
                lesson = fit.lesson(position)
                alone = lesson is not None and not len(lesson.rows)
                losses_of = partial(bound.losses, objective, alone=alone)
                kept.append(self._fit_with_parts(fit, position, losses_of, bound, slot))
        return [own for own in kept if own is not None]

    def _fit_with_parts(
        self,
        fit: Fit,
        position: int,
        losses_of: StepLosses,
        beside: BoundLearners | FitParts | None,
        slot: Slot | None,
    ) -> RowOutputs | None:
        """Train one member's models, and its own parts in a slot."""
        if beside is None or slot is None:
            return self._fit_member(fit, position, losses_of)
        own = self._parts[position]
        slot.load(parts_of(beside, own, self._streams.seed, self.clients[position]))
        kept = self._fit_member(fit, position, losses_of, slot)
        self._parts[position] = with_parts(own, slot.state())
        return kept

    def _fit_member(
        self, fit: Fit, position: int, losses_of: StepLosses, parts: Slot | None = None
    ) -> RowOutputs | None:
        """Train one member's models, and the parts in a slot."""
        lesson = fit.lesson(position)
        seed, feed = Feed.drawn(
            self._members[position], self._streams, fit.key, fit.passes(position), lesson
        )
        self._count_fit(position, fit, feed)
        slots = {name: self._slots[name][position] for name in fit.learning}
        tables = {name: (table.of, table.own(position)) for name, table in fit.tables.items()}
        steps = _Steps(self._data, feed, lesson, tables)
        averages = {
            name: self._average(name, average, position) for name, average in fit.averages.items()
        }
        kept = _Kept() if fit.keep_outputs else None
        modules = {name: slot.module for name, slot in slots.items()}
        rules = {
            name: rule.for_members([position]) if isinstance(rule, Clipped) else rule
            for name, rule in fit.rules.items()
        }
        clipping = Clipping(rules, modules, has_parts=parts is not None)
        still = {
            name: StillBuffers(dict(modules[name].named_buffers())) for name in fit.private_models
        }
        with ExitStack() as stack:
            if clipping.norms is not None:
                stack.enter_context(clipping.norms.watching())
            features = {
                name: stack.enter_context(tapping(slot.module, fit.paths[name]))
                for name, slot in slots.items()
                if name in fit.paths
            }
            frozen = {
                name: stack.enter_context(self._frozen_of(name, like, position, averages, fit))
                for name, like in fit.frozen.items()
            }
            for slot in [*slots.values(), *([] if parts is None else [parts])]:
                stack.enter_context(slot.with_optimizer(fit.optimizer))
            # Functions such as F.dropout draw from torch's global generator, a model of one's own
            # from wherever it likes.
            stack.enter_context(seeded_for(own_code=self._has_own_code, seed=seed))
            step = _Step(slots, fit, features, frozen, losses_of, clipping)
            self._take_steps(step, steps, seed, position, parts, averages, kept)
        for name, before in still.items():
            before.check(name, dict(modules[name].named_buffers()))
        for name, live in averages.items():
            self._kept.keep_average(
                name, live.model, position, to_arrays(live.tensors), live.updates
            )
        if kept is None:
            return None
        rows = np.concatenate([np.zeros(0, np.int64), *(feed.private or [])])
        return self._kept_rows(fit, rows, kept.parts)

    def _take_steps(
        self,
        step: "_Step",
        steps: "_Steps",
        seed: int,
        position: int,
        parts: Slot | None,
        averages: Mapping[str, "_LiveAverage"],
        kept: "_Kept | None",
    ) -> None:
        slots = step.slots
        learning = [*slots.values(), *([] if parts is None else [parts])]
        has_dropout = any(slot.dropout for slot in slots.values())
        keys = as_tensor(step_keys(seed, steps.count)).to(self._device) if has_dropout else None
        settings = step.fit.optimizer or self._optimizer_settings
        weights = [each for slot in slots.values() for each in slot.learnt]
        held = {name: slot.learnt for name, slot in slots.items()}
        anchor = Anchor.of(step.fit.rules, held)
        noise = None
        if step.clipping:
            noise = step.clipping.noise([0], [each.shape for each in weights], weights[0])
        training = Steps(
            [RatedOptimizer(slot.optimizer, settings, steps.count) for slot in learning],
            steps.count,
            progress=self._streams.progress,
            gradient=None if anchor is None else partial(_backward_held, anchor, weights),
            dropout=[slot.dropout for slot in slots.values()],
            keys=keys,
            records=self._records[position],
        )
        for slot in learning:
            # Every fit, because an evaluation in between leaves the model in evaluation mode.
            slot.module.train()
        for at in training:
            rows = steps.take(at.number)
            gradient = None
            if step.clipping:
                key = None if keys is None else keys[at.number]
                outputs = step.outputs(rows, apart=steps.apart, key=key)
                losses, gradients = step.clipped(rows, outputs, key, apart=steps.apart)
                noised = gradients if noise is None else noise.onto(gradients)
                gradient = partial(_assign, weights, anchor, noised)
            else:
                outputs = step.outputs(rows, apart=steps.apart)
                losses = rows.of_step.means(step.losses_of(outputs, rows.batch))
            if anchor is not None and losses:
                losses["proximal"] = anchor.penalty(weights, stacked=False)
            training.descend(losses, gradient)
            if kept is not None:
                kept.add(outputs[step.fit.learning[0]], rows.num_private)
            for live in averages.values():
                live.update(self._slots[live.model][position])
        for slot in learning:
            slot.keep_buffers()

    # -- models that never train -----------------------------------------------------------

    def _average(self, name: str, average: Average, position: int) -> "_LiveAverage":
        """Return a member's running average, which begins as its model is."""
        model = average.model or self._first
        known = self._kept.average(name, model, position)
        if known is None:
            tensors = {
                key: tensor.clone() for key, tensor in self._slots[model][position].tensors.items()
            }
            return _LiveAverage(average, model, tensors, 0)
        weights, updates = known
        return _LiveAverage(average, model, copied_tensors(weights, self._device), updates)

    @contextmanager
    def _frozen_of(
        self,
        name: str,
        like: str,
        position: int,
        averages: Mapping[str, "_LiveAverage"],
        fit: Fit,
    ) -> Iterator["_Frozen"]:
        """Yield a member's model that never trains, with its layers tapped."""
        settings = self._models[like]
        module = self._pool.frozen_module(settings)
        if name in averages:
            tensors = averages[name].tensors
        else:
            tensors = copied_tensors(self._frozen_weights(name, like, position), self._device)
        paths = fit.paths.get(name, NO_PATHS)
        with tapping(module, paths) as seen:
            yield _Frozen(module, tensors, paths, seen, own_code=settings.is_own)

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
        results = []
        for position, member in enumerate(self._members):
            rows, inputs, labels = self._asked(on, position)
            self._count_predicted(position, like, len(inputs))
            slot = self._slots[like][position]
            if name in self._models:
                module, dropout = slot.module, slot.dropout
                tensors = {key: buffer.clone() for key, buffer in module.named_buffers()}
            else:
                module, dropout = self._pool.frozen_module(settings), None
                weights = self._frozen_weights(name, like, position)
                tensors = copied_tensors(weights, self._device)
            module.train(mode == "train" and name in self._models)
            seed = self._mode_seed(member.client, number)
            cuts = chunks(len(inputs), batch_rows, mode)
            keys = as_tensor(step_keys(seed, len(cuts))).to(self._device)
            parts: list[tuple[Tensor, Mapping[str, Tensor]]] = []
            with (
                tapping(module, paths) as seen,
                seeded_for(own_code=settings.is_own, seed=seed),
                torch.inference_mode(),
            ):
                for key, cut in zip(keys, cuts, strict=True):
                    if dropout is not None and mode == "train":
                        dropout.begin(key)
                    # Buffers are copies, so those of the member stay as they are.
                    logits = functional_call(
                        module, dict(tensors), (inputs[cut],), tie_weights=False
                    )
                    parts.append((logits, named(seen, paths)))
            if dropout is not None:
                dropout.end()
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
        slots = self._slots[model or self._first]
        out = np.empty((len(slots), len(inputs), self._data.num_classes), np.float32)
        for position, slot in enumerate(slots):
            self._count_predicted(position, model or self._first, len(inputs))
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

    # -- weights and states ----------------------------------------------------------------

    def weights(self, *, model: str | None = None) -> list[Arrays]:  # noqa: D102
        if model is not None and model not in self._models:
            return self._weights_at_rest(model)
        return [slot.weights() for slot in self._slots[model or self._first]]

    def load_weights(  # noqa: D102
        self, weights: WeightsForMembers, *, model: str | None = None
    ) -> None:
        slots = self._slots[model or self._first]
        for slot, own in zip(slots, weights_of_each(weights, len(slots)), strict=True):
            slot.load_weights(own)

    def reset_optimizers(self, *, model: str | None = None) -> None:  # noqa: D102
        for name, slots in self._slots.items():
            if model in (None, name):
                for slot in slots:
                    slot.optimizer.state.clear()
        if model is None:
            self._parts = [None if own is None else ModelState(own.weights) for own in self._parts]

    def parts(self, name: str) -> list[Arrays | None]:  # noqa: D102
        return [None if own is None else part_in(own.weights, name) for own in self._parts]

    def states(self) -> list[ClientState]:  # noqa: D102
        states = []
        for position, parts in enumerate(self._parts):
            own = {name: slots[position].state() for name, slots in self._slots.items()}
            models = own if parts is None else {**own, PARTS: parts}
            states.append(ClientState(models, self._kept.of(position)))
        return states

    def metrics(self) -> list[dict[str, float]]:  # noqa: D102
        return [
            {f"loss/{name}": float(losses.mean()) for name, losses in records.stacked().items()}
            for records in self._records
        ]


class _Step:
    """What a member's models compute in each step of a fit.

    Attributes:
        slots: the models that learn, by name.
        losses_of: what is minimised.
        clipping: which models have the gradients of their rows clipped.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot],
        fit: Fit,
        features: Mapping[str, Mapping[str, Tensor]],
        frozen: Mapping[str, "_Frozen"],
        losses_of: StepLosses,
        clipping: Clipping,
    ) -> None:
        self.clipping = clipping
        self.slots = slots
        self.fit = fit
        self.losses_of = losses_of
        self._taps = {
            name: (features.get(name, NO_FEATURES), fit.paths.get(name, NO_PATHS)) for name in slots
        }
        self._frozen = frozen
        self._seen_alone = False

    def outputs(
        self, rows: "_StepInputs", *, apart: bool, key: Tensor | None = None
    ) -> dict[str, Outputs]:
        """Return what every model puts out, by its name.

        Args:
            rows: of the step.
            apart: whether private and public ones go through the models one after the other.
            key: of the dropout in this step; None: it has begun.
        """
        outputs = {}
        inputs, num_private = rows.inputs, rows.num_private
        for number, (name, slot) in enumerate(self.slots.items()):
            self.clipping.begin(name, None, apart=apart)
            if slot.dropout is not None and key is not None:
                slot.dropout.begin(key, rows=None if apart else rows.numbers, model=number)
            seen, paths = self._taps[name]
            if apart:
                outputs[name] = Outputs.of_passes(
                    (slot.module(inputs[:num_private]), named(seen, paths)),
                    (slot.module(inputs[num_private:]), named(seen, paths)),
                )
            else:
                logits = slot.module(inputs)
                outputs[name] = Outputs.split(logits, num_private, named(seen, paths))
            if name in self.fit.heads:
                head = slot.module.get_submodule(self.fit.heads[name])
                outputs[name] = outputs[name]._replace(head=head)
        for name, model in self._frozen.items():
            outputs[name] = model.outputs(inputs, num_private)
        if rows.counted is not None:
            return {name: _blanked(each, rows.counted) for name, each in outputs.items()}
        return outputs

    # -- clipped gradients of rows ---------------------------------------------------------

    def clipped(
        self,
        rows: "_StepInputs",
        outputs: Mapping[str, Outputs],
        key: Tensor | None,
        *,
        apart: bool,
    ) -> tuple[dict[str, Tensor], list[Tensor | None]]:
        """Return the losses' means, and all models' gradients, each by its own rule."""
        losses, gradients, odd = self._clipped(rows, outputs, key)
        if odd is not None:
            # The losses stay those of all rows: nobody is to overlook that one is no number.
            rows = rows.without(odd)
            again = self.outputs(rows, apart=apart, key=key)
            _, gradients, _ = self._clipped(rows, again, key)
        return losses, gradients

    def _clipped(
        self, rows: "_StepInputs", outputs: Mapping[str, Outputs], key: Tensor | None
    ) -> tuple[dict[str, Tensor], list[Tensor | None], Tensor | None]:
        """Return what `clipped` does, and which private rows have gradients that are not finite."""
        losses = self.losses_of(outputs, rows.batch)
        split = SplitLosses.of(losses, rows.of_step)
        if not self._seen_alone and rows.counted is None and rows.num_private > 1:
            self._look_at_one_row(losses, rows, outputs)
        gradients: dict[str, Sequence[Tensor | None]] = {}
        sizes: list[Tensor] = []
        if self.clipping.norms is not None:
            gradients |= self._by_norms(split, self.clipping.norms, sizes)
        if self.clipping.row_by_row:
            gradients |= self._row_by_row(split, rows, outputs, key, sizes)
        for name, slot in self.slots.items():
            if name not in gradients:
                gradients[name] = plain_gradients(split.means, slot.learnt)
        every = [each for name in self.slots for each in gradients[name]]
        return split.means, every, not_finite(sizes)

    def _look_at_one_row(
        self, losses: Losses, rows: "_StepInputs", outputs: Mapping[str, Outputs]
    ) -> None:
        """Refuse losses in which rows see each other; once a fit."""
        first = {name: each.with_first(rows.num_private) for name, each in outputs.items()}
        batch = rows.batch
        beside = batch._replace(
            labels=None if batch.labels is None else batch.labels[:1],
            private_rows=None if batch.private_rows is None else batch.private_rows[:1],
            tables={
                name: each[:1] if self.fit.tables[name].of == "private" else each
                for name, each in batch.tables.items()
            },
        )
        alone = self.losses_of(first, beside)
        check_rows_alone(losses, rows.of_step, alone, _rows_of(beside))
        self._seen_alone = True

    def _by_norms(
        self, split: SplitLosses, norms: RowNorms, sizes: list[Tensor]
    ) -> dict[str, Sequence[Tensor | None]]:
        came_back = norms.came_back(split.private)
        gradients: dict[str, Sequence[Tensor | None]] = {}
        for name, rule in self.clipping.by_norms.items():
            size = norms.norms(
                name, norms.read[name], came_back[name], len(split.private), stacked=False
            )
            sizes.append(size)
            gradients[name] = split.weighted_gradients(rule.shares(size), self.slots[name].learnt)
        norms.end()
        return gradients

    def _row_by_row(
        self,
        split: SplitLosses,
        step_rows: "_StepInputs",
        outputs: Mapping[str, Outputs],
        key: Tensor | None,
        sizes: list[Tensor],
    ) -> dict[str, Sequence[Tensor | None]]:
        inputs, batch = step_rows.inputs, step_rows.batch
        num_private = len(split.private)
        private = {"labels": batch.labels, "private_rows": batch.private_rows}
        rows = {name: each for name, each in private.items() if each is not None}
        for name, table in batch.tables.items():
            if self.fit.tables[name].of == "private":
                rows[f"table {name}"] = table
        rows["inputs"] = inputs[:num_private]
        rows["number"] = torch.arange(num_private, device=inputs.device)
        if step_rows.counted is not None:
            rows["counted"] = step_rows.counted

        def of_row(weights: dict[str, dict[str, Tensor]], row: dict[str, Tensor]) -> Tensor:
            own = {name: each[None] for name, each in row.items()}
            alone = {}
            for number, (name, slot) in enumerate(self.slots.items()):
                if slot.dropout is not None and key is not None:
                    slot.dropout.begin(key, rows=own["number"], model=number)
                seen, paths = self._taps[name]
                changed = slot.by_all_names(weights.get(name, {}))
                logits = functional_call(slot.module, changed, (own["inputs"],), tie_weights=False)
                alone[name] = Outputs(private=logits, features=dict(named(seen, paths)))
                if name in self.fit.heads:
                    head = partial(_run_at, slot.module, self.fit.heads[name], changed)
                    alone[name] = alone[name]._replace(head=head)
            for name, model in self._frozen.items():
                alone[name] = model.outputs(own["inputs"], 1)
            tables = {name: own.get(f"table {name}", each) for name, each in batch.tables.items()}
            beside = batch._replace(
                labels=own.get("labels"), private_rows=own.get("private_rows"), tables=tables
            )
            if "counted" in own:
                alone = {name: _blanked(each, own["counted"]) for name, each in alone.items()}
            together = {
                name: each.beside_public(outputs[name], num_private) for name, each in alone.items()
            }
            one = SplitLosses.of(
                self.losses_of(together, beside), _rows_of(beside, own.get("counted"))
            )
            return one.private.sum()

        weights = {
            name: {path: each.detach() for path, each in self.slots[name].learnt_by_name.items()}
            for name in self.clipping.row_by_row
        }
        each_row = torch.vmap(torch.func.grad(of_row), in_dims=(None, 0), randomness="different")(
            weights, rows
        )
        gradients: dict[str, Sequence[Tensor | None]] = {}
        for name, rule in self.clipping.row_by_row.items():
            slot = self.slots[name]
            size = gradient_norms(each_row[name], stacked=False)
            sizes.append(size)
            clipped = clipped_sums(rule, each_row[name], size)
            public = split.public_gradients(slot.learnt)
            gradients[name] = [
                clipped[path] if more is None else clipped[path] + more
                for path, more in zip(slot.learnt_by_name, public, strict=True)
            ]
        return gradients


def _rows_of(batch: Batch, counted: Tensor | None = None) -> StepRows:
    """Return how many rows of each kind a step has, and which private ones count; None: all."""
    sizes: dict[RowKind, int] = {}
    if batch.private_rows is not None:
        sizes["private"] = len(batch.private_rows)
    if batch.public_rows is not None:
        sizes["public"] = len(batch.public_rows)
    return StepRows(sizes, {} if counted is None else {"private": counted})


def _blanked(outputs: Outputs, counted: Tensor) -> Outputs:
    """Return outputs with 0 in private rows that do not count."""
    assert outputs.private is not None  # noqa: S101 (only private rows may not count)
    features = {}
    for name, each in outputs.features.items():
        others = counted.new_ones(len(each) - len(counted))
        features[name] = blanked(each, torch.cat([counted, others]))
    return outputs._replace(private=blanked(outputs.private, counted), features=features)


def _backward_held(anchor: Anchor, weights: Sequence[nn.Parameter], losses: LossTerms) -> None:
    """Give weights the gradients of the losses and of the pull of an anchor."""
    backward(losses)
    _assign(weights, anchor, [weight.grad for weight in weights], losses)


def _assign(
    weights: Sequence[nn.Parameter],
    anchor: Anchor | None,
    gradients: Sequence[Tensor | None],
    _: LossTerms,
) -> None:
    """Give weights their gradients, and the pull of an anchor."""
    if anchor is not None:
        gradients = anchor.pulled(gradients, weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient


def _run_at(module: nn.Module, path: str, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """Run the layer at a path with other weights than its own, as far as there are others."""
    prefix = f"{path}." if path else ""
    own = {
        name.removeprefix(prefix): each for name, each in weights.items() if name.startswith(prefix)
    }
    output: Tensor = functional_call(module.get_submodule(path), own, (inputs,), tie_weights=False)
    return output


class _Frozen:
    """A model that never trains, at work for one member."""

    def __init__(
        self,
        module: nn.Module,
        tensors: Mapping[str, Tensor],
        paths: Paths,
        seen: Mapping[str, Tensor],
        *,
        own_code: bool,
    ) -> None:
        self._module, self._tensors, self._paths, self._seen = module, tensors, paths, seen
        self._own_code = own_code

    def outputs(self, inputs: Tensor, num_private: int) -> Outputs:
        """Return what it says about a step's rows; always in evaluation mode."""
        tensors = dict(self._tensors)
        if self._own_code:
            # Somebody else's module may write to its buffers in evaluation mode as well.
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        with torch.no_grad():
            self._module.eval()
            logits = functional_call(self._module, tensors, (inputs,), tie_weights=False)
        return Outputs.split(logits, num_private, named(self._seen, self._paths))


class _LiveAverage:
    """A member's running average while its model trains."""

    def __init__(
        self, average: Average, model: str, tensors: dict[str, Tensor], updates: int
    ) -> None:
        self.model, self.tensors, self.updates = model, tensors, updates
        self._average = average

    def update(self, slot: Slot) -> None:
        """Follow the model after a step."""
        slot.keep_buffers()
        fold_in(self.tensors, slot.tensors, self._average.share_of_new(self.updates))
        self.updates += 1


class _Kept:
    """What a model puts out for private rows while it trains.

    Attributes:
        parts: logits and features, step by step.
    """

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Mapping[str, Tensor]]] = []

    def add(self, outputs: Outputs, num_private: int) -> None:
        """Keep what there is of a step."""
        assert outputs.private is not None  # noqa: S101 (a fit without private rows keeps nothing)
        features = {name: each[:num_private].detach() for name, each in outputs.features.items()}
        self.parts.append((outputs.private.detach(), features))


def _on_outputs(
    objective: ObjectiveFunction | JointObjective, beside: FitParts | None = None
) -> StepLosses:
    """Hand an objective what it expects: one model's outputs, or those of several by name."""
    of_step: Any = objective
    parts = NO_PARTS if beside is None else beside.called

    def losses(outputs: Mapping[str, Outputs], batch: Batch) -> Losses:
        batch = batch._replace(parts=parts)
        seen = outputs if len(outputs) > 1 else next(iter(outputs.values()))
        named: Losses = of_step(seen, batch)
        return named

    return losses


class _StepInputs(NamedTuple):
    """What a member's models see in a step.

    Attributes:
        inputs: of all rows, private ones first.
        num_private: how many these are.
        batch: what the objective knows of the rows.
        counted: 1 for each private row that counts, else 0; None: all do.
        numbers: each row's number among those that count, as dropout knows it; None: its place.
    """

    inputs: Tensor
    num_private: int
    batch: Batch
    counted: Tensor | None = None
    numbers: Tensor | None = None

    @property
    def of_step(self) -> StepRows:
        """How many rows there are of each kind, and which count."""
        return _rows_of(self.batch, self.counted)

    def without(self, odd: Tensor) -> "_StepInputs":
        """Return the same where private rows with 1 in ``odd`` count for nothing."""
        counted = (1 - odd) if self.counted is None else self.counted * (1 - odd)
        others = counted.new_ones(len(self.inputs) - self.num_private)
        inputs = blanked(self.inputs, torch.cat([counted, others]))
        return self._replace(inputs=inputs, counted=counted)


class _Steps:
    """A member's batches as tensors, one step at a time.

    Args:
        data: the run's rows.
        feed: which rows each step takes.
        public: the member's lesson.
        tables: of which rows each table is, and the member's values, by name.

    Attributes:
        count: how many there are.
        apart: whether private and public rows go through the model one after the other.
    """

    def __init__(
        self,
        data: TrainingData,
        feed: Feed,
        public: PublicLesson | None,
        tables: Mapping[str, tuple[str, np.ndarray]],
    ) -> None:
        self.count = feed.steps
        self.apart = (
            public is not None
            and public.apart
            and feed.private is not None
            and feed.public is not None
        )
        self._data = data
        self._private: Sequence[Tensor] | None = None
        self._public: Sequence[tuple[Tensor, Tensor]] | None = None
        self._targets: Targets | None = None
        device = data.train_inputs.device
        if feed.private is not None:
            self._private = _on_device(feed.private, device)
        if public is not None and feed.public is not None:
            positions = public.rows_of(0)
            rows = [positions[batch] for batch in feed.public]
            self._public = list(
                zip(_on_device(rows, device), _on_device(feed.public, device), strict=True)
            )
            targets = public.targets_of(0)
            if targets is not None:
                self._targets = targets.of(targets.tensor.to(device))
        self._tables = {
            name: (of, as_tensor(values).to(device)) for name, (of, values) in tables.items()
        }
        self._places: Sequence[Tensor] = ()
        if feed.places is not None and any(of == "private" for of, _ in tables.values()):
            self._places = _on_device(feed.places, device)

    def take(self, step: int) -> _StepInputs:
        """Return what the models see in a step."""
        inputs: list[Tensor] = []
        num_private = 0
        labels = targets = public_labels = private_rows = public_rows = counted = None
        if self._private is not None:
            private_rows = self._private[step]
            inputs.append(self._data.train_inputs.index_select(0, private_rows))
            labels = self._data.train_labels.index_select(0, private_rows)
            if not len(private_rows):
                # Layers and objectives need a row: one that is nobody's, and counts for nothing.
                counted = inputs[0].new_zeros(1)
                inputs[0] = inputs[0].new_zeros(1, *inputs[0].shape[1:])
                labels, private_rows = labels.new_zeros(1), private_rows.new_zeros(1)
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
            tables=self._step_tables(step) if self._tables else NO_FEATURES,
        )
        every = torch.cat(inputs) if len(inputs) > 1 else inputs[0]
        # The one that stands in has no number, and the public rows theirs.
        numbers = None if counted is None else torch.arange(len(every), device=every.device) - 1
        return _StepInputs(every, num_private, batch, counted, numbers)

    def _step_tables(self, step: int) -> dict[str, Tensor]:
        """Return what a step sees of each table; one of rows that it does not take is not there."""
        seen = {}
        for name, (of, values) in self._tables.items():
            if of == "whole":
                seen[name] = values
            elif of == "private":
                seen[name] = values.index_select(0, self._places[step])
            elif self._public is not None:
                seen[name] = values.index_select(0, self._public[step][1])
        return seen


def _on_device(batches: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, ...]:
    """Return each batch as a tensor; all of them go to the device in one piece."""
    if not batches:
        return ()
    together = as_tensor(np.concatenate(batches)).to(device)
    parts: tuple[Tensor, ...] = together.split([len(batch) for batch in batches])
    return parts
