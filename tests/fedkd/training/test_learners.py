"""What the terms of each learner see of a step, and what their losses are called."""

import pytest
import torch

from fedkd.objectives import Objective
from fedkd.targets import Targets
from fedkd.training import Batch, ComposedObjective, Learner, Outputs

CE_KD = {"ce": 0.5, "kd": {"weight": 0.5, "temperature": 2.0}}
ROWS, PUBLIC, CLASSES, WIDTH = 4, 5, 3, 6


def learner(table=None, teacher=None):
    return Learner(objective=Objective.model_validate(table or CE_KD), teacher=teacher)


def mutual(**options):
    return ComposedObjective(
        learners={"private": learner(teacher="meme"), "meme": learner(teacher="private")},
        **options,
    )


@pytest.fixture
def drawn():
    draw = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=draw).requires_grad_()


@pytest.fixture
def outputs(drawn):
    return {
        name: Outputs(drawn(ROWS, CLASSES), drawn(PUBLIC, CLASSES), {"2": drawn(9, WIDTH)})
        for name in ("private", "meme")
    }


@pytest.fixture
def batch():
    return Batch(
        labels=torch.tensor([0, 1, 2, 0]),
        private_rows=torch.tensor([7, 3, 9, 0]),
        public_rows=torch.tensor([1, 2, 3, 4, 0]),
    )


def test_a_peer_teaches_on_private_rows_and_is_a_constant(outputs, batch):
    view = mutual(progress=0.25).view("private", outputs, batch)
    assert view.logits is outputs["private"].private
    assert view.labelled_logits is outputs["private"].private
    assert torch.equal(view.targets.logits(), outputs["meme"].private)
    assert torch.equal(view.features["2"], outputs["private"].features["2"][:ROWS])
    assert torch.equal(view.teacher_features["2"], outputs["meme"].features["2"][:ROWS])
    assert view.features["2"].requires_grad
    assert not view.targets.logits().requires_grad
    assert not view.teacher_features["2"].requires_grad
    assert (view.labelled_of, view.transfer_of) == ("private", "private")
    assert torch.equal(view.transfer_labels, batch.labels)
    assert torch.equal(view.rows, batch.private_rows)
    assert view.progress == 0.25


def test_each_of_two_peers_is_the_others_teacher(outputs, batch):
    views = {name: mutual().view(name, outputs, batch) for name in outputs}
    assert torch.equal(views["private"].logits, views["meme"].targets.logits())
    assert torch.equal(views["meme"].logits, views["private"].targets.logits())


def taught(**options):
    return ComposedObjective(learners={"model": learner()}, **options)


def test_received_targets_teach_on_public_rows(outputs, batch):
    targets = Targets(torch.randn(PUBLIC, CLASSES))
    classes = torch.tensor([0, 1, 2, 1, 0])
    batch = batch._replace(targets=targets, public_labels=classes)
    view = taught().view("model", {"model": outputs["private"]}, batch)
    assert view.logits is outputs["private"].public
    assert view.labelled_logits is outputs["private"].private
    assert view.targets is targets
    assert torch.equal(view.transfer_labels, classes)
    assert (view.labelled_of, view.transfer_of) == ("private", "public")
    assert view.weights is view.labelled_weights is None
    assert torch.equal(view.rows, batch.public_rows)


@pytest.mark.parametrize("are_logits", [True, False])
def test_a_row_of_an_unsure_target_does_not_count(are_logits, outputs, batch):
    sure = torch.tensor([[0.8, 0.1, 0.1], [0.4, 0.3, 0.3], [0.1, 0.7, 0.2]]).repeat(2, 1)[:PUBLIC]
    composed = taught(temperature=2.0, confidence_threshold=0.6)
    targets = Targets(2.0 * sure.log()) if are_logits else Targets(sure, "probabilities", 2.0)
    batch = batch._replace(targets=targets)
    view = composed.view("model", {"model": outputs["private"]}, batch)
    assert view.weights.tolist() == [1.0, 0.0, 1.0, 1.0, 0.0]


def test_a_peer_without_private_rows_is_refused(outputs, batch):
    del outputs["meme"]
    outputs["meme"] = Outputs(public=outputs["private"].public)
    with pytest.raises(ValueError, match="'private' learns from 'meme' on private rows"):
        mutual().view("private", outputs, batch)


def test_a_teacher_learns_itself_or_never_trains():
    assert mutual().models == tuple(mutual().learners)
    frozen = ComposedObjective(learners={"private": learner(teacher="mentor")})
    assert frozen.models == ("private", "mentor")
    with pytest.raises(ValueError, match="at least one learner"):
        ComposedObjective(learners={})


def test_the_key_knows_terms_and_teachers_but_not_the_progress():
    assert mutual().key == mutual(progress=0.5, temperature=2.0).key
    others = [
        ComposedObjective(learners={"private": learner(teacher="meme"), "meme": learner()}),
        ComposedObjective(
            learners={
                "private": learner({"ce": 0.4, "kd": 0.6}, "meme"),
                "meme": learner(teacher="private"),
            }
        ),
    ]
    assert len({mutual().key, *(other.key for other in others)}) == 3


def test_idle_is_an_objective_without_a_weight_at_its_progress():
    falling = {"kd": {"weight": {"kind": "linear", "start": 1.0, "end": 0.0}}, "ce": 0}
    for progress, idle in ((0.0, False), (0.5, False), (1.0, True)):
        composed = ComposedObjective(learners={"model": learner(falling)}, progress=progress)
        assert composed.idle is idle


def test_the_first_learners_terms_keep_their_names():
    assert mutual().loss_name("private", "kd") == "kd"
    assert mutual().loss_name("meme", "kd") == "meme/kd"
