"""Settings under ``data.partition``: a class for each kind, with no parameters but its own."""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag, field_validator

from fedkd import own_code
from fedkd.bounds import Count, Real, Rows, Text, Whole, Width, shown
from fedkd.names import nearest

Concentration: TypeAlias = Annotated[Real, Field(ge=1e-4, le=1e6)]
"""Parameter of a symmetric Dirichlet distribution."""


class PartitionSettings(BaseModel):
    """How the private rows are dealt to the clients (``data.partition``).

    A client may end up with one class only. It still trains and still is evaluated: class
    averages such as macro recall run over the classes of the test set, not over its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    min_rows: Rows = Field(default=8, description="fewest private rows a client may hold")

    most_draws: ClassVar[int] = 1
    """How often shares are drawn until every client has its fewest rows."""
    remedy: ClassVar[str] = ""
    """What gives clients more rows, besides fewer clients; it may name the parameters."""


class IidPartition(PartitionSettings):
    """Equal random shares."""

    kind: Literal["iid"] = "iid"


class DirichletPartition(PartitionSettings):
    """Each class is dealt in shares drawn from Dirichlet(alpha)."""

    kind: Literal["dirichlet"] = "dirichlet"
    alpha: Concentration = Field(
        default=0.3, description="Dirichlet concentration: 0.1 is very uneven, 100 is close to iid"
    )

    # Few enough that settings which cannot work fail within seconds.
    most_draws: ClassVar[int] = 20
    remedy: ClassVar[str] = "a larger data.partition.alpha (now {alpha})"


class PathologicalPartition(PartitionSettings):
    """Each client holds rows of a few classes."""

    kind: Literal["pathological"] = "pathological"
    classes_per_client: Width = Field(default=2, description="classes that a client holds")

    most_draws: ClassVar[int] = 20
    remedy: ClassVar[str] = "a larger data.partition.classes_per_client (now {classes_per_client})"


class ShardPartition(PartitionSettings):
    """Each client holds a few shards of the rows sorted by label."""

    kind: Literal["shard"] = "shard"
    shards_per_client: Count = Field(default=2, description="shards that a client holds")


class QuantityPartition(PartitionSettings):
    """Sizes from Dirichlet(alpha), classes alike."""

    kind: Literal["quantity"] = "quantity"
    alpha: Concentration = Field(
        default=0.5,
        description="concentration of the clients' shares of all rows: 0.1 is very uneven, 100 "
        "nearly equal",
    )

    # A draw costs next to nothing, and small shares are likely.
    most_draws: ClassVar[int] = 1000
    remedy: ClassVar[str] = "a larger data.partition.alpha (now {alpha})"


class PowerLawPartition(PartitionSettings):
    """Sizes that grow as a power of the client's place, classes alike."""

    kind: Literal["power_law"] = "power_law"
    exponent: Annotated[Real, Field(ge=0, le=100)] = Field(
        default=1.0,
        description="client k has rows in proportion to (k + 1) to this power; 0: all have as many",
    )

    remedy: ClassVar[str] = "a smaller data.partition.exponent (now {exponent})"


class InnerDirichletPartition(PartitionSettings):
    """Sizes are given; the classes of each client have shares from Dirichlet(alpha)."""

    kind: Literal["inner_dirichlet"] = "inner_dirichlet"
    alpha: Concentration = Field(
        default=0.3, description="concentration of the classes within a client"
    )
    sizes: Annotated[tuple[Rows, ...], Field(min_length=1, max_length=100_000)] | None = Field(
        default=None, description="rows of each client; none: equal shares of all"
    )


OfEachClient: TypeAlias = Annotated[
    Rows | None, Field(description="rows of each client; none: equal shares of all")
]


class ScarcePartition(PartitionSettings):
    """Equal random shares, but each client has few rows of some classes."""

    kind: Literal["scarce"] = "scarce"
    rows: OfEachClient = None
    classes: Width = Field(default=3, description="classes of which a client has few rows")
    kept: Count = Field(default=5, description="rows that it keeps of each of them")

    remedy: ClassVar[str] = "fewer data.partition.classes (now {classes})"


class DominantPartition(PartitionSettings):
    """Most rows of a client are of one class, the others of any other."""

    kind: Literal["dominant"] = "dominant"
    rows: OfEachClient = None
    share: Annotated[Real, Field(ge=0, le=1)] = Field(
        default=0.8, description="of a client's rows that are of its class"
    )


class NWayPartition(PartitionSettings):
    """Each client holds equally many rows of each of a few classes."""

    kind: Literal["n_way"] = "n_way"
    ways: Width = Field(default=3, description="classes that a client holds, in the middle")
    spread: Annotated[Whole, Field(ge=0, le=65_536)] = Field(
        default=0,
        description="the most by which a client's number of classes differs from that; all in "
        "between are as likely, but none has less than two, unless ways is 1",
    )
    shots: Count = Field(default=100, description="rows that a client holds of each of them")

    remedy: ClassVar[str] = "more data.partition.shots (now {shots})"


class NaturalPartition(PartitionSettings):
    """A client for each value of a column that says whose a row is."""

    kind: Literal["natural"] = "natural"
    column: Text | None = Field(
        default=None,
        description="column of whose each row is, which has to be named; of a folder of pictures, "
        "folder: the one above those of the classes",
    )
    repeat: bool = Field(
        default=False,
        description="whether several clients may share the rows of one id, where there are more "
        "clients than ids",
    )
    apart: bool = Field(
        default=False,
        description="whether public and validation rows, and test rows of a source without a test "
        "split, are of ids that are no clients; else rows are drawn whosever they are",
    )

    @property
    def named_column(self) -> str:
        """The column.

        Raises:
            ValueError: none is named.
        """
        if self.column is None:
            raise ValueError(self.unnamed("data.source", ()))
        return self.column

    @staticmethod
    def unnamed(source: str, known: Sequence[str]) -> str:
        """Say that a column has to be named.

        Args:
            source: the setting of the rows, and what it is.
            known: columns of it that can say whose a row is.
        """
        shown = ", ".join(known[:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
        return (
            "data.partition.column must name the column that says whose each row is, for "
            f"data.partition.kind=natural; {source} has {shown or 'none that could'}"
        )


class OwnPartition(PartitionSettings):
    """A function of one's own deals the rows."""

    kind: str
    options: dict[str, JsonValue] = Field(
        default_factory=dict, description="passed on to the function as keyword arguments"
    )

    @field_validator("kind")
    @classmethod
    def _check_kind(cls, kind: str) -> str:
        if own_code.is_own_code(kind):
            own_code.may_load(kind)
            return kind
        raise ValueError(
            f"unknown partition {shown(kind)}; known: {', '.join(PARTITIONS)}; or "
            f"package.module:callable{nearest(kind, PARTITIONS)}"
        )


PARTITIONS: dict[str, type[PartitionSettings]] = {
    "iid": IidPartition,
    "dirichlet": DirichletPartition,
    "pathological": PathologicalPartition,
    "shard": ShardPartition,
    "quantity": QuantityPartition,
    "power_law": PowerLawPartition,
    "inner_dirichlet": InnerDirichletPartition,
    "scarce": ScarcePartition,
    "dominant": DominantPartition,
    "n_way": NWayPartition,
    "natural": NaturalPartition,
}


def _kind_of(value: object) -> str:
    if isinstance(value, Mapping):
        kind = value.get("kind", "dirichlet")
    else:
        kind = getattr(value, "kind", None)
    return kind if isinstance(kind, str) and kind in PARTITIONS else own_code.OTHER_PACKAGE


PartitionField = Annotated[
    Annotated[IidPartition, Tag("iid")]
    | Annotated[DirichletPartition, Tag("dirichlet")]
    | Annotated[PathologicalPartition, Tag("pathological")]
    | Annotated[ShardPartition, Tag("shard")]
    | Annotated[QuantityPartition, Tag("quantity")]
    | Annotated[PowerLawPartition, Tag("power_law")]
    | Annotated[InnerDirichletPartition, Tag("inner_dirichlet")]
    | Annotated[ScarcePartition, Tag("scarce")]
    | Annotated[DominantPartition, Tag("dominant")]
    | Annotated[NWayPartition, Tag("n_way")]
    | Annotated[NaturalPartition, Tag("natural")]
    | Annotated[OwnPartition, Tag(own_code.OTHER_PACKAGE)],
    Discriminator(_kind_of),
]
"""The kind decides which parameters there are; without one it is ``dirichlet``."""
