"""At any width: numbers stand whole or not at all, and what is left out is said."""

import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sim.commands.overview import DataOverview
from sim.reports import summary_table
from sim.reports.distillation import DistillRecord, distill_table
from sim.reports.terminal import MOST_NAMES, Column, FittedTable

WIDTHS = [20, 40, 60, 80]
NUMBER = re.compile(r"[-+±<]?\d[\d.,]*\*?")


def printed(table, width):
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(table)
    return console.file.getvalue()


def wide(table):
    return printed(table, table.natural_width)


def check_fits(table, width):
    """No line is longer than the terminal; every number of a shown column stands there whole."""
    text = printed(table, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text
    shown, left_out = table.fitting(width)
    lines = [line.rstrip() for line in text.splitlines()]
    for column in shown:
        for cell in column.cells:
            pattern = rf"(?<![\d.,]){re.escape(cell.strip())}(?![\d.,%*])"
            assert any(re.search(pattern, line) for line in lines), cell
    for column in left_out[:MOST_NAMES]:
        assert column.title in " ".join(text.split())
    assert ("--wide shows" in " ".join(text.split())) == bool(left_out)
    return text


def study(make_run, names):
    extra = {"server_accuracy": 0.6251, "ensemble_accuracy": 0.7512}
    return {
        name: [
            make_run(
                seed=seed,
                accuracies=(0.4 + arm / 10 + (arm + 1) * seed / 90,),
                federation=extra,
                silent=arm == 0,
            )
            for seed in range(3)
        ]
        for arm, name in enumerate(names)
    }


SHORT = ["local", "one_way", "fedavg", "fedmd", "dml"]
LONG = ["mutual-with-a-cosine-temperature-from-four-to-one-and-all-public", "x" * 64, "one_way"]


@pytest.mark.parametrize("names", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_study_fits(make_run, width, names):
    table = summary_table(study(make_run, names), "one_way")
    text = check_fits(table, width)
    # Every arm is named, if need be over several lines.
    room = width - sum(1 + column.width for column in table.fitting(width)[0])
    letters = re.sub(r"\s", "", "".join(line[:room] for line in text.splitlines()))
    assert all(name in letters for name in names)


def test_at_80_columns_arms_accuracies_and_the_answer_stand_side_by_side(make_run):
    text = printed(summary_table(study(make_run, SHORT), "one_way"), 80)
    row = next(line for line in text.splitlines() if line.startswith("dml"))
    whole = next(
        line
        for line in wide(summary_table(study(make_run, SHORT), "one_way")).splitlines()
        if line.startswith("dml")
    )
    assert len(NUMBER.findall(row)) >= 7
    assert set(NUMBER.findall(row)) <= set(NUMBER.findall(whole))
    head = text.splitlines()[1:3]
    assert "minus" in head[0] + head[1]
    assert "one_way" in head[1]


def overview(names, clients=4):
    rows = [
        {
            "client": client,
            "rows": 12345 + client,
            "classes": len(names),
            "label_entropy": 1.98,
            **{f"class {name}": 100 * client + number for number, name in enumerate(names)},
        }
        for client in range(clients)
    ]
    sizes = {"private": 1437, "public": 500, "validation": 160, "test": 360}
    return DataOverview("digits", "pictures of 1x8x8", rows, sizes, Path("split.png")).table()


SPLITS = {
    "digits": overview([str(number) for number in range(10)]),
    "26 letters": overview([chr(ord("a") + number) for number in range(26)]),
    "long names": overview([f"golden retriever, kind {number}" for number in range(12)]),
    "100 clients": overview(["cat", "dog"], clients=100),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("split", SPLITS)
def test_a_split_fits(split, width):
    table = SPLITS[split]
    text = check_fits(table, width)
    assert f"{len(table.labels) - 1} " in text


def distilled(tmp_path, count):
    def model(share):
        return {
            "accuracy": share,
            "macro_recall": share,
            "worst_class_recall": share / 3,
            "ece": 0.0412,
            "agreement": share,
            "kl_to_teacher": 0.318,
            "parameters": 1234567,
            "flops": 4.5e9,
            "size_bytes": 45678912,
            "latency_s": {"1": 0.00123, "64": 0.0456},
        }

    return [
        DistillRecord(
            folder=tmp_path,
            seed=seed,
            settings={},
            result={
                "models": {
                    name: model(share + seed * step / 100)
                    for step, (name, share) in enumerate(
                        {"teacher 1": 0.91, "student": 0.88, "twin": 0.84}.items()
                    )
                }
            },
            epochs=(),
        )
        for seed in range(count)
    ]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_distillation_fits(tmp_path, width, count):
    check_fits(distill_table(distilled(tmp_path, count)), width)


@given(
    width=st.integers(1, 130),
    labels=st.lists(st.text("ab -", max_size=40), min_size=1, max_size=4),
    columns=st.lists(
        st.tuples(
            st.text("xyz ", min_size=1, max_size=30).filter(str.strip),
            st.floats(-1e6, 1e6),
            st.integers(0, 5),
        ),
        max_size=8,
        unique_by=lambda column: column[0],
    ),
)
def test_whatever_the_table_numbers_are_whole_and_lines_fit(width, labels, columns):
    table = FittedTable(
        label="who",
        labels=labels,
        columns=[
            Column(title=title, cells=[f"{value:,.3f}"] * len(labels), rank=rank)
            for title, value, rank in columns
        ],
    )
    text = printed(table, width)
    assert all(len(line) <= width for line in text.splitlines())
    for column in table.fitting(width)[0]:
        assert column.cells[0] in text


def test_what_matters_most_finds_room_first_and_a_column_needs_what_it_is_about():
    def column(title, width, rank, needs=""):
        return Column(title=title, cells=["1" * width], rank=rank, needs=needs)

    table = FittedTable(
        label="a",
        labels=["b"],
        columns=[column("x", 9, 2), column("y", 4, 1), column("p", 3, 3, needs="x")],
    )
    names = {width: [each.title for each in table.fitting(width)[0]] for width in (4, 7, 12, 20)}
    assert names == {4: [], 7: ["y"], 12: ["y"], 20: ["x", "y", "p"]}


def test_columns_that_no_row_fills_are_neither_shown_nor_missed():
    table = FittedTable(
        label="a",
        labels=["b"],
        columns=[Column(title="x", cells=["–"], rank=1)],  # noqa: RUF001
    )
    assert "left out" not in printed(table, 40)
    assert "x" not in printed(table, 40)


def test_names_are_neither_markup_nor_escape_codes():
    table = FittedTable(
        label="[bold]arm[/bold]",
        labels=["[red]a[/red]", "\x1b[2Jb", "c\nd", "[/x]"],
        columns=[Column(title="[i]t\x07", cells=["1", "2", "3", "4"], rank=1)],
        title="[link=x]y\x1b]0;owned\x07",
        caption="\u202etxet",
    )
    text = wide(table)
    for shown in ("[bold]arm[/bold]", "[red]a[/red]", r"\x1b[2Jb", r"c\nd", "[/x]", r"[i]t\x07"):
        assert shown in text
    for hidden in "\x1b\x07\u202e":
        assert hidden not in text


def test_columns_of_one_title_are_two_and_many_that_find_no_room_are_counted():
    columns = [
        Column(title="class a", cells=[str(number)], rank=number) for number in range(100, 130)
    ]
    table = FittedTable(label="client", labels=["0"], columns=columns)
    shown, left_out = table.fitting(20)
    assert [column.cells for column in shown] == [["100"], ["101"]]
    assert len(left_out) == 28
    assert "and 16 more; --wide shows all" in " ".join(printed(table, 20).split())
