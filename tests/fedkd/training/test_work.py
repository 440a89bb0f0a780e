"""What went through members' models is counted, and alike in every backend."""

from collections import Counter

import numpy as np
import pytest
import torch

from fedkd.inputs import InputShape
from fedkd.losses.reduction import PerRow
from fedkd.models import ModelSettings
from fedkd.training import Network, Passes, RowFlops, Work, supervised

MLP = ModelSettings(name="mlp", options={"hidden": [8]})
NETWORK = Network(MLP, InputShape((1, 8, 8)))
every_kind = pytest.mark.parametrize("kind", [0, 1], ids=["loop", "vmap"])


def all_rows(outputs, _):
    """Pull the private rows, and where there are any the public ones, towards 0."""
    if isinstance(outputs, dict):
        outputs = outputs["model"]
    losses = {}
    for kind in ("private", "public"):
        rows = getattr(outputs, kind)
        if rows is not None:
            losses[kind] = PerRow(rows.square().mean(-1), of=kind)
    return losses


@every_kind
def test_rows_count_as_often_as_they_go_through(both_kinds, kind):
    cohort = both_kinds(model=MLP)[kind]
    sizes = [len(rows) for rows in cohort.private_rows]
    assert len(set(sizes)) > 1
    cohort.fit(supervised, private=Passes(batch_size=4, epochs=2))
    assert [work.trained for work in cohort.work] == [{NETWORK: 2 * size} for size in sizes]
    assert not any(work.predicted for work in cohort.work)
    cohort.predict_public(np.arange(5))
    cohort.predict(torch.zeros(3, 1, 8, 8))
    cohort.outputs(on="private", layers=["penultimate"])
    assert [work.predicted for work in cohort.work] == [{NETWORK: 8 + size} for size in sizes]


@every_kind
def test_public_rows_count_and_a_frozen_model_goes_forwards_only(both_kinds, public_lesson, kind):
    cohort = both_kinds(model=MLP)[kind]
    sizes = [len(rows) for rows in cohort.private_rows]
    cohort.freeze("teacher", cohort.weights())
    lesson = public_lesson(passes=Passes(batch_size=4, epochs=3))
    cohort.fit(all_rows, public=lesson, frozen=["teacher"])
    public = [{NETWORK: 3 * len(lesson.rows)}] * len(sizes)
    assert [work.trained for work in cohort.work] == public
    assert [work.predicted for work in cohort.work] == public


def test_operations_are_rows_times_what_a_row_costs():
    other = Network(ModelSettings(name="cnn"), InputShape((1, 8, 8)))
    costs = {NETWORK: RowFlops(trained=300, predicted=100), other: RowFlops(9, 4)}
    work = Work(trained=Counter({NETWORK: 2}), predicted=Counter({NETWORK: 3, other: 5}))
    assert work.flops(costs) == 2 * 300 + 3 * 100 + 5 * 4
    assert Work().flops(costs) == 0
