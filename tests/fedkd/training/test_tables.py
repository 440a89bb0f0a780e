"""Tables: an objective sees them whole, or the entries of its step's rows."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fedkd.losses.reduction import PerRow
from fedkd.models import ModelSettings, build_model
from fedkd.training import OptimizerSettings, Passes, Table

MLP = ModelSettings(name="mlp", options={"hidden": [16]})
DROPOUT = ModelSettings(name="mlp", options={"hidden": [16], "dropout": 0.4})
BATCH_NORM = ModelSettings(name="cnn", options={"channels": [4], "norm": "batch"})
SIZES = (13, 21, 5)
PASSES = Passes(batch_size=8, epochs=2)


def towards(logits, wanted, of):
    return PerRow((logits - wanted).square().mean(-1), of=of)


def by_class(outputs, batch):
    wanted = batch.tables["t"][batch.labels]
    return {"t": towards(outputs.private, wanted, "private")}


def by_private_row(outputs, batch):
    return {"t": towards(outputs.private, batch.tables["t"], "private")}


def by_public_row(outputs, batch):
    return {"t": towards(outputs.public, batch.tables["t"], "public")}


def numbers(*shape, seed=0):
    """Values that differ in every entry."""
    draw = np.random.default_rng([seed, *shape])
    return draw.standard_normal(shape).astype(torch.get_default_dtype().__str__()[6:])


def cases():
    """Tables by what they are: the objective, the table, and whether rows are public."""
    public = (1, 2, 4, 5, 8, 9, 11, 12)
    each = [np.array([3, 4, 5]), np.arange(7), np.array([18, 19])]
    return {
        "whole, shared": (by_class, Table(numbers(3, 3)), None),
        "whole, own": (by_class, Table([numbers(3, 3, seed=k) for k in range(3)]), None),
        "private": (by_private_row, Table([numbers(n, 3) for n in SIZES], of="private"), None),
        "public, shared": (by_public_row, Table(numbers(8, 3), of="public"), public),
        "public, own": (
            by_public_row,
            Table([numbers(8, 3, seed=k) for k in range(3)], of="public"),
            public,
        ),
        "public, of own rows": (
            by_public_row,
            Table([numbers(len(rows), 3) for rows in each], of="public"),
            each,
        ),
    }


KINDS = [
    "whole, shared",
    "whole, own",
    "private",
    "public, shared",
    "public, own",
    "public, of own rows",
]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("model", [MLP, DROPOUT, BATCH_NORM], ids=["plain", "dropout", "norm"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
def test_both_kinds_see_the_same_tables(
    float64, both_kinds, largest_difference, public_lesson, name, model, beside
):
    objective, table, rows = cases()[name]
    loop, vmap = both_kinds(SIZES, model=model)
    for cohort in (loop, vmap):
        public = None if rows is None else public_lesson(rows)
        private = PASSES if beside or rows is None else None
        cohort.fit(objective, private=private, public=public, tables={"t": table})
    assert largest_difference(loop.states(), vmap.states()) < 1e-5
    assert largest_difference(loop.metrics(), vmap.metrics()) < 1e-5


@pytest.mark.parametrize("kind", [0, 1], ids=["loop", "vmap"])
@pytest.mark.parametrize("name", ["whole, own", "private"])
def test_steps_are_those_of_a_plain_module_with_the_member_s_entries(
    float64, both_kinds, kind, name
):
    objective, table, _ = cases()[name]
    cohort = both_kinds(SIZES, optimizer=OptimizerSettings(name="sgd", lr=0.1))[kind]
    first = cohort.weights()
    cohort.fit(objective, private=Passes(batch_size=100), tables={"t": table})
    for position, (weights, trained) in enumerate(zip(first, cohort.weights(), strict=True)):
        plain = build_model(MLP, input_shape=(1, 8, 8), num_classes=3, seed=0).double()
        plain.load_state_dict({key: torch.from_numpy(each) for key, each in weights.items()})
        asked = cohort.outputs(on="private")[position]
        values = torch.from_numpy(table.own(position))
        wanted = values[asked.labels] if name == "whole, own" else values
        logits = plain(cohort._data.train_inputs[asked.rows])
        F.mse_loss(logits, wanted).backward()
        for key, parameter in plain.named_parameters():
            expected = (parameter - 0.1 * parameter.grad).detach().numpy()
            np.testing.assert_allclose(trained[key], expected, atol=1e-10)


@pytest.mark.parametrize("kind", [0, 1], ids=["loop", "vmap"])
@pytest.mark.parametrize("name", ["whole, own", "private", "public, own"])
def test_a_table_of_another_member_makes_a_difference(
    float64, both_kinds, largest_difference, public_lesson, kind, name
):
    objective, table, rows = cases()[name]
    sizes = (8, 8, 8)
    values = [numbers(*own.shape, seed=90 + k) for k, own in enumerate(table.values)]
    if name == "private":
        values = [numbers(8, 3, seed=k) for k in range(3)]
    states = []
    for given in (values, values, [*values[1:], values[0]]):
        cohort = both_kinds(sizes)[kind]
        cohort.fit(
            objective,
            private=PASSES if rows is None else None,
            public=None if rows is None else public_lesson(rows),
            tables={"t": Table(given, of=table.of)},
        )
        states.append(cohort.states())
    assert largest_difference(states[0], states[1]) == 0
    assert largest_difference(states[0], states[2]) > 1e-3


@pytest.mark.parametrize("kind", [0, 1], ids=["loop", "vmap"])
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (Table([numbers(3, 3)] * 2), "one for each of 3 members, got 2"),
        (Table([numbers(3, 3), numbers(3, 3), numbers(2, 3)]), "must have one shape"),
        (Table(numbers(13, 3), of="private"), "each of the 21 private rows of member 1, got 13"),
        (Table(numbers(13, 3), of="public"), "is of public rows, and the fit has none"),
        (
            Table([numbers(13, 3), numbers(21, 2), numbers(5, 3)], of="private"),
            "differ in their first dimension only",
        ),
    ],
    ids=["count", "shape", "rows", "kind", "width"],
)
def test_a_table_that_does_not_fit_is_refused(both_kinds, kind, table, message):
    cohort = both_kinds(SIZES)[kind]
    with pytest.raises(ValueError, match=f"table 't'.*{message}"):
        cohort.fit(by_private_row, private=PASSES, tables={"t": table})
