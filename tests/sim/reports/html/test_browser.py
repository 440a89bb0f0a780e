"""Pages in a real browser: nothing is cut, nothing lies outside, everything has words.

Needs playwright and a Chromium; without either the tests are skipped. One browser serves all.
"""

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from sim.reports import write_report
from sim.reports.grids import Axis, Grid

WIDTHS = (1280, 768, 400)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory, write_run):
    """A study with everything that is wide: long names, many arms, seeds and classes, a sweep."""
    folder = tmp_path_factory.mktemp("report")
    axes = (
        Axis("rule", tuple(f"a_rule_with_a_rather_long_name_{place}" for place in range(3))),
        Axis("share", (0, 0.2, 0.4)),
    )
    runs = {}
    for rule in range(3):
        for place, share in enumerate(axes[1].values):
            runs[f"a_rule_with_a_rather_long_name_{rule}-{share}"] = [
                write_run(
                    seed=seed,
                    accuracies=(0.3, 0.4 + rule / 20 + place / 50 + seed / 100),
                    federation={
                        "server_accuracy": 0.5,
                        "ensemble_accuracy": 0.6,
                        "peer_disagreement": 0.5,
                        "target_entropy": 1.0,
                    },
                    privacy={"mechanism": "dp_sgd", "epsilon": 1 + rule} if rule else None,
                )
                for seed in range(3)
            ]
    split = {
        "sizes": {"private": 100, "public": 10, "validation": 10, "test": 20},
        "rows": [60, 40],
        "classes": [f"class {name}" for name in range(15)],
        "counts": [[4] * 15, [0, 40, *[0] * 13]],
    }
    peers = {
        "judged": 60,
        "clients": list(range(40)),
        "agreement": [[1.0 if one == other else 0.5 for one in range(40)] for other in range(40)],
        "reliability": {
            "rows": [*[0] * 7, *[50] * 8],
            "correct": [*[0] * 7, *[30] * 8],
            "confidence": [*[0.0] * 7, *(50 * (place + 0.5) / 15 for place in range(7, 15))],
        },
    }
    runs = {
        arm: [replace(run, split=split, peers=peers) for run in own] for arm, own in runs.items()
    }
    refused = {"refused": "a_word_without_any_space_that_is_much_longer_than_a_phone_is_wide" * 3}
    return write_report(
        {**runs, "refused": []},
        folder,
        title="A study_with_a_title_that_is_longer_than_a_phone_is_wide_and_has_no_spaces",
        refused=refused,
        grid=Grid(axes, tuple(runs)),
    )


@pytest.fixture(scope="module")
def write_run(tmp_path_factory):
    """Write a run and read it back, for a report that many tests look at."""
    from sim.reports.runs import load_run

    from_conftest = _writer()
    folder, count = tmp_path_factory.mktemp("runs"), 0

    def write(**options):
        nonlocal count
        count += 1
        return load_run(from_conftest(folder / str(count), **options))

    return write


def _writer():
    import importlib.util

    path = Path(__file__).parents[1] / "conftest.py"
    spec = importlib.util.spec_from_file_location("report_runs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_run


@pytest.fixture
def faults(browser, page_faults):
    """Look for faults of a page, a file or its text."""

    def found(source, *, width=1280, scheme="light", opened=True):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        try:
            if isinstance(source, Path):
                page.goto(source.as_uri())
            else:
                page.set_content(source)
            if opened:
                page.evaluate(
                    "document.querySelectorAll('details').forEach(each => each.open = true)"
                )
            return page.evaluate(page_faults)
        finally:
            page.close()

    return found


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_outside_or_without_words(faults, page_file, width, scheme):
    assert faults(page_file, width=width, scheme=scheme) == []


def test_a_phone_gets_figures_of_its_own(browser, page_file):
    used = {}
    for width in (1280, 400):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto(page_file.as_uri())
        used[width] = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        page.close()
    assert all(narrow < wide for wide, narrow in zip(used[1280], used[400], strict=True))


def test_keys_reach_the_answer_first(browser, page_file):
    page = browser.new_page()
    page.goto(page_file.as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") == 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "answer"
    page.close()


def test_a_printed_page_has_no_scrollbar_and_nothing_outside(browser, page_file, tmp_path):
    page = browser.new_page(viewport={"width": 718, "height": 1000})
    page.goto(page_file.as_uri())
    page.emulate_media(media="print")
    bars = page.evaluate(
        "[...document.querySelectorAll('body *')].filter(each => "
        "['auto', 'scroll'].includes(getComputedStyle(each).overflowX)).length"
    )
    assert bars == 0
    # 718 pixels lie between the margins of an A4 page.
    wide = page.evaluate(
        "[...document.querySelectorAll('table, img, pre, p')]"
        ".filter(each => each.getBoundingClientRect().right > 719)"
        ".map(each => each.outerHTML.slice(0, 80))"
    )
    assert wide == []
    page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
    page.close()
    pdf = (tmp_path / "report.pdf").read_bytes()
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert 3 <= pages <= 30
    if shutil.which("pdftotext") is None:
        return
    text = subprocess.run(
        ["pdftotext", "-bbox", tmp_path / "report.pdf", "-"], capture_output=True, check=True
    ).stdout.decode()
    edges = [float(edge) for edge in re.findall(r'xMax="([\d.]+)"', text)]
    # A4 is 595 points wide; the margin is 28.
    assert max(edges) <= 595 - 28 + 1
    # What is folded away on a screen is there on paper.
    assert "prevalence" not in text
    assert text.count(">folder<") >= 1


BASE = (
    '<!DOCTYPE html><html lang="en"><body style="background: white; margin: 0">'
    "<header><h1>x</h1><nav></nav></header><main>{}</main></body></html>"
)


@pytest.mark.parametrize(
    ("planted", "fault"),
    [
        ('<p style="width: 2000px">wide</p>', "overflow"),
        ('<p style="width: 2000px">wide</p>', "outside"),
        (
            '<p style="width: 40px; overflow: hidden; white-space: nowrap">much too long</p>',
            "cut",
        ),
        (
            '<div style="width: 50px; overflow-x: auto"><p style="width: 99px">x</p></div>',
            "scrolls without focus",
        ),
        ('<svg width="9" height="9"></svg>', "no alternative"),
        ('<img alt="a text that is long enough" src="data:image/svg+xml,no">', "broken"),
        ("<h3>deep</h3>", "heading skips"),
        ("<h1>again</h1>", "not one h1"),
        ('<i id="a"></i><i id="a"></i>', "id twice"),
        ('<a href="#nowhere">x</a>', "leads nowhere"),
        ("<table><tr><td>1</td></tr></table>", "no caption"),
        ("<table><caption>t</caption><tr><th>1</th></tr></table>", "no scope"),
        ('<p style="color: #999999">pale</p>', "contrast 2.85"),
        ("<main></main>", "no landmark main"),
    ],
)
def test_each_fault_is_found_where_it_is_planted(faults, planted, fault):
    assert faults(BASE.format("fine")) == []
    found = faults(BASE.format(planted))
    assert any(line.startswith(fault) for line in found), found
