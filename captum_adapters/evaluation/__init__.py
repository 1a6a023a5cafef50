"""Evaluation of attribution methods on data sets, resumable and sharded."""

from captum_adapters.evaluation.contents import Report
from captum_adapters.evaluation.datasets import Sample, Samples, read_samples
from captum_adapters.evaluation.measures import COLUMNS
from captum_adapters.evaluation.methods import Method
from captum_adapters.evaluation.presets import PRESETS
from captum_adapters.evaluation.records import Record, Run, RunError, read_run
from captum_adapters.evaluation.report import summarize
from captum_adapters.evaluation.runner import Process, evaluate
from captum_adapters.evaluation.settings import Evaluation

__all__ = [
    "COLUMNS",
    "Evaluation",
    "Method",
    "PRESETS",
    "Process",
    "Record",
    "Report",
    "Run",
    "RunError",
    "Sample",
    "Samples",
    "evaluate",
    "read_run",
    "read_samples",
    "summarize",
]
