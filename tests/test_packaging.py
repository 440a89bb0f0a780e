"""What is released: everything that is installed is pinned, and one version stands everywhere."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line.partition("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in pinned}


def needed(requirements: list[str], extras: frozenset[str] = frozenset()) -> set[str]:
    """Return all packages that requirements bring along, of those that are installed."""
    found: set[str] = set()
    open_: list[tuple[Requirement, frozenset[str]]] = [
        (Requirement(each), extras) for each in requirements
    ]
    seen: set[tuple[str, frozenset[str]]] = set()
    while open_:
        requirement, asked = open_.pop()
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in (asked or {""})):
            continue
        name, own = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, own) in seen:
            continue
        seen.add((name, own))
        if name == "fedkd":
            optional = PROJECT["optional-dependencies"]
            open_ += [(Requirement(each), own) for extra in own for each in optional[extra]]
            continue
        try:
            open_ += [(Requirement(each), own) for each in requires(name) or []]
        except PackageNotFoundError:
            continue
        found.add(name)
    return found


def test_everything_that_an_installation_for_developers_brings_is_pinned() -> None:
    found = needed([*PROJECT["dependencies"], "fedkd[dev]"])
    assert {"torch", "flwr", "ray", "hypothesis", "mypy"} <= found
    # What pip brings itself, or what only other platforms and versions of Python need.
    assert not sorted(found - pins().keys() - {"pip", "setuptools", "wheel"}), "run: make lock"


def test_pins_keep_to_what_the_project_asks_for() -> None:
    optional = PROJECT["optional-dependencies"].values()
    for line in [*PROJECT["dependencies"], *(each for extra in optional for each in extra)]:
        asked = Requirement(line)
        pinned = pins().get(canonicalize_name(asked.name))
        assert pinned is None or asked.specifier.contains(pinned, prereleases=True), line


def test_one_version_stands_everywhere() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    (logged,) = re.findall(r"^## (\S+) \(unreleased\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert PROJECT["version"] == cited == logged
