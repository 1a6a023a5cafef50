"""The highest p % of scores."""

from fractions import Fraction
from numbers import Number
from typing import Any, Sequence, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_adapters._validation import double_dtype
from captum_adapters.metrics._checks import to_tensor

Percent = Union[int, float, Fraction]
Percents = Union[Percent, Sequence[Percent]]


def percent_list(percents: Any) -> list[Any]:
    """Percentages as a list, also of a single number, an array or a tensor.

    Raises:
        TypeError: If they are neither a number nor a sequence.
    """
    if isinstance(percents, Tensor):
        percents = percents.detach().cpu()
        # NumPy has no bfloat16
        percents = percents.double() if percents.itemsize == 2 else percents
        percents = percents.numpy()
    if isinstance(percents, np.ndarray):
        # numbers that keep their type, and so the shortest decimal number for it
        percents = [*percents.reshape(-1)] if percents.ndim < 2 else [*percents]
    if isinstance(percents, Number):
        return [percents]
    if isinstance(percents, (str, bytes)) or not hasattr(percents, "__iter__"):
        raise TypeError(
            f"percents must be a number or numbers, such as (1, 5), but are {percents!r}."
        )
    return [*percents]


def top_counts(percents: Percents, total: int) -> tuple[int, ...]:
    r"""How many elements the top percentages are, :math:`\lfloor pN/100 \rfloor`.

    The result is exact: percentages are taken as the decimal fractions they are
    written as, so 0.7 % of 1000 is 7, although 0.7 * 1000 / 100 is below 7 in floating
    point numbers. A :class:`fractions.Fraction` gives any other ratio: the percentage
    at which exactly `k` of `n` are kept is `Fraction(100 * k, n)`.

    Args:

        percents (int, float or Fraction, or sequence of these): Percentages from 0 to
                100.
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
    counts = []
    for percent in percent_list(percents):
        try:
            if isinstance(percent, str):
                raise ValueError
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
    percents: Percents, total: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Counts by :func:`top_counts`, and percentages, as tensors.

    Args:

        percents (int, float or Fraction, or sequence of these): Percentages from 0 to
                100.
        total (int): Number of all elements.
        device (torch.device): Device of the tensors.

    Returns:
        tuple[Tensor, Tensor]: Counts and percentages, each of shape (P,).
    """
    percents = percent_list(percents)
    counts = torch.tensor(top_counts(percents, total), device=device)
    values = [float(percent) for percent in percents]
    return counts, torch.tensor(values, dtype=double_dtype(device), device=device)


def sort_scores(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of each example in descending order, and where they are, both (batch, N).

    Equal scores stay in row-major order.
    """
    # adding zero turns -0 into 0, which are equal but need not be to a radix sort
    return (scores.flatten(1) + 0).sort(stable=True, dim=1, descending=True)


def tied_pixels(ordered: Tensor) -> Tensor:
    """Whether scores in order, of shape (batch, N), are equal to one beside them."""
    equal = ordered[:, 1:] == ordered[:, :-1]
    return F.pad(equal, (1, 0)) | F.pad(equal, (0, 1))


def tie_bounds(ordered: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Where the ties that counts divide begin and end.

    Args:

        ordered (Tensor): Scores of shape (batch, N), in descending order.
        counts (Tensor): Numbers of elements from 0 to N, of shape (P,).

    Returns:
        tuple[Tensor, Tensor]: Of each count k, how many scores are above the k-th
        highest, and how many reach it, both of shape (batch, P). Where k is between two
        different scores, or at an end, both are k.

    Examples::

        >>> counts = torch.tensor([0, 1, 2, 3])
        >>> tie_bounds(torch.tensor([[2.0, 1.0, 1.0, 0.0]]), counts)
        (tensor([[0, 1, 1, 3]]), tensor([[0, 1, 3, 3]]))
    """
    # ascending, as the search needs it
    values = -ordered
    last = values[:, (counts - 1).clamp(min=0)].contiguous()
    starts = torch.searchsorted(values, last)
    ends = torch.searchsorted(values, last, right=True)
    divided = (starts < counts) & (counts < ends)
    return starts.where(divided, counts), ends.where(divided, counts)


def means_of_top(
    values: Tensor, scores: Tensor, counts: Tensor, means: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Mean of values over the elements with the k highest scores.

    Of scores that are equal, it is the expected mean over all their orders: of `t` ties
    after `s` higher scores, each is among the first `k` with probability
    :math:`(k - s)/t`.

    Args:

        values (Tensor): Values of shape (batch, ...), which are averaged.
        scores (Tensor): Scores of the same shape, which are ranked.
        counts (Tensor): Numbers k, of shape (P,).
        means (Tensor): Mean of all values, of shape (batch,), which is that of the top
                if all scores are equal.

    Returns:
        tuple[Tensor, Tensor]: Means of shape (batch, P) and of the type of `means`, NaN
        where k is zero, and the share of scores that are equal to another one, of shape
        (batch,).

    Examples::

        >>> scores = torch.tensor([[3.0, 1.0, 1.0, 1.0]])
        >>> values, counts = torch.tensor([[0.0, 2.0, 4.0, 6.0]]), torch.tensor([1, 2])
        >>> means_of_top(values, scores, counts, values.mean(1))
        (tensor([[0., 2.]]), tensor([0.7500]))
    """
    ordered, order = sort_scores(scores)
    sums = F.pad(values.flatten(1).gather(1, order).cumsum(1), (1, 0))
    starts, ends = tie_bounds(ordered, counts)
    above, among = (sums.gather(1, bounds).to(means.dtype) for bounds in (starts, ends))
    number = ends - starts
    tied = ((among - above) / number).where(number < order.shape[1], means[:, None])
    weight = (counts - starts).to(means.dtype) / counts
    expected = above / counts + weight * tied
    exact = sums[:, counts].to(means.dtype) / counts
    share = tied_pixels(ordered).to(means.dtype).mean(1)
    return exact.where(number == 0, expected), share


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
    return sort_scores(scores)[1]


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
    return order_to_ranks(descending_order(scores)).view(scores.shape)


def order_to_ranks(order: Tensor) -> Tensor:
    """Ranks of elements, given their order, both of shape (batch, N)."""
    positions = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, positions)


def top_fraction(scores: Tensor, percent: Percent) -> Tensor:
    r"""Select the top p % of the elements of each example.

    Exactly :math:`\lfloor pN/100 \rfloor` of N elements are selected. Of equal scores,
    the first in row-major order come first, so that a share of the selection depends on
    where in the image ties are: :func:`mask_pointing` has the expected share instead.

    Args:

        scores (Tensor or numpy.ndarray): Scores of shape (batch, ...), for instance
                heatmaps of shape (batch, height, width).
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
    scores = to_tensor(scores, "scores").detach()
    if scores.ndim < 2:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} have no batch: they must be of"
            " shape (batch, ...)."
        )
    if scores.numel() == 0:
        raise ValueError(f"scores of shape {tuple(scores.shape)} are empty.")
    if bool(scores.isnan().any()):
        raise ValueError("scores contain NaN, which has no rank.")
    (count,) = top_counts([percent], scores[0].numel())
    return descending_ranks(scores) < count
