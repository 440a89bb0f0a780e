"""Clients that see the world differently: each transforms what it reads, by a shift of its own.

The rows of the private pool are transformed once, when the data are built. Public and validation
rows stay as they are, and so do test rows, of which there may be one copy more for each shift.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias

import numpy as np
from jaxtyping import Float32, Int64
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from fedkd.bounds import Real, shown
from fedkd.names import nearest
from fedkd.randomness import Purpose, generator_for

Pixels: TypeAlias = Float32[np.ndarray, "rows channels height width"]
Inputs: TypeAlias = Float32[np.ndarray, "rows *shape"]

LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Shares of red, green and blue in grey: ITU-R BT.601, which Pillow's conversion uses too."""

PIECE_ROWS = 4096
"""Rows that are transformed at a time, so that no second copy of a large pool is in memory."""


class Shift(BaseModel):
    """One way to see inputs: a function of each row, and of a stream where it draws."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    on: ClassVar[tuple[str, ...]] = ("pictures",)
    """What it is for: pictures with values in [0, 1], or features in standard deviations."""

    @abstractmethod
    def apply(self, inputs: Inputs, rng: np.random.Generator) -> Inputs:
        """Return transformed copies of rows."""

    @property
    def label(self) -> str:
        """Short text for tables: the kind and its parameters."""
        given = {name: value for name, value in self if name != "kind"}
        return " ".join([self.kind, *(f"{name}={value:g}" for name, value in given.items())])


class NoShift(Shift):
    """Inputs as they are."""

    kind: Literal["none"]
    on: ClassVar[tuple[str, ...]] = ("pictures", "features")

    def apply(self, inputs: Inputs, rng: np.random.Generator) -> Inputs:
        """Return the same rows."""
        return inputs


class Rotation(Shift):
    """Pictures are turned about their middle; corners that nothing is turned into are black."""

    kind: Literal["rotation"]
    degrees: Annotated[Real, Field(ge=-360, le=360)] = Field(
        description="counter-clockwise; in between pixels values are interpolated"
    )

    def apply(self, inputs: Inputs, rng: np.random.Generator) -> Inputs:
        """Return turned pictures of the same size; a square one by quarter turns exactly."""
        height, width = inputs.shape[-2:]
        turns = self.degrees / 90
        if turns == round(turns) and (height == width or round(turns) % 2 == 0):
            return np.ascontiguousarray(np.rot90(inputs, round(turns), axes=(-2, -1)))
        from scipy.ndimage import map_coordinates

        angle = math.radians(self.degrees)
        rows, columns = np.meshgrid(
            np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2, indexing="ij"
        )
        # Where each pixel comes from: the inverse turn; the vertical axis points down.
        from_rows = math.cos(angle) * rows + math.sin(angle) * columns + (height - 1) / 2
        from_columns = -math.sin(angle) * rows + math.cos(angle) * columns + (width - 1) / 2
        turned = np.empty_like(inputs)
        for place in np.ndindex(inputs.shape[:2]):
            map_coordinates(
                inputs[place],
                (from_rows, from_columns),
                output=turned[place],
                order=1,
                prefilter=False,
            )
        return turned


class Blur(Shift):
    """Pictures are blurred by a Gaussian."""

    kind: Literal["blur"]
    std: Annotated[Real, Field(ge=0.01, le=100)] = Field(
        default=1.0, description="of the Gaussian, in pixels"
    )

    def apply(self, inputs: Inputs, rng: np.random.Generator) -> Inputs:
        """Return blurred pictures; beyond its edge a picture goes on as its mirror image."""
        from scipy.ndimage import gaussian_filter

        blurred: np.ndarray = gaussian_filter(inputs, (0, 0, self.std, self.std))
        return blurred


class Colour(Shift):
    """Brightness, then contrast, then saturation of pictures are multiplied."""

    kind: Literal["colour"]
    brightness: Annotated[Real, Field(ge=0, le=10)] = Field(
        default=1.0, description="factor of all values; 0 is black"
    )
    contrast: Annotated[Real, Field(ge=0, le=10)] = Field(
        default=1.0, description="factor of distances from the picture's mean grey"
    )
    saturation: Annotated[Real, Field(ge=0, le=10)] = Field(
        default=1.0, description="factor of distances from the pixel's grey; 0 is grey"
    )
    invert: bool = Field(default=False, description="first turn each value v into 1 - v")

    @property
    def label(self) -> str:
        """Short text for tables: the kind and what is changed."""
        factors = ("brightness", "contrast", "saturation")
        changed = [
            f"{name}={getattr(self, name):g}" for name in factors if getattr(self, name) != 1
        ]
        return " ".join([self.kind, *(["invert"] if self.invert else []), *changed])

    def apply(self, inputs: Inputs, rng: np.random.Generator) -> Inputs:
        """Return changed pictures, after each step cut off at 0 and 1."""
        pixels = 1 - inputs if self.invert else inputs
        pixels = np.clip(self.brightness * pixels, 0, 1)
        mean = _grey(pixels).mean(axis=(1, 2, 3), keepdims=True)
        pixels = np.clip(mean + self.contrast * (pixels - mean), 0, 1)
        grey = _grey(pixels)
        changed: np.ndarray = np.clip(grey + self.saturation * (pixels - grey), 0, 1)
        return changed.astype(np.float32)


def _grey(pixels: Pixels) -> Float32[np.ndarray, "rows grey height width"]:
    if pixels.shape[1] == 1:
        return pixels
    grey: np.ndarray = np.einsum("rchw,c->rhw", pixels, LUMA)[:, None]
    return grey


class Noise(Shift):
    """Gaussian noise, drawn once for each value."""

    kind: Literal["noise"]
    std: Annotated[Real, Field(ge=0, le=100)] = Field(
        default=0.1,
        description="standard deviation: of pixels in [0, 1], or in those of each feature",
    )
    on: ClassVar[tuple[str, ...]] = ("pictures", "features")

    def apply(self, inputs: Inputs, rng: np.random.Generator) -> Inputs:
        """Return noisy rows; pixels are cut off at 0 and 1."""
        noisy: np.ndarray = inputs + self.std * rng.standard_normal(inputs.shape, np.float32)
        if inputs.ndim == 4:
            noisy.clip(0, 1, out=noisy)
        return noisy


class Scale(Shift):
    """Features are multiplied."""

    kind: Literal["scale"]
    factor: Annotated[Real, Field(ge=-1000, le=1000)] = Field(
        description="of each feature's distance from its mean"
    )
    on: ClassVar[tuple[str, ...]] = ("features",)

    def apply(self, inputs: Inputs, rng: np.random.Generator) -> Inputs:
        """Return scaled features."""
        return inputs * np.float32(self.factor)


class Offset(Shift):
    """Something is added to features."""

    kind: Literal["offset"]
    by: Annotated[Real, Field(ge=-1000, le=1000)] = Field(
        description="what is added, in standard deviations of each feature"
    )
    on: ClassVar[tuple[str, ...]] = ("features",)

    def apply(self, inputs: Inputs, rng: np.random.Generator) -> Inputs:
        """Return moved features."""
        return inputs + np.float32(self.by)


SHIFTS: dict[str, type[Shift]] = {
    "none": NoShift,
    "rotation": Rotation,
    "blur": Blur,
    "colour": Colour,
    "noise": Noise,
    "scale": Scale,
    "offset": Offset,
}


def _with_known_kind(value: object) -> object:
    """Read a mere name as a kind without parameters, and refuse kinds that there are not."""
    table = {"kind": value} if isinstance(value, str) else value
    kind = table.get("kind") if isinstance(table, Mapping) else getattr(table, "kind", None)
    if kind not in SHIFTS:
        known = ", ".join(SHIFTS)
        if kind is None:
            raise ValueError(f"must be a table with a kind, of {known}, got {shown(value)}")
        raise ValueError(f"unknown kind {shown(kind)}; known: {known}{nearest(str(kind), SHIFTS)}")
    return table


ShiftField = Annotated[
    Annotated[
        NoShift | Rotation | Blur | Colour | Noise | Scale | Offset, Field(discriminator="kind")
    ],
    BeforeValidator(_with_known_kind),
]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, Mapping) else value


class FeatureShift(BaseModel):
    """Clients whose inputs differ in kind (``data.feature_shift``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shifts: Annotated[tuple[ShiftField, ...], Field(max_length=1000), BeforeValidator(_as_list)] = (
        Field(default=(), description="how clients see inputs, a list of tables with a kind")
    )
    dealt: Literal["in_turn", "by_lot"] = Field(
        default="in_turn",
        description="in_turn: client i gets shifts[i % len(shifts)]; by_lot: the seed draws one",
    )
    judged: Literal["shifted", "as_is"] = Field(
        default="shifted",
        description="which test rows personal_accuracy is measured on: under the client's own "
        "shift, or as all other measures; validation rows are never shifted",
    )


@dataclass(frozen=True, eq=False, slots=True)
class ClientShifts:
    """Who sees inputs in which way.

    Attributes:
        labels: of each shift, for tables.
        of_client: place of each client's shift.
        test_inputs: the test rows under each shift; ``None``: as they are.
    """

    labels: tuple[str, ...]
    of_client: Int64[np.ndarray, "clients"]
    test_inputs: tuple[Float32[np.ndarray, "test_rows *shape"] | None, ...]


def check_shifts(settings: FeatureShift, what: str) -> None:
    """Refuse shifts that inputs of a kind cannot have.

    Args:
        settings: which shifts.
        what: the inputs are: ``pictures``, ``features`` or ``text``.

    Raises:
        ValueError: naming the setting, and what would work.
    """
    for place, shift in enumerate(settings.shifts):
        if what not in shift.on:
            able = [name for name, kind in SHIFTS.items() if what in kind.on]
            works = f"for {what} there are {', '.join(able)}" if able else f"{what} has no shifts"
            raise ValueError(
                f"data.feature_shift.shifts.{place}: {shift.kind!r} is for "
                f"{' and '.join(shift.on)}, and data.source holds {what}: {works}"
            )


def shifts_of_clients(
    settings: FeatureShift, num_clients: int, *, seed: int
) -> Int64[np.ndarray, "clients"]:
    """Return the place of each client's shift in the list."""
    count = len(settings.shifts)
    if settings.dealt == "by_lot":
        return generator_for(seed, Purpose.FEATURE_SHIFT).integers(count, size=num_clients)
    return np.arange(num_clients) % count


def shift_inputs(
    pool: Inputs,
    test_inputs: Float32[np.ndarray, "test_rows *shape"],
    client_rows: Sequence[Int64[np.ndarray, "_"]],
    settings: FeatureShift,
    *,
    seed: int,
) -> ClientShifts | None:
    """Transform the rows of each client in place, and copies of the test rows.

    Args:
        pool: private rows: pixels in [0, 1], or standardised features. Rows of nobody stay.
        test_inputs: test rows in the same form; they stay.
        client_rows: who holds which rows of the pool.
        settings: which shifts, and who has which.
        seed: of the run, or ``data.seed``. What a client's rows draw comes from a stream of its
            own, what test rows draw from one of the shift.

    Returns:
        Who has which shift; ``None`` where there are none.

    Source:
        noise: Li et al., 2021, section 3.3.2 (noise-based feature imbalance).
        https://arxiv.org/abs/2102.02079
        rotation: Ghosh et al., 2020, section 6 (rotated MNIST, judged on data turned alike).
        https://arxiv.org/abs/2006.04088
    """
    if not settings.shifts:
        return None
    chosen = shifts_of_clients(settings, len(client_rows), seed=seed)
    for client, (rows, place) in enumerate(zip(client_rows, chosen, strict=True)):
        shift = settings.shifts[place]
        rng = generator_for(seed, Purpose.FEATURE_SHIFT, 0, client)
        for start in range(0, len(rows), PIECE_ROWS):
            piece = rows[start : start + PIECE_ROWS]
            pool[piece] = shift.apply(pool[piece], rng)
    own = settings.judged == "shifted"
    return ClientShifts(
        tuple(shift.label for shift in settings.shifts),
        chosen.astype(np.int64),
        tuple(
            shift.apply(test_inputs, generator_for(seed, Purpose.FEATURE_SHIFT, 1, place))
            if own and shift.kind != "none" and place in chosen
            else None
            for place, shift in enumerate(settings.shifts)
        ),
    )
