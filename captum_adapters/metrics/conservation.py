"""Whether attributions conserve relevance."""

import math
from typing import Any, Mapping, Union

import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_adapters._validation import Maps, as_argument, double_dtype, to_tensor


def conservation_gap(
    attributions: Maps, initial: Union[int, float, Tensor, NDArray[Any]],
    sinks: Union[None, Tensor, NDArray[Any], Mapping[str, Tensor]] = None,
) -> Tensor:
    r"""How much relevance is gained or lost on the way, relative to what there was.

    .. math::
        \frac{\sum_i R_i + \sum_s R_s - \sum_k R_k}{\sum_k |R_k|}

    with the attributions :math:`R_i`, what sinks keep :math:`R_s`, and the initial
    relevance :math:`R_k` of outputs. Zero is exact conservation (Otsuki et al., section
    3.2), -1 a complete loss.

    Args:
        attributions (Tensor, numpy.ndarray or tuple of these): Attributions of shape
            (batch, ...). For a tuple, the sum goes over all its tensors.
        initial (int, float, Tensor or numpy.ndarray): Relevance at the output, for
            instance the target's logit: a tensor of shape (batch,), or (batch, ...) for
            several outputs, or a number for all.
        sinks (Tensor, numpy.ndarray or dict of str to Tensor, optional): What class
            tokens and other constants keep, as the composite's ``sinks`` after the
            attribution, or their sum: tensors of shape (batch,). By default, it counts
            as lost.

    Returns:
        Tensor: Relative gap of shape (batch,), in double precision. NaN if the initial
        relevance is zero.

    Raises:
        ValueError: If batch sizes differ or are zero, or ``sinks`` have another shape.
        TypeError: If an argument is neither a tensor nor an array of numbers.

    Examples:
        >>> import torch
        >>> from captum_adapters.metrics import conservation_gap
        >>> attributions = torch.tensor([[1.0, 2.0], [1.0, -3.0]])
        >>> conservation_gap(attributions, torch.tensor([3.0, -1.0])).tolist()
        [0.0, -1.0]
    """
    given = attributions if isinstance(attributions, tuple) else (attributions,)
    parts = [to_tensor(part, "attributions") for part in given]
    if not parts or any(part.ndim == 0 or len(part) == 0 for part in parts):
        raise ValueError("attributions have no examples: give a shape of (batch, ...).")
    batch, device = len(parts[0]), parts[0].device
    dtype = double_dtype(device)
    start = as_argument(initial, "initial")
    start = torch.as_tensor(start, dtype=dtype, device=device).detach()
    if start.ndim == 0:
        start = start.expand(batch)
    if any(len(part) != batch for part in (*parts, start)):
        shapes = ", ".join(str(tuple(part.shape)) for part in (*parts, start))
        raise ValueError(
            f"Batch sizes of attributions and initial differ: the shapes are {shapes}."
        )
    start = start.reshape(batch, -1)
    scale, start = start.abs().sum(1), start.sum(1)
    total = sum(
        part.detach().to(device, dtype).reshape(batch, -1).sum(1) for part in parts
    )
    named: Any = {} if sinks is None else {"sinks": sinks}
    for name, kept in (sinks if isinstance(sinks, Mapping) else named).items():
        kept = torch.as_tensor(as_argument(kept, "sinks"), dtype=dtype, device=device)
        if kept.shape != (batch,):
            raise ValueError(
                f"sinks must be of shape ({batch},), one number for each example, but "
                f"{name!r} has shape {tuple(kept.shape)}."
            )
        total = total + kept.detach()
    return torch.where(scale == 0, math.nan, (total - start) / scale)
