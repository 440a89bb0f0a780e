"""Terms: one named, weighted part of what a student minimises.

A term is its settings and its arithmetic in one frozen object. The table `TERMS` gives each its
name in settings files; adding one touches its module, one line of the table and one test.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from jaxtyping import Float
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

from fedkd.losses.reduction import Loss
from fedkd.objectives.view import View
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule, PositiveSchedule

Need = Literal["labels", "teacher", "transfer_labels", "features", "rows"]
"""What a term cannot do without: labelled rows; the teacher's logits; labels of the transfer rows;
features of both models; ids of the transfer rows."""

Shapes = Mapping[str, tuple[int, ...]]
"""What a model's layers put out, by layer, without the batch."""

LayerPairs = tuple[tuple[str, str], ...]
"""Layers of the student, each with the layer of the teacher that it is compared with."""

Call = Callable[..., Tensor]


def _path(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


LayerName = Annotated[str, BeforeValidator(_path)]
"""A layer's name in a settings file, where the 3 of ``nn.Sequential`` may stand as a number."""


def default_weight(value: float, remark: str = "") -> Any:
    """Return the field of a term whose weight is not 1 unless it is set."""
    about = "factor, a number or a schedule over the training"
    return Field(
        ConstantSchedule(value=value), description=f"{about}; {remark}" if remark else about
    )


def default_temperature(value: float) -> Any:
    """Return the field of a softened term whose temperature is not 4 unless it is set."""
    return Field(
        ConstantSchedule(value=value), description="softening divisor, a number or a schedule"
    )


class Parts:
    """The modules that a term trains besides the student, by name.

    Attributes:
        call: runs one of them, ``call(name, *inputs)``. Whoever trains decides how: a plain
            module call, or the same module with a stacked client's own tensors.
        modules: the modules themselves where a term needs more of them than a call; None where
            their tensors live elsewhere.
    """

    def __init__(self, call: Call, modules: nn.ModuleDict | None = None) -> None:
        self.call = call
        self.modules = modules

    @classmethod
    def of(cls, modules: nn.ModuleDict) -> "Parts":
        """Call modules as they are."""
        return cls(lambda name, *inputs: modules[name](*inputs), modules)


class Term(BaseModel, ABC):
    """One part of an objective."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: ClassVar[str]
    """Whose idea it is: authors, year, link."""
    stateful: ClassVar[bool] = False
    """Whether it keeps something from step to step besides parts that the optimizer trains."""
    weighs_rows: ClassVar[bool] = True
    """Whether a weight for each transfer row changes it."""

    weight: NonNegativeSchedule = default_weight(1.0)
    kind: str = Field("", description="what it is called in a settings file")

    @model_validator(mode="before")
    @classmethod
    def _is_called_by_its_full_name(cls, value: object) -> object:
        # A row of the table says in its type how it is called.
        if isinstance(value, dict) and cls.model_fields["kind"].annotation is str:
            return {"kind": f"{cls.__module__}:{cls.__qualname__}", **value}
        return value

    @property
    def needs(self) -> tuple[Need, ...]:
        """What it cannot do without, set as it is."""
        return ("teacher",)

    @abstractmethod
    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Loss:
        """Return the loss before its weight: of each row, or of the step as a whole.

        ``view.of_transfer(values)`` says that there is one value for each transfer row, and
        ``view.of_labelled(values)`` for each labelled row; `WholeStep` that rows are compared.

        Args:
            view: the step.
            parts: what `build_parts` made; empty where it made nothing.
            pairs: the layers that are compared; empty without features.
        """

    def notes(self, view: View, parts: Parts) -> dict[str, Float[Tensor, ""]]:
        """Return numbers to log besides the loss, by name, as they are before the step."""
        return {}

    def layer_pairs(self) -> LayerPairs:
        """Return the layers that are compared, special names included."""
        return ()

    def build_parts(
        self, pairs: LayerPairs, student: Shapes, teacher: Shapes, *, num_classes: int, rows: int
    ) -> dict[str, nn.Module]:
        """Make what is trained with the student and is no part of it, such as projectors.

        Weights are drawn from torch's global generator, so the caller seeds it.

        Args:
            pairs: layers of the student and of the teacher.
            student: what the student's layers put out.
            teacher: what the teacher's layers put out.
            num_classes: width of the logits.
            rows: how many transfer rows there are.
        """
        return {}


class UnreadTerm(Term):
    """A term of another package whose code nobody has allowed, as its settings stand."""

    model_config = ConfigDict(extra="allow")
    source: ClassVar[str] = ""

    def value(self, view: View, parts: Parts, pairs: LayerPairs) -> Float[Tensor, ""]:
        """Refuse to be computed."""
        raise TypeError(f"the term {self.kind!r} was only looked at, and its code is not loaded")


class SoftenedTerm(Term):
    """A term with a temperature."""

    temperature: PositiveSchedule = default_temperature(4.0)

    def temperature_at(self, progress: float, parts: Parts) -> float:
        """Return the temperature in force, which softens the student."""
        return self.temperature.at(progress)

    def target_temperature_at(self, progress: float, parts: Parts) -> float:
        """Return the temperature in force that softens the teacher."""
        return self.temperature_at(progress, parts)

    def target_temperature_range(self) -> tuple[float, float]:
        """Return the lowest and the highest temperature that ever softens the teacher."""
        return self.temperature.range()


class LayerTerm(Term):
    """A term that compares layers.

    Layers are named by module path (``layer1.0.bn2``), or ``penultimate`` (what the last linear
    layer reads) or ``last_map`` (the last feature maps).
    """

    default_layer: ClassVar[str] = "penultimate"

    layers: dict[LayerName, LayerName] | tuple[LayerName, ...] | None = Field(
        None,
        description="the student's layer: the teacher's layer; a list where both have the same "
        "name; none: the embedding, or the last feature maps where maps are compared",
    )

    @field_validator("layers")
    @classmethod
    def _names_a_layer(
        cls, layers: dict[str, str] | tuple[str, ...] | None
    ) -> dict[str, str] | tuple[str, ...] | None:
        if layers is not None and not layers:
            raise ValueError(
                "must name at least one layer, or be left out for "
                f"{cls.default_layer}; got {layers!r}"
            )
        return layers

    @property
    def needs(self) -> tuple[Need, ...]:
        """What it cannot do without: features of both models."""
        return ("features",)

    def layer_pairs(self) -> LayerPairs:
        """Return the layers that are compared, special names included."""
        if self.layers is None:
            return ((self.default_layer, self.default_layer),)
        if isinstance(self.layers, Mapping):
            return tuple(self.layers.items())
        return tuple((layer, layer) for layer in self.layers)

    def features(self, view: View, pairs: LayerPairs) -> list[tuple[Tensor, Tensor]]:
        """Return what each pair of layers put out in this step: the student's, the teacher's.

        Raises:
            ValueError: naming a layer that was not tapped.
        """
        for ours, theirs in pairs:
            if ours not in view.features or theirs not in view.teacher_features:
                raise ValueError(
                    f"this step has no features of the student's layer {ours!r} and the teacher's "
                    f"layer {theirs!r}"
                )
        return [(view.features[ours], view.teacher_features[theirs]) for ours, theirs in pairs]


def total_of(losses: Sequence[Float[Tensor, "*rows"]]) -> Float[Tensor, "*rows"]:
    """Sum a term over its layers, as attention transfer was published."""
    first, *others = losses
    for loss in others:
        first = first + loss
    return first
