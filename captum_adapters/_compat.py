"""All private names of other packages that this one uses.

Checked with torch 2.14, captum 0.9.0 and torch-cam 0.5.0. `tests/test_compat_captum.py`
fails if one of them moves, or behaves in another way.
"""

from typing import Any

from torch import Tensor
from torch._C import DisableTorchFunction
from torch._C._autograd import _get_sequence_nr

__all__ = ["DisableTorchFunction", "cam_activation", "next_sequence_nr", "sequence_nr"]


def next_sequence_nr() -> int:
    """Number that the next operation of this thread will have in the graph."""
    number: int = _get_sequence_nr()
    return number


def sequence_nr(node: Any) -> int:
    """Number of the operation that has made a node of the graph."""
    number: int = node._sequence_nr()
    return number


def cam_activation(extractor: Any) -> Any:
    """What an extractor of torch-cam keeps of its only layer, `None` if nothing yet."""
    return extractor.hook_a[0]


def set_cam_activation(extractor: Any, activation: Tensor) -> None:
    """Replace what an extractor of torch-cam keeps of its layer."""
    extractor.hook_a[0] = activation
