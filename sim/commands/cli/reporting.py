"""``fedkd report``, and the reports that other commands draw."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    pass


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run or study folders.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the report; by default beside the runs.")
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="ARM", help="The arm that the others are compared with."),
    ] = None,
) -> None:
    """Write report.html and its figures for runs or studies, grouped by arm.

    Examples:
    - `fedkd report runs/quickstart`
    - `fedkd report runs/distill/20260101-120000-1a2b3c` : a distillation
    - `fedkd report runs/a/20260101-120000-1a2b3c runs/b/20260101-120500-4d5e6f --output both`
    """
    typer.echo(f"report {write_report(runs, output, baseline)}")


def write_report(
    runs: Sequence[Path], output: Path | None = None, baseline: str | None = None
) -> Path:
    """Draw the report on federations, or on distillations."""
    from sim.reports import report as write_report_on
    from sim.reports.distillation import is_distillation, report_distillations
    from sim.settings import SettingsError

    distillations = [run for run in runs if is_distillation(run)]
    if distillations and len(distillations) < len(runs):
        raise SettingsError(
            f"a report is on federations or on distillations, got both: {str(distillations[0])!r} "
            "is a distillation"
        )
    if not distillations:
        return write_report_on(runs, output, baseline=baseline)
    if baseline is not None:
        raise SettingsError(
            "--baseline is for federations: a distillation is compared with its undistilled twin"
        )
    return report_distillations(runs, output)


def report_on(folder: Path) -> Path:
    """Draw the report of a run that has just ended; where it cannot, say how to do it later."""
    from sim.keeping.records import storing

    with storing(folder, goes_on=f"fedkd report {folder}"):
        return write_report([folder])
