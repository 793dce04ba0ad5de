"""Leaderboards, figures, and a page over finished runs."""

from clpeft.reports.report import report_on, write_report
from clpeft.reports.tables import print_leaderboards

__all__ = ["print_leaderboards", "report_on", "write_report"]
