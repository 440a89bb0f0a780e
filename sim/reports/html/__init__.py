"""The report: one HTML file that needs nothing else, and the figures beside it."""

from sim.reports.html.grouping import report
from sim.reports.html.writing import write_report

__all__ = ["report", "write_report"]
