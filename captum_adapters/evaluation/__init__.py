"""Evaluation of attribution methods on data sets, resumable and sharded."""

try:
    import jinja2  # noqa: F401
    import pandas  # noqa: F401
    import tabulate  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"captum_adapters.evaluation needs {error.name}: install it by"
        " pip install 'zennit-resnet[evaluation]'"
    ) from error

from captum_adapters.evaluation.config import Evaluation, make_evaluation
from captum_adapters.evaluation.data import Sample, Samples, read_samples
from captum_adapters.evaluation.methods import Method
from captum_adapters.evaluation.metrics import COLUMNS
from captum_adapters.evaluation.presets import PRESETS
from captum_adapters.evaluation.report import Report, summarize
from captum_adapters.evaluation.runner import Process, evaluate
from captum_adapters.evaluation.store import Run, RunError, SampleRecord, accuracy, read_run

__all__ = [
    "COLUMNS",
    "Evaluation",
    "Method",
    "PRESETS",
    "Process",
    "Report",
    "Run",
    "RunError",
    "Sample",
    "SampleRecord",
    "Samples",
    "accuracy",
    "evaluate",
    "make_evaluation",
    "read_run",
    "read_samples",
    "summarize",
]
