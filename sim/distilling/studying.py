"""`repeat`: one distillation over paired seeds; what is done already is not done again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedkd.distillation.settings import DistillSettings
from fedkd.distillation.workshop import Observer
from sim.distilling.running import DistillResult, distill, nobody, read_result
from sim.identity import fingerprint
from sim.observers import Row
from sim.records import is_finished, storing, to_json, write_text
from sim.reports.distillation import (
    DISTILLATIONS,
    DistillRecord,
    distill_rows,
    load_distillation,
    write_distill_report,
)
from sim.reports.runs import STUDY_FILE


@dataclass(frozen=True, slots=True)
class Repetition:
    """What a repetition leaves behind.

    Attributes:
        folder: holds the runs' folders, ``study.json``, ``report.html`` and ``figures/``.
        report: path of the report.
        runs: one a seed.
    """

    folder: Path
    report: Path
    runs: Sequence[DistillRecord]

    def to_row(self) -> Row:
        """Return the table as plain values."""
        return {
            "folder": str(self.folder),
            "report": str(self.report),
            **distill_rows(self.runs),
            "weights_sha256": {run.seed: run.result["weights_sha256"] for run in self.runs},
        }


def repeat(
    settings: DistillSettings | None = None,
    *,
    observer_of: Callable[[int], Observer] | None = None,
) -> Repetition:
    """Distil with ``settings.seeds`` seeds from ``settings.seed`` on and report on them together.

    Within a seed the student and its twin start from the same weights and take the same labelled
    batches, so that their difference is what distillation did.

    Args:
        settings: what to run.
        observer_of: returns who is told about the run of a seed; called for runs that are
            started, not for those that are finished already.

    Raises:
        SettingsError: names the setting that cannot work.
        KeyboardInterrupt: the next call goes on with the seeds that are not finished.
    """
    settings = settings or DistillSettings()
    folder = settings.output / settings.name
    goes_on = f"the same command goes on in {folder}"
    results: list[DistillResult] = []
    for offset in range(settings.seeds):
        seed = settings.seed + offset
        of_seed = settings.model_copy(update={"seed": seed, "seeds": 1})
        run_folder = folder / f"seed-{seed}-{fingerprint(of_seed)[:8]}"
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
    return Repetition(folder, report, runs)
