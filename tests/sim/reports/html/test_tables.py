import pytest
from markupsafe import Markup

from sim.reports.html.tables import ROOM, Table, table_of
from sim.reports.terminal import Column, FittedTable


def columns(count, cell="12.3 ±4.5"):
    return Table(["arm", *(f"measure {n}" for n in range(count))], [["a", *[cell] * count]])


def test_a_table_that_finds_room_is_one():
    table = columns(4)
    assert table.parts == [table]


@pytest.mark.parametrize("count", [9, 15, 40])
def test_a_wide_table_is_several_that_have_the_first_column_and_lose_none(count):
    table = columns(count)
    parts = table.parts
    assert len(parts) > 1
    assert all(part.header[0] == "arm" and part.rows[0][0] == "a" for part in parts)
    assert [name for part in parts for name in part.header[1:]] == table.header[1:]
    assert all(sum(map(part._width, range(len(part.header)))) <= ROOM for part in parts)
    assert parts[0].caption.endswith(f"part 1 of {len(parts)}")


def test_a_column_wider_than_a_page_stands_alone():
    table = Table(["arm", "a", "b"], [["x", "1" * 200, "2"]])
    assert [part.header for part in table.parts] == [["arm", "a"], ["arm", "b"]]


def test_two_columns_of_words_are_in_every_part():
    table = Table(["of", "arm", *"abcdefgh"], [["x", "y", *["-100.0 to +100.0"] * 8]], left=2)
    assert all(part.header[:2] == ["of", "arm"] and part.left == 2 for part in table.parts)


def test_shades_go_with_their_columns():
    heat = [[0, 5], [10, 2]]
    table = Table(["client", "cat", "dog"], [["0", "0", "5"], ["1", "10", "2"]], heat=heat)
    assert [table.shade(row, column) for row in (0, 1) for column in (0, 1, 2)] == [
        None,
        0,
        50,
        None,
        100,
        20,
    ]
    assert not table.carded
    wide = Table(["client", *["x" * 14] * 12], [["0", *["1"] * 12]], heat=[[*range(12)]])
    assert [number for part in wide.parts for number in part.heat[0]] == [*range(12)]
    nothing = Table(["client", "cat"], [["0", "0"]], heat=[[0]])
    assert nothing.shade(0, 1) == 0


def test_short_tables_are_cards_and_long_ones_are_folded():
    assert columns(3).carded
    assert not Table(["a", "b", "c"], [["1", "2", "3"]], cards=False).carded
    many = Table(["a", "b", "c"], [["1", "2", "3"]] * 16)
    assert (many.carded, many.long) == (False, True)
    assert Table(["a", "b"], [["x", Markup("<svg/>")]]).drawn


def test_columns_that_nobody_fills_are_left_out():
    fitted = FittedTable(
        label="model",
        labels=["a"],
        columns=[
            Column(title="full", cells=["1"], rank=0),
            Column(title="empty", cells=["–"], rank=1),  # noqa: RUF001
        ],
        title="t",
        caption="c",
    )
    assert table_of(fitted).header == ["model", "full"]
