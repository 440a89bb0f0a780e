"""Reports: what runs measured, as one HTML file, figures and a table for the terminal."""

from sim.report.html import report_on, write_report
from sim.report.runs import RunRecord, load_run, load_study
from sim.report.tables import summary_rows, summary_table

__all__ = [
    "RunRecord",
    "load_run",
    "load_study",
    "report_on",
    "summary_rows",
    "summary_table",
    "write_report",
]
