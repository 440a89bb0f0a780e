"""Many predictions -> one target: what a student is asked to agree with.

Everything is computed in float64 inside the averages and returned in float32 or wider, so half
precision uploads lose nothing further. Averages of probabilities, of logits and entropy reduction
are different targets; each has its own name and none is a default for another.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

BLOCK_VALUES = 2**17
"""Values that are worked on at a time: 1 MiB in float64, what a core's own cache holds."""


def check_temperature(temperature: float, name: str = "temperature") -> None:
    """Refuse a softening divisor that is not a positive finite number.

    Raises:
        ValueError: naming the setting ``name`` and the value it got.
    """
    if not temperature > 0:
        raise ValueError(f"{name} must be > 0, got {temperature}")
    if math.isinf(temperature):
        raise ValueError(f"{name} must be finite, got {temperature}")


def at_least_float32(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Widen half precision: logarithms and sums of float16 are too coarse for a loss."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def soften(
    logits: Float[Tensor, "*batch classes"], *, temperature: float
) -> Float[Tensor, "*batch classes"]:
    """Turn logits into class probabilities, ``softmax(logits / temperature)``.

    Args:
        logits: unnormalised scores.
        temperature: softening divisor, > 0; above 1 flattens, below 1 sharpens.

    Raises:
        ValueError: if ``temperature`` is not positive and finite.
    """
    check_temperature(temperature)
    return torch.softmax(at_least_float32(logits) / temperature, dim=-1)


def mean_probability(
    logits: Float[Tensor, "clients rows classes"],
    *,
    temperature: float = 1.0,
    weights: Sequence[int | float] | None = None,
) -> Float[Tensor, "rows classes"]:
    """Average the clients' softened class probabilities for each row.

    Args:
        logits: unnormalised scores of every client on the same rows.
        temperature: softening divisor, > 0, applied before the average.
        weights: one positive number per client, such as its example count; None is equal.

    Raises:
        ValueError: if ``temperature`` or ``weights`` is out of range.
    """
    return _weighted_mean(soften(logits, temperature=temperature), weights)


def mean_logit(
    logits: Float[Tensor, "clients rows classes"], *, weights: Sequence[int | float] | None = None
) -> Float[Tensor, "rows classes"]:
    """Average the clients' logits for each row; soften the result to get a target.

    Not the same target as `mean_probability`: one very confident client weighs more here.

    Args:
        logits: unnormalised scores of every client on the same rows.
        weights: one positive number per client; None is equal.

    Raises:
        ValueError: if ``weights`` is out of range.

    Source:
        Li and Wang, 2019, Algorithm 1 (consensus). https://arxiv.org/abs/1910.03581
    """
    return _weighted_mean(logits, weights)


def leave_one_out(
    values: Float[Tensor, "clients rows classes"], *, weights: Sequence[int | float] | None = None
) -> Float[Tensor, "clients rows classes"]:
    """Give every client the mean of the OTHER clients' values, so none learns from itself.

    Args:
        values: probabilities or logits of every client on the same rows, finite.
        weights: one positive number per client; None is equal.

    Returns:
        At index k, the weighted mean over all clients but k.

    Raises:
        ValueError: if there are fewer than two clients or ``weights`` is out of range.

    Source:
        Jeong et al., 2018, Algorithm 1, line 15. https://arxiv.org/abs/1811.11479
    """
    num_clients = len(values)
    if num_clients < 2:
        raise ValueError(f"leave-one-out needs at least 2 clients, got {num_clients}")
    client_weights = _client_weights(weights, num_clients, values.device)[:, None, None]
    weighted = client_weights * values.double()
    # The very terms that were summed are taken out again: a rounded sum of numbers >= 0 is never
    # below one of them, so probabilities stay >= 0 and keep a logarithm.
    others = (weighted.sum(dim=0) - weighted) / (client_weights.sum() - client_weights)
    return others.to(at_least_float32(values).dtype)


def coordinate_median(
    values: Float[Tensor, "clients rows classes"],
) -> Float[Tensor, "rows classes"]:
    """Take the median over the clients of every score; fewer than half of them cannot move it far.

    The median of an even number is the mean of the two in the middle. Medians of probabilities
    need not sum to 1.

    Args:
        values: finite probabilities or logits of every client on the same rows.

    Returns:
        On the CPU, whatever the order of the clients the same bits.

    Raises:
        ValueError: if there is no client.

    Source:
        Yin, Chen, Ramchandran, Bartlett, 2018, Definition 1. https://arxiv.org/abs/1803.01498
    """
    return _mean_of_the_middle(values, drop=(len(values) - 1) // 2)


def trimmed_mean(
    values: Float[Tensor, "clients rows classes"], *, trim: float
) -> Float[Tensor, "rows classes"]:
    """Average every score over the clients without the largest and the smallest ones.

    Args:
        values: finite probabilities or logits of every client on the same rows.
        trim: fraction of the clients left out at EACH end, in [0, 0.5), rounded down to whole
            clients; it withstands as many liars as it leaves out at an end.

    Returns:
        On the CPU, whatever the order of the clients the same bits.

    Raises:
        ValueError: if there is no client or ``trim`` is out of range.

    Source:
        Yin, Chen, Ramchandran, Bartlett, 2018, Definition 2. https://arxiv.org/abs/1803.01498
    """
    if not 0 <= trim < 0.5:
        raise ValueError(f"trim must be in [0, 0.5), got {trim}")
    # 0.29 of 100 clients are 29, although the product is 28.999999999999996.
    return _mean_of_the_middle(values, drop=int(trim * len(values) + 1e-9))


def _mean_of_the_middle(
    values: Float[Tensor, "clients rows classes"], drop: int
) -> Float[Tensor, "rows classes"]:
    """Average every score over the clients but the ``drop`` largest and ``drop`` smallest."""
    num_clients = len(values)
    if num_clients == 0:
        raise ValueError("a robust mean needs at least 1 client, got 0")
    wide = at_least_float32(values.detach().cpu())
    # NumPy sorts floats with vector instructions: several times as fast as torch.
    ordered = np.sort(wide.numpy(), axis=0)
    total = np.zeros(ordered.shape[1:])
    # One client after the other: a library's sum may split rows differently with their number,
    # and a chunk of rows has to give the bits of the whole.
    for table in ordered[drop : num_clients - drop]:
        total += table
    total /= num_clients - 2 * drop
    return torch.from_numpy(total).to(wide.dtype)


def entropy_reduction(
    mean_probability: Float[Tensor, "rows classes"], *, temperature: float
) -> Float[Tensor, "rows classes"]:
    """Sharpen an averaged target: softmax of the mean PROBABILITIES over ``temperature``.

    A deliberate softmax of probabilities, not of logits. A low temperature counters the high
    entropy of an average over clients that saw different classes.

    Args:
        mean_probability: averaged class probabilities, each row summing to 1.
        temperature: > 0; the paper uses 0.1. At 1 the result is flatter than its input.

    Raises:
        ValueError: if ``temperature`` is not positive and finite.

    Source:
        Itahara et al., 2020, DS-FL with ERA. https://arxiv.org/abs/2008.06180
    """
    return soften(mean_probability, temperature=temperature)


def confidence(target: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows"]:
    """Return the probability of each row's most likely class, in [1/classes, 1]."""
    return at_least_float32(target).amax(dim=-1)


def confidence_mask(
    target: Float[Tensor, "rows classes"], threshold: float
) -> Float[Tensor, "rows"]:
    """Mark with 1 the rows whose `confidence` is at least ``threshold``, with 0 the others.

    Meant as ``sample_weights`` of a loss, which then divides by the number of rows kept.

    Args:
        target: class probabilities.
        threshold: >= 0; 0 keeps every row, above 1 keeps none.

    Raises:
        ValueError: if ``threshold`` is negative or NaN.
    """
    if not threshold >= 0:
        raise ValueError(f"confidence threshold must be >= 0, got {threshold}")
    row_confidence = confidence(target)
    return (row_confidence >= threshold).to(row_confidence.dtype)


def entropy(probabilities: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows"]:
    """Return each row's entropy in nats, from 0 (one class) to log(classes) (uniform)."""
    terms: Tensor = torch.special.entr(at_least_float32(probabilities))
    return terms.sum(dim=-1)


class StreamingMean:
    """Weighted mean of predictions that arrive one client at a time.

    Holds one table of rows x classes however many clients there are, and a block of working
    space. Sums in float64 in call order, so the same calls in the same order give the same bits.
    """

    def __init__(self) -> None:
        self._sum: Float[np.ndarray, "rows classes"] | None = None
        self._total_weight = 0.0
        self._count = 0

    @property
    def count(self) -> int:
        """Number of contributions added so far."""
        return self._count

    def add(
        self,
        values: Float[np.ndarray, "rows classes"] | Float[Tensor, "rows classes"],
        weight: int | float = 1.0,
    ) -> None:
        """Fold in one client's probabilities or logits.

        Args:
            values: finite, with the shape of all earlier contributions.
            weight: positive number, such as the client's example count.

        Raises:
            ValueError: if ``weight`` is out of range, a value is not finite, or the shape differs;
                the mean is then as it was before the call.
        """
        _check_weight(weight)
        table = _as_table(values)
        self._check_shape(table)
        # Before anything is added: no later subtraction could take a NaN out of the sum again.
        _check_finite(table)
        if self._sum is None:
            self._sum = np.zeros(table.shape)
        terms = _block_buffer(table)
        for rows in _row_blocks(table):
            block = self._sum[rows]
            block += _weighted(table[rows], weight, terms)
        self._total_weight += weight
        self._count += 1

    def mean(self) -> Float[Tensor, "rows classes"]:
        """Return the weighted mean of all contributions, float64 on the CPU.

        Raises:
            ValueError: if nothing was added.
        """
        return torch.from_numpy(self._nonempty_sum() / self._total_weight)

    def pop_mean(self) -> Float[Tensor, "rows classes"]:
        """Return the mean rounded to float32 and forget all contributions.

        The same bits as ``mean().float()``, without a second table: the result takes over the
        memory of the sum and gives half of it back.

        Raises:
            ValueError: if nothing was added.
        """
        total, weight = self._nonempty_sum(), self._total_weight
        self._sum, self._total_weight, self._count = None, 0.0, 0
        return torch.from_numpy(_divided_in_place(total, weight))

    def without(
        self,
        values: Float[np.ndarray, "rows classes"] | Float[Tensor, "rows classes"],
        weight: int | float = 1.0,
    ) -> Float[Tensor, "rows classes"]:
        """Return the mean of the others, given one's own earlier contribution; changes nothing.

        Args:
            values: exactly what this client passed to `add`.
            weight: exactly the weight it was added with.

        Returns:
            Row k of `leave_one_out`, float64 on the CPU.

        Raises:
            ValueError: if fewer than two contributions were added, or ``weight`` or the shape
                cannot be that of an earlier one.
        """
        _check_weight(weight)
        if self._sum is None or self._count < 2:
            raise ValueError(f"leave-one-out needs at least 2 contributions, got {self._count}")
        others_weight = self._total_weight - weight
        if others_weight <= 0:
            raise ValueError(
                f"weight must be below the total of all contributions ({self._total_weight}), "
                f"got {weight}"
            )
        table = _as_table(values)
        self._check_shape(table)
        others = np.empty(table.shape)
        terms = _block_buffer(table)
        for rows in _row_blocks(table):
            block = others[rows]
            np.subtract(self._sum[rows], _weighted(table[rows], weight, terms), out=block)
            block /= others_weight
        return torch.from_numpy(others)

    def _nonempty_sum(self) -> Float[np.ndarray, "rows classes"]:
        if self._sum is None:
            raise ValueError("mean needs at least 1 contribution, got 0")
        return self._sum

    def _check_shape(self, table: Float[np.ndarray, "rows classes"]) -> None:
        if self._sum is not None and table.shape != self._sum.shape:
            raise ValueError(f"values must have shape {self._sum.shape}, got {table.shape}")


class PredictionSpool:
    """Predictions of many clients, kept in a file without a name and read back some rows at a time.

    For rules that need all clients at once, such as `coordinate_median`: memory is one chunk of
    rows of every client, whatever the number of rows. The file vanishes with the process.
    """

    def __init__(self, folder: Path | None = None, *, chunk_bytes: int = 2**25) -> None:
        """Open an empty spool.

        Args:
            folder: where its file lives; None is the system's temporary folder.
            chunk_bytes: memory for the rows that are read back at a time, at least one of them.
        """
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._chunk_bytes = chunk_bytes
        self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        self._shape: tuple[int, ...] | None = None
        self._dtype = np.dtype(np.float32)
        self._count = 0

    @property
    def count(self) -> int:
        """Number of contributions added so far."""
        return self._count

    def add(
        self, values: Float[np.ndarray, "rows classes"] | Float[Tensor, "rows classes"]
    ) -> None:
        """Append one client's probabilities or logits; half precision is widened to float32.

        Args:
            values: finite, with the shape and precision of all earlier contributions.

        Raises:
            ValueError: if a value is not finite, or the shape or precision differs.
            OSError: where the folder has no room left. In either case the spool is as before.
        """
        table = _as_table(values)
        dtype = np.promote_types(table.dtype, np.float32)
        if self._shape is not None and (table.shape, dtype) != (self._shape, self._dtype):
            raise ValueError(
                f"values must be {self._dtype} of shape {self._shape}, "
                f"got {dtype} of shape {table.shape}"
            )
        _check_finite(table)
        try:
            self._file.seek(self._count * table.size * dtype.itemsize)
            for rows in _row_blocks(table):
                self._file.write(np.ascontiguousarray(table[rows], dtype).data)
            self._file.flush()
        except OSError as error:
            raise OSError(
                error.errno,
                f"cannot keep the clients' predictions in {str(self._folder)!r}: {error.strerror}; "
                "the environment variable TMPDIR names another folder",
            ) from None
        self._shape, self._dtype = table.shape, dtype
        self._count += 1

    def reduce(
        self,
        rule: Callable[[Float[Tensor, "clients rows classes"]], Float[Tensor, "rows classes"]],
    ) -> Float[Tensor, "rows classes"]:
        """Return what ``rule`` makes of all contributions, in the order they were added.

        Args:
            rule: must treat every row on its own, such as `coordinate_median`.

        Raises:
            ValueError: if nothing was added.
        """
        if self._shape is None:
            raise ValueError("a robust mean needs at least 1 contribution, got 0")
        rows, classes = self._shape
        row_bytes = classes * self._dtype.itemsize
        height = min(rows, max(1, self._chunk_bytes // (self._count * row_bytes)))
        chunk = np.empty((self._count, height, classes), self._dtype)
        reduced = torch.empty((rows, classes), dtype=torch.from_numpy(chunk).dtype)
        for start in range(0, rows, height):
            taken = min(height, rows - start)
            for client in range(self._count):
                self._file.seek((client * rows + start) * row_bytes)
                if self._file.readinto(chunk[client, :taken].data) != taken * row_bytes:
                    raise OSError(f"a temporary file in {str(self._folder)!r} lost its end")
            reduced[start : start + taken] = rule(torch.from_numpy(chunk[:, :taken]))
        return reduced

    def close(self) -> None:
        """Give the file's space back."""
        self._file.close()

    def __enter__(self) -> "PredictionSpool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _as_table(
    values: Float[np.ndarray, "rows classes"] | Float[Tensor, "rows classes"],
) -> Float[np.ndarray, "rows classes"]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16; float32 holds it exactly.
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    if values.size == 0:
        raise ValueError(f"values must have at least 1 row and 1 class, got {values.shape}")
    return values


def _row_blocks(table: Float[np.ndarray, "rows classes"]) -> Iterator[slice]:
    """Cut the rows into blocks of about `BLOCK_VALUES` values, which a core's cache holds."""
    rows, classes = table.shape
    height = max(1, BLOCK_VALUES // classes)
    for start in range(0, rows, height):
        yield slice(start, min(start + height, rows))


def _block_buffer(table: Float[np.ndarray, "rows classes"]) -> Float[np.ndarray, "height classes"]:
    """Return working space for one of `_row_blocks`."""
    rows, classes = table.shape
    return np.empty((min(rows, max(1, BLOCK_VALUES // classes)), classes))


def _weighted(
    block: Float[np.ndarray, "rows classes"],
    weight: int | float,
    buffer: Float[np.ndarray, "height classes"],
) -> Float[np.ndarray, "rows classes"]:
    """Return ``weight * block`` in float64, in the buffer's memory."""
    terms = buffer[: len(block)]
    terms[:] = block
    if weight != 1:
        terms *= weight
    return terms


def _check_finite(table: Float[np.ndarray, "rows classes"]) -> None:
    for rows in _row_blocks(table):
        # Both ends are NaN where any value is, and no table of booleans is made.
        if not (np.isfinite(table[rows].min()) and np.isfinite(table[rows].max())):
            raise ValueError("values must be finite, got NaN or infinity")


def _divided_in_place(total: np.ndarray, divisor: int | float) -> np.ndarray:
    """Return ``total / divisor`` in float32, in the memory of ``total``, which is used up."""
    shape, size = total.shape, total.size
    wide = total.reshape(-1)
    narrow = wide.view(np.float32)
    for start in range(0, size, BLOCK_VALUES):
        block = slice(start, min(start + BLOCK_VALUES, size))
        # The quotient is a copy, and what is written of it ends before the next block begins.
        narrow[block] = wide[block] / divisor
    # A view would keep NumPy from giving back the half that is free now; its own check for views
    # also counts the frames of debuggers.
    del wide, narrow
    total.resize((size + 1) // 2, refcheck=False)
    return total.view(np.float32)[:size].reshape(shape)


def _check_weight(weight: int | float) -> None:
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(f"weight must be positive and finite, got {weight}")


def _client_weights(
    weights: Sequence[int | float] | None, num_clients: int, device: torch.device
) -> Float[Tensor, "clients"]:
    if weights is None:
        weights = [1.0] * num_clients
    if len(weights) != num_clients or not all(0 < weight < math.inf for weight in weights):
        raise ValueError(
            f"weights must be one positive finite number per client ({num_clients} clients), "
            f"got {list(weights)}"
        )
    return torch.tensor(weights, dtype=torch.float64, device=device)


def _weighted_mean(
    values: Float[Tensor, "clients rows classes"], weights: Sequence[int | float] | None
) -> Float[Tensor, "rows classes"]:
    if len(values) == 0:
        raise ValueError("a mean needs at least 1 client, got 0")
    client_weights = _client_weights(weights, len(values), values.device)
    shares = client_weights / client_weights.sum()
    mean = (shares[:, None, None] * values.double()).sum(dim=0)
    return mean.to(at_least_float32(values).dtype)
