"""Which rows are for testing, for the public, for validation and for the clients together.

Only labels are needed here, so the rows are chosen before a single image is decoded.
"""

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from fedkd.data.natural_ids import NOBODY, NaturalIds
from fedkd.data.room import FewRowsError
from fedkd.data.settings import DataSettings
from fedkd.randomness import Purpose, generator_for


@dataclass(frozen=True, eq=False, slots=True)
class RowSplit:
    """Row ids of the four sets, each in random order.

    All are rows of the source's training split, except that ``test`` holds rows of the source's
    test split where it has one (``test_is_separate``).
    """

    test: Int64[np.ndarray, "test_rows"]
    public: Int64[np.ndarray, "public_rows"]
    validation: Int64[np.ndarray, "validation_rows"]
    private: Int64[np.ndarray, "private_rows"]
    test_is_separate: bool
    notes: tuple[str, ...] = ()
    """Sentences on what stays unused."""


def stratified_rows(
    labels: Int64[np.ndarray, "rows"], size: int, rng: np.random.Generator
) -> Int64[np.ndarray, "size"]:
    """Draw ``size`` distinct rows whose class shares follow those of ``labels``.

    A class gets the floor of its exact share; rows left over go to the largest remainders, ties
    decided by ``rng``. The result is shuffled: were it sorted, the order of a public set taken
    from a source sorted by class would give its labels away.

    Raises:
        ValueError: if ``size`` is not between 0 and the number of rows.
    """
    if not 0 <= size <= len(labels):
        raise ValueError(f"size must be between 0 and {len(labels)}, got {size}")
    if size == 0:
        return np.empty(0, dtype=np.int64)
    class_counts = np.bincount(labels)
    # In whole numbers: floating point could round a share above what the class has.
    shares, remainders = np.divmod(class_counts * size, len(labels))
    tie_break = rng.permutation(len(class_counts))
    by_remainder = np.lexsort((tie_break, -remainders))
    shares[by_remainder[: size - shares.sum()]] += 1
    chosen = [
        rng.choice(np.flatnonzero(labels == label), size=share, replace=False)
        for label, share in enumerate(shares)
        if share > 0
    ]
    return rng.permutation(np.concatenate(chosen))


def rows_of_classes(
    labels: Int64[np.ndarray, "rows"], classes: Int64[np.ndarray, "size"], rng: np.random.Generator
) -> Int64[np.ndarray, "size"]:
    """Draw distinct rows of given classes, in their order.

    Raises:
        ValueError: if there are fewer rows of a class than are asked for.
    """
    chosen = np.empty(len(classes), dtype=np.int64)
    for label in np.unique(classes):
        places, rows = np.flatnonzero(classes == label), np.flatnonzero(labels == label)
        if len(places) > len(rows):
            raise ValueError(
                f"data.public.size takes {len(places)} rows of class {label}, and there are "
                f"{len(rows)} besides the test set: lower it"
            )
        chosen[places] = rng.choice(rows, size=len(places), replace=False)
    return chosen


def split_rows(
    train_labels: Int64[np.ndarray, "train_rows"],
    test_labels: Int64[np.ndarray, "source_test_rows"] | None,
    settings: DataSettings,
    *,
    seed: int,
    public_classes: Int64[np.ndarray, "public_rows"] | None = None,
    num_clients: int = 0,
) -> RowSplit:
    """Divide a source's rows into disjoint test, public, validation and private sets.

    All four are stratified by label. Test rows come first, then public, validation and private
    ones, each from its own random stream: a cap on the private rows moves no public row, and
    no row depends on the clients.

    Args:
        train_labels: labels of the source's training split (or of all its rows).
        test_labels: labels of the source's test split, ``None`` where it has none.
        settings: sizes and fractions.
        seed: of the run, or ``settings.seed``.
        public_classes: of which class each public row has to be, in this order; ``None``: as many
            of each class as the source has them.
        num_clients: who need ``data.partition.min_rows`` private rows each.

    Raises:
        FewRowsError: if the source has too few rows for the sets that are asked for.
    """
    test_rng, public_rng, validation_rng, private_rng = (
        generator_for(seed, Purpose.SPLIT, stage) for stage in range(4)
    )
    free = np.arange(len(train_labels))
    if test_labels is not None:
        test = np.arange(len(test_labels))
        labels_of_test = test_labels
    else:
        test = stratified_rows(
            train_labels, max(1, round(settings.test_fraction * len(free))), test_rng
        )
        free = _without(free, test)
        labels_of_test = train_labels[test]
    if settings.test_rows is not None and settings.test_rows < len(test):
        # Test rows beyond the cap stay unused: the cap must not move rows into training.
        test = test[stratified_rows(labels_of_test, settings.test_rows, test_rng)]

    _check_public_size(len(free), settings, num_clients)
    if public_classes is None:
        public = free[stratified_rows(train_labels[free], settings.public.size, public_rng)]
    else:
        public = free[rows_of_classes(train_labels[free], public_classes, public_rng)]
    free = _without(free, public)

    validation_size, private_size = _sizes(len(free), settings)
    validation = free[stratified_rows(train_labels[free], validation_size, validation_rng)]
    free = _without(free, validation)
    private = free[stratified_rows(train_labels[free], private_size, private_rng)]
    return RowSplit(test, public, validation, private, test_is_separate=test_labels is not None)


def _sizes(rows: int, settings: DataSettings) -> tuple[int, int]:
    """Return how many validation and private rows there are of rows that are not public."""
    usable, cap = rows, settings.private_rows
    if cap is not None:
        # Validation keeps its share of what is used.
        usable = min(usable, round(cap / (1 - settings.validation_fraction)))
    validation = min(max(1, round(settings.validation_fraction * usable)), rows - 1)
    private = rows - validation
    return validation, private if cap is None else min(private, cap)


def _check_public_size(free: int, settings: DataSettings, num_clients: int) -> None:
    """Refuse a public set that leaves too few rows.

    Args:
        free: rows besides the test set.
        settings: the table ``data``.
        num_clients: who need ``data.partition.min_rows`` private rows each.
    """
    size, source = settings.public.size, f"data.source {settings.source!r}"
    if free < 2:
        raise FewRowsError(
            f"{source} leaves {free} rows besides the test set, too few for one private and one "
            "validation row: use a larger source or a smaller data.test_fraction (now "
            f"{settings.test_fraction})"
        )
    needed = max(1, num_clients * settings.partition.min_rows)
    if settings.private_rows is not None:
        # What the cap does not allow is no fault of the public rows.
        needed = min(needed, settings.private_rows)
    # The more public rows, the fewer private ones.
    sizes = range(free - 1)
    most = bisect_right(sizes, -needed, key=lambda public: -_sizes(free - public, settings)[1]) - 1
    if size <= most or (most < 0 and size <= free - 2):
        # Where no size would do, whoever deals the private rows says so.
        return
    clients = (
        f"{num_clients} clients need data.partition.min_rows={settings.partition.min_rows} private "
        "rows each"
        if num_clients
        else "one private and one validation row must be left"
    )
    if most < 0:
        raise FewRowsError(
            f"{source} has {free} rows besides the test set, too few for data.public.size={size} "
            f"and clients.count: {clients}"
        )
    raise FewRowsError(
        f"data.public.size must be {'at most ' * (most > 0)}{most}, got {size}: {source} has "
        f"{free} rows besides the test set, and {clients}"
    )


def split_rows_by_id(
    train_labels: Int64[np.ndarray, "train_rows"],
    test_labels: Int64[np.ndarray, "source_test_rows"] | None,
    ids: NaturalIds,
    settings: DataSettings,
    *,
    seed: int,
) -> RowSplit:
    """Divide a source's rows like `split_rows`, with no id on both sides of the clients' door.

    Public and validation rows, and test rows where the source has no test split, are of ids that
    the seed draws until they have enough rows; private rows are of all other ids. Rows that the
    drawn ids have beyond that, and rows of nobody, stay unused.

    Args:
        train_labels: labels of the source's training split (or of all its rows).
        test_labels: labels of the source's test split, ``None`` where it has none.
        ids: whose each training row is.
        settings: sizes and fractions.
        seed: of the run, or ``settings.seed``.

    Raises:
        ValueError: if no id would be left for a client.
    """
    test_rng, public_rng, validation_rng, private_rng, id_rng = (
        generator_for(seed, Purpose.SPLIT, stage) for stage in range(5)
    )
    rows, share = int((ids.numbers != NOBODY).sum()), settings.validation_fraction
    test_size = 0 if test_labels is not None else max(1, round(settings.test_fraction * rows))
    usable = rows - test_size - settings.public.size
    if settings.private_rows is not None:
        usable = min(usable, round(settings.private_rows / (1 - share)))
    validation_size = max(1, round(share * usable))
    needed = test_size + settings.public.size + validation_size

    counts = np.bincount(ids.numbers[ids.numbers != NOBODY], minlength=len(ids.names))
    order = id_rng.permutation(np.flatnonzero(counts))
    taken = int(np.searchsorted(np.cumsum(counts[order]), needed)) + 1
    if taken >= len(order):
        raise ValueError(
            f"data.partition.apart leaves no id for a client: public and validation rows"
            f"{' and those for testing' if test_size else ''} need {needed} rows of ids of their "
            f"own, and data.source {settings.source!r} has {rows} rows of {len(order)} ids: use a "
            "smaller data.public.size or data.validation_fraction"
        )
    held = np.flatnonzero(np.isin(ids.numbers, order[:taken]))
    total = len(held)
    sets = []
    for size, rng in (
        (test_size, test_rng),
        (settings.public.size, public_rng),
        (validation_size, validation_rng),
    ):
        chosen = held[stratified_rows(train_labels[held], size, rng)]
        sets.append(chosen)
        held = _without(held, chosen)
    test, public, validation = sets
    labels_of_test = train_labels[test]
    if test_labels is not None:
        test, labels_of_test = np.arange(len(test_labels)), test_labels
    if settings.test_rows is not None and settings.test_rows < len(test):
        test = test[stratified_rows(labels_of_test, settings.test_rows, test_rng)]
    free = np.flatnonzero(np.isin(ids.numbers, order[taken:]))
    size = len(free) if settings.private_rows is None else min(len(free), settings.private_rows)
    private = free[stratified_rows(train_labels[free], size, private_rng)]
    kept = "public and validation" if test_labels is not None else "public, validation and test"
    note = (
        f"data.partition.apart: {taken} of {len(order)} ids are no clients; {needed} of their "
        f"{total} rows are the {kept} ones"
    )
    return RowSplit(
        test, public, validation, private, test_is_separate=test_labels is not None, notes=(note,)
    )


def _without(rows: Int64[np.ndarray, "_"], taken: Int64[np.ndarray, "_"]) -> np.ndarray:
    return np.setdiff1d(rows, taken, assume_unique=True)
