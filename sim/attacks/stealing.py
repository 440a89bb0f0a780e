"""Model stealing: a student of what a client has said of public rows, compared with its model."""

import numpy as np

from fedkd.privacy.attacks.stealing import agreement
from sim.attacks.bench import SoftLabels
from sim.attacks.intervals import share
from sim.attacks.readings import SentModel, UnreadableError
from sim.attacks.scene import Scene
from sim.server.observers import Row


def stealing_of(scene: Scene) -> Row:
    """Return how often students agree with the clients' last models on test rows.

    A student learns the newest soft label of every public row that the client has sent in the
    rounds seen. Rounds 1, 2, 4, ... and the last. Where weights travel there is nothing to steal.
    """
    rounds = len(scene.evidence.rounds)
    marks = sorted({*(2**n for n in range(rounds.bit_length()) if 2**n <= rounds), rounds})
    try:
        histories = {client: _histories(scene, client, marks) for client in scene.clients}
    except UnreadableError as error:
        return {"missing": str(error)}
    points: dict[int, list[int]] = {mark: [] for mark in marks}
    tests = scene.data.test_inputs
    for client in scene.clients:
        model = scene.model_of(client)
        known = [mark for mark in marks if histories[client].get(mark) is not None]
        labels = [histories[client][mark] for mark in known]
        if not labels:
            continue
        scene.tell(f"stealing the model of client {client}")
        students = scene.bench.taught(model, labels, scene.wanted.student_epochs)
        own = scene.evidence.models[client]
        logits = scene.bench.predict(model, [own, *students], tests)
        for mark, student in zip(known, logits[1:], strict=True):
            found = agreement(student, logits[0])
            points[mark].append(round(found.top1.value * len(tests)))
    return {
        "rounds": [
            {"seen": mark, "agreement": share(sum(of_mark), len(of_mark) * len(tests))}
            for mark, of_mark in points.items()
            if of_mark
        ]
    }


def _histories(scene: Scene, client: int, marks: list[int]) -> dict[int, SoftLabels]:
    """Return the newest labels of each row after so many rounds, where there are any."""
    newest: dict[int, np.ndarray] = {}
    found: dict[int, SoftLabels] = {}
    for number, exchanged in enumerate(scene.evidence.rounds, start=1):
        payload = exchanged.sent(client)
        if payload is not None:
            reading = scene.reading(payload)
            if isinstance(reading, SentModel):
                raise UnreadableError("weights travel: whoever has them need not steal the model")
            newest.update(zip(reading.rows.tolist(), reading.probabilities, strict=True))
        if number in marks and newest:
            rows = np.array(sorted(newest), np.int64)
            found[number] = SoftLabels(rows, np.stack([newest[int(row)] for row in rows]))
    return found
