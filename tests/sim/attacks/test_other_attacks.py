"""Label mixes, pictures and models: what is told of a client beside its rows, and what is not."""

from dataclasses import replace

import numpy as np
import pytest

from fedkd.exchange.payloads import Weights
from fedkd.privacy.attacks.labels import kl
from sim.attacks.answers import public_answers
from sim.attacks.evidence import attacked_data, observed
from sim.attacks.inversion import _means, inversion_of
from sim.attacks.labels import labels_of
from sim.attacks.readings import UnreadableError
from sim.attacks.scene import Scene
from sim.attacks.stealing import _histories, stealing_of
from sim.reports.attacks import LEAKS, attack_tables, leak_of, missing_in


@pytest.fixture(scope="module")
def skewed(scene_of):
    """Two classes for each client."""
    return scene_of("data.partition={kind: pathological, classes_per_client: 2}", "rounds=3")


def test_a_first_upload_tells_which_classes_a_client_has(skewed):
    found = labels_of(skewed)
    first = found["first"]
    assert first["mean_prediction"][0] < 0.5 * first["uniform"][0]
    # Of two of ten classes the uniform mix is ln 5 away, of equal shares exactly.
    assert first["uniform"][0] == pytest.approx(np.log(5), abs=0.05)


def test_divergences_are_from_the_true_mix_to_the_guess(skewed):
    counts = skewed.data.label_counts(true=True)
    said = public_answers(skewed, "first")
    by_hand = [
        kl(counts[client] / counts[client].sum(), own.mean(0).astype(np.float64))
        for client, own in said.items()
    ]
    found = labels_of(skewed)["first"]["mean_prediction"][0]
    assert found == pytest.approx(np.mean(by_hand), rel=1e-5)


def test_first_and_last_answers_are_those_of_their_rounds(skewed):
    rounds = skewed.evidence.rounds
    for moment, exchanged in (("first", rounds[0]), ("upload", rounds[-1])):
        sent = exchanged.sent(2).probabilities()
        np.testing.assert_array_equal(public_answers(skewed, moment)[2], sent)


def test_who_is_not_attacked_need_not_have_told_of_all_rows(skewed):
    silent = [
        replace(each, up={client: place for client, place in each.up.items() if client != 3})
        for each in skewed.evidence.rounds
    ]
    scene = replace(skewed, evidence=replace(skewed.evidence, rounds=silent))
    with pytest.raises(UnreadableError, match="client 3 sent nothing"):
        public_answers(scene, "first")
    wanted = scene.wanted.model_copy(update={"clients": (0, 1)})
    assert sorted(public_answers(replace(scene, wanted=wanted), "first")) == [0, 1, 2]


def test_one_public_row_inverts_nothing(skewed):
    data = replace(skewed.data, public_inputs=skewed.data.public_inputs[:1])
    assert "data.public.size" in inversion_of(replace(skewed, data=data))["missing"]


def test_classes_that_only_a_client_has_are_inverted_and_not_without_it(attacked):
    """Public rows show digits 0 to 6; client 0 has 7, 8 and 9 and some of what all others have."""
    settings = attacked("clients.local.epochs=20", "exchange.keep=true")
    data = attacked_data(settings)
    labels, rng = data.train_labels, np.random.default_rng(0)
    secret, known = np.flatnonzero(labels >= 7), rng.permutation(np.flatnonzero(labels < 7))
    others = np.array_split(known[40:100], 3)
    data = replace(
        data,
        public_inputs=data.train_inputs[known[100:]],
        client_rows=(
            np.sort(np.concatenate([secret, known[:40]])),
            *(np.sort(rows) for rows in others),
        ),
    )
    wanted = settings.attacks.model_copy(update={"clients": (0,)})
    seen = observed(settings, data)
    scene = Scene(settings, wanted, data, seen, lambda _: None, lambda _, make: make())
    found = inversion_of(scene)
    assert found["success"][0] > found["control"][0]
    assert found["success"][0] + found["too_close"][0] <= 1


def test_means_of_pictures_by_class():
    images = np.arange(8.0).reshape(4, 2, 1, 1)
    means = _means(images, np.array([0, 2, 0, 2]), 3)
    np.testing.assert_array_equal(means[0].ravel(), [2, 3])
    assert np.isnan(means[1]).all()


def test_more_rounds_steal_more_of_a_model(skewed):
    rounds = stealing_of(skewed)["rounds"]
    assert [each["seen"] for each in rounds] == [1, 2, 3]
    assert all(
        0 < low <= share <= high <= 1 for share, low, high in (r["agreement"] for r in rounds)
    )
    assert rounds[-1]["agreement"][0] > rounds[0]["agreement"][0]


def test_a_history_holds_the_newest_label_of_each_row(scene_of):
    scene = scene_of("exchange.rows_per_round=40", "rounds=3")
    found = _histories(scene, 0, [1, 3])
    sent = [each.sent(0) for each in scene.evidence.rounds]
    assert len(found[1].rows) == 40
    np.testing.assert_array_equal(found[3].rows, np.unique(np.concatenate([s.rows for s in sent])))
    places = np.searchsorted(found[3].rows, sent[-1].rows)
    np.testing.assert_array_equal(found[3].probabilities[places], sent[-1].probabilities())


def test_where_weights_travel_there_is_nothing_to_steal(scene_of):
    assert "weights travel" in stealing_of(scene_of("strategy.name=fedavg"))["missing"]


def test_every_figure_has_its_place_in_a_table():
    interval = [0.7, 0.6, 0.8]
    figures = {
        "attack": "lira_online",
        "auc": interval,
        "rates": {"0.01": None, "0.001": None},
        "members": 10,
        "others": 10,
        "curve": {"false": [0, 1], "true": [0, 1]},
    }
    found = {
        "membership": {
            "places": {
                "model": {"figures": [figures], "missing": {"rmia": "no population"}},
                "upload": {"missing": "prototypes"},
            },
            "controls": {"positive": {"figures": [figures]}, "negative": {"figures": [figures]}},
        },
        "labels": {"first": {"mean_prediction": [0.1, 0.0, 0.2]}},
        "inversion": {"success": interval, "control": [0.6, 0.5, 0.7], "too_close": interval},
        "stealing": {"rounds": [{"seen": 1, "agreement": interval}]},
    }
    titles = [table.title for table in attack_tables(found)]
    assert titles == ["membership", "label distribution", "inversion", "model stealing"]
    told = {leak: leak_of(found, leak) for leak in LEAKS}
    assert told == {
        "model": 0.7,
        "upload": None,
        "consensus": None,
        "labels": 0.1,
        "inversion": pytest.approx(0.1),
        "stealing": 0.7,
    }
    assert missing_in(found) == [
        "membership from the model, rmia: no population",
        "membership from the upload: prototypes",
    ]
    assert all(leak_of({}, leak) is None for leak in LEAKS)


def test_weights_are_read_as_the_architecture_whose_shapes_they_have(scene_of):
    scene = scene_of("strategy.name=fedavg", "clients.models=[mlp,cnn]", "attacks.train=models")
    names = [model.name for model in scene.models]
    assert names == ["mlp", "cnn"]
    for client in range(4):
        reading = scene.reading(scene.evidence.last_sent(client))
        assert reading.model.name == names[client % 2]
    odd = Weights(arrays={"w": np.zeros(3, np.float32)})
    with pytest.raises(UnreadableError, match="none of the clients' models"):
        scene.reading(odd)
