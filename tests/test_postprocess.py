'''Tests for channel sums and heat quantization.'''
import numpy as np
import pytest
import torch

from golden_cases import golden_cases, relative_error, tensor
from zennit_resnet.postprocess import heat_quantization, sum_channels

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
    ((4, 5), r'\(batch, height, width\).*\(4, 5\)'),
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
