'''Mosaics, and the share of relevance in the asked class's own cells, against loops over cells and pixels.'''
import warnings
from collections import Counter
from fractions import Fraction

import pytest
import torch

from captum_adapters.metrics import NegativeMapWarning, grid_pointing, mosaics

pytestmark = pytest.mark.once


def labelled(number, classes, size=4):
    '''As many images of each class, each of them filled with its index.'''
    labels = torch.arange(number * classes) % classes
    return torch.arange(len(labels)).float().view(-1, 1, 1, 1).expand(-1, 3, size, size + 1), labels


def gaussian(size):
    '''A blob in the middle.'''
    offset = torch.linspace(-2, 2, size)
    return torch.exp(-(offset[:, None] ** 2 + offset ** 2))


def cells_of(batch, n, focus=False):
    '''Distinct classes of cells in random order, or for Focus the class 0 in half of them.'''
    classes = torch.arange(n * n)
    if focus:
        classes[:n * n // 2] = 0
    return torch.stack([classes[torch.randperm(n * n)] for _ in range(batch)]).view(batch, n, n)


@pytest.mark.parametrize('n', [2, 3])
@pytest.mark.parametrize('focus', [False, True])
@pytest.mark.parametrize('count', [None, 1, 40])
def test_content(n, focus, count):
    '''Cells show the images they tell, classes are distinct, and those of Focus are half of one class.'''
    images, labels = labelled(6, 11)
    grid = mosaics(images, labels, n, focus=focus, count=count)
    number = len(grid.images)
    assert number == count or count is None and number >= 5
    assert grid.images.shape == (number, 3, 4 * n, 5 * n) and grid.cells.shape == grid.indices.shape == (number, n, n)
    for image, cells, targets, indices in zip(*grid):
        for row in range(n):
            for column in range(n):
                shown = image[:, 4 * row:4 * row + 4, 5 * column:5 * column + 5]
                assert torch.equal(shown, images[indices[row, column]])
                assert cells[row, column] == labels[indices[row, column]]
        counts = Counter(cells.flatten().tolist())
        assert indices.unique().numel() == n * n
        if focus:
            assert sorted(counts.values()) == [1] * (len(counts) - 1) + [n * n // 2]
            assert targets.tolist() == [counts.most_common(1)[0][0]]
        else:
            assert len(counts) == n * n and targets.tolist() == cells.flatten().tolist()


@pytest.mark.parametrize('focus', [False, True])
def test_use(focus):
    '''Without a number, no image is there twice, and nearly all are used. Beyond, all are used about equally often.'''
    images, labels = labelled(6, 10)
    once = mosaics(images, labels, focus=focus).indices.flatten()
    assert once.unique().numel() == len(once) >= 52
    used = Counter(mosaics(images, labels, focus=focus, count=150).indices.flatten().tolist())
    assert set(used) == set(range(60)) and set(used.values()) <= {9, 10, 11}
    # the first are the same
    assert torch.equal(mosaics(images, labels, focus=focus, count=5).indices.flatten(), once[:20])


def test_use_unequal():
    '''As many images of the rare classes as of the others are used, as long as there are any.'''
    labels = torch.tensor([0] * 30 + [1] * 30 + [2] * 30 + [3] * 30 + [4] * 3 + [5] * 3)
    grid = mosaics(torch.zeros(len(labels), 1, 2, 2), labels, count=4)
    assert all(2 <= number <= 3 for number in Counter(grid.cells.flatten().tolist()).values())
    # when the rare ones are used up, it goes on with the others
    grid = mosaics(torch.zeros(len(labels), 1, 2, 2), labels)
    assert len(grid.cells) == 31 and grid.indices.unique().numel() == 124


def test_seed():
    '''The same for the same seed, whatever the state of the global generator, and others for another.'''
    images, labels = labelled(5, 8)
    results = []
    for seed in (0, 0, 1):
        torch.rand(3)
        state = torch.get_rng_state()
        results.append(mosaics(images, labels, seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first, second) for first, second in zip(*results[:2]))
    assert not torch.equal(results[0].indices, results[2].indices)
    # all cells have all classes
    cells = mosaics(images, labels, count=200).cells.flatten(1)
    assert all(len(set(column.tolist())) == 8 for column in cells.T)


def test_scores():
    '''Only correct and confident images, the most confident of each class first.'''
    images, labels = labelled(5, 4)
    scores = torch.rand(20, 4) * 0.4
    confidence = torch.rand(20) * 0.4 + 0.5
    scores[torch.arange(20), labels] = confidence
    # image 0 is wrong, image 5 is not confident, and the score of image 10 unknown
    scores[0, 3], scores[5, 1], scores[10, 2] = 0.99, 0.45, float('nan')
    grid = mosaics(images, labels, scores=scores)
    assert len(grid.images) == 4
    for label in range(4):
        expected = [index for index in range(label, 20, 4) if index not in (0, 5, 10)]
        expected = sorted(expected, key=lambda index: -confidence[index])[:4]
        assert grid.indices[grid.cells == label].tolist() == expected
    strict = mosaics(images, labels, scores=scores, threshold=float(confidence.topk(9).values[-1]), count=1)
    assert confidence[strict.indices.flatten()].min() >= confidence.topk(9).values[-1]
    assert mosaics(images, labels).indices.unique().numel() == 20


def test_rescale():
    '''A mosaic of constant cells has the size of an image, and the same colours in the middle of cells.'''
    images, labels = labelled(2, 9, 12)
    small = mosaics(images, labels, 3, rescale=True)
    assert small.images.shape == (2, 3, 12, 13)
    middle = small.images[:, 0, [2, 6, 9]][:, :, [2, 6, 10]]
    torch.testing.assert_close(middle, small.indices.float())
    assert torch.equal(small.indices, mosaics(images, labels, 3).indices)


@pytest.mark.parametrize('arguments, message', [
    (dict(n=1), 'n=1'), (dict(n=0), 'n=0'), (dict(n=2.5), 'n=2.5'), (dict(count=0), 'count=0'),
    (dict(n=3), '3 x 3.*9 classes.*8 .*0: 3'), (dict(target=None), 'target=None'),
    (dict(target=[1, 2]), r'\(2,\).*24'), (dict(target=[(1, 2)] * 24), r'\(1, 2\)'),
    (dict(scores=torch.rand(24, 8), threshold=2), '4 classes.*0 .*2'), (dict(scores=torch.rand(23, 8)), r'\(23, 8\)'),
    (dict(scores=torch.rand(24, 7)), 'target 7.*7 classes'), (dict(inputs=torch.rand(24, 4, 4)), r'\(24, 4, 4\)'),
    (dict(inputs=torch.rand(8, 1, 2, 2), target=list(range(8)), focus=True), '2 of one'),
])
def test_bad(arguments, message):
    '''Errors name the argument and its value.'''
    images, labels = labelled(3, 8)
    with pytest.raises(ValueError, match=message):
        mosaics(**{'inputs': images, 'target': labels, **arguments})


def loop_share(values, cells, target):
    '''Share in own cells, with areas of pixels as fractions.'''
    height, width = len(values), len(values[0])
    inside = total = Fraction(0)
    for row in range(height):
        for column in range(width):
            value = max(Fraction(0), Fraction(values[row][column]))
            total += value
            for down, line in enumerate(cells):
                for right, label in enumerate(line):
                    if label != target:
                        continue
                    bounds = [(row, height, down, len(cells)), (column, width, right, len(line))]
                    area = value
                    for place, size, cell, number in bounds:
                        start, end = Fraction(cell * size, number), Fraction((cell + 1) * size, number)
                        area *= max(0, min(place + 1, end) - max(place, start))
                    inside += area
    return float(inside / total)


@pytest.mark.parametrize('height, width', [(6, 6), (7, 9), (1, 2), (12, 5)])
@pytest.mark.parametrize('n', [2, 3])
@pytest.mark.parametrize('focus', [False, True])
def test_reference(height, width, n, focus):
    '''Against fractions of areas, of maps whose pixels lie in several cells.'''
    maps, cells = torch.randn(5, 3, height, width), cells_of(5, n, focus)
    maps[:, 0, 0, 0] += 9
    targets = torch.zeros(5, dtype=torch.long) if focus else cells[:, 0, 1]
    result = grid_pointing(maps, cells, targets)
    assert all(values.shape == (5,) for values in result)
    assert result.share.dtype == torch.float64 and result.ceiling.tolist() == [1] * 5 and not result.empty.any()
    assert result.chance.tolist() == [pytest.approx((n * n // 2 if focus else 1) / n ** 2)] * 5
    for index in range(5):
        expected = loop_share(maps[index].sum(0).tolist(), cells[index].tolist(), int(targets[index]))
        assert float(result.share[index]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize('value', [0., -0., 0.1, 3., -2., 1e-30, 1e300])
@pytest.mark.parametrize('n, focus', [(2, False), (2, True), (3, False), (3, True)])
def test_constant(value, n, focus):
    '''A constant map has the level of chance to the last digit, also without positive relevance, and no warning.'''
    cells = cells_of(4, n, focus)
    for size in (4, 7, 224):
        maps = torch.full((4, size, size), value, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            result = grid_pointing(maps, cells, 0)
        assert torch.equal(result.share, result.chance)
        assert result.empty.tolist() == [value <= 0] * 4


@pytest.mark.parametrize('n', [2, 3])
def test_controls(n):
    '''No map that does not know the class beats chance, averaged over the cells of a mosaic. One that does has 1.'''
    images, labels = labelled(9, 12, 10)
    grid = mosaics(images, labels, n)
    noise = torch.rand(len(grid.images), 10 * n, 11 * n)
    knowing = []
    for maps in (gaussian(10 * n).expand(len(noise), -1, -1), noise, grid.images):
        results = [grid_pointing(maps, grid.cells, target) for target in grid.targets.unbind(1)]
        share = torch.stack([result.share for result in results])
        torch.testing.assert_close(share.mean(0), results[0].chance)
    for target in grid.targets.unbind(1):
        own = (grid.cells == target[:, None, None]).float()
        knowing.append(grid_pointing(own, grid.cells, target).share)
    assert torch.stack(knowing).unique().tolist() == [1]


def test_negative():
    '''Maps that vary below zero have the level of chance, and there is a warning on them.'''
    cells = cells_of(3, 2)
    maps = -torch.rand(3, 8, 8)
    maps[1] *= -1
    with pytest.warns(NegativeMapWarning, match=r'\[0, 2\]') as found:
        result = grid_pointing(maps, cells, 1)
    assert found[0].filename == __file__
    assert result.empty.tolist() == [True, False, True]
    assert result.share[[0, 2]].tolist() == [0.25, 0.25] and result.share[1] != 0.25


def test_forms():
    '''Channels are summed, arrays and single maps are taken, and the scale does not matter.'''
    maps, cells = torch.randn(2, 3, 6, 6), cells_of(2, 2)
    expected = grid_pointing(maps, cells, 3)
    for other in (maps.sum(1), maps.sum(1, keepdim=True), maps.numpy(), (maps,), maps * 2 ** 60, maps * 2. ** -100):
        torch.testing.assert_close(grid_pointing(other, cells, 3).share, expected.share, rtol=1e-5, atol=0)
    single = grid_pointing(maps[0].sum(0), cells[0], 3)
    torch.testing.assert_close(single.share, expected.share[:1])
    single = grid_pointing(maps[:1], cells[0].numpy(), torch.tensor([3]))
    torch.testing.assert_close(single.share, expected.share[:1])


@pytest.mark.parametrize('arguments, message', [
    (dict(attributions=torch.rand(2)), r'\(2,\)'), (dict(attributions=torch.rand(0, 4, 4)), r'\(0, 4, 4\)'),
    (dict(attributions=torch.full((2, 4, 4), float('nan'))), r'\[0, 1\]'),
    (dict(cells=torch.zeros(3, 2, 2)), r'\(3, 2, 2\)'), (dict(cells=torch.zeros(2, 4)), r'\(2, 4\)'),
    (dict(target=9), 'target 9 of example 0.*1'),
    (dict(target=[0, 8]), 'target 8 of example 1'), (dict(target=[0]), r'\(1,\)'), (dict(target=None), 'None'),
])
def test_bad_pointing(arguments, message):
    '''Errors name the argument and its value.'''
    known = {'attributions': torch.rand(2, 4, 4), 'cells': cells_of(2, 2), 'target': 0}
    with pytest.raises(ValueError, match=message):
        grid_pointing(**{**known, **arguments})


def test_bad_types():
    '''Lists are no maps.'''
    with pytest.raises(TypeError, match='attributions'):
        grid_pointing([[1.]], cells_of(1, 2), 0)
    with pytest.raises(TypeError, match='cells'):
        grid_pointing(torch.rand(1, 4, 4), [[0, 1], [2, 3]], 0)
