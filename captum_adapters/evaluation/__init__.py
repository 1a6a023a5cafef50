"""Evaluation of attribution methods on data sets, resumable and sharded.

Modules are loaded when a name of theirs is used: a report needs no PyTorch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_adapters.evaluation.columns import COLUMNS
    from captum_adapters.evaluation.config import Evaluation, make_evaluation
    from captum_adapters.evaluation.data import Sample, Samples, read_samples
    from captum_adapters.evaluation.methods import Method
    from captum_adapters.evaluation.presets import PRESETS
    from captum_adapters.evaluation.records import Run, RunError, SampleRecord, accuracy, read_run
    from captum_adapters.evaluation.report import Report, summarize
    from captum_adapters.evaluation.runner import Process, evaluate

for _package in ("jinja2", "pandas", "tabulate"):
    if find_spec(_package) is None:
        raise ImportError(
            f"captum_adapters.evaluation needs {_package}: install it by"
            " pip install 'zennit-resnet[evaluation]'"
        )

_MODULES = {
    "columns": ("COLUMNS",),
    "config": ("Evaluation", "make_evaluation"),
    "data": ("Sample", "Samples", "read_samples"),
    "methods": ("Method",),
    "presets": ("PRESETS",),
    "records": ("Run", "RunError", "SampleRecord", "accuracy", "read_run"),
    "report": ("Report", "summarize"),
    "runner": ("Process", "evaluate"),
}
__all__ = [
    "COLUMNS", "Evaluation", "Method", "PRESETS", "Process", "Report", "Run", "RunError",
    "Sample", "SampleRecord", "Samples", "accuracy", "evaluate", "make_evaluation",
    "read_run", "read_samples", "summarize",
]


def __getattr__(name: str) -> Any:
    """Load the module that a name is from."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
