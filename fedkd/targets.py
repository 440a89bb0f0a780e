"""Many predictions -> one target: what a student is asked to agree with.

Everything is computed in float64 inside the averages and returned in float32 or wider, so half
precision uploads lose nothing further. Averages of probabilities, of logits and entropy reduction
are different targets; each has its own name and none is a default for another.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


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

    Holds one table of rows x classes however many clients there are. Sums in float64 in call
    order, so the same calls in the same order give the same bits.
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
        table = self._as_table(values)
        # No later subtraction could take a NaN out of the sum again.
        if not np.isfinite(table).all():
            raise ValueError("values must be finite, got NaN or infinity")
        if self._sum is None:
            self._sum = np.zeros_like(table)
        self._sum += weight * table
        self._total_weight += weight
        self._count += 1

    def mean(self) -> Float[Tensor, "rows classes"]:
        """Return the weighted mean of all contributions, float64 on the CPU.

        Raises:
            ValueError: if nothing was added.
        """
        if self._sum is None:
            raise ValueError("mean needs at least 1 contribution, got 0")
        return torch.from_numpy(self._sum / self._total_weight)

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
        others = (self._sum - weight * self._as_table(values)) / others_weight
        return torch.from_numpy(others)

    def _as_table(
        self, values: Float[np.ndarray, "rows classes"] | Float[Tensor, "rows classes"]
    ) -> Float[np.ndarray, "rows classes"]:
        if isinstance(values, Tensor):
            values = values.detach().cpu().double().numpy()
        table = np.asarray(values, dtype=np.float64)
        if table.size == 0:
            raise ValueError(f"values must have at least 1 row and 1 class, got {table.shape}")
        if self._sum is not None and table.shape != self._sum.shape:
            raise ValueError(f"values must have shape {self._sum.shape}, got {table.shape}")
        return table


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
