"""Settings under ``data:``: where the images come from and who gets which rows."""

import sys
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    field_validator,
    model_validator,
)

from fedkd import own_code
from fedkd.bounds import Real, Rows, RowsOrZero, Seed, Text, Whole, Width, shown
from fedkd.data.feature_shift import FeatureShift
from fedkd.data.label_noise import LabelNoise
from fedkd.data.partition_settings import DirichletPartition, NaturalPartition, PartitionField

LONGEST_SIDE = 1024


def _both_sides(value: object) -> object:
    """Turn ``32`` and ``[32, 48]`` into a height and a width."""
    sides = list(value) if isinstance(value, list | tuple) else [value, value]
    if len(sides) != 2 or not all(type(s) is int and 1 <= s <= LONGEST_SIDE for s in sides):
        raise ValueError(
            f"must be a whole number of pixels from 1 to {LONGEST_SIDE}, such as 32, or a height "
            f"and a width, such as [32, 48], got {shown(value)}"
        )
    return tuple(sides)


_Side = Annotated[Whole, Field(ge=1, le=LONGEST_SIDE)]
Size = Annotated[tuple[_Side, _Side], BeforeValidator(_both_sides)]
"""Height and width in pixels; one number stands for both."""


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


Names = Annotated[tuple[Text, ...], BeforeValidator(_one_or_many)]
"""Names of columns; one name stands for a list of it."""


def _both_sizes(value: object) -> object:
    """Turn ``3`` and ``[1, 3]`` into a smallest and a largest size of n-grams."""
    sizes = list(value) if isinstance(value, list | tuple) else [value, value]
    whole = len(sizes) == 2 and all(type(n) is int and 1 <= n <= LONGEST_GRAM for n in sizes)
    if not whole or sizes[0] > sizes[1]:  # type: ignore[operator]
        raise ValueError(
            f"must be a size from 1 to {LONGEST_GRAM}, such as 3, or a smallest and a largest "
            f"one, such as [1, 3], got {shown(value)}"
        )
    return tuple(sizes)


LONGEST_GRAM = 16
_Size = Annotated[Whole, Field(ge=1, le=LONGEST_GRAM)]
Sizes = Annotated[tuple[_Size, _Size], BeforeValidator(_both_sizes)]
"""The smallest and the largest n of n-grams; one number stands for both."""


NO_SOURCES = sys.stdlib_module_names | {"torch", "numpy", "pandas", "joblib", "datasets"}
"""Packages that cannot name a source: what takes any arguments, such as ``os:system`` or
``numpy:load`` with ``allow_pickle``, would run what options say."""


def check_own_source(source: str) -> None:
    """Refuse code that must not be called for rows."""
    if not own_code.is_own_code(source):
        return
    package = own_code.package_of(source)
    if package in NO_SOURCES:
        raise ValueError(
            f"{source!r} is no source: nothing in {package} returns rows and labels; write a "
            "function that does"
        )
    own_code.may_load(source)


class TextSettings(BaseModel):
    """How texts become inputs (``data.text``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: Literal["characters", "character_ngrams", "word_ngrams"] = Field(
        default="characters",
        description="characters: tokens, for gru, lstm, transformer and mlp; character_ngrams, "
        "word_ngrams: features, counts of n-grams in places that their hash says, for mlp",
    )
    length: Width | None = Field(
        default=None,
        description="characters kept of a text, its last ones; shorter texts are filled up; none: "
        "those of the longest training text, at most 256",
    )
    ngrams: Sizes = Field(
        default=(1, 3), description="of n-grams: the smallest and the largest n, or one number"
    )
    features: Width = Field(
        default=1024, description="of n-grams: how many features they are hashed to"
    )
    vocabulary: Whole | None = Field(
        default=None,
        ge=3,
        le=2**24,
        description="how many tokens there are, where arrays of two axes are numbers of tokens, "
        "from 0 (which fills texts up) on; none: they are features",
    )


COLUMNS = ("image_column", "feature_columns", "text_column", "label_column")
"""Settings that name columns of a source; all but the last name its inputs."""


def _check_one_kind(settings: BaseModel, section: str) -> None:
    """Refuse columns of inputs of two kinds."""
    named = [f"{section}.{name}" for name in COLUMNS[:-1] if getattr(settings, name) is not None]
    if len(named) > 1:
        raise ValueError(
            f"{' and '.join(named)} name inputs of two kinds: name columns of one kind"
        )


class PublicSettings(BaseModel):
    """The public set: rows that every client and the server can see (``data.public``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: RowsOrZero = Field(
        default=500,
        description="rows; 0 for algorithms that exchange no predictions on public data",
    )
    labelled: bool = Field(
        default=False,
        description="whether anybody may see the public labels; false leaves them out of the data",
    )
    source: Text | None = Field(
        default=None,
        description="where public rows come from instead of data.source, and named like it: its "
        "training rows, brought to the size and channels of private rows",
    )
    config: Text | None = Field(default=None, description="as data.config, of the public source")
    image_column: Text | None = Field(
        default=None, description="as data.image_column, of the public source"
    )
    feature_columns: Names | None = Field(
        default=None,
        min_length=1,
        max_length=100_000,
        description="as data.feature_columns, of the public source",
    )
    text_column: Text | None = Field(
        default=None, description="as data.text_column, of the public source"
    )
    label_column: Text | None = Field(
        default=None,
        description="as data.label_column, of the public source, which needs none unless public "
        "rows are labelled",
    )
    classes: Literal["by_name", "apart"] = Field(
        default="by_name",
        description="by_name: a class of the public source is the private class of its name; "
        "apart: all its classes are others; counts where public rows are labelled",
    )

    @field_validator("source")
    @classmethod
    def _may_be_called(cls, source: str | None) -> str | None:
        if source is not None:
            check_own_source(source)
        return source

    @model_validator(mode="after")
    def _only_with_a_source(self) -> "PublicSettings":
        for name in ("config", *COLUMNS):
            if self.source is None and getattr(self, name) is not None:
                raise ValueError(
                    f"data.public.{name} belongs to data.public.source, which is not set, got "
                    f"{getattr(self, name)!r}"
                )
        _check_one_kind(self, "data.public")
        if self.source is None and self.classes == "apart":
            raise ValueError("data.public.classes: apart needs a data.public.source")
        return self


class ViewSettings(BaseModel):
    """Inputs of another kind that some clients have (an entry of ``data.views``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Text = Field(description="as data.source; its classes have the same names")
    config: Text | None = Field(default=None, description="as data.config")
    image_column: Text | None = Field(default=None, description="as data.image_column")
    feature_columns: Names | None = Field(
        default=None, min_length=1, max_length=100_000, description="as data.feature_columns"
    )
    text_column: Text | None = Field(default=None, description="as data.text_column")
    text: TextSettings = TextSettings()
    label_column: Text | None = Field(default=None, description="as data.label_column")
    resize: Size | None = Field(default=None, description="as data.resize")
    options: dict[str, JsonValue] = Field(default_factory=dict, description="as data.options")

    @field_validator("source")
    @classmethod
    def _may_be_called(cls, source: str) -> str:
        check_own_source(source)
        return source


class DataSettings(BaseModel):
    """Everything that decides which rows a run sees (``data``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Text = Field(
        default="digits",
        description=(
            "'digits' (1797 grey 8x8 images, ships with scikit-learn); a Parquet, CSV or NPZ file, "
            "a folder of them, of pictures or from save_to_disk; package.module:callable; or the "
            "name of a Hugging Face dataset"
        ),
    )
    config: Text | None = Field(
        default=None, description="configuration (subset) of a Hugging Face dataset name"
    )
    options: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="keyword arguments of a package.module:callable in data.source",
    )
    image_column: Text | None = Field(
        default=None, description="none: image, img, or the only column that holds pictures"
    )
    feature_columns: Names | None = Field(
        default=None,
        min_length=1,
        max_length=100_000,
        description="columns of numbers, of lists of numbers or of categories to learn from, in "
        "this order; none: features, the only column of lists, or all but the labels",
    )
    text_column: Text | None = Field(
        default=None,
        description="column of text to learn from; none: text, sentence, content, ..., or the only "
        "column beside the labels",
    )
    text: TextSettings = TextSettings()
    label_column: Text | None = Field(
        default=None,
        description="none: the first of label, labels, fine_label, or the only ClassLabel, or the "
        "first of target, targets, class, y",
    )
    resize: Size | None = Field(
        default=None,
        description="height and width that all pictures are brought to, as in 32 or [32, 48]; "
        "none: they have one size already",
    )
    test_fraction: Real = Field(
        default=0.2,
        ge=0.001,
        le=0.999,
        description="share of all rows held out for testing, where the source has no test split",
    )
    validation_fraction: Real = Field(
        default=0.1,
        ge=0.001,
        le=0.999,
        description="validation rows as a share of validation and private rows together",
    )
    private_rows: Rows | None = Field(
        default=None, description="at most this many private rows in total; none: all"
    )
    test_rows: Rows | None = Field(
        default=None, description="at most this many test rows; none: all"
    )
    public: PublicSettings = PublicSettings()
    views: tuple[ViewSettings, ...] = Field(
        default=(),
        max_length=8,
        description="sources of other inputs for the same classes; sources are dealt out in turn: "
        "client i has data.source where i % (1 + their number) is 0, else the one of that number",
    )
    partition: PartitionField = DirichletPartition()
    label_noise: LabelNoise = LabelNoise()
    feature_shift: FeatureShift = FeatureShift()
    seed: Seed | None = Field(
        default=None,
        description="seed of the split and the partition; none: the run's seed",
    )

    @field_validator("source")
    @classmethod
    def _may_be_called(cls, source: str) -> str:
        check_own_source(source)
        return source

    @model_validator(mode="after")
    def _options_have_a_taker(self) -> "DataSettings":
        if self.options and not own_code.is_own_code(self.source):
            raise ValueError(
                "data.options are arguments of a package.module:callable, and data.source is "
                f"{shown(self.source)}: leave them out"
            )
        return self

    @model_validator(mode="after")
    def _one_kind_of_input(self) -> "DataSettings":
        _check_one_kind(self, "data")
        if self.views and self.public.source is not None:
            raise ValueError(
                "data.views have public rows of data.source and of each view side by side: leave "
                f"out data.public.source, got {self.public.source!r}"
            )
        if self.views and isinstance(self.partition, NaturalPartition) and self.partition.apart:
            raise ValueError(
                "data.partition.apart is for clients with inputs of one kind: leave it or "
                "data.views out"
            )
        if self.views and (any(self.label_noise.rate) or self.feature_shift.shifts):
            raise ValueError(
                "data.label_noise and data.feature_shift are for clients with inputs of one kind: "
                "leave them or data.views out"
            )
        return self
