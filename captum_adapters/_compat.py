"""Private names of Captum and torch-cam. Those of PyTorch and Zennit are in
:mod:`zennit_resnet._compat` and :mod:`zennit_resnet._autograd`.

No private parts of Captum 0.9.0 are used: they are written out in
:mod:`captum_adapters._validation`. Checked with torch-cam 0.5.0.
`tests/test_compat_captum.py` fails if something moves, or behaves in another way.
"""

from typing import Any

from torch import Tensor


def cam_activation(extractor: Any) -> Any:
    """What an extractor of torch-cam keeps of its only layer, `None` if nothing yet."""
    return extractor.hook_a[0]


def set_cam_activation(extractor: Any, activation: Tensor) -> None:
    """Replace what an extractor of torch-cam keeps of its layer."""
    extractor.hook_a[0] = activation
