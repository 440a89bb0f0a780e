"""The pages in docs/ say what the code does."""

import importlib.util
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "README.md",
    ROOT / "sim" / "scaffold" / "template" / "README.md",
]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def load_module(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def module_of() -> Iterator[Callable[[str, Path], Any]]:
    before = set(sys.modules)
    yield load_module
    for name in set(sys.modules) - before:
        if name.startswith("docs_"):
            del sys.modules[name]


@pytest.fixture
def generator(module_of: Callable[[str, Path], Any]) -> Any:
    return module_of("docs_generator", ROOT / "docs" / "generate_settings.py")


def blocks(path: Path, language: str) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return [body for kind, body in FENCE.findall(text) if kind == language]


@pytest.mark.parametrize(
    "name", ["adversaries.md", "algorithms.md", "privacy.md", "settings.md", "strategies.md"]
)
def test_tables_of_settings_are_fresh(generator: Any, name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert generator.rewritten(text) == text, "run: python docs/generate_settings.py"


def test_a_changed_table_is_noticed(generator: Any) -> None:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert generator.rewritten(text.replace("| `rounds` | `20` |", "| `rounds` | `21` |")) == text


def test_every_table_stands_on_a_page(generator: Any) -> None:
    pages = (ROOT / "docs" / name for name in generator.PAGES)
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    shown = [name for _, name, _ in generator.BLOCK.findall(text)]
    assert sorted(shown) == sorted(generator.BLOCKS)


def test_every_key_is_in_the_table(generator: Any) -> None:
    from sim.settings import Settings

    def leaves(table: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for key, value in table.items():
            name = f"{prefix}{key}"
            if name == "strategy":
                yield "strategy.name"
            elif isinstance(value, dict) and value and name not in whole:
                yield from leaves(value, f"{name}.")
            else:
                yield name

    # Values of several kinds, which have one line.
    whole = {"clients.optimizer.decay", "exchange.up", "exchange.down", "exchange.view"}
    whole |= {"privacy.mechanism", "adversary"}
    assert [key.name for key in generator.settings_keys()] == list(
        leaves(Settings().model_dump(mode="json"))
    )


def test_every_key_of_a_distillation_is_in_the_table(generator: Any) -> None:
    from fedkd.distillation.settings import DistillSettings

    keys = [key.name for key in generator.distill_keys()]
    for section in DistillSettings.model_fields:
        assert any(key == section or key.startswith(f"{section}.") for key in keys), section
    assert {"objective", "method.name", "teacher.training.optimizer.lr", "search.weights"} <= {
        *keys
    }


def test_an_objective_is_written_as_a_settings_file_would(generator: Any) -> None:
    from fedkd.objectives import Objective

    table = {"ce": 0.1, "kd": {"weight": 0.9, "temperature": 2.0}, "late": {"kind": "mse"}}
    written = generator._yaml(Objective.model_validate(table))
    assert yaml.safe_load(written.strip("`")) == {**table, "late": {"kind": "mse", "weight": 1.0}}


def test_every_strategy_has_an_entry_with_its_settings() -> None:
    from strategies import STRATEGIES

    text = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    entries = {entry.split("\n", 1)[0]: entry for entry in text.split("\n## ")[1:]}
    for name in STRATEGIES:
        assert name in entries, f"docs/strategies.md needs a heading '## {name}'"
        assert f"<!-- generated: strategy {name} -->" in entries[name]
        assert re.search(r"^Sources?: ", entries[name], re.MULTILINE)


def settings_blocks() -> list[Any]:
    return [
        pytest.param(block, id=f"{page.name} {number}")
        for page in PAGES
        for number, block in enumerate(blocks(page, "yaml"), start=1)
    ]


@pytest.mark.parametrize("block", settings_blocks())
def test_settings_on_a_page_are_valid(block: str, tmp_path: Path) -> None:
    from fedkd.distillation.settings import DistillSettings
    from sim.commands.arms import study_of
    from sim.settings import Settings, load_distill_settings, load_settings

    table = yaml.safe_load(block)
    known = Settings.model_fields.keys() | DistillSettings.model_fields.keys()
    if not isinstance(table, dict) or not table.keys() & known:
        pytest.skip("not a table of settings")
    config = tmp_path / "page.yaml"
    config.write_text(block, encoding="utf-8")
    if table.keys() <= Settings.model_fields.keys():
        study_of(load_settings(config))
    else:
        load_distill_settings(config)


def test_the_example_of_an_algorithm_learns(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_settings: Any,
    tiny_data: Any,
    simulate: Any,
) -> None:
    (example,) = blocks(ROOT / "docs" / "strategies.md", "python")
    (tmp_path / "vote.py").write_text(example, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        run = simulate(tiny_settings("vote:Vote"), tiny_data())
    finally:
        sys.modules.pop("vote", None)
    assert run.events == []
    assert {row["kind"] for row in run.exchange} == {"logits", "mean_probabilities"}
    assert run.history.federation[-1]["accuracy"] > 1 / 3


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_table_of_mechanisms_says_what_a_run_would_be_refused_for(generator: Any) -> None:
    table, _, reasons = generator.mechanism_table().partition("\n\n")
    rows = {
        cells[1].strip(" *`"): [cell.strip() for cell in cells[3:-1]]
        for line in table.splitlines()[2:]
        for cells in [line.split("|")]
    }
    from strategies import STRATEGIES

    assert list(rows) == list(STRATEGIES)
    assert rows["dsfl"] == ["yes"] * 5
    told = dict(line.split(". ", 1) for line in reasons.splitlines())

    def why(name: str, column: int) -> str:
        return told[rows[name][column].removeprefix("no [").removesuffix("]")]

    assert why("proxyfl", 0).startswith("a private model, which is not protected, teaches")
    assert why("dml", 2).startswith("a trusted server adds noise to the mean of all answers")
    assert why("fedavg", 1).startswith("it protects predictions, class_table, prototypes")
    assert why("selective_fd", 1).startswith("which public rows a client sends")
    # What would be sound instead is for whoever is refused.
    assert not any("; use" in reason or "; set" in reason for reason in told.values())


@pytest.mark.parametrize(
    "path", sorted((ROOT / "conf" / "examples").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_example_is_valid(path: Path) -> None:
    from sim.commands.arms import study_of
    from sim.settings import load_settings

    settings = load_settings(path)
    assert settings.name == path.stem
    study_of(settings)


def commands(page: Path) -> Iterator[str]:
    """The commands with settings that a page shows, in blocks and in sentences."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    lines = [line for body in blocks.findall(text) for line in body.splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", blocks.sub("", text))]
    known = re.compile(r"fedkd (run|compare|distill|data|doctor|privacy)\b")
    return (line for line in lines if known.match(line))


SWEPT_BY = ("--sweep", "--together", "--only", "--without")

# Code of the reader's own, what is left open, and a mistake made to show what is said of it.
NOT_OURS = {
    *("strategy.name=my_package.my_module:MyMethod", "strategy.name=vote:Vote"),
    *("data.source=...", "rouns=3", "study.arms.surest.strategy=surest:Surest"),
    "study.arms.surest.strategy={name: surest:Surest, digest_loss: l1}",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_on_a_page_name_settings_that_there_are(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sim.commands.cli.words import sweep_words
    from sim.settings import SettingsError, load_distill_settings, load_settings

    monkeypatch.chdir(ROOT)
    wrong = []
    for command in commands(page):
        _, name, *words = shlex.split(command, comments=True)
        load = load_distill_settings if name == "distill" else load_settings
        config = next((word for word in words if word.endswith(".yaml")), None)
        swept: dict[str, list[str]] = {name: [] for name in SWEPT_BY}
        for option, value in pairwise(words):
            swept.get(option, []).append(value)
        of_options = [value for values in swept.values() for value in values]
        given = [word for word in words if "=" in word and not word.startswith("--")]
        given = [word for word in given if word not in of_options] + sweep_words(*swept.values())
        if NOT_OURS & {*given}:
            continue
        try:
            load(config if config is None or Path(config).exists() else None, given)
        except SettingsError as error:
            wrong.append(f"{command}: {error}")
    assert not wrong, "\n".join(wrong)
