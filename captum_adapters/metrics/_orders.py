"""Random orders of elements of which the scores are equal."""

from collections.abc import Sequence
from typing import NamedTuple, Union

import torch
from torch import Tensor

from captum_adapters._validation import double_dtype
from captum_adapters.metrics._checks import positive_integer
from captum_adapters.metrics._perturbation import _random_orders
from captum_adapters.metrics._top import (
    order_to_ranks,
    sort_scores,
    tie_bounds,
    tied_pixels,
)

SampleIds = Union[None, Tensor, Sequence[object]]
TIES = ("random", "stable")


class Ranks(NamedTuple):
    """Ranks of pixels or inputs, in several orders of ties.

    Attributes:

        ranks (Tensor): Ranks of all examples in the first order, and of those in `rows`
                in each further order, of shape (batch + rows (orders - 1), 1 or
                channels, height, width).
        rows (Tensor): Examples of which ties are divided, of shape (rows,).
        divided (Tensor): Whether each number of pixels divides ties, bool of shape
                (batch, numbers).
        tied_share (Tensor): Share of ties, of shape (batch,).
    """

    ranks: Tensor
    rows: Tensor
    divided: Tensor
    tied_share: Tensor


def rank_ties(
    scores: Tensor,
    counts: Sequence[int],
    images: Tensor,
    ties: str,
    n_orders: int,
    seed: int,
    sample_ids: SampleIds,
) -> Ranks:
    """Ranks of scores, in several random orders of those ties that counts divide.

    Args:

        scores (Tensor): Scores of shape (batch, 1 or channels, height, width).
        counts (sequence of int): Numbers of elements that are to be kept.
        images (Tensor): Images of as many rows, by whose content orders are chosen.
        ties (str): `"random"` for random orders, `"stable"` for row by row.
        n_orders (int): Number of orders.
        seed (int): Seed of the orders.
        sample_ids (list, Tensor or None): What orders are chosen by instead.

    Returns:
        Ranks: Ranks of each order.

    Raises:
        ValueError: If `ties` is unknown, the number of orders is not a positive
                integer, or there is not one identity for each image.
    """
    if ties not in TIES:
        raise ValueError(f"ties={ties!r} is not one of {', '.join(map(repr, TIES))}.")
    n_orders = positive_integer("n_orders", n_orders)
    ids = sample_ids.tolist() if isinstance(sample_ids, Tensor) else sample_ids
    if ids is not None and len(ids) != len(images):
        raise ValueError(f"There are {len(ids)} sample_ids for {len(images)} examples.")
    ordered, order = sort_scores(scores)
    numbers = torch.tensor(counts, device=scores.device)
    starts, ends = tie_bounds(ordered, numbers)
    # a single order is the only one
    divided = (starts < ends) & (ties == "random")
    ranks = order_to_ranks(order)
    rows = divided.any(1).nonzero()[:, 0]
    further = []
    if len(rows):
        ids = None if ids is None else [ids[row] for row in rows.tolist()]
        flat = scores.flatten(1)[rows]
        for number in range(n_orders):
            if number % 2 == 0:
                name = f"{seed}/{number}" if number else seed
                shuffled = _random_orders(images[rows], name, ids, flat.shape[1])
            else:
                # ties that come last in one order come first in the next
                shuffled = shuffled.flip(1)
            _, order = sort_scores(flat.gather(1, shuffled))
            further.append(order_to_ranks(shuffled.gather(1, order)))
        ranks[rows] = further[0]
    share = tied_pixels(ordered).to(double_dtype(scores.device)).mean(1)
    ranks = torch.cat([ranks, *further[1:]]).view(-1, *scores.shape[1:])
    return Ranks(ranks, rows, divided, share)
