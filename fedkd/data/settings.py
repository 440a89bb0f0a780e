"""Settings under ``data:``: where the images come from and who gets which rows."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fedkd.bounds import Real, Rows, RowsOrZero, Seed, Text, Whole, shown
from fedkd.data.feature_shift import FeatureShift
from fedkd.data.label_noise import LabelNoise
from fedkd.data.partition_settings import DirichletPartition, PartitionField

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
    label_column: Text | None = Field(
        default=None, description="as data.label_column, of the public source"
    )
    classes: Literal["by_name", "apart"] = Field(
        default="by_name",
        description="by_name: a class of the public source is the private class of its name; "
        "apart: all its classes are others; counts where public rows are labelled",
    )

    @model_validator(mode="after")
    def _only_with_a_source(self) -> "PublicSettings":
        for name in ("config", "image_column", "label_column"):
            if self.source is None and getattr(self, name) is not None:
                raise ValueError(
                    f"data.public.{name} belongs to data.public.source, which is not set, got "
                    f"{getattr(self, name)!r}"
                )
        if self.source is None and self.classes == "apart":
            raise ValueError("data.public.classes: apart needs a data.public.source")
        return self


class DataSettings(BaseModel):
    """Everything that decides which rows a run sees (``data``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Text = Field(
        default="digits",
        description=(
            "'digits' (1797 grey 8x8 images, ships with scikit-learn); a Parquet file, a folder of "
            "them, of pictures or from save_to_disk; or the name of a Hugging Face dataset"
        ),
    )
    config: Text | None = Field(
        default=None, description="configuration (subset) of a Hugging Face dataset name"
    )
    image_column: Text | None = Field(
        default=None, description="none: image, img, or the only column that holds pictures"
    )
    label_column: Text | None = Field(
        default=None, description="none: the first of label, labels, fine_label"
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
    partition: PartitionField = DirichletPartition()
    label_noise: LabelNoise = LabelNoise()
    feature_shift: FeatureShift = FeatureShift()
    seed: Seed | None = Field(
        default=None,
        description="seed of the split and the partition; none: the run's seed",
    )
