"""Do two terms of a loss pull a model the same way, and how hard does each?"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientComparison:
    """Gradients of two loss terms with respect to the same parameters.

    Attributes:
        first_norm: Euclidean norm of the first term's gradient.
        second_norm: the same of the second term.
        norm_ratio: second over first; NaN if the first is 0.
        cosine: of the angle between them, in [-1, 1]: below 0 the terms are in conflict. NaN if
            either gradient is 0.
    """

    first_norm: float
    second_norm: float
    norm_ratio: float
    cosine: float


def compare_gradients(
    terms: Mapping[str, Float[Tensor, ""]], first: str, second: str, module: nn.Module
) -> GradientComparison:
    """Compare the gradients of two named loss terms with respect to a module's parameters.

    The graph stays, and no ``.grad`` is touched, so it can be asked between the forward pass and
    ``backward()`` of a training step. A parameter that a term does not reach has gradient 0.

    Args:
        terms: the parts of a loss by name, as weighted in it, scalars with a graph.
        first: name of the term that ratios are taken to, such as ``"ce"``.
        second: name of the other term, such as ``"kd"``.
        module: whose trainable parameters to look at; a model, or one of its layers.

    Raises:
        ValueError: if a name is not in ``terms`` or the module has no trainable parameter.

    Source:
        Du et al., 2018, section 3 (cosine as a test of helpful terms).
        https://arxiv.org/abs/1812.02224
    """
    parameters = [weight for weight in module.parameters() if weight.requires_grad]
    if not parameters:
        raise ValueError("module must have a trainable parameter, got none")
    gradients = []
    for name in (first, second):
        if name not in terms:
            raise ValueError(f"unknown loss term {name!r}; known: {', '.join(sorted(terms))}")
        gradients.append(_gradient(terms[name], parameters))
    one, other = gradients
    first_norm, second_norm = one.norm().item(), other.norm().item()
    nan = float("nan")
    product = first_norm * second_norm
    cosine = torch.dot(one, other).item() / product if product else nan
    return GradientComparison(
        first_norm=first_norm,
        second_norm=second_norm,
        norm_ratio=second_norm / first_norm if first_norm else nan,
        cosine=max(-1.0, min(1.0, cosine)) if product else nan,
    )


def _gradient(loss: Float[Tensor, ""], parameters: list[nn.Parameter]) -> Float[Tensor, " weights"]:
    """Return the gradient as one vector in double precision."""
    if not loss.requires_grad:  # such as a term that is switched off
        return torch.zeros(sum(weight.numel() for weight in parameters), dtype=torch.float64)
    parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            torch.zeros(weight.numel(), dtype=torch.float64)
            if part is None
            else part.detach().flatten().double().cpu()
            for part, weight in zip(parts, parameters, strict=True)
        ]
    )
