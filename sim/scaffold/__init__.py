"""`new`: an algorithm in a package of one's own that runs, is tested, and waits to be changed."""

import importlib.util
import keyword
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkd_start import OURS
from sim.settings import SettingsError
from strategies import STRATEGIES

TEMPLATE = Path(__file__).parent / "template"
"""A package that runs as it is, called `my_method`; our own tests use it."""

PACKAGE, DISTRIBUTION, CLASS = "my_method", "my-method", "MyMethod"
"""What it is called in the template, as a package, to install, and as a class."""

HIDDEN = "gitignore"
"""A file that begins with a dot where it is made; package builders leave such files out."""


@dataclass(frozen=True, slots=True)
class Scaffold:
    """What `new` made.

    Attributes:
        folder: the new folder.
        strategy: what ``strategy.name`` calls the algorithm.
        files: all that was made, relative to the folder.
    """

    folder: Path
    strategy: str
    files: tuple[Path, ...]

    @property
    def package(self) -> str:
        """The name of the package."""
        return self.strategy.partition(":")[0]

    def to_row(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "folder": str(self.folder),
            "strategy": self.strategy,
            "files": [str(file) for file in self.files],
        }


def new(name: str, *, folder: Path | None = None) -> Scaffold:
    """Make a package with an algorithm, its test and a study that compares it with others.

    The algorithm runs and passes the contract test as it is: a mean of soft labels in which surer
    clients count for more (Cho et al., 2022, https://arxiv.org/abs/2204.12703), to be changed.

    Args:
        name: of the package: small letters, digits and underscores; words joined by ``-`` are, too.
        folder: to make it in, which must not be there yet; by default one of that name here.

    Returns:
        What was made.

    Raises:
        SettingsError: if the name can be no package's, or something has it already; if the folder
            is there already, or cannot be made.
    """
    package = name.replace("-", "_")
    if not (package.isidentifier() and package == package.lower() and package.isascii()):
        raise SettingsError(
            "NAME must be small letters, digits and '_' and begin with a letter, such as "
            f"my_method, got {name!r}"
        )
    if keyword.iskeyword(package) or keyword.issoftkeyword(package) or package.startswith("_"):
        raise SettingsError(f"NAME must not be a word of Python's or begin with '_', got {name!r}")
    place = folder if folder is not None else Path(package)
    if place.exists():
        raise SettingsError(f"{str(place)!r} is there already; nothing was written")
    if package in STRATEGIES:
        raise SettingsError(
            f"NAME must not be one of fedkd's algorithms, got {name!r}; see fedkd algorithms"
        )
    if package in OURS or package in sys.stdlib_module_names or _is_installed(package):
        raise SettingsError(
            f"NAME must be a package that is not there yet: Python finds another {package!r}"
        )
    named = {
        PACKAGE: package,
        DISTRIBUTION: package.replace("_", "-"),
        CLASS: "".join(word.capitalize() for word in package.split("_")),
    }
    files = []
    try:
        for source in sorted(TEMPLATE.rglob("*")):
            if source.is_dir() or "__pycache__" in source.parts or source.suffix == ".pyc":
                continue
            path = Path(_renamed(str(source.relative_to(TEMPLATE)), named))
            path = path.with_name(f".{HIDDEN}") if path.name == HIDDEN else path
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text(encoding="utf-8")
            (place / path).write_text(_renamed(text, named), encoding="utf-8")
            files.append(path)
    except OSError as error:
        raise SettingsError(f"cannot write into {str(place)!r}: {error.strerror}") from None
    return Scaffold(place, f"{package}:{named[CLASS]}", tuple(sorted(files)))


def _is_installed(package: str) -> bool:
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return True
    # A mere folder of that name, which hides nothing, has no file to begin with.
    return spec is not None and spec.origin is not None


def _renamed(text: str, named: dict[str, str]) -> str:
    for old, new_name in named.items():
        text = text.replace(old, new_name)
    return text
