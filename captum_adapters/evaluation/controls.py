"""Maps that explain nothing, which any method should be better than."""

import zlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zennit_resnet.models import Classifier


def _random(
    images: Tensor,
    targets: Tensor,
    names: Sequence[str],
    classifier: Classifier,
    seed: int = 0,
) -> Tensor:
    """Uniform noise, the same for a sample whatever the batch."""
    maps = [
        torch.rand(
            images.shape[2:],
            generator=torch.Generator().manual_seed(
                zlib.crc32(f"{seed}:{name}".encode())
            ),
        )
        for name in names
    ]
    return torch.stack(maps).to(images.device)


def _constant(
    images: Tensor, targets: Tensor, names: Sequence[str], classifier: Classifier
) -> Tensor:
    """One everywhere."""
    return torch.ones_like(images[:, 0])


def _gaussian(
    images: Tensor,
    targets: Tensor,
    names: Sequence[str],
    classifier: Classifier,
    sigma: float = 0.25,
) -> Tensor:
    """A Gaussian in the centre, with a standard deviation in sides of the image."""
    if not sigma > 0:
        raise ValueError(f"sigma={sigma} is not positive")
    rows, columns = (
        torch.exp(-((torch.linspace(-0.5, 0.5, size) / sigma) ** 2) / 2)
        for size in images.shape[2:]
    )
    return torch.outer(rows, columns).to(images).expand(len(images), -1, -1)


def _sobel(
    images: Tensor, targets: Tensor, names: Sequence[str], classifier: Classifier
) -> Tensor:
    """Magnitude of the gradient of brightness."""
    std = classifier.std.to(images)[None]
    grey = (images * std).mean(1, keepdim=True)
    kernel = torch.tensor([[1.0, 2.0, 1.0]]).T @ torch.tensor([[-1.0, 0.0, 1.0]])
    kernels = torch.stack([kernel, kernel.T])[:, None].to(images)
    edges = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernels)
    return edges.norm(dim=1)


CONTROLS: dict[str, Callable[..., Tensor]] = {
    "random": _random,
    "constant": _constant,
    "gaussian": _gaussian,
    "sobel": _sobel,
}
