'''Metrics of signals and volumes: each is that of images with the same pixels.'''
import pytest
import torch

from captum_adapters.attr import C3LRP, RISE, ResNetLRP
from captum_adapters.metrics import (
    class_sensitivity,
    conservation_gap,
    contrastive_insertion_deletion,
    cross_model_accuracy,
    insertion_deletion,
    keep_top,
    mask_distance,
    mask_pointing,
    mosaics,
    pixel_accuracy,
    randomization,
)

pytestmark = pytest.mark.once

SIZES = {1: (20,), 3: (3, 4, 5)}
FLAT = {1: (1, 20), 3: (12, 5)}


def make(dims):
    '''Inputs, maps and a network, and the same as images.'''
    generator = torch.Generator().manual_seed(dims)
    inputs = torch.rand(4, 2, *SIZES[dims], generator=generator)
    maps = torch.rand(4, 2, *SIZES[dims], generator=generator).mul(6).round()
    weight = torch.randn(3, inputs[0].numel(), generator=generator)

    def network(inputs):
        return 3 * inputs.flatten(1) @ weight.T

    return network, inputs, maps, inputs.view(4, 2, *FLAT[dims]), maps.view(4, 2, *FLAT[dims])


def check_equal(result, expected):
    '''All fields are the same, but for their shape.'''
    for name, first, second in zip(result._fields, result, expected):
        torch.testing.assert_close(first.flatten(), second.flatten(), equal_nan=True, msg=name)


@pytest.mark.parametrize('dims', [1, 3])
def test_curves(dims):
    '''Insertion, deletion and accuracy, where maps may come without channels, and a single one without a batch.'''
    network, inputs, maps, images, flat = make(dims)
    for options in ({}, {'ties': 'random', 'seed': 3}, {'protocol': 'c3'}, {'protocol': 'keio', 'step': 4}):
        expected = insertion_deletion(network, images, flat, target=1, **options)
        check_equal(insertion_deletion(network, inputs, maps, target=1, **options), expected)
        check_equal(insertion_deletion(network, inputs, maps.sum(1), target=1, **options), expected)
    single = insertion_deletion(network, inputs[:1], maps[0].sum(0), target=1)
    check_equal(single, insertion_deletion(network, images[:1], flat[:1], target=1))
    mean = inputs.flatten(2).mean((0, 2))
    options = {'target': 1, 'protocol': 'rise', 'step': 5}
    check_equal(
        insertion_deletion(network, inputs, maps, insertion_baselines=mean.view(2, *[1] * dims), **options),
        insertion_deletion(network, images, flat, insertion_baselines=mean.view(2, 1, 1), **options),
    )
    check_equal(
        contrastive_insertion_deletion(network, inputs, maps, target=1),
        contrastive_insertion_deletion(network, images, flat, target=1),
    )
    for unit in ('pixel', 'input'):
        check_equal(
            pixel_accuracy(network, inputs, maps, target=1, unit=unit),
            pixel_accuracy(network, images, flat, target=1, unit=unit),
        )
        kept = keep_top(inputs, maps, 40, unit=unit)
        assert kept.shape == inputs.shape and torch.equal(kept.view_as(images), keep_top(images, flat, 40, unit=unit))
    half = maps[(..., *[slice(None, None, 2)] * dims)]
    result = cross_model_accuracy(network, inputs, half, target=1, resize_selection=True, percents=(50, 100))
    assert result.counts.tolist() == [half[0, 0].numel() // 2, half[0, 0].numel()]
    whole = pixel_accuracy(network, inputs, maps, target=1, percents=100)
    assert torch.equal(result.correct[:, -1:], whole.correct)


@pytest.mark.parametrize('dims', [1, 3])
def test_masks(dims):
    '''Pointing is that of images, and distances are Euclidean in as many dimensions.'''
    _, inputs, maps, _, flat = make(dims)
    masks = inputs[:, 0] > .7
    check_equal(
        mask_pointing(maps, masks, dims=dims), mask_pointing(flat, masks.view(4, *FLAT[dims]))
    )
    check_equal(mask_pointing(maps[0].sum(0), masks[0], dims=dims), mask_pointing(maps[:1], masks[:1], dims=dims))
    result = mask_distance(maps, masks, (30, 100), normalization=None, dims=dims)
    places = torch.stack(torch.meshgrid(*map(torch.arange, SIZES[dims]), indexing='ij'), -1).view(-1, dims).double()
    for mask, chance, whole in zip(masks, result.chance, result.distance[:, 1]):
        nearest = torch.cdist(places, places[mask.flatten()]).amin(1)
        torch.testing.assert_close(chance, nearest.mean())
        torch.testing.assert_close(whole, nearest.mean())
    diagonal = sum((length - 1) ** 2 for length in SIZES[dims]) ** .5
    scaled = mask_distance(maps, masks, (30, 100), dims=dims).distance
    torch.testing.assert_close(scaled, result.distance / diagonal)
    fine = torch.nn.functional.interpolate(maps.sum(1, keepdim=True), scale_factor=2)[:, 0]
    assert mask_pointing(fine, masks, dims=dims, interpolate='nearest-exact').share.shape == (4, 15)


@pytest.mark.parametrize('dims', [1, 3])
def test_similarity(dims):
    '''Correlations are those of images; the structural similarity has windows of as many dimensions.'''
    _, inputs, maps, images, flat = make(dims)
    result, expected = class_sensitivity(maps, inputs, dims=dims), class_sensitivity(flat, images)
    for name in ('pearson', 'spearman', 'cosine'):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name))
    torch.testing.assert_close(class_sensitivity(maps, maps, dims=dims).ssim, torch.ones(4).double())
    if dims == 1:
        torch.testing.assert_close(result.ssim, expected.ssim)
    else:
        # a map that is constant along the depth has the similarity of its slices
        first, second = (each[:, :, :1].expand(-1, -1, 8, -1, -1) for each in (maps, inputs))
        torch.testing.assert_close(
            class_sensitivity(first, second, dims=3).ssim, class_sensitivity(first[:, :, 0], second[:, :, 0]).ssim
        )
    model = torch.nn.Linear(5, 5)
    explained = randomization(model, lambda model: model(inputs.flatten(2)[..., :5])[:, :, :5], dims=1)
    assert explained.pearson.shape == (4, 1)
    torch.testing.assert_close(conservation_gap(maps, maps.flatten(1).sum(1) / 2), torch.ones(4).double())


@pytest.mark.parametrize('dims', [1, 3])
def test_attributions(dims):
    '''Classes explain signals and volumes, and post-processing of images is refused.'''
    conv, pool = getattr(torch.nn, f'Conv{dims}d'), getattr(torch.nn, f'AdaptiveAvgPool{dims}d')
    model = torch.nn.Sequential(
        conv(2, 4, 3, padding=1), torch.nn.ReLU(), pool(1), torch.nn.Flatten(), torch.nn.Linear(4, 3)
    )
    inputs = make(dims)[1]
    attributions, delta = ResNetLRP(model).attribute(inputs, target=1, return_convergence_delta=True)
    assert attributions.shape == inputs.shape and delta.abs().max() < 1e-6
    assert RISE(model).attribute(inputs, target=1, n_masks=10, grid_size=2).shape == inputs.shape
    assert C3LRP(model, postprocess=None).attribute(inputs, target=1).shape == inputs.shape
    for name in ('c3', 'c1c'):
        with pytest.raises(ValueError, match=str(inputs.shape[-1])):
            ResNetLRP(model, postprocess=name).attribute(inputs, target=1)


SIGNALS, MAPS = torch.rand(2, 3, 9), torch.rand(2, 3, 9)


@pytest.mark.parametrize('function, message', [
    (lambda model: insertion_deletion(model, SIGNALS, MAPS[:, :, :8], target=0), r'8 pixels.*of 9.*\'linear\''),
    (lambda model: insertion_deletion(model, SIGNALS, MAPS[:, :, :8], target=0, interpolate='bilinear'), 'bilinear'),
    (lambda model: insertion_deletion(model, SIGNALS, MAPS[..., None], target=0), r'\(2, 3, 9, 1\)'),
    (lambda model: insertion_deletion(model, SIGNALS, MAPS, target=0, protocol='rise', step=3), r'\(2, 3, 9\)'),
    (lambda model: insertion_deletion(model, torch.rand(2, 9), MAPS, target=0), r'\(2, 9\)'),
    (lambda model: keep_top(torch.rand(2, 9), MAPS, 50), r'\(2, 9\)'),
    (lambda model: mask_pointing(MAPS, torch.ones(2, 9)), r'\(2, 9\).*dims=1'),
    (lambda model: mask_pointing(MAPS, torch.ones(2, 9), dims=0), 'dims=0'),
    (lambda model: class_sensitivity(torch.rand(2, 3, 4, 5, 6), MAPS), r'\(2, 3, 4, 5, 6\)'),
    (lambda model: mosaics(SIGNALS, [0, 1]), r'\(2, 3, 9\)'),
])
def test_errors(function, message):
    '''Errors name the shape.'''
    with pytest.raises(ValueError, match=message):
        function(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(27, 2)))
