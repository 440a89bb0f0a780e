"""What columns and cells hold, by their types and by what is written in them."""

from typing import TYPE_CHECKING

from fedkd.names import printable

if TYPE_CHECKING:
    import pyarrow as pa

    from fedkd.data.tables import Table


def storage(kind: "pa.DataType") -> "pa.DataType":
    """Return the plain type behind Array2D and Array3D of ``datasets``."""
    import pyarrow as pa

    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def holds_numbers(kind: "pa.DataType") -> bool:
    """Tell whether each cell is a number or a truth value."""
    import pyarrow as pa

    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
    )


def holds_text(kind: "pa.DataType") -> bool:
    """Tell whether each cell is text, also where a dictionary has it."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()
    )


def is_list(kind: "pa.DataType") -> bool:
    """Tell whether each cell is a list of anything."""
    import pyarrow as pa

    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def depth(kind: "pa.DataType") -> int:
    """Return how deep lists of numbers are nested, 0 for mere numbers; -1 for anything else."""
    levels = 0
    kind = storage(kind)
    while is_list(kind):
        levels, kind = levels + 1, kind.value_type
    return levels if holds_numbers(kind) else -1


def holds_lists(kind: "pa.DataType") -> bool:
    """Tell whether each cell is a list of numbers, or of such lists."""
    return depth(kind) > 0


def is_number(text: str) -> bool:
    """Tell whether a cell of text is a number as Python writes it."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def columns_in(table: "Table") -> str:
    """Name the columns of a file, for a message."""
    return printable(", ".join(table.schema.names))
