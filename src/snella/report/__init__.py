"""Figures, tables and the report page of a run, from the files of its folder."""

from snella.report.inspect import inspect_run, inspect_summary
from snella.report.report import write_report

__all__ = ["inspect_run", "inspect_summary", "write_report"]
