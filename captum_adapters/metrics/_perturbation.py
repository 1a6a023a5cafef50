"""The images of insertion and deletion, and how many pixels they show."""

import math
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_adapters._validation import positive_integer


def group_ends(equal: Tensor) -> Tensor:
    """For each n from 0, how many pixels reach the value of the n-th one in order."""
    # all pixels but the first may be equal to the one before
    numbers = torch.arange(equal.shape[1] + 2, device=equal.device)
    ends = numbers.where(~F.pad(equal, (1, 1)), numbers[-1])
    return ends.flip(1).cummin(1).values.flip(1)


def nearest_ends(equal: Tensor) -> Tensor:
    """For each n from 0, the nearest number that divides no equal pixels."""
    numbers = torch.arange(equal.shape[1] + 2, device=equal.device)
    starts = numbers.where(~F.pad(equal, (1, 1)), 0).cummax(1).values
    ends = group_ends(equal)
    below, above = numbers - starts, ends - numbers
    # half way, nearer to an end, so that the reverse order has the complement
    lower = (below < above) | ((below == above) & (2 * numbers <= numbers[-1]))
    return starts.where(lower, ends)


def count_grid(
    n_pixels: int, n_steps: Any, step: Any, ends: bool = True, origin: str = ""
) -> Tensor:
    """Increasing numbers of pixels at the points of a curve, up to `n_pixels`."""
    if n_steps is not None and step is not None:
        raise ValueError(f"Give n_steps={n_steps} or step={step}, but not both.")
    name, value = ("n_steps", n_steps) if step is None else ("step", step)
    value = positive_integer(name, value, f" (images have {n_pixels} pixels)")
    if step is not None and value > n_pixels:
        # the curves would be the same for any map
        raise ValueError(
            f"step={step}{origin} is more than the {n_pixels} pixels of an image: give"
            " a smaller step, or n_steps."
        )
    if not ends:
        width = math.ceil(n_pixels / value) if step is None else value
        # the published code looks up the value at these ranks, which start at 0
        ranks = width * torch.arange(1, math.ceil(n_pixels / width) + 1)
        return ranks.clamp(max=n_pixels - 1) + 1
    if step is not None:
        return torch.cat([torch.arange(0, n_pixels, value), torch.tensor([n_pixels])])
    value = min(value, n_pixels)
    half = torch.arange(value // 2 + 1) * n_pixels
    half = (2 * half + value) // (2 * value)
    # mirrored, so that inserting from one end is deleting from the other
    return torch.cat([half, n_pixels - half]).unique()


def blur(images: Tensor) -> Tensor:
    """Blur as RISE's code does, with zeros beyond the border."""
    if images.ndim != 4:
        raise ValueError(
            "protocol='rise' blurs images of shape (batch, channels, height, width), but"
            f" inputs are of shape {tuple(images.shape)}: give insertion_baselines."
        )
    # an impulse after a Gaussian filter with reflecting borders, which is rather flat
    offset = torch.arange(-20, 21)
    weight = torch.exp(-offset.double() ** 2 / (2 * 5**2))
    place = (5 + offset) % 22
    kernel = torch.zeros(11).double()
    kernel.index_add_(0, torch.minimum(place, 21 - place), weight / weight.sum())
    kernel = kernel.to(images).expand(images.shape[1], 1, 1, -1)
    with torch.autocast(images.device.type, enabled=False):
        rows = F.conv2d(images, kernel, padding=(0, 5), groups=images.shape[1])
        return F.conv2d(rows, kernel.mT, padding=(5, 0), groups=images.shape[1])


class PerturbedImages:
    """The images of both curves, each of those that differ once.

    Only pixels that differ from the baseline are counted, as images are the same where
    the same of them are kept. For each example, an image is encoded as a number: 0 is
    blank, N (the number of pixels) is the whole image, a number k below it has the
    first k pixels deleted, N + k has the first k inserted, and 2 N is blank if
    insertion starts from something else, which is `inserted`. Of N pixels in `order`,
    (batch, N), `selected` counts those of each point, (batch, points). `alone` tells
    whether the network sees nothing but the image.

    Attributes:
        examples (Tensor): Index of the example of each image, of shape (images,).
        inverse (Tensor): Index of the image at each point of the insertion curve, of
            the blank one of insertion, and at each point of the deletion curve, of
            shape (batch, 2 points + 1).
        shared (Tensor or None): Where the image is the first of all, blank for all
            examples, of the same shape.
    """

    def __init__(
        self, images: Tensor, deleted: Tensor, inserted: Optional[Tensor],
        order: Tensor, selected: Tensor, alone: bool,
    ) -> None:
        self.images, self.deleted, self.inserted = images, deleted, inserted
        self.size = size = order.shape[1]
        self.position, number, total = _differing(images, deleted, order, selected)
        deletion = number.where(number < total, 0).where(number > 0, size)
        blank = 0
        if inserted is not None:
            blank = 2 * size
            self.insertion_position, number, total = _differing(
                images, inserted, order, selected
            )
        number = F.pad(number, (0, 1))
        insertion = (size + number).where(number > 0, blank)
        insertion = insertion.where(number < total, size)
        codes = torch.cat([insertion, deletion], 1)
        rows = torch.arange(len(images), device=images.device)[:, None]
        jobs = rows * (2 * size + 1) + codes
        self.shared = codes == 0 if alone and len(deleted) == 1 else None
        if self.shared is not None:
            jobs = jobs.where(codes > 0, 0)
        jobs, self.inverse = jobs.unique(return_inverse=True)
        self.examples = jobs // (2 * size + 1)
        self.codes = jobs % (2 * size + 1)

    def create(self, part: slice) -> Tensor:
        """Create some of the images."""
        rows, codes = self.examples[part], self.codes[part][:, None]
        deletion = codes <= self.size
        position, base = self.position[rows], _take(self.deleted, rows)
        if self.inserted is not None:
            position = position.where(deletion, self.insertion_position[rows])
            choice = deletion.view(-1, *[1] * (self.images.ndim - 1))
            base = base.where(choice, _take(self.inserted, rows))
        number = torch.where(codes == 0, self.size, codes % self.size)
        keep = ((position < number) != deletion).view(-1, 1, *self.images.shape[2:])
        # the memory format is that of the images
        return self.images[rows].where(keep, base)


def _differing(
    images: Tensor, base: Tensor, order: Tensor, selected: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of pixels that differ from a base: before each, selected, and of all."""
    differs = (images != base).any(1).flatten(1).gather(1, order)
    number = F.pad(differs.cumsum(1), (1, 0))
    before = torch.empty_like(order, dtype=torch.int32)
    before.scatter_(1, order, number[:, :-1].int())
    return before, number.gather(1, selected), number[:, -1:]


def _take(base: Tensor, rows: Tensor) -> Tensor:
    """Baselines of examples."""
    return base if len(base) == 1 else base[rows]
