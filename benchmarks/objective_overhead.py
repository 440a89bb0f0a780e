"""What naming, weighting and scheduling the terms of an objective costs.

Trains one student with ``{ce: 0.1, kd: 0.9}`` through `fedkd.distillation.fit.fitting.fit`, and the
same student on the same batches with a loop written by hand, in turns. Both keep the two parts of
the loss of every step and measure accuracy and loss on the validation rows after every epoch.

    python benchmarks/objective_overhead.py
    python benchmarks/objective_overhead.py --model lenet
"""

import argparse
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F
from measurement import (
    Samples,
    add_common_arguments,
    describe,
    exit_status,
    machine,
    ratios,
    row,
    stopwatch,
    verdict,
)
from torch import nn

from fedkd.data import DataSettings
from fedkd.data.settings import PublicSettings
from fedkd.distillation.fit.fitting import Lesson, fit
from fedkd.distillation.task.combining import Combination
from fedkd.distillation.task.participants import TrainingSettings
from fedkd.distillation.task.predicting import predict_logits
from fedkd.distillation.task.rows import Rows, load_rows
from fedkd.distillation.task.teachers import Teacher
from fedkd.models import ModelSettings, build_model
from fedkd.objectives import Objective
from fedkd.randomness import Purpose, generator_for
from fedkd.training.batches import Passes


def by_hand(
    student: nn.Module, taught: torch.Tensor, rows: Rows, *, epochs: int, batch: int
) -> None:
    """Train on the sum of both terms, as a script for one paper would."""
    batches = Passes(batch_size=batch, epochs=epochs).batches(
        len(rows.inputs), generator_for(0, Purpose.DISTILL, 3)
    )
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    student.train()
    parts: list[torch.Tensor] = []
    for step, positions in enumerate(batches):
        picked = torch.from_numpy(positions)
        logits = student(rows.inputs[picked])
        hard = F.cross_entropy(logits, rows.labels[picked])
        soft = F.kl_div(
            F.log_softmax(logits / 4, -1), F.softmax(taught[picked] / 4, -1), reduction="batchmean"
        )
        optimizer.zero_grad(set_to_none=True)
        (0.1 * hard + 0.9 * 16 * soft).backward()
        optimizer.step()
        parts.append(torch.stack([hard.detach(), soft.detach()]))
        if (step + 1) % (len(batches) // epochs) == 0:
            with torch.no_grad():
                student.eval()
                logits = student(rows.validation_inputs)
                F.cross_entropy(logits, rows.validation_labels).item()
                (logits.argmax(-1) == rows.validation_labels).float().mean().item()
                student.train()
            torch.stack(parts).sum(0).tolist()
            parts.clear()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mlp", help="the student's architecture")
    parser.add_argument("--epochs", type=int, default=20)
    add_common_arguments(parser, repeats=15, at_most=1.10)
    options = parser.parse_args()
    epochs, repeats = (1, 2) if options.quick else (options.epochs, options.repeats)
    torch.set_num_threads(1)
    before = machine()
    data = DataSettings(public=PublicSettings(size=0))
    rows = load_rows(data, seed=0, device=torch.device("cpu"))

    def build(name: str) -> nn.Module:
        return build_model(
            ModelSettings(name=name), input_shape=rows.input_shape, num_classes=10, seed=0
        )

    teacher = Teacher([build("mlp")], Combination())
    taught = predict_logits(teacher.first, rows.inputs)
    lesson = Lesson(
        rows=rows,
        objective=Objective.model_validate({"ce": 0.1, "kd": {"weight": 0.9, "temperature": 4}}),
        training=TrainingSettings(epochs=epochs),
        teacher=teacher,
    )
    ours, hand = Samples(), Samples()
    differences = []
    for repeat in range(repeats + 1):
        students = build(options.model), build(options.model)
        seconds: list[float] = []
        sides = [
            lambda student=students[0]: fit(student, lesson),
            lambda student=students[1]: by_hand(student, taught, rows, epochs=epochs, batch=32),
        ]
        order = (0, 1) if repeat % 2 else (1, 0)
        for side in order:
            with stopwatch(seconds):
                sides[side]()
        if repeat:  # the first one warms up
            ours.values.append(seconds[order.index(0)])
            hand.values.append(seconds[order.index(1)])
        differences.append(
            max(
                float((first - second).detach().abs().max())
                for first, second in zip(*(s.parameters() for s in students), strict=True)
            )
        )
    ratio = ratios(ours, hand)
    print(describe(before, os.getloadavg()[0]))
    print(f"{options.model}, {len(rows.inputs)} rows, {epochs} epochs, seconds:")
    print(f"  fedkd    {ours.text()}\n  by hand  {hand.text()}")
    print(f"largest difference between the weights of the two: {np.max(differences):.2g}")
    row(
        "K1",
        f"training a student ({options.model}) on {{ce, kd}}, against a loop written by hand",
        ratio.text(4),
        f"at most {options.at_most:g}",
        ratio.median <= options.at_most,
        options,
    )
    print(f"ratio {ratio.text(4)}; {verdict(ratio, options)}")
    return exit_status(ratio, options)


if __name__ == "__main__":
    sys.exit(main())
