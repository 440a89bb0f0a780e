"""`value`: what the command line and a notebook call; see `sim.counterfactual.valuing`."""

from sim.counterfactual.valuing import Asked, ValueResult, value

__all__ = ["Asked", "ValueResult", "value"]
