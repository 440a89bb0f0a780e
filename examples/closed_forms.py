"""What averaging soft labels ends in, without training: kernel ridge students on digits.

    python examples/closed_forms.py

Six clients, 500 public rows, Dirichlet partitions; the table is in docs/closed-forms.md.
"""

import argparse
from collections.abc import Sequence

import numpy as np

from fedkd.closed_forms import (
    Student,
    fixed_point,
    fixed_points,
    kernel_student,
    mean_of,
    mean_of_others,
    rate,
    rbf,
)
from fedkd.data import FederatedData, build_federated_data
from sim.settings import load_settings

CLIENTS = 6
WIDTH, RIDGE = 2.0, 0.1
"""Of the kernel, on standardised pixels over 8, and of the students; set by hand, not tuned."""

Labelled = tuple[np.ndarray, np.ndarray]


def data_of(alpha: float, seed: int) -> FederatedData:
    """Return digits dealt to six clients."""
    words = [
        "data.source=digits",
        "data.public.size=500",
        f"data.partition={{kind: dirichlet, alpha: {alpha}}}",
    ]
    settings = load_settings(None, words)
    return build_federated_data(settings.data, num_clients=CLIENTS, seed=seed)


def features(inputs: np.ndarray) -> np.ndarray:
    """Return what students see."""
    return inputs.reshape(len(inputs), -1).astype(np.float64) / 8


def known_by(data: FederatedData) -> list[Labelled]:
    """Return each client's rows with their one-hot labels."""
    classes = len(data.class_names)
    return [
        (features(data.train_inputs[rows]), np.eye(classes)[data.train_labels[rows]])
        for rows in data.client_rows
    ]


def students(
    known: Sequence[Labelled], public: np.ndarray, weight: float, at: np.ndarray
) -> list[Student]:
    """Return a student on each of these rows, asked about others."""
    more = {"public_weight": weight, "at": at}
    return [kernel_student(*own, public, kernel=rbf(WIDTH), ridge=RIDGE, **more) for own in known]


def accuracies(data: FederatedData, public_weight: float) -> dict[str, float]:
    """Return accuracies on test rows, of clients in the mean, for several ways to learn."""
    classes = len(data.class_names)
    public, test = features(data.public_inputs), features(data.test_inputs)
    known = known_by(data)
    mixes = [labels.sum(0) for _, labels in known]
    everything = [(np.concatenate([x for x, _ in known]), np.concatenate([y for _, y in known]))]

    def accuracy(scores: np.ndarray, mix: np.ndarray | None = None) -> float:
        right = scores.argmax(1) == data.test_labels
        weights = np.ones(classes) if mix is None else mix / np.bincount(data.test_labels)
        return float(np.average(right, weights=weights[data.test_labels]))

    alone = [student.base for student in students(known, public, 0, test)]
    taught = students(known, public, public_weight, public)
    judged = students(known, public, public_weight, test)
    first = np.mean([student.base for student in students(known, public, 0, public)], axis=0)
    once = [student.says(first) for student in judged]
    ended = [student.says(fixed_point(taught)) for student in judged]
    targets = fixed_points(taught, mean_of_others(CLIENTS))
    of_others = [student.says(own) for student, own in zip(judged, targets, strict=True)]
    (pooled,) = students(everything, public, 0, test)
    return {
        "alone": float(np.mean(list(map(accuracy, alone)))),
        "after one exchange": float(np.mean(list(map(accuracy, once)))),
        "fixed point": float(np.mean(list(map(accuracy, ended)))),
        "of others": float(np.mean(list(map(accuracy, of_others)))),
        "ensemble of alone": accuracy(np.mean(alone, axis=0)),
        "pooled": accuracy(pooled.base),
        "own mix, alone": float(np.mean(list(map(accuracy, alone, mixes)))),
        "own mix, fixed point": float(np.mean(list(map(accuracy, ended, mixes)))),
        "rate": rate(taught, mean_of(CLIENTS)),
    }


def of_honest(data: FederatedData, wrong: int, public_weight: float = 1.0) -> tuple[float, float]:
    """Return mean accuracies of honest clients, alone and at the fixed point.

    Args:
        data: of the run.
        wrong: how many clients have each class called by the name of the next.
        public_weight: of the public rows.
    """
    public, test = features(data.public_inputs), features(data.test_inputs)
    known = known_by(data)
    known = [(x, np.roll(y, 1, axis=1) if k < wrong else y) for k, (x, y) in enumerate(known)]
    target = fixed_point(students(known, public, public_weight, public))
    alone = [student.base for student in students(known[wrong:], public, 0, test)]
    ended = [s.says(target) for s in students(known[wrong:], public, public_weight, test)]
    means = [
        float(np.mean([(own.argmax(1) == data.test_labels).mean() for own in scores]))
        for scores in (alone, ended)
    ]
    return means[0], means[1]


def main(words: Sequence[str] | None = None) -> None:
    """Print a line for each partition and weight."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    count = parser.parse_args(words).seeds
    if count < 1:
        parser.error(f"--seeds must be >= 1, got {count}")
    seeds = range(count)
    for alpha in (0.1, 1.0, 100.0):
        for public_weight in (0.01, 1.0, 10.0):
            found = [accuracies(data_of(alpha, seed), public_weight) for seed in seeds]
            cells = []
            for name in found[0]:
                mean = float(np.mean([each[name] for each in found]))
                cells.append(f"{name} {mean:.4f}" if name == "rate" else f"{name} {mean:.1%}")
            print(f"alpha {alpha:g}, weight {public_weight:g}: {', '.join(cells)}", flush=True)
    for wrong in range(4):
        both = np.mean([of_honest(data_of(100.0, seed), wrong) for seed in seeds], axis=0)
        print(f"{wrong} of {CLIENTS} wrong: alone {both[0]:.1%}, fixed point {both[1]:.1%}")


if __name__ == "__main__":
    main()
