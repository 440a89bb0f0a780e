"""The page that counts files and lines counts those of the examples, and ours runs."""

import re
import shlex
from pathlib import Path

import pytest
from sklearn.datasets import load_wine
from typer.testing import CliRunner

from sim.commands.cli import app

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples" / "side_by_side"
PAGE = (ROOT / "docs" / "side-by-side.md").read_text(encoding="utf-8")
TUTORIAL = (ROOT / "docs" / "tutorials" / "own-method.md").read_text(encoding="utf-8")
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    re.findall(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)[0]
    for section in README.split("\n## ")[1:]
]


def commands(block: str) -> list[str]:
    return block.replace("\\\n", " ").splitlines()


def test_the_page_counts_what_is_there() -> None:
    files, lines = [], []
    for side in ("theirs", "ours"):
        texts = [
            path.read_text(encoding="utf-8")
            for path in (EXAMPLES / side).rglob("*")
            if path.suffix in {".py", ".yaml"}
        ]
        files.append(len(texts))
        lines.append(sum(bool(line.strip()) for text in texts for line in text.splitlines()))
    table = {
        "files to write": files,
        "lines in them that are not empty": lines,
        "commands after installing": [len(commands(block)) for block in COMMANDS],
    }
    for what, (theirs, ours) in table.items():
        assert f"| {what} | {theirs} | {ours} |" in PAGE
    assert all(f"```\n{block}```" in PAGE for block in COMMANDS)


def test_our_method_is_that_of_the_tutorial() -> None:
    assert f"\n{(EXAMPLES / 'ours' / 'surest.py').read_text(encoding='utf-8')}```" in TUTORIAL


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES / "ours")
    table = load_wine(as_frame=True).frame.rename(columns={"target": "cultivar"})
    table.to_csv("wine.csv", index=False)
    return tmp_path


def answer_to(line: str) -> str:
    program, *words = shlex.split(line)
    assert program == "fedkd"
    answer = CliRunner().invoke(app, words)
    assert answer.exit_code == 0, answer.output
    return answer.output


def test_ours_can_be_run(folder: Path) -> None:
    study, _ = commands(COMMANDS[1])
    assert "12 runs: 4 arms x 3 seeds" in answer_to(f"{study} --dry-run")


@pytest.mark.slow
def test_ours_runs(folder: Path) -> None:
    for line in commands(COMMANDS[1]):
        answer_to(line)
    assert "tabular" in (folder / "table.tex").read_text(encoding="utf-8")
