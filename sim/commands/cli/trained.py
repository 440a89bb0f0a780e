"""Commands on trained models: ``predict``, ``export``."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedkd.names import printable
from sim.commands.cli.ending import EXIT_FAILED
from sim.commands.cli.printing import print_table
from sim.commands.cli.shell import Allow, AsJson, Quiet
from sim.commands.cli.stopping import stoppable

if TYPE_CHECKING:
    pass


Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Which of the models of a run, such as client-3, where it kept several.",
    ),
]


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a model's file.")],
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILES...", help="Pictures; Parquet, CSV, NPZ; folders of them."),
    ],
    model: Model = None,
    column: Annotated[
        str | None,
        typer.Option(help="Of tables: where pictures or texts are; that of training by default."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="A CSV file for all predictions, with every probability.")
    ] = None,
    allow: Allow = None,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Say what a trained model sees in files.

    Inputs are prepared as for its training: size, colours, columns, standardisation. What cannot
    be read is named, and the exit status is 1.

    Examples:
    - `fedkd predict runs/default/20260101-120000-1a2b3c pictures/`
    - `fedkd predict RUN seven.png three.png --json`
    - `fedkd predict RUN test.parquet --model client-3 --output predictions.csv`
    """
    from sim.commands.models import predict as predict_with
    from sim.commands.progress import signs_of_life
    from sim.keeping.records import to_json

    signs = signs_of_life(Console(stderr=True), quiet=quiet, unit="files", json=json)
    with signs, stoppable():
        task = signs.begin("predicting")
        found = predict_with(
            run,
            files,
            model=model,
            column=column,
            output=output,
            allow=allow or (),
            keep_all=json,
            reached=lambda done, of: signs.reached(task, done, of, ""),
        )
    if json:
        typer.echo(to_json(found.to_row()))
    elif not quiet:
        if found.count:
            print_table(found.table(), wide=False)
        if found.output is not None:
            typer.echo(f"output {found.output}")
    for each in found.problems:
        typer.echo(f"fedkd: {printable(f'{each.where}: {each.problem}')}", err=True)
    if found.problems:
        raise typer.Exit(EXIT_FAILED)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or a model's file.")],
    format: Annotated[
        str, typer.Option(metavar="torch|onnx", help="torch.export, or ONNX (extra fedkd[onnx]).")
    ] = "onnx",
    model: Model = None,
    output: Annotated[
        Path | None, typer.Option(help="The file; by default beside the model's.")
    ] = None,
    raw: Annotated[
        bool,
        typer.Option("--raw", help="Without the standardisation: the file takes its result."),
    ] = False,
    inputs: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Compare on inputs from this file or folder as well."),
    ] = None,
    allow: Allow = None,
    json: AsJson = False,
) -> None:
    """Write a trained model as ONNX or torch.export, and check that the file agrees with it.

    The file takes batches of any size, pixels in [0, 1] or features as they are, and gives logits.

    Examples:
    - `fedkd export runs/default/20260101-120000-1a2b3c`
    - `fedkd export RUN --format torch --model client-3 --output model.pt2`
    - `fedkd export RUN --inputs pictures/`
    """
    from sim.commands.models import export as export_as
    from sim.keeping.records import to_json

    with stoppable(), redirect_stdout(sys.stderr):
        made = export_as(
            run,
            format=format,
            model=model,
            output=output,
            standardise=not raw,
            inputs=inputs or (),
            allow=allow or (),
        )
    if json:
        row = {
            "path": str(made.path),
            "largest_difference": made.largest_difference,
            "inputs": made.rows,
        }
        typer.echo(to_json(row))
        return
    difference = f"{made.largest_difference:.2g}"
    typer.echo(f"wrote  {made.path}")
    typer.echo(f"agrees with the model: {made.rows} inputs, logits differ by at most {difference}")
