"""Where the command ``fedkd`` starts: what lies in the user's folder hides nothing of ours.

The functions of ``import fedkd`` start here, too: a folder `sim` beside a notebook is not ours.

With ``python -m`` or ``PYTHONPATH=.`` Python looks in the current folder first, and in an editable
install it looks everywhere else before it finds our packages. A folder `strategies` or `datasets`
there, or a file `typing.py`, would be taken for ours, or for somebody's that we need. Models of
one's own are found in the current folder all the same, after everything else.

The module has a name of its own, since `fedkd` and `sim` may be what is hidden, and until the path
is settled it imports only what Python has loaded anyway.
"""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder

OURS = ("fedkd", "strategies", "sim")
HOME = os.path.dirname(os.path.realpath(__file__))


class _Folder:
    """Finds modules in one folder: those of some names, or of any."""

    def __init__(self, folder: str, names: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if path is not None or (self.names and name not in self.names):
            return None
        return PathFinder.find_spec(name, [self.folder])

    def invalidate_caches(self) -> None:
        """Look again; Python's own finder, which does the work, is asked by itself."""


def find_last(folder: str) -> None:
    """Let modules be imported from a folder where nothing else has one of that name."""
    known = [finder.folder for finder in sys.meta_path if isinstance(finder, _Folder)]
    if folder not in known:
        sys.meta_path.append(_Folder(folder))


def pin() -> None:
    """Let our packages be found where this module is, whatever has their names elsewhere.

    Raises:
        ImportError: naming a package of that name that is loaded already and is not ours.
    """
    for name in OURS:
        loaded = sys.modules.get(name)
        file = getattr(loaded, "__file__", None)
        if loaded is not None and not _is_ours(file, name):
            place = file or next(iter(getattr(loaded, "__path__", ())), "nowhere")
            raise ImportError(
                f"{name!r} is loaded from {place!r}, and fedkd has a package of that name: "
                "rename yours"
            )
    if any(isinstance(finder, _Folder) and finder.names == OURS for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Folder(HOME, OURS))
    hidden = [
        place
        for entry in sys.path
        for name in OURS
        for file in (os.path.join(name, "__init__.py"), f"{name}.py")
        for place in (os.path.join(entry or os.getcwd(), file),)
        if os.path.isfile(place) and not _is_ours(place, name)
    ]
    if hidden:
        import warnings

        warnings.warn(
            f"{', '.join(map(repr, hidden))} cannot be imported beside fedkd, which has a package "
            "of that name: rename yours",
            stacklevel=3,
        )


def _is_ours(file: "str | None", name: str) -> bool:
    ours = os.path.join(HOME, name, "__init__.py")
    return file is not None and os.path.realpath(file) == os.path.realpath(ours)


def settle_path() -> None:
    """Take the current folder from the front of the path, here and for processes to come."""
    sys.meta_path.insert(0, _Folder(HOME, OURS))
    here = os.getcwd()
    if os.path.realpath(here) == HOME:
        return
    sys.path[:] = [entry for entry in sys.path if not _is(entry, here)]
    given = os.environ.get("PYTHONPATH", "")
    others = [entry for entry in given.split(os.pathsep) if not _is(entry, here)]
    if given:
        os.environ["PYTHONPATH"] = os.pathsep.join(others)
    find_last(here)


def _is(entry: str, folder: str) -> bool:
    return os.path.realpath(entry or ".") == os.path.realpath(folder)


def hiding(error: BaseException) -> list[str]:
    """Return what stands on PYTHONPATH in the place of something that an error came from."""
    from importlib.metadata import packages_distributions

    others = {*sys.stdlib_module_names, *packages_distributions()}
    files = [str(getattr(module, "__file__", "")) for module in tuple(sys.modules.values())]
    trace = error.__traceback__
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    found = []
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        if not os.path.isdir(folder) or os.path.realpath(folder) == HOME:
            continue
        for entry in sorted(os.listdir(folder)):
            place = os.path.join(folder, entry)
            mine = (place, os.path.join(place, ""))
            used = any(file == mine[0] or file.startswith(mine[1]) for file in files)
            if used and entry.removesuffix(".py") in others:
                found.append(place)
    return found


def main() -> None:
    """Run the command line, and say so where PYTHONPATH keeps it from starting."""
    settle_path()
    try:
        from sim.commands.cli import main as command

        command()
    except Exception as error:
        hidden = hiding(error)
        if not hidden:
            raise
        sys.stderr.write(
            f"fedkd: {', '.join(map(repr, hidden))} on PYTHONPATH hides a module of the same name "
            f"that fedkd needs; rename it, or leave its folder out of PYTHONPATH ({error})\n"
        )
        sys.exit(2)
