"""`fedkd algorithms` tells who learns from whom, what travels, and where it is from."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sim.commands.algorithms import algorithms
from sim.commands.arms import load_study
from sim.commands.cli import app
from sim.contract import sections_of
from sim.scaffold import TEMPLATE
from sim.settings import merge_tables, settings_from_table
from strategies import STRATEGIES

OURS = {"local", "pooled", "one_way"}
"""Nobody else's idea, or several people's."""
EXAMPLE = Path(__file__).parents[3] / "conf" / "examples" / "all-algorithms.yaml"


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_algorithm_has_a_card_and_a_source(name: str) -> None:
    row = algorithms(name)[0].to_row()
    assert all(row[key] for key in ("title", "learns", "up", "down", "equation"))
    assert name in OURS or re.search(r"\d{4}.* https://", row["source"])


def test_the_table_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(app, ["algorithms"])
    lines = shown.output.splitlines()
    assert max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines if line.strip()} >= STRATEGIES.keys()


def test_one_algorithm_is_told_with_its_defaults_and_its_command() -> None:
    shown = CliRunner().invoke(app, ["algorithms", "fml"]).output
    assert "https://arxiv.org/abs/2006.16765" in shown
    assert "weighting=equal" in shown
    assert "fedkd run strategy.name=fml" in shown


def test_a_command_holds_what_an_algorithm_needs() -> None:
    (told,) = algorithms("fedgems")
    assert told.command == "fedkd run strategy.name=fedgems data.public.labelled=true"


def test_an_algorithm_of_a_package_of_ones_own_is_told_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(TEMPLATE)
    told = algorithms("my_method:MyMethod")[0]
    assert told.description.title
    assert told.command.endswith("MyMethod")


def test_the_example_of_all_algorithms_has_them_all_with_what_they_need() -> None:
    arms = load_study(str(EXAMPLE)).arms
    assert arms.keys() == STRATEGIES.keys()
    for name, settings in arms.items():
        needed = sections_of(algorithms(name)[0].description.card.needs)
        assert settings_from_table(merge_tables(settings.to_table(), needed)) == settings, name
