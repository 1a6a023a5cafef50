'''Post-processing, which turns relevance into heatmaps.'''
from operator import index

import torch


def sum_channels(relevance):
    '''Sum relevance over channels to get heatmaps.

    The sum (not the mean or the largest channel) keeps the total, so that a heatmap of conserved relevance still sums
    to the initial relevance.

    Parameters
    ----------
    relevance: :py:obj:`torch.Tensor`
        Relevance of shape (batch, channels, height, width).

    Returns
    -------
    :py:obj:`torch.Tensor`
        Heatmaps of shape (batch, height, width).

    Raises
    ------
    ValueError
        If ``relevance`` does not have four axes.
    '''
    if relevance.ndim != 4:
        raise ValueError(
            f'Relevance must be of shape (batch, channels, height, width), but is {tuple(relevance.shape)}!'
        )
    return relevance.sum(1)


def heat_quantization(heatmap, levels=8):
    '''Lower each value of a heatmap to the nearest of a few evenly spaced levels (Otsuki et al. 2024, Section 3.4).

    With edges :math:`e_0 < ... < e_{n-1}` evenly spaced between the lowest and the highest value of the map, a value
    :math:`a` becomes

    .. math::

        e_k \\quad \\text{where} \\quad e_k \\le a < e_{k+1},

    so only the highest value itself keeps the last edge. Quantizing a quantized map changes nothing.

    Quantization does not conserve relevance, and creates ties: pixels can no longer be ranked within a level.

    Parameters
    ----------
    heatmap: :py:obj:`torch.Tensor`
        Heatmaps of shape (batch, height, width). Each is quantized on its own, with edges from its own range. They are
        not modified. Integers are converted to the default floating point type.
    levels: int, optional
        Number of edges, of which the first is the lowest, and the last is the highest value. Default is 8.

    Returns
    -------
    :py:obj:`torch.Tensor`
        Quantized heatmaps of shape (batch, height, width). Constant maps are unchanged.

    Raises
    ------
    ValueError
        If ``heatmap`` does not have three axes, is complex, or is not finite, or if ``levels`` is less than 2.
    TypeError
        If ``levels`` is not an integer.
    '''
    levels = index(levels)
    if levels < 2:
        raise ValueError(f'Heat quantization needs at least 2 levels, but got levels={levels}!')
    if heatmap.ndim != 3:
        raise ValueError(
            f'Heatmaps must be of shape (batch, height, width), but the shape is {tuple(heatmap.shape)}!'
            + (' Use sum_channels first.' if heatmap.ndim == 4 else '')
        )
    if heatmap.is_complex():
        raise ValueError(f'Heatmaps must be real, but their type is {heatmap.dtype}!')
    if not heatmap.is_floating_point():
        heatmap = heatmap.to(torch.get_default_dtype())
    finite = heatmap.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(f'Heatmap {int(finite.int().argmin())} of {len(heatmap)} contains NaN or infinite values!')
    if heatmap.numel() == 0:
        return heatmap.clone()

    # single precision is available on every device, and represents every value of the shorter types
    values = heatmap.flatten(1).to(torch.promote_types(heatmap.dtype, torch.float32)).contiguous()
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    # the same steps as numpy.linspace; rounding must not push an edge beyond the highest value
    edges = low + torch.arange(levels, device=values.device, dtype=values.dtype) * ((high - low) / (levels - 1))
    edges = torch.minimum(edges, high)
    edges[:, -1:] = high
    # rounded to the type of the result before comparing, since an edge is otherwise lower than itself the next time
    edges = edges.to(heatmap.dtype).to(values.dtype)
    level = torch.searchsorted(edges, values, right=True) - 1
    return edges.gather(1, level).to(heatmap.dtype).view(heatmap.shape)
