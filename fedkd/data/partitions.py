"""Deal the private rows to the clients.

Ways that flwr-datasets has, too, are its own row for row: a seed gives the parts that its
partitioners give. They stand here in NumPy because importing it takes seconds (datasets, seaborn,
pandas), and what it would do here is cut one array of labels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int64

from fedkd import own_code
from fedkd.bounds import shown
from fedkd.data.natural_ids import Dealt, ReadIds, deal_by_id
from fedkd.data.partition_settings import (
    DirichletPartition,
    DominantPartition,
    IidPartition,
    InnerDirichletPartition,
    NaturalPartition,
    NWayPartition,
    OwnPartition,
    PartitionSettings,
    PathologicalPartition,
    PowerLawPartition,
    QuantityPartition,
    ScarcePartition,
    ShardPartition,
)
from fedkd.data.room import FewRowsError
from fedkd.randomness import seeded_for

Rows = Int64[np.ndarray, "_"]


def deal_rows(
    labels: Int64[np.ndarray, "rows"],
    settings: PartitionSettings,
    *,
    num_clients: int,
    rng: np.random.Generator,
    private: Int64[np.ndarray, "rows"],
    ids: ReadIds,
) -> Dealt:
    """Deal the private rows to the clients, by their labels or by whose they are.

    Args:
        labels: class of each private row.
        settings: kind of partition and its parameters.
        num_clients: how many parts.
        rng: decides the parts; the same state gives the same parts.
        private: which of the source's training rows they are.
        ids: reads whose each of the source's training rows is.

    Raises:
        ValueError: if the rows cannot be dealt as asked; names the setting and what would work.
    """
    if not isinstance(settings, NaturalPartition):
        return Dealt(partition_rows(labels, settings, num_clients=num_clients, rng=rng))
    _check_feasible(labels, settings, num_clients)
    of_all = ids(settings.named_column)
    return deal_by_id(of_all.of(private), settings, num_clients=num_clients, rng=rng)


def partition_rows(
    labels: Int64[np.ndarray, "rows"],
    settings: PartitionSettings,
    *,
    num_clients: int,
    rng: np.random.Generator,
) -> tuple[Int64[np.ndarray, "_"], ...]:
    """Return the rows of each client: sorted, disjoint, at least ``settings.min_rows`` of them.

    ``iid``, ``dirichlet``, ``quantity`` and ``power_law`` deal every row. ``pathological`` leaves
    out the classes that nobody was given (possible with few clients), ``shard`` the remainder that
    fills no shard, ``inner_dirichlet`` what sizes do not ask for; ``scarce`` what it cuts,
    ``dominant`` and ``n_way`` what nobody's classes ask for.

    Args:
        labels: class of each private row.
        settings: kind of partition and its parameters; not ``natural``, which needs ids.
        num_clients: how many parts.
        rng: decides the parts; the same state gives the same parts.

    Raises:
        ValueError: if the rows cannot be dealt as asked; names the setting and what would work.

    Source:
        dirichlet: Yurochkin et al., 2019. https://arxiv.org/abs/1905.12022
        pathological (first class dealt in turn, so that all classes are held where the clients
        suffice), quantity: Li et al., 2021. https://arxiv.org/abs/2102.02079
        shard: McMahan et al., 2017. https://arxiv.org/abs/1602.05629
        inner_dirichlet: Hsu et al., 2019, https://arxiv.org/abs/1909.06335, as dealt by Acar et
        al., 2021. https://arxiv.org/abs/2111.04263
        scarce: Jeong et al., 2018, section 4. https://arxiv.org/abs/1811.11479
        dominant: Kalra et al., 2023, https://arxiv.org/abs/2111.11343, as dealt by its code
        n_way: Tan et al., 2022, https://arxiv.org/abs/2105.00243, as dealt by its code
    """
    _check_feasible(labels, settings, num_clients)
    # Classes are cut into consecutive pieces, so the order decides who gets which row.
    order = rng.permutation(len(labels))

    sizes: list[int] = []
    # Shares are random, so another draw may satisfy ``min_rows`` where the first did not.
    for _ in range(settings.most_draws):
        parts = _deal(
            labels[order], settings, num_clients, np.random.default_rng(int(rng.integers(2**31)))
        )
        sizes = [len(part) for part in parts]
        if min(sizes) >= settings.min_rows:
            return tuple(np.sort(order[part]) for part in parts)
    raise FewRowsError(_too_small(sizes, settings))


def _check_feasible(
    labels: Int64[np.ndarray, "rows"], settings: PartitionSettings, num_clients: int
) -> None:
    if num_clients < 1:
        raise ValueError(f"clients.count must be >= 1, got {num_clients}")
    rows = len(labels)
    if num_clients > rows:
        raise FewRowsError(
            f"clients.count must be at most the {rows} private rows, got {num_clients}: lower it, "
            "or raise data.private_rows or lower data.public.size"
        )
    if num_clients * settings.min_rows > rows:
        raise FewRowsError(
            f"data.partition.min_rows must be at most {rows // num_clients} for {num_clients} "
            f"clients and {rows} private rows, got {settings.min_rows}"
        )
    held_classes = len(np.unique(labels))
    match settings:
        case PathologicalPartition() if settings.classes_per_client > held_classes:
            raise ValueError(
                "data.partition.classes_per_client must be at most the "
                f"{held_classes} classes of the private rows, got {settings.classes_per_client}"
            )
        case ShardPartition() if settings.shards_per_client * num_clients > rows:
            raise ValueError(
                f"data.partition.shards_per_client must be at most {rows // num_clients} for "
                f"{num_clients} clients and {rows} private rows, got {settings.shards_per_client}"
            )
        case ScarcePartition() | DominantPartition() if (settings.rows or 0) * num_clients > rows:
            raise ValueError(
                f"data.partition.rows must be at most {rows // num_clients} for {num_clients} "
                f"clients and {rows} private rows, got {settings.rows}"
            )
        case ScarcePartition() if settings.classes > held_classes:
            raise ValueError(
                f"data.partition.classes must be at most the {held_classes} classes of the "
                f"private rows, got {settings.classes}"
            )
        case NWayPartition() if settings.ways > held_classes:
            raise ValueError(
                f"data.partition.ways must be at most the {held_classes} classes of the private "
                f"rows, got {settings.ways}"
            )
        case InnerDirichletPartition() if settings.sizes is not None:
            if len(settings.sizes) != num_clients:
                raise ValueError(
                    f"data.partition.sizes must have one size for each of the {num_clients} "
                    f"clients (clients.count), got {len(settings.sizes)}"
                )
            if sum(settings.sizes) > rows:
                raise ValueError(
                    f"data.partition.sizes must add up to at most the {rows} private rows, got "
                    f"{sum(settings.sizes)}"
                )


def _deal(
    labels: Int64[np.ndarray, "rows"],
    settings: PartitionSettings,
    num_clients: int,
    rng: np.random.Generator,
) -> Sequence[Rows]:
    match settings:
        case IidPartition():
            return np.array_split(np.arange(len(labels)), num_clients)
        case DirichletPartition():
            return dirichlet_parts(labels, num_clients, alpha=settings.alpha, rng=rng)
        case PathologicalPartition():
            return pathological_parts(
                labels, num_clients, classes_per_client=settings.classes_per_client, rng=rng
            )
        case ShardPartition():
            return shard_parts(
                labels, num_clients, shards_per_client=settings.shards_per_client, rng=rng
            )
        case QuantityPartition():
            return quantity_parts(len(labels), num_clients, alpha=settings.alpha, rng=rng)
        case PowerLawPartition():
            return power_law_parts(len(labels), num_clients, exponent=settings.exponent)
        case InnerDirichletPartition():
            even = [len(part) for part in np.array_split(np.arange(len(labels)), num_clients)]
            return inner_dirichlet_parts(
                labels, settings.sizes or even, alpha=settings.alpha, rng=rng
            )
        case ScarcePartition():
            return scarce_parts(labels, num_clients, settings, rng=rng)
        case DominantPartition():
            return dominant_parts(labels, num_clients, settings, rng=rng)
        case NWayPartition():
            return n_way_parts(labels, num_clients, settings, rng=rng)
        case OwnPartition():
            return own_parts(labels, num_clients, settings, rng=rng)
    raise ValueError(f"data.partition.kind {settings.kind!r} does not deal rows by their labels")


def dirichlet_parts(
    labels: Int64[np.ndarray, "rows"], num_clients: int, *, alpha: float, rng: np.random.Generator
) -> Sequence[Rows]:
    """Cut the rows of each class into consecutive pieces with shares from Dirichlet(alpha).

    Examples:
        >>> import numpy as np
        >>> from fedkd.data.partitions import dirichlet_parts
        >>> labels = np.repeat(np.arange(10), 100)
        >>> parts = dirichlet_parts(labels, 3, alpha=0.1, rng=np.random.default_rng(0))
        >>> sum(len(rows) for rows in parts)  # every row has one owner
        1000
    """
    pieces: list[list[Rows]] = [[] for _ in range(num_clients)]
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        shares = rng.dirichlet(np.full(num_clients, alpha))
        ends = (np.cumsum(shares) * len(rows)).astype(int)[:-1]
        for part, piece in zip(pieces, np.split(rows, ends), strict=True):
            part.append(piece)
    return [np.concatenate(part) for part in pieces]


def pathological_parts(
    labels: Int64[np.ndarray, "rows"],
    num_clients: int,
    *,
    classes_per_client: int,
    rng: np.random.Generator,
) -> Sequence[Rows]:
    """Give each client its classes, the first in turn and the others by lot, in equal pieces.

    Raises:
        ValueError: if a class has fewer rows than clients to hold it.
    """
    classes = np.unique(labels)
    held: list[list[int]] = []
    for client in range(num_clients):
        own = [int(classes[client % len(classes)])]
        while len(own) < classes_per_client:
            drawn = int(rng.choice(classes, size=1)[0])
            if drawn not in own:
                own.append(drawn)
        held.append(own)

    pieces: list[list[Rows]] = [[] for _ in range(num_clients)]
    for label in classes:
        rows = np.flatnonzero(labels == label)
        holders = [client for client, own in enumerate(held) if label in own]
        if len(holders) > len(rows):
            raise ValueError(
                f"data.partition cannot be dealt: {len(holders)} clients are to hold class "
                f"{label}, which has {len(rows)} private rows. Use fewer clients, fewer "
                "data.partition.classes_per_client, or more private rows"
            )
        if holders:
            for client, piece in zip(holders, np.array_split(rows, len(holders)), strict=True):
                pieces[client].append(piece)
    return [np.concatenate(part) for part in pieces]


def shard_parts(
    labels: Int64[np.ndarray, "rows"],
    num_clients: int,
    *,
    shards_per_client: int,
    rng: np.random.Generator,
) -> Sequence[Rows]:
    """Sort the rows by class, cut them into equal shards and deal these by lot.

    Examples:
        >>> import numpy as np
        >>> from fedkd.data.partitions import shard_parts
        >>> labels = np.array([0, 0, 1, 1, 2, 2, 3, 3])
        >>> parts = shard_parts(labels, 2, shards_per_client=2, rng=np.random.default_rng(0))
        >>> [len(set(labels[rows])) for rows in parts]  # classes of each client
        [2, 2]
    """
    in_order = np.argsort(labels, kind="stable")
    needed = num_clients * shards_per_client
    size = len(labels) // needed
    # More shards than needed fit where the remainder is long; the lot decides among them all.
    drawn = rng.permutation(len(labels) // size)[:needed]
    shards = in_order[: len(labels) // size * size].reshape(-1, size)
    return list(shards[drawn].reshape(num_clients, -1))


def quantity_parts(
    rows: int, num_clients: int, *, alpha: float, rng: np.random.Generator
) -> Sequence[Rows]:
    """Cut all rows, whatever their class, into pieces with shares from Dirichlet(alpha)."""
    shares = rng.dirichlet(np.full(num_clients, alpha))
    ends = (np.cumsum(shares) * rows).astype(int)[:-1]
    return np.split(np.arange(rows), ends)


def power_law_parts(rows: int, num_clients: int, *, exponent: float) -> Sequence[Rows]:
    """Cut all rows into pieces: client k has (k + 1)^exponent parts of the sum of these.

    Sizes are rounded down, and the last client, which has most, gets what is left over.
    """
    units = np.linspace(1, num_clients, num_clients) ** exponent
    sizes = (units / units.sum() * rows).astype(np.int64)
    return np.split(np.arange(rows), np.cumsum(sizes)[:-1])


def inner_dirichlet_parts(
    labels: Int64[np.ndarray, "rows"],
    sizes: Sequence[int],
    *,
    alpha: float,
    rng: np.random.Generator,
) -> Sequence[Rows]:
    """Fill clients of given sizes row by row: a client by lot, its class by its own Dirichlet draw.

    A class without rows left is drawn no more: the shares of the others grow in proportion, or are
    equal where a client had given them nothing.
    """
    classes = np.unique(labels)
    shares = rng.dirichlet(np.full(len(classes), alpha), size=len(sizes))
    waiting = [np.flatnonzero(labels == label) for label in classes]
    left = np.array([len(rows) for rows in waiting])
    parts = [np.zeros(size, dtype=np.int64) for size in sizes]
    places = list(sizes)
    # A full client leaves when it is drawn once more, as in flwr-datasets.
    filling, needed = list(range(len(sizes))), sum(sizes)
    ends = _cumulated(shares)
    while needed:
        client = filling[int(rng.integers(len(filling)))]
        if places[client] == 0:
            filling.remove(client)
            continue
        places[client] -= 1
        needed -= 1
        while left[drawn := int(np.searchsorted(ends[client], rng.random(), side="right"))] == 0:
            shares[:, drawn] = 0
            empty = shares.sum(axis=1) == 0
            shares[np.ix_(empty, left > 0)] = 1
            shares = shares / shares.sum(axis=1, keepdims=True)
            ends = _cumulated(shares)
        left[drawn] -= 1
        parts[client][places[client]] = waiting[drawn][left[drawn]]
    return parts


def _cumulated(shares: np.ndarray) -> np.ndarray:
    ends: np.ndarray = shares.cumsum(axis=1)
    ends /= ends[:, -1:]
    return ends


def scarce_parts(
    labels: Int64[np.ndarray, "rows"],
    num_clients: int,
    settings: ScarcePartition,
    *,
    rng: np.random.Generator,
) -> Sequence[Rows]:
    """Give each client as many rows, and let it keep but the first few of classes by lot."""
    rows = settings.rows or len(labels) // num_clients
    parts = []
    for part in np.arange(rows * num_clients).reshape(num_clients, rows):
        keep = np.ones(rows, dtype=bool)
        for label in rng.choice(np.unique(labels), settings.classes, replace=False):
            keep[np.flatnonzero(labels[part] == label)[settings.kept :]] = False
        parts.append(part[keep])
    return parts


def dominant_parts(
    labels: Int64[np.ndarray, "rows"],
    num_clients: int,
    settings: DominantPartition,
    *,
    rng: np.random.Generator,
) -> Sequence[Rows]:
    """Fill each client from one class, by lot among those with enough rows left, then from others.

    Raises:
        ValueError: if no class, or not the others together, have as many rows left as a client is
            to hold.
    """
    rows = settings.rows or len(labels) // num_clients
    of_class = int(settings.share * rows)
    classes = np.unique(labels)
    free = np.ones(len(labels), dtype=bool)
    parts = []
    for client in range(num_clients):
        left = np.array([np.count_nonzero(labels[free] == label) for label in classes])
        enough = (left >= of_class) & (left.sum() - left >= rows - of_class)
        if not enough.any():
            raise ValueError(
                f"data.partition cannot be dealt: client {client} is to hold {of_class} rows of "
                f"one class and {rows - of_class} of others, and of the classes "
                f"{', '.join(map(str, left))} rows are left. Use fewer clients, fewer "
                "data.partition.rows, another data.partition.share, or more private rows"
            )
        own = labels == rng.choice(classes[enough])
        part = np.concatenate(
            [np.flatnonzero(free & own)[:of_class], np.flatnonzero(free & ~own)[: rows - of_class]]
        )
        free[part] = False
        parts.append(part)
    return parts


def n_way_parts(
    labels: Int64[np.ndarray, "rows"],
    num_clients: int,
    settings: NWayPartition,
    *,
    rng: np.random.Generator,
) -> Sequence[Rows]:
    """Give each client its next rows of each of its classes, which and how many by lot.

    Raises:
        ValueError: if a class has fewer rows than its holders are to have.
    """
    classes = np.unique(labels)
    fewest = max(min(settings.ways, 2), settings.ways - settings.spread)
    most = min(len(classes), settings.ways + settings.spread)
    held = [
        rng.choice(classes, int(number), replace=False)
        for number in rng.integers(fewest, most + 1, num_clients)
    ]
    pieces: list[list[Rows]] = [[] for _ in range(num_clients)]
    for label in classes:
        rows = np.flatnonzero(labels == label)
        holders = [client for client, own in enumerate(held) if label in own]
        if len(holders) * settings.shots > len(rows):
            raise ValueError(
                f"data.partition cannot be dealt: {len(holders)} clients are to hold "
                f"{settings.shots} rows each of class {label}, which has {len(rows)} private rows. "
                "Use fewer clients, fewer data.partition.shots, or more private rows"
            )
        for place, client in enumerate(holders):
            pieces[client].append(rows[place * settings.shots :][: settings.shots])
    return [np.concatenate(piece) for piece in pieces]


def own_parts(
    labels: Int64[np.ndarray, "rows"],
    num_clients: int,
    settings: OwnPartition,
    *,
    rng: np.random.Generator,
) -> Sequence[Rows]:
    """Let a function of one's own deal the rows, and check what it returns.

    It is called as ``function(labels, num_clients=..., rng=..., **options)`` and returns for each
    client the rows it holds, as places in ``labels``: whole numbers in any order, no row twice. It
    gets a copy of the labels, and whatever it draws from Python's, NumPy's or torch's global
    generators follows from the seed as well.

    Raises:
        ValueError: if it is no function, or returns anything else; names the client.
    """
    setting = "data.partition.kind"
    function: Any = own_code.load(settings.kind, setting)
    if not callable(function):
        raise ValueError(
            f"{setting} {settings.kind!r} must name a function, got a {type(function).__name__}"
        )
    with seeded_for(own_code=True, seed=int(rng.integers(2**31))):
        try:
            returned = function(labels.copy(), num_clients=num_clients, rng=rng, **settings.options)
        # Somebody else's code may fail in any way; the message must still say which it was.
        except Exception as error:
            told = own_code.told(error, settings.kind)
            raise ValueError(f"{setting} {settings.kind!r} failed: {told}") from error
    where = f"{setting} {settings.kind!r} must return"
    try:
        parts = [np.asarray(part) for part in returned]
    except (TypeError, ValueError):
        raise ValueError(f"{where} a list of rows for each client, got {shown(returned)}") from None
    if len(parts) != num_clients:
        raise ValueError(
            f"{where} rows for each of the {num_clients} clients (clients.count), got "
            f"{len(parts)} parts"
        )
    for client, part in enumerate(parts):
        if part.ndim != 1 or (part.size and not np.issubdtype(part.dtype, np.integer)):
            raise ValueError(
                f"{where} a list of whole numbers for each client, got {shown(part)} for client "
                f"{client}"
            )
        outside = part[(part < 0) | (part >= len(labels))]
        if outside.size:
            raise ValueError(
                f"{where} rows from 0 to {len(labels) - 1}, got {outside[0]} for client {client}"
            )
    holders = np.zeros(len(labels), dtype=np.int64)
    for part in parts:
        np.add.at(holders, part.astype(np.int64), 1)
    if holders.max(initial=0) > 1:
        twice = int(holders.argmax())
        named = [client for client, part in enumerate(parts) if twice in part]
        raise ValueError(f"{where} each row at most once, got row {twice} for clients {named}")
    return [part.astype(np.int64) for part in parts]


def _too_small(sizes: list[int], settings: PartitionSettings) -> str:
    short = [client for client, size in enumerate(sizes) if size < settings.min_rows]
    named = ", ".join(f"client {client} ({sizes[client]})" for client in short[:8])
    if len(short) > 8:
        named += f" and {len(short) - 8} more"
    remedy = settings.remedy.format(**settings.model_dump())
    return (
        f"data.partition ({settings.kind}) gives {len(short)} of {len(sizes)} clients fewer rows "
        f"than data.partition.min_rows={settings.min_rows}: {named}. "
        f"Use {f'{remedy}, ' if remedy else ''}fewer clients, more private rows, or a smaller "
        "data.partition.min_rows"
    )
