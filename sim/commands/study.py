"""`compare`: arms x paired seeds, each a run; what is done already is not done again."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkd.names import nearest
from sim.commands.arms import Study, difference_notes, refused_notes, study_of
from sim.commands.budgets import Matching
from sim.commands.matching import matched
from sim.commands.packing import Division, Nursery, divide, run_packed
from sim.commands.planned import ObserverOf, PlannedRun, is_begun, make_run, nobody
from sim.commands.running import load_data, open_session
from sim.commands.sweeps import is_swept, sweep_notes
from sim.engine.resources import check_engine
from sim.keeping.identity import fingerprint
from sim.keeping.models import kept_otherwise
from sim.keeping.plans import announced
from sim.keeping.provenance import Place, Provenance, notes_on, place_run, provenance_of
from sim.keeping.records import (
    make_folder,
    only_one,
    to_json,
    write_text,
)
from sim.reports import load_run, pair_rows, summary_rows, verdicts, write_report
from sim.reports.families import Families, Questions, family_rows, questions_of
from sim.reports.grids import Grid
from sim.reports.power import PRECISION
from sim.reports.runs import REPORT_OF, STUDY_FILE, RunRecord
from sim.server.asking import check_first_answers
from sim.server.observers import Row
from sim.settings import Settings, SettingsError, check_seeds
from strategies import STRATEGIES

if TYPE_CHECKING:
    import pandas as pd

    from sim.engine.session import RaySession
    from sim.publishing.studies import Study as Published


@dataclass(frozen=True, slots=True)
class StudyResult:
    """What a study leaves behind.

    Attributes:
        folder: holds the arms' runs, ``study.json``, ``report.html`` and ``figures/``.
        report: path of the report.
        runs: the runs of each arm, by seed.
        baseline: the arm that the others are compared with.
        notes: what a reader of the table has to know, a sentence each: what arms differ in, arms
            that are equal, runs that were kept and made anew or taken as they are, models that
            arms did not train alike.
        differs: each setting that arms differ in, with its value in every arm that has it.
        refused: arms that could not run, each with the reason; they have no runs.
        grid: how arms that come from a sweep lie side by side.
        families: arms that belong to one question, by its name; the pairs of others are not
            compared where there are any.
        precision: the half width of an interval that is wanted, a share.
        matching: how arms were made equal in steps or bytes; None where nobody asked for that.
    """

    folder: Path
    report: Path
    runs: Mapping[str, Sequence[RunRecord]] = field(repr=False)
    baseline: str
    notes: Sequence[str] = ()
    differs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    refused: Mapping[str, str] = field(default_factory=dict)
    grid: Grid | None = field(default=None, repr=False)
    families: Families = field(default_factory=dict)
    precision: float = PRECISION
    matching: Matching | None = None

    @property
    def questions(self) -> Questions:
        """The pairs that are compared; none: every arm with the baseline."""
        return questions_of(self.families, self.grid, self.baseline)

    def to_row(self) -> Row:
        """Return the table as plain values."""
        return {
            "folder": str(self.folder),
            "report": str(self.report),
            "baseline": self.baseline,
            "arms": summary_rows(self.runs, self.baseline, self.precision),
            "pairs": family_rows(self.runs, self.questions, self.precision)
            if self.questions
            else pair_rows(self.runs, self.precision),
            "verdicts": list(verdicts(self.runs, self.baseline, self.precision)),
            "notes": list(self.notes),
            "differs": {path: dict(values) for path, values in self.differs.items()},
            "refused": dict(self.refused),
            **({"grid": self.grid.to_row()} if self.grid is not None else {}),
            **({"match": self.matching.to_row()} if self.matching is not None else {}),
            "weights_sha256": {
                arm: [record.result.get("weights_sha256") for record in records]
                for arm, records in self.runs.items()
            },
        }

    def to_pandas(self, rows: str = "runs") -> "pd.DataFrame":
        """Return the numbers as a tidy data frame.

        Args:
            rows: what a row is: ``runs`` (each seed of each arm), ``arms`` (means over seeds with
                intervals), ``rounds`` (the federation in each round) or ``clients`` (each client
                in each round).

        Returns:
            One observation a row and one measure a column, beginning with ``arm`` and the settings
            in which arms differ; accuracies are shares in [0, 1]. Columns in which nothing stands
            are left out.

        Raises:
            SettingsError: if ``rows`` is none of these.
        """
        from sim.publishing.frames import tidy_rows, to_pandas

        return to_pandas(tidy_rows(self._published(), rows))

    def _repr_html_(self) -> str:
        """Return a small table for notebooks."""
        from sim.publishing.hypertext import to_html
        from sim.publishing.tables import table_texts

        compared = ["difference", "p_holm"] if len(self.runs) > 1 else []
        [table] = table_texts(self._published(), ["accuracy", *compared])
        rows = [[arm, *(cell.text for cell in cells)] for arm, cells in table.rows]
        below = [table.caption, f"report: {self.report}"]
        return to_html([table.head, *table.titles], rows, below)

    def _published(self) -> "Published":
        from sim.publishing.studies import Study as Published

        runs = {arm: of_arm for arm, of_arm in self.runs.items() if of_arm}
        return Published(self.folder, runs, self.baseline, self.grid, self.refused)


def baseline_arm(
    settings: Settings,
    arms: Mapping[str, object],
    baseline: str | None = None,
    grid: Grid | None = None,
) -> str:
    """Return the arm that the others are compared with.

    Args:
        settings: ``study.baseline`` counts where none is asked for and it is among the arms.
        arms: that are compared, in their order; the first is the default.
        baseline: the arm asked for; of one that was swept over it is the first.
        grid: how arms that come from a sweep lie side by side.

    Raises:
        SettingsError: if it is none of the arms; or if ``study.baseline`` names no arm at all.
    """
    wanted = baseline if baseline is not None else settings.study.baseline
    if wanted is None or wanted in arms:
        return wanted or next(iter(arms))
    swept = grid.by_base.get(wanted, ()) if grid is not None else ()
    if made := next(filter(None, swept), None):
        return made
    left_out = baseline is None and (wanted in settings.study.arms or wanted in STRATEGIES)
    if left_out:
        # The file's question is about arms that this study is not.
        return next(iter(arms))
    key = "study.baseline" if baseline is None else "baseline"
    raise SettingsError(
        f"{key} must be one of the arms ({', '.join(arms)}), got {wanted!r}{nearest(wanted, arms)}"
    )


@dataclass(frozen=True, slots=True)
class StudyPlan:
    """What a study will run, checked as far as it can be before anything runs.

    Attributes:
        study: its arms.
        seeds: how many of each arm.
        folder: of the study.
        baseline: the arm that the others are compared with.
        folders: of each arm's runs, by seed; none of arms that are refused.
        left: runs that are not finished, seed by seed, so that a study that is cut short has
            whole pairs.
        refused: arms that cannot run, each with the reason.
        notes: on earlier runs and on refusals, a sentence each.
    """

    study: Study
    seeds: int
    folder: Path
    baseline: str
    folders: Mapping[str, Sequence[Path]]
    left: Sequence[PlannedRun]
    refused: Mapping[str, str]
    notes: Sequence[str]

    @property
    def division(self) -> Division:
        """How many of the runs that are left are made at a time."""
        return divide(self.left, self.study.settings.study.parallel)

    @property
    def finished(self) -> int:
        """How many runs are finished already and are taken as they are."""
        return sum(map(len, self.folders.values())) - len(self.left)

    def told(self) -> str:
        """Say in a line how many runs there are, and what becomes of them."""
        arms = len(self.study.arms)
        begun = sum(run.begun for run in self.left)
        product = f"{_counted(arms, 'arm')} x {_counted(self.seeds, 'seed')}"
        parts = [f"{_counted(arms * self.seeds, 'run')}: {product}"]
        if self.study.combinations > arms:
            parts.append(f"{self.study.combinations} combinations, of which equal ones run once")
        if self.refused:
            parts.append(f"{len(self.refused) * self.seeds} refused")
        if self.finished:
            parts.append(f"{self.finished} finished already and taken as they are")
        if begun:
            parts.append(f"{begun} begun, which go on")
        if len(self.left) < arms * self.seeds:
            parts.append(f"{len(self.left)} to run")
        if divided := self.division.told():
            parts.append(divided)
        return "; ".join(parts)

    def to_row(self) -> Row:
        """Return what is going to be there, as plain values: what a study's folder says of it."""
        first = self.study.settings.seed
        return {
            "name": self.study.settings.name,
            "baseline": self.baseline,
            "arms": {
                arm: [
                    {
                        "seed": first + offset,
                        "folder": os.path.relpath(of_run, self.folder),
                        "rounds": self.study.arms[arm].rounds,
                    }
                    for offset, of_run in enumerate(of_arm)
                ]
                for arm, of_arm in self.folders.items()
            },
            "refused": dict(self.refused),
        }


def plan_study(
    study: Study,
    *,
    seeds: int | None = None,
    baseline: str | None = None,
    accept_code: bool = False,
    tell: Callable[[str], None] | None = None,
    writes: bool = True,
) -> StudyPlan:
    """Find out what a study has to run, and check it.

    Args:
        study: whose arms are settled.
        seeds: how many seeds, from the settings' on; ``study.seeds`` by default.
        baseline: see `compare`.
        accept_code: see `compare`.
        tell: is told what there is to know, as soon as it is known.
        writes: make the study's folder and keep digests of data; False leaves the disk alone.

    Raises:
        SettingsError: names the setting that cannot work.
    """
    tell = tell or _ignore
    settings, by_arm = study.settings, study.arms
    count = seeds if seeds is not None else settings.study.seeds
    check_seeds(settings.seed, count)
    named = baseline is not None or settings.study.baseline in by_arm
    baseline = baseline_arm(settings, by_arm, baseline, study.grid)
    check_engine(settings.engine)
    folder = settings.output / settings.name
    if writes:
        make_folder(settings.output, folder)
    runs = {
        arm: [of_arm.model_copy(update={"seed": settings.seed + offset}) for offset in range(count)]
        for arm, of_arm in by_arm.items()
    }
    folders, notes = _place_runs(folder, runs, accept_code=accept_code, remember=writes)
    for note in [*study.remarks, *study.notes, *notes]:
        tell(note)
    planned = (
        PlannedRun(arm, runs[arm][offset], folders[arm][offset])
        for offset in range(count)
        for arm in runs
    )
    unfinished = [each for each in planned if not each.finished]
    refused = _check_all(unfinished, show=settings.study.refused == "show")
    for note in refused_notes(refused):
        tell(note)
    return StudyPlan(
        study,
        count,
        folder,
        _of_those_left(baseline, named=named, arms=by_arm, refused=refused),
        {arm: [] if arm in refused else of_arm for arm, of_arm in folders.items()},
        [run for run in unfinished if run.arm not in refused],
        refused,
        [*notes, *refused_notes(refused)],
    )


def compare(
    settings: Settings | Study | None = None,
    *,
    arms: Sequence[str] | None = None,
    seeds: int | None = None,
    baseline: str | None = None,
    accept_code: bool = False,
    observer_of: ObserverOf | None = None,
    tell: Callable[[str], None] | None = None,
    planned: Callable[["StudyPlan"], None] | None = None,
    progress: bool | None = None,
    nursery: Nursery | None = None,
) -> StudyResult:
    """Run every arm with every seed and report on them.

    Seeds are paired: with one seed, all arms have the same split and the same initial weights
    for each client, so that differences between arms are differences of the algorithms.

    A finished run is taken again only where settings, data, code and libraries are what they were;
    else it is kept, and run anew beside it.

    An arm whose settings cannot work together ends the study before anything runs, or, with
    ``study.refused: show``, is listed with the reason while the others run.

    Args:
        settings: common settings and ``study``; or a study that was read, whose arms are settled.
        arms: which arms, in the order of the table.
        seeds: how many seeds, from ``settings.seed`` on; ``study.seeds`` by default.
        baseline: the arm that the others are compared with; ``study.baseline`` by default, where it
            is one of the arms, and else the first.
        accept_code: take runs whose code or libraries have changed since as they are, and go on
            with them; never with other data.
        observer_of: returns who is told about the run of an arm and a seed; called in this process,
            for runs that are started, not for those that are finished already. Of packed runs
            (``study.parallel``) they are not told what travelled.
        tell: is told, before anything runs, what the notes say about arms and earlier runs.
        planned: is told what is going to run, once that is known and has been checked.
        progress: show how far it is, where ``observer_of`` does not: in a notebook a line that
            changes in its place, elsewhere as the command line does, on standard error. By default
            in a notebook only.
        nursery: whose processes make small runs; None: one that is started once it saves time.

    Returns:
        The runs and the path of the report.

    Raises:
        SettingsError: before anything runs, names the setting that cannot work.
        KeyboardInterrupt: the next call goes on where this one stopped, in the middle of a run.

    Examples:
        >>> import fedkd
        >>> words = ["rounds=1", "clients.count=2", "clients.models=[mlp]", "engine.backend=inline"]
        >>> study = fedkd.compare(fedkd.load_settings(None, words), arms=["local", "dml"], seeds=2)
        >>> [arm["arm"] for arm in study.to_row()["arms"]]
        ['local', 'dml']
    """
    from sim.commands.notebooks import shown  # imported late: it brings rich

    with shown(progress if observer_of is None else False) as signs:
        if signs is not None:
            from sim.commands.progress import StudyProgress

            counted = StudyProgress(signs)
            observer_of, tell = counted.observers, tell or signs.say
            planned = _both(
                lambda plan: counted.planned([run.settings.rounds for run in plan.left]), planned
            )
        return _compare(
            settings, arms, seeds, baseline, accept_code, observer_of, tell, planned, nursery
        )


def _both(
    first: Callable[["StudyPlan"], None], second: Callable[["StudyPlan"], None] | None
) -> Callable[["StudyPlan"], None]:
    def told(plan: StudyPlan) -> None:
        first(plan)
        if second is not None:
            second(plan)

    return told


def _compare(
    settings: Settings | Study | None,
    arms: Sequence[str] | None,
    seeds: int | None,
    baseline: str | None,
    accept_code: bool,
    observer_of: ObserverOf | None,
    tell: Callable[[str], None] | None,
    planned: Callable[["StudyPlan"], None] | None,
    nursery: Nursery | None,
) -> StudyResult:
    study = settings if isinstance(settings, Study) else study_of(settings or Settings(), arms)
    if study.settings.study.match != "none":
        (tell or _ignore)("study.match: two rounds of each arm are tried, to count what they take")
        study, _ = matched(study, baseline_arm(study.settings, study.arms, baseline, study.grid))
    plan = plan_study(study, seeds=seeds, baseline=baseline, accept_code=accept_code, tell=tell)
    settings, folder, folders = study.settings, plan.folder, plan.folders
    baseline, notes, refused = plan.baseline, plan.notes, plan.refused
    if planned is not None:
        planned(plan)
    with announced(folder, plan.to_row()):
        told = tell or _ignore
        _run_all(plan, observer_of or nobody, nursery, accept_code=accept_code, tell=told)
    runs = {
        arm: [load_run(run_folder, arm) for run_folder in of_arm] for arm, of_arm in folders.items()
    }
    sweep = settings.study.sweep
    others = {path: told for path, told in study.differs.items() if not is_swept(path, sweep)}
    notes = [
        *study.notes,
        *sweep_notes(settings.study),
        *difference_notes(others),
        *notes,
        *backend_notes(runs),
    ]
    # Two commands may end at once; each finds the other's report whole.
    with only_one(folder):
        place = report_folder(folder, folders, baseline)
        table = {
            "name": settings.name,
            "baseline": baseline,
            "precision": settings.study.precision / 100,
            "arms": {
                arm: [os.path.relpath(run_folder, place) for run_folder in of_arm]
                for arm, of_arm in folders.items()
            },
            "differs": study.differs,
            "notes": notes,
            "refused": refused,
            **({"grid": study.grid.to_row()} if study.grid is not None else {}),
            **({"match": study.matching.to_row()} if study.matching is not None else {}),
            **({"families": dict(study.families)} if study.families else {}),
        }
        write_text(place / STUDY_FILE, to_json(table, indent=2) + "\n")
        report = write_report(
            runs,
            place,
            title=settings.name,
            baseline=baseline,
            refused=refused,
            grid=study.grid,
            families=study.families,
            precision=settings.study.precision / 100,
            notes=notes,
        )
    return StudyResult(
        folder=place,
        report=report,
        runs=runs,
        baseline=baseline,
        notes=notes,
        differs=study.differs,
        refused=refused,
        grid=study.grid,
        families=study.families,
        precision=settings.study.precision / 100,
        matching=study.matching,
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _ignore(_note: str) -> None:
    """Tell nobody."""


def _place_runs(
    folder: Path,
    plan: Mapping[str, Sequence[Settings]],
    *,
    accept_code: bool,
    remember: bool,
) -> tuple[dict[str, list[Path]], list[str]]:
    """Find or name the folder of every run, and say which earlier ones do not count and why."""
    folders: dict[str, list[Path]] = {}
    places: dict[str, Place] = {}
    made_of: dict[str, Provenance] = {}
    otherwise: dict[str, list[str]] = {}
    for arm, of_arm in plan.items():
        folders[arm] = []
        for settings in of_arm:
            of_all_seeds = fingerprint(settings.model_copy(update={"seed": 0}))
            if of_all_seeds not in made_of:
                made_of[of_all_seeds] = provenance_of(settings, remember=remember)
            named = folder / arm / f"seed-{settings.seed}-{fingerprint(settings)[:8]}"
            place = place_run(named, made_of[of_all_seeds], accept_code=accept_code, begun=is_begun)
            folders[arm].append(place.folder)
            places[f"{arm} seed {settings.seed}"] = place
            kept = kept_otherwise(place.folder, settings)
            if kept:
                otherwise.setdefault(kept, []).append(f"{arm} seed {settings.seed}")
    told = [f"{', '.join(runs)}: {kept}" for kept, runs in otherwise.items()]
    return folders, [*notes_on(places), *told]


def backend_notes(runs: Mapping[str, Sequence[RunRecord]]) -> list[str]:
    """Say which models the arms did not train with one backend, whose last bits differ."""
    used: dict[str, dict[str, list[str]]] = {}
    for arm, of_arm in runs.items():
        for record in of_arm:
            for model, backends in record.backends.items():
                by = used.setdefault(model, {}).setdefault(" and ".join(backends), [])
                if arm not in by:
                    by.append(arm)
    return [
        f"{model} was trained by "
        + "; by ".join(f"{backends} in {', '.join(arms)}" for backends, arms in by.items())
        + ": they differ by rounding as well; engine.vectorize=loop or vmap trains all alike"
        for model, by in used.items()
        if len(by) > 1
    ]


def report_folder(folder: Path, runs: Mapping[str, Sequence[Path]], baseline: str) -> Path:
    """Return where the report on these runs belongs, so that it replaces no report on others.

    A report is replaced by one that holds all its runs and has its baseline: more seeds of the
    same study, or more arms, go where it was. Any other goes into a folder of its own inside.
    """
    mine = {arm: {run.name for run in of_arm} for arm, of_arm in runs.items()}
    text = json.dumps([baseline, {arm: sorted(of_arm) for arm, of_arm in mine.items()}])
    own = f"{REPORT_OF}{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    for place in (folder, *sorted(folder.glob(f"{REPORT_OF}*"))):
        theirs = _reported(place)
        if theirs is None and place == folder:
            return folder
        if theirs is not None and _holds((baseline, mine), theirs):
            return place
    return make_folder(folder, folder / own)


Reported = tuple[str, Mapping[str, set[str]]]
"""A report's baseline, and the runs that it is on, by arm."""


def _reported(place: Path) -> Reported | None:
    """Return what the report in a folder is on; None where there is no report."""
    try:
        table = json.loads((place / STUDY_FILE).read_text(encoding="utf-8"))
        arms = {str(arm): {Path(run).name for run in runs} for arm, runs in table["arms"].items()}
        return str(table["baseline"]), arms
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _holds(mine: Reported, theirs: Reported) -> bool:
    (baseline, runs), (other, their_runs) = mine, theirs
    return baseline == other and all(
        of_arm <= runs.get(arm, set()) for arm, of_arm in their_runs.items()
    )


def _check_all(runs: Sequence[PlannedRun], *, show: bool) -> dict[str, str]:
    """Check what can be checked before the first run, not before the last.

    Args:
        runs: those that are to run.
        show: whether an arm that cannot work is left out of the study.

    Returns:
        The reason of each arm that is left out.

    Raises:
        SettingsError: what cannot work, where nothing is left out.
    """
    checked: dict[str, str | None] = {}
    refused: dict[str, str] = {}
    for each in runs:
        settings = each.settings
        key = fingerprint(settings.model_copy(update={"seed": 0}))
        if key not in checked:
            try:
                check_first_answers(settings, load_data(settings))
                checked[key] = None
            except SettingsError as error:
                if not show:
                    raise
                checked[key] = str(error)
        reason = checked[key]
        if reason is not None:
            refused[each.arm] = reason
    return refused


def _of_those_left(
    baseline: str, *, named: bool, arms: Mapping[str, object], refused: Mapping[str, str]
) -> str:
    """Return an arm to compare with that runs: the baseline, or the first where none was named.

    Raises:
        SettingsError: if the baseline that was named is refused, or every arm is.
    """
    left = [arm for arm in arms if arm not in refused]
    if not left:
        raise SettingsError(
            f"every arm is refused: {'; '.join(f'{arm}: {why}' for arm, why in refused.items())}"
        )
    if baseline in refused and named:
        raise SettingsError(
            f"the baseline {baseline} is refused, so nothing can be compared with it: "
            f"{refused[baseline]}; choose another of {', '.join(left)}"
        )
    return left[0] if baseline in refused else baseline


def _run_all(
    plan: StudyPlan,
    observer_of: ObserverOf,
    nursery: Nursery | None,
    *,
    accept_code: bool,
    tell: Callable[[str], None],
) -> None:
    division = plan.division
    if division.packed:
        run_packed(division, observer_of, accept_code=accept_code, tell=tell, nursery=nursery)
    session: RaySession | None = None
    runs = division.alone
    try:
        # Runs that another process is making come last: two commands share the work.
        for waits in (False, True):
            left = []
            for each in runs:
                if each.settings.engine.on_ray and session is None:
                    session = open_session(each.settings.engine)
                made = make_run(
                    each,
                    observer_of,
                    accept_code=accept_code,
                    session=session,
                    waits=waits,
                    tell=tell,
                )
                if not made:
                    left.append(each)
            runs = left
    finally:
        if session is not None:
            session.close()
