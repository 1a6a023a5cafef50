"""Scores in their order: the top p % of them, and orders of those that are equal."""

import zlib
from collections.abc import Sequence
from fractions import Fraction
from numbers import Number
from typing import Any, Optional, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_adapters._validation import (
    check_choice,
    double_dtype,
    positive_integer,
    to_tensor,
)

Percent = Union[int, float, Fraction]
Percents = Union[Percent, Sequence[Percent]]
SampleIds = Union[None, Tensor, Sequence[object]]


def sort_scores(
    scores: Tensor, first: Optional[Tensor] = None
) -> tuple[Tensor, Tensor]:
    """Descending scores and their places, (batch, N), ties as in a `first` order."""
    # adding zero turns -0 into 0, which are equal but need not be to a radix sort
    scores = scores.flatten(1) + 0
    scores = scores if first is None else scores.gather(1, first)
    ordered, order = scores.sort(stable=True, dim=1, descending=True)
    return ordered, order if first is None else first.gather(1, order)


def tied_pixels(ordered: Tensor) -> Tensor:
    """Whether scores in order, of shape (batch, N), are equal to one beside them."""
    equal = ordered[:, 1:] == ordered[:, :-1]
    return F.pad(equal, (1, 0)) | F.pad(equal, (0, 1))


def check_ids(sample_ids: SampleIds, batch: int) -> Optional[list[object]]:
    """Identities of examples as a list."""
    if sample_ids is None:
        return None
    ids = sample_ids.tolist() if isinstance(sample_ids, Tensor) else [*sample_ids]
    if len(ids) != batch:
        raise ValueError(f"There are {len(ids)} sample_ids for {batch} examples.")
    return ids


def random_orders(
    images: Tensor, name: object, sample_ids: SampleIds, size: int
) -> Tensor:
    """A random order of elements for each image, whatever the rest of the batch."""
    ids = check_ids(sample_ids, len(images))
    if ids is None:
        content = [image.flatten().cpu().view(torch.uint8).numpy() for image in images]
        ids = [zlib.crc32(array.tobytes()) for array in content]
    seeds = [zlib.crc32(f"{name}:{key}".encode()) for key in ids]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    # on the device of the generator, whatever the default device is
    orders = [torch.randperm(size, generator=each, device="cpu") for each in generators]
    return torch.stack(orders).to(images.device)


def percent_list(percents: Any) -> list[Any]:
    """Percentages as a list, also of a single number, an array or a tensor."""
    if isinstance(percents, Tensor):
        percents = percents.detach().cpu()
        # NumPy has no bfloat16
        percents = (percents.double() if percents.itemsize == 2 else percents).numpy()
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
    """How many elements the top percentages are, see :func:`top_fraction`."""
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
    """Counts by :func:`top_counts`, and percentages, as tensors of shape (P,)."""
    percents = percent_list(percents)
    counts = torch.tensor(top_counts(percents, total), device=device)
    values = [float(percent) for percent in percents]
    return counts, torch.tensor(values, dtype=double_dtype(device), device=device)


def tie_bounds(ordered: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """How many scores are above each k-th highest, and reach it; k without a tie."""
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
    """Mean of values over the elements with the k highest scores, and share of ties.

    It is the expected mean over all orders of equal scores: of `t` ties after `s`
    higher ones, each is among the first `k` with probability :math:`(k - s)/t`. `means`
    are those of all values. Results are (batch, P), NaN where k is zero, and (batch,).
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


def ranks_of(order: Tensor) -> Tensor:
    """Ranks of elements, given their order, both of shape (batch, N)."""
    positions = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, positions)


def top_fraction(scores: Tensor, percent: Percent) -> Tensor:
    r"""Select the top p % of the elements of each example.

    Exactly :math:`\lfloor pN/100 \rfloor` of N elements are selected. Percentages are
    taken as the decimal fractions they are written as: 0.7 % of 1000 is 7, although the
    product of floating point numbers is below. The percentage at which exactly `k` of
    `n` are selected is `Fraction(100 * k, n)`. Of equal scores, the first in row-major
    order come first, so that a share of the selection depends on where in the image
    ties are: :func:`mask_pointing` has the expected share instead.

    Args:
        scores (Tensor or numpy.ndarray): Scores of shape (batch, ...), for instance
            heatmaps of shape (batch, height, width).
        percent (int, float or Fraction): Percentage from 0 to 100.

    Returns:
        Tensor: Whether an element is selected, bool of the shape of the scores.

    Raises:
        ValueError: If the percentage is not from 0 to 100, the scores have no batch, or
            there is NaN in them.

    Examples:
        >>> import torch
        >>> from captum_adapters.metrics import top_fraction
        >>> top_fraction(torch.tensor([[[1.0, 2.0], [1.0, 3.0]]]), 75)
        tensor([[[ True,  True],
                 [False,  True]]])
    """
    scores = to_tensor(scores, "scores").detach()
    if scores.ndim < 2 or scores.numel() == 0:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} have no batch or are empty: they"
            " must be of shape (batch, ...)."
        )
    if bool(scores.isnan().any()):
        raise ValueError("scores contain NaN, which has no rank.")
    (count,) = top_counts([percent], scores[0].numel())
    return ranks_of(sort_scores(scores)[1]).view(scores.shape) < count


def rank_ties(
    scores: Tensor, counts: Sequence[int], images: Tensor, ties: str, n_orders: int,
    seed: int, sample_ids: SampleIds,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ranks of scores, in several random orders of those ties that counts divide.

    Ranks in a first order of all examples, and in further ones of some rows; these
    rows; which counts divide ties, (batch, counts); and the share of ties.
    """
    check_choice("ties", ties, ("random", "stable"))
    n_orders = positive_integer("n_orders", n_orders)
    ids = check_ids(sample_ids, len(images))
    ordered, order = sort_scores(scores)
    numbers = torch.tensor(counts, device=scores.device)
    starts, ends = tie_bounds(ordered, numbers)
    # a single order is the only one
    divided = (starts < ends) & (ties == "random")
    ranks = ranks_of(order)
    rows = divided.any(1).nonzero()[:, 0]
    further = []
    if len(rows):
        ids = None if ids is None else [ids[row] for row in rows.tolist()]
        flat = scores.flatten(1)[rows]
        for number in range(n_orders):
            if number % 2 == 0:
                name = f"{seed}/{number}" if number else seed
                shuffled = random_orders(images[rows], name, ids, flat.shape[1])
            else:
                # ties that come last in one order come first in the next
                shuffled = shuffled.flip(1)
            further.append(ranks_of(sort_scores(flat, shuffled)[1]))
        ranks[rows] = further[0]
    share = tied_pixels(ordered).to(double_dtype(scores.device)).mean(1)
    ranks = torch.cat([ranks, *further[1:]]).view(-1, *scores.shape[1:])
    return ranks, rows, divided, share
