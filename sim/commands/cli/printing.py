"""What several commands print."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from fedkd.names import printable

if TYPE_CHECKING:
    from sim.commands.running import RunResult
    from sim.reports.terminal import FittedTable
    from sim.server.observers import Row


def say_where(folder: Path, row: "Row") -> None:
    """Name the run's folder, and its report or what would draw it."""
    drawn = f"report {row['report']}" if "report" in row else f"draw   fedkd report {folder}"
    typer.echo(f"run    {folder}\n{drawn}")


def say(note: str) -> None:
    """Say what decides numbers, in every mode: standard output is for tables and JSON."""
    typer.echo(f"fedkd: {printable(note)}", err=True)


def print_table(table: "FittedTable", *, wide: bool) -> None:
    """Print the columns that the terminal has room for, or all of them.

    A file or a pipe has no width of its own: it gets all, unless COLUMNS says how wide it is.
    """
    console = Console()
    if wide or not (console.is_terminal or "COLUMNS" in os.environ):
        console = Console(width=max(table.natural_width, console.width))
    console.print(table)


def print_words(*sentences: str) -> None:
    """Print sentences, broken between words where a terminal has a width."""
    console = Console(highlight=False)
    for sentence in sentences:
        console.print(printable(sentence), markup=False, soft_wrap=not console.is_terminal)


def run_table(result: "RunResult") -> "FittedTable":
    """Two columns of what a run ended with."""
    from sim.reports.runs import number
    from sim.reports.tables import kilobytes
    from sim.reports.terminal import NOTHING, Column, FittedTable

    row = result.to_row()
    last, selected = row["last"], row["selected"]
    names = {
        "accuracy": "mean client accuracy",
        "honest_accuracy": "mean accuracy of honest clients",
        "worst_accuracy": "worst client accuracy",
        "personal_accuracy": "accuracy under own label mix",
        "macro_recall": "macro recall",
        "ensemble_accuracy": "ensemble accuracy",
        "server_accuracy": "server model accuracy",
        "attack_success": "attack success, honest clients",
        "server_attack_success": "attack success, server model",
        "accuracy_spread": "spread of clients' accuracies",
        "calibration_error": "calibration error, mean client",
        "ensemble_gain": "ensemble minus mean client",
        "forgetting": "forgetting of own label mix",
    }
    shown = [key for key in names if key in last]

    def column(title: str, of_round: Mapping[str, Any], rank: int) -> Column:
        values = [number(of_round, key) for key in shown]
        cells = [NOTHING if value is None else f"{100 * value:.1f} %" for value in values]
        return Column(title=f"{title} ({of_round.get('round', NOTHING)})", cells=cells, rank=rank)

    clients = max(len(row["clients"]), 1)
    sent = kilobytes(sum(row["bytes_up"]) / clients)
    received = kilobytes(sum(row["bytes_down"]) / clients)
    clock = (
        number(result.history.federation[-1], "simulated_s") if result.history.federation else None
    )
    simulated = "" if clock is None else f", {clock:,.4g} s by the simulated clock"
    budget = result.settings.exchange.budget_kb
    spent = ""
    if budget is not None:
        used = (sum(row["bytes_up"]) + sum(row["bytes_down"])) / 1e3
        spent = f"; {used:,.1f} of a budget of {budget:,.10g} kB{_bits_text(row.get('bits', {}))}"
    return FittedTable(
        label="test split",
        labels=[names[key] for key in shown],
        columns=[
            column("last round", last, 1),
            column("best by validation", selected, 2),
        ],
        title=f"{row['name']}: {row['strategy']}, seed {row['seed']}",
        caption=f"{sent} kB up and {received} kB down per client; {row['seconds']:.1f} s"
        + spent
        + privacy_text(result.privacy)
        + simulated,
    )


def privacy_text(privacy: Mapping[str, Any]) -> str:
    """Say what was spent of each client's privacy; nothing where nothing was promised."""
    from sim.reports.runs import number
    from sim.reports.tables import epsilon_text

    audit = _audit_text(privacy.get("audit"))
    if "mechanism" not in privacy:
        return audit
    epsilon, budget = number(privacy, "epsilon"), number(privacy, "budget")
    of = "" if budget is None else f" of {budget:,.10g}"
    delta = "" if (value := number(privacy, "delta")) is None else f", delta {value:g}"
    unit = privacy.get("unit", "client")
    return f"; epsilon {epsilon_text(epsilon)}{of} for each {unit}{delta}{audit}"


def _audit_text(audit: Mapping[str, Any] | None) -> str:
    """Say what an audit proved, and whether that contradicts what was claimed."""
    from sim.reports.tables import audit_text

    return "" if audit is None else f"; {audit_text(audit)}"


def _bits_text(bits: Mapping[str, Mapping[int, int]]) -> str:
    """Say how many bits a number had in each direction."""
    spans = {way: sorted(map(int, counts)) for way, counts in bits.items() if counts}
    return "".join(
        f", {way} {low if low == high else f'{low} to {high}'} bit{'s' * (high > 1)}"
        for way in ("up", "down")
        if way in spans
        for low, high in [(spans[way][0], spans[way][-1])]
    )
