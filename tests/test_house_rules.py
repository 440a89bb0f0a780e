"""Rules that hold for every source file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for floor in ("fedkd", "strategies", "sim") for path in (ROOT / floor).rglob("*.py")
)
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}


def unsafe_uses(source: str) -> list[str]:
    """Name imports of modules that run code from data, and calls that do."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found += [node.func.id] if node.func.id in UNSAFE_CALLS else []
            continue
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            is_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
            found += ["torch.load"] if is_torch and node.func.attr == "load" else []
            continue
        else:
            continue
        found += [name for name in names if name.split(".")[0] in UNSAFE_MODULES]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_runs_code_from_data(path: Path) -> None:
    assert unsafe_uses(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from joblib import load", "eval('1')", "import torch\ntorch.load('a')"],
)
def test_the_rule_sees_what_it_forbids(source: str) -> None:
    assert unsafe_uses(source)


def test_only_one_module_seeds_torch() -> None:
    seeding = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if "manual_seed" in path.read_text(encoding="utf-8")
    ]
    assert seeding == ["fedkd/randomness.py"]


def test_every_training_takes_its_steps_through_one_core() -> None:
    stepping = [
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if ".backward()" in path.read_text(encoding="utf-8")
    ]
    assert stepping == ["fedkd/training/steps.py"]
