"""Flatness: how far the weights may move before a model gets worse.

Everything works on a copy: the model that is asked about keeps its weights, buffers and mode bit
for bit. Moved weights shift activations, so BatchNorm's running statistics no longer fit them;
``batch_norm_inputs`` estimates them anew at every point, without which networks with BatchNorm
look sharper than they are.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Int, Num
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Inputs = Num[Tensor, "rows *input"]
Labels = Int[Tensor, " rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoisePoint:
    """What is left under weight noise of one size.

    Attributes:
        sigma: standard deviation of the noise, see `weight_noise_curve`.
        loss: mean cross-entropy in nats per row, averaged over draws.
        accuracy: in [0, 1], averaged over draws.
        loss_std, accuracy_std: standard deviation over draws (not of their mean); 0 for sigma 0.
        draws: how many.
    """

    sigma: float
    loss: float
    accuracy: float
    loss_std: float
    accuracy_std: float
    draws: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LinePoint:
    """Loss and accuracy at one place of a line through weight space, see `line_between`.

    Attributes:
        position: 0 is the first model, 1 a whole step towards the second.
        loss: mean cross-entropy in nats per row.
        accuracy: in [0, 1].
    """

    position: float
    loss: float
    accuracy: float


def weight_noise_curve(
    model: nn.Module,
    inputs: Inputs,
    labels: Labels,
    *,
    sigmas: Sequence[int | float],
    generator: torch.Generator,
    draws: int = 10,
    filter_normalized: bool = False,
    batch_norm_inputs: Num[Tensor, "others *input"] | None = None,
    batch_size: int = 256,
) -> list[NoisePoint]:
    """Return loss and accuracy after adding Gaussian noise to all parameters.

    The same directions serve every sigma, scaled by it, so the curve is a comparison within
    draws, and another sigma in the list does not change the others.

    Args:
        model: a classifier; left as it is.
        inputs: what it is judged on, in evaluation mode.
        labels: true class of each row.
        sigmas: standard deviations >= 0 of the noise, in units of the weights.
        generator: draws the noise; on the CPU the noise is the same for every device.
        draws: how many directions to average over, >= 1; below 10 the averages are rough.
        filter_normalized: give the noise of each filter (a parameter's first axis) the filter's
            own norm times sigma, so that scaling weights up where BatchNorm or the next layer
            takes it back does not make a model look flat. Biases and other vectors stay.
        batch_norm_inputs: training inputs to estimate BatchNorm's running statistics on after
            every move; None keeps the statistics that the model has.
        batch_size: rows in a forward pass, >= 1.

    Returns:
        One point for each sigma, in their order.

    Raises:
        ValueError: if there are no rows, ``draws`` or ``batch_size`` < 1, a sigma is negative or
            not finite, or statistics are to be estimated on fewer than 2 inputs.

    Source:
        Zhang, Xiang, Hospedales, Lu, 2018, section 3.5. https://arxiv.org/abs/1706.00384
        Li, Xu, Taylor, Studer, Goldstein, 2018, section 4. https://arxiv.org/abs/1712.09913
    """
    if draws < 1:
        raise ValueError(f"draws must be >= 1, got {draws}")
    for sigma in sigmas:
        if not 0 <= sigma < float("inf"):
            raise ValueError(f"sigmas must be >= 0 and finite, got {sigma}")
    probe = _Probe(model, inputs, labels, batch_norm_inputs, batch_size)
    results: list[list[tuple[float, float]]] = [[] for _ in sigmas]
    for _ in range(draws):
        noise = {
            name: torch.randn(
                weight.shape, generator=generator, device=generator.device, dtype=weight.dtype
            ).to(weight.device)
            for name, weight in probe.weights.items()
        }
        if filter_normalized:
            noise = filter_normalize(noise, probe.weights)
        for of_sigma, sigma in zip(results, sigmas, strict=True):
            of_sigma.append(probe.at(noise, float(sigma)))
    points = []
    for of_sigma, sigma in zip(results, sigmas, strict=True):
        values = torch.tensor(of_sigma, dtype=torch.float64)
        mean = values.mean(dim=0).tolist()
        spread = values.std(dim=0).tolist() if draws > 1 else [0.0, 0.0]
        points.append(
            NoisePoint(
                sigma=float(sigma),
                loss=mean[0],
                accuracy=mean[1],
                loss_std=spread[0],
                accuracy_std=spread[1],
                draws=draws,
            )
        )
    return points


def line_between(
    first: nn.Module,
    second: nn.Module,
    inputs: Inputs,
    labels: Labels,
    *,
    positions: Sequence[int | float],
    filter_normalized: bool = False,
    batch_norm_inputs: Num[Tensor, "others *input"] | None = None,
    batch_size: int = 256,
) -> list[LinePoint]:
    """Return loss and accuracy along the straight line from one model's weights to another's.

    A bump between two models is a barrier: they lie in different basins. Buffers, such as
    BatchNorm's running statistics, are interpolated like weights unless they are estimated anew.

    Args:
        first: the model at position 0; left as it is.
        second: a model of the same architecture, at position 1; left as it is.
        inputs: what points are judged on, in evaluation mode.
        labels: true class of each row.
        positions: any finite numbers; below 0 and above 1 lie beyond the models.
        filter_normalized: take each filter's direction towards the second model, but the first
            model's filter norm as its length; position 1 is then not the second model any more.
        batch_norm_inputs: as in `weight_noise_curve`; wanted here for all but linear networks.
        batch_size: rows in a forward pass, >= 1.

    Raises:
        ValueError: if the models differ in the names or shapes of their weights, there are no
            rows, ``batch_size`` < 1, or statistics are to be estimated on fewer than 2 inputs.

    Source:
        Goodfellow, Vinyals, Saxe, 2015, section 3. https://arxiv.org/abs/1412.6544
        Li, Xu, Taylor, Studer, Goldstein, 2018, sections 3 and 4. https://arxiv.org/abs/1712.09913
    """
    probe = _Probe(first, inputs, labels, batch_norm_inputs, batch_size)
    target = dict(second.named_parameters())
    shapes, others = (
        {name: tuple(weight.shape) for name, weight in weights.items()}
        for weights in (probe.weights, target)
    )
    if shapes != others:
        different = sorted({name for name, _ in shapes.items() ^ others.items()})
        raise ValueError(
            "a line needs two models of the same architecture, got weights that differ in name "
            f"or shape: {', '.join(different)}"
        )
    direction = {
        name: target[name].detach().to(weight.device) - weight
        for name, weight in probe.weights.items()
    }
    if filter_normalized:
        direction = filter_normalize(direction, probe.weights)
    toward = {
        name: buffer.detach().to(probe.buffers[name].device) - probe.buffers[name]
        for name, buffer in second.named_buffers()
        if buffer.is_floating_point()
    }
    points = []
    for position in positions:
        loss, accuracy = probe.at(direction, float(position), buffer_direction=toward)
        points.append(LinePoint(position=float(position), loss=loss, accuracy=accuracy))
    return points


def filter_normalize(
    direction: Mapping[str, Tensor], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rescale a direction so that each filter of it is as long as that filter of the weights.

    A filter is all that belongs to one index of a parameter's first axis. Parameters with fewer
    than two axes (biases, BatchNorm) get no movement, as in the paper.

    Args:
        direction: a change by parameter name.
        weights: the parameters themselves, with the same names and shapes.

    Source:
        Li, Xu, Taylor, Studer, Goldstein, 2018, section 4. https://arxiv.org/abs/1712.09913
    """
    normalized = {}
    for name, change in direction.items():
        if change.dim() < 2:
            normalized[name] = torch.zeros_like(change)
            continue
        lengths = change.flatten(1).norm(dim=1)
        wanted = weights[name].flatten(1).norm(dim=1)
        factor = torch.where(lengths > 0, wanted / lengths, torch.zeros_like(lengths))
        normalized[name] = change * factor.view(-1, *[1] * (change.dim() - 1))
    return normalized


class _Probe:
    """Judges a model's copy with its weights moved along a direction."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        labels: Labels,
        batch_norm_inputs: Tensor | None,
        batch_size: int,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {batch_size}")
        if not len(inputs) or len(inputs) != len(labels):
            raise ValueError(
                "inputs and labels must have as many rows, at least 1, "
                f"got {len(inputs)} and {len(labels)}"
            )
        if batch_norm_inputs is not None and len(batch_norm_inputs) < 2:
            raise ValueError(
                f"batch_norm_inputs must have at least 2 rows, got {len(batch_norm_inputs)}"
            )
        self._model = copy.deepcopy(model).eval()
        # Copies of their own: the model's move in place.
        self.weights = {name: w.detach().clone() for name, w in model.named_parameters()}
        self.buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        self._inputs, self._labels = inputs, labels
        self._batch_norm_inputs, self._batch_size = batch_norm_inputs, batch_size

    @torch.no_grad()
    def at(
        self,
        direction: Mapping[str, Tensor],
        distance: float,
        buffer_direction: Mapping[str, Tensor] | None = None,
    ) -> tuple[float, float]:
        """Return loss (nats per row) and accuracy at ``weights + distance * direction``."""
        for name, parameter in self._model.named_parameters():
            parameter.copy_(self.weights[name] + distance * direction[name])
        for name, buffer in self._model.named_buffers():
            buffer.copy_(self.buffers[name])
            if buffer_direction is not None and name in buffer_direction:
                buffer += distance * buffer_direction[name]
        if self._batch_norm_inputs is not None:
            self._estimate_batch_norm(self._batch_norm_inputs)
        loss, correct = 0.0, 0
        batches = zip(
            self._inputs.split(self._batch_size), self._labels.split(self._batch_size), strict=True
        )
        for inputs, labels in batches:
            logits = self._model(inputs).double()
            loss += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(dim=1) == labels).sum())
        return loss / len(self._labels), correct / len(self._labels)

    def _estimate_batch_norm(self, inputs: Tensor) -> None:
        """Replace running statistics by averages over the inputs; other layers stay in eval."""
        layers = [module for module in self._model.modules() if isinstance(module, _BatchNorm)]
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the plain average over batches, not a moving one
            layer.train()
        # Batches of nearly equal size: each counts alike, and none is left with a single row.
        for batch in inputs.tensor_split(-(-len(inputs) // max(self._batch_size, 2))):
            self._model(batch)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()
