from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from fedkd.exchange.payload import Asked, AtMost, Limit, Payload, ids_bytes
from fedkd.exchange.payloads import (
    Bundle,
    ClassTable,
    LowRank,
    Numbers,
    Orders,
    Predictions,
    Prototypes,
    RowFeatures,
    Weights,
)
from fedkd.exchange.values import digest, flatten, unflatten

ROWS = np.array([2, 5, 7, 8, 11])
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(5, 3)).astype(np.float32)
SOFT = np.full((3, 3), 1 / 3, np.float32)

GOOD: list[tuple[Payload, Asked, int]] = [
    (Predictions(rows=ROWS, values=LOGITS), Predictions.asked(ROWS, 3), 60),
    (
        # Two of five planned rows: five bits are a byte, two ids would be eight.
        Predictions(rows=ROWS[1:3], values=LOGITS[1:3], ids="subset", planned=5),
        Predictions.asked(ROWS, 3, ids="subset"),
        24 + 1,
    ),
    (
        Predictions(rows=ROWS[:0], values=LOGITS[:0], ids="subset", planned=5),
        Predictions.asked(ROWS, 3, ids="subset"),
        0,
    ),
    (
        Weights(arrays={"w": LOGITS, "n": np.array(3)}),
        Weights.asked({"w": LOGITS, "n": np.array(0)}),
        68,
    ),
    (ClassTable(values=SOFT), ClassTable.asked(3), 36),
    (Numbers.of(0.5, 2.0), Numbers.asked(2), 8),
    (
        ClassTable(values=SOFT, counts=np.ones(3, np.float32)),
        ClassTable.asked(3, counts=True),
        48,
    ),
    (
        Prototypes(classes=np.array([0, 2]), values=LOGITS[:2], num_classes=3),
        Prototypes.asked(3, 3),
        24 + 1,
    ),
    (
        RowFeatures(
            rows=np.array([9, 4]),
            features=RNG.normal(size=(2, 4, 1, 1)).astype(np.float32),
            logits=LOGITS[:2],
            labels=np.array([0, 2]),
        ),
        RowFeatures.asked(2, (4, 1, 1), 3),
        32 + 24 + 8 + 8,
    ),
    (
        LowRank(
            base=1,
            whole={"b": LOGITS[0]},
            left={"w": np.full((5, 1), 0.5, np.float32)},
            values={"w": np.ones(1, np.float32)},
            right={"w": SOFT[:1]},
        ),
        LowRank.asked({"w": LOGITS, "b": LOGITS[0]}, base=1),
        12 + 20 + 4 + 12,
    ),
    (
        Bundle(parts={"a": Predictions(rows=ROWS, values=LOGITS), "b": ClassTable(values=SOFT)}),
        Bundle.asked(a=Predictions.asked(ROWS, 3), b=ClassTable.asked(3)),
        96,
    ),
]


@pytest.mark.parametrize(("payload", "asked", "size"), GOOD)
def test_a_good_answer_has_no_problem_its_bytes_and_is_made_again(payload, asked, size):
    assert payload.problem(asked) is None
    assert payload.payload_bytes == size
    assert digest(unflatten(*flatten(payload))) == digest(payload)
    assert set(flatten(payload).arrays) <= set(asked.limits)
    assert asked.most_bytes >= sum(a.nbytes for a in flatten(payload).arrays.values())


@pytest.mark.parametrize(("payload", "asked", "_"), GOOD)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_a_number_that_is_none_is_named(payload, asked, _, bad):
    for place, array in flatten(payload).arrays.items():
        if array.dtype.kind == "f" and array.size:
            spoilt = array.copy()
            spoilt.flat[-1] = bad
            assert payload.with_arrays({place: spoilt}).problem(asked) is not None


@pytest.mark.parametrize(("payload", "asked", "_"), GOOD)
def test_a_table_of_another_form_is_named(payload, asked, _):
    for place, array in flatten(payload).arrays.items():
        for other in (
            array[None],
            array.astype(np.float16),
            np.concatenate([array] * 9) if array.ndim else array[None],
        ):
            if array.size or other.shape != array.shape:
                assert payload.with_arrays({place: other}).problem(asked) is not None, place


@pytest.mark.parametrize("pieces", [1, 3, 40])
@pytest.mark.parametrize("rows", [1, 64, 300])
def test_soft_labels_looked_at_together_have_the_entropies_of_each(pieces, rows):
    tables = RNG.dirichlet(np.full(10, 0.3), (pieces, rows)).astype(np.float32)
    tables[0, 0] = np.eye(10)[3]
    taught = [
        Predictions(rows=np.arange(rows), values=own, scale="probabilities", averaged=True)
        for own in tables
    ]
    assert Predictions.targets_entropies(taught) == [each.targets_entropy() for each in taught]


def test_entropies_of_what_is_not_alike_are_those_of_each():
    soft = Predictions(rows=ROWS[:3], values=SOFT, scale="probabilities")
    mixed = [soft, Predictions(rows=ROWS, values=LOGITS), soft]
    nothing = Predictions(rows=ROWS[:0], values=SOFT[:0], scale="probabilities")
    for pieces in (mixed, [soft, replace(soft, rows=ROWS[:2], values=SOFT[:2])], [nothing], []):
        found = Predictions.targets_entropies(pieces)
        assert found == [each.targets_entropy() for each in pieces]

    class Halved(Predictions):
        def targets_entropy(self):
            return 0.5

    halved = Halved(rows=ROWS[:3], values=SOFT, scale="probabilities")
    assert Halved.targets_entropies([halved, halved]) == [0.5, 0.5]


@pytest.mark.parametrize(
    "arrays",
    [
        {"w": LOGITS, "n": np.array(3)},
        {"w": LOGITS},
        {"w": LOGITS, "n": np.array(3), "more": LOGITS},
        {"w": LOGITS[:2], "n": np.array(3)},
        {"w": LOGITS.astype(np.float64), "n": np.array(3)},
        {"w": np.where(LOGITS > 0, np.nan, LOGITS), "n": np.array(3)},
        {"w": np.full_like(LOGITS, 1e9), "n": np.array(3)},
        {"w": LOGITS, "n": np.float64(3)},
        {"w": LOGITS, "n": 3},
    ],
)
def test_weights_have_the_problems_of_any_payload(arrays):
    asked = Weights.asked({"w": LOGITS, "n": np.array(3)})
    sent = Weights(arrays=arrays)
    assert sent.problem(asked) == Payload.problem(sent, asked)


@pytest.mark.parametrize("name", Predictions.lies)
def test_every_lie_of_predictions_is_noticed(name):
    sent = Predictions(rows=ROWS, values=LOGITS)
    assert Predictions.lies[name](sent).problem(Predictions.asked(ROWS, 3)) is not None


def test_rows_that_were_not_planned_are_no_subset():
    asked = Predictions.asked(ROWS, 3, ids="subset")
    sent = Predictions(rows=np.array([2, 6]), values=LOGITS[:2], ids="subset", planned=5)
    assert sent.problem(asked) == "rows are not of the 5 public rows of the round"
    assert replace(sent, rows=np.array([5, 2])).problem(asked) is not None
    forgotten = replace(sent, planned=0).problem(asked)
    assert forgotten == "a subset of planned = 0 rows, expected planned = 5"


def test_a_constant_with_infinity_has_to_come_back_as_it_was():
    mask = np.array([0.0, -np.inf], np.float32)
    asked = Weights.asked({"mask": mask})
    assert Weights(arrays={"mask": mask.copy()}).problem(asked) is None
    changed = Weights(arrays={"mask": np.zeros(2, np.float32)})
    assert "is a constant" in str(changed.problem(asked))


def test_parts_of_a_bundle_are_named_by_what_is_wrong_with_them():
    asked = Bundle.asked(a=ClassTable.asked(3))
    assert (
        Bundle(parts={"b": ClassTable(values=SOFT)}).problem(asked) == "parts ['b'], expected ['a']"
    )
    wrong = Bundle(parts={"a": Weights(arrays={})})
    assert wrong.problem(asked) == "a: weights, expected class_table"


def test_ids_cost_nothing_a_bit_each_or_four_bytes():
    assert ids_bytes("planned", 100) == 0
    assert ids_bytes("subset", 3, planned=1000) == 12
    assert ids_bytes("subset", 900, planned=1000) == 125
    assert ids_bytes("own", 3) == 12
    assert Orders(rows=np.arange(3), planned=1000, peers=(1, 2), phase="ask").payload_bytes == 23


@dataclass(frozen=True, kw_only=True)
class Sketch(Payload):
    kind: ClassVar[str] = "sketch"

    buckets: np.ndarray

    @classmethod
    def asked(cls, most: int) -> Asked:
        size = AtMost(most)
        return Asked(kind=cls, limits={"buckets": Limit(shape=(size, AtMost(2)), largest=10.0)})


def test_a_kind_of_ones_own_is_one_class():
    sent = Sketch(buckets=np.ones((3, 2), np.float32))
    assert sent.payload_bytes == 24
    assert sent.problem(Sketch.asked(4)) is None
    assert sent.problem(Sketch.asked(2)) == "'buckets' has shape (3, 2), expected (<= 2, <= 2)"
    assert "of size 11" in str(
        Sketch(buckets=np.full((1, 1), 11, np.float32)).problem(Sketch.asked(4))
    )


def test_each_array_is_reached_by_its_place_also_where_one_name_begins_another():
    sent = Weights(arrays={"a": np.zeros(1), "a/b": np.zeros(2), "a/b/c": np.zeros(3)})
    for place, array in flatten(sent).arrays.items():
        changed = flatten(sent.with_arrays({place: array + 1})).arrays
        assert [name for name, other in changed.items() if other.any()] == [place]


def test_nobody_gives_its_own_rows_weight_unless_asked():
    sent = Predictions(rows=ROWS, values=LOGITS, weights=np.full(len(ROWS), 1e6, np.float32))
    assert "weights" in (sent.problem(Predictions.asked(ROWS, 3)) or "")
    assert sent.problem(Predictions.asked(ROWS, 3, weighted=True)) is None
