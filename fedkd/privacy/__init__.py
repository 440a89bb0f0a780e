"""What private data cost to speak of: events, their composition, and noise for a wanted epsilon."""

from fedkd.privacy.accounting import COARSE, Spent, bound, spent
from fedkd.privacy.calibration import (
    epsilon_for_randomized_response,
    noise_for_gaussian,
    noise_for_laplace,
    noise_for_sampled_gaussian,
)
from fedkd.privacy.events import (
    Event,
    Gaussian,
    Laplace,
    RandomizedResponse,
    SampledGaussian,
)

__all__ = [
    "COARSE",
    "Event",
    "Gaussian",
    "Laplace",
    "RandomizedResponse",
    "SampledGaussian",
    "Spent",
    "bound",
    "epsilon_for_randomized_response",
    "noise_for_gaussian",
    "noise_for_laplace",
    "noise_for_sampled_gaussian",
    "spent",
]
