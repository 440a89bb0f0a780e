"""What the doctor's forecast is made of: small federations, what it saw of them, what they gained.

Each federation is drawn at random: data set, public source and size, how labels are dealt, clients
and models. The doctor looks at it; then `local` and each exchanging algorithm run on the same data.
The gain is mean client accuracy on the test split at the last round minus that of `local`.
Forecasts are judged with a whole data set left out at a time.

    python benchmarks/doctor.py DATA           # some 10 minutes; DATA: folders of Parquet files
    python benchmarks/doctor.py --fit          # only the fit again, of the table that is there
    python benchmarks/doctor.py DATA --quick   # two federations of each; writes nothing
"""

import argparse
import csv
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.metrics.forecast import COVERAGE, PENALTY, Calibration, calibrate
from fedkd.metrics.public_set import PublicSetFigures
from sim.commands.doctor import FORECAST_FILE, examine, features_of
from sim.commands.running import load_data
from sim.contract.toy import simulate
from sim.settings import Settings, SettingsError, settings_from_table

HERE = Path(__file__).parent
TABLE = HERE / "doctor.csv"
FORECAST = HERE.parent / "sim" / "commands" / FORECAST_FILE
FIGURE = HERE.parent / "docs" / "images" / "doctor.png"

ALGORITHMS = ("dml", "fedmd")
ROUNDS, EPOCHS = 5, 2
SINGLE = ("ensemble_gain", "domain_shift")
"""Features that simpler forecasts have alone."""

PICTURES = {
    "digits": ("digits", 8),
    "mnist": ("mnist", 12),
    "fsdd": ("fsdd-spectrogram", 12),
    "omniglot": ("omniglot-alphabets", 12),
    "cifar10": ("cifar10-jpeg", 12),
}
FEATURES = {"letter": "letter", "adult": "adult"}
"""Folders of data sets, and the side that pictures are brought to."""


def federations(root: Path, each: int) -> Iterator[tuple[str, Settings]]:
    """Yield data sets in turn with drawn settings."""
    for number in range(each):
        for place, group in enumerate([*PICTURES, *FEATURES]):
            yield group, drawn(root, group, np.random.default_rng((2020, place, number)), number)


def drawn(root: Path, group: str, rng: np.random.Generator, number: int) -> Settings:
    """Draw the settings of a federation on a data set."""

    def one_of(*choices: Any) -> Any:
        return choices[int(rng.integers(len(choices)))]

    data: dict[str, Any] = {
        "private_rows": one_of(250, 500, 900),
        "test_rows": 300,
        "partition": {
            "kind": "dirichlet",
            "alpha": one_of(0.05, 0.1, 0.3, 1.0, 10.0),
            "min_rows": 2,
        },
        "public": {"size": one_of(20, 60, 150, 300)},
    }
    models: list[Any] = [{"name": "mlp", "options": {"hidden": [32]}}]
    if group in PICTURES:
        data |= {"source": source(root, group), "resize": PICTURES[group][1]}
        other = one_of(*PICTURES)
        # Every other federation learns from rows of its own source.
        if number % 2 and other != group:
            data["public"]["source"] = source(root, other)
        if rng.random() < 0.4:
            models.append({"name": "cnn", "options": {"channels": [8]}})
    else:
        data["source"] = source(root, group)
    return settings_from_table(
        {
            "seed": int(rng.integers(2**31)),
            "rounds": ROUNDS,
            "data": data,
            "clients": {
                "count": one_of(4, 6, 8),
                "models": models,
                "batch_size": 16,
                "optimizer": {"name": "adam", "lr": one_of(0.003, 0.01)},
                "local": {"epochs": EPOCHS},
            },
            "engine": {"backend": "inline"},
            "evaluation": {"every": ROUNDS},
        }
    )


def try_all(root: Path, each: int, quick: bool) -> list[dict[str, Any]]:
    """Try federations; each is in the table as soon as it is known."""
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    for group, settings in federations(root, 2 if quick else each):
        try:
            row = tried(group, settings)
        except SettingsError as error:
            print(f"{group}: left out: {error}", flush=True)
            continue
        rows.append(row)
        if not quick:
            write_table(rows)
        print(
            f"{len(rows):4d} {time.perf_counter() - started:6.0f} s {group:9s} {row['public']:18s}"
            + "".join(f" {name} {100 * row[name]:5.1f}" for name in ("local", *ALGORITHMS)),
            flush=True,
        )
    return rows


def source(root: Path, group: str) -> str:
    folder = PICTURES[group][0] if group in PICTURES else FEATURES[group]
    return folder if folder == "digits" else str(root / folder)


def tried(group: str, settings: Settings) -> dict[str, Any]:
    """Return the doctor's figures of a federation, and what it gained."""
    data = load_data(settings)
    figures = examine(settings, data).figures
    table = settings.to_table()
    accuracies = {
        name: simulate(
            settings_from_table({**table, "strategy": {"name": name}}), data
        ).history.federation[-1]["accuracy"]
        for name in ("local", *ALGORITHMS)
    }
    other = settings.data.public.source
    return {
        "group": group,
        "public": "own" if other is None else Path(other).name,
        "public_rows": settings.data.public.size,
        "private_rows": settings.data.private_rows,
        "alpha": settings.data.partition.alpha,  # type: ignore[union-attr]
        "clients": settings.clients.count,
        **{name: round(value, 6) for name, value in asdict(figures).items()},
        **{name: round(value, 6) for name, value in accuracies.items()},
    }


def write_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Write what was tried so far."""
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_table(path: Path = TABLE) -> list[dict[str, Any]]:
    """Return the federations that were tried."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = ("group", "public")
    return [
        {key: value if key in texts else float(value) for key, value in row.items()} for row in rows
    ]


def fitted(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Calibration]]:
    """Return the content of the forecast's file, and what each algorithm's forecast was worth."""
    names = PublicSetFigures.__dataclass_fields__
    known = [features_of(PublicSetFigures(**{name: row[name] for name in names})) for row in rows]
    features = np.array([[*each.values()] for each in known])
    groups = [row["group"] for row in rows]
    algorithms, calibrations = {}, {}
    for name in ALGORITHMS:
        gains = np.array([row[name] - row["local"] for row in rows])
        forecast, calibrations[name] = calibrate(
            features,
            gains,
            groups,
            single={
                f"{each.replace('_', ' ')} alone": list(known[0]).index(each) for each in SINGLE
            },
        )
        algorithms[name] = forecast.to_row()
    about = {
        "made_by": "benchmarks/doctor.py",
        "federations": len(rows),
        "data_sets": sorted(set(groups)),
        "rounds": ROUNDS,
        "local_epochs": EPOCHS,
        "features": list(known[0]),
        "lowest": features.min(axis=0).round(4).tolist(),
        "highest": features.max(axis=0).round(4).tolist(),
        "penalty": PENALTY,
        "coverage_aimed_at": COVERAGE,
        "calibration": {name: numbers(own) for name, own in calibrations.items()},
        "verdict": verdict(calibrations, len(rows), len(set(groups))),
    }
    return {"about": about, "algorithms": algorithms}, calibrations


def numbers(own: Calibration) -> dict[str, Any]:
    """Return what a forecast was worth, without the cases."""
    return {
        "mean_absolute_error": round(own.error, 4),
        "trivial_errors": {name: round(value, 4) for name, value in own.trivial_errors.items()},
        "r2": round(own.r2, 3),
        "covered": round(own.covered, 3),
        "mean_half_width": round(float(own.widths.mean()), 4),
        "right_sign": round(own.right_sign, 3),
        "positive": round(own.positive, 3),
    }


def verdict(calibrations: Mapping[str, Calibration], federations: int, groups: int) -> list[str]:
    """Say what the forecasts are worth, and where they are worth nothing."""
    return [
        f"How far off such forecasts were on data sets that they had not seen ({federations} "
        f"federations, {groups} data sets):",
        *(worth(*each) for each in calibrations.items()),
    ]


def worth(name: str, own: Calibration) -> str:
    """Say what an algorithm's forecast is worth beside simpler ones."""
    guess, error = min(own.trivial_errors.items(), key=lambda item: item[1])
    beside = (
        f"{guess!r} by {100 * error:.1f}"
        if own.error < 0.95 * error
        else f"no better than {guess!r} ({100 * error:.1f})"
    )
    sign = "more often" if own.right_sign > own.positive else "no more often"
    return (
        f"{name}: by {100 * own.error:.1f} points, {beside}; the interval held "
        f"{100 * own.covered:.0f} %; the sign was right in {100 * own.right_sign:.0f} %, {sign} "
        f"than always saying that exchange helps ({100 * own.positive:.0f} %)."
    )


def draw(rows: Sequence[Mapping[str, Any]], calibrations: Mapping[str, Calibration]) -> None:
    """Draw predicted against realised gains, one panel an algorithm."""
    from fedkd.figures.style import COLORS, new_figure

    groups = sorted({row["group"] for row in rows})
    figure = new_figure(9, 4.2)
    axes = figure.subplots(1, len(calibrations), sharey=True)
    for panel, (name, own) in zip(axes, calibrations.items(), strict=True):
        realised = 100 * np.array([row[name] - row["local"] for row in rows])
        predicted, width = 100 * own.predicted, 100 * own.widths.mean()
        low = min(realised.min(), predicted.min()) - 3
        high = max(realised.max(), predicted.max()) + 3
        panel.fill_between(
            [low, high],
            [low - width, high - width],
            [low + width, high + width],
            color="0.92",
        )
        panel.plot([low, high], [low, high], color="0.5", linewidth=1)
        panel.axhline(0, color="0.8", linewidth=0.8)
        panel.axvline(0, color="0.8", linewidth=0.8)
        for place, group in enumerate(groups):
            inside = np.array([row["group"] == group for row in rows])
            panel.scatter(
                predicted[inside],
                realised[inside],
                s=18,
                marker="osD^vPX"[place % 7],
                color=COLORS[place % len(COLORS)],
                label=group,
            )
        panel.set_xlabel("predicted gain (points)")
        panel.set_title(f"{name}: mean client minus local")
        panel.set_xlim(low, high)
    axes[0].set_ylabel("realised gain (points)")
    axes[-1].legend(fontsize=8, loc="upper left")
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, help="folder with mnist, adult, ...")
    parser.add_argument("--each", type=int, default=20, help="federations on each data set")
    parser.add_argument("--fit", action="store_true", help="use the table that is there")
    parser.add_argument("--quick", action="store_true", help="two on each; writes nothing")
    options = parser.parse_args()
    if not options.fit and options.data is None:
        parser.error("name the folder of the data sets, or --fit")
    rows = read_table() if options.fit else try_all(options.data, options.each, options.quick)
    content, calibrations = fitted(rows)
    print(json.dumps(content["about"], indent=1))
    if options.quick:
        return
    FORECAST.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draw(rows, calibrations)


if __name__ == "__main__":
    main()
