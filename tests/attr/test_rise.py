'''RISE against plain loops and closed forms, Score-CAM against a plain loop.'''
import math
import random
import sys
import types
import warnings
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution, NoiseTunnel
from captum.metrics import infidelity, sensitivity_max
from helpers.networks import UserNetwork, randomize

from captum_adapters.attr import rise as perturbation
from captum_adapters.attr.rise import RISE
from captum_adapters.attr.score_cam import ScoreCAM
from captum_adapters.metrics import ProbabilityWarning

pytestmark = pytest.mark.once

HEIGHT, WIDTH = 9, 11
PIXELS = {1: (10,), 2: (HEIGHT, WIDTH), 3: (4, 5, 6)}


def network():
    '''A residual network of double precision.'''
    return randomize(UserNetwork()).double().eval()


def images(batch=2):
    '''Random images of double precision.'''
    return torch.randn(batch, 3, HEIGHT, WIDTH, dtype=torch.float64)


def interpolation(cells, length, shift):
    '''Weights of the cells of a grid at each pixel of one dimension, (length, cells), with half-pixel centers.'''
    side = math.ceil(length / cells)
    weights = np.zeros((length, cells))
    for pixel in range(length):
        position = max((pixel + shift + 0.5) * cells / ((cells + 1) * side) - 0.5, 0)
        low = min(int(position), cells - 1)
        high = min(low + 1, cells - 1)
        weights[pixel, low] += 1 - (position - low)
        weights[pixel, high] += position - low
    return weights


def draw(n_masks, cells, size, seed, probability=0.5):
    '''Random grids and shifts.'''
    generator = torch.Generator().manual_seed(seed)
    grids = torch.rand(n_masks, *cells, generator=generator) < probability
    shifts = [torch.randint(math.ceil(length / count), (n_masks,), generator=generator)
              for length, count in zip(size, cells)]
    return grids.double().numpy(), torch.stack(shifts, 1).numpy()


def loop_masks(n_masks, cells, size, seed, probability=0.5):
    '''Masks, one after the other.'''
    for grid, shift in zip(*draw(n_masks, cells, size, seed, probability)):
        for axis, (count, length) in enumerate(zip(cells, size)):
            grid = np.moveaxis(
                np.tensordot(interpolation(count, length, shift[axis]), np.moveaxis(grid, axis, 0), 1), 0, axis
            )
        yield grid


def loop_rise(score, input, masks, probability=0.5, base=0., coverage=True):
    '''RISE for a single image, with a score of an array.'''
    total, cover, count = 0., 0., 0
    for mask in masks:
        total = total + score(input * mask + base * (1 - mask)) * mask
        cover = cover + mask
        count += 1
    return total / (cover if coverage else probability * count)


def probability_of(model, target):
    '''Probability of a class for an array.'''
    def score(image):
        with torch.no_grad():
            return float(model(torch.from_numpy(image)[None]).softmax(1)[0, target])
    return score


@pytest.mark.parametrize('normalization', ['expected', 'coverage'])
@pytest.mark.parametrize('cells', [(3, 3), (2, 4)])
def test_rise_loop(cells, normalization):
    '''The result is that of a loop over masks, for each example with its target.'''
    model, input, targets = network(), images(3), [0, 4, 2]
    result = RISE(model).attribute(
        input, targets, n_masks=40, grid_size=3 if cells == (3, 3) else cells, seed=5, probability=0.3,
        normalization=normalization, perturbations_per_eval=7,
    )
    assert result.shape == input.shape
    assert torch.equal(result, result[:, :1].expand_as(result))
    for image, target, attribution in zip(input, targets, result):
        expected = loop_rise(
            probability_of(model, target), image.numpy(), loop_masks(40, cells, (HEIGHT, WIDTH), 5, 0.3), 0.3,
            coverage=normalization == 'coverage',
        )
        # grids are drawn in single precision, and interpolated in double precision
        np.testing.assert_allclose(attribution[0].numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize('rank', [1, 2, 3])
def test_masks(rank):
    '''Masks of any dimension are those of a loop, within [0, 1], and reach both ends.'''
    size, cells = PIXELS[rank], (3, 2, 4)[:rank]
    image = torch.zeros(1, 1, *size, dtype=torch.float64)
    grids = perturbation._draw_grids(image, 25, cells, 0.4, torch.Generator().manual_seed(3))
    masks = perturbation._make_masks(*grids, image)
    expected = np.stack([*loop_masks(25, cells, size, 3, 0.4)])
    np.testing.assert_allclose(masks.numpy(), expected, atol=1e-12)
    assert masks.min() == 0 and masks.max() == 1
    # the shift is any number of pixels below the side of a cell
    for axis, (count, length) in enumerate(zip(cells, size)):
        many = perturbation._draw_grids(image, 500, cells, 0.4, torch.Generator().manual_seed(0))[1]
        assert sorted(set(many[:, axis].tolist())) == [*range(math.ceil(length / count))]


@pytest.mark.parametrize('rank', [1, 2, 3])
def test_rise_dimensions(rank):
    '''Inputs have one to three spatial dimensions.'''
    input = torch.rand(2, 3, *PIXELS[rank], dtype=torch.float64)
    weight = torch.rand(PIXELS[rank], dtype=torch.float64)
    result = RISE(lambda x: (x.sum(1) * weight).flatten(1).sum(1)).attribute(input, n_masks=20, grid_size=2)
    assert result.shape == input.shape
    for image, attribution in zip(input.numpy(), result.numpy()):
        expected = loop_rise(
            lambda x: float((x.sum(0) * weight.numpy()).sum()), image, loop_masks(20, (2,) * rank, PIXELS[rank], 0)
        )
        np.testing.assert_allclose(attribution[1], expected, rtol=1e-10)


@pytest.mark.parametrize('normalization', ['expected', 'coverage'])
def test_rise_linear(normalization):
    '''For a linear score, the expected map is (1 / p) sum_j w_j x_j E[M_j M_i], within the Monte Carlo error.

    With independent cells of variance p (1 - p), E[M_j M_i] is p^2 + p (1 - p) times the mean over shifts of the sum
    over cells of both pixels' weights.
    '''
    chance, cells, size, runs = 0.4, 3, (6, 7), 30
    shifts = [range(math.ceil(length / cells)) for length in size]
    second = np.zeros(2 * size)
    for row in shifts[0]:
        for column in shifts[1]:
            rows, columns = interpolation(cells, size[0], row), interpolation(cells, size[1], column)
            second += np.einsum('ac,bd,ec,fd->abef', rows, columns, rows, columns)
    second = chance ** 2 + chance * (1 - chance) * second / (len(shifts[0]) * len(shifts[1]))
    # contributions of both signs
    values = torch.randn(1, 1, *size, dtype=torch.float64)
    expected = np.einsum('abef,ef->ab', second, values[0, 0].numpy()) / chance
    rise = RISE(lambda x: x.sum((1, 2, 3)))
    results = torch.stack([
        rise.attribute(values, n_masks=1000, grid_size=cells, probability=chance, seed=seed, perturbations_per_eval=500,
                       normalization=normalization)[0, 0]
        for seed in range(runs)
    ])
    error = results.std(0) / math.sqrt(runs)
    deviation = (results.mean(0) - torch.from_numpy(expected)) / error
    # 42 correlated pixels; the error is small compared to the map, so that this tells formulas apart
    assert deviation.abs().max() < 4.5
    assert error.max() < 0.05 * np.abs(expected).max()


def test_rise_convergence():
    '''The error decreases with the square root of the number of masks.'''
    values = torch.randn(1, 1, 8, 8)
    rise = RISE(lambda x: x.sum((1, 2, 3)))
    spread = [
        torch.stack([
            rise.attribute(values, n_masks=n_masks, grid_size=4, seed=seed, perturbations_per_eval=n_masks)
            for seed in range(40)
        ]).var(0).mean().sqrt()
        for n_masks in (50, 800)
    ]
    assert 3 < spread[0] / spread[1] < 5.3


def test_rise_offset():
    '''A constant score has a constant map, and an offset moves the map by itself, unlike with the paper's division.'''
    input = torch.rand(1, 3, HEIGHT, WIDTH, dtype=torch.float64)
    settings = {'n_masks': 30, 'grid_size': 3}
    constant = RISE(lambda x: torch.full((len(x),), 2.5)).attribute(input, **settings)
    torch.testing.assert_close(constant, torch.full_like(input, 2.5))
    one, other = (
        RISE(lambda x, offset=offset: x.sum((1, 2, 3)) + offset).attribute(input, **settings) for offset in (0, 100)
    )
    torch.testing.assert_close(one + 100, other)
    constant = RISE(lambda x: torch.full((len(x),), 2.5)).attribute(input, normalization='expected', **settings)
    assert constant.std() > 0.1
    # no mask shows these pixels
    result = RISE(lambda x: x.sum((1, 2, 3)) + 1).attribute(
        input, n_masks=1, grid_size=5, probability=0.3
    )
    hidden = np.stack([*loop_masks(1, (5, 5), (HEIGHT, WIDTH), 0, 0.3)])[0] == 0
    assert hidden.any() and bool((result[0, 0].numpy()[hidden] == 0).all()) and bool((result[0, 0] > 0).any())


@pytest.mark.parametrize('chunk', [1, 3, 8, 20, 64, None])
def test_rise_chunks(chunk):
    '''The number of masks at a time has no influence, nor has the rest of the batch.'''
    model, input = network(), images(3)
    sizes = []

    def forward(x):
        sizes.append(len(x))
        return model(x)

    attribute = partial(RISE(forward).attribute, n_masks=20, grid_size=3)
    reference = attribute(input, 1, perturbations_per_eval=10)
    assert sizes == [30, 30]
    sizes.clear()
    torch.testing.assert_close(
        attribute(input, 1, perturbations_per_eval=chunk), reference, rtol=1e-12, atol=1e-14
    )
    limit = 10 if chunk is None else chunk
    assert sizes == [3 * min(limit, 20 - begin) for begin in range(0, 20, limit)]
    torch.testing.assert_close(attribute(input[1:2], 1), reference[1:2], rtol=1e-12, atol=1e-14)


def test_rise_single_precision_chunks():
    '''Sums are in double precision: with exact scores, results are the same bit for bit.'''
    input = torch.rand(2, 3, HEIGHT, WIDTH)
    rise = RISE(lambda x: x[:, 0, 4, 4])
    results = [rise.attribute(input, n_masks=300, grid_size=3, perturbations_per_eval=chunk) for chunk in (1, 77, 300)]
    assert results[0].dtype == torch.float32
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_rise_default_device():
    '''Masks do not depend on the default device.'''
    input, rise = images(), RISE(lambda x: x.mean((1, 2, 3)))
    expected = rise.attribute(input, n_masks=10)
    with torch.device('meta'):
        assert torch.equal(rise.attribute(input, n_masks=10), expected)


def test_rise_seed():
    '''Masks depend on the seed alone, and the global random state is untouched.'''
    model, input = network(), images()
    attribute = partial(RISE(model).attribute, input, 1, n_masks=20, grid_size=3)
    random.seed(1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = attribute(seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(attribute(seed=7), first)
    assert not torch.allclose(attribute(seed=8), first)
    # examples with the same content have the same map
    twice = RISE(model).attribute(input[:1].repeat(2, 1, 1, 1), 1, n_masks=20, grid_size=3)
    torch.testing.assert_close(twice[0], twice[1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize('target, rows', [
    (2, [2, 2]), (torch.tensor(2), [2, 2]), (torch.tensor([2]), [2, 2]), ([1, 3], [1, 3]),
    (torch.tensor([1, 3]), [1, 3]), ([torch.tensor(1), 3], [1, 3]),
])
def test_rise_targets(target, rows):
    '''Targets are those of Captum.'''
    model, input = network(), images()
    result = RISE(model).attribute(input, target, n_masks=10, grid_size=3)
    expected = [RISE(model).attribute(input[i:i + 1], row, n_masks=10, grid_size=3) for i, row in enumerate(rows)]
    torch.testing.assert_close(result, torch.cat(expected), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(result, RISE(model).attribute(input, [4, 0], n_masks=10, grid_size=3))


def test_rise_target_tuples():
    '''Outputs with more dimensions have tuples as targets, and those with one value none.'''
    model, input = network(), images()
    several = RISE(lambda x: torch.stack([model(x), 2 * model(x)], -1))
    kwargs = {'n_masks': 10, 'grid_size': 3, 'output': 'logit'}
    plain = RISE(model).attribute(input, [1, 3], **kwargs)
    torch.testing.assert_close(several.attribute(input, [(1, 0), (3, 1)], **kwargs)[1], 2 * plain[1])
    torch.testing.assert_close(several.attribute(input, (3, 1), **kwargs)[1], 2 * plain[1])
    # the probability is among classes
    softmax = several.attribute(input, (3, 1), n_masks=10, grid_size=3)
    torch.testing.assert_close(
        softmax, RISE(lambda x: 2 * model(x)).attribute(input, 3, n_masks=10, grid_size=3), rtol=1e-10, atol=0.
    )
    for function in (lambda x: model(x)[:, 3], lambda x: model(x)[:, 3:4]):
        # softmax of a single value would be one
        torch.testing.assert_close(RISE(function).attribute(input, n_masks=10, grid_size=3)[1], plain[1])


def test_rise_outputs():
    '''Scores are probabilities, the output itself, or a function of it.'''
    model, input = network(), images()
    attribute = partial(RISE(model).attribute, input, 1, n_masks=10, grid_size=3)
    softmax = attribute()
    other = RISE(lambda x: model(x).softmax(1)).attribute(input, 1, n_masks=10, grid_size=3, output='logit')
    torch.testing.assert_close(softmax, other)
    torch.testing.assert_close(attribute(output=lambda logits: logits.softmax(1)), softmax)
    assert not torch.allclose(attribute(output='logit'), softmax)
    hits = [
        RISE(model).attribute(input, n_masks=10, output=lambda logits: (logits.argmax(1) == 1).to(dtype))
        for dtype in (torch.float64, torch.bool)
    ]
    assert torch.equal(*hits)
    # integers have probabilities, too
    counts = RISE(lambda x: x.flatten(1).round().long()).attribute(input, 1, n_masks=10)
    assert torch.equal(counts, RISE(lambda x: x.flatten(1).round().float()).attribute(input, 1, n_masks=10))


@pytest.mark.parametrize('chunk', [None, 3])
def test_rise_probabilities(chunk):
    '''A second softmax warns once; probabilities as they are have the map of the softmax of logits.'''
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 36, 4)).double()
    input = torch.randn(2, 3, 6, 6).double()
    settings = {'target': 1, 'n_masks': 10, 'grid_size': 3, 'perturbations_per_eval': chunk}
    network = RISE(lambda x: model(x).softmax(1))
    with pytest.warns(ProbabilityWarning, match="output='identity'") as caught:
        network.attribute(input, **settings)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        expected = RISE(model).attribute(input, **settings)
        for output in ('identity', 'logit'):
            assert torch.equal(network.attribute(input, output=output, **settings), expected)
    with pytest.raises(ValueError, match='n_masks=True'):
        network.attribute(input, **{**settings, 'n_masks': True})


def test_rise_tuples():
    '''A tuple gives a tuple; several inputs have masks of their own.'''
    model, input = network(), images()
    plain = RISE(model).attribute(input, 1, n_masks=10, grid_size=3)
    single = RISE(model).attribute((input,), 1, n_masks=10, grid_size=3)
    assert isinstance(single, tuple) and len(single) == 1 and torch.equal(single[0], plain)
    small = torch.rand(2, 1, 4, 5, dtype=torch.float64)

    def forward(x, y):
        return model(x) + y.sum((1, 2, 3))[:, None]

    settings = {
        'n_masks': 30, 'grid_size': 2, 'output': 'logit', 'perturbations_per_eval': 4, 'normalization': 'expected'
    }
    first, second = RISE(forward).attribute((input, small), 1, baselines=(0.5, 0), **settings)
    assert first.shape == input.shape and second.shape == small.shape
    generator = torch.Generator().manual_seed(0)
    masks = [
        perturbation._make_masks(*perturbation._draw_grids(tensor, 30, 2, 0.5, generator), tensor)
        for tensor in (input, small)
    ]
    assert not torch.equal(masks[0][:, 0, 0], masks[1][:, 0, 0])
    with torch.no_grad():
        scores = torch.stack([
            forward(input * mask + 0.5 * (1 - mask), small * other)[:, 1] for mask, other in zip(*masks)
        ])
    for result, mask in zip((first, second), masks):
        torch.testing.assert_close(result[:, 0], torch.einsum('nb,nhw->bhw', scores, mask) / 15)


@pytest.mark.parametrize('base', [0.25, 'image', 'color', 'channel', 'batch'])
def test_rise_baselines(base):
    '''Hidden parts show the baseline, which may be any that can be broadcast.'''
    model, input = network(), images()
    baselines = {
        'image': torch.rand(3, HEIGHT, WIDTH), 'color': torch.rand(1, 3, 1, 1),
        'batch': torch.rand(2, 3, HEIGHT, WIDTH),
        # zero in two channels
        'channel': torch.tensor([0., 0.5, 0.]).view(1, 3, 1, 1),
    }.get(base, base)
    result = RISE(model).attribute(input, 1, baselines=baselines, n_masks=10, grid_size=3)
    full = torch.as_tensor(baselines, dtype=torch.float64).expand_as(input).numpy()
    for image, elem, attribution in zip(input.numpy(), full, result):
        expected = loop_rise(
            probability_of(model, 1), image, loop_masks(10, (3, 3), (HEIGHT, WIDTH), 0), base=elem
        )
        np.testing.assert_allclose(attribution[0].numpy(), expected, rtol=1e-6)
    assert not torch.allclose(result, RISE(model).attribute(input, 1, n_masks=10, grid_size=3))


def test_rise_additional_arguments():
    '''Further arguments with a row for each example follow their example, others are given as they are.'''
    model, input = network(), images(3)
    factor, shared = torch.tensor([1., 2., -1.]).double(), torch.rand(5).double()
    seen = []

    def forward(x, factor, shared, name):
        seen.append(name)
        return model(x) * factor[:, None] + shared

    settings = {'n_masks': 8, 'grid_size': 3, 'output': 'logit'}
    result = RISE(forward).attribute(input, 1, (factor, shared, 'name'), perturbations_per_eval=3, **settings)
    for i in range(3):
        expected = RISE(lambda x, i=i: model(x) * factor[i] + shared).attribute(input[i:i + 1], 1, **settings)
        torch.testing.assert_close(result[i:i + 1], expected)
    assert set(seen) == {'name'}


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_rise_half_precision(dtype):
    '''Results have the type of inputs, and sums are not done in half precision.'''
    input = torch.rand(2, 3, HEIGHT, WIDTH)
    forward = RISE(lambda x: x.float().mean((1, 2, 3)).to(x.dtype))
    result = forward.attribute(input.to(dtype), n_masks=500, grid_size=3)
    assert result.dtype == dtype
    expected = forward.attribute(input, n_masks=500, grid_size=3)
    torch.testing.assert_close(result.float(), expected, rtol=0.02, atol=0)
    model = randomize(UserNetwork()).eval()
    with torch.autocast('cpu', torch.bfloat16):
        mixed = RISE(model).attribute(input, 1, n_masks=20, grid_size=3)
    torch.testing.assert_close(mixed, RISE(model).attribute(input, 1, n_masks=20, grid_size=3), rtol=0.1, atol=0.01)


def test_rise_side_effects():
    '''Neither the input nor the network changes, no gradients are computed, and the result can be written to.'''
    model, input = network(), images().requires_grad_()
    before, state = input.detach().clone(), {key: value.clone() for key, value in model.state_dict().items()}
    grads = []

    def forward(x):
        grads.append(torch.is_grad_enabled() or x.requires_grad)
        return model(x.mul_(1.))

    result = RISE(forward).attribute(input, 1, n_masks=4, grid_size=3)
    assert not any(grads) and not result.requires_grad and input.grad is None and torch.is_grad_enabled()
    assert torch.equal(input.detach(), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    result[0, 0, 0, 0] = 5
    assert result[0, 1, 0, 0] != 5


def test_rise_memory():
    '''Masked images exist for a single chunk at a time.'''
    alive, largest = [], 0

    def forward(x):
        nonlocal largest
        alive.append(weakref.ref(x))
        largest = max(largest, sum(len(ref()) for ref in alive if ref() is not None))
        return x.mean((1, 2, 3))

    RISE(forward).attribute(torch.rand(2, 1, 16, 16), n_masks=60, perturbations_per_eval=5)
    assert len(alive) == 12 and largest <= 20


def test_rise_progress(capsys):
    '''The progress bar counts masks.'''
    rise = RISE(lambda x: x.mean((1, 2, 3)))
    rise.attribute(torch.rand(1, 1, 8, 8), n_masks=33)
    assert capsys.readouterr().err == ''
    rise.attribute(torch.rand(1, 1, 8, 8), n_masks=33, show_progress=True)
    error = capsys.readouterr().err
    assert 'RISE attribution' in error and '33/33' in error


def test_rise_noise_tunnel():
    '''RISE is an attribution of Captum: it runs in a noise tunnel, and in Captum's metrics.'''
    model, input = network(), images()
    rise = RISE(model)
    assert not rise.has_convergence_delta()
    kwargs = {'n_masks': 12, 'grid_size': 3}
    result = NoiseTunnel(rise).attribute(input, nt_samples=3, stdevs=0., target=[1, 2], **kwargs)
    torch.testing.assert_close(result, rise.attribute(input, [1, 2], **kwargs))
    noisy = NoiseTunnel(rise).attribute(
        input, nt_samples=3, nt_type='vargrad', stdevs=0.5, target=1, baselines=torch.rand_like(input), **kwargs
    )
    assert noisy.shape == input.shape and bool((noisy > 0).any())
    assert sensitivity_max(rise.attribute, input, n_perturb_samples=2, target=1, **kwargs).shape == (2,)
    value = infidelity(model, lambda x: (0.1 * torch.ones_like(x), x - 0.1), input, result, target=1)
    assert value.shape == (2,) and bool(value.isfinite().all())


@pytest.mark.parametrize('kwargs, error, message', [
    ({'inputs': torch.rand(2, 3)}, ValueError, r'\(2, 3\)'),
    ({'inputs': torch.rand(2, 3, 2, 2, 2, 2)}, ValueError, r'\(2, 3, 2, 2, 2, 2\)'),
    ({'inputs': torch.rand(0, 3, 4, 4)}, ValueError, r'\(0, 3, 4, 4\)'),
    ({'inputs': torch.ones(2, 3, 4, 4, dtype=torch.uint8)}, TypeError, 'uint8'),
    ({'inputs': (torch.rand(2, 3, 4, 4), torch.rand(1, 3, 4, 4))}, ValueError, r'\(2, 3, 4, 4\), \(1, 3, 4, 4\)'),
    ({'target': None}, ValueError, 'choose one with target'),
    ({'target': 48}, ValueError, 'target 48 is out of range for 48 classes'),
    ({'target': [1, 2, 3]}, ValueError, 'each of 2 examples'),
    ({'target': 1.}, TypeError, 'float32'),
    ({'n_masks': 0}, ValueError, 'n_masks=0'),
    ({'n_masks': 2.}, ValueError, r'n_masks=2\.0'),
    ({'probability': 0.}, ValueError, r'probability=0\.0'),
    ({'probability': 1}, ValueError, 'probability=1'),
    ({'grid_size': 0}, ValueError, 'grid_size=0'),
    ({'grid_size': (2, 2, 2)}, ValueError, r'grid_size=\(2, 2, 2\)'),
    ({'grid_size': (2, 2.)}, ValueError, 'grid_size'),
    ({'perturbations_per_eval': 0}, ValueError, 'perturbations_per_eval=0'),
    ({'output': 'prob'}, ValueError, "output='prob'"),
    ({'output': lambda result: result[:1]}, ValueError, 'of 20 images'),
    ({'normalization': 'sum'}, ValueError, "normalization='sum'"),
    ({'baselines': torch.rand(3, 3, 4, 4)}, ValueError, r'\(3, 3, 4, 4\)'),
    ({'baselines': torch.rand(1, 2, 3, 4, 4)}, ValueError, r'\(1, 2, 3, 4, 4\)'),
    ({'baselines': (0, 1)}, ValueError, '2 baselines for 1 inputs'),
    ({'baselines': 'black'}, TypeError, 'str'),
])
def test_rise_errors(kwargs, error, message):
    '''Errors name what is wrong.'''
    kwargs = {'inputs': torch.rand(2, 3, 4, 4), 'target': 1, 'n_masks': 10, **kwargs}
    with pytest.raises(error, match=message):
        RISE(lambda x, *_: x.flatten(1)).attribute(**kwargs)


@pytest.mark.parametrize('forward, error, message', [
    (lambda x: (x, x), TypeError, 'tuple'),
    (lambda x: x.sum(), ValueError, r'shape \(\) for 20 images'),
    (lambda x: x.flatten(1).mean(0, keepdim=True), ValueError, r'shape \(1, 48\) for 20 images'),
    (lambda x: (x * float('nan')).flatten(1), ValueError, r'examples \[0, 1\]'),
    (lambda x: x.flatten(1) / (x.amax((1, 2, 3)) < 0.5)[:, None], ValueError, r'examples \[1\]'),
])
def test_rise_output_errors(forward, error, message):
    '''Outputs that are none of the images' are refused, and those that are not finite.'''
    input = torch.stack([torch.full((3, 4, 4), 0.4), torch.ones(3, 4, 4)])
    with pytest.raises(error, match=message):
        RISE(forward).attribute(input, 1, n_masks=10, output='logit')


def test_rise_training():
    '''Batch norm in training mode would mix masks, and change.'''
    model = network().train()
    with pytest.raises(ValueError, match='training mode'):
        RISE(model).attribute(images(), 1, n_masks=10)
    assert model.training


class TwoInputs(torch.nn.Module):
    '''A network with several ways to use a layer.'''
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.dropout = torch.nn.Dropout(0.5)
        self.linear = torch.nn.Linear(6, 5)
        self.unused = torch.nn.Conv2d(3, 2, 1)
        self.pair = torch.nn.MaxPool2d(2, return_indices=True)

    def forward(self, x, factor=None, name=None):
        '''Logits.'''
        x = self.conv(x)
        self.pair(x)
        x = self.dropout(x.relu().mean((2, 3)))
        x = self.linear(x)
        return x if factor is None else x * factor[:, None]


def loop_score_cam(model, layer, image, target, factor=1.):
    '''Score-CAM of a single image, channel by channel.'''
    found = []
    handle = layer.register_forward_hook(lambda module, args, output: found.append(output[0]))
    with torch.no_grad():
        model(image[None])
        handle.remove()
        logits = []
        for channel in found[0]:
            mask = (channel - channel.min()) / (channel.max() - channel.min() + 1e-8)
            mask = torch.nn.functional.interpolate(mask[None, None], image.shape[1:], mode='bilinear')
            logits.append(factor * model(image[None] * mask[0])[0, target])
        weights = torch.stack(logits).softmax(0)
    return sum(weight * channel for weight, channel in zip(weights, found[0])).relu()


@pytest.fixture
def torchcam():
    '''The optional dependency.'''
    return pytest.importorskip('torchcam.methods', reason='torch-cam is not installed (extra "cam")')


@pytest.mark.usefixtures('torchcam')
@pytest.mark.parametrize('chunk', [1, 4, 32])
def test_score_cam_loop(chunk):
    '''The result is that of a loop over channels, for each example with its target.'''
    model, input, targets = randomize(TwoInputs()).double().eval(), images(3), [0, 4, 2]
    result = ScoreCAM(model, model.conv).attribute(input, targets, perturbations_per_eval=chunk)
    expected = [loop_score_cam(model, model.conv, image, target) for image, target in zip(input, targets)]
    torch.testing.assert_close(result[:, 0], torch.stack(expected))
    assert bool((result > 0).any())
    resized = LayerAttribution.interpolate(result, (HEIGHT, WIDTH), 'bilinear')
    assert resized.shape == (3, 1, HEIGHT, WIDTH)
    # a tuple is taken as by Captum's methods for layers
    assert torch.equal(ScoreCAM(model, model.conv).attribute((input,), targets, perturbations_per_eval=chunk), result)


@pytest.mark.usefixtures('torchcam')
def test_score_cam_functions():
    '''Functions, further arguments, targets with several indices or none.'''
    model, input = randomize(TwoInputs()).double().eval(), images(2)
    factor = torch.tensor([1., -3.]).double()
    result = ScoreCAM(model, model.conv).attribute(input, [1, 3], (factor, 'name'), perturbations_per_eval=4)
    for image, target, elem, attribution in zip(input, [1, 3], factor, result):
        torch.testing.assert_close(attribution[0], loop_score_cam(model, model.conv, image, target, elem))
    plain = ScoreCAM(model, model.conv).attribute(input, 3)
    assert torch.equal(ScoreCAM(lambda x: model(x), model.conv).attribute(input, torch.tensor([3, 3])), plain)
    assert torch.equal(ScoreCAM(lambda x: model(x)[:, 3], model.conv).attribute(input), plain)
    several = ScoreCAM(lambda x: torch.stack([model(x), 2 * model(x)], -1), model.conv)
    assert torch.equal(several.attribute(input, (3, 0)), plain)
    assert torch.equal(several.attribute(input, [(1, 1), (3, 0)])[1], plain[1])


class InPlace(torch.nn.Module):
    '''A network that may normalize its input, and rectify the layer's output, in place.'''
    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace
        self.conv = torch.nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.linear = torch.nn.Linear(6, 5)

    def forward(self, x):
        '''Logits.'''
        x = x.sub_(0.5).mul_(2) if self.inplace else (x - 0.5) * 2
        return self.linear(torch.nn.functional.relu(self.conv(x), self.inplace).mean((2, 3)))


@pytest.mark.usefixtures('torchcam')
def test_score_cam_inplace():
    '''What is changed in place later is neither the map's layer nor the image.'''
    plain, inplace, input = randomize(InPlace(False)).double(), InPlace(True).double(), images(2)
    inplace.load_state_dict(plain.state_dict())
    original = input.clone()
    expected = ScoreCAM(plain, plain.conv).attribute(input, [1, 3], perturbations_per_eval=4)
    result = ScoreCAM(inplace, inplace.conv).attribute(input, [1, 3], perturbations_per_eval=4)
    torch.testing.assert_close(result, expected)
    assert expected.any() and torch.equal(input, original)


@pytest.mark.usefixtures('torchcam')
@pytest.mark.parametrize('fails', [False, True])
def test_score_cam_side_effects(fails):
    '''Modes, hooks, and weights are as before, also after an error.'''
    model, input = randomize(TwoInputs()).double(), images(1)
    model.train()
    model.linear.eval()
    calls = []

    def hook(*_):
        calls.append(model.training or model.dropout.training)
        if fails and len(calls) == 3:
            raise RuntimeError('failure')

    with model.linear.register_forward_hook(hook):
        if fails:
            with pytest.raises(RuntimeError, match='failure'):
                ScoreCAM(model, model.conv).attribute(input, 1, perturbations_per_eval=1)
        else:
            result = ScoreCAM(model, model.conv).attribute(input, 1)
            assert not result.requires_grad
    assert calls and not any(calls)
    modes = {name: module.training for name, module in model.named_modules()}
    assert modes == {name: name != 'linear' for name in modes}
    assert all(
        not module._forward_hooks and not module._forward_pre_hooks for module in model.modules()
    )
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.usefixtures('torchcam')
@pytest.mark.parametrize('layer, kwargs, error, message', [
    ('unused', {}, ValueError, 'Conv2d is not used'),
    ('linear', {}, ValueError, r'Linear has an output of shape \(1, 5\)'),
    ('pair', {}, TypeError, 'MaxPool2d returns tuple'),
    ('conv', {'target': 5}, ValueError, 'out of range for 5 classes'),
    ('conv', {'target': None}, ValueError, 'choose one with target'),
    ('conv', {'target': [1, 2]}, ValueError, 'each of 1 examples'),
    ('conv', {'perturbations_per_eval': 0}, ValueError, 'perturbations_per_eval=0'),
    ('conv', {'inputs': (torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4))}, ValueError, 'There are 2 inputs'),
    ('conv', {'inputs': torch.rand(1, 3)}, ValueError, r'\(1, 3\)'),
    ('conv', {'inputs': torch.full((1, 3, 4, 4), float('nan'))}, ValueError, 'NaN'),
])
def test_score_cam_errors(layer, kwargs, error, message):
    '''Errors name what is wrong, and leave no hook.'''
    model = TwoInputs().eval()
    with pytest.raises(error, match=message):
        ScoreCAM(model, getattr(model, layer)).attribute(**{'inputs': torch.rand(1, 3, 4, 4), 'target': 1, **kwargs})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_score_cam_import(monkeypatch):
    '''Without torch-cam, the message says what to install.'''
    monkeypatch.setitem(sys.modules, 'torchcam.methods', None)
    with pytest.raises(ImportError, match=r'pip install "zennit-resnet\[cam\]"'):
        ScoreCAM(torch.nn.Identity(), torch.nn.Identity())


@pytest.mark.parametrize('wrap, remedy', [
    (lambda output: {'aux': None, 'out': output}, "['out']"), (lambda output: (output, None), '[0]'),
    (lambda output: types.SimpleNamespace(logits=output), '.logits'),
])
def test_several_outputs(wrap, remedy):
    '''The error shows the function to give in place of the network.'''
    rise = RISE(lambda images: wrap(images.flatten(1)))
    with pytest.raises(TypeError) as info:
        rise.attribute(torch.rand(1, 3, 8, 8), target=1, n_masks=4)
    assert f'lambda images: model(images){remedy}' in str(info.value)


@pytest.mark.parametrize('size', [2.5, np.float64(2), (2, 1.5), True, 0, (2,), 'ab'])
def test_grid_size(size):
    '''It is of integers, also those of NumPy.'''
    rise, input = RISE(lambda x: x.mean((1, 2, 3))), torch.rand(1, 1, 6, 6)
    with pytest.raises(ValueError, match='grid_size=.* is neither a positive integer, nor one for each of 2'):
        rise.attribute(input, n_masks=3, grid_size=size)
    expected = rise.attribute(input, n_masks=3, grid_size=2)
    for same in (np.int64(2), (2, np.int64(2)), [2, 2]):
        assert torch.equal(rise.attribute(input, n_masks=3, grid_size=same), expected)
