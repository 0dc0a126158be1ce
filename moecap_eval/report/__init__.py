"""Reports made from records alone: one offline HTML file, tables for a terminal."""

from __future__ import annotations

from moecap_eval.report.html import write_report

__all__ = ["write_report"]
