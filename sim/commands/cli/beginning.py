"""Commands that one begins with: ``new``."""

from pathlib import Path
from typing import Annotated

import typer

from sim.commands.cli.shell import AsJson


def new(
    name: Annotated[
        str,
        typer.Argument(help="Of the package: small letters, digits and '_'.", show_default=False),
    ],
    at: Annotated[
        Path | None,
        typer.Option(help="The folder to make; by default one of that name here."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Begin an algorithm of your own: a package with the method, its test and a study.

    It runs and passes the contract test as it is; change one function, then the rest.

    Examples:
    - `fedkd new my_method` : makes `my_method/`
    - `fedkd new surer_counts --at ~/papers/surer`
    """
    from sim.keeping.records import to_json
    from sim.scaffold import new as make

    made = make(name, folder=at)
    if json:
        typer.echo(to_json(made.to_row()))
        return
    for file in made.files:
        typer.echo(str(made.folder / file))
    typer.echo(
        f"\nnext:  cd {made.folder}\n"
        "       pytest\n"
        f"       fedkd compare conf/{made.package}.yaml --allow {made.package}"
    )
