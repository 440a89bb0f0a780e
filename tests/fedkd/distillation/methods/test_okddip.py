"""OKDDip: a leader, its peers, and whom they listen to."""

import pytest
import torch

from fedkd.distillation.fit.group import fit_group
from fedkd.distillation.methods import METHODS
from fedkd.distillation.methods.okddip import OKDDipSettings, _DiversePeers
from fedkd.distillation.methods.peers import build_peers

FAST = {"name": "adam", "lr": 0.01}


def weights_of(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def run(shop, name, **settings):
    method = METHODS[name]
    return method(method.Settings(name=name, **settings)).run(shop)


def apart(first, second, inputs):
    """Return how far two models' predictions are from each other."""
    with torch.no_grad():
        return (first(inputs).softmax(-1) - second(inputs).softmax(-1)).abs().mean()


def test_the_leader_follows_the_mean_of_its_peers(workshop, hard_rows):
    distances = []
    for weight in (0, 5):
        shop = workshop(rows=hard_rows(), epochs=20, optimizer=FAST)
        left = run(shop, "okddip", kd_weight=weight)
        peers = type(left.others["ensemble"])([left.others[f"peer {k}"] for k in (1, 2, 3)])
        distances.append(apart(left.student, peers, shop.rows.inputs))
    assert distances[1] < 0.7 * distances[0]


@pytest.mark.parametrize("learned", [True, False])
def test_attention_learns_unless_it_is_told_not_to(workshop, learned):
    shop = workshop(optimizer=FAST)
    settings = OKDDipSettings(learned_attention=learned, kd_weight=1)
    names = ["student", "peer 1", "peer 2", "peer 3"]
    group = _DiversePeers(shop, settings, build_peers(shop, 4), names)
    before = weights_of(group.attention)
    fit_group(group)
    assert torch.equal(before, weights_of(group.attention)) != learned
    shares = [row["targets/attention_to_itself"] for row in shop.histories["student"].epochs]
    assert all(0 < share < 1 for share in shares)


def test_peers_learn_nothing_from_their_leader(workshop):
    # The leader's weights are scrambled; its peers end with the same bits.
    ends = []
    for factor in (1.0, -3.0):
        shop = workshop()
        models = build_peers(shop, 3)
        with torch.no_grad():
            for parameter in models[0].parameters():
                parameter.mul_(factor)
        names = ["student", "peer 1", "peer 2"]
        group = _DiversePeers(shop, OKDDipSettings(peers=2, kd_weight=1), models, names)
        fit_group(group)
        ends.append([weights_of(model) for model in group.models])
    assert not torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])
    assert torch.equal(ends[0][2], ends[1][2])
