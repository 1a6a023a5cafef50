"""Arguments that attribution classes and metrics have in common, and their checks."""

import warnings
from collections.abc import Collection, Sequence
from typing import Any, Callable, Optional, TypeVar, Union

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from captum_adapters._light import positive_integer  # noqa: F401
from zennit_resnet._text import suggest  # noqa: F401
from zennit_resnet.arguments import as_map, check_choice, map_shape
from zennit_resnet.attribution import as_indices, select_output
from zennit_resnet.canonizers.eager import varies

# Captum's types of arguments, which it does not export
BaselineType = Union[None, Tensor, int, float, tuple[Union[Tensor, int, float], ...]]
TargetType = Union[None, int, tuple[int, ...], Tensor, list[tuple[int, ...]], list[int]]
TensorOrTuple = TypeVar("TensorOrTuple", Tensor, tuple[Tensor, ...])

Inputs = Union[Tensor, tuple[Tensor, ...]]
Maps = Union[Tensor, NDArray[Any], tuple[Tensor, ...]]
# From the output of a network to scores of classes, or the name of such a function
ScoreFunction = Union[str, Callable[[Tensor], Tensor]]

# Images that go through a network at once, unless there is a larger batch anyway
DEFAULT_CHUNK = 32
# Rounding to bfloat16 changes a sum of probabilities by less
SUM_TOLERANCE = 5e-3
# Linear interpolation by the spatial dimensions of signals, images, volumes or videos
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
# Logits of fewer classes may all be between 0 and 1 by chance
MANY_CLASSES = 10


class NegativeMapWarning(UserWarning):
    """A map without a positive value, whose ranking is probably reversed."""


class ProbabilityWarning(UserWarning):
    """Outputs that look like probabilities, and get another softmax."""


# -- numbers and tensors ---------------------------------------------------------------


def double_dtype(device: torch.device) -> torch.dtype:
    """The most precise floating point numbers of a device: single precision on MPS."""
    return torch.float32 if device.type == "mps" else torch.float64


def at_least_single(values: Tensor) -> Tensor:
    """Numbers in double precision if they are, and else in single precision."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def as_argument(value: Any, name: str) -> Any:
    """Take a single value out of a tuple, and copy arrays to tensors."""
    if isinstance(value, tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, (np.ndarray, np.generic)):
        value = as_map(name, np.asarray(value))
    return value


def to_tensor(value: Any, name: str) -> Tensor:
    """A tensor of a tensor, an array, or a tuple of one of these."""
    value = as_argument(value, name)
    if isinstance(value, tuple):
        raise ValueError(
            f"{name} is a tuple of {len(value)}, but must be a single tensor: give other"
            " inputs as additional_forward_args."
        )
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, but is {type(value).__name__}.")
    return value


# -- images and maps -------------------------------------------------------------------


def check_inputs(inputs: Any) -> tuple[Tensor, ...]:
    """Inputs as a tuple of tensors with one and the same number of examples."""
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    for tensor in given:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                "inputs must be a tensor or a tuple of tensors, but there is"
                f" {type(tensor).__name__}."
            )
    sizes = {tuple(tensor.shape[:1]) for tensor in given}
    if sizes == {(0,)}:
        raise ValueError(
            "inputs have no examples, but are of shape"
            f" {', '.join(str(tuple(tensor.shape)) for tensor in given)}."
        )
    if len(sizes) != 1 or sizes & {()}:
        raise ValueError(
            "inputs must have one and the same number of examples, but are of shape"
            f" {', '.join(str(tuple(tensor.shape)) for tensor in given) or '()'}."
        )
    return given


def check_images(inputs: Any, dims: Collection[int] = tuple(LINEAR)) -> Tensor:
    """Images of shape (batch, channels, ...), detached, with numbers of dimensions."""
    images = to_tensor(inputs, "inputs").detach()
    if images.ndim - 2 not in dims:
        expected = " or ".join(map_shape(dim, "batch", "channels") for dim in dims)
        raise ValueError(
            f"inputs must be of shape {expected}, but are of shape {tuple(images.shape)}."
        )
    if images.numel() == 0:
        raise ValueError(f"inputs of shape {tuple(images.shape)} are empty.")
    return images


def examples_where(mask: Tensor) -> list[int]:
    """The examples for which a mask of shape (batch, ...) is true anywhere."""
    return mask.flatten(1).any(1).nonzero()[:, 0].tolist()


def as_batch(maps: Tensor, batch: int, dims: int = 2) -> Tensor:
    """Give a single map of shape (height, width) its batch, if that has one image."""
    return maps[None] if maps.ndim == dims and batch == 1 else maps


def by_pixels(size: Sequence[int]) -> str:
    """Text for the size of a map, such as `4 x 5`."""
    return " x ".join(map(str, size))


def pixel_maps(
    attributions: Any, images: Tensor, reduce: str = "sum",
    interpolate: Optional[str] = None, frame: str = "inputs",
) -> Tensor:
    """The sum over channels of shape (batch, height, width), at least in float32.

    It is on the device of the images, which may also be signals, volumes, or masks
    (`frame="masks"`) without channels to fit.
    """
    batch, channels, *size = images.shape
    of_images = frame == "inputs"
    dims = len(size)
    check_choice("reduce", reduce, ("sum", "abs_sum"))
    modes = (None, LINEAR[dims], "area", "nearest-exact", "nearest")
    check_choice("interpolate", interpolate, (*modes, *["bicubic"] * (dims == 2)))
    maps = as_batch(to_tensor(attributions, "attributions"), batch, dims).detach()
    shape = tuple(maps.shape)
    if maps.ndim == dims + 1:
        maps = maps[:, None]
    is_batch = maps.ndim == dims + 2 and len(maps) == batch
    if not is_batch or of_images and maps.shape[1] not in (1, channels):
        expected = tuple(images.shape) if of_images else (batch, *size)
        message = (
            f"attributions of shape {shape} do not fit {frame} of shape {expected}: they"
            " must be of shape"
            f" {map_shape(dims, 'batch', 'channels or 1')} or {map_shape(dims, 'batch')}."
        )
        if dims == 1 and of_images:
            message += (
                " If these are images, inputs must be of shape (batch, channels, height,"
                f" width), but are of shape {tuple(images.shape)}."
            )
        raise ValueError(message)
    if maps.is_complex() or maps.dtype == torch.bool:
        raise ValueError(f"attributions must be real numbers, but are {maps.dtype}.")
    # half precision would merge neighbouring ranks
    maps = at_least_single(maps) if maps.is_floating_point() else maps.double()
    maps = maps.to(images.device).sum(1)
    if reduce == "abs_sum":
        maps = maps.abs()
    if list(maps.shape[1:]) != size:
        if interpolate is None:
            remedy = "" if of_images else "resize and crop masks as the images, or "
            raise ValueError(
                f"attributions are of {by_pixels(maps.shape[1:])} pixels, but {frame} of"
                f" {by_pixels(size)}: {remedy}give interpolate={LINEAR[dims]!r}."
            )
        maps = F.interpolate(maps[:, None], size, mode=interpolate)[:, 0]
    wrong = examples_where(~maps.isfinite())
    if wrong:
        raise ValueError(
            f"attributions contain NaN or infinity for the examples {wrong} of the batch."
        )
    return maps


def warn_negative_maps(
    maps: Tensor, stacklevel: int = 3,
    effect: str = "and they are ranked last. Rank by magnitude (reduce='abs_sum'), or",
) -> None:
    """Warn the caller of the caller of maps that vary, but nowhere above zero."""
    highest = maps.flatten(1).amax(1, keepdim=True)
    negative = examples_where((highest <= 0) & (maps.flatten(1) < highest))
    if negative:
        warnings.warn(
            f"The maps of the examples {negative} have no positive value. If relevance"
            " started from a negative logit, then rules such as z+ give the most"
            f" relevant pixels the lowest values, {effect} start from the"
            " probability ('softmax') or from one ('one').",
            NegativeMapWarning,
            stacklevel=stacklevel,
        )


def check_baselines(baselines: Any, images: Tensor, name: str = "baselines") -> Tensor:
    """A baseline that can be broadcast to images, of their device and type."""
    given = as_argument(0 if baselines is None else baselines, name)
    if isinstance(given, (int, float)):
        given = torch.tensor(given, dtype=torch.float64, device="cpu")
    given = to_tensor(given, name).detach()
    base = given.to(images)
    # integers would be cut off, or wrap around
    if not images.is_floating_point() and bool((base.to(given.device) != given).any()):
        raise ValueError(
            f"{name} have values that inputs of {images.dtype} cannot have: convert"
            " these to floating point numbers."
        )
    # also what the type of the images makes infinite
    if not bool(base.isfinite().all()):
        raise ValueError(f"{name} contain NaN or infinity: give finite numbers.")
    if base.ndim == 0:
        return base.view([1] * images.ndim)
    fits = base.ndim in (images.ndim - 1, images.ndim) and all(
        size in (1, expected)
        for size, expected in zip(reversed(base.shape), reversed(images.shape))
    )
    if not fits:
        raise ValueError(
            f"{name} of shape {tuple(base.shape)} cannot be broadcast to inputs of"
            f" {tuple(images.shape)}: give a number, or shape (1, channels, 1, 1)."
        )
    return base if base.ndim == images.ndim else base[None]


# -- networks, their outputs and targets -----------------------------------------------


def check_evaluation(forward_func: Callable[..., Any]) -> None:
    """Refuse networks whose result depends on the batch, or on chance."""
    if not isinstance(forward_func, torch.nn.Module):
        return
    for name, module in forward_func.named_modules():
        if varies(module):
            raise ValueError(
                f"forward_func's {name or 'module'} ({type(module).__name__}) is in"
                " training mode: call forward_func.eval() first."
            )


def split_args(
    additional_forward_args: object, batch: int
) -> tuple[tuple[Any, ...], list[bool]]:
    """Further arguments as a tuple, and which are tensors with a row per example."""
    args = additional_forward_args
    if not isinstance(args, tuple):
        args = () if args is None else (args,)
    return args, [isinstance(arg, Tensor) and arg.shape[:1] == (batch,) for arg in args]


def check_output(output: Any, count: int) -> Tensor:
    """An output with a row for each of some images, in at least single precision."""
    output = select_output(
        output, remedy="give lambda images: model(images){access} as forward_func"
    )
    if output.shape[:1] != (count,):
        raise ValueError(
            f"forward_func returns an output of shape {tuple(output.shape)} for"
            f" {count} images, instead of one row for each."
        )
    return at_least_single(output) if output.is_floating_point() else output


def evaluate_rows(
    forward_func: Callable[..., Any], images: Sequence[Tensor],
    additional_forward_args: object, batch: int, rows: Tensor,
) -> Tensor:
    """Output for images that are derived from the examples in some rows of a batch."""
    args, per_example = split_args(additional_forward_args, batch)
    further = [
        arg[rows.to(arg.device)] if expand else arg
        for arg, expand in zip(args, per_example)
    ]
    return check_output(forward_func(*images, *further), len(rows))


def check_target(
    target: TargetType, batch: int, device: Union[None, str, torch.device] = None,
    allow_negative: bool = False,
) -> Optional[Tensor]:
    """Indices of shape (batch,), or (batch, output dimensions - 1) for tuples.

    As in Captum, `allow_negative` is for a single index or for tuples.
    """
    if target is None:
        return None
    index = given = as_indices("target", target)
    is_single = not isinstance(target, list) and index.numel() == 1
    if isinstance(target, tuple):
        index = index.expand(batch, *index.shape)
    elif is_single:
        index = index.reshape(1).expand(batch)
    if index.ndim not in (1, 2) or len(index) != batch:
        raise ValueError(
            f"target of shape {tuple(given.shape)} is neither one for all nor one for"
            f" each of {batch} examples."
        )
    # Captum refuses it for one index for each example, which may come from a data set
    may_be_negative = allow_negative and (is_single or index.ndim == 2)
    if bool((index < 0).any()) and not may_be_negative:
        raise ValueError(f"target={target} has a negative index.")
    return index.to(device)


def check_range(output: Tensor, target: Optional[Tensor]) -> None:
    """Check that targets select a single value of the output for each example."""
    sizes = output.shape[1:]
    if target is None:
        if output.ndim > 2 or sizes.numel() != 1:
            raise ValueError(
                f"The output of shape {tuple(output.shape)} has {sizes.numel()} values"
                " per example: choose one with target."
            )
        return
    index = target.reshape(len(target), -1)
    if index.shape[1] != len(sizes):
        raise ValueError(
            f"The output of shape {tuple(output.shape)} needs {len(sizes)} indices per"
            f" example to select a single value, but target has {index.shape[1]}"
            f"{': give target=None' if not sizes else ''}."
        )
    for dim, size in enumerate(sizes):
        wrong = index[:, dim][(index[:, dim] >= size) | (index[:, dim] < -size)]
        if len(wrong):
            what = "classes" if dim == 0 else f"elements in dimension {dim + 1}"
            raise ValueError(
                f"target {int(wrong[0])} is out of range for {size} {what} of an output"
                f" of shape {tuple(output.shape)}."
            )


def select_target(
    output: Tensor, target: Optional[Tensor], validate: bool = True
) -> Tensor:
    """The target's value of each example. Checking its range waits for the device."""
    if validate:
        check_range(output, target)
    if target is None:
        return output.reshape(len(output))
    index = target.reshape(len(target), -1)
    rows = torch.arange(len(output), device=output.device)
    return output[(rows, *index.unbind(1))]


def predicted_class(output: Tensor, target: Optional[Tensor] = None) -> Tensor:
    """Class with the largest output, at the target's place if there are several."""
    if output.ndim == 1:
        return output.new_zeros(len(output), dtype=torch.long)
    if output.ndim > 2 and target is not None:
        rows = torch.arange(len(output), device=output.device)
        output = output.movedim(1, -1)[(rows, *target[:, 1:].unbind(1))]
    return output.argmax(1)


# -- scores ----------------------------------------------------------------------------


class Scores:
    """Scores of all classes, from outputs: by a function, or the name of one."""

    def __init__(self, output: ScoreFunction) -> None:
        if not callable(output):
            check_choice("output", output, ("softmax", "identity", "logit"))
        self.output = output
        # what a softmax was taken of, without waiting for the device
        self.judged: list[Tensor] = []

    def __call__(self, result: Tensor) -> Tensor:
        scores = self.output(result) if callable(self.output) else result
        if not isinstance(scores, Tensor) or scores.shape[:1] != result.shape[:1]:
            found = tuple(scores.shape) if isinstance(scores, Tensor) else repr(scores)
            raise ValueError(
                f"output must return a tensor with one row for each of {len(result)}"
                f" images, but returns {found}."
            )
        scores = at_least_single(scores)
        if self.output != "softmax" or scores.shape[1:].numel() <= 1:
            return scores
        within = ((result >= 0) & (result <= 1)).all()
        sums = ((result.sum(1) - 1).abs() <= SUM_TOLERANCE).all()
        many = within & (result.shape[1] >= MANY_CLASSES)
        self.judged.append(torch.stack([many, within & sums]))
        return scores.softmax(1)

    def warn(self, stacklevel: int = 3) -> None:
        """Warn the caller of the caller if softmax was taken of probabilities."""
        if not self.judged:
            return
        within, probabilities = torch.stack(self.judged).all(0).tolist()
        if probabilities:
            message = (
                "forward_func returns probabilities (between 0 and 1, with a sum of 1"
                " over the classes), and output='softmax' takes the softmax once more:"
                " all scores are close to each other then. Give output='identity'."
            )
        elif within:
            message = (
                "All outputs of forward_func are between 0 and 1, as those of a sigmoid"
                " are. Their softmax is close to 1 / classes for any image: give"
                " output='identity' if they are scores already."
            )
        else:
            return
        warnings.warn(message, ProbabilityWarning, stacklevel=stacklevel)
