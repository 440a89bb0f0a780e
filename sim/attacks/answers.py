"""What clients say of public rows, as an attacker comes to know it."""

from typing import Literal, get_args

import numpy as np

from fedkd.targets import soften
from fedkd.tensors import as_tensor
from sim.attacks.bench import SoftLabels
from sim.attacks.readings import UnreadableError
from sim.attacks.scene import Scene

Moment = Literal["model", "upload", "first"]
"""``model``: by the last model; ``upload``: as it was sent last; ``first``: as it was sent first,
before anybody had taught the client."""
MOMENTS: tuple[Moment, ...] = get_args(Moment)


def public_answers(scene: Scene, place: Moment) -> dict[int, np.ndarray]:
    """Return the probabilities that each client, attacked or not, gives to all public rows.

    Of those that are not attacked, who has not told of all of them is left out.

    Args:
        scene: of the attack.
        place: by which of its models. Where it sends some rows at a time, those that it sent
            nearest to that moment; where it sent a model, by that.

    Raises:
        UnreadableError: there are no public rows, or a client that is attacked has not told of
            all of them.
    """
    if not len(scene.data.public_inputs):
        raise UnreadableError("there are no public rows (data.public.size)")
    found: dict[int, np.ndarray] = {}
    for client in sorted(scene.evidence.models):
        try:
            found[client] = _answers(scene, client, place)
        except UnreadableError:
            if client in scene.clients:
                raise
    return found


def _answers(scene: Scene, client: int, place: Moment) -> np.ndarray:
    if place == "model":
        return _predicted(scene, client, scene.evidence.models[client])
    size = len(scene.data.public_inputs)
    told = np.zeros(size, dtype=bool)
    said = np.zeros((size, scene.data.num_classes), np.float32)
    rounds = scene.evidence.rounds
    for exchanged in rounds if place == "first" else reversed(rounds):
        payload = exchanged.sent(client)
        if payload is None:
            continue
        reading = scene.reading(payload)
        if not isinstance(reading, SoftLabels):
            logits = scene.bench.predict(reading.model, [reading.weights], scene.data.public_inputs)
            return _softmax(logits[0])
        new = ~told[reading.rows]
        said[reading.rows[new]] = reading.probabilities[new]
        told[reading.rows] = True
        if told.all():
            return said
    raise UnreadableError(
        f"client {client} has told of {told.sum()} of {size} public rows"
        if told.any()
        else f"client {client} sent nothing"
    )


def _predicted(scene: Scene, client: int, weights: dict[str, np.ndarray]) -> np.ndarray:
    model = scene.model_of(client)
    return _softmax(scene.bench.predict(model, [weights], scene.data.public_inputs)[0])


def _softmax(logits: np.ndarray) -> np.ndarray:
    probabilities: np.ndarray = soften(as_tensor(logits), temperature=1.0).numpy()
    return probabilities
