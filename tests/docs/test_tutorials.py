"""Tutorials can be followed: their files, commands and code, in their order, in an empty folder."""

import glob
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sim.commands.cli import app

TUTORIALS = Path(__file__).resolve().parents[2] / "docs" / "tutorials"
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def steps(page: Path) -> list[tuple[str, str, str]]:
    """Language, file name and text of each block that says its language."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        found = getattr(sys.modules[name], "__file__", None)
        if found and Path(found).is_relative_to(tmp_path):
            del sys.modules[name]


def run_commands(text: str) -> None:
    # Two seeds show that it works; what more of them say stands on the page.
    text = re.sub(r"--seeds \d+", "--seeds 2", text)
    for line in text.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line)
        assert program == "fedkd", line
        words = [each for word in words for each in (sorted(glob.glob(word)) or [word])]
        answer = CliRunner().invoke(app, words)
        assert answer.exit_code == 0, f"{line}\n{answer.output}"


@pytest.mark.parametrize("page", sorted(TUTORIALS.glob("*.md")), ids=lambda page: page.stem)
def test_a_tutorial_can_be_followed(page: Path, folder: Path) -> None:
    found = steps(page)
    assert found
    for language, title, text in found:
        if title:
            (folder / title).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, page.name, "exec"), {"__name__": "tutorial"})  # noqa: S102
        else:
            assert language == "sh", language
            run_commands(text)
