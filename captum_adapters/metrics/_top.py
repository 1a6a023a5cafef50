"""The highest p % of scores."""

from fractions import Fraction
from typing import Sequence, Union

import torch
from torch import Tensor

from captum_adapters._common import double_dtype

Percent = Union[int, float, Fraction]


def top_counts(percents: Sequence[Percent], total: int) -> tuple[int, ...]:
    r"""How many elements the top percentages are, :math:`\lfloor pN/100 \rfloor`.

    The result is exact: percentages are taken as the decimal fractions they are
    written as, so 0.7 % of 1000 is 7, although 0.7 * 1000 / 100 is below 7 in floating
    point numbers. A :class:`fractions.Fraction` gives any other ratio: the percentage
    at which exactly `k` of `n` are kept is `Fraction(100 * k, n)`.

    Args:

        percents (sequence of int, float or Fraction): Percentages from 0 to 100.
        total (int): Number of all elements.

    Returns:
        tuple[int, ...]: Numbers of elements.

    Raises:
        ValueError: If there is no percentage, or one is not from 0 to 100.
        TypeError: If a percentage is not a number.

    Examples::

        >>> top_counts([0.1, 1, 100], 224 * 224)
        (50, 501, 50176)
    """
    if isinstance(percents, Tensor):
        percents = percents.detach().cpu().numpy()
    counts = []
    for percent in percents:
        try:
            # the shortest decimal number that is read as this floating point number
            exact = Fraction(str(percent))
        except ValueError:
            raise TypeError(
                f"percents must be finite numbers, but contain {percent!r}."
            ) from None
        if not 0 <= exact <= 100:
            raise ValueError(f"percents must be from 0 to 100, but contain {percent}.")
        counts.append(int(exact * total / 100))
    if not counts:
        raise ValueError("percents are empty: give at least one.")
    return tuple(counts)


def percent_tensors(
    percents: Sequence[Percent], total: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Counts by :func:`top_counts`, and percentages, as tensors.

    Args:

        percents (sequence of int, float or Fraction): Percentages from 0 to 100.
        total (int): Number of all elements.
        device (torch.device): Device of the tensors.

    Returns:
        tuple[Tensor, Tensor]: Counts and percentages, each of shape (P,).
    """
    counts = torch.tensor(top_counts(percents, total), device=device)
    values = [float(percent) for percent in percents]
    return counts, torch.tensor(values, dtype=double_dtype(device), device=device)


def descending_order(scores: Tensor) -> Tensor:
    """Indices that sort each example from the highest to the lowest score.

    Args:

        scores (Tensor): Scores of shape (batch, ...).

    Returns:
        Tensor: Indices into the flattened examples, of shape (batch, elements). Equal
        scores stay in row-major order.

    Examples::

        >>> import torch
        >>> descending_order(torch.tensor([[[0.0, 2.0], [-0.0, 2.0]]]))
        tensor([[1, 3, 0, 2]])
    """
    # adding zero turns -0 into 0, which are equal but need not be to a radix sort
    return (scores.flatten(1) + 0).argsort(stable=True, dim=1, descending=True)


def descending_ranks(scores: Tensor) -> Tensor:
    """Rank of each element within its example, which is 0 for the highest score.

    An element is among the k highest if its rank is less than k, for any k.

    Args:

        scores (Tensor): Scores of shape (batch, ...).

    Returns:
        Tensor: Ranks of the same shape. Of equal scores, the first in row-major order
        has the lowest rank.

    Examples::

        >>> import torch
        >>> descending_ranks(torch.tensor([[[1.0, 2.0], [1.0, 3.0]]]))
        tensor([[[2, 1],
                 [3, 0]]])
    """
    order = descending_order(scores)
    positions = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, positions).view(scores.shape)


def top_fraction(scores: Tensor, percent: Percent) -> Tensor:
    r"""Select the top p % of the elements of each example.

    Exactly :math:`\lfloor pN/100 \rfloor` of N elements are selected. Of equal scores,
    the first in row-major order come first.

    Args:

        scores (Tensor): Scores of shape (batch, ...), for instance heatmaps of shape
                (batch, height, width).
        percent (int, float or Fraction): Percentage from 0 to 100.

    Returns:
        Tensor: Whether an element is selected, bool of the shape of the scores.

    Raises:
        ValueError: If the percentage is not from 0 to 100, the scores have no batch, or
                there is NaN in them.

    Examples::

        >>> import torch
        >>> top_fraction(torch.tensor([[[1.0, 2.0], [1.0, 3.0]]]), 75)
        tensor([[[ True,  True],
                 [False,  True]]])
    """
    if scores.ndim < 2:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} have no batch: they must be of"
            " shape (batch, ...)."
        )
    if bool(scores.isnan().any()):
        raise ValueError("scores contain NaN, which has no rank.")
    (count,) = top_counts([percent], scores[0].numel())
    return descending_ranks(scores) < count
