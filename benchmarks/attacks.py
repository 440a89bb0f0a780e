"""What shadows cost, and whether attacks find what is to be found in both controls.

256 shadow models of an MLP (64 inputs, one hidden layer of 64, 10 outputs) on digits: each learns
from half of 1,000 rows, five rounds of five passes, stacked. Then the two controls of membership on
models that know their rows by heart, with half of their labels wrong, and on membership drawn at
random: the positive one has to be found by every attack, with an area under the ROC curve above
0.8, and LiRA has to find more members than the loss threshold where 1 % of non-members pass; of the
negative one 0.5 has to be in the 95 % interval of each.

    python benchmarks/attacks.py            # about a minute
    python benchmarks/attacks.py --check    # exit status 1 beyond a target
    python benchmarks/attacks.py --quick    # tiny, to see that it runs; says nothing
"""

import argparse
import json
import os
import sys
import tempfile

import numpy as np
from measurement import Samples, add_common_arguments, describe, machine, row, stopwatch

from fedkd.models import ModelSettings
from sim.attacks.candidates import Pool
from sim.attacks.evidence import attacked_data, evidence_of
from sim.attacks.membership import (
    CONTROL_STEPS,
    Figures,
    learnt_by_heart,
    negative_control,
    positive_control,
)
from sim.attacks.scene import Scene
from sim.attacks.shadows import learn_alone
from sim.commands.running import run
from sim.settings import load_settings

MLP = ModelSettings(name="mlp", options={"hidden": [64]})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_arguments(parser, repeats=3, at_most=60.0)
    options = parser.parse_args()
    shadows, rows, controls = (4, 60, 16) if options.quick else (256, 1000, 64)
    if options.quick:
        options.repeats = 1
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings(
            None,
            [
                f"output={folder}",
                "rounds=5",
                "clients.count=5",
                "clients.models=[{name: mlp, options: {hidden: [64]}}]",
                "clients.optimizer.lr=0.003",
                "engine.backend=inline",
                "evaluation.every=5",
                "exchange.keep=true",
                "attacks.shadows=8",
                *(["rounds=1", "clients.local.epochs=1"] if options.quick else []),
            ],
        )
        done = run(settings)
        data = attacked_data(settings)
        pool = Pool.of(data)
        rng = np.random.default_rng(0)
        chosen = rng.permutation(len(pool.labels))[:rows]
        halves = [np.sort(rng.permutation(chosen)[: rows // 2]) for _ in range(shadows)]
        seconds: list[float] = []
        for _ in range(options.repeats):
            with stopwatch(seconds):
                learn_alone(settings, data, pool, [MLP] * shadows, halves, 1, lambda _: None)
        by_heart = learnt_by_heart(settings)
        if options.quick:
            local = by_heart.clients.local.model_copy(update={"steps": 5})
            clients = by_heart.clients.model_copy(update={"local": local})
            by_heart = by_heart.model_copy(update={"clients": clients})
        evidence = evidence_of(done.folder, settings, data, lambda _: None)
        scene = Scene(
            settings, settings.attacks, data, evidence, lambda _: None, lambda _, make: make()
        )
        positive = positive_control(
            settings,
            pool,
            MLP,
            scene.bench,
            lambda own, models, learnt: learn_alone(
                by_heart, data, own, models, learnt, 2, lambda _: None
            ),
            models=controls,
            wrong=0.5,
            population=data.validation_inputs,
            population_labels=data.validation_labels,
        )
        negative = negative_control(scene.seen_from("model"), settings.seed)
    found = {each.attack: each for each in positive.figures}
    random = {each.attack: each for each in negative.figures}
    print(describe(before, os.getloadavg()[0]))
    spent = Samples(seconds)
    print(f"{shadows} shadow models on {rows // 2} of {rows} rows each: {spent.text()} s")
    print(f"positive control, {controls} models, {CONTROL_STEPS} steps; negative control:")
    for name, each in found.items():
        print(f"  {name:13} {_text(each)}; drawn at random: {_text(random[name])}")
    row(
        "A1",
        f"{shadows} shadow models of an MLP on digits, seconds",
        spent.text(),
        f"at most {options.at_most:g}",
        spent.median <= options.at_most,
        options,
    )
    least = min(each.auc.value for each in found.values())
    row("A2", "positive control: smallest AUC", f"{least:.3f}", "above 0.8", least > 0.8, options)
    inside = [each.auc.low < 0.5 < each.auc.high for each in random.values()]
    row(
        "A3",
        "negative control: attacks with 0.5 in their interval",
        f"{sum(inside)} of {len(inside)}",
        "all",
        all(inside),
        options,
    )
    lira, threshold = (_found(found[name]) for name in ("lira_online", "threshold"))
    row(
        "A4",
        "positive control: members found at 1 % false positives, LiRA, loss threshold",
        f"{100 * lira:.1f} %, {100 * threshold:.1f} %",
        "LiRA more",
        lira > threshold,
        options,
    )
    if options.json:
        aucs = {name: each.auc.value for name, each in found.items()}
        print(json.dumps({**before, "seconds": spent.to_table(), "auc": aucs}))
    met = spent.median <= options.at_most and least > 0.8 and all(inside) and lira > threshold
    return int(options.check and not options.quick and not met)


def _found(figures: Figures) -> float:
    at = figures.rates[0.01]
    return 0.0 if at is None else at.value


def _text(figures: Figures) -> str:
    auc = figures.auc
    return f"AUC {auc.value:.3f} [{auc.low:.3f}, {auc.high:.3f}], TPR {100 * _found(figures):.1f} %"


if __name__ == "__main__":
    sys.exit(main())
