"""The critical-difference diagram: arms on a line of mean ranks, bars over those alike."""

import matplotlib
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from fedkd.figures.style import visible
from sim.reports.figures import STYLE
from sim.reports.ranks import Ranking

WIDTH = 6.4
"""Inches."""

_LINE = 0.26
"""Inches from one name to the next."""


def critical_difference_diagram(ranking: Ranking) -> Figure:
    """Draw mean ranks, the best at the left; a bar joins arms that are within Nemenyi's difference.

    Args:
        ranking: of at least two arms.

    Source:
        Demsar, 2006, figure 1.
    """
    means = ranking.mean_ranks
    groups = ranking.cliques
    half = (len(means) + 1) // 2
    bars = 0.5 + 0.35 * len(groups)
    depth = bars + half
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(WIDTH, 0.6 + _LINE * (depth + 2.5)), layout=ConstrainedLayoutEngine()
        )
        axes = figure.add_subplot()
        best, worst = 1.0, float(len(means))
        margin = 0.06 * (worst - best)
        # The line of ranks is the axis itself, at the top.
        axes.set_ylim(depth, -2.0)
        axes.set_xlim(best - 6 * margin, worst + 6 * margin)
        axes.grid(visible=False)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.plot([best, worst], [0, 0], color="#333333", linewidth=1.2)
        for rank in range(1, len(means) + 1):
            axes.plot([rank, rank], [0, -0.25], color="#333333", linewidth=1.2)
            axes.text(rank, -0.4, str(rank), ha="center", va="bottom")
        for place, (arm, mean) in enumerate(means.items()):
            left = place < half
            row = bars + (place if left else len(means) - 1 - place) + 0.5
            edge = best - margin if left else worst + margin
            axes.plot([mean, mean, edge], [0, row, row], color="#333333", linewidth=0.9)
            axes.text(
                edge - margin / 3 if left else edge + margin / 3,
                row,
                f"{visible(arm)}  {mean:.2f}" if left else f"{mean:.2f}  {visible(arm)}",
                ha="right" if left else "left",
                va="center",
            )
        for place, group in enumerate(groups):
            row = 0.45 + 0.35 * place
            ends = [means[group[0]] - margin / 4, means[group[-1]] + margin / 4]
            axes.plot(ends, [row, row], color="#0072B2", linewidth=4, solid_capstyle="round")
        difference = ranking.critical_difference
        axes.plot([best, best + difference], [-1.5, -1.5], color="#0072B2", linewidth=1.5)
        for end in (best, best + difference):
            axes.plot([end, end], [-1.35, -1.65], color="#0072B2", linewidth=1.5)
        axes.text(
            best + difference / 2,
            -1.6,
            f"critical difference {difference:.2f}",
            ha="center",
            va="bottom",
        )
        axes.set_title(f"Mean rank over {len(ranking.sets)} data sets (1 is best)", pad=14)
    return figure
