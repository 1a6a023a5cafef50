'''Similarity of maps, randomized networks and contrastive curves, against loops and other implementations.'''
import warnings

import numpy as np
import pytest
import torch
from helpers.networks import UserNetwork, randomize
from helpers.state import Snapshot
from scipy import stats
from torch import nn

from captum_adapters.attr import ResNetLRP
from captum_adapters.metrics import (
    ProbabilityWarning,
    class_sensitivity,
    contrastive_insertion_deletion,
    insertion_deletion,
    randomization,
)
from captum_adapters.metrics.sensitivity import _to_unit

pytestmark = pytest.mark.once


def network():
    '''A residual network of double precision.'''
    return randomize(UserNetwork()).double().eval()


def images(batch=3, height=8, width=9):
    '''Random images of double precision.'''
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


def pairs():
    '''Maps with and without ties, signs, and channels, beside others that depend on them.'''
    first = torch.randn(5, 3, 11, 13)
    second = torch.randn(5, 3, 11, 13) + first
    first[1], second[1] = first[1].round(), second[1].round()
    first[2], second[3] = first[2].abs() * 1e-20, second[3] * 1e20
    first[4], second[4] = first[4].clamp(min=2), second[4].clamp(min=2)
    return first, second


def loop_ssim(first, second):
    '''Mean over windows of the formula of Wang et al. 2004, given arrays.'''
    values = []
    for row in range(first.shape[0] - 6):
        for column in range(first.shape[1] - 6):
            x, y = (array[row:row + 7, column:column + 7].reshape(-1) for array in (first, second))
            (xx, xy), (_, yy) = np.cov(x, y, bias=True)
            luminance = (2 * x.mean() * y.mean() + 1e-4) / (x.mean() ** 2 + y.mean() ** 2 + 1e-4)
            values.append(luminance * (2 * xy + 9e-4) / (xx + yy + 9e-4))
    return np.mean(values)


def loop_unit(array):
    '''Clip an array at the nearest ranks of its percentiles.'''
    low, high = np.percentile(array, [1, 99], method='nearest')
    return np.clip((array - low) / (high - low), 0, 1)


def test_reference():
    '''Against scipy, the formula of the cosine, and loops over windows.'''
    first, second = pairs()
    result = class_sensitivity(first, second)
    assert all(values.shape == (5,) and values.dtype == torch.float64 for values in result)
    for index in range(5):
        x, y = (maps[index].sum(0).double().numpy() for maps in (first, second))
        flat = x.reshape(-1), y.reshape(-1)
        expected = [
            stats.pearsonr(*flat).statistic, stats.spearmanr(*flat).statistic,
            flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1]),
        ]
        assert [float(values[index]) for values in result[:3]] == pytest.approx(expected, abs=1e-5)
        assert float(result.ssim[index]) == pytest.approx(loop_ssim(loop_unit(x), loop_unit(y)), abs=1e-6)


def test_laws():
    '''Equal maps have 1, similarity is symmetric, and factors, offsets and monotone functions matter where they do.'''
    first, second = pairs()
    for values in class_sensitivity(first, first.clone()):
        torch.testing.assert_close(values, torch.ones(5).double())
    both = class_sensitivity(first, second), class_sensitivity(second, first)
    for one, other in zip(*both):
        torch.testing.assert_close(one, other)
    scaled = class_sensitivity(first * 4, second)
    for one, other in zip(scaled, both[0]):
        torch.testing.assert_close(one, other)
    negative = class_sensitivity(-first, second)
    for one, other in zip(negative[:3], both[0]):
        torch.testing.assert_close(one, -other)
    maps = torch.rand(2, 9, 9).double()
    shifted = class_sensitivity(maps, maps + 3)
    for values in (shifted.pearson, shifted.spearman, shifted.ssim):
        torch.testing.assert_close(values, torch.ones(2).double())
    assert (shifted.cosine < 0.99).all()
    assert (class_sensitivity(maps, maps.exp()).spearman > 1 - 1e-12).all()
    # of unrelated ones, it is about zero
    unrelated = class_sensitivity(torch.randn(1, 200, 200), torch.randn(1, 200, 200))
    assert all(abs(float(values)) < 0.05 for values in unrelated)


@pytest.mark.parametrize('first, second, expected', [
    (0.1, 'varies', (0, 0, None)), ('varies', 3., (0, 0, None)), (0., 'varies', (0, 0, 0)), (0., 0., (1, 1, 1)),
    (0.1, 0.3, (1, 1, 1)), (0., 2., (1, 1, 0)), (-1., 2., (1, 1, -1)), (1e-300, 1e-300, (1, 1, 1)),
])
def test_constant(first, second, expected):
    '''A constant map is like another constant one, and has nothing in common with one that varies.'''
    varying = torch.rand(2, 8, 8).double()
    maps = [varying if value == 'varies' else torch.full_like(varying, value) for value in (first, second)]
    result = class_sensitivity(*maps)
    for values, value in zip(result, expected):
        assert value is None or values.tolist() == [pytest.approx(value)] * 2
    assert result.ssim.isfinite().all() and (first == 'varies' or second == 'varies' or (result.ssim > 0.999).all())


def test_sparse():
    '''Where percentiles leave nothing of a map, it is scaled by its ends.'''
    maps = torch.zeros(1, 20, 20)
    maps[0, 3, 4], maps[0, 5, 6] = 2, -2
    assert _to_unit(maps).unique().tolist() == [0, 0.5, 1]
    assert class_sensitivity(maps, maps).ssim.item() == 1
    assert class_sensitivity(maps, maps.flip(1)).ssim.item() < 0.99
    small = class_sensitivity(torch.rand(1, 2, 3), torch.rand(1, 2, 3))
    assert -1 <= small.ssim.item() <= 1


@pytest.mark.parametrize('maps, others, error, message', [
    (torch.rand(2, 4, 4), torch.rand(2, 4, 5), ValueError, 'other_attributions.*4 x 5.*4 x 4'),
    (torch.rand(2, 4, 4), torch.rand(1, 4, 4), ValueError, 'other_attributions are 1 '),
    (torch.rand(4), torch.rand(4), ValueError, r'attributions.*\(4,\)'),
    (torch.rand(2, 4, 4), torch.full((2, 4, 4), float('inf')), ValueError, r'\[0, 1\]'),
    (torch.rand(2, 4, 4), 'maps', TypeError, 'other_attributions.*str'),
])
def test_bad_maps(maps, others, error, message):
    '''Errors name the argument and its value.'''
    with pytest.raises(error, match=message):
        class_sensitivity(maps, others)


def chain():
    '''A network whose parameters can be told apart.'''
    return nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4)), nn.ReLU(), nn.Linear(4, 3))


@pytest.mark.parametrize('layers, expected', [
    (None, [['3'], ['3', '1.1'], ['3', '1.1', '1.0'], ['3', '1.1', '1.0', '0']]),
    (['3', '1'], [['3'], ['3', '1.0', '1.1']]), (('0',), [['0']]), ('1', [['1.0', '1.1']]),
    (['3', '3'], None), ([''], [['0', '1.0', '1.1', '3']]),
])
def test_cascade(layers, expected):
    '''At each depth, the parameters of these modules are random, all others what they were, and at the end all are.'''
    model = chain().eval()
    nn.init.normal_(model[1][0].weight)
    nn.init.normal_(model[1][0].bias)
    snapshot = Snapshot(model)
    modified = []

    def explain(seen):
        assert seen is model
        modified.append([
            name for name, module in model.named_modules() if any(
                not torch.equal(parameter, snapshot.values[f'{name}.{key}'])
                for key, parameter in module.named_parameters(recurse=False)
            )
        ])
        return model(torch.eye(6)).detach()[None]

    if expected is None:
        expected = [['3']]
    result = randomization(model, explain, layers)
    assert modified == [[], *(sorted(names) for names in expected)]
    assert len(result.layers) == len(expected)
    assert all(values.shape == (1, len(expected)) for values in result[1:])
    snapshot.check()


def test_moments():
    '''Random parameters have the mean and deviation of those they replace, and are the same for the same seed.'''
    model = nn.Linear(300, 200).eval()
    nn.init.normal_(model.weight, 3, 0.5)
    nn.init.constant_(model.bias, 7.)
    seen, state = [], torch.get_rng_state()
    for seed in (0, 0, 1):
        randomization(model, lambda model: seen.append(model.weight.detach().clone()) or torch.rand(1, 4, 4), seed=seed)
    original, first = seen[:2]
    assert abs(first.mean() - 3) < 0.01 and abs(first.std() - 0.5) < 0.01
    assert abs(np.corrcoef(original.flatten(), first.flatten())[0, 1]) < 0.02
    assert torch.equal(seen[3], first) and not torch.equal(seen[5], first)
    assert model.bias.unique().tolist() == [7]
    torch.set_rng_state(state)


def test_complex():
    '''Real and imaginary parts of complex parameters become random, each with its own mean and deviation.'''
    model, seen = nn.Linear(300, 200, bias=False, dtype=torch.complex64), []
    with torch.no_grad():
        model.weight.copy_(torch.complex(2 + torch.randn(200, 300), 5 + 0.1 * torch.randn(200, 300)))
    snapshot = Snapshot(model)
    randomization(model, lambda model: seen.append(model.weight.detach().clone()) or torch.rand(1, 4, 4))
    assert not torch.isclose(*seen).any()
    assert abs(seen[1].mean() - 2 - 5j) < 0.02 and abs(seen[1].imag.std() - 0.1) < 0.01
    snapshot.check()


def test_reference_depths():
    '''Similarities are those to the map of the original network.'''
    model, inputs = network(), images()
    maps = []

    def explain(model):
        maps.append(model(inputs).softmax(1)[:, :1, None, None] * inputs + inputs ** 2)
        return maps[-1]

    result = randomization(model, explain, [list(dict(model.named_children()))[-1]])
    expected = class_sensitivity(maps[0].detach(), maps[1].detach())
    for name, values in expected._asdict().items():
        assert torch.equal(getattr(result, name)[:, 0], values)


def test_relevance():
    '''Maps of relevance change with the network, those of the image do not, and nothing is left of it.'''
    model, inputs = network(), images()
    snapshot = Snapshot(model)
    result = randomization(
        model, lambda model: ResNetLRP(model, initial_relevance='one').attribute(inputs, target=1), show_progress=True,
    )
    snapshot.check()
    assert result.pearson[:, -1].max() < 0.99
    control = randomization(model, lambda model: inputs)
    assert control.layers == result.layers
    torch.testing.assert_close(control.pearson, torch.ones_like(control.pearson))


class Stop(Exception):
    '''An error of the user.'''


@pytest.mark.parametrize('call', [0, 1, 3])
@pytest.mark.parametrize('error', [Stop, KeyboardInterrupt, 'shape', 'nan'])
def test_restored(call, error):
    '''After an error at any depth, all is what it was, buffers that were modified included.'''
    model, calls = chain().eval(), []
    model.register_buffer('counter', torch.zeros(3))
    # not even a zero loses its sign, nor NaN its bits
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([0., -0., float('inf'), 1e-45, -1., float('nan')]))
        model[0].bias[2:] = torch.tensor([1e-45, -1e30, 2., 3.])
    snapshot = Snapshot(model)
    bits = [parameter.detach().clone().view(torch.int32) for parameter in model.parameters()]

    def explain(model):
        calls.append(1)
        model.counter += 1
        if len(calls) <= call:
            return torch.rand(2, 5, 5)
        if isinstance(error, type):
            raise error('from the user')
        return torch.rand(2, 5, 6) if error == 'shape' and call else torch.full((2, 5, 5), float('nan'))

    with pytest.raises(error if isinstance(error, type) else ValueError):
        randomization(model, explain)
    assert len(calls) == call + 1
    snapshot.check()
    assert all(torch.equal(parameter.view(torch.int32), bit) for parameter, bit in zip(model.parameters(), bits))


@pytest.mark.parametrize('model, layers, error, message', [
    (lambda x: x, None, TypeError, 'lambda'), (nn.ReLU(), None, ValueError, 'any'), (chain(), [], ValueError, 'any'),
    (chain(), ['3', 'fc'], ValueError, "'fc'"), (chain(), ['2'], ValueError, "'2'"),
    (chain(), ['1.2'], ValueError, r"'1\.2'.*'1\.[01]'"),
])
def test_bad_layers(model, layers, error, message):
    '''Errors name the layer, and similar ones.'''
    with pytest.raises(error, match=message):
        randomization(model, lambda model: torch.rand(1, 4, 4), layers)


def maps_of(inputs, levels=None):
    '''Maps with as many levels as given.'''
    return torch.rand(inputs[:, 0].shape).double() if levels is None else torch.randint(levels, inputs[:, 0].shape)


@pytest.mark.parametrize('output', ['softmax', 'identity', torch.sigmoid])
@pytest.mark.parametrize('arguments', [
    {}, dict(rival=[0, 2, 0]), dict(n_steps=7, ties='random', baselines=0.3), dict(protocol='rise', step=9),
])
def test_difference(output, arguments):
    '''Curves are those of the target minus those of its rival, each measured on its own.'''
    model, inputs = network(), images()
    target = torch.tensor([1, 0, 2])
    maps = maps_of(inputs, 20)
    result = contrastive_insertion_deletion(
        model, inputs, maps, target=target, output=output, max_examples_per_batch=5, **arguments,
    )
    options = {key: value for key, value in arguments.items() if key != 'rival'}
    rival = arguments.get('rival')
    if rival is None:
        orders = model(inputs).argsort(1, descending=True).tolist()
        rival = [next(other for other in order if other != own) for order, own in zip(orders, target)]
    first, second = (
        insertion_deletion(model, inputs, maps, target=index, output=output, **options)
        for index in (target, torch.tensor(rival))
    )
    for name in ('insertion', 'deletion', 'id_score', 'insertion_curve', 'deletion_curve', 'score_full', 'score_blank'):
        torch.testing.assert_close(getattr(result, name), getattr(first, name) - getattr(second, name))
    for name in ('fractions', 'selected', 'tied_share', 'distinct_levels'):
        assert torch.equal(getattr(result, name), getattr(first, name))
    assert torch.equal(result.insertion_classes, (result.insertion_curve < 0).long())


def test_contrast_laws():
    '''Exchanged classes have the negative score, as the negative map has, and a constant map has none.'''
    model, inputs = network(), images()
    maps = maps_of(inputs)

    def score(maps, target, rival):
        return contrastive_insertion_deletion(model, inputs, maps, target=target, rival=rival, n_steps=10).id_score

    torch.testing.assert_close(score(maps, 0, 2), -score(maps, 2, 0))
    torch.testing.assert_close(score(maps, 0, 2), -score(1 - maps, 0, 2))
    assert score(torch.ones_like(maps), 0, 2).abs().max() < 1e-12
    random = torch.stack([score(maps_of(inputs), 0, 1) for _ in range(60)])
    assert random.mean(0).abs().max() < 4 * random.std(0).max() / 60 ** 0.5


def test_contrast_arguments():
    '''Further arguments go with their examples, also those that change the runner-up.'''
    inputs = images(3)
    weights = torch.randn(3, 4, 3).double()

    def model(images, weights, factor):
        return factor * torch.einsum('bchw,bkc->bk', images, weights)

    target = [0, 1, 2]
    maps = maps_of(inputs)
    result = contrastive_insertion_deletion(
        model, inputs, maps, target=target, additional_forward_args=(weights, 0.1), max_examples_per_batch=2,
    )
    for index in range(3):
        single = contrastive_insertion_deletion(
            lambda x: model(x, weights[index].expand(len(x), -1, -1), 0.1), inputs[index:index + 1],
            maps[index:index + 1], target=target[index],
        )
        torch.testing.assert_close(result.insertion_curve[index], single.insertion_curve[0])


def test_contrast_warning():
    '''Probabilities get no second softmax without a warning.'''
    inputs = images(2)
    model = nn.Sequential(network(), nn.Softmax(1)).eval()
    with pytest.warns(ProbabilityWarning):
        contrastive_insertion_deletion(model, inputs, maps_of(inputs), target=0, n_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        contrastive_insertion_deletion(model, inputs, maps_of(inputs), target=0, n_steps=3, output='identity')


@pytest.mark.parametrize('arguments, error, message', [
    (dict(target=None), ValueError, 'target=None'), (dict(target=99), ValueError, 'target 99'),
    (dict(target=(0, 1)), ValueError, r'\(0, 1\)'), (dict(rival=[0, 1, 0]), ValueError, r'target 0 .*\[0, 2\]'),
    (dict(rival=99), ValueError, 'target 99'), (dict(output='probability'), ValueError, 'probability'),
    (dict(forward_func=lambda x: x.mean((1, 2, 3))), ValueError, r'\(3,\)'),
    (dict(forward_func=lambda x: x), ValueError, r'\(3, 3, 8, 9\)'),
    (dict(forward_func=network().train()), ValueError, 'training'), (dict(steps=3), TypeError, 'steps'),
    (dict(max_examples_per_batch=0), ValueError, 'max_examples_per_batch=0'),
])
def test_contrast_bad(arguments, error, message):
    '''Errors name the argument and its value.'''
    known = {'forward_func': network(), 'inputs': images(), 'attributions': torch.rand(3, 8, 9), 'target': 0}
    with pytest.raises(error, match=message):
        contrastive_insertion_deletion(**{**known, **arguments})
