"""Composed objectives bound to models: their layers, what is trained beside them, can they stack.

What is trained beside the models (projectors and the like) is called parts. Parts belong to one
client, learn with its models and never leave it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedkd.inputs import Shape
from fedkd.losses.reduction import Loss, RowKind, StepRows, WholeStep
from fedkd.models import ModelSettings, build_model
from fedkd.objectives import BoundObjective, Parts, layer_shapes
from fedkd.randomness import Purpose, seeded_torch, torch_seed_for
from fedkd.targets import Targets
from fedkd.training.learners import ComposedObjective
from fedkd.training.objectives import Batch, Losses, Outputs
from fedkd.training.stacking import Skeleton
from fedkd.training.state import Arrays, to_arrays

SAME = 1e-4
"""Relative difference of two float32 losses up to which they count as the same."""

TRIED_ROWS = 5
"""Rows of a trial, the last of which is padding."""

PartsOf = Mapping[str, Mapping[str, Parts]]
"""How to run the parts: by learner, then by term."""


@dataclass(frozen=True, slots=True)
class Stacking:
    """Whether an objective can be computed for stacked clients.

    Attributes:
        obstacle: why not; empty where it can.
        mixes_rows: the first term that compares the rows of a step with each other; empty where
            none does. Where batches are padded such terms are computed client by client.
    """

    obstacle: str = ""
    mixes_rows: str = ""


class BoundLearners:
    """A composed objective that knows its models' layers.

    Attributes:
        objectives: of each learner.
        parts: all modules that are trained beside the models, by learner, term and name.
        layers: the layers to tap, by model.

    Raises:
        ValueError: naming the setting and the layer that does not exist or does not fit.
    """

    def __init__(
        self,
        composed: ComposedObjective,
        modules: Mapping[str, nn.Module],
        inputs: Float[Tensor, "rows *shape"],
        *,
        num_classes: int,
        rows: int,
    ) -> None:
        self._composed = composed
        self._modules = modules
        self._inputs = inputs
        self._num_classes = num_classes
        self._rows = rows
        self.objectives = self._bind(0)
        self.parts = _parts_of(self.objectives)
        layers: dict[str, list[str]] = {name: [] for name in composed.models}
        for name, learner in composed.learners.items():
            layers[name] += self.objectives[name].student_layers
            if learner.teacher is not None:
                layers[learner.teacher] += self.objectives[name].teacher_layers
        self.layers = {name: tuple(dict.fromkeys(own)) for name, own in layers.items()}

    def _bind(self, seed: int) -> dict[str, BoundObjective]:
        objectives = {}
        for number, (name, learner) in enumerate(self._composed.learners.items()):
            teacher = None if learner.teacher is None else self._modules[learner.teacher]
            try:
                objectives[name] = learner.objective.bind(
                    self._modules[name],
                    teacher,
                    self._inputs,
                    num_classes=self._num_classes,
                    rows=self._rows,
                    seed=torch_seed_for(seed, Purpose.MODEL, 0, number),
                )
            except ValueError as error:
                # What is called objective.<term> there is some other setting's here.
                told = str(error).removeprefix("objective.")
                raise ValueError(f"{learner.setting}.{told}") from None
        return objectives

    def initial_parts(self, seed: int) -> Arrays:
        """Return fresh weights of the parts; ``seed`` is that of a client's first weights."""
        if not len(self.parts):
            return {}
        fresh = _parts_of(self._bind(seed))
        return to_arrays(fresh.state_dict())

    def losses(
        self,
        composed: ComposedObjective,
        outputs: Mapping[str, Outputs],
        batch: Batch,
        parts: PartsOf | None = None,
        *,
        alone: bool = False,
    ) -> Losses:
        """Return every learner's weighted terms, of rows or not, by their names in the metrics.

        Args:
            composed: the objective that was bound, or one that differs in its progress only.
            outputs: of every model, by name.
            batch: the step's rows.
            parts: how to run the parts; None: as the modules that they are.
            alone: whether the client has no public rows, though others have: terms that learn
                from targets on them are left out.
        """
        losses: dict[str, Loss] = {}
        for name, bound in self.objectives.items():
            view = composed.view(name, outputs, batch)
            own = None if parts is None else parts[name]
            taught_in_public = composed.learners[name].teacher is None
            for term, loss in bound.weighted(
                view, own, labels_only=alone and taught_in_public
            ).items():
                losses[composed.loss_name(name, term)] = loss
        return losses

    def parts_with(self, run: Callable[..., Tensor]) -> PartsOf:
        """Return the parts as terms call them, each run by ``run(path, *inputs)``."""

        def call(prefix: str, name: str, *inputs: Any) -> Tensor:
            return run(f"{prefix}.{name}", *inputs)

        return {
            name: {term: Parts(partial(call, f"{name}.{term}")) for term in bound.terms}
            for name, bound in self.objectives.items()
        }

    # -- stacking --------------------------------------------------------------------------

    @cached_property
    def stacking(self) -> Stacking:
        """Whether stacked clients can learn by this objective: tried out on made-up numbers.

        Raises:
            ValueError: if one client alone could not either, naming the term.
        """
        with seeded_torch(0):
            outputs, batch, _ = self._made_up()
            values = self._unweighted(
                _of_member(outputs, 0, TRIED_ROWS), _of_member(batch, 0, TRIED_ROWS)
            )
            for name, value in values.items():
                _trial_rows(TRIED_ROWS).read(name, value)
        for name, learner in self._composed.learners.items():
            for term, bound in self.objectives[name].terms.items():
                if bound.term.stateful:
                    return Stacking(
                        f"{learner.setting}.{term} remembers what it saw in earlier steps"
                    )
        if len(self.parts) and not list(self.parts.parameters()):
            return Stacking("what is trained beside the models has no parameters to stack")
        try:
            return self._tried_out()
        # Whatever it is, stacking is what went wrong: alone it went well.
        except Exception as error:
            return Stacking(f"cannot be stacked: {str(error).strip().splitlines()[0]}")

    def _tried_out(self) -> Stacking:
        """Compare two stacked clients with each of them alone: without padding, and with a row."""
        with seeded_torch(0):
            outputs, batch, shared = self._made_up()
            skeleton = Skeleton(self.parts, self._inputs.device)
            initial = [_parts_of(self._bind(seed)).state_dict() for seed in (1, 2)]
            tensors = {
                name: torch.stack([skeleton.turned(name, state[name]) for state in initial])
                for name in skeleton.stored
            }
            every, whole = slice(None), set[str]()
            results = []
            for rows in (TRIED_ROWS - 1, TRIED_ROWS):
                of = _of_member(outputs, every, rows), _of_member(batch, every, rows)
                started = {name: tensor.clone() for name, tensor in tensors.items()}
                results.append(self._stacked_trial(skeleton, *of, started, whole))
            for member in range(2):
                # A part's buffers may have moved: both begin with the same ones.
                self.parts.load_state_dict(initial[member])
                alone = _trial_rows(TRIED_ROWS - 1).means(
                    self._unweighted(
                        _of_member(outputs, member, TRIED_ROWS - 1),
                        _of_member(batch, member, TRIED_ROWS - 1),
                    )
                )
                for together, padded in zip(results, (False, True), strict=True):
                    for name, loss in alone.items():
                        if padded and name in whole:
                            continue
                        if not torch.isclose(together[name][member], loss, rtol=SAME, atol=SAME):
                            return Stacking(
                                f"{shared[name]} says that it is a loss of each row, but a row "
                                "that pads the batch changes the others: return WholeStep"
                                if padded
                                else f"{shared[name]} has another value where clients are stacked"
                            )
        return Stacking(mixes_rows=next((shared[name] for name in alone if name in whole), ""))

    def _stacked_trial(
        self,
        skeleton: Skeleton,
        outputs: Mapping[str, Outputs],
        batch: Batch,
        tensors: Mapping[str, Tensor],
        whole: set[str],
    ) -> dict[str, Tensor]:
        """Return two clients' terms; the last of `TRIED_ROWS` rows is padding.

        Args:
            skeleton: of the parts.
            outputs: of both clients, stacked.
            batch: of both clients, stacked.
            tensors: of the parts, stacked.
            whole: gets the names of the terms that are of the step as a whole.
        """
        assert batch.targets is not None  # noqa: S101
        rows = len(batch.targets.tensor[0])
        counted = torch.ones(rows, device=self._inputs.device)
        counted[TRIED_ROWS - 1 :] = 0
        padded = rows == TRIED_ROWS

        def stacked(
            models: dict[str, dict[str, Any]], fields: dict[str, Any], tensors: Any
        ) -> dict[str, Tensor]:
            outputs = {name: Outputs(**own) for name, own in models.items()}
            targets = Targets.from_model(fields["targets"])
            batch = Batch(**{**fields, "targets": targets})
            skeleton.counted.weights = counted if padded else None
            skeleton.counted.fewest = TRIED_ROWS - 1
            parts = self.parts_with(partial(skeleton.run_at, tensors))
            values = self._unweighted(outputs, batch, parts)
            step = _trial_rows(rows, counted if padded else None)
            read = {name: step.read(name, value) for name, value in values.items()}
            whole.update(name for name, value in read.items() if isinstance(value, WholeStep))
            return step.means(read)

        # What the terms are shown; functions among the fields would not go through vmap.
        fields = {**batch._asdict(), "targets": batch.targets.tensor}
        del fields["parts"]
        models = {name: own._asdict() for name, own in outputs.items()}
        for own in models.values():
            del own["head"]
        result: dict[str, Tensor] = torch.vmap(stacked, randomness="different")(
            models, fields, tensors
        )
        return result

    def _unweighted(
        self, outputs: Mapping[str, Outputs], batch: Batch, parts: PartsOf | None = None
    ) -> dict[str, Loss]:
        """Return each term's value: a weight that is 0 now may grow later."""
        values: dict[str, Loss] = {}
        for name, bound in self.objectives.items():
            view = self._composed.view(name, outputs, batch)
            for term, own in bound.terms.items():
                given = Parts.of(own.modules) if parts is None else parts[name][term]
                try:
                    value = own.term.value(view, given, own.pairs)
                # Terms may be somebody else's; the message must still say which one it was.
                except Exception as error:
                    first_line = str(error).strip().split("\n", 1)[0]
                    where = f"{self._composed.learners[name].setting}.{term}"
                    raise ValueError(f"{where}: {first_line or type(error).__name__}") from error
                values[self._composed.loss_name(name, term)] = value
        return values

    def _made_up(self) -> tuple[dict[str, Outputs], Batch, dict[str, str]]:
        """Return numbers for two clients, and the setting that holds each term."""
        device, classes, rows = self._inputs.device, self._num_classes, TRIED_ROWS

        def draw(*shape: int) -> Tensor:
            return torch.randn(2, *shape, device=device)

        def scores() -> Tensor:
            # As stacked models leave them: cross-entropy of others, under vmap, makes torch load
            # its compiler's algebra, a second before the first step.
            return draw(classes, rows).transpose(-1, -2)

        outputs, settings = {}, {}
        for name in self._composed.models:
            shapes = layer_shapes(self._modules[name], self._inputs) if self.layers[name] else {}
            features = {layer: draw(rows, *shapes[layer]) for layer in self.layers[name]}
            outputs[name] = Outputs(scores(), scores(), features)
        for name, learner in self._composed.learners.items():
            for term in self.objectives[name].terms:
                settings[self._composed.loss_name(name, term)] = f"{learner.setting}.{term}"
        labels = torch.arange(rows, device=device).remainder(classes).expand(2, rows)
        ids = torch.arange(rows, device=device).expand(2, rows)
        targets = Targets.from_model(scores())
        batch = Batch(labels, targets, labels, ids, ids, {})
        return outputs, batch, settings


def _trial_rows(rows: int, counted: Tensor | None = None) -> StepRows:
    """Return the rows of a step of a trial, in which there are as many of each kind."""
    sizes: dict[RowKind, int] = {"private": rows, "public": rows}
    return StepRows(sizes, {} if counted is None else dict.fromkeys(sizes, counted))


def _of_member(value: Any, member: int | slice, rows: int) -> Any:
    """Take one client's first rows, or those of all, out of stacked outputs or a stacked batch."""
    if isinstance(value, Tensor):
        return value[member, :rows]
    if isinstance(value, Targets):
        return value.of(value.tensor[member, :rows])
    if isinstance(value, Mapping):
        return {name: _of_member(entry, member, rows) for name, entry in value.items()}
    if isinstance(value, Outputs | Batch):
        return type(value)(*(_of_member(entry, member, rows) for entry in value))
    return value


def _parts_of(objectives: Mapping[str, BoundObjective]) -> nn.ModuleDict:
    return nn.ModuleDict({name: b.parts for name, b in objectives.items() if len(b.parts)})


@lru_cache(maxsize=64)
def stacking_of(
    composed: ComposedObjective,
    models: tuple[tuple[str, ModelSettings], ...],
    *,
    input_shape: Shape,
    num_classes: int,
) -> Stacking:
    """Tell, from settings alone, whether stacked clients can learn by an objective.

    Args:
        composed: what they minimise.
        models: what each of them trains, by name.
        input_shape: of a row.
        num_classes: logits a row.

    Raises:
        ValueError: if the objective does not fit the models.
    """
    known = dict(models)
    modules = {
        # A teacher that never trains has the architecture of a model of the client.
        name: build_model(
            known.get(name, models[0][1]), input_shape=input_shape, num_classes=num_classes, seed=0
        )
        for name in composed.models
    }
    bound = BoundLearners(
        composed,
        modules,
        torch.zeros(2, *input_shape),
        num_classes=num_classes,
        rows=TRIED_ROWS,
    )
    return bound.stacking
