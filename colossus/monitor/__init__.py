"""Views of a run's event log: the live line, the summary at the end, the report."""

from __future__ import annotations

from colossus.monitor.live import LiveView, Quiet
from colossus.monitor.report import write_report
from colossus.monitor.summary import summary

__all__ = ["LiveView", "Quiet", "summary", "write_report"]
