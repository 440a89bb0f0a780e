"""ONE: what branches share, and who teaches the gate."""

import pytest
import torch

from fedkd.distillation.methods import METHODS
from fedkd.distillation.methods.native_ensemble import BranchedNetwork
from fedkd.distillation.methods.peers import build_peers
from fedkd.models import ModelSettings

FAST = {"name": "adam", "lr": 0.01}
BATCH_NORM = ModelSettings(name="cnn", options={"channels": [4], "norm": "batch"})
DEEP = ModelSettings(name="mlp", options={"hidden": [8, 6]})


def weights_of(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def run(shop, name, **settings):
    method = METHODS[name]
    return method(method.Settings(name=name, **settings)).run(shop)


def apart(first, second, inputs):
    """Return how far two models' predictions are from each other."""
    with torch.no_grad():
        return (first(inputs).softmax(-1) - second(inputs).softmax(-1)).abs().mean()


def test_the_student_of_one_is_a_plain_model_on_the_shared_trunk(workshop):
    shop = workshop(model=DEEP)
    left = run(shop, "one", branches=3)
    network = left.others["ensemble"].network
    assert left.student.state_dict().keys() == shop.new_student().state_dict().keys()
    trunk = {tensor.data_ptr() for tensor in network.trunk.parameters()}
    branch = {tensor.data_ptr() for tensor in network.branches[0].parameters()}
    assert {tensor.data_ptr() for tensor in left.student.parameters()} == trunk | branch
    assert not torch.equal(weights_of(network.branches[1]), weights_of(network.branches[2]))


def test_branches_come_closer_to_their_ensemble_than_without_it(workshop, hard_rows):
    distances = []
    for weight in (0, 5):
        shop = workshop(rows=hard_rows(), model=DEEP, epochs=20, optimizer=FAST)
        left = run(shop, "one", split="3", kd_weight=weight)
        distances.append(apart(left.student, left.others["ensemble"], shop.rows.inputs))
    assert distances[1] < 0.6 * distances[0]


def test_labels_alone_teach_the_gate(workshop):
    shop = workshop(epochs=5, optimizer=FAST)
    untrained = run(workshop(epochs=0), "one").others["ensemble"].network.gate
    for weight in (0, 1):
        gate = run(shop, "one", kd_weight=weight).others["ensemble"].network.gate
        assert not torch.allclose(gate.linear.weight, untrained.linear.weight, atol=1e-3)


@pytest.mark.parametrize(("split", "layers"), [(None, 1), ("3", 3), ("1", 5)])
def test_the_split_decides_what_branches_share(workshop, split, layers):
    # hidden [8, 6]: flatten, linear, relu, linear, relu, linear
    shop = workshop(model=DEEP)
    network = BranchedNetwork(build_peers(shop, 2), split, shop.rows.inputs[:2])
    assert [len(branch) for branch in network.branches] == [layers, layers]


def test_a_dry_run_does_not_move_batch_norm(workshop):
    shop = workshop(model=BATCH_NORM)
    students = build_peers(shop, 2)
    before = weights_of(students[0])
    BranchedNetwork(students, None, shop.rows.inputs[:2])
    assert torch.equal(weights_of(students[0]), before)


def test_a_split_that_cannot_be_made_is_refused(workshop):
    with pytest.raises(ValueError, match=r"method.split must be a child of .* got 'tail'"):
        run(workshop(), "one", split="tail")
    with pytest.raises(ValueError, match=r"chain of layers .* got ResNet"):
        run(workshop(model=ModelSettings(name="resnet8")), "one")
