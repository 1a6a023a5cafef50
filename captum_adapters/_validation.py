"""Checks and steps that attribution classes and metrics share."""

import warnings
from typing import Any, Callable, Optional, Union

import torch
import torch.nn.functional as F
from captum._utils.common import _format_additional_forward_args
from captum._utils.typing import BaselineType, TargetType
from torch import Tensor
from tqdm import tqdm

from zennit_resnet.attribution import select_output
from zennit_resnet.canonizers.eager import varies

# Images that go through a network at once, unless there is a larger batch anyway
DEFAULT_CHUNK = 32


class NegativeMapWarning(UserWarning):
    """A map without a positive value, of which the ranking is probably reversed."""


def double_dtype(device: torch.device) -> torch.dtype:
    """The most precise floating point numbers that a device has.

    Args:

        device (torch.device): The device.

    Returns:
        torch.dtype: :obj:`torch.float64`, or :obj:`torch.float32` on MPS.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def at_least_single(values: Tensor) -> Tensor:
    """Scores as numbers of which areas and means can be taken.

    Args:

        values (Tensor): Any real numbers, or bool.

    Returns:
        Tensor: These in double precision if they were before, else in single.

    Examples::

        >>> import torch
        >>> at_least_single(torch.tensor([True, False]))
        tensor([1., 0.])
    """
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def single_tensor(value: Union[Tensor, tuple[Tensor, ...]], name: str) -> Tensor:
    """Take a tensor out of a tuple of one, as Captum's methods return it.

    Args:

        value (Tensor or tuple[Tensor]): A tensor, or a tuple of one.
        name (str): Name of the argument in messages.

    Returns:
        Tensor: The tensor.

    Raises:
        ValueError: If there are several tensors.
        TypeError: If it is not a tensor.
    """
    if isinstance(value, tuple):
        if len(value) != 1:
            raise ValueError(
                f"{name} is a tuple of {len(value)}, but metrics on pixels take a"
                " single tensor: compute them for one input at a time, and give the"
                " others as additional_forward_args."
            )
        value = value[0]
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, but is {type(value).__name__}.")
    return value


def check_images(inputs: Union[Tensor, tuple[Tensor, ...]]) -> Tensor:
    """Check that there is a batch of images.

    Args:

        inputs (Tensor or tuple[Tensor]): Images of shape (batch, channels, height,
                width).

    Returns:
        Tensor: The images, detached.

    Raises:
        ValueError: If the shape is another, or the batch is empty.
    """
    images = single_tensor(inputs, "inputs").detach()
    if images.ndim != 4:
        raise ValueError(
            "inputs must be of shape (batch, channels, height, width), but are of"
            f" shape {tuple(images.shape)}."
        )
    if images.numel() == 0:
        raise ValueError(f"inputs of shape {tuple(images.shape)} are empty.")
    return images


def pixel_maps(
    attributions: Union[Tensor, tuple[Tensor, ...]],
    inputs: Union[Tensor, tuple[Tensor, ...]],
    reduce: str = "sum",
    interpolate: Optional[str] = None,
) -> Tensor:
    """One value per pixel, by which pixels can be ranked.

    Args:

        attributions (Tensor or tuple[Tensor]): Attributions of shape (batch, channels,
                height, width) with the channels of the inputs or a single one, or of
                shape (batch, height, width).
        inputs (Tensor or tuple[Tensor]): The inputs, of shape (batch, channels, height,
                width).
        reduce (str, optional): `"sum"` for the sum over channels, `"abs_sum"` for its
                magnitude: the sum comes first, as contributions of the channels of a
                pixel may cancel.
                Default: `"sum"`
        interpolate (str, optional): Mode of :func:`torch.nn.functional.interpolate`
                (`"bilinear"`, `"nearest"`, `"area"`, ...) for attributions of another
                height and width. `None` refuses these.
                Default: None

    Returns:
        Tensor: Maps of shape (batch, height, width) on the device of the inputs, in
        double precision for attributions in double precision or of integers, and in
        single precision otherwise.

    Raises:
        ValueError: If a shape does not fit, there is NaN or infinity in a map, an
                argument is unknown, or the batch is empty.

    Examples::

        >>> import torch
        >>> attributions = torch.tensor([1.0, -3.0, 0.5]).view(1, 3, 1, 1)
        >>> inputs = torch.zeros(1, 3, 1, 1)
        >>> pixel_maps(attributions, inputs)
        tensor([[[-1.5000]]])
        >>> pixel_maps(attributions, inputs, reduce="abs_sum")
        tensor([[[1.5000]]])
    """
    images = check_images(inputs)
    maps = single_tensor(attributions, "attributions").detach()
    if reduce not in ("sum", "abs_sum"):
        raise ValueError(f"reduce={reduce!r} is not one of 'sum' and 'abs_sum'.")
    if maps.ndim == 3:
        maps = maps[:, None]
    batch, channels, height, width = images.shape
    if maps.ndim != 4 or len(maps) != batch or maps.shape[1] not in (1, channels):
        raise ValueError(
            f"attributions of shape {tuple(single_tensor(attributions, '').shape)} do"
            f" not fit inputs of shape {tuple(images.shape)}: they must be of shape"
            f" (batch, {channels}, height, width), (batch, 1, height, width) or (batch,"
            f" height, width) with a batch of {batch}."
        )
    if maps.is_complex() or maps.dtype == torch.bool:
        raise ValueError(f"attributions must be real numbers, but are {maps.dtype}.")
    precise = maps.dtype == torch.float64 or not maps.is_floating_point()
    # half precision would merge neighbouring ranks
    maps = maps.to(images.device, torch.float64 if precise else torch.float32).sum(1)
    if reduce == "abs_sum":
        maps = maps.abs()
    if maps.shape[1:] != (height, width):
        if interpolate is None:
            raise ValueError(
                f"attributions are of {maps.shape[1]} x {maps.shape[2]} pixels, but"
                f" inputs of {height} x {width}: choose how to resize them, for"
                " instance with interpolate='bilinear'."
            )
        maps = F.interpolate(maps[:, None], (height, width), mode=interpolate)[:, 0]
    finite = maps.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        raise ValueError(
            "attributions contain NaN or infinity for the examples"
            f" {(~finite).nonzero()[:, 0].tolist()} of the batch."
        )
    return maps


def check_baselines(
    baselines: BaselineType, images: Tensor, name: str = "baselines"
) -> Tensor:
    """Give baselines four dimensions, such that they can be broadcast to the images.

    Args:

        baselines (scalar, Tensor, tuple of scalar, or Tensor, optional): As in Captum:
                a number, a tensor that can be broadcast to the images, a tuple of one
                of these, or `None` for 0.
        images (Tensor): Images of shape (batch, channels, height, width).
        name (str, optional): Name of the argument in messages.
                Default: `"baselines"`

    Returns:
        Tensor: Baselines of the images' device and type, each of the four dimensions is
        one or that of the images.

    Raises:
        ValueError: If the shape does not fit, there are several, or a value is none of
                the images' integers.
        TypeError: If it is neither a number nor a tensor.
    """
    if isinstance(baselines, tuple) and len(baselines) == 1:
        baselines = baselines[0]
    if baselines is None:
        baselines = 0
    if isinstance(baselines, (int, float)):
        baselines = torch.tensor(baselines, dtype=torch.float64, device="cpu")
    given = single_tensor(baselines, name).detach()
    base = given.to(images)
    # integers would be cut off, or wrap around
    if not images.is_floating_point() and bool((base.to(given.device) != given).any()):
        raise ValueError(
            f"{name} have values that inputs of {images.dtype} cannot have: convert the"
            " inputs to floating point numbers."
        )
    if base.ndim == 0:
        return base.view(1, 1, 1, 1)
    fits = base.ndim in (3, 4) and all(
        size in (1, expected)
        for size, expected in zip(reversed(base.shape), reversed(images.shape))
    )
    if not fits:
        raise ValueError(
            f"{name} of shape {tuple(base.shape)} cannot be broadcast to inputs of"
            f" shape {tuple(images.shape)}: give a number, or a tensor of shape (1 or"
            " batch, 1 or channels, 1 or height, 1 or width)."
        )
    return base if base.ndim == 4 else base[None]


def warn_negative_maps(maps: Tensor, stacklevel: int = 3) -> None:
    """Warn of maps that vary, but nowhere above zero.

    Args:

        maps (Tensor): Maps of shape (batch, height, width).
        stacklevel (int, optional): Whom the warning is attributed to, as for
                :func:`warnings.warn`. The default is the caller of the caller.
                Default: 3

    Returns:
        None

    Examples::

        >>> import torch
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     warn_negative_maps(torch.tensor([[[-1.0, -2.0]], [[1.0, -2.0]]]))
        >>> [warning.category.__name__ for warning in caught]
        ['NegativeMapWarning']
    """
    values = maps.flatten(1)
    highest = values.amax(1)
    negative = (highest <= 0) & (values.amin(1) < highest)
    if bool(negative.any()):
        warnings.warn(
            f"The maps of the examples {negative.nonzero()[:, 0].tolist()} have no"
            " positive value. If relevance started from a negative logit, then rules"
            " such as z+ give the most relevant pixels the lowest values, and they are"
            " ranked last. Rank by magnitude (reduce='abs_sum'), or start from the"
            " probability ('softmax') or from one ('one').",
            NegativeMapWarning,
            stacklevel=stacklevel,
        )


def check_target(
    target: TargetType,
    batch: int,
    device: Union[None, str, torch.device] = None,
    allow_negative: bool = False,
) -> Optional[Tensor]:
    """Give each example a target of its own.

    Args:

        target (int, tuple, Tensor, or list, optional): As in Captum: an integer or a
                tensor with a single one for all examples, a list of integers or a 1D
                tensor with one for each, a tuple with the indices of all output
                dimensions but the batch, or a list of tuples.
        batch (int): Number of examples.
        device (str or torch.device, optional): Device of the result.
                Default: None
        allow_negative (bool, optional): Whether a single index or tuple may count from
                the last class, as in Captum.
                Default: False

    Returns:
        Tensor or None: Indices of shape (batch,), or (batch, output dimensions - 1) for
        tuples. `None` if there is no target.

    Raises:
        TypeError: If a target is not an integer.
        ValueError: If the number of targets is not the batch size, or one is negative.

    Examples::

        >>> check_target(2, 3)
        tensor([2, 2, 2])
        >>> check_target([(0, 1), (2, 3)], 2)
        tensor([[0, 1],
                [2, 3]])
    """
    if target is None:
        return None
    try:
        index = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"target={target!r} is not made of class indices.") from error
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"target must be of integers, but is of {index.dtype}.")
    if isinstance(target, tuple):
        index = index.expand(batch, *index.shape)
    elif not isinstance(target, list) and index.numel() == 1:
        index = index.reshape(1).expand(batch)
    if index.ndim not in (1, 2) or len(index) != batch:
        raise ValueError(
            f"target of shape {tuple(torch.as_tensor(target).shape)} is neither one for"
            f" all nor one for each of {batch} examples."
        )
    # Captum refuses it for one index for each example, which may come from a data set
    is_single = not isinstance(target, list) and torch.as_tensor(target).numel() == 1
    is_tuple = isinstance(target, tuple) or index.ndim == 2
    if bool((index < 0).any()) and not (allow_negative and (is_single or is_tuple)):
        raise ValueError(f"target={target} has a negative index.")
    return index.to(device, torch.long)


def check_range(output: Tensor, target: Optional[Tensor]) -> None:
    """Check that targets are among the outputs.

    Args:

        output (Tensor): Output of shape (batch, classes, ...) or (batch,).
        target (Tensor or None): Indices by :func:`check_target`, for any examples.

    Returns:
        None

    Raises:
        ValueError: If there is no target for an output with several values, if there
                are fewer or more indices than dimensions, or one is out of range.
    """
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
            raise ValueError(
                f"target {int(wrong[0])} is out of range for {size}"
                f" {'classes' if dim == 0 else f'elements in dimension {dim + 1}'}"
                f" of an output of shape {tuple(output.shape)}."
            )


def select_target(
    output: Tensor, target: Optional[Tensor], validate: bool = True
) -> Tensor:
    """Select the target's value of each example.

    Args:

        output (Tensor): Output of shape (batch, classes, ...), (batch, 1) or (batch,).
        target (Tensor or None): Indices by :func:`check_target`.
        validate (bool, optional): Whether to check their range, which waits for the
                device.
                Default: True

    Returns:
        Tensor: Values of shape (batch,).

    Raises:
        ValueError: As :func:`check_range`, if `validate` is set.

    Examples::

        >>> import torch
        >>> select_target(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 0]))
        tensor([2., 3.])
    """
    if validate:
        check_range(output, target)
    if target is None:
        return output.reshape(len(output))
    index = target.reshape(len(target), -1)
    rows = torch.arange(len(output), device=output.device)
    return output[(rows, *index.unbind(1))]


def predicted_class(output: Tensor, target: Optional[Tensor] = None) -> Tensor:
    """Class with the largest output of each example.

    Args:

        output (Tensor): Output of shape (batch, classes, ...) or (batch,).
        target (Tensor, optional): Indices by :func:`check_target`, which say where to
                look if the output has more than two dimensions.
                Default: None

    Returns:
        Tensor: Class indices of shape (batch,), zero if there is but one output.
    """
    if output.ndim == 1:
        return output.new_zeros(len(output), dtype=torch.long)
    if output.ndim > 2 and target is not None:
        rows = torch.arange(len(output), device=output.device)
        output = output.movedim(1, -1)[(rows, *target[:, 1:].unbind(1))]
    return output.argmax(1)


def check_evaluation(forward_func: Callable[..., Any]) -> None:
    """Refuse networks of which the result depends on the batch, or on chance.

    Args:

        forward_func (callable): A network or a function.

    Returns:
        None

    Raises:
        ValueError: If it is a module with batch norm, dropout or stochastic depth in
                training mode.
    """
    if not isinstance(forward_func, torch.nn.Module):
        return
    for name, module in forward_func.named_modules():
        if varies(module):
            raise ValueError(
                f"forward_func's {name or 'module'} ({type(module).__name__}) is in"
                " training mode, in which results depend on the rest of the batch or"
                " on chance: call forward_func.eval() first."
            )


def have_rows(additional_forward_args: object, batch: int) -> list[bool]:
    """Tell which further arguments are tensors with a row for each example.

    Args:

        additional_forward_args (Any): A further argument, or a tuple of them, or
                `None`.
        batch (int): Number of examples.

    Returns:
        list[bool]: A flag for each argument.
    """
    args = _format_additional_forward_args(additional_forward_args) or ()
    return [isinstance(arg, Tensor) and arg.shape[:1] == (batch,) for arg in args]


def check_output(output: Any, count: int) -> Tensor:
    """Check that there is an output for each image.

    Args:

        output (Any): What a network or a function returns.
        count (int): Number of images.

    Returns:
        Tensor: The output, in single precision if it is in half.

    Raises:
        TypeError: If the output is not a tensor.
        ValueError: If it has another number of rows.
    """
    output = select_output(
        output, remedy="give lambda images: model(images){access} as forward_func"
    )
    if output.shape[:1] != (count,):
        raise ValueError(
            f"forward_func returns an output of shape {tuple(output.shape)} for"
            f" {count} images, instead of one row for each."
        )
    return at_least_single(output) if output.is_floating_point() else output


def forward_in_chunks(
    forward_func: Callable[..., Any],
    make_inputs: Callable[[slice], Tensor],
    collect: Callable[[Tensor, slice], tuple[Tensor, ...]],
    examples: Tensor,
    batch: int,
    additional_forward_args: object = None,
    max_examples_per_batch: Optional[int] = None,
    show_progress: bool = False,
) -> tuple[Tensor, ...]:
    """Evaluate many images that are derived from a batch, a few at a time.

    Nothing waits for the device, unless `make_inputs` or `collect` do.

    Args:

        forward_func (callable): The network, or any function of images.
        make_inputs (callable): A function `(part: slice) -> Tensor`, which creates the
                images of a part of all.
        collect (callable): A function `(output: Tensor, part: slice) -> tuple[Tensor]`
                of what shall be kept of the output, which is in at least single
                precision.
        examples (Tensor): For each image, the index of the example it is derived from,
                of shape (images,).
        batch (int): Number of examples.
        additional_forward_args (Any, optional): Further arguments of `forward_func`.
                Those tensors that have a row for each example are given with the row of
                each image's example.
                Default: None
        max_examples_per_batch (int, optional): The largest number of images at a time.
                By default 32, or the number of examples if that is larger.
                Default: None
        show_progress (bool, optional): Whether to show a progress bar.
                Default: False

    Returns:
        tuple[Tensor]: What was collected, concatenated.

    Raises:
        ValueError: If `forward_func` is a network in training mode, the number of
                outputs is not that of the images, or `max_examples_per_batch` is less
                than one.
        TypeError: If the output is not a tensor.
    """
    check_evaluation(forward_func)
    size = max(DEFAULT_CHUNK, batch)
    if max_examples_per_batch is not None:
        size = max_examples_per_batch
    if size < 1:
        raise ValueError(f"max_examples_per_batch={size} is not positive.")
    args = _format_additional_forward_args(additional_forward_args) or ()
    per_example = have_rows(additional_forward_args, batch)
    collected = []
    total = len(examples)
    with torch.no_grad(), tqdm(total=total, disable=not show_progress) as progress:
        for begin in range(0, total, size):
            part = slice(begin, min(begin + size, total))
            rows = examples[part]
            output = forward_func(
                make_inputs(part),
                *(
                    arg[rows.to(arg.device)] if expand else arg
                    for arg, expand in zip(args, per_example)
                ),
            )
            collected.append(collect(check_output(output, len(rows)), part))
            progress.update(len(rows))
    return tuple(torch.cat(tensors) for tensors in zip(*collected))
