"""Label distribution: how many of its rows a client has of each class, from what it says."""

import math

import numpy as np

from fedkd.privacy.attacks.labels import against_consensus, kl, mean_prediction
from sim.attacks.answers import MOMENTS, public_answers
from sim.attacks.intervals import mean
from sim.attacks.readings import UnreadableError
from sim.attacks.scene import Scene
from sim.server.observers import Row

ESTIMATES = ("mean_prediction", "against_consensus", "uniform", "everybody")
"""``mean_prediction``: the mean of what it says of public rows; ``against_consensus``: how much
more it says of a class than the mean of all; two baselines: ``uniform``, and ``everybody``, the mix
of all clients, which the attacker is not told."""


def labels_of(scene: Scene) -> Row:
    """Return the divergence KL(true || estimated), in nats, from three moments.

    From what the client's last model says of public rows, and from what it sent last and first.
    Means over clients with 95 % t-intervals.
    """
    counts = scene.data.label_counts(true=True).astype(np.float64)
    everybody = counts.sum(0) / counts.sum()
    found: Row = {}
    for place in MOMENTS:
        try:
            said = public_answers(scene, place)
        except UnreadableError as error:
            found[place] = {"missing": str(error)}
            continue
        consensus = np.mean(list(said.values()), axis=0)
        uniform = np.full(scene.data.num_classes, 1 / scene.data.num_classes)
        by_estimate: dict[str, list[float]] = {name: [] for name in ESTIMATES}
        for client in scene.clients:
            own = said[client]
            true = counts[client] / counts[client].sum()
            guesses = {
                "mean_prediction": mean_prediction(own),
                "against_consensus": against_consensus(own, consensus, uniform, from_logits=False),
                "uniform": uniform,
                "everybody": everybody,
            }
            for name, guess in guesses.items():
                by_estimate[name].append(float(kl(true, guess)))
        found[place] = {name: mean(values, (0.0, math.inf)) for name, values in by_estimate.items()}
    return found
