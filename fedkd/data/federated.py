"""The data of one run: private rows per client, a public set, validation and test sets."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64

from fedkd.data.feature_shift import ClientShifts, check_shifts, shift_inputs
from fedkd.data.images import match_channels
from fedkd.data.label_noise import WrongLabels, with_wrong_labels
from fedkd.data.natural_ids import Dealt
from fedkd.data.partition_settings import NaturalPartition, OwnPartition
from fedkd.data.partitions import deal_rows
from fedkd.data.public_source import check_apart, draw_public_rows
from fedkd.data.reading import AS_IT_IS, Reading
from fedkd.data.room import NO_WORDS, FewRowsError, public_sizes, words_that_fit
from fedkd.data.settings import DataSettings
from fedkd.data.sources import Source, of_source, open_source, view_settings, with_classes
from fedkd.data.splits import RowSplit, split_rows, split_rows_by_id
from fedkd.inputs import InputShape
from fedkd.randomness import Purpose, generator_for

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, slots=True)
class Canaries:
    """Rows of a client that are there by lot, to audit a run; see `fedkd.data.canaries`.

    Attributes:
        client: whose rows they were.
        rows: their places in its pool, sorted.
        inside: which of them it still has. No algorithm may look at it.
    """

    client: int
    rows: Int64[np.ndarray, "canaries"]
    inside: Bool[np.ndarray, "canaries"]


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class FederatedData:
    """Everything that clients and server learn from and are measured on.

    Inputs are standardised per channel, or per feature: ``(pixel - channel_mean) / channel_std``
    with pixels in [0, 1]. Texts are numbers of tokens and stay so. Arrays are C-contiguous, so
    that workers can read them from shared memory.
    """

    name: str
    class_names: tuple[str, ...]
    channel_mean: Float32[np.ndarray, "channels"]
    """Of each channel of pictures, or of each feature; a single 0 for texts."""
    channel_std: Float32[np.ndarray, "channels"]
    """The same; a single 1 for texts."""
    train_inputs: Float32[np.ndarray, "train_rows *shape"]
    """The private pool: what the clients hold together."""
    train_labels: Int64[np.ndarray, "train_rows"]
    """As clients see them: with ``data.label_noise`` some are wrong."""
    client_rows: tuple[Int64[np.ndarray, "_"], ...]
    """Per client the rows of the pool it holds: sorted, disjoint, possibly not all of them."""
    public_inputs: Float32[np.ndarray, "public_rows *shape"]
    public_labels: Int64[np.ndarray, "public_rows"] | None
    """``None`` unless ``data.public.labelled``: then nobody can look at them by mistake."""
    validation_inputs: Float32[np.ndarray, "validation_rows *shape"]
    validation_labels: Int64[np.ndarray, "validation_rows"]
    test_inputs: Float32[np.ndarray, "test_rows *shape"]
    test_labels: Int64[np.ndarray, "test_rows"]
    client_names: tuple[str, ...] = ()
    """What clients are called by their natural ids; empty where they have none."""
    wrong_labels: WrongLabels | None = None
    """Which private labels are wrong, for measurements only; ``None``: all are the source's."""
    client_shifts: ClientShifts | None = None
    """Who sees inputs in which way; ``None``: all see them as they are."""
    reading: Reading = AS_IT_IS
    """How rows of tables became inputs."""
    vocabulary: int | None = None
    """How many tokens texts are made of; ``None`` where inputs are no texts."""
    other_classes: int = 0
    """How many of the classes, the last ones, only labelled public rows have."""
    views: "tuple[FederatedData, ...]" = ()
    """Inputs of other kinds, see `of_client`. Their public rows stand beside these: row i shows
    the same class in all of them. ``client_rows`` are rows of the pool of a client's own view."""
    canaries: Canaries | None = None
    """Rows that are there by lot, for measurements only; ``None``: nobody audits the run."""
    notes: tuple[str, ...] = ()
    """Sentences on what a reader of results should know: what was left aside, which rows repeat."""

    @property
    def num_classes(self) -> int:
        """How many classes the source has; a run's rows need not hold all of them."""
        return len(self.class_names)

    @property
    def num_clients(self) -> int:
        """How many parts the pool was dealt into."""
        return len(self.client_rows)

    def of_client(self, client: int) -> "FederatedData":
        """Return the data that a client's rows are of: this, or the view that was dealt to it."""
        number = client % (1 + len(self.views))
        return self.views[number - 1] if number else self

    def without_private_rows(self) -> "FederatedData":
        """Return the same for a server that must not reach what clients hold."""
        return replace(
            self,
            train_inputs=self.train_inputs[:0],
            train_labels=self.train_labels[:0],
            client_rows=tuple(rows[:0] for rows in self.client_rows),
            wrong_labels=None,
            client_shifts=None,
            canaries=None,
            views=tuple(view.without_private_rows() for view in self.views),
        )

    def without_rows_of(self, clients: Collection[int]) -> "FederatedData":
        """Return the same for everybody who must not learn from what some clients hold.

        These keep their places and hold nothing; the pool, and what was computed of it, stays.
        """
        if not clients:
            return self
        return replace(
            self,
            client_rows=tuple(
                rows[:0] if client in clients else rows
                for client, rows in enumerate(self.client_rows)
            ),
        )

    @property
    def input_shape(self) -> InputShape:
        """What one input is."""
        return InputShape(self.train_inputs.shape[1:], self.vocabulary)

    @property
    def num_unassigned_rows(self) -> int:
        """Rows of the pool that no client holds (as in pathological and natural partitions)."""
        pools = (self, *self.views)
        return sum(len(pool.train_labels) for pool in pools) - sum(map(len, self.client_rows))

    def __reduce__(
        self,
    ) -> "tuple[Callable[..., FederatedData], tuple[dict[str, Any], np.ndarray, np.ndarray]]":
        """Travel with all clients' rows in one array: a hundred thousand small ones take longer."""
        table = {field.name: getattr(self, field.name) for field in fields(self)}
        rows = table.pop("client_rows")
        together = np.concatenate(rows) if rows else np.empty(0, np.int64)
        return _with_rows, (table, together, np.array([len(own) for own in rows], np.int64))

    def private(
        self, client: int
    ) -> tuple[
        Float32[np.ndarray, "rows *shape"],
        Int64[np.ndarray, "rows"],
    ]:
        """Return a copy of the inputs and labels that one client holds.

        Raises:
            ValueError: if there is no such client.
        """
        if not 0 <= client < self.num_clients:
            raise ValueError(f"client must be 0 to {self.num_clients - 1}, got {client}")
        rows, own = self.client_rows[client], self.of_client(client)
        return own.train_inputs[rows], own.train_labels[rows]

    def label_counts(self, *, true: bool = False) -> Int64[np.ndarray, "clients classes"]:
        """Count each client's private rows per class.

        Args:
            true: count the classes that rows have, not those that wrong labels say.
        """
        labels = self.train_labels
        if true and self.wrong_labels is not None:
            labels = labels.copy()
            labels[self.wrong_labels.rows] = self.wrong_labels.true_labels
        return np.stack(
            [
                np.bincount(
                    (labels if own is self else own.train_labels)[rows],
                    minlength=self.num_classes,
                )
                for client, rows in enumerate(self.client_rows)
                for own in [self.of_client(client)]
            ]
        ).astype(np.int64)

    def wrong_counts(self) -> Int64[np.ndarray, "clients"]:
        """Count each client's private rows whose label is wrong."""
        is_wrong = np.zeros(len(self.train_labels), dtype=np.int64)
        if self.wrong_labels is not None:
            is_wrong[self.wrong_labels.rows] = 1
        return np.array([is_wrong[rows].sum() for rows in self.client_rows], dtype=np.int64)


def build_federated_data(settings: DataSettings, *, num_clients: int, seed: int) -> FederatedData:
    """Load a source, split it and deal the private rows to the clients.

    The split into test, public, validation and private rows depends on neither the kind of
    partition nor the number of clients, so arms that differ in those share their test set.

    Inputs are standardised with the mean and standard deviation of the training rows in use
    (private, public and validation together; without public rows that come from another source,
    which are standardised like all others). These two numbers per channel or feature count as
    known to everybody, like the published constants of well-known datasets; no privacy budget is
    spent on them.

    Args:
        settings: the table ``data``.
        num_clients: how many clients share the private rows.
        seed: the run's seed, in force unless ``settings.seed`` is set.

    Raises:
        ValueError: if the source cannot be read or has too few rows for what is asked; names the
            setting, its value and what would work.
    """
    seed = settings.seed if settings.seed is not None else seed
    if settings.views:
        return _with_views(settings, num_clients, seed)
    return _build(settings, num_clients, seed)


def _with_views(settings: DataSettings, num_clients: int, seed: int) -> FederatedData:
    """Load each source with the clients that it was dealt to, and put them side by side."""
    parts = 1 + len(settings.views)
    if num_clients < parts:
        raise ValueError(
            f"clients.count must be at least {parts} for {parts - 1} data.views beside "
            f"data.source, got {num_clients}"
        )
    labelled = settings.public.model_copy(update={"labelled": True})
    alone = settings.model_copy(update={"views": (), "public": labelled})
    try:
        first = _build(alone, -(-num_clients // parts), seed)
    except FewRowsError as error:
        # What would work was looked for among this source's own clients.
        raise ValueError(error.problem) from error
    views = []
    for number, view in enumerate(settings.views, 1):
        own = view_settings(alone, view)
        try:
            clients = -(-(num_clients - number) // parts)
            views.append(_build(own, clients, seed, beside=first, number=number))
        except ValueError as error:
            problem = error.problem if isinstance(error, FewRowsError) else str(error)
            raise ValueError(f"data.views[{number - 1}]: {problem}") from error
    dealt = [first, *views]
    return replace(
        first,
        public_labels=first.public_labels if settings.public.labelled else None,
        client_rows=tuple(
            dealt[client % parts].client_rows[client // parts] for client in range(num_clients)
        ),
        client_names=tuple(
            dealt[client % parts].client_names[client // parts] for client in range(num_clients)
        )
        if all(each.client_names for each in dealt)
        else (),
        views=tuple(replace(view, client_rows=(), client_names=()) for view in views),
        notes=tuple(note for each in dealt for note in each.notes),
    )


def _build(
    settings: DataSettings,
    num_clients: int,
    seed: int,
    *,
    beside: FederatedData | None = None,
    number: int = 0,
) -> FederatedData:
    """Load one source.

    Args:
        settings: of it.
        num_clients: that share its private rows.
        seed: in force.
        beside: the data that it is a view of: its public rows are to show the same classes.
        number: which view it is; 0: none.
    """
    source = open_source(settings)
    if beside is not None:
        source = with_classes(source, beside.class_names)
    test_labels = None if source.test is None else source.test.labels
    public = (
        None if settings.public.source is None else draw_public_rows(settings, source, seed=seed)
    )
    # Before the images: what does not work should fail at once.
    check_shifts(settings.feature_shift, source.kind)

    def deal(tried: DataSettings, clients: int) -> tuple[RowSplit, Dealt]:
        split = _split(
            source,
            tried if public is None else _without_public(tried),
            seed=seed,
            public_classes=None if beside is None else beside.public_labels,
            num_clients=clients,
        )
        dealt = deal_rows(
            source.train.labels[split.private],
            tried.partition,
            num_clients=clients,
            rng=generator_for(seed, Purpose.PARTITION, *([number] if number else [])),
            private=split.private,
            ids=source.ids,
        )
        return split, dealt

    def works(tried: DataSettings, clients: int) -> bool:
        try:
            deal(tried, clients)
        except ValueError:
            return False
        return True

    try:
        split, dealt = deal(settings, num_clients)
    except FewRowsError as error:
        words: Mapping[str, str] = NO_WORDS
        # A function of one's own is not to be called again and again.
        if not isinstance(settings.partition, OwnPartition):
            size = settings.public.size
            free = len(source.train.labels)
            if source.test is None:
                free -= round(settings.test_fraction * free)
            words = words_that_fit(
                settings,
                num_clients=num_clients,
                sizes=public_sizes(size, free) if public is None else [size],
                works=works,
            )
        raise FewRowsError(error.problem, words, source.kind) from error
    private_labels = source.train.labels[split.private]
    labels, wrong = with_wrong_labels(
        private_labels,
        dealt.rows,
        settings.label_noise,
        num_classes=len(source.class_names),
        seed=seed,
    )
    inputs, test_inputs = _read_inputs(source, split, settings)
    public_end = len(split.public)
    validation_end = public_end + len(split.validation)
    repeated = _repetitions(inputs, test_inputs, split, source, settings)
    notes = (*source.notes, *split.notes, *dealt.notes, *repeated)
    if wrong is not None:
        notes = (
            *notes,
            f"data.label_noise: {len(wrong.rows)} of {len(labels)} private labels are wrong",
        )
    shape = InputShape(inputs.shape[1:], source.vocabulary)
    if shape.kind == "text":  # numbers of tokens, which have no mean
        mean, std = np.zeros(1, np.float32), np.ones(1, np.float32)
    else:
        mean, std = _channel_statistics(inputs)
    # Copies, so that none of the three keeps the memory of the others alive.
    public_inputs, public_labels = inputs[:public_end].copy(), source.train.labels[split.public]
    if public is not None:
        public_inputs, public_labels = public.inputs(inputs, source.kind), public.labels
        for others in (inputs, test_inputs):
            check_apart(public_inputs, others, settings)
        notes = (*notes, *public.notes)
    for note in notes:
        _tell(note)
    everything = [inputs, test_inputs, public_inputs]
    if shape.kind == "features":
        _standardise(everything, mean, std)
    # After all that compares rows, and with the mean and std of rows as they are: arms that differ
    # in their shifts share the other sets bit for bit. Pixels are shifted as pixels.
    shifts = shift_inputs(
        inputs[validation_end:], test_inputs, dealt.rows, settings.feature_shift, seed=seed
    )
    if shape.kind == "pictures":
        copies = () if shifts is None else [own for own in shifts.test_inputs if own is not None]
        _standardise([*everything, *copies], mean, std)
    class_names = source.class_names if public is None else public.class_names
    return FederatedData(
        name=source.name,
        reading=source.reading,
        class_names=class_names,
        channel_mean=mean,
        channel_std=std,
        public_inputs=public_inputs,
        validation_inputs=inputs[public_end:validation_end].copy(),
        train_inputs=inputs[validation_end:].copy(),
        public_labels=public_labels if settings.public.labelled else None,
        validation_labels=source.train.labels[split.validation],
        train_labels=labels,
        wrong_labels=wrong,
        client_shifts=shifts,
        client_rows=dealt.rows,
        client_names=dealt.names,
        test_inputs=test_inputs,
        test_labels=(source.train.labels if test_labels is None else test_labels)[split.test],
        vocabulary=source.vocabulary,
        other_classes=len(class_names) - len(source.class_names),
        notes=notes,
    )


def _split(
    source: Source,
    settings: DataSettings,
    *,
    seed: int,
    public_classes: Int64[np.ndarray, "public_rows"] | None = None,
    num_clients: int = 0,
) -> RowSplit:
    test_labels = None if source.test is None else source.test.labels
    partition = settings.partition
    if isinstance(partition, NaturalPartition) and partition.apart:
        ids = source.ids(partition.named_column)
        return split_rows_by_id(source.train.labels, test_labels, ids, settings, seed=seed)
    return split_rows(
        source.train.labels,
        test_labels,
        settings,
        seed=seed,
        public_classes=public_classes,
        num_clients=num_clients,
    )


def _standardise(
    sets: Sequence[Float32[np.ndarray, "_rows channels *_sides"]],
    mean: Float32[np.ndarray, "channels"],
    std: Float32[np.ndarray, "channels"],
) -> None:
    """Standardise rows in place: they may fill much of the memory."""
    for values in sets:
        across = (slice(None), *(None for _ in range(values.ndim - 2)))
        values -= mean[across]
        values /= std[across]


def _without_public(settings: DataSettings) -> DataSettings:
    """Return settings under which the source has no public rows: they come from another."""
    return settings.model_copy(update={"public": settings.public.model_copy(update={"size": 0})})


def _read_inputs(
    source: Source, split: RowSplit, settings: DataSettings
) -> tuple[
    Float32[np.ndarray, "train_rows *shape"],
    Float32[np.ndarray, "test_rows *shape"],
]:
    """Return the inputs of (public, validation, private) rows in this order, and of test rows."""
    train_rows = np.concatenate([split.public, split.validation, split.private])
    try:
        train = source.train.read(train_rows)
        test = (source.test or source.train).read(split.test)
    except ValueError as error:
        if str(error).startswith("data."):
            raise
        raise ValueError(of_source(settings, str(error))) from error
    if source.kind != "pictures":
        return train, test
    train, test = match_channels(train, test)
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(
            f"data.source {settings.source!r}: training and test images must have one height x "
            f"width, got {'x'.join(map(str, train.shape[2:]))} and "
            f"{'x'.join(map(str, test.shape[2:]))}: give one with data.resize, such as "
            f"data.resize={min(train.shape[2], test.shape[2])}"
        )
    return train, test


@cache
def _tell(note: str) -> None:
    """Log a note once in a process: a study loads the same data for every run."""
    log.warning(note)


def _repetitions(
    inputs: Float32[np.ndarray, "train_rows *shape"],
    test_inputs: Float32[np.ndarray, "test_rows *shape"],
    split: RowSplit,
    source: Source,
    settings: DataSettings,
) -> list[str]:
    """Say which rows to learn or choose from show the very input of a row they are judged on."""
    same = "show the same picture" if source.kind == "pictures" else f"have the same {source.kind}"
    # Hashes of the inputs, so that no second copy of them is in memory.
    public, validation, private = np.split(
        np.array([hash(row.tobytes()) for row in inputs], dtype=np.int64),
        np.cumsum([len(split.public), len(split.validation)]),
    )
    test = np.array([hash(row.tobytes()) for row in test_inputs], dtype=np.int64)
    notes = []
    for name, rows, other, held_out in (
        ("private", private, "test", test),
        ("public", public, "test", test),
        ("private", private, "validation", validation),
        ("validation", validation, "test", test),
    ):
        count = int(np.isin(rows, held_out).sum())
        if count:
            notes.append(
                f"data.source {settings.source!r}: {count} of {len(rows)} {name} rows {same} "
                f"as a {other} row"
            )
    return notes


def _channel_statistics(
    inputs: Float32[np.ndarray, "rows channels *sides"],
) -> tuple[Float32[np.ndarray, "channels"], Float32[np.ndarray, "channels"]]:
    # Double precision: single loses digits over many millions of pixels.
    axes = (0, *range(2, inputs.ndim))
    mean = inputs.mean(axis=axes, dtype=np.float64)
    std = inputs.std(axis=axes, dtype=np.float64)
    std[std == 0] = 1.0  # a channel without any contrast stays at 0
    return mean.astype(np.float32), std.astype(np.float32)


def _with_rows(table: dict[str, Any], together: np.ndarray, counts: np.ndarray) -> FederatedData:
    """Return the data that was taken apart to travel."""
    rows = tuple(np.split(together, np.cumsum(counts)[:-1])) if len(counts) else ()
    return FederatedData(client_rows=rows, **table)
