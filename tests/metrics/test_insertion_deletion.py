'''Insertion and deletion against closed forms, plain loops and golden cases.'''
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_cases import golden_cases, relative_error, tensor
from helpers.networks import UserNetwork, randomize

from captum_adapters._validation import check_target, pixel_maps, select_target
from captum_adapters.metrics import NegativeMapWarning, ProbabilityWarning, _perturbation, _ranking
from captum_adapters.metrics.insertion_deletion import insertion_deletion

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent.parent
HEIGHT, WIDTH = 6, 7
CURVES = ('insertion', 'deletion', 'id_score', 'insertion_curve', 'deletion_curve')


def network():
    '''A residual network of double precision.'''
    return randomize(UserNetwork()).double().eval()


def images(batch=2, height=HEIGHT, width=WIDTH):
    '''Random images of double precision.'''
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


def maps(batch=2, levels=None, height=HEIGHT, width=WIDTH):
    '''Random maps, with as many levels as given.'''
    if levels is None:
        return torch.rand(batch, height, width, dtype=torch.float64)
    return torch.randint(1, levels + 1, (batch, height, width)).double()


class Recorder:
    '''A function which remembers the images it was called with.'''
    def __init__(self, model):
        self.model, self.chunks = model, []

    def __call__(self, inputs, *args):
        self.chunks.append(inputs.clone())
        return self.model(inputs, *args)

    @property
    def images(self):
        '''All images as bytes.'''
        return [image.numpy().tobytes() for chunk in self.chunks for image in chunk]


def probability(model, image, target):
    '''Probability of a class, given an array.'''
    with torch.no_grad():
        return float(model(torch.from_numpy(image)[None]).softmax(1)[0, target])


def loop_blur(image):
    '''Convolution with the kernel of RISE's code: an impulse after a Gaussian filter with reflecting borders.'''
    weights = [np.exp(-offset ** 2 / 50) for offset in range(-20, 21)]
    kernel = np.zeros(11)
    for pos in range(11):
        for weight, offset in zip(weights, range(-20, 21)):
            other = pos + offset
            while not 0 <= other < 11:
                other = -1 - other if other < 0 else 21 - other
            kernel[pos] += (other == 5) * weight / sum(weights)
    result = np.zeros_like(image)
    for row in range(image.shape[1]):
        for col in range(image.shape[2]):
            for down in range(-5, 6):
                for right in range(-5, 6):
                    if 0 <= row + down < image.shape[1] and 0 <= col + right < image.shape[2]:
                        weight = kernel[down + 5] * kernel[right + 5]
                        result[:, row, col] += weight * image[:, row + down, col + right]
    return result


def loop_curves(model, image, heat, target, counts, ties, inserted, deleted, axis, permutation=None):
    '''Both curves of one image by loops over pixels, with the x-axis and the areas.

    The axis is ``'count'``, ``'share'`` of pixels that are really selected, or ``'uniform'``.
    '''
    pixels = [(row, col) for row in range(heat.shape[0]) for col in range(heat.shape[1])]
    if permutation is not None:
        pixels = [pixels[num] for num in permutation]
    ranking = sorted(pixels, key=lambda pixel: -heat[pixel])
    xs, insertion, deletion = [], [], []
    for num, count in enumerate(counts):
        chosen = ranking[:count]
        if ties == 'nearest':
            values = [heat[pixel] for pixel in ranking]
            edges = [num for num in range(len(pixels) + 1) if num in (0, len(pixels)) or values[num] < values[num - 1]]
            # of two equally near ones, that nearer to an end
            chosen = ranking[:min(edges, key=lambda edge: (abs(edge - count), -abs(2 * edge - len(pixels))))]
        elif ties in ('group', 'threshold') and count:
            chosen = [pixel for pixel in pixels if heat[pixel] >= heat[ranking[count - 1]]]
        start, rest = inserted.copy(), image.copy()
        for row, col in chosen:
            start[:, row, col] = image[:, row, col]
            rest[:, row, col] = deleted[:, row, col]
        insertion.append(probability(model, start, target))
        deletion.append(probability(model, rest, target))
        xs.append({
            'count': count / len(pixels), 'share': len(chosen) / len(pixels), 'uniform': num / max(1, len(counts) - 1),
        }[axis])
    return {
        'fractions': xs, 'insertion_curve': insertion, 'deletion_curve': deletion,
        'insertion': loop_area(xs, insertion), 'deletion': loop_area(xs, deletion),
        'id_score': loop_area(xs, insertion) - loop_area(xs, deletion),
    }


def loop_area(xs, ys):
    '''Trapezoidal rule.'''
    if len(xs) == 1:
        return ys[0]
    return sum((xs[num + 1] - xs[num]) * (ys[num] + ys[num + 1]) / 2 for num in range(len(xs) - 1))


def published_counts(n_pixels, step):
    '''Points of the published code of Otsuki et al. 2024.'''
    return [min(step * (num + 1), n_pixels - 1) + 1 for num in range(-(-n_pixels // step))]


def full_counts(n_pixels, step):
    '''Points every few pixels, with both ends.'''
    return [*range(0, n_pixels, step), n_pixels]


SETTINGS = {
    'default': ({'step': 4}, 'nearest', 'share'),
    'group': ({'step': 4, 'ties': 'group'}, 'group', 'share'),
    'stable': ({'step': 4, 'ties': 'stable'}, 'stable', 'count'),
    'random': ({'step': 4, 'ties': 'random'}, 'random', 'count'),
    'threshold': ({'step': 4, 'ties': 'threshold'}, 'threshold', 'count'),
    'c3': ({'step': 4, 'protocol': 'c3'}, 'stable', 'count'),
    'c3-group': ({'step': 4, 'protocol': 'c3', 'ties': 'group'}, 'group', 'share'),
    'keio': ({'step': 4, 'protocol': 'keio'}, 'threshold', 'uniform'),
    'keio-stable': ({'step': 4, 'protocol': 'keio', 'ties': 'stable'}, 'stable', 'uniform'),
    'keio-random': ({'step': 4, 'protocol': 'keio', 'ties': 'random'}, 'random', 'uniform'),
    'keio-nearest': ({'step': 4, 'protocol': 'keio', 'ties': 'nearest'}, 'nearest', 'share'),
    'rise': ({'step': 4, 'protocol': 'rise'}, 'stable', 'uniform'),
    'rise-random': ({'step': 4, 'protocol': 'rise', 'ties': 'random'}, 'random', 'uniform'),
    'rise-threshold': ({'step': 4, 'protocol': 'rise', 'ties': 'threshold'}, 'threshold', 'uniform'),
    'rise-group': ({'step': 4, 'protocol': 'rise', 'ties': 'group'}, 'group', 'share'),
}


@pytest.mark.parametrize('levels', [None, 1, 5])
@pytest.mark.parametrize('baseline', ['none', 'channels', 'insertion'])
@pytest.mark.parametrize('name', SETTINGS)
def test_reference(name, baseline, levels):
    '''All protocols and ways to treat ties agree with loops over pixels.'''
    options, ties, axis = SETTINGS[name]
    model, input, heat, target = network(), images(), maps(levels=levels), [1, 4]
    deleted, inserted = torch.zeros_like(input), torch.zeros_like(input)
    baselines = insertion_baselines = None
    if baseline != 'none':
        baselines = torch.randn(1, 3, 1, 1, dtype=torch.float64)
        deleted = inserted = baselines.expand_as(input)
    # two rows of pixels are like the baseline of deletion, but not like that of insertion if it is another
    input[:, :, 2:4] = deleted[:, :, 2:4]
    if 'rise' in name:
        inserted = torch.stack([torch.from_numpy(loop_blur(image.numpy())) for image in input])
    if baseline == 'insertion':
        inserted = insertion_baselines = images()
    if 'keio' in name:
        counts = published_counts(HEIGHT * WIDTH, options['step'])
        if ties == 'nearest':
            counts = [0, *counts]
    else:
        counts = full_counts(HEIGHT * WIDTH, options['step'])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        result = insertion_deletion(
            model, input, heat, baselines, target, insertion_baselines=insertion_baselines, seed=3, **options
        )
    permutations = _ranking.random_orders(input, 3, None, HEIGHT * WIDTH).tolist() if ties == 'random' else [None, None]
    for num in range(2):
        expected = loop_curves(
            model, input[num].numpy(), heat[num].numpy(), target[num], counts, ties, inserted[num].numpy(),
            deleted[num].numpy(), axis, permutations[num],
        )
        for key, value in expected.items():
            actual = getattr(result, key)[num]
            assert actual.shape == torch.Size(np.shape(value)), key
            assert torch.allclose(actual, torch.tensor(value, dtype=torch.float64), rtol=0, atol=1e-12), key
        full, blank, start = (
            probability(model, array[num].numpy(), target[num]) for array in (input, deleted, inserted)
        )
        assert abs(result.score_full[num] - full) < 1e-12 and abs(result.score_blank[num] - blank) < 1e-12
        normalized = (expected['insertion'] - start) / (full - start), (expected['deletion'] - blank) / (full - blank)
        assert abs(result.insertion_normalized[num] - normalized[0]) < 1e-8 * max(1, abs(normalized[0]))
        assert abs(result.deletion_normalized[num] - normalized[1]) < 1e-8 * max(1, abs(normalized[1]))
        assert torch.equal(result.id_normalized, result.insertion_normalized - result.deletion_normalized)


GOLDEN_TIES = {'rank': 'stable', 'threshold': 'threshold', 'group': 'group'}


@pytest.mark.parametrize('arrays, settings, case', golden_cases('metric_insertion_deletion', 'insertion_deletion'))
def test_golden(arrays, settings, case):
    '''Golden cases.'''
    arguments = case['arguments']
    weight, bias = (tensor(arrays, f'model.{key}')[0] for key in ('weight', 'bias'))
    input = tensor(arrays, case['inputs']['image'])
    fill = torch.as_tensor(arguments['fill'], dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        result = insertion_deletion(
            lambda x: x.flatten(1) @ weight.T + bias, input, tensor(arrays, case['inputs']['attribution']),
            fill.view(-1, 1, 1) if fill.ndim else fill, arguments['target'], ties=GOLDEN_TIES[arguments['ties']],
            step=arguments['step'], protocol={'full': None, 'official': 'keio'}[arguments['grid']],
        )
    for actual, key in zip(CURVES, ('insertion_auc', 'deletion_auc', 'id_score', 'insertion', 'deletion')):
        expected = tensor(arrays, case['expected'][key])
        assert getattr(result, actual).shape == expected.shape
        assert float((getattr(result, actual) - expected).abs().max()) < 1e-12
    # ties change only how many pixels are selected, not the grid
    assert torch.equal(result.selected, tensor(arrays, case['expected']['selected'], torch.long))


def test_default_steps():
    '''The points of published protocols, if the caller chooses none.'''
    model, input, heat = network(), images(1, 30, 30), maps(1, height=30, width=30)
    for protocol, counts in (('keio', published_counts(900, 500)), ('rise', full_counts(900, 224))):
        result = insertion_deletion(model, input, heat, 0., 1, protocol=protocol)
        assert result.selected[0].tolist() == counts
    # any integer is one
    for step in (np.int64(20), torch.tensor(20)):
        result = insertion_deletion(model, input, heat, target=1, step=step)
        assert result.selected[0].tolist() == full_counts(900, 20)


def test_closed_form():
    '''The score is a weighted sum of pixels: the pixel of rank k adds its share to all later points.'''
    weight = torch.rand(3, 1, 10, 12, dtype=torch.float64)
    input = torch.ones_like(weight)
    result = insertion_deletion(
        lambda x, w: (x * w).sum((1, 2, 3)), input, weight, additional_forward_args=weight, n_steps=120
    )
    ordered = weight.flatten(1).sort(1, descending=True).values
    later = torch.arange(120, 0, -1) - .5
    assert torch.allclose(result.insertion, (ordered * later).sum(1) / 120, rtol=1e-14)
    assert torch.allclose(result.deletion, ordered.sum(1) - result.insertion, rtol=1e-14)
    assert torch.allclose(result.insertion_curve[:, 1:], ordered.cumsum(1), rtol=1e-14)
    assert torch.allclose(result.fractions, torch.arange(121).double() / 120)
    assert torch.allclose(result.insertion_normalized, result.insertion / ordered.sum(1), rtol=1e-14)


def both_signs(heat, n_steps):
    '''Check that insertion of a map is deletion of its negative, and return the scores of the map.'''
    model, input = network(), images(height=heat.shape[1], width=heat.shape[2])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        positive, negative = (
            insertion_deletion(model, input, sign * heat, .3, 2, n_steps=n_steps) for sign in (1, -1)
        )
    assert torch.allclose(positive.insertion, negative.deletion, rtol=1e-12)
    assert torch.allclose(positive.deletion, negative.insertion, rtol=1e-12)
    return positive


@pytest.mark.parametrize('levels', [2, 5, 20, None])
@pytest.mark.parametrize('size', [(6, 7), (7, 9), (8, 8)])
@pytest.mark.parametrize('n_steps', [1, 5, 10, 63, 100])
def test_negative(size, n_steps, levels):
    '''Insertion of a map is deletion of its negative, also where the number of pixels or of steps is odd.'''
    positive = both_signs(maps(levels=levels, height=size[0], width=size[1]), n_steps)
    assert (positive.id_score.abs() > 1e-6).all() or n_steps == 1 or levels
    n_pixels = size[0] * size[1]
    middle = n_pixels % 2 == 1 and n_steps % 2 == 0 and n_steps < n_pixels
    assert positive.fractions.shape[1] == min(n_steps, n_pixels) + 1 + middle


def test_random_maps():
    '''The mean ID of random maps does not differ from 0.'''
    input = images(1).expand(150, -1, -1, -1)
    scores = insertion_deletion(network(), input, maps(150), target=1, n_steps=14).id_score
    error = scores.std() / len(scores) ** .5
    assert error > 0 and scores.mean().abs() < 4 * error
    scores = insertion_deletion(
        network(), input, torch.ones(150, HEIGHT, WIDTH), target=1, n_steps=14, ties='random', sample_ids=range(150)
    ).id_score
    error = scores.std() / len(scores) ** .5
    assert error > 0 and scores.mean().abs() < 4 * error


def test_constant():
    '''A constant map is worth nothing, and almost everything in the published code.'''
    model, input = network(), images()
    heat = torch.ones(2, HEIGHT, WIDTH)
    result = insertion_deletion(model, input, heat, target=[1, 2])
    assert torch.equal(result.id_score, torch.zeros(2).double())
    assert torch.allclose(result.insertion, (result.score_full + result.score_blank) / 2)
    assert torch.equal(result.tied_share, torch.ones(2).double()) and result.distinct_levels.tolist() == [1, 1]
    black = torch.full((1, 3, 1, 1), -2.)
    for step in (5, HEIGHT * WIDTH):
        result = insertion_deletion(model, input, heat, black, [1, 2], protocol='keio', step=step)
        assert torch.allclose(result.id_score, result.score_full - result.score_blank, rtol=1e-12)
        with torch.no_grad():
            full = model(input).softmax(1)[[0, 1], [1, 2]]
            blank = model(black.expand_as(input).double()).softmax(1)[[0, 1], [1, 2]]
        assert torch.allclose(result.id_score, full - blank, rtol=1e-12)


@pytest.mark.parametrize('protocol', [None, 'c3', 'keio', 'rise'])
@pytest.mark.parametrize('transform', [torch.exp, lambda x: x ** 3 + 1, lambda x: 5 * x - 7, torch.atan])
def test_monotone(transform, protocol):
    '''Strictly monotone transforms change nothing.'''
    model, input, heat = network(), images(), torch.cat([maps(1), maps(1, 4)])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        results = [
            insertion_deletion(model, input, elem, target=0, protocol=protocol, n_steps=6)
            for elem in (heat, transform(heat))
        ]
    assert all(torch.equal(first, second) for first, second in zip(*results))


@pytest.mark.parametrize('options', [{}, {'protocol': 'rise', 'step': 5}, {'ties': 'random', 'n_steps': 7}])
def test_chunks(options):
    '''The size of chunks does not matter, nor does the rest of the batch, and chunks are as small as told.'''
    model, input, heat, target = network(), images(3), maps(3, 9), torch.tensor([0, 3, 4])
    expected = insertion_deletion(model, input, heat, target=target, **options)
    for size in (1, 7, 10000):
        recorder = Recorder(model)
        result = insertion_deletion(recorder, input, heat, target=target, max_examples_per_batch=size, **options)
        for name in result._fields:
            actual = getattr(result, name)
            assert torch.allclose(actual.double(), getattr(expected, name).double(), rtol=1e-12, atol=1e-14), name
        sizes = [len(chunk) for chunk in recorder.chunks]
        assert max(sizes) <= size and sizes[:-1] == [size] * (len(sizes) - 1)
    for num in range(3):
        rows = slice(num, num + 1)
        result = insertion_deletion(model, input[rows], heat[rows], target=target[rows], **options)
        for name in result._fields:
            actual = getattr(result, name).double()
            assert torch.allclose(actual, getattr(expected, name)[rows].double(), rtol=1e-12, atol=1e-14), name


def test_default_chunks():
    '''By default, there are 32 images at a time, or as many as there are inputs.'''
    for batch, size in ((2, 32), (40, 40)):
        recorder = Recorder(network())
        insertion_deletion(recorder, images(batch), maps(batch), target=0)
        assert max(len(chunk) for chunk in recorder.chunks) == size


def count_images(input, heat, **options):
    '''Number of images that are evaluated, none of them twice.'''
    recorder = Recorder(network())
    insertion_deletion(recorder, input, heat, target=list(range(len(input))), **options)
    assert len(set(recorder.images)) == len(recorder.images)
    return len(recorder.images)


def test_forwards():
    '''No image is evaluated twice, and none that is not needed.'''
    input = images(3)
    points = 9
    # the blank image is the same for all
    assert count_images(input, maps(3), n_steps=10) == 3 * (2 * points + 1) + 1
    assert count_images(input, torch.ones(3, HEIGHT, WIDTH), n_steps=10) == 3 + 1
    # three levels: two groups between blank and full, for both curves
    heat = torch.arange(HEIGHT * WIDTH).div(14, rounding_mode='floor').view(1, HEIGHT, WIDTH).expand(3, -1, -1)
    assert count_images(input, heat) == 3 * (2 * 2 + 1) + 1
    assert count_images(input, heat, baselines=1., protocol='keio', step=14) == 3 * (2 + 1) + 1
    # baselines of their own
    assert count_images(input, maps(3), baselines=images(3), n_steps=10) == 3 * (2 * points + 2)
    # two different baselines: the blank image of deletion is still shared
    assert count_images(input, maps(3), protocol='rise', n_steps=10) == 3 * (2 * points + 2) + 1
    # all pixels without anything to see are counted once
    input = input.clone()
    input[:, :, 1:] = 0
    assert count_images(input, maps(3)) == 3 * (2 * (WIDTH - 1) + 1) + 1
    assert count_images(torch.zeros(1, 3, HEIGHT, WIDTH).double(), maps(1)) == 1


def test_forwards_with_arguments():
    '''The blank image has a score of its own for each example if there are further arguments for each.'''
    model = network()
    shift = torch.randn(2, 5, dtype=torch.float64)
    recorder = Recorder(lambda x, shift: model(x) + shift)
    input, heat = images(), maps()
    result = insertion_deletion(recorder, input, heat, None, [1, 2], shift, n_steps=5)
    assert len(recorder.images) == 2 * (2 * 4 + 2)
    for num in range(2):
        expected = insertion_deletion(
            lambda x: model(x) + shift[num], input[num:num + 1], heat[num:num + 1], target=num + 1, n_steps=5
        )
        for name in CURVES:
            assert torch.allclose(getattr(result, name)[num], getattr(expected, name)[0], rtol=1e-12)


def test_further_arguments():
    '''Arguments that are no tensors, or have no row for each example, are passed on.'''
    model = network()

    def forward(x, factor, table, option):
        assert table.shape == (5,) and option == {'a': 1} and factor.shape == ()
        return model(x) * factor + table

    factor, table = torch.tensor(.5).double(), torch.randn(5).double()
    input, heat = images(), maps()
    recorder = Recorder(forward)
    result = insertion_deletion(recorder, input, heat, 0, 3, (factor, table, {'a': 1}), n_steps=5)
    expected = insertion_deletion(lambda x: model(x) * factor + table, input, heat, 0, 3, n_steps=5)
    assert torch.equal(result.id_score, expected.id_score)
    assert len(recorder.images) == 2 * (2 * 4 + 1) + 1


def test_blank_targets():
    '''Each example's target is used for the blank image that all share.'''
    model, input = network(), images(3)
    result = insertion_deletion(model, input, maps(3), .2, [4, 0, 2])
    with torch.no_grad():
        logits = model(torch.full_like(input, .2))
    assert torch.allclose(result.score_blank, logits.softmax(1)[range(3), [4, 0, 2]], rtol=1e-12)
    assert torch.equal(result.insertion_curve[:, 0], result.score_blank)
    assert torch.equal(result.deletion_classes[:, -1], logits.argmax(1))


def test_attributions():
    '''Attributions with and without channels, of any precision and of another size.'''
    model, input = network(), images()
    heat = torch.randn(2, 3, HEIGHT, WIDTH, dtype=torch.float64)
    expected = insertion_deletion(model, input, heat.sum(1), target=0)
    for same in (heat, heat.sum(1, keepdim=True), (heat,), heat.clone().requires_grad_()):
        result = insertion_deletion(model, (input,), same, target=0)
        assert torch.equal(result.insertion_curve, expected.insertion_curve)
        assert not result.insertion.requires_grad
    magnitude = insertion_deletion(model, input, heat, target=0, reduce='abs_sum')
    assert torch.equal(
        magnitude.insertion_curve, insertion_deletion(model, input, heat.sum(1).abs(), target=0).insertion_curve
    )
    assert not torch.equal(magnitude.insertion_curve, expected.insertion_curve)
    coarse = torch.rand(2, 2, 3)
    fine = torch.nn.functional.interpolate(coarse[:, None], (HEIGHT, WIDTH), mode='bilinear')
    assert torch.equal(pixel_maps(coarse, input, interpolate='bilinear'), fine[:, 0])
    with pytest.raises(ValueError, match='2 x 3 pixels, but inputs of 6 x 7'):
        insertion_deletion(model, input, coarse, target=0)
    # neighbouring ranks survive: both differ by less than half precision resolves, and integers beyond 2^24
    close = torch.ones(1, HEIGHT, WIDTH)
    close[:, 0, 0] += 1e-6
    assert insertion_deletion(model, input[:1], close, target=0).distinct_levels.tolist() == [2]
    large = torch.full((1, HEIGHT, WIDTH), 2 ** 24)
    large[:, 0, 0] += 1
    assert insertion_deletion(model, input[:1], large, target=0).distinct_levels.tolist() == [2]
    half = torch.full((1, 3, HEIGHT, WIDTH), 1.).bfloat16()
    half[:, 0, 0, 0] += 2 ** -7
    assert insertion_deletion(model, input[:1], half, target=0).distinct_levels.tolist() == [2]


def test_ties():
    '''Share of ties and levels, and how many pixels enter.'''
    heat = torch.tensor([[5., 4, 4, 3, 3, 3, 2, 1, 1, 0]])[:, None]
    result = insertion_deletion(network(), images(1, 1, 10), heat, target=0, n_steps=10)
    assert result.distinct_levels.tolist() == [6] and abs(result.tied_share - .7) < 1e-12
    assert result.selected.tolist() == [[0, 1, 1, 3, 3, 6, 6, 7, 9, 9, 10]]
    assert torch.allclose(result.fractions, result.selected.double() / 10)
    after = insertion_deletion(network(), images(1, 1, 10), heat, target=0, n_steps=10, ties='group')
    assert after.selected.tolist() == [[0, 1, 3, 3, 6, 6, 6, 7, 9, 9, 10]]
    assert torch.allclose(after.fractions, after.selected.double() / 10)
    # signed zeros are equal
    zeros = torch.tensor([0., -0., 1., 2.]).view(1, 2, 2)
    assert insertion_deletion(network(), images(1, 2, 2), zeros, target=0).distinct_levels.tolist() == [3]


def test_few_points():
    '''A few pixels of an object, and ties elsewhere: also what is between two points is found.'''
    heat = torch.zeros(1, 40, 40).double()
    heat[:, 10, 10:20] = 1
    result = insertion_deletion(
        lambda x: (x[:, 0] * heat).sum((1, 2)) / 10, torch.ones(1, 1, 40, 40).double(), heat, n_steps=20
    )
    # all of the score is in 10 of 1600 pixels
    assert abs(result.insertion - (1 - 5 / 1600)) < 1e-12 and abs(result.deletion - 5 / 1600) < 1e-12


def random_order(input, heat):
    '''Pixels in descending order, tied ones at random.'''
    return _ranking.sort_scores(heat, _ranking.random_orders(input, 0, None, HEIGHT * WIDTH))[1]


def test_random_ties():
    '''Random orders depend on the seed and the sample only, and are orders of the map.'''
    model, input, heat = network(), images(2), maps(2, 2)
    results = [insertion_deletion(model, input, heat, target=0, ties='random', seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(results[0].insertion_curve, results[1].insertion_curve)
    assert not torch.equal(results[0].insertion_curve[0], results[2].insertion_curve[0])
    # the same image and map: another order only if its identity is another
    twice, heats = input[:1].expand(2, -1, -1, -1), heat[:1].expand(2, -1, -1)
    for ids, equal in ((None, True), ([7, 7], True), ([7, 8], False), (torch.tensor([7, 8]), False), ('ab', False)):
        curves = insertion_deletion(model, twice, heats, target=0, ties='random', sample_ids=ids).insertion_curve
        assert torch.equal(curves[0], curves[1]) == equal
    values, order = heat.flatten(1), random_order(input, heat)
    assert torch.equal(values.gather(1, order), values.sort(1, descending=True).values)
    assert torch.equal(order.sort(1).values, torch.arange(HEIGHT * WIDTH).expand(2, -1))
    # another default device changes nothing
    with torch.device('meta'):
        assert torch.equal(random_order(input, heat), order)
    with pytest.raises(ValueError, match='3 sample_ids for 2 examples'):
        insertion_deletion(model, input, heat, target=0, ties='random', sample_ids=[1, 2, 3])


def test_output():
    '''Probabilities, logits, functions of the output, and single outputs.'''
    model, input, heat = network(), images(), maps()
    results = {
        name: insertion_deletion(model, input, heat, target=1, output=output) for name, output in {
            'softmax': 'softmax', 'function': lambda out: out.softmax(1), 'logit': 'logit', 'identity': 'identity',
            'double': lambda out: 2 * out,
        }.items()
    }
    assert torch.equal(results['softmax'].insertion, results['function'].insertion)
    assert torch.equal(results['logit'].insertion, results['identity'].insertion)
    assert torch.allclose(2 * results['logit'].insertion, results['double'].insertion)
    with torch.no_grad():
        logits = model(input)
    assert torch.allclose(results['logit'].score_full, logits[:, 1])
    for name in results:
        assert torch.equal(results[name].insertion_classes[:, -1], logits.argmax(1))
    # a margin has a single value per example
    margin = insertion_deletion(model, input, heat, output=lambda out: out[:, 0] - out[:, 1])
    assert torch.allclose(margin.score_full, logits[:, 0] - logits[:, 1])
    assert torch.equal(margin.deletion_classes[:, 0], logits.argmax(1))
    for single in (lambda x: model(x)[:, 2], lambda x: model(x)[:, 2:3]):
        result = insertion_deletion(single, input, heat)
        assert torch.allclose(result.score_full, logits[:, 2])
        assert not result.insertion_classes.any()
    # whether a class is predicted
    hits = [
        insertion_deletion(model, input, heat, output=lambda out: (out.argmax(1) == 1).to(dtype))
        for dtype in (torch.float32, torch.bool, torch.int32, torch.float16)
    ]
    assert torch.equal(hits[0].score_full, (logits.argmax(1) == 1).float())
    for result in hits[1:]:
        assert result.insertion.dtype == torch.float32 and torch.equal(result.insertion_curve, hits[0].insertion_curve)
        assert torch.equal(result.id_score, hits[0].id_score)
    with pytest.raises(ValueError, match='one row for each'):
        insertion_deletion(model, input, heat, target=1, output=lambda out: out.mean())


def test_dense_output():
    '''Outputs with a class for each position need a tuple.'''
    layer = torch.nn.Conv2d(3, 4, 3, padding=1).double()
    input, heat = images(), maps()
    result = insertion_deletion(layer, input, heat, target=[(1, 2, 3), (0, 5, 6)])
    with torch.no_grad():
        output = layer(input)
    expected = output.softmax(1)[[0, 1], [1, 0], [2, 5], [3, 6]]
    assert torch.allclose(result.score_full, expected)
    assert torch.equal(result.insertion_classes[:, -1], output[[0, 1], :, [2, 5], [3, 6]].argmax(1))
    reduced = insertion_deletion(layer, input, heat, target=1, output=lambda out: out.mean((2, 3)))
    assert torch.allclose(reduced.score_full, output.mean((2, 3))[:, 1])
    assert torch.equal(reduced.insertion_classes[:, -1], output.mean((2, 3)).argmax(1))
    with pytest.raises(ValueError, match='needs 3 indices'):
        insertion_deletion(layer, input, heat, target=1)


def test_module_and_function():
    '''A module, left as it is, and a function give the same.'''
    model, input, heat = network(), images(), maps()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [param.requires_grad for param in model.parameters()]
    module = insertion_deletion(model, input, heat, target=1)
    function = insertion_deletion(lambda x: model(x), input, heat, target=1)
    assert all(torch.equal(first, second) for first, second in zip(module, function))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert flags == [param.requires_grad for param in model.parameters()] and not model.training
    assert all(param.grad is None for param in model.parameters())


def test_training_mode():
    '''Networks whose result depends on the batch are refused, others are not.'''
    model = network().train()
    with pytest.raises(ValueError, match=r'block.f.1 \(BatchNorm2d\) is in training mode'):
        insertion_deletion(model, images(), maps(), target=0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(3 * HEIGHT * WIDTH, 2)).double()
    with pytest.raises(ValueError, match=r'1 \(Dropout\) is in training mode'):
        insertion_deletion(model, images(), maps(), target=0)
    del model[1]
    assert model.training
    insertion_deletion(model, images(), maps(), target=0)


@pytest.mark.parametrize('precision', ['float32', 'bfloat16', 'autocast', 'channels_last'])
def test_precisions(precision):
    '''Single and half precision, autocast and another memory format give nearly the same.'''
    model, input, heat, target = network(), images(2, 12, 12), maps(2, height=12, width=12), [1, 3]
    expected = insertion_deletion(model, input, heat, target=target, n_steps=12, protocol='rise')
    model, input = model.float(), input.float()
    recorder = Recorder(model)
    if precision == 'bfloat16':
        model, input = model.bfloat16(), input.bfloat16()
    if precision == 'channels_last':
        model, input = (value.to(memory_format=torch.channels_last) for value in (model, input))
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'autocast'):
        result = insertion_deletion(recorder, input, heat, target=target, n_steps=12, protocol='rise')
    assert result.insertion.dtype == torch.float32 and result.insertion_classes.dtype == torch.long
    tolerance = 1e-5 if precision in ('float32', 'channels_last') else 2e-2
    for name in CURVES:
        assert relative_error(getattr(result, name).double(), getattr(expected, name)) < tolerance
    assert torch.equal(result.distinct_levels, expected.distinct_levels)
    for chunk in recorder.chunks:
        assert chunk.dtype == input.dtype
        assert chunk.is_contiguous(memory_format=torch.channels_last) == (precision == 'channels_last')
    for base in (None, torch.zeros(1, 3, 1, 1), torch.randn(2, 3, 12, 12)):
        recorder.chunks.clear()
        insertion_deletion(recorder, input, heat, base, target, n_steps=3)
        for chunk in recorder.chunks:
            assert chunk.is_contiguous(memory_format=torch.channels_last) == (precision == 'channels_last')


def test_blur():
    '''The blur is that of scipy, and is not rounded under autocast.'''
    ndimage = pytest.importorskip('scipy.ndimage')
    impulse = np.zeros((11, 11))
    impulse[5, 5] = 1
    kernel = ndimage.gaussian_filter(impulse, 5)
    point = torch.zeros(1, 2, 21, 21)
    point[:, 1, 10, 10] = 1
    with torch.autocast('cpu', torch.bfloat16):
        blurred = _perturbation.blur(point)
    assert not blurred[0, 0].any() and blurred.dtype == torch.float32
    assert np.allclose(blurred[0, 1, 5:16, 5:16], kernel, atol=1e-7)
    assert abs(float(blurred.sum()) - 1) < 1e-6


def test_baselines():
    '''Baselines as in Captum.'''
    model, input, heat = network(), images(), maps()
    constant = insertion_deletion(model, input, heat, .5, 0)
    for same in (
        (.5,), torch.tensor(.5), torch.full((3, 1, 1), .5), torch.full((1, 3, 1, 1), .5), torch.full_like(input, .5),
        torch.full((1, 3, HEIGHT, WIDTH), .5), torch.full((2, 1, 1, 1), .5),
    ):
        result = insertion_deletion(model, input, heat, same, 0)
        assert all(torch.allclose(getattr(result, name), getattr(constant, name), rtol=1e-12) for name in CURVES)
    zero = insertion_deletion(model, input, heat, target=0)
    assert torch.equal(zero.insertion, insertion_deletion(model, input, heat, 0, 0).insertion)
    for wrong in (torch.zeros(3), torch.zeros(3, 3, 1, 1), torch.zeros(2, 2, 1, 1), torch.zeros(1, 1, 3, 1, 1)):
        with pytest.raises(ValueError, match='baselines of shape .* cannot be broadcast'):
            insertion_deletion(model, input, heat, wrong, 0)
    with pytest.raises(ValueError, match='insertion_baselines of shape'):
        insertion_deletion(model, input, heat, target=0, insertion_baselines=torch.zeros(3))
    with pytest.raises(TypeError, match='baselines must be a tensor, but is str'):
        insertion_deletion(model, input, heat, 'black', 0)
    for wrong in (float('nan'), float('inf'), torch.full((1, 3, 1, 1), float('nan'))):
        with pytest.raises(ValueError, match='baselines contain NaN or infinity'):
            insertion_deletion(model, input, heat, wrong, 0)
    with pytest.raises(ValueError, match='baselines contain NaN or infinity'):
        insertion_deletion(lambda x: x.float().mean((1, 2, 3)), input.half(), heat, 1e5)
    # integers would be cut off, or wrap around
    whole = torch.full((2, 3, HEIGHT, WIDTH), 7, dtype=torch.uint8)
    for wrong in (.7, -1, torch.tensor(-1), torch.full((3, 1, 1), 300), float('nan')):
        with pytest.raises(ValueError, match='baselines have values that inputs of torch.uint8 cannot have'):
            insertion_deletion(lambda x: x.double().mean((1, 2, 3)), whole, heat, wrong)
    result = insertion_deletion(lambda x: x.double().mean((1, 2, 3)), whole, heat, 255.)
    assert result.score_blank.tolist() == [255, 255] and result.score_full.tolist() == [7, 7]


def test_warnings():
    '''Maps that are nowhere positive, and a black that is not.'''
    model, input, heat = network(), images(4), maps(4)
    heat[1] *= -1
    heat[2] = -1
    heat[3] = heat[3] - heat[3].max()
    with pytest.warns(NegativeMapWarning, match=r'examples \[1, 3\] have no positive') as caught:
        insertion_deletion(model, input, heat, target=0, n_steps=2)
    assert caught[0].filename == __file__ and 'abs_sum' in str(caught[0].message)
    with pytest.warns(UserWarning, match='-mean / std') as caught:
        insertion_deletion(model, input, maps(4), target=0, protocol='keio', step=9)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        insertion_deletion(model, input, heat, target=0, n_steps=2, reduce='abs_sum')
        insertion_deletion(model, input.abs(), maps(4), target=0, protocol='keio', step=9)
        insertion_deletion(model, input, maps(4), 0, target=0, protocol='keio', step=9)


SCALES = {
    'probabilities': lambda x: x.softmax(1), 'half': lambda x: x.softmax(1).half(),
    'bfloat16': lambda x: x.bfloat16().softmax(1), 'positions': lambda x: x[..., None].softmax(1),
    'squared': lambda x: x.square() / x.square().sum(1, keepdim=True), 'one hot': lambda x: F.one_hot(x.argmax(1), 5),
}


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('options', [
    {}, {'max_examples_per_batch': 3}, {'protocol': 'keio', 'step': 7, 'baselines': 0},
])
def test_probabilities(scale, options):
    '''A second softmax warns once, and names what to do.'''
    model, input, heat = network(), images(4), maps(4)
    target = (1, 0) if scale == 'positions' else 1
    with pytest.warns(ProbabilityWarning, match="output='identity'") as caught:
        insertion_deletion(lambda x: SCALES[scale](model(x)), input, heat, target=target, n_steps=None, **options)
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.parametrize('outputs', [
    lambda x: x, lambda x: x.log_softmax(1), lambda x: x.sigmoid(), lambda x: x.softmax(1)[:, :1],
    lambda x: x.softmax(1)[:, 0],
    lambda x: 1.02 * x.softmax(1), lambda x: x.softmax(1) - .01, lambda x: 5 * x.softmax(1), lambda x: x.abs(),
    # a single image may be anything
    lambda x: torch.cat([x[:1], x[1:].softmax(1)]), lambda x: x.softmax(1) * float('nan'),
])
def test_no_probabilities(outputs):
    '''Logits, their logarithms, single outputs, and few sigmoids are taken as they are.'''
    model, input = network(), images(3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        single = outputs(torch.zeros(2, 5)).shape[1:].numel() == 1
        insertion_deletion(lambda x: outputs(model(x)), input, maps(3), target=None if single else 0, n_steps=4)
        for output in ('identity', 'logit', lambda x: x):
            insertion_deletion(lambda x: model(x).softmax(1), input, maps(3), target=0, n_steps=4, output=output)


def test_sigmoids():
    '''Many outputs that are all between 0 and 1 are no logits.'''
    model, input = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * HEIGHT * WIDTH, 20)).double(), images()
    with pytest.warns(ProbabilityWarning, match="sigmoid.*output='identity'") as caught:
        insertion_deletion(lambda x: model(x).sigmoid(), input, maps(), target=3)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        insertion_deletion(model, input, maps(), target=3)


def test_arrays():
    '''Arrays, and a map of a single image.'''
    model, input, heat = network(), images(), maps()
    expected = insertion_deletion(model, input, heat, .5, [1, 2], n_steps=9)
    for inputs, attributions, baselines, target in (
        (input, heat.numpy(), .5, np.array([1, 2])), (input.numpy(), heat[:, None].numpy(), np.float32(.5), [1, 2]),
        (input, (heat.numpy(),), np.full((1, 3, 1, 1), .5), [1, 2]),
        ((input.numpy(),), heat.numpy().astype('>f8'), (.5,), [1, 2]),
        (input, heat.numpy()[:, ::-1].copy()[:, ::-1], np.full((3, 6, 7), .5), [1, 2]),
        (input.clone().requires_grad_(), heat.clone().requires_grad_(), torch.tensor(.5), [1, 2]),
    ):
        result = insertion_deletion(model, inputs, attributions, baselines, target, n_steps=9)
        assert all(torch.equal(*pair) for pair in zip(result, expected))
    for single in (heat[0], heat[0].numpy()):
        result = insertion_deletion(model, input[:1], single, .5, 1, n_steps=9)
        assert torch.allclose(result.insertion, expected.insertion[:1], rtol=0, atol=1e-12)
    half = heat.bfloat16()
    first, second = (
        insertion_deletion(model, input, other, .5, [1, 2], n_steps=9) for other in (half, half.double().numpy())
    )
    assert torch.equal(first.insertion, second.insertion)


def test_normalized():
    '''There is no scale if the blank image has the score of the whole.'''
    input = images(2)
    input[1] = 0
    result = insertion_deletion(lambda x: x.abs().mean((1, 2, 3)), input, maps())
    assert result.insertion_normalized.isnan().tolist() == [False, True]
    assert result.deletion_normalized.isnan().tolist() == result.id_normalized.isnan().tolist() == [False, True]
    assert torch.allclose(result.insertion_normalized[0], result.insertion[0] / result.score_full[0])
    # scores that are equal at both ends only
    result = insertion_deletion(lambda x: x.mean((1, 2, 3)) * (1 - x.mean((1, 2, 3))), 0 * input + 1, maps())
    assert result.insertion.min() > .1 and result.insertion_normalized.isnan().all()


@pytest.mark.parametrize('change, error, message', [
    ({'target': None}, ValueError, r'shape \(.*, 5\) has 5 values per example: choose one with target'),
    ({'target': 5}, ValueError, 'target 5 is out of range for 5 classes'),
    ({'target': [0, 7]}, ValueError, 'target 7 is out of range for 5 classes'),
    ({'target': -1}, ValueError, 'negative'),
    ({'target': [0, 1, 2]}, ValueError, r'shape \(3,\) is neither one for all nor one for each of 2'),
    ({'target': [0]}, ValueError, 'one for each of 2'),
    ({'target': torch.zeros(2, 1, 1).long()}, ValueError, 'one for each of 2'),
    ({'target': .5}, TypeError, 'integers .* not torch.float32'),
    ({'target': True}, TypeError, 'torch.bool'),
    ({'target': 'cat'}, TypeError, 'class indices'),
    ({'target': (0, 1)}, ValueError, 'needs 1 indices per example to select a single value, but target has 2'),
    ({'attributions': torch.zeros(2, 6, 8)}, ValueError, '6 x 8 pixels, but inputs of 6 x 7'),
    ({'attributions': torch.zeros(3, 6, 7)}, ValueError, r'shape \(3, 6, 7\) do not fit inputs of shape \(2, 3'),
    ({'attributions': torch.zeros(2, 2, 6, 7)}, ValueError, r'shape \(2, 2, 6, 7\) do not fit'),
    ({'attributions': torch.zeros(6, 7)}, ValueError, r'shape \(6, 7\) do not fit'),
    ({'attributions': torch.tensor([0, np.nan]).view(2, 1, 1).expand(2, 6, 7)}, ValueError, r'NaN .* \[1\]'),
    ({'attributions': torch.tensor([np.inf, 0]).view(2, 1, 1).expand(2, 6, 7)}, ValueError, r'infinity .* \[0\]'),
    ({'attributions': torch.zeros(2, 6, 7) > 0}, ValueError, 'torch.bool'),
    ({'attributions': (torch.zeros(2, 6, 7),) * 2}, ValueError, 'tuple of 2'),
    ({'attributions': [[0.] * 7] * 6}, TypeError, 'attributions must be a tensor, but is list'),
    ({'attributions': np.array([['a'] * 7] * 6)}, TypeError, '<U1'),
    ({'attributions': np.full((2, 6, 7), None)}, TypeError, 'object'),
    ({'attributions': np.zeros((6, 7))}, ValueError, r'\(6, 7\)'),
    ({'attributions': np.zeros((2, 6, 7), bool)}, ValueError, 'torch.bool'),
    ({'interpolate': 'cubic'}, ValueError, "'cubic'.*'bicubic'"),
    ({'interpolate': 'linear', 'attributions': torch.zeros(2, 3, 4)}, ValueError, "'linear'.*'bilinear'"),
    ({'interpolate': 3}, ValueError, '3'),
    ({'inputs': (torch.zeros(2, 3, 6, 7),) * 2}, ValueError, 'inputs is a tuple of 2'),
    ({'inputs': torch.zeros(3, 6, 7)}, ValueError, r'inputs must be of shape .*, but are of shape \(3, 6, 7\)'),
    ({'inputs': torch.zeros(0, 3, 6, 7), 'attributions': torch.zeros(0, 6, 7)}, ValueError, 'empty'),
    ({'protocol': 'best'}, ValueError, "protocol='best' is not one of"),
    ({'ties': 'first'}, ValueError, "ties='first' is not one of"),
    ({'output': 'probability'}, ValueError, "output='probability'"),
    ({'reduce': 'max'}, ValueError, "reduce='max'"),
    ({'n_steps': 0}, ValueError, 'n_steps=0 is not a positive integer'),
    ({'n_steps': 2.5}, ValueError, 'n_steps=2.5.*42 pixels'),
    ({'n_steps': float('nan')}, ValueError, 'n_steps=nan'),
    ({'step': np.bool_(True)}, ValueError, 'step=.*True'),
    ({'step': 43}, ValueError, 'step=43 .*42 pixels'),
    ({'protocol': 'keio', 'baselines': 0}, ValueError, "step=500 of protocol='keio' .*42 pixels"),
    ({'protocol': 'rise'}, ValueError, "step=224 of protocol='rise' .*42 pixels"),
    ({'step': 3, 'n_steps': 4}, ValueError, 'n_steps=4 or step=3, but not both'),
    ({'max_examples_per_batch': 0}, ValueError, 'max_examples_per_batch=0'),
    ({'forward_func': lambda x: x.sum()}, ValueError, r'output of shape \(\) for 32 images'),
    ({'forward_func': lambda x: (x, x)}, TypeError, 'returns tuple'),
    ({'forward_func': lambda x: x.sum((1, 2, 3)), 'target': 0}, ValueError, 'give target=None'),
])
def test_errors(change, error, message):
    '''Errors say what is wrong, and leave the random state alone.'''
    arguments = {'forward_func': network(), 'inputs': images(), 'attributions': maps(), 'target': 0, **change}
    with pytest.raises(error, match=message):
        insertion_deletion(**arguments)


@pytest.mark.parametrize('target, expected', [
    (1, [1, 1]), (torch.tensor(1), [1, 1]), (torch.tensor([1]), [1, 1]), (torch.tensor([2, 0]), [2, 0]),
    ([2, 0], [2, 0]), ((2,), [2, 2]), ([(2,), (0,)], [2, 0]), (np.int64(2), [2, 2]),
    (torch.tensor([2, 0], dtype=torch.int32), [2, 0]),
])
def test_targets(target, expected):
    '''Targets as in Captum.'''
    output = torch.randn(2, 3)
    assert torch.equal(select_target(output, check_target(target, 2)), output[[0, 1], expected])


def test_progress(capsys):
    '''A progress bar counts the images.'''
    insertion_deletion(network(), images(1), maps(1), target=0, n_steps=4)
    assert not capsys.readouterr().err
    insertion_deletion(network(), images(1), maps(1), target=0, n_steps=4, show_progress=True)
    assert '8/8' in capsys.readouterr().err


def test_photo():
    '''On a photograph and a trained network, the ends of the curves are the network's probabilities.'''
    pytest.importorskip('safetensors')
    from PIL import Image
    from zennit.attribution import Gradient

    from zennit_resnet import ResNetLRP, initial_relevance
    from zennit_resnet.models import load_classifier
    classifier = load_classifier(None, str(ROOT / 'examples' / 'assets' / 'resnet50_imagenette.safetensors'), 224)
    photo = Image.open(ROOT / 'examples' / 'assets' / 'photos' / 'gc_reimsCathedral.jpg').convert('RGB')
    input = classifier.transform(photo)[None]
    black = classifier.bounds()[0]
    with torch.no_grad():
        full, blank = classifier.model(torch.cat([input, black.expand_as(input)])).softmax(1)
    target = int(full.argmax())
    with Gradient(model=classifier.model, composite=ResNetLRP()) as attributor:
        heat = attributor(input.clone(), initial_relevance(target, 'softmax'))[1]
    result = insertion_deletion(classifier.model, input, heat, black, target, n_steps=4)
    assert torch.allclose(result.score_full, full[target], atol=1e-5)
    assert torch.allclose(result.score_blank, blank[target], atol=1e-5)
    assert int(result.insertion_classes[0, -1]) == target and full[target] > .9
    assert float(result.id_score) > .1
    published = insertion_deletion(classifier.model, input, torch.ones(1, 224, 224), black, target, protocol='keio')
    assert published.fractions.shape == (1, 101)
    assert torch.allclose(published.id_score, full[target] - blank[target], atol=1e-5)
