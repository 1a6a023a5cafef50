"""Whether maps depend on the class that they explain, and on what a network learned."""

from typing import Callable, NamedTuple, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from captum_adapters._validation import (
    Maps,
    as_batch,
    by_pixels,
    double_dtype,
    pixel_maps,
    suggest,
    to_tensor,
)
from zennit_resnet.arguments import map_shape

# Side of the window of SSIM, and its constants, for values from 0 to 1
WINDOW, STABILIZERS = 7, (0.01**2, 0.03**2)


class Similarity(NamedTuple):
    """How similar maps are, each of shape (batch,) on their device, 1 for equal maps.

    A constant map has a correlation of 0 with one that varies, and of 1 with another
    constant one. The same holds for zero and the cosine.

    Attributes:
        pearson (Tensor): Correlation of values.
        spearman (Tensor): Correlation of ranks, where equal values share their rank.
        cosine (Tensor): Cosine of the angle between both maps.
        ssim (Tensor): Structural similarity (Wang et al. 2004), in windows of 7 x 7
            pixels with equal weights, of maps that are cut off at their 1st and 99th
            percentile and scaled to the range from 0 to 1, as Sixt et al. 2020 do. It
            does not depend on positive factors, nor on offsets.
    """

    pearson: Tensor
    spearman: Tensor
    cosine: Tensor
    ssim: Tensor


class Randomization(NamedTuple):
    """Result of :func:`randomization`. Tensors are of shape (batch, depths).

    Attributes:
        layers (tuple[str, ...]): Names of modules, in the order in which they were
            randomized. At each depth, they all are up to this one.
        pearson, spearman, cosine, ssim (Tensor): Similarity of the map at each depth to
            that of the original network, see :class:`Similarity`.
    """

    layers: tuple[str, ...]
    pearson: Tensor
    spearman: Tensor
    cosine: Tensor
    ssim: Tensor


def summed_maps(
    attributions: Maps, name: str = "attributions", dims: int = 2
) -> Tensor:
    """Maps of shape (batch, height, width), of a size that no image prescribes."""
    channels = map_shape(dims, "batch", "channels")
    maps = as_batch(to_tensor(attributions, name), 1, dims)
    if maps.ndim not in (dims + 1, dims + 2) or maps.numel() == 0:
        raise ValueError(
            f"{name} must be of shape {channels} or {map_shape(dims, 'batch')}, or"
            f" {map_shape(dims)} for a single map, and not empty, but are of shape"
            f" {tuple(maps.shape)}."
        )
    return pixel_maps(maps, maps if maps.ndim == dims + 2 else maps[:, None])


def _ranks(values: Tensor) -> Tensor:
    """Twice the ranks of values of shape (batch, N), the mean one for equal values."""
    ordered = values.sort(1).values
    below = torch.searchsorted(ordered, values)
    return below + torch.searchsorted(ordered, values, right=True)


def _cosine(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of the angle between vectors: of zero with zero 1, with others 0."""
    zero = [(vector == 0).all(1) for vector in (first, second)]
    # lengths could underflow otherwise
    first, second = (
        F.normalize(vector / vector.abs().amax(1, keepdim=True), dim=1).nan_to_num(0)
        for vector in (first, second)
    )
    cosine = (first * second).sum(1).clamp(-1, 1)
    return cosine.where(~(zero[0] & zero[1]), 1)


def _centered(values: Tensor) -> Tensor:
    """Deviations from the mean, exactly zero for constant values."""
    values = values / values.abs().amax(1, keepdim=True)
    # false for zeros as well, which are NaN now
    varies = values.amax(1, keepdim=True) > values.amin(1, keepdim=True)
    return (values - values.mean(1, keepdim=True)).where(varies, 0)


def _to_unit(maps: Tensor) -> Tensor:
    """Cut maps off at percentiles, and scale them to the range from 0 to 1."""
    ordered = maps.flatten(1).sort(1).values
    last = ordered.shape[1] - 1
    low, high = ordered[:, round(0.01 * last)], ordered[:, round(0.99 * last)]
    # of sparse maps, what is left
    sparse = low == high
    low, high = ordered[:, 0].where(sparse, low), ordered[:, -1].where(sparse, high)
    span = (high - low).where(high > low, 1)
    low, span = (bound.view(-1, *[1] * (maps.ndim - 1)) for bound in (low, span))
    return ((maps - low) / span).clamp(0, 1)


def _ssim(first: Tensor, second: Tensor) -> Tensor:
    """Structural similarity of maps with values from 0 to 1, in windows inside."""
    window = [min(WINDOW, length) for length in first.shape[1:]]
    average = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(window) - 1]
    moments = torch.stack([first, second, first**2, second**2, first * second])
    x, y, xx, yy, xy = average(moments, window, stride=1)
    c1, c2 = STABILIZERS
    similar = (2 * x * y + c1) * (2 * (xy - x * y) + c2)
    most = (x**2 + y**2 + c1) * (xx - x**2 + yy - y**2 + c2)
    return (similar / most).flatten(1).mean(1)


def _similarity(first: Tensor, second: Tensor) -> Similarity:
    """How similar maps of shape (batch, height, width) are."""
    dtype = double_dtype(first.device)
    first, second = first.to(dtype), second.to(dtype)
    flat = first.flatten(1), second.flatten(1)
    return Similarity(
        pearson=_cosine(*map(_centered, flat)),
        spearman=_cosine(*(_centered(_ranks(values).to(dtype)) for values in flat)),
        cosine=_cosine(*flat),
        ssim=_ssim(_to_unit(first), _to_unit(second)),
    )


def _fitting_maps(maps: Maps, expected: Tensor, name: str) -> Tensor:
    """Maps on the device of others, whose shape they must have."""
    result = summed_maps(maps, name, expected.ndim - 1)
    if result.shape != expected.shape:
        raise ValueError(
            f"{name} are {len(result)} maps of {by_pixels(result.shape[1:])} pixels, but"
            f" the others are {len(expected)} of {by_pixels(expected.shape[1:])}."
        )
    return result.to(expected.device)


def class_sensitivity(
    attributions: Maps, other_attributions: Maps, *, dims: int = 2
) -> Similarity:
    """How similar maps are to those of another class of the same images.

    A map that answers for what the network sees its class differs from that of another
    class: 0 is the correlation of unrelated maps, and 1 (the ceiling) of maps that do
    not depend on the class at all. Sixt et al. 2020 compare with a random class, and
    the second highest is a harder case.

    Args:
        attributions, other_attributions (Tensor, numpy.ndarray or tuple[Tensor]):
            Attributions of the same height and width, see :func:`insertion_deletion`.
            Channels are summed.
        dims (int, optional): 1 for signals, with attributions of shape (batch,
            channels, length) or (batch, length), 3 for volumes or videos, also for the
            windows of SSIM.

    Raises:
        ValueError: If a shape does not fit, or there is NaN or infinity in the maps.

    Examples:
        >>> import torch
        >>> from captum_adapters.metrics import class_sensitivity
        >>> maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> result = class_sensitivity(maps, maps**2)
        >>> [round(values.item(), 3) for values in (result.pearson, result.spearman)]
        [0.984, 1.0]
    """
    maps = summed_maps(attributions, dims=dims)
    others = _fitting_maps(other_attributions, maps, "other_attributions")
    return _similarity(maps, others)


def _to_randomize(
    model: torch.nn.Module, layers: Optional[Sequence[str]]
) -> dict[str, list[Tensor]]:
    """Parameters of modules, in the order in which they are randomized."""
    modules = dict(model.named_modules())
    if layers is None:
        own = ((name, [*modules[name].parameters(recurse=False)]) for name in modules)
        found = {name: parameters for name, parameters in own if parameters}
        found = dict(reversed(found.items()))
    else:
        found = {}
        for name in [layers] if isinstance(layers, str) else layers:
            if name not in modules:
                raise ValueError(
                    f"layers contain {name!r}, but the model has no such module"
                    f"{suggest(name, filter(None, modules))}"
                )
            found[name] = [*modules[name].parameters()]
    empty = [name for name, parameters in found.items() if not parameters]
    if empty or not found:
        where = repr(empty[0]) if empty else "any of the layers"
        raise ValueError(f"There are no parameters to randomize in {where}.")
    return found


def randomization(
    model: torch.nn.Module, explain: Callable[[torch.nn.Module], Maps],
    layers: Optional[Sequence[str]] = None, *, seed: int = 0,
    show_progress: bool = False, dims: int = 2,
) -> Randomization:
    """Cascading randomization: similarity of maps to those of a network unlearning.

    From the output downward, the parameters of one module after the other become
    random, and maps are compared with those of the original network (Adebayo et al.
    2018). Maps that stay similar do not show what the network has learned. With rules
    such as z+, similarity falls late or never (Sixt et al. 2020).

    Each parameter is replaced by normal random numbers of its own mean and standard
    deviation, so that signals keep their scale in deep networks as well. A constant
    parameter stays as it is. Afterwards, also after an error, the model's parameters
    and buffers are what they were, bit for bit.

    Start relevance from the probability or from one, as logits change their sign, and
    choose the class beforehand, not by the prediction of the randomized network.

    Args:
        model (torch.nn.Module): The network, in evaluation mode. Its parameters are
            modified in place meanwhile.
        explain (Callable): Function of the network which returns attributions of shape
            (batch, channels, height, width) or (batch, height, width), for the same
            images each time. It is called for the original network, and for each depth.
        layers (sequence of str, optional): Names of modules, those near to the output
            first. Modules inside of them are randomized together with them. Default:
            None, for each module that has parameters of its own, the last one in
            `model.named_modules()` first
        seed (int, optional): Seed of the random numbers.
        show_progress (bool, optional): Whether to show a progress bar.
        dims (int, optional): See :func:`class_sensitivity`.

    Raises:
        ValueError: If there is no such layer, one has no parameters, or maps do not
            fit, or have NaN or infinity.
        TypeError: If the model is no module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model={model!r} is not a torch.nn.Module.")
    cascade = _to_randomize(model, layers)
    generator = torch.Generator().manual_seed(seed)
    state = [*model.parameters(), *model.buffers()]
    saved = [tensor.detach().clone() for tensor in state]
    found = []
    try:
        # a copy, as maps may be views of what is randomized
        original = summed_maps(explain(model), dims=dims).clone()
        for parameters in tqdm(cascade.values(), disable=not show_progress):
            for parameter in parameters:
                _randomize(parameter, generator)
            maps = _fitting_maps(explain(model), original, "maps of explain")
            found.append(_similarity(original, maps))
    finally:
        with torch.no_grad():
            for tensor, values in zip(state, saved):
                tensor.copy_(values)
    return Randomization(
        tuple(cascade), *(torch.stack(column, 1) for column in zip(*found))
    )


def _randomize(parameter: Tensor, generator: torch.Generator) -> None:
    """Replace a parameter by normal random numbers of its mean and deviation."""
    if parameter.is_complex():
        for part in (parameter.detach().real, parameter.detach().imag):
            _randomize(part, generator)
    if not parameter.is_floating_point():
        return
    values = parameter.detach().double().cpu()
    deviation = values.std(correction=0)
    # that of the generator, whatever the default device is
    noise = torch.randn(
        values.shape, generator=generator, dtype=values.dtype, device="cpu"
    )
    with torch.no_grad():
        parameter.copy_(values.mean() + deviation * noise)
