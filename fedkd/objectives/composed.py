"""Objectives: a named, weighted sum of terms, read from settings and bound to models."""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from pydantic import RootModel, SerializeAsAny, ValidationError, field_validator, model_validator
from torch import Tensor, nn

from fedkd.bounds import shown
from fedkd.losses.reduction import Loss
from fedkd.names import nearest
from fedkd.objectives.table import TERMS, term_class
from fedkd.objectives.taps import Features, layer_shapes, resolved_layer, tapped
from fedkd.objectives.terms import LayerPairs, Need, Parts, SoftenedTerm, Term
from fedkd.objectives.view import View
from fedkd.randomness import seeded_torch

TERM_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Objective(RootModel[dict[str, SerializeAsAny[Term]]]):
    """Terms by name.

    In a settings file a table such as ::

        objective:
          ce: 0.1                                 # a number is the weight
          kd: {weight: 0.9, temperature: 4}
          at: {weight: 1000, layers: {"3": "6"}}
          late: {kind: dkd, weight: {kind: linear, start: 0, end: 1}}

    The name of a part is its kind unless it has a ``kind`` of its own.
    """

    model_config = {"frozen": True}

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: object) -> object:
        if isinstance(value, Mapping):
            return {name: read_term(str(name), given) for name, given in value.items()}
        return value

    @field_validator("root")
    @classmethod
    def _has_a_term(cls, terms: dict[str, Term]) -> dict[str, Term]:
        if not terms:
            raise ValueError(f"an objective needs at least one term; known: {', '.join(TERMS)}")
        for name in terms:
            # Names become those of modules and of columns.
            if not TERM_NAME.fullmatch(name) or hasattr(nn.ModuleDict, name):
                raise ValueError(
                    "a name in objective must be letters, digits, '_' or '-', and no word of "
                    f"PyTorch's module tables such as keys or type, got {name!r}"
                )
        return terms

    @property
    def terms(self) -> dict[str, Term]:
        """The terms by name, in the order in which they are summed."""
        return dict(self.root)

    @cached_property
    def key(self) -> str:
        """Text that is equal where the terms are."""
        return self.model_dump_json()

    def only(self, names: Collection[str]) -> "Objective":
        """Return the objective of these terms, in the order in which they stand here.

        Raises:
            ValueError: if there is none of them.
        """
        kept = tuple(name for name in self.root if name in names)
        if len(kept) == len(self.root):
            return self
        if kept not in self._selections:
            selection = Objective.model_validate({name: self.root[name] for name in kept})
            self._selections[kept] = selection
        return self._selections[kept]

    @cached_property
    def _selections(self) -> dict[tuple[str, ...], "Objective"]:
        # Clients ask in every fit, and terms do not change.
        return {}

    def needs(self, need: Need) -> tuple[str, ...]:
        """Return the names of the terms that cannot do without something."""
        return tuple(name for name, term in self.root.items() if need in term.needs)

    def bind(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        inputs: Float[Tensor, "rows *shape"],
        *,
        num_classes: int,
        rows: int,
        seed: int,
    ) -> "BoundObjective":
        """Resolve layers on two models and make what is trained beside the student.

        Args:
            student: the model that learns; neither model is changed.
            teacher: the model whose layers are compared; None where no term compares layers.
            inputs: a few rows for a dry run.
            num_classes: width of the logits.
            rows: how many transfer rows there are: their ids are smaller.
            seed: of the first weights of projectors and the like.

        Raises:
            ValueError: a layer that does not exist, or a term that compares layers without a
                teacher.
        """
        comparing = self.needs("features")
        student_shapes = teacher_shapes = {}
        if comparing:
            if teacher is None:
                raise ValueError(
                    f"objective.{comparing[0]} compares layers and needs a teacher's model, got "
                    "its predictions only"
                )
            student_shapes = layer_shapes(student, inputs)
            teacher_shapes = layer_shapes(teacher, inputs)
        bound: dict[str, BoundTerm] = {}
        with seeded_torch(seed):
            for name, term in self.root.items():
                try:
                    pairs = tuple(
                        (
                            resolved_layer(ours, student_shapes, whose="student"),
                            resolved_layer(theirs, teacher_shapes, whose="teacher"),
                        )
                        for ours, theirs in term.layer_pairs()
                    )
                    modules = term.build_parts(
                        pairs, student_shapes, teacher_shapes, num_classes=num_classes, rows=rows
                    )
                except ValueError as error:
                    raise ValueError(f"objective.{name}: {error}") from None
                bound[name] = BoundTerm(term, pairs, nn.ModuleDict(modules).to(inputs.device))
        return BoundObjective(bound)


class BoundTerm(NamedTuple):
    """A term, the layers it compares and the modules it trains."""

    term: Term
    pairs: LayerPairs
    modules: nn.ModuleDict


class BoundObjective:
    """An objective that knows its models' layers.

    Attributes:
        terms: by name.
        parts: all modules that are trained with the student and are no part of it, as one
            module: ``parts.parameters()`` belong into the student's optimizer, and nothing of
            it into what the student saves or shares.
    """

    def __init__(self, terms: Mapping[str, BoundTerm]) -> None:
        self.terms = dict(terms)
        self.parts = nn.ModuleDict(
            {name: bound.modules for name, bound in terms.items() if len(bound.modules)}
        )
        self._parts = {name: Parts.of(bound.modules) for name, bound in terms.items()}
        self._softened = next(
            ((name, b.term) for name, b in terms.items() if isinstance(b.term, SoftenedTerm)), None
        )
        self._noting = [
            # What a term tells besides its loss, it tells of what it trains.
            name
            for name, bound in terms.items()
            if len(bound.modules)
        ]
        self.student_layers = _layers(bound.pairs for bound in terms.values())
        self.teacher_layers = _layers(
            tuple(pair[::-1] for pair in bound.pairs) for bound in terms.values()
        )

    def needs(self, need: Need) -> bool:
        """Tell whether any term cannot do without something."""
        return any(need in bound.term.needs for bound in self.terms.values())

    def losses(
        self, view: View, parts: Mapping[str, Parts] | None = None
    ) -> dict[str, Float[Tensor, ""]]:
        """Return each term times its weight as one number; their sum is minimised.

        Args:
            view: the step, all of whose rows count.
            parts: how to run the modules of each term; None: as they are.

        Raises:
            ValueError: naming a term whose loss fits no rows of the step.
        """
        # Term by term: the order in which a graph is built is that in which gradients are added.
        rows = view.step_rows
        return {name: rows.mean(name, loss) for name, loss in self._each(view, parts)}

    def weighted(
        self, view: View, parts: Mapping[str, Parts] | None = None, *, labels_only: bool = False
    ) -> dict[str, Loss]:
        """Return each term times its weight, of rows or of the whole step.

        A term whose weight is 0 at this progress is left out: with ``kd: 0`` a step has the bits
        of one without the term.

        Args:
            view: the step.
            parts: how to run the modules of each term; None: as they are.
            labels_only: leave out all terms but those of labelled rows.
        """
        return dict(self._each(view, parts, labels_only=labels_only))

    def _each(
        self, view: View, parts: Mapping[str, Parts] | None, *, labels_only: bool = False
    ) -> Iterator[tuple[str, Loss]]:
        for name, bound in self.terms.items():
            weight = bound.term.weight.at(view.progress)
            if weight == 0 or (labels_only and set(bound.term.needs) != {"labels"}):
                continue
            own = self._parts[name] if parts is None else parts[name]
            yield name, weight * bound.term.value(view, own, bound.pairs)

    def notes(self, view: View) -> dict[str, Float[Tensor, ""]]:
        """Return what terms tell about a step besides their losses, as ``<term>/<what>``.

        Asked before `losses`, it says what was in force when the step began.
        """
        if not self._noting:
            return {}
        with torch.no_grad():
            return {
                f"{name}/{what}": value
                for name in self._noting
                for what, value in self.terms[name].term.notes(view, self._parts[name]).items()
            }

    def temperatures(self, progress: float) -> dict[str, float]:
        """Return the temperature in force of every term that has one, learned ones included."""
        return {
            name: bound.term.temperature_at(progress, self._parts[name])
            for name, bound in self.terms.items()
            if isinstance(bound.term, SoftenedTerm)
        }

    def in_force(self, progress: float) -> dict[str, float]:
        """Return every term's ``weight/<term>`` and ``temperature/<term>`` for the record."""
        weights = {
            f"weight/{name}": bound.term.weight.at(progress) for name, bound in self.terms.items()
        }
        temperatures = self.temperatures(progress).items()
        return weights | {f"temperature/{name}": value for name, value in temperatures}

    def target_temperature(self, progress: float) -> float:
        """Return the temperature that softens the teacher: the first such term's, 1 without one.

        An ensemble's target is made for one temperature.
        """
        if self._softened is None:
            return 1.0
        name, term = self._softened
        return term.target_temperature_at(progress, self._parts[name])

    @contextmanager
    def tapping(
        self, student: nn.Module, teacher: nn.Module | None
    ) -> Iterator[tuple[Features, Features]]:
        """Record the layers that are compared, of both models, inside the block."""
        with ExitStack() as stack:
            ours = stack.enter_context(tapped(student, self.student_layers))
            theirs = Features()
            if teacher is not None:
                theirs = stack.enter_context(tapped(teacher, self.teacher_layers))
            yield ours, theirs


def read_term(name: str, given: object) -> Term:
    """Read one entry of an objective.

    Args:
        name: its name, which is its kind where the table has none.
        given: a number (the weight), a table of settings, or a term.

    Raises:
        ValueError: unknown kinds and settings, and values out of range, by name.
    """
    if isinstance(given, Term):
        return given
    table: dict[str, Any]
    if given is None:
        table = {}
    elif isinstance(given, int | float) and not isinstance(given, bool):
        table = {"weight": given}
    elif isinstance(given, Mapping):
        table = {str(key): value for key, value in given.items()}
    else:
        raise ValueError(
            f"objective.{name} must be a weight or a table of settings, got {shown(given)}"
        )
    kind = table.get("kind", name)
    term = term_class(kind, f"objective.{name}.kind")
    try:
        return term.model_validate({**table, "kind": kind})
    except ValidationError as error:
        raise ValueError(_readable(name, term, error)) from None


def _readable(name: str, term: type[Term], error: ValidationError) -> str:
    lines = []
    for problem in error.errors(include_url=False, include_context=False):
        where = ".".join(["objective", name, *map(str, problem["loc"])])
        message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        if problem["type"] == "extra_forbidden":
            known = [key for key in term.model_fields if key != "kind"]
            near = nearest(str(problem["loc"][-1]), known)
            lines.append(f"unknown setting {where!r} (known there: {', '.join(known)}){near}")
        elif "got " in message:
            lines.append(f"{where}: {message}")
        else:
            lines.append(
                f"{where}: {message[0].lower()}{message[1:]}, got {shown(problem['input'])}"
            )
    return "; ".join(lines)


def _layers(pairs_of_terms: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(ours for pairs in pairs_of_terms for ours, _ in pairs))
