"""Members are told from others where there is something to tell, and not where there is not."""

from dataclasses import replace

import numpy as np
import pytest

from fedkd.data.partition_settings import NaturalPartition
from sim.attacks import membership
from sim.attacks.membership import Seen, judged, look_control, negative_control
from sim.attacks.readings import UnreadableError
from sim.attacks.running import _membership, _Shelf, attack, is_attacked, read_attacks
from sim.attacks.shadows import _same_clients
from sim.commands.running import run
from sim.reports.attacks import attack_tables, missing_in
from sim.server.exchanged import Exchanged
from sim.settings import SettingsError


def auc(found, name):
    return next(each.auc for each in found.figures if each.attack == name)


@pytest.mark.parametrize("train", ["alone", "together"])
def test_members_of_an_overfit_run_are_found_from_its_models_and_less_from_what_travels(
    train, request
):
    scene = request.getfixturevalue(train)
    seen = scene.seen_from("model")
    model = auc(judged(seen), "lira_online")
    upload = auc(judged(scene.seen_from("upload")), "lira_online")
    assert model.low > 0.55
    assert upload.value < model.value
    # A 95 % interval holds what there is, nothing, in about 95 of 100 draws.
    drawn = [negative_control(seen, seed).figures for seed in range(40)]
    for of_attack in zip(*drawn, strict=True):
        assert sum(each.auc.low < 0.5 < each.auc.high for each in of_attack) >= 34


def test_a_run_that_learns_nothing_tells_nothing(scene_of):
    scene = scene_of("clients.optimizer.lr=0.0000001", "attacks.train=models")
    for figures in judged(scene.seen_from("model")).figures:
        assert figures.auc.low < 0.5 < figures.auc.high


@pytest.mark.parametrize("place", ["model", "upload", "consensus"])
def test_models_that_never_heard_of_membership_do_not_tell_it(alone, place):
    for figures in look_control(alone.seen_from(place)).figures:
        assert figures.auc.low < 0.5 < figures.auc.high


def test_members_that_look_otherwise_are_noticed(scene_of):
    """Test rows a little brighter than private ones, as another scanner's: no model learnt that."""
    scene = scene_of("attacks.train=models", "attacks.shadows=12")
    brighter = replace(scene.data, test_inputs=scene.data.test_inputs * 1.6)
    other = replace(scene, data=brighter)
    threshold = auc(look_control(other.seen_from("model")), "threshold")
    assert threshold.high < 0.5 or threshold.low > 0.5
    found = look_control(scene.seen_from("model")).figures
    assert all(each.auc.low < 0.5 < each.auc.high for each in found)


def test_shadows_are_told_by_their_own_halves(alone):
    """A shadow as the target, and its own half as the truth: what the attack was calibrated on."""
    seen = alone.seen_from("model")
    first = [
        own._replace(
            target=own.shadows[0],
            members=own.inside[0],
            shadows=own.shadows[1:],
            inside=own.inside[1:],
            population=own.population_shadows[0],
            population_shadows=own.population_shadows[1:],
        )
        for own in seen
    ]
    # One with its complement among the shadows, as everywhere.
    right = auc(judged(first), "lira_online")
    wrong = auc(judged([own._replace(members=~own.members) for own in first]), "lira_online")
    assert right.low > 0.6
    assert wrong.value == pytest.approx(1 - right.value)


def test_where_models_travel_the_upload_is_the_model(scene_of):
    scene = scene_of("strategy.name=fedavg", "attacks.train=models")
    model, upload = (judged(scene.seen_from(place)) for place in ("model", "upload"))
    assert [each.auc for each in model.figures] == [each.auc for each in upload.figures]
    assert judged(scene.seen_from("consensus")).figures


def test_a_consensus_of_all_has_learnt_from_whatever_any_shadow_has(scene_of):
    scene = scene_of("strategy.name=fedmd", "attacks.train=models")
    seen = scene.seen_from("consensus")
    for own, target in zip(seen, scene.targets, strict=True):
        np.testing.assert_array_equal(own.inside, target.inside)


def test_the_consensus_is_that_of_whoever_received_it_last(alone):
    def received_by(round, *clients):
        said = alone.evidence.rounds[-1].pieces[:1]
        return Exchanged(round, said, up={}, down=dict.fromkeys(clients, 0))

    rounds = [received_by(1, 0, 1, 2, 3), received_by(2, 2, 3), received_by(3, 2)]
    scene = replace(alone, evidence=replace(alone.evidence, rounds=rounds))
    assert [scene._receiver(client) for client in range(4)] == [2, 2, 3, 2]
    scene = replace(alone, evidence=replace(alone.evidence, rounds=[received_by(1, 0)]))
    with pytest.raises(UnreadableError, match="no client received"):
        scene._receiver(0)


def test_a_model_of_all_rows_has_also_learnt_from_clients_that_are_not_attacked(
    scene_of, monkeypatch
):
    scene = scene_of("strategy.name=fedavg", "attacks.train=models", "attacks.clients=1")
    learnt = []

    def trained(what, models, rows):
        learnt.extend(rows)
        return [scene.evidence.models[0] for _ in models]

    monkeypatch.setattr(scene.shadows, "_trained", trained)
    scene.shadows.received(1, scene.reading(scene.evidence.last_received(1)))
    assert len(learnt) == 8
    for shadow, rows in enumerate(learnt):
        wanted = [scene.targets[0].rows_of_shadow(shadow), *scene.data.client_rows[1:]]
        np.testing.assert_array_equal(rows, np.sort(np.concatenate(wanted)))


def test_what_cannot_be_read_says_what_it_is(scene_of):
    scene = scene_of("strategy.name=fedproto", "attacks.train=models")
    with pytest.raises(UnreadableError, match="prototypes"):
        scene.seen_from("upload")


def test_scores_of_a_few_rows_by_hand():
    """One client, two rows: the sure one is the member for every attack."""
    sure, unsure = [4.0, 0.0], [0.5, 0.0]
    shadows = np.array([[sure, unsure], [unsure, sure]] * 2, np.float32)
    inside = np.array([[1, 0], [0, 1]] * 2, bool)
    shadows = shadows + 0.1 * np.arange(4, dtype=np.float32)[:, None, None] * np.array([1, 0])
    seen = Seen(
        target=np.array([sure, unsure], np.float32),
        shadows=shadows.astype(np.float32),
        labels=np.zeros(2, np.int64),
        members=np.array([True, False]),
        inside=inside,
        population=np.array([unsure], np.float32),
        population_shadows=np.full((4, 1, 2), unsure, np.float32),
        population_labels=np.zeros(1, np.int64),
    )
    found = judged([seen] * 4)
    assert {each.attack: each.auc.value for each in found.figures} == {
        "threshold": 1.0,
        "lira_offline": 1.0,
        "lira_online": 1.0,
        "rmia": 1.0,
    }
    assert all(rate is None for each in found.figures for rate in each.rates.values())


def test_the_controls_stand_beside_every_membership_run(attacked, short_control):
    settings = attacked("attacks.kinds=membership", "attacks.controls=32", "attacks.train=models")
    result = run(settings)
    row = read_attacks(result.folder)
    assert is_attacked(result.folder, settings.attacks)
    positive = {f["attack"]: f for f in row["membership"]["controls"]["positive"]["figures"]}
    assert all(figures["auc"][0] > 0.8 for figures in positive.values())
    at_one_percent = {name: figures["rates"]["0.01"][0] for name, figures in positive.items()}
    assert at_one_percent["lira_online"] > at_one_percent["threshold"]
    for figures in row["membership"]["controls"]["negative"]["figures"]:
        assert figures["auc"][1] < 0.5 < figures["auc"][2]
    again = attack(result.folder, settings, settings.attacks).row
    assert {**again, "seconds": 0} == {**row, "seconds": 0}


def test_only_finished_runs_are_attacked(attacked, tmp_path):
    settings = attacked()
    (tmp_path / "none").mkdir()
    with pytest.raises(SettingsError, match="no finished run"):
        attack(tmp_path / "none", settings, settings.attacks)


def test_clients_that_there_are_not_are_named(alone):
    odd = replace(alone, wanted=alone.wanted.model_copy(update={"clients": (0, 9)}))
    with pytest.raises(SettingsError, match=r"attacks\.clients.*got 9"):
        _ = odd.clients
    assert replace(alone, wanted=alone.wanted.model_copy(update={"clients": 2})).clients == (0, 1)
    assert alone.clients == (0, 1, 2, 3)


def test_clients_of_an_adversary_are_not_attacked(scene_of):
    assert scene_of("adversary={kind: fdla, clients: [1]}").clients == (0, 2, 3)


def test_shadows_have_the_liars_of_the_run_among_them(scene_of):
    scene = scene_of("adversary={kind: shuffled, fraction: 0.25}")
    liars = scene.settings.stages.controlled
    again = _same_clients(scene.settings)
    assert again.controlled(4, seed=12345) == liars


@pytest.mark.parametrize("train", ["models", "federations"])
def test_shadows_that_never_had_their_turn_are_left_aside(scene_of, train):
    scene = scene_of(
        "clients.participation=0.5", "rounds=1", "attacks.shadows=8", f"attacks.train={train}"
    )
    target = scene.targets[0]
    made = scene.shadows.models(target, target.model)
    there = [own is not None for own in made]
    assert 0 < sum(there) < len(there) == 8
    for place in ("model", "upload"):
        seen = scene.seen_from(place)[0]
        assert len(seen.shadows) == sum(there)
        np.testing.assert_array_equal(seen.inside, target.inside[there])


def test_shadows_of_which_some_never_had_their_turn_are_kept_whole(tmp_path, attacked):
    settings = attacked()
    shelf = _Shelf(tmp_path, settings, settings.attacks, "data")
    made = [None, {"a": np.ones(2, np.float32)}, None]
    shelf.keep("some", lambda: made)
    again = shelf.keep("some", lambda: pytest.fail("made anew"))
    assert [own is None for own in again] == [True, False, True]
    np.testing.assert_array_equal(again[1]["a"], made[1]["a"])
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"damaged")
    assert shelf.keep("some", lambda: made) is made


def test_runs_whose_liars_differ_do_not_share_shadows(attacked, tmp_path):
    words = ("attacks.kinds=membership", "attacks.train=models", f"output={tmp_path}")
    for liar, files in ((0, 2), (1, 3)):
        run(attacked(*words, f"adversary={{kind: fdla, clients: [{liar}]}}"))
        assert len(list((tmp_path / "attacked" / ".shadows").iterdir())) == files


@pytest.mark.parametrize("clients", ["[]", "[0, 0]"])
def test_clients_are_named_once(attacked, clients):
    with pytest.raises(SettingsError, match=r"attacks\.clients must name .* each once"):
        attacked(f"attacks.clients={clients}")


def test_of_people_nobody_is_told_by_whose_rows_look_like_his(alone):
    data = alone.settings.data.model_copy(update={"partition": NaturalPartition(column="who")})
    scene = replace(alone, settings=alone.settings.model_copy(update={"data": data}))
    found = {"membership": _membership(scene)}
    assert "places" not in found["membership"]
    assert attack_tables(found) == []
    assert "data.partition.kind: natural" in missing_in(found)[0]


def test_models_that_learn_alone_are_shared_by_runs_that_learn_alike(attacked, tmp_path):
    words = ("attacks.kinds=membership", "attacks.train=models", f"output={tmp_path}")
    made = []
    for more in ((), ("strategy.name=fedmd",), ("exchange.up=int8",), ("clients.local.epochs=3",)):
        settings = attacked(*words, *more)
        run(settings)
        made.append(len(list((tmp_path / "attacked" / ".shadows").iterdir())))
    # Shadows and the control, once; then only where clients learn otherwise.
    assert made == [2, 2, 2, 4]


def test_the_consensus_is_that_of_another_client(alone):
    assert [alone._receiver(client) for client in range(4)] == [1, 0, 0, 0]


def test_no_model_of_the_control_is_among_its_own_shadows(alone, monkeypatch):
    caught = []

    def catch(seen):
        caught.extend(seen)
        return membership.Membership()

    monkeypatch.setattr(membership, "judged", catch)
    weights = alone.evidence.models[0]
    models = [
        {name: array * (1 + 0.01 * number) for name, array in weights.items()}
        for number in range(20)
    ]
    membership.positive_control(
        alone.settings,
        alone.pool,
        alone.targets[0].model,
        alone.bench,
        lambda pool, architectures, rows: models,
        models=20,
        wrong=0.5,
        population=alone.data.validation_inputs,
        population_labels=alone.data.validation_labels,
    )
    assert len(caught) == 16
    for number, seen in enumerate(caught):
        assert len(seen.shadows) == len(seen.inside) == 19
        assert not any(np.array_equal(seen.target, shadow) for shadow in seen.shadows)
        # Its complement is.
        assert (seen.inside[number - number % 2] == ~seen.members).all()


def test_runs_of_one_seed_draw_membership_each_for_itself(alone):
    seen = alone.seen_from("model")
    other = [own._replace(target=own.target[::-1].copy()) for own in seen]
    again = [own._replace(target=own.target.copy()) for own in seen]
    drawn = [_members_drawn(rows) for rows in (seen, other, again)]
    assert not np.array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])


def _members_drawn(seen):
    caught = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(membership, "judged", caught.extend)
        negative_control(seen, seed=0)
    return np.concatenate([own.members for own in caught])
