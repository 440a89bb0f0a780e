"""`compare`: arms x paired seeds, each a run; what is done already is not done again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sim.engine.resources import check_engine
from sim.identity import fingerprint
from sim.observers import Observer, Row
from sim.records import SETTINGS_FILE, is_finished, make_folder, to_json, write_text
from sim.reports import load_run, pair_rows, summary_rows, verdicts, write_report
from sim.reports.runs import STUDY_FILE, RunRecord
from sim.running import load_data, open_session, run
from sim.settings import Settings, SettingsError, merge_tables, nearest, settings_from_table
from strategies import STRATEGIES

if TYPE_CHECKING:
    from sim.engine.session import RaySession

_COMMAS = "; arms are separated by commas: local,dml"

DEFAULT_ARMS = ("local", "one_way", "fedmd", "dml", "fedavg")


@dataclass(frozen=True, slots=True)
class StudyResult:
    """What a study leaves behind.

    Attributes:
        folder: holds the arms' runs, ``study.json``, ``report.html`` and ``figures/``.
        report: path of the report.
        runs: the runs of each arm, by seed.
        baseline: the arm that the others are compared with.
    """

    folder: Path
    report: Path
    runs: Mapping[str, Sequence[RunRecord]]
    baseline: str

    def to_row(self) -> Row:
        """Return the table as plain values."""
        return {
            "folder": str(self.folder),
            "report": str(self.report),
            "baseline": self.baseline,
            "arms": summary_rows(self.runs, self.baseline),
            "pairs": pair_rows(self.runs),
            "verdicts": list(verdicts(self.runs, self.baseline)),
            "weights_sha256": {
                arm: [record.result.get("weights_sha256") for record in records]
                for arm, records in self.runs.items()
            },
        }


def arm_settings(base: Settings, arms: Sequence[str] | None = None) -> dict[str, Settings]:
    """Return each arm's settings, in the order asked for.

    Args:
        base: what the arms have in common; ``study.arms`` says in what they differ.
        arms: names from ``study.arms``, or of strategies with their defaults; by default all of
            ``study.arms``, or a standard set where there are none.

    Raises:
        SettingsError: an unknown arm, or one whose settings cannot work.
    """
    table = base.to_table()
    del table["study"]
    known: dict[str, Mapping[str, Any]] = dict(base.study.arms)
    chosen = list(arms or known or DEFAULT_ARMS)
    resolved: dict[str, Settings] = {}
    for name in chosen:
        if name in known:
            patch = known[name]
        elif name in STRATEGIES:
            patch = {"strategy": {"name": name}}
        else:
            names = [*known, *(strategy for strategy in STRATEGIES if strategy not in known)]
            raise SettingsError(
                f"unknown arm {name!r}; known: {', '.join(names)}"
                + (_COMMAS if name.split()[1:] else nearest(name, names))
            )
        try:
            resolved[name] = settings_from_table(merge_tables(table, patch))
        except SettingsError as error:
            raise SettingsError(f"study.arms.{name}: {error}") from None
    return resolved


def baseline_arm(
    settings: Settings, arms: Mapping[str, object], baseline: str | None = None
) -> str:
    """Return the arm that the others are compared with.

    Args:
        settings: ``study.baseline`` counts where none is asked for and it is among the arms.
        arms: that are compared, in their order; the first is the default.
        baseline: the arm asked for.

    Raises:
        SettingsError: if it is none of the arms; or if ``study.baseline`` names no arm at all.
    """
    wanted = baseline if baseline is not None else settings.study.baseline
    if wanted is None or wanted in arms:
        return wanted or next(iter(arms))
    left_out = baseline is None and (wanted in settings.study.arms or wanted in STRATEGIES)
    if left_out:
        # The file's question is about arms that this study is not.
        return next(iter(arms))
    key = "study.baseline" if baseline is None else "baseline"
    raise SettingsError(
        f"{key} must be one of the arms ({', '.join(arms)}), got {wanted!r}{nearest(wanted, arms)}"
    )


def compare(
    settings: Settings | None = None,
    *,
    arms: Sequence[str] | None = None,
    seeds: int | None = None,
    baseline: str | None = None,
    observer_of: Callable[[str, int], Sequence[Observer]] | None = None,
) -> StudyResult:
    """Run every arm with every seed and report on them.

    Seeds are paired: with one seed, all arms have the same split and the same initial weights
    for each client, so that differences between arms are differences of the algorithms.

    Args:
        settings: common settings and ``study``.
        arms: which arms, in the order of the table.
        seeds: how many seeds, from ``settings.seed`` on; ``study.seeds`` by default.
        baseline: the arm that the others are compared with; ``study.baseline`` by default, where it
            is one of the arms, and else the first.
        observer_of: returns who is told about the run of an arm and a seed; called for runs
            that are started, not for those that are finished already.

    Returns:
        The runs and the path of the report.

    Raises:
        SettingsError: before anything runs, names the setting that cannot work.
        KeyboardInterrupt: the next call goes on where this one stopped, in the middle of a run.
    """
    settings = settings or Settings()
    count = seeds if seeds is not None else settings.study.seeds
    if count < 1:
        raise SettingsError(f"seeds must be >= 1, got {count}")
    by_arm = arm_settings(settings, arms)
    baseline = baseline_arm(settings, by_arm, baseline)
    check_engine(settings.engine)
    folder = make_folder(settings.output, settings.output / settings.name)
    plan = {
        arm: [of_arm.model_copy(update={"seed": settings.seed + offset}) for offset in range(count)]
        for arm, of_arm in by_arm.items()
    }
    folders = {
        arm: [folder / arm / f"seed-{of_run.seed}-{fingerprint(of_run)[:8]}" for of_run in of_arm]
        for arm, of_arm in plan.items()
    }
    unfinished = [
        (arm, of_run, run_folder)
        # Seed by seed, so that a study that is cut short has whole pairs.
        for offset in range(count)
        for arm in plan
        for of_run, run_folder in [(plan[arm][offset], folders[arm][offset])]
        if not is_finished(run_folder)
    ]
    _run_all(unfinished, observer_of)
    table = {
        "name": settings.name,
        "baseline": baseline,
        "arms": {
            arm: [str(run_folder.relative_to(folder)) for run_folder in of_arm]
            for arm, of_arm in folders.items()
        },
    }
    write_text(folder / STUDY_FILE, to_json(table, indent=2) + "\n")
    runs = {
        arm: [load_run(run_folder, arm) for run_folder in of_arm] for arm, of_arm in folders.items()
    }
    report = write_report(runs, folder, title=settings.name, baseline=baseline)
    return StudyResult(folder=folder, report=report, runs=runs, baseline=baseline)


def _run_all(
    runs: Sequence[tuple[str, Settings, Path]],
    observer_of: Callable[[str, int], Sequence[Observer]] | None,
) -> None:
    # What cannot work should fail before the first run, not before the last.
    checked: set[str] = set()
    for _, settings, _ in runs:
        key = fingerprint(settings.model_copy(update={"seed": 0}))
        if key not in checked:
            load_data(settings)
            checked.add(key)
    session: RaySession | None = None
    try:
        for arm, settings, folder in runs:
            if settings.engine.backend == "ray" and session is None:
                session = open_session(settings.engine)
            make_folder(settings.output, folder)
            begun = (folder / SETTINGS_FILE).is_file()
            run(
                settings,
                folder=folder,
                resume=folder if begun else None,
                observers=observer_of(arm, settings.seed) if observer_of is not None else (),
                session=session,
            )
    finally:
        if session is not None:
            session.close()
