"""Reports: what runs measured, as one HTML file, figures and a table for the terminal."""

from sim.reports.html import report, write_report
from sim.reports.runs import RunRecord, load_run, load_study
from sim.reports.tables import summary_rows, summary_table

__all__ = [
    "RunRecord",
    "load_run",
    "load_study",
    "report",
    "summary_rows",
    "summary_table",
    "write_report",
]
