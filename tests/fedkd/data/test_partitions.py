import warnings

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedkd import own_code
from fedkd.data import DataSettings
from fedkd.data.partition_settings import DirichletPartition
from fedkd.data.partitions import partition_rows

LABELS = np.random.default_rng(0).permutation(np.arange(600) % 10)
PARAMETERS = {
    "iid": (),
    "dirichlet": ("alpha",),
    "pathological": ("classes_per_client",),
    "shard": ("shards_per_client",),
    "quantity": ("alpha",),
    "power_law": ("exponent",),
    "inner_dirichlet": ("alpha", "sizes"),
    "scarce": ("rows", "classes", "kept"),
    "dominant": ("rows", "share"),
    "n_way": ("ways", "spread", "shots"),
}
KINDS = tuple(PARAMETERS)
IN_FLWR = tuple(kind for kind in KINDS if kind not in {"quantity", "scarce", "dominant", "n_way"})
FITTING = {"dominant": {"rows": 50}, "n_way": {"shots": 10}}
"""What these kinds need beside their defaults to deal so few rows."""


def read(**table):
    return DataSettings(partition=table).partition


def deal(labels=LABELS, *, clients=6, seed=0, **table):
    return partition_rows(
        labels, read(**table), num_clients=clients, rng=np.random.default_rng(seed)
    )


def class_counts(parts, labels=LABELS):
    return np.stack([np.bincount(labels[part], minlength=10) for part in parts])


def partitioner_of_flwr(table, clients, seed, rows):
    from flwr_datasets import partitioner
    from flwr_datasets.partitioner.id_to_size_fnc_partitioner import IdToSizeFncPartitioner

    match table.kind:
        case "iid":
            return partitioner.IidPartitioner(clients)
        case "dirichlet":
            # Its own check of the least size is off: it fails after ten draws, ours after twenty.
            return partitioner.DirichletPartitioner(
                clients, "label", table.alpha, min_partition_size=0, shuffle=False, seed=seed
            )
        case "pathological":
            return partitioner.PathologicalPartitioner(
                clients,
                "label",
                table.classes_per_client,
                class_assignment_mode="first-deterministic",
                shuffle=False,
                seed=seed,
            )
        case "shard":
            return partitioner.ShardPartitioner(
                clients, "label", table.shards_per_client, shuffle=False, seed=seed
            )
        case "power_law":
            return IdToSizeFncPartitioner(clients, lambda place: place**table.exponent)
        case "inner_dirichlet":
            even = [len(part) for part in np.array_split(range(rows), clients)]
            return partitioner.InnerDirichletPartitioner(
                list(table.sizes or even), "label", table.alpha, shuffle=False, seed=seed
            )


def deal_with_flwr(labels, table, *, clients, rng):
    """Deal with the partitioners of flwr-datasets; None where they or ``min_rows`` refuse."""
    from datasets import Dataset

    order = rng.permutation(len(labels))
    if table.kind == "inner_dirichlet":
        # It takes classes to be numbered from 0 without gaps.
        labels = np.unique(labels, return_inverse=True)[1]
    for _ in range(table.most_draws):
        chosen = partitioner_of_flwr(table, clients, int(rng.integers(2**31)), len(labels))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chosen.dataset = Dataset.from_dict({"row": order, "label": labels[order]})
            try:
                parts = [list(chosen.load_partition(client)["row"]) for client in range(clients)]
            except ValueError as error:
                # A client whose classes are all used up: it has no answer, and we have.
                assume("NaN" not in str(error))
                return None
        if min(map(len, parts)) >= table.min_rows:
            return [np.sort(part) for part in parts]
    return None


@st.composite
def asked(draw):
    num_classes = draw(st.integers(1, 6))
    rows = draw(st.integers(20, 120))
    # Class numbers with gaps, and classes of unequal size.
    names = np.sort(draw(st.permutations(range(10)))[:num_classes])
    shares = np.arange(1, num_classes + 1) ** draw(st.integers(0, 2))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels = np.append(names, rng.choice(names, rows, p=shares / shares.sum()))
    clients = draw(st.integers(1, 9))
    kind = draw(st.sampled_from(IN_FLWR))
    parameters = {
        "alpha": draw(st.sampled_from((0.02, 0.1, 0.3, 1.0, 7.5, 1000.0))),
        "classes_per_client": draw(st.integers(1, num_classes)),
        "shards_per_client": draw(st.integers(1, 2)),
        "exponent": draw(st.sampled_from((0.0, 0.7, 1.0, 2.0))),
        "sizes": draw(st.none() | st.just([len(labels) // (clients + 1)] * clients)),
    }
    table = read(
        kind=kind,
        # Often more than a first draw gives, so that the draws that follow are compared too.
        min_rows=draw(st.integers(1, max(1, len(labels) // (2 * clients)))),
        **{name: parameters[name] for name in PARAMETERS[kind]},
    )
    return labels, table, clients, draw(st.integers(0, 2**32))


@settings(max_examples=60, deadline=None)
@given(asked())
def test_parts_are_those_of_flwr_datasets_row_for_row(case):
    labels, table, clients, seed = case
    ours, theirs = np.random.default_rng(seed), np.random.default_rng(seed)
    expected = deal_with_flwr(labels, table, clients=clients, rng=theirs)
    if expected is None:
        with pytest.raises(ValueError, match=r"data\.partition"):
            partition_rows(labels, table, num_clients=clients, rng=ours)
    else:
        parts = partition_rows(labels, table, num_clients=clients, rng=ours)
        for part, same in zip(parts, expected, strict=True):
            np.testing.assert_array_equal(part, same)
    # As many numbers were drawn: what is cut after the partition keeps its rows too.
    assert ours.bit_generator.state == theirs.bit_generator.state


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_sorted_disjoint_and_reproducible(kind):
    table = {"kind": kind, **FITTING.get(kind, {})}
    parts, again, other = deal(**table), deal(**table), deal(seed=1, **table)
    held = np.concatenate(parts)
    assert len(parts) == 6
    assert len(np.unique(held)) == len(held)
    assert held.min() >= 0
    assert held.max() < len(LABELS)
    for part, same in zip(parts, again, strict=True):
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
        np.testing.assert_array_equal(part, same)
    assert any(set(part) != set(moved) for part, moved in zip(parts, other, strict=True))


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(("iid", "dirichlet", "quantity", "power_law", "inner_dirichlet")),
    rows=st.integers(80, 200),
    clients=st.integers(1, 8),
)
def test_kinds_without_a_remainder_deal_every_row(kind, rows, clients):
    parts = deal(LABELS[:rows], clients=clients, kind=kind, min_rows=1)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(rows))


def test_iid_parts_differ_by_at_most_one_row():
    sizes = [len(part) for part in deal(kind="iid", clients=7)]
    assert max(sizes) - min(sizes) <= 1


def test_large_alpha_is_nearly_iid_and_small_alpha_is_not():
    # Total variation between a client's class shares and those of all rows (uniform here).
    def distance(alpha):
        counts = class_counts(deal(kind="dirichlet", alpha=alpha, min_rows=1))
        shares = counts / counts.sum(axis=1, keepdims=True)
        return 0.5 * np.abs(shares - 0.1).sum(axis=1).mean()

    assert distance(10_000.0) < 0.03
    assert distance(0.1) > 0.4


def test_pathological_clients_hold_exactly_their_number_of_classes():
    counts = class_counts(deal(kind="pathological", clients=10, classes_per_client=3))
    assert ((counts > 0).sum(axis=1) == 3).all()
    # As many clients as classes, and the first class is dealt in turn: none stays unheld.
    assert counts.sum() == len(LABELS)


def test_few_pathological_clients_leave_classes_unheld_without_a_warning():
    counts = class_counts(deal(kind="pathological", clients=2, classes_per_client=2))
    assert ((counts > 0).sum(axis=1) == 2).all()
    assert (counts.sum(axis=0) == 0).sum() >= 6


def test_a_client_may_hold_a_single_class():
    counts = class_counts(deal(kind="pathological", clients=10, classes_per_client=1))
    assert ((counts > 0).sum(axis=1) == 1).all()


def test_shard_clients_hold_equally_many_rows_of_few_classes():
    counts = class_counts(deal(kind="shard", clients=10, shards_per_client=2))
    assert set(counts.sum(axis=1)) == {60}
    # 20 shards of 30 rows cut 10 classes of 60 rows in halves: at most one class per shard.
    assert ((counts > 0).sum(axis=1) <= 2).all()


def test_shard_leaves_out_the_remainder():
    parts = deal(kind="shard", clients=7, shards_per_client=2)
    assert {len(part) for part in parts} == {2 * (600 // 14)}


def test_more_clients_than_rows_are_refused():
    with pytest.raises(ValueError, match=r"clients\.count must be at most the 5 .*got 6"):
        deal(LABELS[:5], clients=6, kind="iid", min_rows=1)


def test_no_clients_are_refused():
    with pytest.raises(ValueError, match=r"clients\.count must be >= 1, got 0"):
        deal(clients=0, kind="iid")


def test_min_rows_beyond_the_average_is_refused_with_the_largest_that_works():
    with pytest.raises(ValueError, match=r"min_rows must be at most 100 .*got 101"):
        deal(kind="dirichlet", min_rows=101)


def test_clients_too_small_are_named_with_their_sizes_and_the_way_out():
    with pytest.raises(ValueError, match=r"min_rows=90") as refusal:
        deal(kind="dirichlet", alpha=0.05, min_rows=90)
    message = str(refusal.value)
    assert "of 6 clients" in message
    assert "client " in message
    for remedy in ("larger data.partition.alpha (now 0.05)", "fewer clients", "smaller data.part"):
        assert remedy in message


def test_an_unlucky_draw_is_drawn_again(monkeypatch):
    hard = {"kind": "dirichlet", "alpha": 0.3, "clients": 15, "min_rows": 14}
    assert min(map(len, deal(**hard, seed=3))) >= 14
    monkeypatch.setattr(DirichletPartition, "most_draws", 1)
    with pytest.raises(ValueError, match="min_rows=14"):
        deal(**hard, seed=3)


def test_more_classes_per_client_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"classes_per_client must be at most the 10 .*got 11"):
        deal(kind="pathological", classes_per_client=11)


def test_a_class_with_fewer_rows_than_clients_to_hold_it_is_refused():
    labels = np.array([0] * 40 + [1])
    refusal = (
        r"data\.partition cannot be dealt: 4 clients are to hold class 1, which has 1 private rows"
        r"\. Use fewer clients"
    )
    with pytest.raises(ValueError, match=refusal):
        deal(labels, clients=4, kind="pathological", classes_per_client=2, min_rows=1)


def test_more_shards_than_rows_are_refused():
    with pytest.raises(ValueError, match=r"shards_per_client must be at most 100 .*got 101"):
        deal(kind="shard", shards_per_client=101, min_rows=1)


def test_quantity_shares_differ_in_size_and_not_in_classes():
    labels = np.arange(20_000) % 10
    parts = deal(labels, kind="quantity", alpha=0.5, clients=5)
    sizes = [len(part) for part in parts]
    assert max(sizes) > 3 * min(sizes)
    largest = class_counts([max(parts, key=len)], labels)[0]
    np.testing.assert_allclose(largest / largest.sum(), 0.1, atol=0.02)
    even = [len(part) for part in deal(labels, kind="quantity", alpha=10_000.0, clients=5)]
    np.testing.assert_allclose(even, 4000, rtol=0.05)


def test_power_law_sizes_are_those_computed_by_hand():
    # 600 rows, (1, 2, 3) of 6 parts; squares (1, 4, 9) of 14 parts: 42.9, 171.4 and the rest.
    assert [len(p) for p in deal(kind="power_law", clients=3)] == [100, 200, 300]
    squares = deal(kind="power_law", clients=3, exponent=2.0)
    assert [len(p) for p in squares] == [42, 171, 387]


def test_inner_dirichlet_keeps_the_sizes_that_are_given():
    parts = deal(kind="inner_dirichlet", clients=3, sizes=[50, 10, 300], alpha=0.1)
    assert [len(part) for part in parts] == [50, 10, 300]
    counts = class_counts(parts)
    assert (np.sort(counts[0])[::-1][:2].sum()) > 25  # of ten classes, two hold most


def test_inner_dirichlet_fills_clients_whose_own_classes_are_used_up():
    # Shares so extreme that a client wants one class only, which soon has no rows left.
    parts = deal(kind="inner_dirichlet", clients=3, alpha=0.0001)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(600))


@pytest.mark.parametrize(
    ("sizes", "refusal"),
    [
        ([10, 10], r"sizes must have one size for each of the 3 clients .*got 2"),
        ([300, 300, 1], r"sizes must add up to at most the 600 private rows, got 601"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, refusal):
    with pytest.raises(ValueError, match=refusal):
        deal(kind="inner_dirichlet", clients=3, sizes=sizes, min_rows=1)


@pytest.mark.parametrize(
    ("table", "remedy"),
    [
        ({"kind": "power_law", "exponent": 9.0}, r"smaller data\.partition\.exponent \(now 9\.0\)"),
        ({"kind": "quantity", "alpha": 0.001}, r"larger data\.partition\.alpha \(now 0\.001\)"),
    ],
)
def test_sizes_that_are_too_skewed_are_refused_with_the_way_out(table, remedy):
    with pytest.raises(ValueError, match=remedy):
        deal(**table)


# --- a function of one's own ------------------------------------------------------------------

GOOD = "own_partitions:in_turn"


def test_a_function_of_ones_own_deals_the_rows_and_gets_its_options():
    parts = deal(kind=GOOD, clients=4, options={"first": 100})
    for client, part in enumerate(parts):
        np.testing.assert_array_equal(part, np.sort(part))
        assert len(part) == (100 if client == 0 else 167 if client < 3 else 166)
    held = np.concatenate(parts)
    np.testing.assert_array_equal(np.sort(held), np.arange(600))
    # It was handed shuffled labels, and answered with places among them.
    assert {len(np.unique(LABELS[part])) for part in parts} == {10}


def test_what_it_draws_from_anywhere_follows_from_the_seed():
    first, again, other = (
        deal(kind="own_partitions:by_global_lot", clients=3, seed=seed) for seed in (1, 1, 2)
    )
    for part, same in zip(first, again, strict=True):
        np.testing.assert_array_equal(part, same)
    assert any(set(a) != set(b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("too_few", r"rows for each of the 6 clients \(clients\.count\), got 5 parts"),
        ("twice", r"each row at most once, got row 0 for clients \[0, 1\]"),
        ("outside", r"rows from 0 to 599, got 600 for client 2"),
        ("before", r"rows from 0 to 599, got -1 for client 0"),
        ("fractions", r"a list of whole numbers for each client, got .* for client 0"),
        ("nothing", r"a list of rows for each client, got None"),
        (
            "small",
            r"gives 1 of 6 clients fewer rows than data\.partition\.min_rows=8: client 5 \(3\)",
        ),
        (
            "complains",
            r":complains' failed: ValueError: 7 is no day \(\S+own_partitions\.py, line \d+\)$",
        ),
        ("NO_FUNCTION", r"must name a function, got a int"),
        ("missing", r"has no attribute 'missing'"),
    ],
)
def test_what_it_returns_is_checked(name, refusal):
    with pytest.raises(ValueError, match=refusal):
        deal(kind=f"own_partitions:{name}")


def test_its_name_is_refused_where_it_may_not_run():
    def nobody(name):
        raise ValueError(f"{name!r} is not allowed")

    with own_code.asking(nobody), pytest.raises(ValueError, match="not allowed"):
        read(kind=GOOD)


@pytest.mark.parametrize("kind", ["random", "", "os.path", 3, None, ["iid"]])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(ValueError, match="kind"):
        read(kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_of_another_kind_is_refused(kind):
    others = {name for names in PARAMETERS.values() for name in names} - {*PARAMETERS[kind]}
    for name in others:
        with pytest.raises(ValueError, match="Extra inputs are not permitted"):
            read(**{"kind": kind, name: 1})


# --- partitions of published comparisons ------------------------------------------------------


def test_scarce_clients_have_equal_rows_but_for_the_classes_cut_to_a_few():
    labels = np.arange(6000) % 10
    parts = deal(labels, kind="scarce", clients=4, rows=500, classes=3, kept=5)
    counts = class_counts(parts, labels)
    for part in counts:
        assert (part == 5).sum() == 3
        assert (part[part != 5] > 20).all()  # about 50 of each other class, as in the source
    assert len({tuple(np.flatnonzero(part == 5)) for part in counts}) > 1  # by lot, each its own


def test_scarce_without_a_number_shares_all_rows_and_without_classes_cuts_none():
    assert [len(part) for part in deal(kind="scarce", clients=7, classes=1, kept=1000)] == [85] * 7


def test_dominant_clients_hold_their_share_of_one_class_and_the_rest_of_others():
    counts = class_counts(deal(kind="dominant", clients=6, rows=50, share=0.8))
    assert (counts.sum(axis=1) == 50).all()
    assert (counts.max(axis=1) == 40).all()
    assert ((counts > 0).sum(axis=1) > 3).all()


def test_a_class_with_too_few_rows_left_dominates_nobody_else():
    # 200 rows of a class are enough for one client with 135 of them: ten take all ten classes.
    labels = np.arange(2000) % 10
    counts = class_counts(deal(labels, kind="dominant", clients=10, rows=150, share=0.9), labels)
    assert sorted(counts.argmax(axis=1)) == list(range(10))


def test_n_way_clients_hold_as_many_rows_of_each_of_their_classes():
    labels = np.arange(20_000) % 10
    counts = class_counts(
        deal(labels, kind="n_way", clients=60, ways=4, spread=3, shots=20), labels
    )
    assert set(counts.ravel()) == {0, 20}
    ways = (counts > 0).sum(axis=1)
    assert set(ways) == set(range(2, 8))  # none of a single class
    exact = class_counts(deal(labels, kind="n_way", clients=8, ways=1, shots=9), labels)
    assert ((exact > 0).sum(axis=1) == 1).all()


@pytest.mark.parametrize(
    ("table", "refusal"),
    [
        ({"kind": "scarce", "rows": 101}, r"partition\.rows must be at most 100 .*got 101"),
        ({"kind": "scarce", "classes": 11}, r"partition\.classes must be at most the 10 .*got 11"),
        ({"kind": "dominant", "rows": 101}, r"partition\.rows must be at most 100 .*got 101"),
        ({"kind": "dominant", "rows": 90}, r"client 0 is to hold 72 rows of one class and 18 of"),
        ({"kind": "n_way", "ways": 11}, r"partition\.ways must be at most the 10 .*got 11"),
        ({"kind": "n_way", "ways": 9, "shots": 50}, r"to hold 50 rows each of class 0, which has"),
    ],
)
def test_what_cannot_be_dealt_is_refused_with_the_way_out(table, refusal):
    with pytest.raises(ValueError, match=refusal):
        deal(**table)
