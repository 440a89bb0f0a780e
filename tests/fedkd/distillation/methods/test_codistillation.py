"""Codistillation: nobody reads in the burn-in, then others as they were."""

import pytest
import torch

from fedkd.distillation.methods import METHODS
from fedkd.distillation.methods.codistillation import CodistillationSettings, _StaleReaders
from fedkd.distillation.methods.peers import build_peers, peer_names
from fedkd.mutual.stale import StalePeers

FAST = {"name": "adam", "lr": 0.01}


def weights_of(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


def run(shop, name, **settings):
    method = METHODS[name]
    return method(method.Settings(name=name, **settings)).run(shop)


def test_nobody_reads_anything_during_the_burn_in(workshop, monkeypatch):
    reads = []
    original = StalePeers.others

    def spy(self, inputs, *, leave_out):
        reads.append(leave_out)
        return original(self, inputs, leave_out=leave_out)

    monkeypatch.setattr(StalePeers, "others", spy)
    run(workshop(epochs=3), "codistillation", burn_in=0.5)
    # 18 steps; from the middle on each peer asks once a step.
    assert reads == [0, 1] * 9


def test_the_burn_in_is_a_share_of_the_training(workshop):
    shop = workshop(epochs=5)
    run(shop, "codistillation", burn_in=0.5)
    weights = [row["weight/kd"] for row in shop.histories["student"].epochs]
    assert weights == [0, 0, 1, 1, 1]


def test_peers_read_each_other_as_they_were(workshop):
    # With no exchange ever, everybody listens to the first weights of the others.
    fresh, stale, never = (
        weights_of(run(workshop(), "codistillation", burn_in=0, interval=interval).student)
        for interval in (1, 5, 1000)
    )
    assert not torch.allclose(fresh, stale, atol=1e-5)
    assert not torch.allclose(stale, never, atol=1e-5)


def test_codistilled_peers_agree_more(workshop, hard_rows):
    alone, together = (
        run(
            workshop(rows=hard_rows(), epochs=20, optimizer=FAST),
            "codistillation",
            kd_weight=weight,
            labelled_rows="disjoint",
        ).notes["disagreement"]
        for weight in (0, 3)
    )
    assert together < 0.7 * alone


def test_disjoint_rows_are_every_label_once(workshop):
    shop = workshop()
    settings = CodistillationSettings(peers=3, labelled_rows="disjoint")
    group = _StaleReaders(shop, settings, build_peers(shop, 3), peer_names(3))
    ids = torch.cat(group.own_rows)
    assert sorted(ids.tolist()) == list(range(shop.rows.labelled))
    assert [len(part) for part in group.own_rows] == [4, 4, 4]


def test_more_peers_than_labelled_rows_cannot_be_disjoint(workshop, toy_rows):
    with pytest.raises(ValueError, match=r"labelled row for each of the 3 peers, but .* is 2"):
        run(
            workshop(rows=toy_rows(labelled=2)),
            "codistillation",
            peers=3,
            labelled_rows="disjoint",
        )
