"""The report of a run: one self-contained HTML page, made from what stands in its folder."""

from potstill.report.build import build_report

__all__ = ["build_report"]
