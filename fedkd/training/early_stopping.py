"""Stop when validation no longer improves, and go back to the best weights."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from fedkd.bounds import Count, Real


class EarlyStoppingSettings(BaseModel):
    """When training stops before its last step; the values compared come from validation rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patience: Count = Field(
        default=5, description="validations in a row without improvement before the stop"
    )
    min_delta: Real = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="smallest change that counts as an improvement, in units of the value",
    )
    mode: Literal["min", "max"] = Field(
        default="min", description="min: lower is better (a loss); max: higher is (an accuracy)"
    )


class EarlyStopping:
    """Watches a validation value and keeps a copy of the weights that were best.

    Attributes:
        best_value: the best value so far, None before the first number.
        best_step: when it was seen.
        checks_without_improvement: validations since then.

    Source:
        Prechelt, 1998, "Early Stopping - But When?", class UP of stopping criteria.
        https://doi.org/10.1007/3-540-49430-8_3
    """

    def __init__(self, settings: EarlyStoppingSettings) -> None:
        self._settings = settings
        self._best_state: dict[str, Tensor] | None = None
        self.best_value: float | None = None
        self.best_step: int | None = None
        self.checks_without_improvement = 0

    @property
    def should_stop(self) -> bool:
        """Whether ``patience`` validations in a row brought no improvement."""
        return self.checks_without_improvement >= self._settings.patience

    def update(self, value: int | float, module: nn.Module, *, step: int) -> bool:
        """Note one validation; where it is the best so far, copy the weights.

        Parameters and buffers are copied, so later steps cannot change what was best. NaN is
        never an improvement.

        Args:
            value: of the metric watched, on validation rows.
            module: the model as it was validated.
            step: when that was: an epoch, a step or a round.

        Returns:
            Whether this value is the best so far.
        """
        if not self._improves(value):
            self.checks_without_improvement += 1
            return False
        self.best_value, self.best_step = float(value), step
        self.checks_without_improvement = 0
        self._best_state = {
            name: tensor.detach().clone() for name, tensor in module.state_dict().items()
        }
        return True

    def restore(self, module: nn.Module) -> None:
        """Copy the best weights and buffers back into ``module``.

        Raises:
            ValueError: if no validation gave a number yet.
        """
        if self._best_state is None:
            raise ValueError("there are no best weights yet: update needs a value that is no NaN")
        module.load_state_dict(self._best_state)

    def _improves(self, value: int | float) -> bool:
        if value != value:
            return False
        if self.best_value is None:
            return True
        gain = self.best_value - value if self._settings.mode == "min" else value - self.best_value
        return gain > self._settings.min_delta
