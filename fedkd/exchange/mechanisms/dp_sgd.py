"""DP-SGD at clients: learning is protected, so all that a client sends is post-processing."""

from functools import lru_cache
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedkd.bounds import Real
from fedkd.exchange.ledger import Cost
from fedkd.exchange.mechanisms.wanted import WantedNoise
from fedkd.exchange.payload import Payload
from fedkd.exchange.release import Occasion, PrivateSteps, Where
from fedkd.privacy import COARSE, noise_for_sampled_gaussian


class DPSGD(WantedNoise):
    """Clients learn from private rows by DP-SGD; what their models say of public rows is free.

    Every step draws each private row by itself (Poisson), clips its gradient to ``clip``, divides
    the sum by the *expected* number of rows, and adds Gaussian noise of standard deviation ``noise
    * clip`` to the sum. Each client has the noise that its own number of rows and steps takes for
    the wanted epsilon.

    Source:
        Abadi et al., 2016, Deep Learning with Differential Privacy, Algorithm 1.
        https://arxiv.org/abs/1607.00133
    """

    kind: Literal["dp_sgd"] = "dp_sgd"
    learns: ClassVar[bool] = True

    clip: Real = Field(
        1.0, ge=1e-6, le=1e6, description="largest Euclidean norm of a row's gradient"
    )

    def refuses(self, kind: type[Payload], where: Where) -> str | None:
        """Clients learn at home."""
        if where == "server":
            return (
                "clients add the noise while they learn, so nobody has to be trusted; set "
                "privacy.where: client"
            )
        return None

    def noise_of(self, learning: PrivateSteps, delta: int | float) -> float:
        """Return a client's noise multiplier: standard deviation over clipping norm."""
        if self.noise is not None:
            return float(self.noise)
        if not learning.steps_of_run:
            return 0.0
        return _noise(self.epsilon, delta, learning.sample_rate, learning.steps_of_run)

    def cost(self, occasion: Occasion) -> Cost | None:
        """So many steps on sampled rows; what a client sends costs nothing more."""
        learning = occasion.learning
        if learning is None:
            raise ValueError("privacy.mechanism dp_sgd: nobody knows how a client learns")
        if not learning.steps:
            return None
        return Cost(
            self.kind,
            {
                "count": learning.steps,
                "noise_multiplier": self.noise_of(learning, occasion.delta),
                "sample_rate": learning.sample_rate,
            },
        )

    def release(self, payload: Payload, occasion: Occasion, rng: np.random.Generator) -> Payload:
        """Hand on the same object: it is made of models that are protected."""
        return payload

    def told(self, where: Where) -> str:
        """What is promised to whom."""
        return (
            "DP-SGD at each client: its models are protected while they learn, so whatever is made "
            "of them is, against the server and everybody else, however often it is sent. How many "
            "rows each client has is taken for known"
        )


@lru_cache(maxsize=4096)
def _noise(epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    return noise_for_sampled_gaussian(
        epsilon, delta, sample_rate=sample_rate, steps=steps, grid=COARSE
    )
