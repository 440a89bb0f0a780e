import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.data import PartitionSettings
from fedkd.data.partitions import MAX_DRAWS, partition_rows

LABELS = np.random.default_rng(0).permutation(np.arange(600) % 10)
KINDS = ("iid", "dirichlet", "pathological", "shard")


def deal(labels=LABELS, *, clients=6, seed=0, **table):
    return partition_rows(
        labels, PartitionSettings(**table), num_clients=clients, rng=np.random.default_rng(seed)
    )


def class_counts(parts, labels=LABELS):
    return np.stack([np.bincount(labels[part], minlength=10) for part in parts])


def partitioner_of_flwr(table, clients, seed):
    from flwr_datasets import partitioner

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


def deal_with_flwr(labels, table, *, clients, rng):
    """Deal with the partitioners of flwr-datasets; None where they or ``min_rows`` refuse."""
    from datasets import Dataset

    order = rng.permutation(len(labels))
    draws = MAX_DRAWS if table.kind in ("dirichlet", "pathological") else 1
    for _ in range(draws):
        chosen = partitioner_of_flwr(table, clients, int(rng.integers(2**31)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            chosen.dataset = Dataset.from_dict({"row": order, "label": labels[order]})
            try:
                parts = [list(chosen.load_partition(client)["row"]) for client in range(clients)]
            except ValueError:
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
    table = PartitionSettings(
        kind=draw(st.sampled_from(KINDS)),
        alpha=draw(st.sampled_from((0.02, 0.1, 0.3, 1.0, 7.5, 1000.0))),
        classes_per_client=draw(st.integers(1, num_classes)),
        shards_per_client=draw(st.integers(1, 2)),
        # Often more than a first draw gives, so that the draws that follow are compared too.
        min_rows=draw(st.integers(1, max(1, len(labels) // (2 * clients)))),
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
    parts, again, other = deal(kind=kind), deal(kind=kind), deal(kind=kind, seed=1)
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
    kind=st.sampled_from(("iid", "dirichlet")),
    rows=st.integers(80, 200),
    clients=st.integers(1, 8),
)
def test_iid_and_dirichlet_deal_every_row(kind, rows, clients):
    parts = deal(LABELS[:rows], clients=clients, kind=kind, alpha=5.0, min_rows=1)
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
    monkeypatch.setattr("fedkd.data.partitions.MAX_DRAWS", 1)
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
