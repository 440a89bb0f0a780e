"""Inversion: what a class looks like in a client's rows, from pairs of answers on public rows."""

import numpy as np

from fedkd.privacy.attacks.inversion import Inversion, fit_decoder, judge, reconstruct
from sim.attacks.answers import public_answers
from sim.attacks.intervals import mean, share
from sim.attacks.readings import UnreadableError
from sim.attacks.scene import Scene
from sim.server.observers import Row


def inversion_of(scene: Scene) -> Row:
    """Return how many of the clients' classes are inverted, and the control.

    Pairs are what a client sent last and the mean of what all clients sent last. The control knows
    nothing of the client: its decoder is fitted to the mean alone, twice. What public rows look
    like in a class is judged by the classes that the mean gives them.
    """
    data = scene.data
    if data.input_shape.kind != "pictures":
        return {"missing": f"rows are {data.input_shape.kind}, not pictures"}
    if len(data.public_inputs) == 1:
        return {"missing": "of one public row nothing is learnt (data.public.size)"}
    try:
        answers = public_answers(scene, "upload")
    except UnreadableError as error:
        return {"missing": str(error)}
    consensus = np.mean(list(answers.values()), axis=0)
    public = _channels_last(data.public_inputs)
    span = float(data.train_inputs.max() - data.train_inputs.min())
    public_means = _means(public, consensus.argmax(-1), data.num_classes)
    found: list[Inversion] = []
    control: list[Inversion] = []
    for client in scene.clients:
        own = answers[client]
        rows = data.client_rows[client]
        private = _channels_last(data.train_inputs[rows])
        labels = data.train_labels[rows]
        means = _means(private, labels, data.num_classes)
        for first, into in ((own, found), (consensus, control)):
            images = reconstruct(fit_decoder(first, consensus, public), consensus)
            into += [
                judge(images[label], means, public_means, int(label), data_range=span)
                for label in np.unique(labels)
            ]
    return {
        "success": share(sum(each.success for each in found), len(found)),
        "too_close": share(sum(each.too_close_to_public for each in found), len(found)),
        "ssim": mean([each.ssim for each in found]),
        "control": share(sum(each.success for each in control), len(control)),
    }


def _channels_last(inputs: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(inputs.transpose(0, 2, 3, 1), np.float64)


def _means(images: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the mean image of each class, NaN where it has none."""
    means = np.full((classes, *images.shape[1:]), np.nan)
    for label in np.unique(labels):
        means[label] = images[labels == label].mean(0)
    return means
