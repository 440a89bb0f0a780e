"""`museum`: what each fault of published code costs, against the same algorithm done right.

A study of pairs: every fault that an algorithm of the table declares, run right and as published
over the same seeds, in a small setting in which it can show. Faults of one algorithm that show in
the same setting share the run that is right.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedkd.names import nearest
from sim.commands.arms import Study, study_of
from sim.commands.study import StudyResult, compare
from sim.reports.museum import Exhibit, Finding, findings
from sim.server.observers import Observer, Row
from sim.settings import SettingsError, asked, merge_tables, read_file, settings_from_table
from sim.settings.reading import nested_table
from sim.settings.tables import read_word
from strategies import STRATEGIES

ROUNDS = 8
"""Of each run: the fewest in which every fault that changes bits on this setting does."""

SETTING: Mapping[str, Any] = {
    "name": "museum",
    "rounds": ROUNDS,
    "data": {
        "source": "digits",
        "public": {"size": 200, "labelled": False},
        "partition": {"kind": "dirichlet", "alpha": 0.3},
    },
    "clients": {
        "count": 6,
        "models": ["mlp"],
        "batch_size": 32,
        "optimizer": {"name": "adam", "lr": 0.003},
        "local": {"epochs": 2},
    },
    "engine": {"backend": "inline"},
    # Only the last round is looked at.
    "evaluation": {"every": ROUNDS},
    "study": {"seeds": 6},
}
"""What all runs have in common, as far as a fault does not name another setting to show in."""


@dataclass(frozen=True, slots=True)
class MuseumResult:
    """What `museum` leaves behind.

    Attributes:
        study: the study that the findings are from.
        findings: one for each fault, in the order of the museum.
    """

    study: StudyResult
    findings: Sequence[Finding]

    def to_row(self) -> Row:
        """Return the table as plain values."""
        return {
            "folder": str(self.study.folder),
            "report": str(self.study.report),
            "faults": [finding.to_row() for finding in self.findings],
            "refused": dict(self.study.refused),
        }


def exhibits(only: Sequence[str] = ()) -> tuple[Exhibit, ...]:
    """Return every fault of the table of algorithms, in its order.

    Args:
        only: names of faults, of algorithms, or ``algorithm-fault``; all of them by default.

    Raises:
        SettingsError: for a name that is none of them, with the nearest that is.
    """
    found = []
    for algorithm, kind in STRATEGIES.items():
        # Faults that show in one setting are compared with one run.
        rights: dict[tuple[str, ...], str] = {}
        for name, fault in kind.faults.items():
            if fault.shows_with not in rights:
                rights[fault.shows_with] = f"{algorithm}-for-{name}" if rights else algorithm
            right = rights[fault.shows_with]
            found.append(Exhibit(algorithm, name, fault, right, f"{algorithm}-{name}"))
    known = {each for show in found for each in (show.name, show.algorithm, show.published)}
    for wanted in only:
        if wanted not in known:
            raise SettingsError(
                f"--only must be names of faults or of algorithms that have any, got {wanted!r}"
                f"{nearest(wanted, sorted(known))}; `fedkd museum --list` names them"
            )
    return tuple(
        show for show in found if not only or {show.name, show.algorithm, show.published} & {*only}
    )


def load_museum(
    config: str | None = None,
    words: Sequence[str] = (),
    *,
    only: Sequence[str] = (),
    allow: Sequence[str] = (),
) -> Study:
    """Read the study: the museum's setting, a file over it, words over both and over every fault's.

    Args:
        config: a YAML file.
        words: such as ``rounds=20``.
        only: which faults, as `exhibits` has them.
        allow: packages, or ``package.module:callable``, whose code the file may name.

    Raises:
        SettingsError: as `exhibits`; or for a setting that cannot work.
    """
    shown = exhibits(only)
    table = merge_tables(SETTING, read_file(config))
    arms: dict[str, Any] = {}
    for show in shown:
        for arm in (show.right, show.published):
            arms[arm] = _patch(show, committed=arm == show.published)
    study = merge_tables(table.get("study", {}), {"arms": arms})
    with asked(words, allow):
        return study_of(settings_from_table({**table, "study": study}), words=words)


def _patch(show: Exhibit, *, committed: bool) -> dict[str, Any]:
    """Return what an arm says itself."""
    table: dict[str, Any] = {}
    for word in (*STRATEGIES[show.algorithm].card.needs, *show.fault.shows_with):
        path, value = read_word(word)
        table = merge_tables(table, nested_table(path, value))
    own = {"name": show.algorithm, **({"as_published": [show.name]} if committed else {})}
    return merge_tables(table, {"strategy": own})


def museum(
    study: Study | None = None,
    *,
    only: Sequence[str] = (),
    seeds: int | None = None,
    accept_code: bool = False,
    observer_of: Callable[[str, int], Sequence[Observer]] | None = None,
    tell: Callable[[str], None] | None = None,
) -> MuseumResult:
    """Run every fault and its right form over paired seeds, and say what each costs.

    What is done is not done again, as in `compare`.

    Args:
        study: of `load_museum`.
        only: which faults, as `exhibits` has them.
        seeds: how many; ``study.seeds`` by default.
        accept_code: take runs whose code has changed since as they are.
        observer_of: who is told of the run of an arm and a seed.
        tell: is told notes on earlier runs.

    Raises:
        SettingsError: before anything runs, names the setting that cannot work.
    """
    planned = study if study is not None else load_museum(only=only)
    result = compare(
        planned, seeds=seeds, accept_code=accept_code, observer_of=observer_of, tell=tell
    )
    shown = [show for show in exhibits(only) if show.published in planned.arms]
    return MuseumResult(result, findings(shown, result.runs))
