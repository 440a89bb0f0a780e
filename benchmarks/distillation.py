"""Every way to distil on one setting: digits, 100 labelled rows, 1000 rows without labels.

Each method runs over paired seeds against the same student trained on the 100 labels only (same
first weights, same labelled batches). The teacher of a seed is trained once and shared. Prints a
Markdown table with the mean accuracy and the paired difference with its 95 % t-interval,
including those that do not help.

    python benchmarks/distillation.py                       # all, 10 seeds
    python benchmarks/distillation.py --only kd dml --seeds 3
    python benchmarks/distillation.py --processes 2 --json results.json
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measurement import describe, machine

from fedkd.distillation.fit.workshop import labels_only
from fedkd.distillation.methods import METHODS, method_class
from fedkd.distillation.run.running import open_workshop
from fedkd.distillation.settings import DistillSettings
from fedkd.distillation.task.predicting import predict_logits
from fedkd.distillation.task.rows import Rows, load_rows
from fedkd.distillation.task.teachers import Teacher
from sim.reports.statistics import estimate, paired_difference

CE_KD: dict[str, Any] = {"ce": 0.1, "kd": {"weight": 0.9, "temperature": 4}}
"""What feature, relation and adversarial terms are added to."""
CNN_TEACHER = {"models": [{"name": "cnn", "options": {"channels": [32, 64], "norm": "batch"}}]}
CNN_STUDENT = {"model": {"name": "cnn", "options": {"channels": [4, 8]}}}
MAPS = {"teacher": CNN_TEACHER, "student": CNN_STUDENT}
LABELLED_ONLY = {
    "data": {"private_rows": 100, "public": {"size": 0}},
    # About as many steps as the others take over 1100 rows.
    "training": {"epochs": 300},
}


def _objective(**terms: Any) -> dict[str, Any]:
    return {"objective": terms}


def _beside(term: str) -> dict[str, Any]:
    return {"objective": {**CE_KD, term: None}}


CASES: dict[str, dict[str, Any]] = {
    # response
    "kd": _objective(**CE_KD),
    "kd, T = 1": _objective(ce=0.1, kd={"weight": 0.9, "temperature": 1}),
    "kd, T 8 to 1": _objective(
        ce=0.1, kd={"weight": 0.9, "temperature": {"kind": "cosine", "start": 8, "end": 1}}
    ),
    "kd, learned T (CTKD)": _objective(ce=0.1, kd={"weight": 0.9, "learned": True}),
    "soft_ce": _objective(ce=0.1, soft_ce=0.9),
    "mse": _objective(ce=0.1, mse=0.9),
    "l1": _objective(ce=0.1, l1=0.9),
    "prob_mse": _objective(ce=0.1, prob_mse=0.9),
    "dist": _objective(ce=0.1, dist=2),
    "logit_std": _objective(ce=0.1, logit_std=9),
    "flsw": _objective(ce=0.1, flsw=0.9),
    "cwsm": _objective(ce=0.1, cwsm=0.9),
    "annealing": _objective(annealing=1),
    "kd, labelled rows only": {**LABELLED_ONLY, **_objective(**CE_KD)},
    "dkd, labelled rows only": {**LABELLED_ONLY, **_objective(ce=1, dkd=1)},
    "nkd, labelled rows only": {**LABELLED_ONLY, **_objective(ce=1, nkd=1)},
    "ntd, labelled rows only": {**LABELLED_ONLY, **_objective(ce=1, ntd=1)},
    # feature and relation, beside kd
    "kd + hint": _beside("hint"),
    "kd + cosine": _beside("cosine"),
    "kd + rkd_distance": _beside("rkd_distance"),
    "kd + rkd_angle": _beside("rkd_angle"),
    "kd + sp": _beside("sp"),
    "kd + pkt": _beside("pkt"),
    "kd + crd": _beside("crd"),
    "kd + adversarial": _beside("adversarial"),
    "kd, small CNN": {**MAPS, **_objective(**CE_KD)},
    "kd + at, small CNN": {**MAPS, **_beside("at")},
    # targets
    "kd, confidence >= 0.8": {"targets": {"confidence_threshold": 0.8}},
    "kd, weighted by confidence": {"targets": {"weight_by": "confidence"}},
    "kd, weighted by difficulty": {"targets": {"weight_by": "difficulty"}},
    "kd, hardest half": {"targets": {"hardest_fraction": 0.5}},
    "kd, curriculum": {"targets": {"curriculum": {}}},
    "kd, 3 teachers": {"teacher": {"models": ["mlp", "cnn", "gru"]}},
    "kd, 3 teachers by confidence": {
        "teacher": {"models": ["mlp", "cnn", "gru"], "combine": {"by": "confidence"}}
    },
    "kd, teacher with smoothed labels": {"teacher": {"label_smoothing": 0.1}},
    "kd, augmented": {"training": {"augmentation": {"pad_and_crop": 1, "gaussian_noise": 0.1}}},
    # other ways
    **{
        name: {"method": name}
        for name in METHODS
        if name not in ("offline", "dafl", "deep_inversion", "kdcl")
    },
    **{
        f"kdcl, {rule}": {"method": {"name": "kdcl", "rule": rule}}
        for rule in ("naive", "linear", "minlogit", "general")
    },
    "dafl (no real rows)": {"method": "dafl"},
    "deep_inversion (no real rows)": {
        "method": "deep_inversion",
        "teacher": CNN_TEACHER,
    },
}

_shared: dict[str, Any] = {}
"""Rows, teachers and twins of the seed that this process works on."""


def _accuracy(model: torch.nn.Module, rows: Rows) -> float:
    logits = predict_logits(model, rows.test_inputs)
    return float((logits.argmax(-1) == rows.test_labels).double().mean())


def _once(key: str, make: Any) -> Any:
    if key not in _shared:
        _shared[key] = make()
    return _shared[key]


def run_seed(task: tuple[int, tuple[str, ...], int | None]) -> list[dict[str, Any]]:
    """Run all cases of one seed; return what each measured."""
    seed, names, epochs = task
    torch.set_num_threads(1)
    _shared.clear()
    measured = []
    for name in names:
        table = {"seed": seed, "device": "cpu", **CASES[name]}
        if epochs is not None:
            training = {**table.get("training", {}), "epochs": epochs}
            teacher = {**table.get("teacher", {}), "training": {"epochs": epochs}}
            table |= {"training": training, "teacher": teacher}
        data = table.pop("data", None)
        started = time.perf_counter()
        try:
            settings = DistillSettings.model_validate(
                {**table, **({} if data is None else {"data": data})}
            )
            rows = _once(
                f"rows {settings.data}",
                lambda s=settings: load_rows(s.data, seed=s.seed, device=torch.device("cpu")),
            )
            measured.append({"name": name, "seed": seed, **_measure(settings, rows)})
        except Exception as error:  # one method that fails should not take the others along
            measured.append({"name": name, "seed": seed, "error": f"{error}"})
        measured[-1]["seconds"] = time.perf_counter() - started
    return measured


def _measure(settings: DistillSettings, rows: Rows) -> dict[str, Any]:
    method = method_class(settings.method.name)(settings.method)
    bare = open_workshop(
        settings.model_copy(update={"method": METHODS["dml"].Settings(name="dml")}), rows
    )
    teacher: Teacher | None = None
    if method.needs_teacher:
        # Trained on all rows with their labels, whatever the student may see.
        full = _once(
            "rows",
            lambda: load_rows(
                DistillSettings().data, seed=settings.seed, device=torch.device("cpu")
            ),
        )
        taught = settings.model_copy(update={"method": METHODS["offline"].Settings(name="offline")})
        teacher = _once(f"teacher {settings.teacher}", lambda: open_workshop(taught, full).teacher)

    def train_twin() -> torch.nn.Module:
        twin = bare.new_student()
        bare.fit(twin, name="twin", teacher=None, objective=labels_only(settings.objective))
        return twin

    key = f"twin {settings.student} {settings.training} {settings.data.public.size}"
    twin = _once(key, train_twin)
    shop = bare if teacher is None else bare.taught_by(teacher)
    student = method.run(shop).student
    return {
        "student": _accuracy(student, rows),
        "twin": _accuracy(twin, rows),
        "teacher": None if teacher is None else _accuracy(teacher.first, rows),
    }


def table_of(measured: list[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table, one per case."""
    lines = [
        "| method | student, % | difference to labels only, points | p | seeds |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(each["name"] for each in measured):
        own = [each for each in measured if each["name"] == name and "error" not in each]
        failed = [each for each in measured if each["name"] == name and "error" in each]
        if not own:
            lines.append(f"| {name} | failed: {failed[0]['error']} | | | 0 |")
            continue
        students = [100 * each["student"] for each in own]
        gain = paired_difference([100 * each["twin"] for each in own], students)
        mean = estimate(students)
        half = "" if mean is None or mean.half_width is None else f" ± {mean.half_width:.1f}"
        interval = "" if gain.low is None else f" ({gain.low:+.1f} to {gain.high:+.1f})"
        p_value = "" if gain.p_value is None else f"{gain.p_value:.2g}"
        lines.append(
            f"| {name} | {sum(students) / len(students):.1f}{half} | {gain.mean:+.1f}{interval} | "
            f"{p_value} | {len(own)} |"
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some cases by name")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every single accuracy")
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch; says nothing")
    parser.add_argument("--check", action="store_true", help="exit status 1 if kd gains < 3 points")
    options = parser.parse_args()
    unknown = set(options.only or ()) - CASES.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(CASES)}")
    names = tuple(options.only or CASES)
    before = machine()
    tasks = [
        (seed, names, 1 if options.quick else None)
        for seed in range(1 if options.quick else options.seeds)
    ]
    measured: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        for done, rows in enumerate(pool.imap(run_seed, tasks), start=1):
            measured += rows
            print(f"{done} of {len(tasks)} seeds", file=sys.stderr, flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps(measured, indent=1))
    print(describe(before, os.getloadavg()[0]))
    # Indented: not lines of the table that benchmarks/table.py gathers.
    print("\n".join(f"  {line}" for line in table_of(measured)))
    for each in measured:
        if "error" in each:
            print(f"failed: {each['name']}, seed {each['seed']}: {each['error']}")
    gains = [each["student"] - each["twin"] for each in measured if each["name"] == "kd"]
    if not gains:
        return 0
    mean = 100 * sum(gains) / len(gains)
    word = "no verdict" if options.quick else "met" if mean >= 3 else "MISSED"
    print(
        f"| K2 | kd against labels only, {len(gains)} paired seeds | {mean:+.1f} points | "
        f"at least +3 points | {word} |"
    )
    return int(options.check and not options.quick and mean < 3)


if __name__ == "__main__":
    sys.exit(main())
