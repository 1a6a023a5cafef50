'''Accuracy on the most relevant pixels, against golden cases and loops over examples.'''
import math
from decimal import Decimal
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_cases import golden_cases, tensor

from captum_adapters.metrics import (
    PERCENTS,
    NegativeMapWarning,
    cross_model_accuracy,
    keep_top,
    pixel_accuracy,
    top_fraction,
)
from captum_adapters.metrics._ranking import percent_tensors, ranks_of, sort_scores, top_counts

pytestmark = pytest.mark.once


@pytest.fixture
def network():
    '''A network whose prediction changes as pixels are removed.'''
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(512, 5, bias=False),
    )
    torch.nn.init.normal_(model[3].weight)
    return model.double().eval()


@pytest.fixture
def batch():
    '''Images, attributions with ties and both signs, and labels.'''
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    return images, torch.randn_like(images).mul(2).round(), torch.randint(5, (6,))


def keep_reference(image, attribution, percent, unit, absolute, baseline):
    '''Keep the top p % of one image, as a loop over its ranking.'''
    scores = attribution.sum(0) if unit == 'pixel' else attribution
    scores = scores.abs() if absolute else scores
    values = scores.reshape(-1).tolist()
    order = sorted(range(len(values)), key=lambda index: -values[index])
    result = baseline.clone()
    for index in order[:int(Decimal(str(percent)) * len(values) // 100)]:
        if unit == 'pixel':
            row, column = divmod(index, image.shape[2])
            result[:, row, column] = image[:, row, column]
        else:
            result.view(-1)[index] = image.reshape(-1)[index]
    return result


@pytest.mark.parametrize('arrays, settings, case', golden_cases('metric_top_percent', 'top_percent_count'))
def test_golden_count(arrays, settings, case):
    '''Number of pixels of a percentage.'''
    arguments = case['arguments']
    if arguments['rounding'] != 'floor':
        pytest.skip('numbers of pixels are always rounded down')
    assert top_counts([arguments['percent']], arguments['n']) == (int(arrays[case['expected']['count']]),)


@pytest.mark.parametrize('arrays, settings, case', golden_cases('metric_top_percent', 'top_percent_mask'))
def test_golden_mask(arrays, settings, case):
    '''Pixels of a percentage.'''
    arguments = case['arguments']
    if arguments['ties'] != 'rank':
        pytest.skip('exactly the given number of pixels is selected, in spite of ties')
    scores = tensor(arrays, case['inputs']['scores'])
    mask = top_fraction(scores.abs() if arguments['absolute'] else scores, arguments['percent'])
    assert mask.dtype == torch.bool
    assert torch.equal(mask, tensor(arrays, case['expected']['mask'], torch.bool))


@pytest.mark.parametrize('arrays, settings, case', golden_cases('metric_top_percent', 'keep_top_percent'))
def test_golden_accuracy(arrays, settings, case):
    '''Images with the top p %, and the accuracy of a model on them.'''
    arguments = case['arguments']
    weight, bias = (torch.from_numpy(arrays[f'model.{name}']) for name in ('weight', 'bias'))
    images, maps, labels = (
        torch.from_numpy(arrays[case['inputs'][name]]) for name in ('images', 'contributions', 'labels')
    )
    fill = torch.tensor(arguments['fill'], dtype=torch.float64)
    options = {
        'unit': arguments['unit'], 'absolute': arguments['absolute'],
        'baselines': fill.view(1, 3, 1, 1) if fill.ndim else float(fill),
        # as in the cases
        'ties': 'stable',
    }
    kept = keep_top(images, maps, arguments['percent'], **options)
    assert torch.equal(kept, torch.from_numpy(arrays[case['expected']['images']]))

    def model(images):
        return torch.softmax(images.flatten(1) @ weight.t() + bias, 1)

    result = pixel_accuracy(model, images, maps, [arguments['percent']], labels, **options)
    accuracy = float(arrays[case['expected']['accuracy']])
    assert float(result.correct.double().mean()) == pytest.approx(accuracy, abs=1e-12)


def test_counts_exact():
    '''Decimal fractions are not rounded to the next lower number of pixels.'''
    assert top_counts([1], 224 * 224) == (501,)
    # all of these are one less in floating point numbers
    assert int(32.3 * 1000 / 100) == 322 and int(0.7 / 100 * 1000) == 6
    assert top_counts([32.3, 0.7, np.float32(0.7)], 1000) == (323, 7, 7)
    assert top_counts(torch.tensor([0.7, 32.3]), 1000) == (7, 323)
    assert top_counts(np.array([0.7, 32.3]), 1000) == (7, 323)
    assert top_counts([Fraction(100 * 5, 7), Fraction(100, 7)], 7) == (5, 1)
    assert top_counts(range(101), 100) == tuple(range(101))


@pytest.mark.parametrize('percents', [
    50, 50., Fraction(50), Decimal(50), np.float32(50), np.int64(50), np.array(50), torch.tensor(50), [50], (50.,),
    {50}, np.array([50], 'f2'), torch.tensor([50], dtype=torch.bfloat16), torch.tensor([50.], requires_grad=True),
    (number for number in [50]),
])
def test_single_percent(percents):
    '''A number is a single percentage.'''
    counts, values = percent_tensors(percents, 1000, torch.device('cpu'))
    assert counts.tolist() == [500] and values.tolist() == [50]


@pytest.mark.parametrize('percents, error, message', [
    ([], ValueError, 'empty'),
    ([5, 101], ValueError, '101'),
    ([-0.5], ValueError, '-0.5'),
    ([float('nan')], TypeError, 'nan'),
    ([float('inf')], TypeError, 'inf'),
    ([None], TypeError, 'None'),
    ([True], TypeError, 'True'),
    (True, TypeError, 'True'),
    (None, TypeError, 'None'),
    ('50', TypeError, "'50'"),
    (['50'], TypeError, "'50'"),
    (['1/3'], TypeError, "'1/3'"),
    (200, ValueError, '200'),
    (np.array(-3), ValueError, '-3'),
    (float('nan'), TypeError, 'nan'),
    ([1j], TypeError, '1j'),
    ([[1, 2]], TypeError, r'\[1, 2\]'),
    (torch.ones(1, 2), TypeError, '1'),
])
def test_counts_errors(percents, error, message):
    '''Percentages that are none.'''
    with pytest.raises(error, match=message):
        top_counts(percents, 100)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16, torch.long])
def test_ties_row_major(dtype):
    '''Exactly k are selected, and the first in row-major order among equals.'''
    scores = torch.randint(-2, 3, (4, 40, 50)).to(dtype)
    for percent in (0, 1, 33.3, 50, 100):
        mask = top_fraction(scores, percent)
        for example, selected in zip(scores, mask):
            order = np.argsort(-example.double().numpy().reshape(-1), kind='stable')
            count = int(Decimal(str(percent)) * 2000 // 100)
            expected = np.zeros(2000, dtype=bool)
            expected[order[:count]] = True
            assert np.array_equal(selected.numpy().reshape(-1), expected)
    zeros = torch.tensor([[-0., 0., -0., 1., 0., -1.]])
    assert sort_scores(zeros)[1].tolist() == [[3, 0, 1, 2, 4, 5]]
    assert ranks_of(sort_scores(zeros)[1]).tolist() == [[1, 2, 3, 0, 4, 5]]


def test_top_fraction_errors():
    '''Scores that cannot be ranked.'''
    with pytest.raises(ValueError, match=r'\(5,\) have no batch'):
        top_fraction(torch.rand(5), 10)
    with pytest.raises(ValueError, match='NaN'):
        top_fraction(torch.tensor([[1., float('nan')]]), 50)


@pytest.mark.parametrize('unit', ['pixel', 'input'])
@pytest.mark.parametrize('absolute', [True, False])
@pytest.mark.parametrize('reference', ['label', 'prediction'])
def test_reference(network, batch, unit, absolute, reference):
    '''Against loops over examples, percentages and pixels.'''
    images, maps, labels = batch
    percents = (50, 0, 0.5, 1, 10, 100, 33.4, 90)
    baseline = torch.randn(1, 3, 1, 1, dtype=torch.float64)
    target = labels if reference == 'label' else None
    options = {'unit': unit, 'absolute': absolute, 'baselines': baseline, 'ties': 'stable'}
    result = pixel_accuracy(network, images, maps, percents, target, reference=reference, **options)
    predictions = []
    for image, attribution in zip(images, maps):
        kept = [
            keep_reference(image, attribution, percent, unit, absolute, baseline[0].expand_as(image).contiguous())
            for percent in percents
        ]
        predictions.append(network(torch.stack(kept)).argmax(1))
    predictions = torch.stack(predictions)
    compared = labels if reference == 'label' else network(images).argmax(1)
    assert torch.equal(result.predictions, predictions)
    assert torch.equal(result.reference, compared)
    assert torch.equal(result.correct, predictions == compared[:, None])
    assert torch.equal(result.accuracy, result.correct.double())
    assert 0 < result.correct.double().mean() < 1 and len(predictions.unique()) == 5
    size = {'pixel': 64, 'input': 192}[unit]
    assert result.counts.tolist() == [int(Decimal(str(percent)) * size // 100) for percent in percents]
    assert result.percents.tolist() == list(percents)
    for percent, position in ((10, 4), (0, 1), (100, 5)):
        kept = keep_top(images, maps, percent, **options)
        assert torch.equal(network(kept).argmax(1), result.predictions[:, position])


def test_labels(network, batch):
    '''Labels may be tuples of one index, as in Captum.'''
    images, maps, labels = batch
    for function in (pixel_accuracy, cross_model_accuracy):
        expected = function(network, images, maps, target=labels)
        for target in (labels[:, None], [(int(label),) for label in labels]):
            result = function(network, images, maps, target=target)
            assert all(torch.equal(*pair) for pair in zip(result, expected))
        result = function(network, images, maps, target=(3,))
        assert torch.equal(result.correct, function(network, images, maps, target=3).correct)


def test_interpolated(network, batch):
    '''Maps of another size, and the percentages by default.'''
    images, maps, labels = batch
    expected = pixel_accuracy(network, images, maps, target=labels)
    assert expected.percents.tolist() == list(PERCENTS)
    coarse = torch.randn(6, 4, 4)
    result = pixel_accuracy(network, images, coarse, target=labels, interpolate='nearest')
    fine = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(result.predictions, pixel_accuracy(network, images, fine, target=labels).predictions)
    with pytest.raises(ValueError, match='4 x 4 .*8 x 8.*interpolate'):
        pixel_accuracy(network, images, coarse, target=labels)


def test_chunks(network, batch):
    '''The size of chunks has no influence, equal images are evaluated once, and no more at a time than allowed.'''
    images, maps, labels = batch
    maps = torch.randn_like(maps)
    sizes = []

    def forward(images):
        sizes.append(len(images))
        return network(images)

    # 0.1 % and 1 % are no pixel, 50 % and 50.5 % the same number, and 100 % is the whole image
    percents = (1, 0.1, 50, 50.5, 100, 25)
    expected = pixel_accuracy(forward, images, maps, percents, reference='prediction')
    assert sum(sizes) == 4 * 6
    assert expected.correct[:, 4].all()
    assert torch.equal(expected.predictions[:, 0], expected.predictions[:, 1])
    for size in (1, 5, 6, 1000):
        sizes.clear()
        result = pixel_accuracy(
            forward, images, maps, percents, reference='prediction', max_examples_per_batch=size
        )
        assert all(torch.equal(*pair) for pair in zip(result, expected))
        assert sum(sizes) == 4 * 6
        assert max(sizes) <= size
    sizes.clear()
    pixel_accuracy(forward, images, maps, percents[:4], reference='prediction')
    assert sum(sizes) == 3 * 6
    sizes.clear()
    pixel_accuracy(forward, images, maps, percents[:4], labels)
    assert sum(sizes) == 2 * 6


def test_additional_arguments(network, batch):
    '''Arguments with a row per example follow their example; others are passed on.'''
    images, maps, labels = batch
    shift = torch.randn(6, 5, dtype=torch.float64) * 20

    def forward(images, shift, scale, table):
        assert scale == 2 and len(table) == 3
        return network(images) * scale + shift

    arguments = shift, 2, torch.ones(3)
    result = pixel_accuracy(forward, images, maps, (10, 60), labels, arguments, max_examples_per_batch=5)
    for position, percent in enumerate((10, 60)):
        predictions = (network(keep_top(images, maps, percent)) * 2 + shift).argmax(1)
        assert torch.equal(result.predictions[:, position], predictions)


@pytest.mark.parametrize('baselines', [0.5, torch.tensor(0.5), torch.randn(1, 3, 1, 1), torch.randn(1, 3, 8, 8),
                                       torch.randn(6, 3, 8, 8), torch.randn(6, 1, 1, 1)])
def test_baselines(network, batch, baselines):
    '''Numbers, colors, images, and one of these per example.'''
    images, maps, labels = batch
    full = torch.as_tensor(baselines, dtype=torch.float64).expand(6, 3, 8, 8)
    maps = torch.randn_like(maps)
    kept = keep_top(images, maps, 40, baselines=baselines)
    mask = top_fraction(maps.sum(1).abs(), 40)[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(kept[mask], images[mask])
    assert torch.equal(kept[~mask], full[~mask])
    result = pixel_accuracy(network, images, maps, (40,), labels, baselines=baselines, max_examples_per_batch=4)
    assert torch.equal(result.predictions[:, 0], network(kept).argmax(1))


def halves(images):
    '''Outputs of two classes: the sums of the upper and of the lower half.'''
    height = images.shape[2] // 2
    return torch.stack([images[:, :, :height].sum((1, 2, 3)), images[:, :, height:].sum((1, 2, 3))], 1)


@pytest.mark.parametrize('unit', ['pixel', 'input'])
@pytest.mark.parametrize('absolute', [True, False])
def test_ties_expected(network, unit, absolute):
    '''The mean over many random orders is that over all orders of ties.'''
    images = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3)).double()
    levels = torch.tensor([[2., 1., 1., -1.], [0., 0., 0., 0.], [1., 2., 3., 4.], [1., 1., -2., -2.]])
    for values in levels:
        maps = values.view(1, 1, 2, 2).expand(1, 3, 2, 2).clone()
        size = 4 if unit == 'pixel' else 12
        scores = maps.sum(1).reshape(-1) if unit == 'pixel' else maps.reshape(-1)
        scores = (scores.abs() if absolute else scores).tolist()
        percents = [Fraction(100 * count, size) for count in range(size + 1)]
        options = {'unit': unit, 'absolute': absolute, 'reference': 'prediction'}
        result = pixel_accuracy(model, images, maps, percents, n_orders=2000, **options)
        reference = model(images).argmax(1)
        for count in range(size + 1):
            threshold = sorted(scores)[-count] if count else math.inf
            above = [index for index in range(size) if scores[index] > threshold]
            tied = [index for index in range(size) if scores[index] == threshold]
            hits = []
            for chosen in combinations(tied, count - len(above)):
                keep = torch.zeros(size, dtype=torch.bool)
                keep[[*above, *chosen]] = True
                kept = images * (keep.view(1, 1, 2, 2) if unit == 'pixel' else keep.view(1, 3, 2, 2))
                hits.append(float(model(kept).argmax(1) == reference))
            expected, found = sum(hits) / len(hits), float(result.accuracy[0, count])
            # antithetic pairs of orders vary at most as much as single ones twice
            assert abs(found - expected) <= 5 * math.sqrt(expected * (1 - expected) / 1000)
        shared = sum(scores.count(value) > 1 for value in scores) / size
        assert float(result.tied_share) == shared


def test_ties_halves():
    '''Of a constant map, an order and its reverse keep complements, but the first pixels if row by row.'''
    images, maps = torch.ones(40, 1, 8, 8) + torch.rand(40, 1, 8, 8) / 1000, torch.zeros(40, 8, 8)
    assert pixel_accuracy(halves, images, maps, (10, 30, 45), target=0, ties='stable').accuracy.mean() > 0.9
    flat = pixel_accuracy(halves, images, maps, 50, target=0)
    assert 0.4 < flat.accuracy.mean() < 0.6 and (flat.accuracy == 0.5).double().mean() > 0.4


def test_ties_orders(network, batch):
    '''Orders depend on the image, or its identity, and the seed only; only maps whose ties are divided need images.'''
    images, maps, labels = batch
    maps = maps.sum(1)
    maps[2] = torch.randn(8, 8)
    maps[3] = torch.arange(64).view(8, 8) // 32
    sizes = []

    def forward(images):
        sizes.append(len(images))
        return network(images)

    # of the fourth map, nothing but the first percentage divides ties
    percents = (10, 50, 100)
    result = pixel_accuracy(forward, images, maps, percents, labels)
    divided = torch.zeros(6, 3, dtype=torch.bool)
    for index, example in enumerate(maps.abs().flatten(1)):
        ordered = example.sort(descending=True).values
        divided[index, :2] = torch.tensor([ordered[count] == ordered[count - 1] for count in (6, 32)])
    assert divided[3].tolist() == [True, False, False] and not divided[2].any() and divided[:, 1].any()
    assert sum(sizes) == 6 * 3 + 3 * int(divided.sum())
    assert torch.equal(result.accuracy[~divided], result.correct[~divided].double())
    for size in (1, 5, 1000):
        again = pixel_accuracy(network, images, maps, percents, labels, max_examples_per_batch=size)
        assert all(torch.equal(*pair) for pair in zip(again, result))
    for index in range(6):
        rows = slice(index, index + 1)
        single = pixel_accuracy(network, images[rows], maps[rows], percents, labels[rows])
        assert torch.equal(single.accuracy, result.accuracy[rows])
        assert torch.equal(single.predictions, result.predictions[rows])
    for position, percent in enumerate(percents):
        kept = keep_top(images, maps, percent)
        assert torch.equal(network(kept).argmax(1), result.predictions[:, position])
    others = [pixel_accuracy(network, images, maps, (25,), labels, n_orders=9, seed=seed) for seed in range(8)]
    assert len({other.accuracy.sum().item() for other in others}) > 1
    same = images[:1].expand(6, -1, -1, -1), torch.ones(6, 8, 8), (25,), labels
    ids = [
        pixel_accuracy(network, *same, sample_ids=names)
        for names in (range(6), torch.arange(6), np.arange(6), list('abcdef'))
    ]
    assert len(ids[0].predictions.unique()) > 1
    assert torch.equal(ids[0].predictions, ids[1].predictions) and torch.equal(ids[0].predictions, ids[2].predictions)


def test_arrays(network, batch):
    '''Arrays, single maps, and tensors of other types.'''
    images, maps, labels = batch
    expected = pixel_accuracy(network, images, maps, (20, 50), labels)
    for other in (maps.numpy(), maps.numpy()[..., ::-1].copy()[..., ::-1], maps.numpy().astype('>f8'),
                  maps.sum(1, keepdim=True),
                  maps.sum(1).bfloat16().requires_grad_(), maps.sum(1).numpy().astype('f2'), (maps.numpy(),)):
        result = pixel_accuracy(network, images, other, [20, 50], labels.numpy(), baselines=np.zeros((1, 3, 1, 1)))
        assert all(torch.equal(*pair) for pair in zip(result, expected))
    single = pixel_accuracy(network, images[:1].numpy(), maps[0].sum(0).numpy(), 20, int(labels[0]))
    assert torch.equal(single.predictions, expected.predictions[:1, :1])
    cross = cross_model_accuracy(network, images[:1], maps[0].sum(0), 20, int(labels[0]))
    assert torch.equal(cross.predictions, single.predictions)
    kept = keep_top(images[:1], maps[0].sum(0).numpy(), 20)
    assert torch.equal(kept, keep_top(images, maps, 20)[:1])
    assert torch.equal(top_fraction(maps.numpy(), 20), top_fraction(maps, 20))
    with pytest.raises(ValueError, match=r'\(8, 8\)'):
        pixel_accuracy(network, images, maps[0].sum(0), 20, labels)


def test_signed():
    '''Negative relevance comes last unless magnitudes are ranked, after the sum over channels.'''
    images = torch.ones(1, 2, 1, 3)
    maps = torch.tensor([[[[5., -3., 1.]], [[-5., -3., 1.]]]])
    assert keep_top(images, maps, 34)[0, 0, 0].tolist() == [0, 1, 0]
    assert keep_top(images, maps, 34, absolute=False)[0, 0, 0].tolist() == [0, 0, 1]
    assert keep_top(images, maps, 67, absolute=False)[0, 0, 0].tolist() == [1, 0, 1]
    # the first and the fourth of six values, whose magnitudes are equal
    assert keep_top(images, maps, 34, unit='input')[0, :, 0].tolist() == [[1, 0, 0], [1, 0, 0]]
    assert keep_top(images, maps, 34, unit='input', absolute=False)[0, :, 0].tolist() == [[1, 0, 1], [0, 0, 0]]
    with pytest.warns(NegativeMapWarning) as records:
        keep_top(images, maps - 9, 34, absolute=False)
    assert records[0].filename == __file__


def test_formats(network):
    '''Half precision, autocast, and the memory format of the images.'''
    images = torch.randn(3, 3, 8, 8).to(memory_format=torch.channels_last)
    maps = torch.randn(3, 8, 8)
    model = network.float()
    seen = []

    def forward(images):
        seen.append(images.dtype)
        assert images.is_contiguous(memory_format=torch.channels_last)
        return model(images)

    expected = pixel_accuracy(forward, images, maps, reference='prediction')
    assert not expected.correct.requires_grad
    with torch.autocast('cpu', torch.bfloat16):
        result = pixel_accuracy(forward, images, maps, reference='prediction')
    assert (result.predictions == expected.predictions).double().mean() > 0.9
    assert torch.equal(result.counts, expected.counts)
    model.bfloat16()
    seen.clear()
    result = pixel_accuracy(forward, images.bfloat16(), maps.bfloat16(), reference='prediction')
    assert set(seen) == {torch.bfloat16}
    assert (result.predictions == expected.predictions).double().mean() > 0.9


def test_model_unchanged(network, batch):
    '''The model and the inputs are as before, also after errors.'''
    images, maps, labels = batch
    images.requires_grad_()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    copy = images.detach().clone(), maps.clone()
    result = pixel_accuracy(network, images, maps.requires_grad_(), target=labels)
    with pytest.raises(ValueError, match='out of range'):
        pixel_accuracy(network, images, maps, target=5)
    assert not result.predictions.requires_grad
    assert torch.equal(images, copy[0]) and torch.equal(maps, copy[1])
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks or module.training for module in network.modules())
    network.append(torch.nn.Dropout())
    with pytest.raises(ValueError, match='training mode'):
        pixel_accuracy(network.train(), images, maps, target=labels)


@pytest.mark.parametrize('changes, message', [
    ({'maps': torch.zeros(6, 2, 8, 8)}, r'\(6, 2, 8, 8\)'),
    ({'maps': torch.full((6, 8, 8), float('nan'))}, 'NaN'),
    ({'maps': torch.zeros(5, 8, 8)}, r'\(5, 8, 8\)'),
    ({'images': torch.zeros(0, 3, 8, 8), 'maps': torch.zeros(0, 8, 8)}, 'empty'),
    ({'images': torch.zeros(3, 8, 8)}, r'\(3, 8, 8\)'),
    ({'unit': 'channel'}, "'channel'"),
    ({'unit': 'input', 'maps': torch.zeros(6, 8, 8)}, r"unit='input'.*\(6, 8, 8\)"),
    ({'unit': 'input', 'maps': torch.zeros(6, 3, 4, 4)}, '4 x 4'),
    ({'reference': 'model'}, "'model'"),
    ({'reference': 'prediction'}, "reference='prediction' is without target"),
    ({'target': None}, "reference='label' is not without target"),
    ({'target': 5}, '5 is out of range'),
    ({'target': -1}, 'negative'),
    ({'target': [0, 1]}, '6 examples'),
    ({'percents': [101]}, '101'),
    ({'baselines': torch.zeros(8)}, r'\(8,\)'),
    ({'baselines': torch.zeros(2, 3, 8, 8)}, r'\(2, 3, 8, 8\)'),
    ({'max_examples_per_batch': 0}, '0'),
    ({'ties': 'nearest'}, "'nearest'.*'random', 'stable'"),
    ({'n_orders': 0}, 'n_orders=0'),
    ({'sample_ids': [1, 2]}, '2 sample_ids for 6'),
    ({'interpolate': 'cubic'}, "'cubic'.*'bicubic'"),
    ({'model': lambda images: images.flatten(1) * float('nan')}, r'NaN .*\[0, 1, 2, 3, 4, 5\]'),
    ({'model': lambda images: images.sum((1, 2, 3))}, r'\(6,\)'),
    ({'model': lambda images: images.sum((2, 3))[:, :1]}, r'\(6, 1\)'),
    ({'model': lambda images: images.flatten(2)}, r'\(6, 3, 64\)'),
    ({'model': lambda images: images.flatten(1)[:2]}, '6 images'),
])
def test_errors(network, batch, changes, message):
    '''Arguments that do not fit are named.'''
    images, maps, labels = batch
    maps = torch.randn_like(maps)
    arguments = {'model': network, 'images': images, 'maps': maps, 'percents': [50], 'target': labels, **changes}
    positional = [arguments.pop(key) for key in ('model', 'images', 'maps', 'percents', 'target')]
    with pytest.raises(ValueError, match=message):
        pixel_accuracy(*positional, **arguments)


def test_cross_model(network, batch):
    '''Without options, it is the accuracy of the other network; with a transform, that of both together.'''
    images, maps, labels = batch
    other = torch.nn.Sequential(torch.nn.AvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(48, 5)).double().eval()
    for options in ({'target': labels}, {'reference': 'prediction'}, {'target': labels, 'unit': 'input'}):
        result = cross_model_accuracy(other, images, maps, **options)
        expected = pixel_accuracy(other, images, maps, **options)
        assert all(torch.equal(*pair) for pair in zip(result, expected))

    def transform(images):
        assert images.shape[1:] == (3, 8, 8)
        return F.interpolate(images * 2 + 1, (4, 4), mode='bilinear')

    small = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)).double().eval()
    for options in ({'target': labels}, {'reference': 'prediction'}):
        result = cross_model_accuracy(small, images, maps, transform=transform, max_examples_per_batch=4, **options)
        expected = pixel_accuracy(lambda images: small(transform(images)), images, maps, **options)
        assert all(torch.equal(*pair) for pair in zip(result, expected))


@pytest.mark.parametrize('unit', ['pixel', 'input'])
def test_cross_model_selection(network, batch, unit):
    '''Pixels that are selected at another resolution.'''
    images, _, labels = batch
    coarse = torch.randn(6, 3, 4, 4)
    fine = torch.randn(6, 3, 24, 24)
    percents = (5, 25, 60, 100)
    options = {'unit': unit, 'resize_selection': True}
    result = cross_model_accuracy(network, images, coarse, percents, labels, **options)
    size = 16 if unit == 'pixel' else 48
    assert result.counts.tolist() == [int(percent * size // 100) for percent in percents]
    for position, percent in enumerate(percents):
        kept = keep_top(torch.ones(6, 3, 4, 4, dtype=torch.float64), coarse, percent, unit=unit)
        kept = kept.repeat_interleave(2, 2).repeat_interleave(2, 3) * images
        assert torch.equal(result.predictions[:, position], network(kept).argmax(1))
    result = cross_model_accuracy(network, images, fine, percents, labels, **options)
    for position, percent in enumerate(percents):
        # the center of each pixel is in the middle one of 3 x 3
        kept = keep_top(torch.ones(6, 3, 24, 24, dtype=torch.float64), fine, percent, unit=unit)
        kept = kept[..., 1::3, 1::3] * images
        assert torch.equal(result.predictions[:, position], network(kept).argmax(1))
    same = torch.randn(6, 3, 8, 8)
    result = cross_model_accuracy(network, images, same, percents, labels, **options)
    expected = pixel_accuracy(network, images, same, percents, labels, unit=unit)
    assert all(torch.equal(*pair) for pair in zip(result, expected))
    with pytest.raises(ValueError, match='4 x 4 .*8 x 8.*resize_selection'):
        cross_model_accuracy(network, images, coarse, percents, labels)
    with pytest.raises(ValueError, match=r'\(5, 3, 4, 4\)'):
        cross_model_accuracy(network, images, coarse[:5], percents, labels, **options)
