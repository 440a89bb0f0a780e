"""A rule whose noise is said by the epsilon that is wanted, or as it is."""

from functools import lru_cache
from typing import ClassVar, TypeVar

from pydantic import Field, model_validator

from fedkd.bounds import Real
from fedkd.exchange.payload import Payload
from fedkd.exchange.release import Form, ReleaseRule
from fedkd.privacy import noise_for_gaussian

RuleT = TypeVar("RuleT", bound="WantedNoise")


class WantedNoise(ReleaseRule):
    """Noise for an epsilon of the whole run, or noise as it is; one of both."""

    adds_noise: ClassVar[bool] = False
    """Whether it adds noise to numbers, so that what is linear in them may be made of a sum."""

    epsilon: Real | None = Field(
        None,
        ge=1e-6,
        le=1e6,
        description="wanted for the whole run, for each client; the noise follows from it",
    )
    noise: Real | None = Field(
        None,
        ge=1e-6,
        le=1e9,
        description="in the place of epsilon: standard deviation (laplace: scale) over sensitivity",
    )

    def tidied(self, made: Payload, form: Form) -> Payload:
        """Return what a trusted server made of what it released, where that needs to be read."""
        return made

    @model_validator(mode="after")
    def _one_of_both(self: RuleT) -> RuleT:
        if (self.epsilon is None) == (self.noise is None):
            got = "both" if self.noise is not None else "neither"
            raise ValueError(
                "needs epsilon (of the whole run; the noise follows from it) or noise, one of "
                f"both, such as privacy.epsilon=8; got {got}"
            )
        return self


@lru_cache(maxsize=256)
def gaussian_noise(epsilon: float, delta: float, count: int) -> float:
    """Return `fedkd.privacy.noise_for_gaussian`, which every release of a run asks for."""
    return noise_for_gaussian(epsilon, delta, count=count)
