"""Reports: what runs measured, as one HTML file, figures and a table for the terminal."""

from sim.reports.html import report, write_report
from sim.reports.runs import RunRecord, load_run, load_study
from sim.reports.tables import pair_rows, plane_tables, summary_rows, summary_table
from sim.reports.verdicts import verdicts

__all__ = [
    "RunRecord",
    "load_run",
    "load_study",
    "pair_rows",
    "plane_tables",
    "report",
    "summary_rows",
    "summary_table",
    "verdicts",
    "write_report",
]
