"""Settings under ``data:``: where the images come from and who gets which rows."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fedkd.bounds import Count, Real, Rows, RowsOrZero, Seed, Text, Whole, Width, shown

PartitionKind = Literal["iid", "dirichlet", "pathological", "shard"]


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


class PartitionSettings(BaseModel):
    """How the private rows are dealt to the clients (``data.partition``).

    A client may end up with one class only. It still trains and still is evaluated: class
    averages such as macro recall run over the classes of the test set, not over its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: PartitionKind = Field(
        default="dirichlet",
        description=(
            "iid: equal random shares; dirichlet: each class is dealt in Dirichlet(alpha) shares; "
            "pathological: each client holds classes_per_client classes; "
            "shard: each client holds shards_per_client shards of the rows sorted by label"
        ),
    )
    alpha: Real = Field(
        default=0.3,
        ge=1e-4,
        le=1e6,
        description="Dirichlet concentration: 0.1 is very uneven, 100 is close to iid",
    )
    classes_per_client: Width = Field(default=2, description="used by pathological")
    shards_per_client: Count = Field(default=2, description="used by shard")
    min_rows: Rows = Field(default=8, description="fewest private rows a client may hold")


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
    partition: PartitionSettings = PartitionSettings()
    seed: Seed | None = Field(
        default=None,
        description="seed of the split and the partition; none: the run's seed",
    )
