"""Arguments of metrics: arrays, maps of single images, numbers, and probabilities."""

import operator
from typing import Any, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_adapters._validation import pixel_maps, single_tensor

# Rounding to bfloat16 changes a sum of probabilities by less
SUM_TOLERANCE = 5e-3
# Logits of fewer classes may all be between 0 and 1 by chance
MANY_CLASSES = 10


class ProbabilityWarning(UserWarning):
    """Outputs that look like probabilities, of which a softmax is taken once more."""


def to_tensor(value: Any, name: str) -> Tensor:
    """Take a tensor out of a tuple of one, or convert an array.

    Args:

        value (Tensor, numpy.ndarray, or tuple of one): The argument.
        name (str): Its name in messages.

    Returns:
        Tensor: The tensor, or a copy of the array on the CPU.

    Raises:
        ValueError: If there are several.
        TypeError: If it is neither a tensor nor an array of numbers.
    """
    if isinstance(value, tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind not in "biufc":
            raise TypeError(f"{name} must be numbers, but are of {value.dtype}.")
        try:
            # a copy: arrays may be read-only, reversed or of another byte order
            value = torch.from_numpy(
                np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
            )
        except TypeError:
            raise TypeError(
                f"{name} are of {value.dtype}, which PyTorch does not have: convert"
                " them to float64 first."
            ) from None
    return single_tensor(value, name)


def as_batch(maps: Tensor, batch: int) -> Tensor:
    """Give a single map of shape (height, width) its batch, if that has one image."""
    return maps[None] if maps.ndim == 2 and batch == 1 else maps


def as_argument(value: Any, name: str) -> Any:
    """Convert an array, for arguments that may be something else than a tensor."""
    if isinstance(value, tuple) and len(value) == 1:
        value = value[0]
    return to_tensor(value, name) if isinstance(value, (np.ndarray, np.generic)) else value


def rank_maps(
    attributions: Any, images: Tensor, reduce: str, interpolate: Optional[str]
) -> Tensor:
    """Maps by which pixels are ranked, see :func:`pixel_maps`, also of arrays.

    Args:

        attributions (Tensor, numpy.ndarray, or tuple of one): Attributions of a shape
                that :func:`pixel_maps` takes, or (height, width) for a single image.
        images (Tensor): Images of shape (batch, channels, height, width).
        reduce (str): `"sum"` or `"abs_sum"`.
        interpolate (str or None): Mode of :func:`torch.nn.functional.interpolate`.

    Returns:
        Tensor: Maps of shape (batch, height, width).

    Raises:
        ValueError: As :func:`pixel_maps`, or if the mode is none for images.
        TypeError: If the attributions are neither a tensor nor an array.
    """
    maps = as_batch(to_tensor(attributions, "attributions"), len(images))
    if interpolate is not None:
        try:
            F.interpolate(torch.zeros(1, 1, 1, 1), (1, 1), mode=interpolate)
        except (NotImplementedError, RuntimeError, TypeError, ValueError):
            raise ValueError(
                f"interpolate={interpolate!r} is no mode for images: choose 'bilinear',"
                " 'bicubic', 'area', 'nearest-exact' or 'nearest'."
            ) from None
    return pixel_maps(maps, images, reduce, interpolate)


def positive_integer(name: str, value: Any, more: str = "") -> int:
    """Check a number of something.

    Args:

        name (str): Name of the argument in messages.
        value (Any): The value.
        more (str, optional): What else there is to say.
                Default: `""`

    Returns:
        int: The number.

    Raises:
        ValueError: If it is no integer, or not positive.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, (bool, np.bool_)) or number < 1:
        raise ValueError(f"{name}={value!r} is not a positive integer{more}.")
    return number


def check_chunk(max_examples_per_batch: Any) -> Optional[int]:
    """Check the number of images that go through the network at a time."""
    if max_examples_per_batch is None:
        return None
    return positive_integer("max_examples_per_batch", max_examples_per_batch)


def judge_outputs(output: Tensor) -> Tensor:
    """Whether outputs of many classes are between 0 and 1, and whether these, of any
    number of classes, add up to 1 over dimension 1.

    Nothing waits for the device.
    """
    within = ((output >= 0) & (output <= 1)).all()
    sums = ((output.sum(1) - 1).abs() <= SUM_TOLERANCE).all()
    many = within if output.shape[1] >= MANY_CLASSES else torch.zeros_like(within)
    return torch.stack([many, within & sums])


def describe_probabilities(judged: list[Tensor]) -> Optional[str]:
    """A warning about outputs of which the softmax was taken, `None` if they are fine.

    Args:

        judged (list[Tensor]): Results of :func:`judge_outputs` for all images.

    Returns:
        str or None: The warning.
    """
    if not judged:
        return None
    within, probabilities = torch.stack(judged).all(0).tolist()
    if probabilities:
        return (
            "forward_func returns probabilities (between 0 and 1, with a sum of 1 over"
            " the classes), of which output='softmax' takes the softmax once more: all"
            " scores are close to each other then. Give output='identity', or a"
            " function that returns logits."
        )
    if within:
        return (
            "All outputs of forward_func are between 0 and 1, as those of a sigmoid"
            " are. Their softmax is close to 1 / classes for any image: give"
            " output='identity' if they are scores already."
        )
    return None
