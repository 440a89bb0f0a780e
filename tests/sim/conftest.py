"""Small runs that finish in a second or two, and a browser for the pages that we make."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.settings import Settings, load_settings

SMALL = (
    "rounds=2",
    "clients.count=4",
    "clients.models=[mlp,cnn]",
    "clients.local.epochs=1",
    "data.private_rows=200",
    "data.test_rows=100",
    "data.public.size=60",
    "data.partition.min_rows=2",
    "engine.backend=inline",
)


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")

PAGE_FAULTS = Path(__file__).with_name("page_faults.js")
"""A script that returns what is cut, lies outside, or lacks words on a page."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Open a Chromium; tests that need one are skipped where there is none, or no playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    with playwright.sync_playwright() as running:
        # The sandbox needs what root in a container lacks; the pages are our own.
        chromium = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def page_faults() -> str:
    return PAGE_FAULTS.read_text(encoding="utf-8")


@pytest.fixture
def small_words() -> tuple[str, ...]:
    return SMALL


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Settings]:
    def settings(*overrides: str) -> Settings:
        return load_settings(None, [*SMALL, f"output={tmp_path / 'runs'}", *overrides])

    return settings


@pytest.fixture
def on_wards(tmp_path: Path) -> tuple[str, ...]:
    """Set a run on a table of four wards, with all that makes clients differ, and a budget."""
    rng = np.random.default_rng(0)
    lines = ["a,b,c,d,ward,label"]
    for place, row in enumerate(rng.normal(size=(320, 4))):
        words = [*(f"{number:.3f}" for number in row), f"w{place % 4}", f"c{int(row[0] > row[1])}"]
        lines.append(",".join(words))
    path = tmp_path / "wards.csv"
    path.write_text("\n".join(lines) + "\n")
    return (
        f"data.source={path}",
        "data.partition={kind: natural, column: ward, min_rows: 2}",
        "data.label_noise.rate=[0.3,0]",
        "data.feature_shift.shifts=[{kind: none},{kind: noise}]",
        "clients.models=[mlp]",
        "strategy.name=dsfl",
        "exchange.budget_kb=6",
        "clock.profiles=[phone,laptop]",
        "clock.latency_s=0.05",
    )
