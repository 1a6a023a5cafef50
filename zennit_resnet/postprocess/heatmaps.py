'''Post-processing, which turns relevance into heatmaps.'''
import math
import warnings
from operator import index
from typing import NamedTuple

import torch

from ..arguments import check_choice, check_flag, check_number, map_shape, takes_maps
from .regions import (
    binarize,
    check_heatmap,
    component_of_maximum,
    expand_heatmap,
    largest_component,
    largest_contour,
    reduce_heatmap,
    to_double,
    to_type_of,
)


class EmptyMaskWarning(UserWarning):
    '''Post-processing left nothing of a heatmap.'''


class Choice(NamedTuple):
    '''Result of :py:func:`c1c` and :py:func:`c3` with everything it was made from, for a batch of heatmaps.

    The result and the reduced heatmaps, then boolean masks of the filled contour (None for :py:func:`c1c`), of the
    component and of what was kept, all of shape ``(batch, *size)`` but for the result, which has that of the heatmaps,
    and whether nothing was kept, of shape (batch,).
    '''
    heatmap: torch.Tensor
    reduced: torch.Tensor
    contour: torch.Tensor | None
    component: torch.Tensor
    mask: torch.Tensor
    empty: torch.Tensor


class AttentionErrors(NamedTuple):
    '''How the attended region of each heatmap of a batch fits the object, see :py:func:`attention_errors`.

    The share of the object that is attended, and the share of the attended region that is on the object (one where
    nothing is attended), then four flags, exactly one of them true: correct, insufficiently attended (IA),
    over-attended (OA) and wrongly attended (WA). All are of shape (batch,). Where there is no object, shares are NaN,
    and no flag is true.
    '''
    coverage: torch.Tensor
    precision: torch.Tensor
    correct: torch.Tensor
    insufficient: torch.Tensor
    over: torch.Tensor
    wrong: torch.Tensor


@takes_maps('relevance', single=False)
def sum_channels(relevance, dims=2):
    '''Sum relevance over channels to get heatmaps: (batch, channels, height, width) to (batch, height, width).

    The sum (not the mean or the largest channel) keeps the total, so that a heatmap of conserved relevance still sums
    to the initial relevance. With ``dims=1``, relevance is that of signals, of shape (batch, channels, length), with
    ``dims=3`` of volumes or videos, of shape (batch, channels, depth, height, width). A ValueError is raised if it is
    of another shape.
    '''
    expected = map_shape(dims, 'batch', 'channels')
    if relevance.ndim != dims + 2:
        others = {3: 'signals', 4: 'images', 5: 'volumes or videos'}
        hints = ['relevance[None] for a single example'] if relevance.ndim == dims + 1 else []
        if relevance.ndim in others:
            hints.append(f'dims={relevance.ndim - 2} for {others[relevance.ndim]}')
        raise ValueError(
            f'Relevance must be of shape {expected}, but is {tuple(relevance.shape)}!'
            + (f' Use {" or ".join(hints)}.' if hints else '')
        )
    return relevance.sum(1)


@takes_maps('heatmap')
def heat_quantization(heatmap, levels=8, dims=2):
    '''Lower each value of a heatmap to the nearest of a few evenly spaced levels (Otsuki et al. 2024, Section 3.4).

    With edges :math:`e_0 < ... < e_{n-1}` evenly spaced between the lowest and the highest value of the map, a value
    :math:`a` becomes :math:`e_k` where :math:`e_k \\le a < e_{k+1}`, so only the highest value itself keeps the last
    edge. Quantizing a quantized map changes nothing, nor does quantizing a constant one. Relevance is not conserved,
    and there are ties: pixels can no longer be ranked within a level.

    Each heatmap is quantized on its own, all slices of a volume to the same ``levels``, the number of edges (at least
    2).
    '''
    levels = index(levels)
    if levels < 2:
        raise ValueError(f'Heat quantization needs at least 2 levels, but got levels={levels}!')
    heatmap = check_heatmap(heatmap, dims)
    if heatmap.numel() == 0:
        return heatmap.clone()

    # single precision is available on every device, and represents every value of the shorter types
    values = heatmap.flatten(1).to(torch.promote_types(heatmap.dtype, torch.float32)).contiguous()
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    # the same steps as numpy.linspace; rounding must not push an edge beyond the highest value
    step = (high - low) / (levels - 1)
    # the range of a map may be too large for its type
    step = step.where(step.isfinite(), high / (levels - 1) - low / (levels - 1))
    edges = low + torch.arange(levels, device=values.device, dtype=values.dtype) * step
    edges = torch.minimum(edges, high)
    edges[:, -1:] = high
    # rounded to the type of the result before comparing, since an edge is otherwise lower than itself the next time
    edges = edges.to(heatmap.dtype).to(values.dtype)
    level = torch.searchsorted(edges, values, right=True) - 1
    return edges.gather(1, level).to(heatmap.dtype).view(heatmap.shape)


@takes_maps('heatmap')
def c1c(
    heatmap, size=28, threshold='mean', select='area', connectivity=8, expand='bilinear', outside='zero',
    return_masks=False
):
    '''Keep one connected component of reduced heatmaps (C1C in the ablation of Doublet et al. 2024, Table 2).

    For all else, see :py:func:`c3`, where ``threshold`` is that of the component. A constant map has nothing above its
    mean, so nothing of it is left with ``select='area'``.

    With ``select='area'`` (default, as the paper describes it), it is the component with the most pixels. With
    ``'max_value'`` (as in code of the same group), it is the one that holds the largest value, or the whole map if
    nothing is above the threshold. That code also triples the values inside, which has no effect on pictures or
    rankings, and is left out.
    '''
    check_choice('select', select, ('area', 'max_value'))
    reduced = reduce_heatmap(to_double(heatmap), size)
    binary = binarize(reduced, threshold)
    if select == 'area':
        component = largest_component(binary, connectivity)
    else:
        component = component_of_maximum(reduced, binary, connectivity)
    return _keep(heatmap, reduced, None, component, expand, outside, return_masks)


@takes_maps('heatmap')
def c3(
    heatmap, size=28, threshold='mean', component_threshold=None, contour='largest_area', connectivity=8,
    expand='bilinear', outside='zero', return_masks=False
):
    '''Keep what the largest contour and the largest component of reduced heatmaps have in common (C³).

    With the reduced map :math:`\\alpha_R`, the filled contour :math:`C_1` and the component :math:`C_2`, Doublet et al.
    2024, Eqs. (3) and (4), compute :math:`(C_1 \\wedge C_2) \\odot \\alpha_R` before the map is expanded again. With
    the same threshold for both masks, the contour contains the component which it surrounds, so that the result either
    is that of :py:func:`c1c`, or is empty. That both differ in the paper's Table 2 has a reason which the paper does
    not state. There are two thresholds here to look for it.

    Parameters
    ----------
    heatmap: :py:obj:`torch.Tensor`
        Heatmaps of shape (batch, height, width). Each is processed on its own. They are not modified.
    size: int or tuple[int, int], optional
        Size to reduce heatmaps to, see :py:func:`~zennit_resnet.postprocess.reduce_heatmap`. Default is 28, as in the
        paper.
    threshold: str, float or callable, optional
        What is above it may belong to the contour, see :py:func:`~zennit_resnet.postprocess.binarize`.
    component_threshold: str, float or callable, optional
        What is above it may belong to the component. Default is None, which is ``threshold``.
    contour: str, optional
        See :py:func:`~zennit_resnet.postprocess.largest_contour`.
    connectivity, expand: optional
        See :py:func:`~zennit_resnet.postprocess.largest_component` and
        :py:func:`~zennit_resnet.postprocess.expand_heatmap`.
    outside: str, optional
        What values outside of what is kept become. With ``'zero'`` (default, Eq. (4)), pixels outside outrank negative
        relevance inside, if heatmaps are ranked afterwards. With ``'minimum'``, they become the lowest value of the
        reduced map, and no pixel outside outranks one inside.
    return_masks: bool, optional
        Whether to return everything instead of the result alone. Default is False.

    Returns
    -------
    :py:obj:`torch.Tensor` or :py:obj:`Choice`
        Heatmaps of shape (batch, height, width), or these with all masks and flags. A map with nothing left,
        because the masks have no pixel in common or nothing is above a threshold, is zero everywhere (or the lowest
        value), and an :py:obj:`EmptyMaskWarning` says so, unless ``return_masks``.
    '''
    reduced = reduce_heatmap(to_double(heatmap), size)
    contour = largest_contour(binarize(reduced, threshold), contour)
    binary = binarize(reduced, threshold if component_threshold is None else component_threshold)
    component = largest_component(binary, connectivity)
    return _keep(heatmap, reduced, contour, component, expand, outside, return_masks)


def _keep(heatmap, reduced, contour, component, expand, outside, return_masks):
    '''Keep what is inside of both masks, expand it, and tell which maps are empty.'''
    check_choice('outside', outside, ('zero', 'minimum'))
    check_flag('return_masks', return_masks)
    mask = component if contour is None else contour & component
    empty = ~mask.flatten(1).any(1)
    rest = 0. if outside == 'zero' else reduced.amin((1, 2), keepdim=True)
    result = to_type_of(expand_heatmap(torch.where(mask, reduced, rest), heatmap.shape[1:], expand), heatmap)
    if return_masks:
        masks = (None if each is None else each.to(heatmap.device) for each in (contour, component, mask, empty))
        return Choice(result, to_type_of(reduced, heatmap), *masks)
    if empty.any():
        numbers = ', '.join(map(str, empty.nonzero()[:, 0].tolist()))
        warnings.warn(
            f'Nothing is left of {int(empty.sum())} of {len(empty)} heatmaps ({numbers}): they are constant, or '
            'nothing is above the thresholds or common to both masks. Use return_masks=True to get flags instead.',
            EmptyMaskWarning, stacklevel=4
        )
    return result


@takes_maps('contour', 'component')
def mask_cases(contour, component):
    '''Find out how often the two masks of :py:func:`c3` agree, of shape (batch, height, width).

    The result is a dict of the fraction of the batch in each of these cases: ``'coincide'`` if masks are equal,
    ``'contained'`` if the component is a proper part of the contour's interior, ``'overlap'`` if they have pixels in
    common, and the component others as well, ``'disjoint'`` if they have none in common, and ``'blank'`` if one has no
    pixels at all. In the last two cases, the result of C³ is empty.
    '''
    if contour.shape != component.shape or contour.ndim != 3 or len(contour) == 0:
        raise ValueError(
            'Both masks must be of the same shape (batch, height, width) with a batch of at least one, but are of '
            f'shape {tuple(contour.shape)} and {tuple(component.shape)}!'
        )
    contour, component = contour.bool().flatten(1), component.bool().flatten(1)
    blank = ~(contour.any(1) & component.any(1))
    disjoint = ~(contour & component).any(1) & ~blank
    inside = ~(component & ~contour).any(1) & ~blank
    equal = (contour == component).all(1)
    cases = {
        'coincide': inside & equal, 'contained': inside & ~equal, 'overlap': ~(inside | disjoint | blank),
        'disjoint': disjoint, 'blank': blank,
    }
    return {name: int(flags.sum()) / len(flags) for name, flags in cases.items()}


@takes_maps('heatmap')
def ablation(heatmap, **options):
    '''Post-process heatmaps as in the ablation of Doublet et al. 2024, Table 2, which leaves out C³ or replaces it.

    Arguments are those of :py:func:`c3`, and C1C keeps its component. The result is a dict of heatmaps of shape (batch,
    height, width), ``'none'``, which is ``heatmap`` itself, ``'c1c'`` and ``'c3'``, and fractions of the batch, see
    :py:func:`mask_cases`. If both thresholds are equal, ``'c1c'`` and ``'c3'`` are equal but for maps in
    ``'disjoint'``.
    '''
    chosen = c3(heatmap, **options, return_masks=True)
    common = {key: value for key, value in options.items() if key in ('size', 'connectivity', 'expand', 'outside')}
    threshold = options.get('component_threshold')
    if threshold is None:
        threshold = options.get('threshold', 'mean')
    component = c1c(heatmap, threshold=threshold, **common, return_masks=True).heatmap
    return {'none': heatmap, 'c1c': component, 'c3': chosen.heatmap}, mask_cases(chosen.contour, chosen.component)


@takes_maps('heatmap', 'mask')
def attention_errors(heatmap, mask, threshold='mean', coverage=0.5, precision=0.5, dims=2):
    '''Tell the types of errors of explanations apart, given where the object is, as :py:class:`AttentionErrors`.

    The slides of Doublet et al. 2024 name three, which were counted by eye and without thresholds. Those here are ours:
    what is above a threshold of the heatmap, see :py:func:`~zennit_resnet.postprocess.binarize`, is attended. With
    enough of the object attended (coverage), and enough of what is attended on the object (precision), it is correct;
    with too little coverage insufficient, with too little precision over, with too little of both wrong. Where nothing
    is attended at all, it is insufficient. Coverage and precision are shares that are enough. Heatmaps, for instance by
    :py:func:`c3`, and masks are of shape (batch, height, width).
    '''
    for name, value in (('coverage', coverage), ('precision', precision)):
        check_number(name, value, 0, 1)
    attended = binarize(heatmap, threshold, dims).cpu().flatten(1)
    if mask.shape != heatmap.shape:
        raise ValueError(f'Heatmaps are of shape {tuple(heatmap.shape)}, but masks of shape {tuple(mask.shape)}!')
    target = (mask != 0).cpu().flatten(1)
    common, attended, target = (pixels.sum(1) for pixels in (attended & target, attended, target))
    known = target > 0
    covered = common / target
    focused = torch.where(attended > 0, common / attended, 1.).where(known, math.nan)
    enough, precise = covered >= coverage, focused >= precision
    types = (enough & precise, ~enough & precise, enough & ~precise, ~enough & ~precise)
    result = (covered, focused, *(known & flags for flags in types))
    return AttentionErrors(*(values.to(heatmap.device) for values in result))
