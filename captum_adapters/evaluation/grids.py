"""Mosaics for the metric of an evaluation that asks where the evidence for a class is.

Each image that is classified correctly and with confidence is put into one cell of a
mosaic, with images of other classes around it. They come from a few images of the whole
data set, so a mosaic is the same whichever process makes it.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import count
from random import Random

import torch
from torch import Tensor
from torch.utils.data import Dataset

from captum_adapters.evaluation.data import Loaded, Sample
from captum_adapters.metrics.mosaics import assemble

# cells in a row, and in a column
CELLS = 2
# lowest probability of an image's class
CONFIDENCE = 0.9
# number of images that others are drawn from, and of those that are looked at for them
LARGEST_POOL = 64
LARGEST_SEARCH = 1024


def confident(output: Tensor, labels: Tensor) -> Tensor:
    """Which images are classified correctly and with confidence, bool of shape (batch,)."""
    probability, predicted = output.double().softmax(1).max(1)
    return (predicted == labels) & (probability >= CONFIDENCE)


class Grids:
    """Makes a mosaic of each image. The network looks at images until they suffice."""

    def __init__(
        self, samples: Sequence[Sample], images: "Dataset[Loaded]",
        model: Callable[[Tensor], Tensor], device: torch.device,
    ) -> None:
        self.images: list[Tensor] = []
        self.labels: list[int] = []
        order = [row for row, sample in enumerate(samples) if sample.label is not None]
        order.sort(key=lambda row: hashlib.sha256(samples[row].name.encode()).digest())
        # classes take turns
        turns: defaultdict[int, count[int]] = defaultdict(count)
        ranks = {row: next(turns[samples[row].label]) for row in order}
        for row in sorted(order, key=ranks.__getitem__)[:LARGEST_SEARCH]:
            image, label = images[row].image, samples[row].label
            if image is None:
                continue
            with torch.no_grad():
                output = model(image[None].to(device))
            if bool(confident(output, torch.tensor([label], device=device))):
                self.images.append(image)
                self.labels.append(label)
                if len(self.images) == LARGEST_POOL:
                    break

    @property
    def problem(self) -> str:
        """Why there are no mosaics, empty if there are."""
        there, needed = len(set(self.labels)), CELLS**2
        if there >= needed:
            return ""
        return (
            f"grid_pointing needs correctly classified images of {needed} classes with"
            f" a probability of at least {CONFIDENCE}, but there are {there}"
            f" (among up to {LARGEST_SEARCH} images)"
        )

    def make(
        self, names: Sequence[str], images: Tensor, labels: Tensor, output: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mosaics of the size of an image, and classes of their cells, of shape (batch, n,
        n), which are -1 for images that are not fit."""
        cells = labels.new_full((len(images), CELLS, CELLS), -1)
        mosaics = torch.zeros_like(images)
        fit = confident(output, labels)
        for row in fit.nonzero()[:, 0].tolist() if not self.problem else ():
            random = Random(names[row])
            order = random.sample(range(len(self.labels)), len(self.labels))
            own = int(labels[row])
            # the first of each other class
            found = {self.labels[index]: index for index in reversed(order)}
            found.pop(own, None)
            classes = [own, *random.sample(sorted(found), CELLS**2 - 1)]
            place = random.sample(range(CELLS**2), CELLS**2)
            parts = [images[row], *(self.images[found[label]] for label in classes[1:])]
            stacked = torch.stack([part.to(images) for part in parts])
            index = torch.tensor(place, device=images.device).view(1, CELLS, CELLS)
            mosaics[row] = assemble(stacked, index, rescale=True)[0]
            cells[row] = labels.new_tensor(classes)[index[0]]
        return mosaics, cells
