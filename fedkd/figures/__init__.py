"""Figures of what `fedkd.metrics` computes, as matplotlib figures that nothing else knows of.

No display and no global list of figures: each function returns a ``Figure`` for the caller to save
(``save_figure(figure, Path("reliability.png"))``). Importing this room imports matplotlib, so
import it where something is drawn.
"""

from fedkd.figures.confidence import confidence_plot, reliability_diagram, threshold_plot
from fedkd.figures.curves import entropy_curves, flatness_plot, gradient_plot, schedules_in_force
from fedkd.figures.heat_maps import (
    agreement_heat_map,
    cka_heat_map,
    confusion_heat_map,
    correlation_difference_heat_map,
    error_correlation_heat_map,
    kl_heat_map,
)
from fedkd.figures.saving import figure_bytes, save_figure

__all__ = [
    "agreement_heat_map",
    "cka_heat_map",
    "confidence_plot",
    "confusion_heat_map",
    "correlation_difference_heat_map",
    "entropy_curves",
    "error_correlation_heat_map",
    "figure_bytes",
    "flatness_plot",
    "gradient_plot",
    "kl_heat_map",
    "reliability_diagram",
    "save_figure",
    "schedules_in_force",
    "threshold_plot",
]
