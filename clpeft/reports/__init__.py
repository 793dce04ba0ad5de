"""Leaderboards, figures, and a page over finished runs."""

from clpeft.reports.console import print_leaderboards
from clpeft.reports.report import report_on, write_report

__all__ = ["print_leaderboards", "report_on", "write_report"]
