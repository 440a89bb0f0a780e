"""One step of stacked members: forward passes, losses, gradients; row by row where a rule clips."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fedkd.losses.reduction import RowKind, StepRows, WholeStep
from fedkd.objectives.view import NO_FEATURES
from fedkd.training.common import NO_PATHS, Fit, blanked, named
from fedkd.training.gradients import (
    Anchor,
    Clipping,
    Noise,
    RowNorms,
    SplitLosses,
    check_rows_alone,
    clipped_sums,
    gradient_norms,
    not_finite,
    plain_gradients,
)
from fedkd.training.objectives import Batch, Losses, Outputs
from fedkd.training.stacked_batches import StackedBatches
from fedkd.training.stacked_frozen import StackedFrozen
from fedkd.training.stacking import Skeleton, Stack, StackedOptimizer, VmapUnsupportedError
from fedkd.training.steps import LossTerms, total

TRY_LOOP = "engine.vectorize: loop trains one client at a time"

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


class StackedStep:
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
        frozen: Mapping[str, StackedFrozen],
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
        self._seen_alone = False

    def run(
        self,
        steps: StackedBatches,
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
        steps: StackedBatches,
        handed: Sequence[dict[str, Tensor]],
        resting: Mapping[str, dict[str, Tensor]],
        rows: dict[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Do for one member what `run` does; this is what vmap runs."""
        outputs, kept = self._forward(steps, handed, resting, rows)
        return self._judged(steps, outputs, handed, rows), kept

    def _forward(
        self,
        steps: StackedBatches,
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
        steps: StackedBatches,
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
        steps: StackedBatches,
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

    def noise(self, order: Sequence[int]) -> Noise | None:
        """Return what is added to all members' gradients; None where nothing is.

        Args:
            order: which members they are, in the order of the stack.
        """
        if not self.clipping:
            return None
        skeleton, stack = next(iter(self._skeletons.values())), self.learning[0]
        shapes = [torch.Size(skeleton.shapes[name]) for name in skeleton.trainable]
        turned = [name in skeleton.transposed for name in skeleton.trainable]
        return self.clipping.noise(order, shapes, stack.tensors[skeleton.trainable[0]], turned)

    def clipped(
        self,
        steps: StackedBatches,
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
        losses, kept, gradients, odd = self._clipped(steps, handed, resting, rows, leaves)
        if odd is not None:
            # The losses stay those of all rows: nobody is to overlook that one is no number.
            rows = _without(rows, odd)
            *_, gradients, _ = self._clipped(steps, handed, resting, rows, leaves)
        return losses, kept, gradients

    def _clipped(
        self,
        steps: StackedBatches,
        handed: Sequence[dict[str, Tensor]],
        resting: Mapping[str, dict[str, Tensor]],
        rows: dict[str, Tensor],
        leaves: Sequence[Sequence[Tensor]],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor | None], Tensor | None]:
        """Return what `clipped` does, and which private rows have gradients that are not finite."""
        own_leaves = dict(zip(self._skeletons, leaves, strict=False))
        gradients: dict[str, Sequence[Tensor | None]] = {}
        sizes: list[Tensor] = []
        norms = self.clipping.norms
        if norms is not None:
            outputs, kept, split = self._by_norms(
                norms, steps, handed, resting, rows, own_leaves, gradients, sizes
            )
        else:
            forward = torch.vmap(partial(self._forward, steps), randomness="different")
            outputs, kept = forward(handed, resting, rows)
            split = self._split(steps, outputs, handed, rows)
        if self.clipping.row_by_row:
            self._by_rows(
                split, outputs, steps, handed, resting, rows, own_leaves, gradients, sizes
            )
        for name, own in own_leaves.items():
            if name not in gradients:
                gradients[name] = plain_gradients(split.means, own)
        every = [each for name in own_leaves for each in gradients[name]]
        return split.means, kept, every, not_finite(sizes)

    def _by_rows(
        self,
        split: SplitLosses,
        outputs: Mapping[str, dict[str, Tensor]],
        steps: StackedBatches,
        handed: Sequence[dict[str, Tensor]],
        resting: Mapping[str, dict[str, Tensor]],
        rows: dict[str, Tensor],
        leaves: Mapping[str, Sequence[Tensor]],
        gradients: dict[str, Sequence[Tensor | None]],
        sizes: list[Tensor],
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
            size = gradient_norms(each_row[name], stacked=True)
            sizes.append(size)
            own_rule = rule.for_members(steps.order[: len(size)])
            sums = clipped_sums(own_rule, each_row[name], size)
            public = split.public_gradients(leaves[name])
            gradients[name] = [
                clipped if more is None else clipped + more
                for clipped, more in zip(sums.values(), public, strict=True)
            ]

    def _by_norms(
        self,
        norms: RowNorms,
        steps: StackedBatches,
        handed: Sequence[dict[str, Tensor]],
        resting: Mapping[str, dict[str, Tensor]],
        rows: dict[str, Tensor],
        leaves: Mapping[str, Sequence[Tensor]],
        gradients: dict[str, Sequence[Tensor | None]],
        sizes: list[Tensor],
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
            sizes.append(size)
            own_rule = rule.for_members(steps.order[:members])
            gradients[name] = split.weighted_gradients(own_rule.shares(size), leaves[name])
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
        steps: StackedBatches,
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

        if not self._seen_alone:
            self._look_at_one_row(steps, outputs, handed, rows)
        found = torch.vmap(of_member, randomness="different")(outputs, handed, rows)
        return SplitLosses(found["private"], found.get("public"), found["means"])

    def _look_at_one_row(
        self,
        steps: StackedBatches,
        outputs: Mapping[str, dict[str, Tensor]],
        handed: Sequence[dict[str, Tensor]],
        rows: dict[str, Tensor],
    ) -> None:
        """Refuse losses in which rows see each other, by one of one member; once a fit."""
        if steps.num_private < 2:
            return
        counted = rows.get("private_counted")
        at = 0 if counted is None else int(counted[:, 1].argmax())
        if counted is not None and not counted[at, 1]:
            return
        tensors = [{name: each[at] for name, each in stack.items()} for stack in handed]
        kinds = {**_ROW_KINDS, **self._table_kinds()}

        def of_first(width: int) -> tuple[Losses, StepRows]:
            own = {name: each[at] for name, each in rows.items() if name != "counted"}
            for name in own:
                if kinds.get(name) == "private" or name == "private_counted":
                    own[name] = own[name][:width]
            seen = {}
            for name, packed in outputs.items():
                seen[name] = _unpacked({key: each[at] for key, each in packed.items()})
                if width == 1:
                    seen[name] = seen[name].with_first(steps.num_private)
            losses = self._of_objective(seen, steps.batch_of(own), steps, tensors, own)
            return losses, steps.rows_of(own)

        check_rows_alone(*of_first(steps.num_private), *of_first(1))
        self._seen_alone = True

    def _each_row(
        self,
        steps: StackedBatches,
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
        steps: StackedBatches,
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
        steps: StackedBatches,
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


def _private(outputs: Outputs, steps: StackedBatches) -> dict[str, Tensor]:
    """Return logits and features of the private rows; "" stands for the logits."""
    assert outputs.private is not None  # noqa: S101 (a fit without private rows keeps nothing)
    features = {name: each[: steps.num_private] for name, each in outputs.features.items()}
    return {"": outputs.private, **features}


class ActiveMembers:
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


def differentiate(
    moving: Sequence[ActiveMembers],
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
    assign(moving, anchor, held, gradients, losses)


def assign(
    moving: Sequence[ActiveMembers],
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


def _packed(outputs: Outputs, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return outputs as tensors by name; those of rows that do not count become 0.

    So whatever an objective makes of them, no gradient of it comes back.
    """
    packed = {}
    for kind, logits in (("private", outputs.private), ("public", outputs.public)):
        if logits is not None:
            packed[kind] = blanked(logits, rows.get(f"{kind}_counted"))
    for name, features in outputs.features.items():
        packed[f"layer {name}"] = blanked(features, rows.get("counted"))
    return packed


def _unpacked(packed: Mapping[str, Tensor]) -> Outputs:
    features = {
        name.removeprefix("layer "): tensor
        for name, tensor in packed.items()
        if name.startswith("layer ")
    }
    return Outputs(packed.get("private"), packed.get("public"), features or NO_FEATURES)


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


def _without(rows: dict[str, Tensor], odd: Tensor) -> dict[str, Tensor]:
    """Return a step's rows, of which some private ones count for nothing.

    Args:
        rows: of all members.
        odd: 1 for each private row that is not to count ``[members, private]``.
    """
    inputs = rows["inputs"]
    every = rows.get("counted", odd.new_ones(inputs.shape[:2]))
    private = every[:, : odd.shape[1]] * (1 - odd)
    every = torch.cat([private, every[:, odd.shape[1] :]], dim=1)
    return {
        **rows,
        "private_counted": private,
        "counted": every,
        "inputs": blanked(inputs, every),
    }


def _tell_what_counts(
    skeleton: Skeleton, steps: StackedBatches, rows: Mapping[str, Tensor]
) -> None:
    skeleton.counted.weights = rows.get("counted")
    skeleton.counted.fewest = steps.fewest
