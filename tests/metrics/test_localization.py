'''Relevance inside of masks, its distance to them, and its conservation, against golden cases and loops over pixels.'''
import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
import torch
from golden_cases import golden_cases, tensor

from captum_adapters.metrics import (
    NegativeMapWarning,
    boxes_to_masks,
    conservation_gap,
    mask_distance,
    mask_pointing,
)
from captum_adapters.metrics.localization import distance_maps

pytestmark = pytest.mark.once

NORMALIZATIONS = {'max_distance': 'max', 'diagonal': 'diagonal'}
nan = pytest.approx(math.nan, nan_ok=True)


def selection(arrays, case):
    '''The selected pixels of a case as a heatmap, its percentage, and the mask.'''
    selected = tensor(arrays, case['inputs']['selected'])
    return selected, [Fraction(100 * int(selected.sum()), selected.numel())], tensor(arrays, case['inputs']['mask'])


@pytest.mark.parametrize('arrays, settings, case', golden_cases('metric_mask_pointing', 'mask_share'))
def test_golden_share(arrays, settings, case):
    '''Share of selected pixels inside of the mask.'''
    maps, percents, masks = selection(arrays, case)
    result = mask_pointing(maps, masks, percents)
    expected = float(arrays[case['expected']['share']])
    assert bool(result.empty) == (not masks.any())
    assert int(result.counts) == int(maps.sum())
    if result.empty:
        # the case counts these as misses, but there is nothing to hit
        assert expected == 0 or math.isnan(expected)
        expected = math.nan
    assert result.share.tolist() == [[pytest.approx(expected, abs=1e-12, nan_ok=True)]]


@pytest.mark.parametrize('arrays, settings, case', golden_cases('metric_mask_pointing', 'distance_to_mask'))
def test_golden_distance_map(arrays, settings, case):
    '''Distance of each pixel to the mask.'''
    distances = distance_maps(tensor(arrays, case['inputs']['mask']).bool())
    expected = tensor(arrays, case['expected']['distance'])
    torch.testing.assert_close(distances, expected, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize('arrays, settings, case', golden_cases('metric_mask_pointing', 'mean_normalised_distance'))
def test_golden_distance(arrays, settings, case):
    '''Mean distance of selected pixels.'''
    maps, percents, masks = selection(arrays, case)
    normalization = NORMALIZATIONS[case['arguments']['normaliser']]
    result = mask_distance(maps, masks, percents, normalization=normalization)
    expected = float(arrays[case['expected']['distance']])
    assert result.distance.tolist() == [[pytest.approx(expected, abs=1e-12, nan_ok=True)]]
    assert bool(result.empty) == (not masks.any())


@pytest.fixture
def batch():
    '''Maps with ties, signs and channels, and masks: two random ones, a full one, an empty one, and single pixels.'''
    masks = torch.zeros(6, 7, 9, dtype=torch.bool)
    masks[0] = torch.rand(7, 9) < 0.3
    masks[1, 2:5, 3:8] = True
    masks[2] = True
    masks[4, 6, 0] = True
    masks[5, 3, 4] = True
    return torch.randn(6, 3, 7, 9).mul(2).round(), masks


@pytest.mark.parametrize('absolute', [True, False])
@pytest.mark.parametrize('normalization', ['diagonal', 'max', 'mean', None])
def test_reference(batch, absolute, normalization):
    '''Against loops over pixels of the selection and of the mask.'''
    maps, masks = batch
    percents = (100, 3, 0, 20, 50.5)
    pointing = mask_pointing(maps, masks, percents, absolute=absolute)
    distance = mask_distance(maps, masks, percents, absolute=absolute, normalization=normalization)
    assert pointing.counts.tolist() == distance.counts.tolist() == [63, 1, 0, 12, 31]
    assert pointing.percents.tolist() == distance.percents.tolist() == list(percents)
    assert pointing.share.dtype == distance.distance.dtype == torch.float64
    for index in range(6):
        scores = maps[index].sum(0).abs() if absolute else maps[index].sum(0)
        points = [tuple(point) for point in masks[index].nonzero().tolist()]
        nearest = np.array([
            [min((math.dist(pixel, point) for point in points), default=math.nan) for pixel in
             ((row, column) for column in range(9))]
            for row in range(7)
        ])
        scale = {'diagonal': 10, 'max': nearest.max(), 'mean': nearest.mean(), None: 1}[normalization] or 1
        assert float(distance.chance[index]) == pytest.approx(nearest.mean() / scale, abs=1e-12, nan_ok=True)
        assert bool(pointing.empty[index]) == bool(distance.empty[index]) == (not points)
        assert float(pointing.chance[index]) == len(points) / 63
        for position in range(len(percents)):
            count = int(pointing.counts[position])
            # of tied pixels, each is selected with the same probability
            selected = {
                (row, column): min(1., max(0., (count - int((scores > value).sum())) / int((scores == value).sum())))
                for row, values in enumerate(scores) for column, value in enumerate(values)
            }
            assert sum(selected.values()) == pytest.approx(count)
            hits = sum(selected[pixel] for pixel in points)
            share = hits / count if count and points else math.nan
            assert float(pointing.share[index, position]) == pytest.approx(share, abs=1e-12, nan_ok=True)
            mean = sum(nearest[pixel] * chance for pixel, chance in selected.items()) / scale
            mean = mean / count if count else math.nan
            assert float(distance.distance[index, position]) == pytest.approx(mean, abs=1e-12, nan_ok=True)
            if count:
                assert float(pointing.ceiling[index, position]) == min(1, len(points) / count)
        tied = sum((scores == value).sum() > 1 for value in scores.reshape(-1)) / 63
        assert float(pointing.tied_share[index]) == float(distance.tied_share[index]) == pytest.approx(float(tied))


def test_single_pixel():
    '''Of an image of one pixel, there is no diagonal to divide by.'''
    assert mask_distance(torch.rand(1, 1, 1), torch.ones(1, 1, 1), [100]).distance.item() == 0


@pytest.mark.parametrize('values', [
    [3, 2, 2, 1, 2, 0], [1, 1, 1, 1, 1, 1], [0, 5, 5, 0, 0, 0], [-1, 1, -1, 2, 0, 0], [6, 5, 4, 3, 2, 1],
    [-0., 0., 1, 1, 2, 2],
])
@pytest.mark.parametrize('absolute', [True, False])
def test_ties_permutations(values, absolute):
    '''Shares and distances are means over all orders of pixels, in which ties are broken one by one.'''
    maps = torch.tensor(values, dtype=torch.float32).view(1, 2, 3)
    masks = torch.tensor([[[1, 0, 0], [0, 0, 1]]])
    percents = [Fraction(100 * count, 6) for count in range(1, 7)]
    pointing = mask_pointing(maps, masks, percents, absolute=absolute)
    distance = mask_distance(maps, masks, percents, absolute=absolute, normalization=None)
    inside, away = masks.reshape(-1).double().numpy(), distance_maps(masks.bool()).reshape(-1).numpy()
    scores = [abs(value) if absolute else value for value in values]
    orders = [sorted(order, key=lambda pixel: -scores[pixel]) for order in permutations(range(6))]
    for result, measured in (pointing.share, inside), (distance.distance, away):
        means = np.mean([np.cumsum(measured[order]) / np.arange(1, 7) for order in orders], 0)
        np.testing.assert_allclose(result[0].numpy(), means, rtol=0, atol=1e-12)
    shared = sum(scores.count(value) > 1 for value in scores) / 6
    assert float(pointing.tied_share) == float(distance.tied_share) == pytest.approx(shared)


@pytest.mark.parametrize('value', [0., -0., 1., -3.])
@pytest.mark.parametrize('normalization', ['diagonal', 'max', 'mean', None])
def test_ties_constant(batch, value, normalization):
    '''A constant map has the level of chance to the last digit.'''
    masks = torch.rand(6, 37, 29) < 0.2
    maps = torch.full(masks.shape, value)
    pointing = mask_pointing(maps, masks)
    assert torch.equal(pointing.share, pointing.chance[:, None].expand(-1, 15))
    distance = mask_distance(maps, masks, normalization=normalization)
    assert torch.equal(distance.distance, distance.chance[:, None].expand(-1, 15))
    assert pointing.tied_share.tolist() == distance.tied_share.tolist() == [1] * 6


def test_ties_none():
    '''Without ties, nothing but the sum over the first pixels is taken.'''
    maps, masks = torch.rand(3, 31, 17, dtype=torch.float64), torch.rand(3, 31, 17) < 0.3
    order = maps.flatten(1).argsort(dim=1, descending=True)
    pointing, distance = mask_pointing(maps, masks), mask_distance(maps, masks, normalization=None)
    assert pointing.tied_share.tolist() == distance.tied_share.tolist() == [0] * 3
    counts = pointing.counts
    sums = masks.flatten(1).gather(1, order).long().cumsum(1)[:, counts - 1]
    assert torch.equal(pointing.share, sums.double() / counts)
    sums = distance_maps(masks).flatten(1).gather(1, order).cumsum(1)[:, counts - 1]
    assert torch.equal(distance.distance, sums / counts)


@pytest.mark.parametrize('function', [mask_pointing, mask_distance])
def test_arrays(function, batch):
    '''Arrays, and single maps and masks, as they are read from files.'''
    maps, masks = batch
    expected = function(maps, masks, 20)
    for other_maps, other_masks in (
        (maps.numpy(), masks.numpy()), (maps, masks.numpy().astype('u1')), (maps.numpy(), masks),
        (maps.sum(1).numpy()[:, ::-1].copy()[:, ::-1], (masks.numpy(),)),
        (maps.numpy().astype('>f4'), masks.float().numpy()), (maps.sum(1).numpy().astype('f2'), masks.bfloat16()),
        (maps.clone().requires_grad_(), masks.float().requires_grad_()),
        (maps.numpy().astype(int), masks[:, None].numpy()), (maps.bfloat16(), masks.long()),
    ):
        result = function(other_maps, other_masks, percents=np.array([20]))
        for actual, values in zip(result, expected):
            assert not actual.requires_grad
            torch.testing.assert_close(actual, values, rtol=0, atol=0, equal_nan=True)
    read_only = maps.numpy()
    read_only.flags.writeable = False
    function(read_only, masks)
    flat = maps[0].sum(0)
    for other_maps, other_masks in (
        (flat, masks[0]), (flat.numpy(), masks[0].numpy()), (flat, masks[:1]), (maps[:1], masks[0]),
        (flat, masks[:1, None]), (flat.bfloat16(), masks[0].numpy()), ((flat,), masks[0]),
    ):
        assert torch.equal(function(other_maps, other_masks, 20)[0], expected[0][:1])
    for other_maps, other_masks, shape in (
        (flat, masks, r'\(7, 9\)'), (maps, masks[0], r'\(7, 9\)'), (maps[0], masks[0], r'\(3, 7, 9\)'),
        (flat[0], masks[0], r'\(9,\)'),
        (torch.tensor(1.), masks[0], r'\(\)'), (flat, masks[0, 0], r'\(9,\)'),
    ):
        with pytest.raises(ValueError, match=shape):
            function(other_maps, other_masks)
    for wrong in (np.array([['a']]), np.array([[None]]), [[1.]], None):
        with pytest.raises(TypeError, match='attributions'):
            function(wrong, masks[0])
        with pytest.raises(TypeError, match='masks'):
            function(flat, wrong)


def test_formats(batch):
    '''Maps under autocast, and of another size.'''
    maps, masks = batch
    maps = maps.sum(1)
    for function, name in ((mask_pointing, 'share'), (mask_distance, 'distance')):
        expected = getattr(function(maps, masks), name)
        with torch.autocast('cpu', torch.bfloat16):
            torch.testing.assert_close(getattr(function(maps, masks), name), expected, rtol=0, atol=0, equal_nan=True)
        coarse = torch.rand(1, 2, 2)
        fine = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
        mask = torch.tensor([[[1, 1, 0, 0]] * 4])
        actual = getattr(function(coarse, mask, interpolate='nearest'), name)
        torch.testing.assert_close(actual, getattr(function(fine, mask), name), equal_nan=True)
        with pytest.raises(ValueError, match='2 x 2 .*4 x 4.*resize'):
            function(coarse, mask)
        with pytest.warns(NegativeMapWarning) as records:
            function(fine - 2, mask, absolute=False)
        assert records[0].filename == __file__


@pytest.mark.parametrize('function', [mask_pointing, mask_distance])
@pytest.mark.parametrize('changes, message', [
    ({'masks': torch.ones(2, 4, 5)}, '4 x 4 .*4 x 5'),
    ({'masks': torch.ones(3, 4, 4)}, r'\(2, 4, 4\).*\(3, 4, 4\)'),
    ({'masks': torch.ones(2, 3, 4, 4)}, r'\(2, 3, 4, 4\)'),
    ({'masks': torch.ones(4, 4)}, r'\(4, 4\)'),
    ({'masks': torch.ones(0, 4, 4), 'maps': torch.ones(0, 4, 4)}, 'empty'),
    ({'masks': torch.full((2, 4, 4), 255)}, '255'),
    ({'masks': torch.full((2, 4, 4), 0.5)}, '0.5'),
    ({'masks': torch.full((2, 4, 4), float('nan'))}, 'nan'),
    ({'maps': torch.full((2, 4, 4), float('nan'))}, r'NaN.*\[0, 1\]'),
    ({'maps': torch.ones(4, 4)}, r'\(4, 4\)'),
    ({'percents': (5, 200)}, '200'),
    ({'percents': -5}, '-5'),
    ({'interpolate': 'cubic'}, "'cubic'.*'bicubic'"),
    ({'interpolate': 'trilinear', 'maps': torch.rand(2, 3, 3)}, "'trilinear'.*'bilinear'"),
])
def test_errors(function, changes, message):
    '''Arguments that do not fit are named.'''
    arguments = {'maps': torch.rand(2, 4, 4), 'masks': torch.ones(2, 4, 4), 'percents': (50,), **changes}
    with pytest.raises(ValueError, match=message):
        function(arguments.pop('maps'), arguments.pop('masks'), **arguments)


def test_unknown_normalization():
    '''The normalization is named.'''
    with pytest.raises(ValueError, match="'area'.*'diagonal', 'max', 'mean', None"):
        mask_distance(torch.rand(1, 2, 2), torch.ones(1, 2, 2), normalization='area')


def test_boxes():
    '''A pixel is inside of a box if its center is.'''
    boxes = [
        [(1, 2, 4, 5)], torch.tensor([[0.4, 0.6, 2.5, 1.51], [3., 3., 4., 4.]]), [], [(-5, -5, 50, 1)],
        [(0.6, 0, 1.4, 5)], np.array([[4, 4, 9, 9]]),
    ]
    masks = boxes_to_masks(boxes, (5, 6))
    expected = torch.zeros(6, 5, 6, dtype=torch.bool)
    expected[0, 2:5, 1:4] = True
    expected[1, 1, :2] = True
    expected[1, 3, 3] = True
    expected[3, 0] = True
    expected[5, 4, 4:] = True
    assert torch.equal(masks, expected)
    rows, columns = (value.reshape(-1) + 0.5 for value in np.indices((5, 6)))
    for _ in range(20):
        corners = torch.rand(2, 2).sort(0).values * torch.tensor([6, 5])
        (x0, y0), (x1, y1) = corners.tolist()
        inside = [x0 <= x < x1 and y0 <= y < y1 for x, y in zip(columns, rows)]
        mask = boxes_to_masks([[(x0, y0, x1, y1)]], (5, 6))
        assert mask.reshape(-1).tolist() == inside


@pytest.mark.parametrize('boxes, size, message', [
    ([], (5, 5), '0 images'),
    ([[(0, 0, 2, 2)]], (0, 5), 'height=0'),
    ([[(0, 0, 2, 2)]], (5, 2.5), 'width=2.5'),
    ([[(0, 0, 2, 2)]], (float('nan'), 5), 'height=nan'),
    ([[(0, 0, 2, 2)]], (True, 5), 'height=True'),
    ([[], [(3, 0, 2, 2)]], (5, 5), r'\[3.0, 0.0, 2.0, 2.0\] of image 1'),
    ([[(0, 0, 2, 2), (0, 2, 2, 2)]], (5, 5), 'y0 < y1'),
    ([[(0, float('nan'), 2, 2)]], (5, 5), 'nan'),
    ([(0, 0, 2, 2)], (5, 5), r'image 0 .*\(4,\)'),
    ([[(0, 0, 2)]], (5, 5), r'\(1, 3\)'),
])
def test_boxes_errors(boxes, size, message):
    '''Boxes that are none.'''
    with pytest.raises(ValueError, match=message):
        boxes_to_masks(boxes, size)


def test_conservation_gap():
    '''Relevance that is lost or gained, relative to what there was.'''
    attributions = torch.tensor([[1., 2.], [-1., -2.], [0., 0.], [4., 2.], [-4., -2.], [1., -1.], [2., 1.]])
    initial = torch.tensor([3., -3., 3., 3., -3., 0., -3.])
    gap = conservation_gap(attributions.view(7, 1, 2), initial)
    assert gap.dtype == torch.float64
    assert gap.tolist() == [0, 0, -1, 1, -1, nan, 2]
    assert conservation_gap((attributions, attributions), initial * 2).tolist() == [0, 0, -1, 1, -1, nan, 2]
    assert conservation_gap(attributions, 3).tolist() == [0, -2, -1, 1, -3, -1, 0]
    one_hot = torch.eye(7) * initial[:, None]
    assert conservation_gap(attributions, one_hot).tolist() == [0, 0, -1, 1, -1, nan, 2]
    # a sum of many in half precision
    ones = torch.ones(1, 3, 100, 100, dtype=torch.bfloat16)
    assert conservation_gap(ones, torch.tensor([30000.])).item() == 0
    with pytest.raises(ValueError, match=r'\(7, 2\).*\(3,\)'):
        conservation_gap(attributions, initial[:3])
    # what constants keep is not lost
    kept = torch.tensor([0., 0., 3., -3., 3., 1., -6.])
    for sinks in (kept, kept.numpy(), {'token': kept / 4, 'position': kept * 3 / 4}):
        assert conservation_gap(attributions, initial, sinks).tolist() == [0, 0, 0, 0, 0, nan, 0]
    assert conservation_gap(attributions, initial, {}).tolist() == [0, 0, -1, 1, -1, nan, 2]
    with pytest.raises(ValueError, match=r'token.*\(3,\)'):
        conservation_gap(attributions, initial, {'token': kept[:3]})
    with pytest.raises(ValueError, match='no examples'):
        conservation_gap(torch.zeros(0, 3), 1)
    arrays = attributions.numpy()
    for given in (arrays, arrays[:, ::-1], arrays.astype('f2'), (arrays,), attributions.bfloat16().requires_grad_()):
        for start in (initial, initial.numpy(), initial.numpy().astype('>f8'), initial.clone().requires_grad_()):
            assert conservation_gap(given, start).tolist() == [0, 0, -1, 1, -1, nan, 2]
    for wrong in ([1., 2.], None, np.array(['a'])):
        with pytest.raises(TypeError, match='attributions'):
            conservation_gap(wrong, 1)
