"""Optimizers by name, and the learning rate in force at each step.

The arithmetic is torch's: its functions do it (``torch.optim.adam.adam`` and so on), with the bits
of its classes. The classes themselves are left out, because making the first one imports torch's
compiler: 800 modules and more than a second, in every process that trains.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.rmsprop import rmsprop
from torch.optim.sgd import sgd

from fedkd.bounds import LearningRate, Real, ShareBelowOne
from fedkd.schedules import ConstantSchedule, NonNegativeSchedule

_FUSED = ("sgd", "adam", "adamw")
"""Optimizers that torch can apply in one pass over memory."""
_FUSED_ON = ("cpu", "cuda")


class OptimizerSettings(BaseModel):
    """Settings under ``optimizer:``; torch's optimizers and their defaults.

    The learning rate at progress x in [0, 1] of the run is
    ``lr * min(1, x / warm_up) * decay(x)``; it is set before every step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["sgd", "adam", "adamw", "rmsprop"] = "adam"
    lr: LearningRate = 1e-3
    weight_decay: Real = Field(0.0, ge=0, le=100)
    momentum: ShareBelowOne = Field(0.0, description="sgd and rmsprop only")
    nesterov: bool = Field(False, description="sgd with momentum only")
    warm_up: ShareBelowOne = Field(0.0, description="fraction of the run")
    decay: NonNegativeSchedule = Field(
        ConstantSchedule(value=1.0), description="factor on lr over the run's progress"
    )

    @model_validator(mode="after")
    def _momentum_has_an_owner(self) -> "OptimizerSettings":
        if self.momentum and self.name not in ("sgd", "rmsprop"):
            raise ValueError(
                f"momentum belongs to sgd or rmsprop, got {self.momentum} with {self.name}"
            )
        if self.nesterov and not (self.name == "sgd" and self.momentum > 0):
            raise ValueError("nesterov needs name: sgd and momentum > 0")
        return self

    def build(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        fused: bool = False,
    ) -> "Optimizer":
        """Return the optimizer over ``parameters``, at its base learning rate.

        Args:
            parameters: parameters, or groups of them: ``params``, and ``lr`` where it differs.
            fused: update in one pass over memory where torch can; the last bits may differ from
                those of the plain formula, which stays for whatever torch cannot fuse.
        """
        match self.name:
            case "sgd":
                return SGD(parameters, self, fused=fused)
            case "adam" | "adamw":
                return Adam(parameters, self, fused=fused)
            case "rmsprop":
                return RMSprop(parameters, self, fused=fused)

    @property
    def slots(self) -> int:
        """How many numbers it remembers for each weight."""
        return len([name for name in self.remembers if name != "step"])

    @property
    def remembers(self) -> tuple[str, ...]:
        """What is remembered of a parameter, by the names that ``torch.optim`` uses."""
        momentum = ("momentum_buffer",) if self.momentum else ()
        match self.name:
            case "sgd":
                return momentum
            case "adam" | "adamw":
                return ("step", "exp_avg", "exp_avg_sq")
            case "rmsprop":
                return ("step", "square_avg", *momentum)

    @property
    def constant(self) -> bool:
        """Whether the learning rate is the same throughout the run."""
        return not self.warm_up and isinstance(self.decay, ConstantSchedule)

    def learning_rate(self, progress: float) -> float:
        """Return the learning rate at ``progress`` in [0, 1] of the run."""
        warm = min(1.0, progress / self.warm_up) if self.warm_up else 1.0
        return self.lr * warm * self.decay.at(progress)


class Optimizer(ABC):
    """Parameters in groups, and what is remembered of each from step to step.

    Attributes:
        param_groups: tables with ``params`` and the learning rate ``lr`` in force for them.
        state: what is remembered of a parameter, by the names that ``torch.optim`` uses; empty
            until its first step.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
        settings: OptimizerSettings,
        *,
        fused: bool = False,
    ) -> None:
        given = list(parameters)
        groups = [each for each in given if isinstance(each, dict)]
        if not groups:
            groups = [{"params": given}]
        self.param_groups = [
            {"lr": settings.lr, **group, "params": list(group["params"])} for group in groups
        ]
        self.state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        self._settings = settings
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        fits = all(each.is_floating_point() and each.device.type in _FUSED_ON for each in every)
        # None and not False: it leaves the choice of the loop to torch.
        self._fused = True if fused and fits and settings.name in _FUSED else None

    def counts_on(self, parameter: Tensor) -> torch.device:
        """Return where the step counter of a parameter stays: torch's functions insist on it."""
        return parameter.device if self._fused else torch.device("cpu")

    def zero_grad(self) -> None:
        """Drop all gradients; what the next loss does not reach then rests."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update, in place, every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [each for each in group["params"] if each.grad is not None]
            if not parameters:
                continue
            gradients = [each.grad for each in parameters]
            if self._fused:
                # Fused updates walk through memory and take any layout for that of the weights.
                gradients = list(map(_laid_out_like, gradients, parameters))
            self._update(parameters, gradients, group["lr"])

    @abstractmethod
    def _update(self, parameters: list[Tensor], gradients: list[Tensor], rate: float) -> None:
        """Take one step with parameters that share a learning rate."""

    def _remembered(self, parameters: list[Tensor], *names: str) -> list[list[Tensor]]:
        """Return, by name and parameter, what is remembered; zeros at the first step."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {
                    "step": self._first_count(parameter),
                    **{name: torch.zeros_like(parameter) for name in names},
                }
        return [
            [self.state[parameter][name] for parameter in parameters] for name in ("step", *names)
        ]

    def _first_count(self, parameter: Tensor) -> Tensor:
        """Return a step counter at 0, of the type and in the place that torch's functions want."""
        double = not self._fused and torch.get_default_dtype() == torch.float64
        dtype = torch.float64 if double else torch.float32
        return torch.zeros((), dtype=dtype, device=self.counts_on(parameter))


def _laid_out_like(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Return a gradient whose numbers lie in memory in the order of the parameter's."""
    if gradient.is_sparse or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


class SGD(Optimizer):
    """Stochastic gradient descent, as ``torch.optim.SGD``."""

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], rate: float) -> None:
        if not self._settings.momentum:
            self._descend(parameters, gradients, [], rate)
            return
        buffers = [self.state[each].get("momentum_buffer") for each in parameters]
        # The fused function takes parameters at their first step or at a later one, not both.
        for first in (True, False):
            chosen = [each for each, buffer in enumerate(buffers) if (buffer is None) == first]
            if not chosen:
                continue
            own = [buffers[each] for each in chosen]
            self._descend(
                [parameters[each] for each in chosen],
                [gradients[each] for each in chosen],
                own,
                rate,
            )
            for each, buffer in zip(chosen, own, strict=True):
                assert buffer is not None  # noqa: S101
                self.state[parameters[each]]["momentum_buffer"] = buffer

    def _descend(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        buffers: list[Tensor | None],
        rate: float,
    ) -> None:
        sparse = any(gradient.is_sparse for gradient in gradients)
        sgd(
            parameters,
            gradients,
            buffers,
            has_sparse_grad=sparse,
            fused=None if sparse else self._fused,
            lr=rate,
            weight_decay=self._settings.weight_decay,
            momentum=self._settings.momentum,
            dampening=0.0,
            nesterov=self._settings.nesterov,
            maximize=False,
        )


class Adam(Optimizer):
    """Adam with weight decay in the gradient, or beside it for ``adamw``, as ``torch.optim``."""

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], rate: float) -> None:
        counts, averages, squares = self._remembered(parameters, "exp_avg", "exp_avg_sq")
        adam(
            parameters,
            gradients,
            averages,
            squares,
            [],
            counts,
            fused=self._fused,
            has_complex=any(map(torch.is_complex, parameters)),
            decoupled_weight_decay=self._settings.name == "adamw",
            lr=rate,
            weight_decay=self._settings.weight_decay,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )


class RMSprop(Optimizer):
    """Gradients over their running size, with momentum if asked, as ``torch.optim.RMSprop``."""

    def _update(self, parameters: list[Tensor], gradients: list[Tensor], rate: float) -> None:
        momentum = self._settings.momentum
        names = ("square_avg", "momentum_buffer") if momentum else ("square_avg",)
        counts, squares, *buffers = self._remembered(parameters, *names)
        rmsprop(
            parameters,
            gradients,
            squares,
            [],
            buffers[0] if buffers else [],
            counts,
            has_complex=any(map(torch.is_complex, parameters)),
            lr=rate,
            weight_decay=self._settings.weight_decay,
            momentum=momentum,
            alpha=0.99,
            eps=1e-8,
            centered=False,
        )
