"""The page about distillation: every row has commands, and every command runs."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sim.commands.cli import app
from sim.settings import load_distill_settings

PAGE = (Path(__file__).parents[2] / "docs" / "distillation.md").read_text(encoding="utf-8")
SECTIONS = [
    part for part in re.split(r"^### ", PAGE, flags=re.MULTILINE) if re.match(r"D\d+ ", part)
]
COMMANDS = [
    (section.split()[0], line)
    for section in SECTIONS
    for line in section.splitlines()
    if line.startswith("fedkd distill") and "--list" not in line
]

every_command = pytest.mark.parametrize(
    ("row", "command"), COMMANDS, ids=[f"{row}-{i}" for i, (row, _) in enumerate(COMMANDS)]
)


def words_of(command):
    return shlex.split(command)[2:]


def test_every_row_has_a_command():
    assert list(dict.fromkeys(row for row, _ in COMMANDS)) == [f"D{n}" for n in range(1, 24)]


@every_command
def test_a_command_has_settings_that_work(row, command, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    words = [word for word in words_of(command) if not word.startswith("--")]
    configs = [word for word in words if "=" not in word]
    load_distill_settings(configs[0] if configs else None, [w for w in words if "=" in w])


@pytest.mark.slow
@every_command
def test_a_command_runs(row, command, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    words = words_of(command)
    short = ["training.epochs=2", "teacher.training.epochs=2", f"output={tmp_path}"]
    answer = CliRunner().invoke(app, ["distill", *words, *short, "--quiet"])
    assert answer.exit_code == 0, answer.output
    if "--search" not in words:
        (result,) = tmp_path.glob("*/*/result.json")
        models = json.loads(result.read_text())["models"]
        assert {"student", "twin"} <= set(models)
