"""Bytes until an accuracy is reached: CFD beside FedAvg, and SCARLET beside DS-FL, on MNIST.

    python benchmarks/traffic.py --data FOLDER                 # MNIST as Parquet: docs/data.md
    python benchmarks/traffic.py --data FOLDER --only scarlet  # each some five minutes on one core

``cfd``: five LeNets with 400 private rows each, IID, and 8,000 public rows without labels. FedAvg
has six rounds, CFD four. The target is what FedAvg's model has after its last round, less one
point; the server's model has to have it with CFD. Counted is everything that goes up and down until
then, of all clients.

``scarlet``: the same clients and 250 of 1,000 public rows a round; DS-FL makes the same labels and
keeps none. The target is DS-FL's accuracy after the last round, less one point, of the mean client.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from measurement import describe, machine, row

from sim import run
from sim.settings import load_settings

SETTINGS = (
    "clients.count=5",
    "data.partition.kind=iid",
    "data.private_rows=2250",
    "data.test_rows=1000",
    "clients.models=lenet",
    "engine.backend=inline",
)
SMALL = ("data.private_rows=100", "data.public.size=100", "clients.models=mlp")
"""Of digits, without a folder: says whether the script runs."""
PUBLIC = {"cfd": "data.public.size=8000", "scarlet": "data.public.size=1000"}
ROUNDS = {"cfd": 6, "scarlet": 12}
CFD = ("strategy.name=cfd", "strategy.distil_epochs=2", "strategy.server_epochs=2")
STUDIES: dict[str, dict[str, tuple[str, ...]]] = {
    "cfd": {
        "FedAvg": ("strategy.name=fedavg",),
        "CFD-32-32": CFD,
        "CFD-delta-1-1": (
            *CFD,
            "exchange.up=cfd_delta",
            "exchange.down=cfd_delta",
        ),
    },
    "scarlet": {
        "DS-FL": ("strategy.name=dsfl", "strategy.sharpening=enhanced_era"),
        "SCARLET, cache 3": ("strategy.name=scarlet", "strategy.cache=3"),
        "SCARLET, cache 6": ("strategy.name=scarlet", "strategy.cache=6"),
    },
}


def bytes_to(rounds: list[dict[str, Any]], key: str, target: float) -> int | None:
    """Return the bytes until a round has the accuracy; None: no round has."""
    sent = 0
    for line in rounds:
        sent += line["bytes_up"] + line["bytes_down"]
        if line.get(key, 0.0) >= target:
            return sent
    return None


def measured(study: str, options: argparse.Namespace) -> bool:
    """Run the arms of a study and print what it says; tell whether it is as published."""
    rounds = 2 if options.quick else options.rounds or ROUNDS[study]
    common = [*SETTINGS, PUBLIC[study], f"seed={options.seed}", "name=traffic"]
    model = "mlp" if options.data is None else "lenet"
    common += [f"output={options.output}"]
    common += SMALL if options.data is None else [f"data.source={options.data}"]
    if study == "scarlet":
        common.append(f"exchange.rows_per_round={25 if options.data is None else 250}")
    key = "server_accuracy" if study == "cfd" else "accuracy"
    reference: float | None = None
    found: dict[str, int | None] = {}
    names = list(STUDIES[study])
    for name, words in STUDIES[study].items():
        own_words = [f"rounds={rounds}"]
        if name.startswith("CFD"):
            # With many public rows a round takes as long as many of FedAvg, and fewer are needed.
            own_words = [f"rounds={min(rounds, 4)}", f"strategy.server_model={model}"]
        lines = run(load_settings(None, [*common, *words, *own_words])).history.federation
        # FedAvg's clients are judged with the global model.
        own = key if key in lines[-1] else "accuracy"
        last = float(lines[-1][own])
        reference = last if reference is None else reference
        found[name] = bytes_to(lines, own, reference - 0.01)
        total = sum(line["bytes_up"] + line["bytes_down"] for line in lines)
        sent = found[name]
        print(
            f"{name}: {100 * last:.1f} % after {len(lines)} rounds and {total / 1000:,.1f} kB; "
            f"{100 * (reference - 0.01):.1f} % after "
            + ("never" if sent is None else f"{sent / 1000:,.1f} kB"),
            flush=True,
        )
    base = found[names[0]] or 0
    best = min((sent for name in names[1:] if (sent := found[name])), default=0)
    ratio = base / best if best else 0.0
    if study == "cfd":
        raw = found["CFD-32-32"] or 0
        plain = raw / best if best else 0.0
        what = "bytes to FedAvg's accuracy less 1 point, FedAvg / CFD"
        row("X2", what, f"{ratio:,.0f}", "over 10^4, large models", ratio > 1e4, options)
        row("X2", "the same, raw soft labels / CFD", f"{plain:,.0f}", "100", plain >= 100, options)
        return ratio > 1e4 and plain >= 100
    saved = 1 - best / base if best and base else 0.0
    what = "traffic that SCARLET saves at DS-FL's accuracy less 1 point"
    row("X3", what, f"{saved:.0%}", "up to 50 %", saved >= 0.5, options)
    return saved >= 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="MNIST as Parquet files; none: digits, as with --quick")
    parser.add_argument("--only", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument(
        "--rounds", type=int, help="6 for cfd, at most 4 of CFD itself; 12 for scarlet"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where runs are kept; none: nowhere")
    parser.add_argument(
        "--check", action="store_true", help="exit status 1 below what is published"
    )
    parser.add_argument("--quick", action="store_true", help="two rounds, no verdict")
    options = parser.parse_args()
    options.quick = options.quick or options.data is None
    before = machine()
    with tempfile.TemporaryDirectory() as nowhere:
        options.output = options.output or Path(nowhere)
        published = [measured(study, options) for study in options.only]
    print(describe(before, os.getloadavg()[0]))
    return int(options.check and not options.quick and not all(published))


if __name__ == "__main__":
    sys.exit(main())
