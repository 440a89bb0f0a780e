"""`repeat`: one distillation over paired seeds; what is done already is not done again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedkd.distillation.fit.workshop import EpochListener
from fedkd.distillation.settings import DistillSettings
from sim.commands.distilling.running import DistillResult, distill, nobody, read_result
from sim.keeping.identity import fingerprint
from sim.keeping.provenance import notes_on, place_run, provenance_of
from sim.keeping.records import is_finished, storing, to_json, write_text
from sim.reports.distillation import (
    DISTILLATIONS,
    DistillRecord,
    distill_rows,
    load_distillation,
    write_distill_report,
)
from sim.reports.runs import STUDY_FILE
from sim.server.observers import Row
from sim.settings import check_seeds


@dataclass(frozen=True, slots=True)
class Repetition:
    """What a repetition leaves behind.

    Attributes:
        folder: holds the runs' folders, ``study.json``, ``report.html`` and ``figures/``.
        report: path of the report.
        runs: one a seed.
        notes: what a reader has to know about earlier runs, a sentence each.
    """

    folder: Path
    report: Path
    runs: Sequence[DistillRecord]
    notes: Sequence[str] = ()

    def to_row(self) -> Row:
        """Return the table as plain values."""
        return {
            "folder": str(self.folder),
            "report": str(self.report),
            **distill_rows(self.runs),
            "notes": list(self.notes),
            "weights_sha256": {run.seed: run.result["weights_sha256"] for run in self.runs},
        }


def repeat(
    settings: DistillSettings | None = None,
    *,
    accept_code: bool = False,
    observer_of: Callable[[int], EpochListener] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Repetition:
    """Distil with ``settings.seeds`` seeds from ``settings.seed`` on and report on them together.

    Within a seed the student and its twin start from the same weights and take the same labelled
    batches, so that their difference is what distillation did.

    A finished run is taken again only where settings, data, code and libraries are what they were;
    else it is kept, and run anew beside it.

    Args:
        settings: what to run.
        accept_code: take runs whose code or libraries have changed since as they are.
        observer_of: returns who is told about the run of a seed; called for runs that are
            started, not for those that are finished already.
        tell: is told, before anything runs, what the notes say about earlier runs.

    Raises:
        SettingsError: names the setting that cannot work.
        KeyboardInterrupt: the next call goes on with the seeds that are not finished.
    """
    settings = settings or DistillSettings()
    check_seeds(settings.seed, settings.seeds)
    folder = settings.output / settings.name
    goes_on = f"the same command goes on in {folder}"
    plan = [
        settings.model_copy(update={"seed": settings.seed + offset, "seeds": 1})
        for offset in range(settings.seeds)
    ]
    now = provenance_of(settings)
    places = [
        place_run(
            folder / f"seed-{of_seed.seed}-{fingerprint(of_seed)[:8]}",
            now,
            accept_code=accept_code,
            # What was interrupted begins anew, and may as well be of other code.
            begun=is_finished,
        )
        for of_seed in plan
    ]
    notes = notes_on({f"seed {s.seed}": place for s, place in zip(plan, places, strict=True)})
    for note in notes:
        if tell is not None:
            tell(note)
    results: list[DistillResult] = []
    for of_seed, place in zip(plan, places, strict=True):
        seed, run_folder = of_seed.seed, place.folder
        if is_finished(run_folder):
            results.append(read_result(of_seed, run_folder))
            continue
        results.append(
            distill(
                of_seed,
                folder=run_folder,
                goes_on=goes_on,
                observe=nobody if observer_of is None else observer_of(seed),
            )
        )
    table = {
        "name": settings.name,
        "kind": DISTILLATIONS,
        "runs": [str(result.folder.relative_to(folder)) for result in results],
    }
    with storing(folder, goes_on=goes_on):
        write_text(folder / STUDY_FILE, to_json(table, indent=2) + "\n")
    runs = [load_distillation(result.folder) for result in results]
    report = write_distill_report(runs, folder, title=settings.name)
    return Repetition(folder, report, runs, notes)
