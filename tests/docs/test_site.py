"""The site: pages can be found, public names are documented, links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from pymdownx.slugs import slugify

from sim.settings import load_settings
from strategies import STRATEGIES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


@pytest.fixture(scope="module")
def tools() -> Iterator[Mapping[str, Any]]:
    """The modules of docs/tools, which import each other by their own names."""
    sys.path.insert(0, str(DOCS / "tools"))
    names = ("reference", "algorithm_pages", "fill_tables", "attribution_tables")
    names += ("reproduced_tables",)
    try:
        yield {name: import_module(name) for name in names}
    finally:
        sys.path.remove(str(DOCS / "tools"))
        for name in names:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def reference(tools: Mapping[str, Any]) -> Any:
    return tools["reference"]


@pytest.fixture(scope="module")
def pages(reference: Any) -> Mapping[str, str]:
    return {name: text for _, name, text in reference.pages()}


@pytest.fixture(scope="module")
def algorithm_pages(tools: Mapping[str, Any]) -> Mapping[str, str]:
    return dict(tools["algorithm_pages"].pages())


def in_navigation(part: Any) -> Iterator[str]:
    if isinstance(part, str):
        yield part
    for each in part if isinstance(part, list) else []:
        yield from in_navigation(each)
    for each in part.values() if isinstance(part, dict) else []:
        yield from in_navigation(each)


def test_every_page_is_in_the_navigation_once() -> None:
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), yaml.BaseLoader)  # noqa: S506
    found = list(in_navigation(config["nav"]))
    assert sorted(found) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def test_every_public_name_is_documented(reference: Any) -> None:
    assert reference.problems() == []


def test_every_public_name_stands_on_a_page(reference: Any, pages: Mapping[str, str]) -> None:
    missing = [
        path
        for _, page, room in reference.rooms()
        for module in room.modules
        for path, _ in reference.public_names(module)
        if f"{{ #{path} " not in pages[page]
    ]
    assert not missing
    import fedkd

    assert {f"fedkd.{name}" for name in fedkd.__all__} <= reference.anchors().keys()


def test_an_undocumented_name_is_noticed(reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    entropy = reference.module_of("fedkd.targets.selection")["entropy"]
    monkeypatch.setattr(entropy, "docstring", None)
    monkeypatch.delitem(reference.ROOMS["What is learnt"], "mutual")
    monkeypatch.delitem(reference.ROOMS["What is measured"], "metrics")
    assert reference.problems() == [
        "fedkd.metrics offers names and is on no page: add it to ROOMS",
        "fedkd.targets.entropy has no docstring",
    ]


def test_a_signature_says_what_the_function_takes(pages: Mapping[str, str]) -> None:
    _, _, entry = pages["losses"].partition("#fedkd.losses.response.soft_target_loss ")
    entry = entry.partition("\n### ")[0]
    assert "    student_logits: Float[Tensor, 'batch classes'],\n" in entry
    assert "    *,\n    temperature: float,\n" in entry
    for part in ("Arguments", "Returns", "Raises", "Source"):
        assert f"**{part}**" in entry
    assert "Hinton, Vinyals, Dean, 2015" in entry


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_algorithm_has_a_page(algorithm_pages: Mapping[str, str], name: str) -> None:
    text = algorithm_pages[name]
    for heading in ("What happens", "Settings", "Where it is from"):
        assert f"\n## {heading}\n" in text
    assert ("## Faults of published code" in text) == bool(STRATEGIES[name].faults)
    for fault in STRATEGIES[name].faults:
        assert f"\n| `{fault}` | " in text
    (command,) = re.findall(
        r"^fedkd run (strategy\.name=.*)$", text.split("\n## ")[0], re.MULTILINE
    )
    assert load_settings(None, shlex.split(command)).strategy.name == name


def test_tables_of_studies_that_are_not_there_stay(
    tools: Mapping[str, Any], tmp_path: Path
) -> None:
    fill = tools["fill_tables"]
    pages = [(DOCS / name).read_text(encoding="utf-8") for name in fill.PAGES]
    assert [len(fill.BLOCK.findall(text)) for text in pages] == [4, 7]
    assert [fill.filled(text, tmp_path) for text in pages] == pages


def anchors(text: str) -> set[str]:
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    slug = slugify(case="lower")
    headings = re.findall(r"^#+ (.*)$", plain, re.MULTILINE)
    return {slug(re.sub(r"[`*]|\]\([^)]*\)", "", heading), "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(
        r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text(encoding="utf-8")
    ):
        path = page.parent / target if target else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


@pytest.mark.slow
def test_the_site_is_built_and_asks_nobody(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fetched = re.compile(r"<(?:script|img|iframe|link)[^>]+(?:src|href)=\"?(?:https?:)?//[^>]*")
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > 80
    assert {found for page in pages for found in fetched.findall(page.read_text("utf-8"))} == set()
