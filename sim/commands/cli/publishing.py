"""Commands that take a finished study out of the tool: tables, figures, references."""

from pathlib import Path
from typing import Annotated

import typer

StudyFolder = Annotated[Path, typer.Argument(metavar="STUDY", help="A study or a run folder.")]


def table(
    study: StudyFolder,
    format: Annotated[
        str,
        typer.Option(
            metavar="latex|markdown|csv|parquet", help="LaTeX is for booktabs and siunitx."
        ),
    ] = "latex",
    measures: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Columns: accuracy, worst_accuracy, bytes_up, difference, p_holm, detectable, ...",
        ),
    ] = None,
    at: Annotated[
        str, typer.Option(metavar="last|selected", help="The round that is shown.")
    ] = "last",
    rows: Annotated[
        str | None,
        typer.Option(
            metavar="arms|runs|rounds|clients", help="What a row of csv or parquet is about."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The file; standard output by default.")
    ] = None,
) -> None:
    """Print a study as a table for a paper or for another program.

    Arms are rows and measures columns; a sweep is a grid of its values.

    Examples:
    - `fedkd table runs/quickstart > table.tex`
    - `fedkd table runs/quickstart --format markdown
      --measures accuracy,difference,p_holm`
    - `fedkd table runs/quickstart --format csv --rows rounds --output rounds.csv`
    - `fedkd table runs/quickstart --format parquet --output runs.parquet`
    """
    from sim.publishing.tables import table as write_table

    chosen = [name.strip() for name in measures.split(",")] if measures else None
    text = write_table(study, format, measures=chosen, at=at, rows=rows, output=output)
    if output is None:
        typer.echo(text, nl=False)
    else:
        typer.echo(f"table  {output}")


def figures(
    study: StudyFolder,
    format: Annotated[str, typer.Option(metavar="svg|pdf|png", help="Of all figures.")] = "pdf",
    style: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="An .mplstyle file, or a style of matplotlib's, over fedkd's own."
        ),
    ] = None,
    width: Annotated[
        float | None, typer.Option(metavar="INCHES", help="2 to 20; the report's by default.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="The folder; figures/ in the study's by default.")
    ] = None,
) -> None:
    """Draw all figures of a study's report for a paper: the same bits each time.

    Examples:
    - `fedkd figures runs/quickstart`
    - `fedkd figures runs/quickstart --format svg --output paper/figures`
    - `fedkd figures runs/quickstart --style grayscale --width 6.5`
    """
    from sim.publishing.figures import figures as draw

    for path in draw(study, format, style=style, width=width, output=output):
        typer.echo(f"figure {path}")


def cite(
    names: Annotated[
        list[str], typer.Argument(metavar="STUDY|ALGORITHM...", help="A folder, or algorithms.")
    ],
    format: Annotated[
        str,
        typer.Option(
            metavar="bibtex|text|methods", help="Methods are a paragraph for LaTeX that cites them."
        ),
    ] = "bibtex",
) -> None:
    """Print what a study is from: its algorithms, data, tests and tools; or its methods paragraph.

    Examples:
    - `fedkd cite runs/quickstart > references.bib`
    - `fedkd cite runs/quickstart --format methods > methods.tex`
    - `fedkd cite dml fedmd --format text`
    """
    from sim.publishing.methods import cite as write

    typer.echo(write(names, format), nl=False)


def bundle(
    study: Annotated[
        Path, typer.Argument(metavar="STUDY", help="A study or a run folder; with --check a file.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The archive; STUDY.zip here by default. Only a bundle is replaced.",
        ),
    ] = None,
    models: Annotated[bool, typer.Option("--models", help="Take the trained models too.")] = False,
    with_code: Annotated[
        bool,
        typer.Option(
            "--with-code",
            help="Take the source of your own packages that settings name, unless installed.",
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Check an archive: every file's SHA-256, and tables by the metrics."
        ),
    ] = False,
) -> None:
    """Put a study into one archive: settings, versions, metrics, figures, tables, references.

    Examples:
    - `fedkd bundle runs/quickstart`
    - `fedkd bundle runs/quickstart --output study.zip --models --with-code`
    - `fedkd bundle study.zip --check`
    """
    from sim.publishing.bundle import bundle as write
    from sim.publishing.bundle import check_bundle

    if check:
        count = check_bundle(study)
        typer.echo(f"sound  {study}: {count} files, and the tables follow from the metrics")
    else:
        typer.echo(f"bundle {write(study, output, models=models, code=with_code)}")
