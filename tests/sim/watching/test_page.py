"""The page as a browser shows it; needs playwright and a Chromium, and is skipped without."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def opened(browser: Any, url: str, **how: Any) -> tuple[Any, list[str]]:
    """Open the page; what its console says is a mistake."""
    said: list[str] = []
    page = browser.new_page(**how)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(url)
    page.wait_for_selector("article")
    return page, said


@pytest.mark.parametrize("width", [1280, 768, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_nothing_is_wrong(
    browser: Any, page_faults: str, server: Any, width: int, scheme: str
) -> None:
    size = {"width": width, "height": 900}
    page, said = opened(browser, server.url, viewport=size, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(page_faults) == []
    assert said == []
    page.close()


def test_it_says_what_a_screen_reader_needs_and_names_are_text(browser: Any, server: Any) -> None:
    page, _ = opened(browser, server.url)
    # What is between angle brackets came as it stands in the files, and is no markup.
    assert page.locator("article h3").inner_text() == "<b>dml</b>"
    label = page.get_by_role("img").get_attribute("aria-label")
    assert label == ("<b>dml</b>: mean client accuracy from 25.0 % in round 1 to 50.0 % in round 2")
    assert page.get_by_role("status").inner_text().startswith("running, 0 of 1 runs finished")
    assert page.locator("progress").get_attribute("aria-label")
    assert page.get_by_role("log").inner_text().endswith("reply rejected: <script>")
    assert page.get_by_role("columnheader").count() == 5
    # By the keyboard alone: first the way to the table, then the table, which may scroll.
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the table of runs"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "runs"
    page.close()


def test_it_follows_the_run_and_says_when_nobody_answers(
    browser: Any, server: Any, tmp_path: Path
) -> None:
    page, _ = opened(browser, server.url)
    with (tmp_path / "dml" / "seed-0-0" / "metrics.jsonl").open("a") as rows:
        rows.write('{"round": 3, "scope": "federation", "accuracy": 0.75, "seconds": 1.0}\n')
    page.wait_for_selector(".arm b:text-is('75.0 %')")
    assert page.title().startswith("75 % ")
    page.route("**/state.json", lambda route: route.abort())
    page.wait_for_selector("#told.gone")
    # The last that it told stays.
    assert page.locator(".arm b").inner_text() == "75.0 %"
    page.close()
