'''Tests for channel sums, heat quantization, and the choice of contour and component.'''
import re
import warnings
from collections import deque

import cv2
import numpy as np
import pytest
import torch
from golden_cases import golden_cases, relative_error, tensor

from zennit_resnet.postprocess import (
    EmptyMaskWarning,
    ablation,
    attention_errors,
    binarize,
    c1c,
    c3,
    component_of_maximum,
    expand_heatmap,
    heat_quantization,
    largest_component,
    largest_contour,
    mask_cases,
    reduce_heatmap,
    sum_channels,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def naive_quantization(heatmap, levels):
    '''Section 3.4 of Otsuki et al. 2024, value by value.'''
    result = heatmap.copy()
    for sample, output in zip(heatmap, result):
        edges = np.linspace(sample.min(), sample.max(), levels)
        for pos in np.ndindex(*sample.shape):
            output[pos] = max(edge for edge in edges if edge <= sample[pos])
    return result


@pytest.mark.parametrize('arrays, settings, case', golden_cases('map_heat_quantization', 'heat_quantization'))
def test_golden(arrays, settings, case):
    '''The golden cases, each as a batch of one.'''
    assert case['arguments']['mode'] == 'floor'
    output = heat_quantization(tensor(arrays, case['inputs']['map']), levels=case['arguments']['levels'])
    expected = tensor(arrays, case['expected']['map'])
    assert output.shape == expected.shape
    assert relative_error(output, expected) < 1e-9


@pytest.mark.parametrize('levels', [2, 3, 8, 17])
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_naive(levels, dtype):
    '''A batch of maps of different range equals the loop over values bit for bit.'''
    heatmap = np.random.default_rng(0).normal(size=(5, 9, 7)).astype(dtype)
    heatmap *= np.array([1e-6, 1., -3., 1e4, 0.], dtype=dtype)[:, None, None]
    heatmap += np.array([0., 7., 0., -1e4, 2.], dtype=dtype)[:, None, None]
    output = heat_quantization(torch.from_numpy(heatmap), levels=levels)
    assert output.dtype == torch.from_numpy(heatmap).dtype
    np.testing.assert_array_equal(output.numpy(), naive_quantization(heatmap, levels))


@pytest.mark.parametrize('levels', [2, 7, 8, 100])
@pytest.mark.parametrize('dtype', DTYPES)
def test_laws(dtype, levels):
    '''Quantization lowers values to at most ``levels`` values, keeps the extremes and the order, and is idempotent.'''
    heatmap = torch.randn(16, 24, 24, dtype=torch.float64).to(dtype)
    before = heatmap.clone()
    output = heat_quantization(heatmap, levels=levels)
    assert torch.equal(heatmap, before)
    assert output.dtype == dtype
    assert bool((output <= heatmap).all())
    assert torch.equal(output.amin((1, 2)), heatmap.amin((1, 2)))
    assert torch.equal(output.amax((1, 2)), heatmap.amax((1, 2)))
    assert max(len(sample.unique()) for sample in output.float()) <= levels
    for sample, quantized in zip(heatmap.flatten(1), output.flatten(1)):
        assert bool((quantized[sample.argsort()].diff() >= 0).all())
    assert torch.equal(heat_quantization(output, levels=levels), output)


@pytest.mark.parametrize('low, high', [(0., 1.), (-0.1, 0.6), (1e-3, 3.), (-7., -1e-2)])
def test_values_on_edges(low, high):
    '''A value exactly on an edge stays, and the value just below it falls to the edge before.'''
    edges = np.linspace(low, high, 8)
    below = np.nextafter(edges[1:], -np.inf)
    heatmap = torch.from_numpy(np.concatenate([edges, below]))[None, None]
    expected = torch.from_numpy(np.concatenate([edges, edges[:-1]]))[None, None]
    assert torch.equal(heat_quantization(heatmap), expected)


def test_samples_are_independent():
    '''Each map has its own edges, so a batch gives what the single maps give.'''
    heatmap = torch.randn(4, 5, 6) * torch.tensor([1., 10., 100., 1000.])[:, None, None]
    single = torch.cat([heat_quantization(sample[None]) for sample in heatmap])
    assert torch.equal(heat_quantization(heatmap), single)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_quantization_of_the_whole_range(dtype):
    '''The range of a map may be larger than its type can hold.'''
    largest = torch.finfo(dtype).max
    heatmap = torch.linspace(-1, 1, 8, dtype=torch.float64).mul(largest).to(dtype).view(1, 2, 4)
    output = heat_quantization(heatmap, levels=3)
    assert output.flatten().tolist() == [-largest] * 4 + [0.] * 3 + [largest]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('value', [0., -2.7, 1e-7])
def test_constant(value, dtype):
    '''A constant map is unchanged, also beside one that is not constant.'''
    heatmap = torch.stack([torch.full((3, 4), value), torch.randn(3, 4)]).to(dtype)
    assert torch.equal(heat_quantization(heatmap)[0], heatmap[0])


def test_layouts():
    '''Maps may be non-contiguous, of integers, or none at all.'''
    heatmap = torch.randn(2, 5, 6)
    expected = heat_quantization(heatmap)
    assert torch.equal(heat_quantization(heatmap.permute(0, 2, 1)), expected.permute(0, 2, 1))
    assert heat_quantization(torch.arange(4).view(1, 2, 2), levels=2).tolist() == [[[0., 0.], [0., 3.]]]
    assert heat_quantization(torch.zeros(0, 3, 3)).shape == (0, 3, 3)


@pytest.mark.parametrize('shape, message', [
    ((5,), r'\(batch, height, width\).*\(5,\)'),
    ((2, 3, 4, 5), r'\(2, 3, 4, 5\).*sum_channels'),
])
def test_wrong_rank(shape, message):
    '''The error names the shape.'''
    with pytest.raises(ValueError, match=message):
        heat_quantization(torch.zeros(shape))


@pytest.mark.parametrize('levels', [1, 0, -3])
def test_too_few_levels(levels):
    '''There must be at least two edges.'''
    with pytest.raises(ValueError, match=f'levels={levels}'):
        heat_quantization(torch.zeros(1, 2, 2), levels=levels)


def test_levels_are_integers():
    '''A number of levels that is not an integer is not rounded silently.'''
    with pytest.raises(TypeError):
        heat_quantization(torch.zeros(1, 2, 2), levels=7.5)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')])
def test_not_finite(value):
    '''The error names the map which is not finite.'''
    heatmap = torch.randn(3, 2, 2)
    heatmap[1, 0, 1] = value
    with pytest.raises(ValueError, match='Heatmap 1 of 3'):
        heat_quantization(heatmap)


def test_sum_channels():
    '''Channels are summed with their signs.'''
    relevance = torch.randn(2, 3, 4, 5)
    expected = relevance[:, 0] + relevance[:, 1] + relevance[:, 2]
    torch.testing.assert_close(sum_channels(relevance), expected)


@pytest.mark.parametrize('shape', [(3, 4, 5), (1, 2, 3, 4, 5)])
def test_sum_channels_wrong_rank(shape):
    '''The error names the shape.'''
    with pytest.raises(ValueError, match=', '.join(map(str, shape))):
        sum_channels(torch.zeros(shape))


def picture(*rows):
    '''A batch of one mask from rows of text, where all but dots is true.'''
    return torch.tensor([[[char != '.' for char in row] for row in rows]])


def blobs(batch, side, seed=0):
    '''Smooth heatmaps of both signs, which have a few components above their mean.'''
    values = torch.randn(batch, 1, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.interpolate(values, (side, side), mode='bicubic')[:, 0]


def naive_components(mask, connectivity):
    '''All components of a mask by flood filling, in row-major order of their first pixel.'''
    left, result = mask.copy(), []
    for start in np.ndindex(*mask.shape):
        if not left[start]:
            continue
        component, queue = np.zeros_like(mask), deque([start])
        left[start] = False
        while queue:
            row, col = queue.popleft()
            component[row, col] = True
            for down, right in np.ndindex(3, 3):
                other = row + down - 1, col + right - 1
                if connectivity == 4 and 1 not in (down, right):
                    continue
                if min(other) >= 0 and other[0] < mask.shape[0] and other[1] < mask.shape[1] and left[other]:
                    left[other] = False
                    queue.append(other)
        result.append(component)
    return result


@pytest.mark.parametrize('arrays, settings, case', golden_cases('map_resize_area', 'resize_area'))
def test_golden_reduce(arrays, settings, case):
    '''The golden cases of area averaging, and what OpenCV computes in single precision.'''
    size = case['arguments']['size']
    heatmap = tensor(arrays, case['inputs']['map'])
    output = reduce_heatmap(heatmap, size)
    assert relative_error(output, tensor(arrays, case['expected']['map'])) < 1e-12
    opencv = cv2.resize(heatmap[0].numpy(), size[::-1], interpolation=cv2.INTER_AREA)
    assert relative_error(output, torch.from_numpy(opencv)[None]) < 1e-5


@pytest.mark.parametrize('arrays, settings, case', golden_cases('map_masks', 'largest_component'))
def test_golden_component(arrays, settings, case):
    '''The golden cases of components, where taking one after another finds their number as well.'''
    mask = tensor(arrays, case['inputs']['mask'], torch.uint8)
    component = largest_component(mask, **case['arguments'])
    assert torch.equal(component, tensor(arrays, case['expected']['mask'], torch.bool))
    left, count = mask.bool(), 0
    while left.any():
        left, count = left & ~largest_component(left, **case['arguments']), count + 1
    assert count == int(arrays[case['expected']['components']])


@pytest.mark.parametrize('arrays, settings, case', golden_cases('map_masks', 'largest_contour'))
def test_golden_contour(arrays, settings, case):
    '''The golden cases of filled contours.'''
    output = largest_contour(tensor(arrays, case['inputs']['mask'], torch.uint8), **case['arguments'])
    assert torch.equal(output, tensor(arrays, case['expected']['mask'], torch.bool))


@pytest.mark.filterwarnings('ignore::zennit_resnet.postprocess.EmptyMaskWarning')
@pytest.mark.parametrize('arrays, settings, case', golden_cases('map_choices', 'c1c'))
def test_golden_c1c(arrays, settings, case):
    '''The golden cases of C1C, apart from the gain, which is left out here.'''
    arguments = dict(case['arguments'])
    gain = arguments.pop('gain')
    output = gain * c1c(tensor(arrays, case['inputs']['map']), **arguments)
    assert relative_error(output, tensor(arrays, case['expected']['map'])) < 1e-9


@pytest.mark.parametrize('arrays, settings, case', golden_cases('map_choices', 'c3'))
def test_golden_c3(arrays, settings, case):
    '''The golden cases of C3 with all that it is made from.'''
    expected = {key: tensor(arrays, value) for key, value in case['expected'].items()}
    output = c3(tensor(arrays, case['inputs']['map']), **case['arguments'], return_masks=True)
    assert output.heatmap.shape == expected['map'].shape
    assert relative_error(output.heatmap, expected['map']) < 1e-9
    assert relative_error(output.reduced, expected['reduced']) < 1e-9
    assert relative_error(output.reduced * output.mask, expected['masked']) < 1e-9
    assert torch.equal(binarize(output.reduced, case['arguments']['threshold']), expected['binary'].bool())
    assert torch.equal(output.contour, expected['mask_contour'].bool())
    assert torch.equal(output.component, expected['mask_component'].bool())
    assert torch.equal(output.mask, expected['mask'].bool())
    assert output.empty.tolist() == [not expected['mask'].any()]


@pytest.mark.parametrize('shape', [(28, 28), (5, 3), (40, 33), (1, 1)])
def test_reduce(shape):
    '''Each cell is the mean of a whole number of fine pixels, for enlarging too, and the mean is kept.'''
    heatmap = torch.randn(2, *shape, dtype=torch.float64)
    output = reduce_heatmap(heatmap, (6, 4))
    fine = heatmap.repeat_interleave(6, 1).repeat_interleave(4, 2)
    expected = fine.view(2, 6, shape[0], 4, shape[1]).mean((2, 4))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(output.mean((1, 2)), heatmap.mean((1, 2)))


def test_expand():
    '''Bilinear expansion is OpenCV\'s, and by whole factors the nearest pixel is repeated.'''
    heatmap = torch.randn(2, 7, 9)
    output = expand_heatmap(heatmap, (20, 31))
    for sample, actual in zip(heatmap, output):
        expected = cv2.resize(sample.numpy(), (31, 20), interpolation=cv2.INTER_LINEAR)
        np.testing.assert_allclose(actual.numpy(), expected, atol=1e-5)
    expected = heatmap.repeat_interleave(3, 1).repeat_interleave(2, 2)
    assert torch.equal(expand_heatmap(heatmap, (21, 18), 'nearest'), expected)


def test_binarize():
    '''Thresholds are the mean, a number, or from a function, and what equals them is not above.'''
    heatmap = torch.tensor([[[0., 1.], [2., 1.]], [[-3., -1.], [-4., -4.]]])
    assert binarize(heatmap).int().tolist() == [[[0, 0], [1, 0]], [[0, 1], [0, 0]]]
    assert binarize(heatmap, 0).int().tolist() == [[[0, 1], [1, 1]], [[0, 0], [0, 0]]]
    assert binarize(heatmap, lambda maps: maps.amin((1, 2))).int().tolist() == [[[0, 1], [1, 1]], [[1, 1], [0, 0]]]
    with pytest.raises(ValueError, match="threshold='median'.*'mean'"):
        binarize(heatmap, 'median')
    with pytest.raises(ValueError, match='nan.*not finite'):
        binarize(heatmap, float('nan'))
    with pytest.raises(ValueError, match=r'\(2,\).*\(3,\)'):
        binarize(heatmap, lambda maps: torch.zeros(3))


@pytest.mark.parametrize('connectivity', [4, 8])
def test_component_naive(connectivity):
    '''Flood filling finds the same component, for random masks with many of equal size.'''
    masks = torch.rand(200, 12, 13) < torch.linspace(0.02, 0.7, 200)[:, None, None]
    heatmap = torch.randn(200, 12, 13)
    ties = 0
    for mask, values, largest, highest in zip(
        masks.numpy(), heatmap, largest_component(masks, connectivity),
        component_of_maximum(heatmap, masks, connectivity),
    ):
        components = naive_components(mask, connectivity)
        sizes = [component.sum() for component in components]
        ties += sizes.count(max(sizes, default=0)) > 1
        expected = components[int(np.argmax(sizes))] if components else mask
        np.testing.assert_array_equal(largest.numpy(), expected)
        row, col = divmod(int(values.argmax()), 13)
        expected = next((component for component in components if component[row, col]), ~mask)
        np.testing.assert_array_equal(highest.numpy(), expected)
    assert ties > 20


def test_component_order():
    '''Of equal components, it is the one whose first pixel comes first, row by row.'''
    mask = picture(
        '.......##',
        '##.......',
        '....##...',
    )
    assert largest_component(mask).nonzero().tolist() == [[0, 0, 7], [0, 0, 8]]
    # OpenCV labels blocks of 2 x 2, and the left one is the first
    mask = picture('....##', '##....')
    assert largest_component(mask).nonzero().tolist() == [[0, 0, 4], [0, 0, 5]]
    mask = picture('..##', '##..')
    assert largest_component(mask, 4).nonzero().tolist() == [[0, 0, 2], [0, 0, 3]]
    assert int(largest_component(mask, 8).sum()) == 4


CONTOURS = picture(
    '..........',
    '.#####....',
    '.#...#....',
    '.#.#.#.###',
    '.#...#.###',
    '.#####.###',
    '.......###',
    '##########',
)


@pytest.mark.parametrize('choice', ['largest_area', 'largest_filled', 'first'])
def test_contour_is_filled(choice):
    '''A contour is filled with what is in its hole; a line has pixels, but no area.'''
    ring = CONTOURS.clone()
    ring[0, :, 6:] = ring[0, 6:] = False
    output = largest_contour(ring, choice)
    assert int(output.sum()) == 25 and bool(output[0, 1:6, 1:6].all())
    if choice == 'first':
        return
    # another component has more pixels, but is smaller than what the ring surrounds
    assert torch.equal(largest_contour(CONTOURS, choice), output)
    assert int(largest_component(CONTOURS).sum()) == 22
    line = picture('##########', '..........', '..###.....', '..###.....')
    assert int(largest_contour(line, choice)[0, 0].sum()) == (10 if choice == 'largest_filled' else 0)


def test_contour_order():
    '''Of equal contours, also without area, it is the one that comes first, row by row.'''
    for choice in ('largest_area', 'largest_filled'):
        mask = picture('.....#', '......', '#.....', '...#..')
        assert largest_contour(mask, choice).nonzero().tolist() == [[0, 0, 5]]


def test_c3_separate_thresholds():
    '''Contour and component have a threshold each, and what both contain is kept.'''
    heatmap = torch.zeros(1, 28, 28)
    heatmap[0, 2:12, 2:12] = 1.
    heatmap[0, 4:6, 4:8] = 3.
    heatmap[0, 20:26, 20:22] = 3.
    output = c3(heatmap, threshold=0.5, component_threshold=2., return_masks=True)
    assert int(output.contour.sum()) == 100
    assert int(output.component.sum()) == 12 and output.empty.tolist() == [True]
    output = c3(heatmap, threshold=2., component_threshold=0.5, return_masks=True)
    assert int(output.contour.sum()) == 12 and int(output.component.sum()) == 100
    heatmap[0, 20:26] = 0.
    output = c3(heatmap, threshold=0.5, component_threshold=2., return_masks=True)
    assert int(output.contour.sum()) == 100 and int(output.mask.sum()) == 8
    assert torch.equal(output.heatmap, heatmap * (heatmap > 2))


def test_c3_holes():
    '''With a hole, the contour is larger than the component, which is what is kept.'''
    heatmap = torch.zeros(1, 28, 28)
    heatmap[0, 5:20, 5:20] = 1.
    heatmap[0, 10:13, 10:13] = 0.
    output = c3(heatmap, return_masks=True)
    assert int(output.contour.sum()) == 225 and int(output.component.sum()) == 216
    assert torch.equal(output.heatmap, heatmap)


@pytest.mark.parametrize('function', [c1c, c3])
@pytest.mark.parametrize('dtype', DTYPES)
def test_dtypes(function, dtype):
    '''Results have the type of the input, which is not modified, and differ by its rounding only.'''
    heatmap = blobs(4, 40).to(dtype).requires_grad_()
    before = heatmap.detach().clone()
    output = function(heatmap, size=14, return_masks=True)
    assert output.heatmap.dtype == output.reduced.dtype == dtype
    assert output.mask.dtype == output.component.dtype == output.empty.dtype == torch.bool
    assert torch.equal(heatmap, before)
    expected = function(before.double(), size=14)
    assert torch.equal(output.heatmap, expected.to(dtype))


@pytest.mark.parametrize('function', [c1c, c3])
def test_batch(function):
    '''Maps of a batch are independent, may be non-contiguous, and scale with their input.'''
    heatmap = blobs(5, 56).transpose(1, 2)
    output = function(heatmap)
    single = torch.cat([function(sample[None]) for sample in heatmap])
    assert torch.equal(output, single)
    torch.testing.assert_close(function(heatmap * 1e-6), output * 1e-6, rtol=1e-9, atol=0)
    assert function(torch.zeros(0, 9, 9)).shape == (0, 9, 9)
    assert function(torch.eye(28, dtype=torch.int32)[None], return_masks=True).mask.sum() == 28


@pytest.mark.parametrize('device', [
    pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')),
])
def test_device(device):
    '''Everything that is returned is on the device of the heatmaps.'''
    heatmap = blobs(2, 56).to(device)
    assert all(value.device == heatmap.device for value in c3(heatmap, return_masks=True))
    errors = attention_errors(c1c(heatmap, select='max_value'), (heatmap > 0).cpu())
    assert all(value.device == heatmap.device for value in errors)


@pytest.mark.parametrize('function', [c1c, c3])
@pytest.mark.parametrize('value', [0., 0.1, -2.7, 1e-30, 1e30])
@pytest.mark.parametrize('shape', [(224, 224), (50, 45), (7, 3)])
def test_constant_is_empty(function, value, shape):
    '''Nothing is above the mean of a constant map, whatever rounding does, and the caller is told which map it is.'''
    heatmap = torch.full((2, *shape), value)
    heatmap[0] = torch.randn(shape)
    with pytest.warns(EmptyMaskWarning, match=r'1 of 2 heatmaps \(1\)'):
        output = function(heatmap)
    assert not output[1].any() and output[0].any()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        output = function(heatmap, return_masks=True)
    assert output.empty.tolist() == [False, True]
    assert torch.equal(output.empty, ~output.mask.flatten(1).any(1))


def test_disjoint_is_empty():
    '''If contour and component are different blobs, C3 is empty and C1C is not.'''
    heatmap = torch.zeros(1, 28, 28)
    heatmap[0, 1:13, 1:13] = 1.
    heatmap[0, 2:12, 2:12] = 0.
    heatmap[0, 16:23, 16:23] = 1.
    with pytest.warns(EmptyMaskWarning):
        assert not c3(heatmap).any()
    assert int(c1c(heatmap).sum()) == 49
    heatmaps, report = ablation(heatmap)
    assert report == {'coincide': 0, 'contained': 0, 'overlap': 0, 'disjoint': 1, 'blank': 0}
    assert heatmaps['none'] is heatmap and not heatmaps['c3'].any() and heatmaps['c1c'].any()


def test_single_pixel():
    '''A single pixel is a component and a contour.'''
    heatmap = torch.zeros(1, 28, 28)
    heatmap[0, 27, 3] = 2.
    assert torch.equal(c3(heatmap), heatmap)
    assert torch.equal(c1c(heatmap, select='max_value'), heatmap)
    with pytest.warns(EmptyMaskWarning):
        assert not c3(torch.ones(1, 1, 1)).any()
    # as in the code that this comes from
    assert torch.equal(c1c(torch.ones(1, 50, 45), select='max_value'), torch.ones(1, 50, 45))


@pytest.mark.parametrize('function', [c1c, c3])
def test_negative(function):
    '''All negative maps keep what is above their mean; zeros outside outrank it, unless they become the minimum.'''
    heatmap = blobs(3, 28) - 10
    assert bool((heatmap < 0).all())
    mask = function(heatmap, return_masks=True).mask
    zero, minimum = (function(heatmap, outside=outside, expand='nearest') for outside in ('zero', 'minimum'))
    assert torch.equal(zero, heatmap * mask)
    for values, inside in zip(zero, mask):
        assert values[inside].max() < values[~inside].min() == 0
    for values, inside, sample in zip(minimum, mask, heatmap):
        assert values[inside].min() > values[~inside].max() == sample.min()
        assert torch.equal(values[inside], sample[inside])


@pytest.mark.parametrize('function', [c1c, c3, reduce_heatmap, binarize])
@pytest.mark.parametrize('heatmap, message', [
    (torch.tensor([[[0., 1.]], [[float('nan'), 1.]]]), 'Heatmap 1 of 2 contains NaN'),
    (torch.tensor([[[float('inf'), 1.]]]), 'Heatmap 0 of 1'),
    (torch.zeros(5), r'\(batch, height, width\).*\(5,\)'),
    (torch.zeros(1, 3, 4, 5), 'sum_channels'),
    (torch.zeros(1, 0, 5), r'\(1, 0, 5\) have no pixels'),
    (torch.zeros(1, 2, 2, dtype=torch.complex64), 'must be real'),
])
def test_bad_heatmaps(function, heatmap, message):
    '''The error says what is wrong.'''
    with pytest.raises(ValueError, match=message):
        function(heatmap)


@pytest.mark.parametrize('function, arguments, message', [
    (c1c, {'select': 'largest'}, "select='largest'.*'area', 'max_value'"),
    (c1c, {'connectivity': 6}, 'connectivity=6.*4, 8'),
    (c1c, {'select': 'max_value', 'connectivity': 6}, 'connectivity=6'),
    (c3, {'contour': 'outer'}, "contour='outer'.*'largest_filled'"),
    (c3, {'expand': 'cubic'}, "expand='cubic'.*'nearest'"),
    (c3, {'outside': 'nan'}, "outside='nan'.*'minimum'"),
    (c3, {'component_threshold': 'max'}, "threshold='max'"),
    (c3, {'size': 0}, 'size=0'),
])
def test_bad_arguments(function, arguments, message):
    '''The error names the value and the choices.'''
    with pytest.raises(ValueError, match=message):
        function(blobs(1, 30), **arguments)


def test_sizes():
    '''The reduced size may be of two numbers, which are integers.'''
    assert c3(blobs(1, 30), size=(7, 9), return_masks=True).mask.shape == (1, 7, 9)
    with pytest.raises(TypeError):
        c3(blobs(1, 30), size=7.5)


def test_mask_cases():
    '''Each pair of masks is one case.'''
    contour = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 0]])
    component = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0], [1, 1, 1]])
    report = mask_cases(contour[:, None], component[:, None])
    assert report == {'coincide': 1 / 8, 'contained': 1 / 8, 'overlap': 2 / 8, 'disjoint': 1 / 8, 'blank': 3 / 8}
    with pytest.raises(ValueError, match=r'\(8, 1, 3\) and \(7, 1, 3\)'):
        mask_cases(contour[:, None], component[1:, None])
    with pytest.raises(ValueError, match='at least one'):
        mask_cases(contour[:0, None], component[:0, None])


def test_ablation():
    '''With one threshold C3 is C1C or empty; with two they differ, and options are passed on.'''
    heatmap = torch.cat([blobs(30, 56), torch.randn(30, 56, 56, dtype=torch.float64)])
    heatmaps, report = ablation(heatmap)
    assert list(heatmaps) == ['none', 'c1c', 'c3']
    assert abs(sum(report.values()) - 1) < 1e-9 and report['overlap'] == report['blank'] == 0
    for component, both in zip(heatmaps['c1c'], heatmaps['c3']):
        assert torch.equal(component, both) or not both.any()
    options = {'size': 14, 'connectivity': 4, 'expand': 'nearest', 'outside': 'minimum'}
    heatmaps, report = ablation(heatmap, threshold=0.5, component_threshold=0.2, contour='largest_filled', **options)
    assert report['overlap'] > 0
    assert torch.equal(heatmaps['c1c'], c1c(heatmap, threshold=0.2, **options, return_masks=True).heatmap)
    expected = c3(
        heatmap, threshold=0.5, component_threshold=0.2, contour='largest_filled', **options, return_masks=True
    )
    assert torch.equal(heatmaps['c3'], expected.heatmap)
    assert torch.equal(ablation(heatmap, threshold=0.5)[0]['c1c'], c1c(heatmap, threshold=0.5, return_masks=True)[0])


def test_attention_errors():
    '''The types of the slides, one for each map.'''
    target = picture('.......', '.####..', '.####..', '.......').expand(7, -1, -1).clone()
    attended = torch.cat([
        picture('.......', '.####..', '.#####.', '.......'),  # correct
        picture('.......', '.#.....', '.#.....', '.......'),  # insufficient
        picture('#######', '#######', '#######', '#######'),  # over
        picture('.....##', '....###', '.....##', '.....##'),  # wrong
        picture('.......', '.......', '.......', '.......'),  # nothing
        picture('.......', '.####..', '.......', '.####..'),  # exactly half of both
        picture('.......', '.####..', '.......', '.......'),  # no object
    ])
    target[6] = False
    errors = attention_errors(attended.double(), target, threshold=0.5)
    flags = torch.stack(errors[2:]).int()
    assert flags.tolist() == [
        [1, 0, 0, 0, 0, 1, 0], [0, 1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0]
    ]
    expected = [1., 0.25, 1., 1 / 8, 0., 0.5, float('nan')]
    np.testing.assert_allclose(errors.coverage.numpy(), expected, rtol=1e-6)
    expected = [8 / 9, 1., 8 / 28, 1 / 9, 1., 0.5, float('nan')]
    np.testing.assert_allclose(errors.precision.numpy(), expected, rtol=1e-6)
    # the mean of a map with zeros outside separates them as well, and thresholds decide
    assert attention_errors(attended[:2].double(), target[:2], coverage=0.25).correct.tolist() == [True, True]
    assert attention_errors(attended[:2].double(), target[:2], precision=0.9).over.tolist() == [True, False]
    with pytest.raises(ValueError, match='coverage=1.5'):
        attention_errors(attended.double(), target, coverage=1.5)
    with pytest.raises(ValueError, match=r'\(7, 4, 7\).*\(1, 4, 7\)'):
        attention_errors(attended.double(), target[:1])


# -- arrays and single maps --------------------------------------------------------------------------------------------

def kinds(heatmap):
    '''A single map as a batch of tensors, and in all other forms.'''
    array = heatmap.numpy()
    return [
        (heatmap, lambda value: value[0]), (array[None], lambda value: value), (array, lambda value: value[0]),
        (heatmap.clone().requires_grad_()[None], lambda value: value), (array[::-1][::-1], lambda value: value[0]),
    ]


def same(actual, expected, pick):
    '''Whether results are equal, and of the kind of the argument.'''
    if isinstance(expected, torch.Tensor):
        np.testing.assert_array_equal(actual.detach() if isinstance(actual, torch.Tensor) else actual, pick(expected))
    elif isinstance(expected, tuple):
        assert len(actual) == len(expected) and type(actual) is type(expected)
        for one, other in zip(actual, expected):
            same(one, other, pick)
    elif isinstance(expected, dict):
        for key, value in expected.items():
            same(actual[key], value, pick)
    else:
        assert actual == expected


def arrays_of(value):
    '''All tensors and arrays in a result.'''
    if isinstance(value, (tuple, dict)):
        return [elem for part in (value.values() if isinstance(value, dict) else value) for elem in arrays_of(part)]
    return [] if isinstance(value, float) or value is None else [value]


@pytest.mark.parametrize('function', [
    heat_quantization, c1c, c3, lambda heatmap: c3(heatmap, return_masks=True),
    lambda heatmap: c1c(heatmap, return_masks=True), ablation, lambda heatmap: attention_errors(heatmap, heatmap > 0),
    reduce_heatmap, lambda heatmap: expand_heatmap(heatmap, (40, 41)), binarize,
    lambda heatmap: largest_component(heatmap > 0), lambda heatmap: largest_contour(heatmap > 0),
    lambda heatmap: component_of_maximum(heatmap, heatmap > 0), lambda heatmap: mask_cases(heatmap > 0, heatmap > 1),
])
def test_arrays_and_single_maps(function):
    '''Arrays give arrays, a map without a first axis gives one, and values are those of a batch of one.'''
    heatmap = blobs(1, 30)
    expected = function(heatmap)
    for value, pick in kinds(heatmap[0]):
        result = function(value)
        same(result, expected, pick)
        kind = np.ndarray if isinstance(value, np.ndarray) else torch.Tensor
        assert all(isinstance(elem, kind) for elem in arrays_of(result))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.int32, torch.bool])
@pytest.mark.parametrize('function', [heat_quantization, c1c, c3])
def test_types_of_single_maps(function, dtype):
    '''A single map of any type is that of a batch.'''
    heatmap = blobs(1, 30).mul(4)
    heatmap = heatmap > heatmap.mean() if dtype == torch.bool else heatmap.to(dtype)
    assert torch.equal(function(heatmap[0]), function(heatmap)[0])
    if dtype != torch.bfloat16:
        np.testing.assert_array_equal(function(heatmap[0].numpy()), function(heatmap)[0].numpy())


def test_sum_channels_of_arrays():
    '''Three axes might be channels or examples, so a single example is refused.'''
    relevance = torch.randn(2, 3, 4, 5)
    result = sum_channels(relevance.numpy())
    assert isinstance(result, np.ndarray)
    np.testing.assert_allclose(result, relevance.sum(1), rtol=1e-6)
    with pytest.raises(ValueError, match=r'\(3, 4, 5\).*relevance\[None\]'):
        sum_channels(relevance[0].numpy())


@pytest.mark.parametrize('value', [[[1., 2.]], None, 'map', 3., np.array([['a']]), np.array([[object]])], ids=str)
@pytest.mark.parametrize('function', [heat_quantization, c1c, c3, sum_channels, binarize])
def test_what_is_no_map(function, value):
    '''The error names the type.'''
    with pytest.raises(TypeError, match='must be'):
        function(value)


@pytest.mark.parametrize('function', [c1c, c3])
def test_return_masks(function):
    '''It is True or False.'''
    with pytest.raises(TypeError, match="return_masks='no'"):
        function(blobs(1, 30), return_masks='no')


@pytest.mark.parametrize('name', ['coverage', 'precision'])
@pytest.mark.parametrize('value, error', [(float('nan'), ValueError), (-.1, ValueError), ('half', TypeError)])
def test_shares(name, value, error):
    '''Shares are numbers from zero to one.'''
    with pytest.raises(error, match=f'{name}='):
        attention_errors(blobs(1, 30), blobs(1, 30), **{name: value})


SHAPES = {1: (7,), 2: (4, 5), 3: (3, 4, 2)}


@pytest.mark.parametrize('dims', [1, 2, 3])
def test_dims(dims):
    '''Signals and volumes get what images with the same values get.'''
    relevance = torch.randn(2, 3, *SHAPES[dims])
    heatmap = sum_channels(relevance, dims=dims)
    torch.testing.assert_close(heatmap, relevance.sum(1))
    as_image, mask = heatmap.reshape(2, 1, -1), heatmap > .5
    assert torch.equal(heat_quantization(heatmap, 5, dims).view_as(as_image), heat_quantization(as_image, 5))
    assert torch.equal(heat_quantization(heatmap[1], 5, dims), heat_quantization(heatmap, 5, dims)[1])
    assert torch.equal(binarize(heatmap, .2, dims), heatmap > .2)
    errors = attention_errors(heatmap, mask, .2, dims=dims)
    assert [*map(torch.Tensor.tolist, errors)] == [
        *map(torch.Tensor.tolist, attention_errors(as_image, mask.view_as(as_image), .2))
    ]
    array = heat_quantization(heatmap[0].numpy(), dims=dims)
    np.testing.assert_array_equal(array, heat_quantization(heatmap, dims=dims)[0].numpy())


@pytest.mark.parametrize('dims, shape, message', [
    (1, (2, 3, 4, 5), r'\(batch, channels, length\).*\(2, 3, 4, 5\).*dims=2 for images'),
    (1, (3, 4), r'\(3, 4\).*relevance\[None\]'),
    (2, (2, 3, 4, 5, 6), r'\(2, 3, 4, 5, 6\).*dims=3 for volumes'),
    (2, (2, 3, 4), r'\(2, 3, 4\).*relevance\[None\].*dims=1 for signals'),
    (3, (2, 3, 4), r'\(batch, channels, depth, height, width\).*\(2, 3, 4\).*dims=1'),
    (4, (2, 3, 4), 'dims=4'),
])
def test_wrong_dims(dims, shape, message):
    '''The error names the shape and the number of dimensions.'''
    with pytest.raises(ValueError, match=message):
        sum_channels(torch.zeros(shape), dims=dims)


def test_volumes_need_dims():
    '''Nothing guesses whether an axis has channels, slices or pixels, and the choice of components is for images.'''
    for function in (c1c, c3, heat_quantization, reduce_heatmap):
        with pytest.raises(ValueError, match=r'\(2, 3, 4, 5\).*flatten\(0, 1\)'):
            function(torch.zeros(2, 3, 4, 5))
    for shape in ((2,), (2, 3, 4, 5, 6)):
        with pytest.raises(ValueError, match=rf'\(batch, depth, height, width\).*{re.escape(str(shape))}'):
            heat_quantization(torch.zeros(shape), dims=3)
