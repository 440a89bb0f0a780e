"""Optimizers by name, and the learning rate in force at each step."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedkd.schedules import ConstantSchedule, NonNegativeSchedule


class OptimizerSettings(BaseModel):
    """Settings under ``optimizer:``; PyTorch's own optimizers and their defaults.

    The learning rate at progress x in [0, 1] of the run is
    ``lr * min(1, x / warm_up) * decay(x)``; it is set before every step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["sgd", "adam", "adamw", "rmsprop"] = "adam"
    lr: float = Field(1e-3, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd and rmsprop only")
    nesterov: bool = Field(False, description="sgd with momentum only")
    warm_up: float = Field(0.0, ge=0, lt=1, description="fraction of the run")
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
        parameters: Iterable[torch.nn.Parameter] | Iterable[dict[str, Any]],
        *,
        fused: bool = False,
    ) -> torch.optim.Optimizer:
        """Return the optimizer over ``parameters``, at its base learning rate.

        Args:
            parameters: parameters, or parameter groups as torch knows them.
            fused: update in one pass over memory where torch can; the last bits may differ.
        """
        # None and not False: it leaves the choice of the loop to torch, as without the argument.
        one_pass = True if fused else None
        match self.name:
            case "sgd":
                return torch.optim.SGD(
                    parameters,
                    lr=self.lr,
                    momentum=self.momentum,
                    nesterov=self.nesterov,
                    weight_decay=self.weight_decay,
                    fused=one_pass,
                )
            case "adam":
                return torch.optim.Adam(
                    parameters, lr=self.lr, weight_decay=self.weight_decay, fused=one_pass
                )
            case "adamw":
                return torch.optim.AdamW(
                    parameters, lr=self.lr, weight_decay=self.weight_decay, fused=one_pass
                )
            case "rmsprop":
                return torch.optim.RMSprop(
                    parameters,
                    lr=self.lr,
                    momentum=self.momentum,
                    weight_decay=self.weight_decay,
                )

    @property
    def constant(self) -> bool:
        """Whether the learning rate is the same throughout the run."""
        return not self.warm_up and isinstance(self.decay, ConstantSchedule)

    def learning_rate(self, progress: float) -> float:
        """Return the learning rate at ``progress`` in [0, 1] of the run."""
        warm = min(1.0, progress / self.warm_up) if self.warm_up else 1.0
        return self.lr * warm * self.decay.at(progress)
