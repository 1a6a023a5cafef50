"""Reports on runs: tables, significance, curves, examples and warnings."""

from captum_adapters.evaluation.report.report import Report, summarize

__all__ = ["Report", "summarize"]
