'''Our metrics beside those of Quantus, pytorch-grad-cam and torch-cam, on the same maps.

For each pair, prints their score, ours, and ours by their protocol, as means over maps, and fails if the last is not
theirs. Maps are of the embedded ResNet-50 for the photographs in examples/assets, at 192 x 192 pixels, and small arrays
whose scores are worked out by hand. Rows of a peer that is not installed are left out.

    pip install "quantus==0.6.0" "grad-cam==1.5.7" "torchcam==0.5.0" "numpy<2" "pandas<3" "opencv-python<5"
    python benchmarks/protocols.py
'''
import argparse
import contextlib
import copy
import importlib.util
import math
import warnings
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from zennit.attribution import Gradient

from captum_adapters import metrics
from zennit_resnet import ResNetLRP, initial_relevance
from zennit_resnet.image import read_image
from zennit_resnet.models import load_classifier
from zennit_resnet.postprocess import sum_channels

PHOTOS = Path(__file__).parents[1] / 'examples' / 'assets' / 'photos'
SIDE, POINTS, CHUNK = 192, 36, 16
STEP = SIDE**2 // POINTS
# without their changes of maps before the metric
QUIET = {'normalise': False, 'disable_warnings': True}
# the mean of four pixels as the first output, and an image whose deletion curve is 2.5, 1.5, 0.75, 0.25, 0
MEAN = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2, bias=False)).eval()
MEAN[1].weight.data = torch.tensor([[.25] * 4, [0.] * 4])
SMALL = torch.tensor([4., 3., 2., 1.]).view(1, 1, 2, 2)


class Case(NamedTuple):
    '''The network, images and their classes, relevance with channels and without, mosaics and their relevance.'''
    model: torch.nn.Module
    images: torch.Tensor
    target: torch.Tensor
    relevance: torch.Tensor
    maps: torch.Tensor
    mosaic: metrics.Mosaics
    mosaic_maps: torch.Tensor


class Stored:
    '''What torch-cam takes for an extractor: a map that is there already.'''
    def __init__(self, model, map):
        self.model, self.map, self._hooks_off = model, map[None], contextlib.nullcontext

    def __call__(self, *args, **kwargs):
        '''The maps of all layers.'''
        return [self.map]

    def fuse_cams(self, cams):
        '''The map of them together.'''
        return cams[0]


def explain(model, images, target):
    '''Relevance by the ratio rule.'''
    with Gradient(model=model, composite=ResNetLRP()) as attributor:
        return attributor(images.clone(), initial_relevance(target, 'one'))[1].detach()


def load(number):
    '''The shipped network, and as many of the photographs and mosaics.'''
    model, _, transform = load_classifier(size=SIDE)[:3]
    images = torch.stack([transform(read_image(path)) for path in sorted(PHOTOS.glob('*.jpg'))])
    with torch.no_grad():
        target = torch.cat([model(part).argmax(1) for part in images.split(CHUNK)])
    mosaic = metrics.mosaics(images, target, focus=True, count=number, rescale=True)
    relevance = explain(model, images[:number], target[:number])
    mosaic_maps = sum_channels(explain(model, mosaic.images, mosaic.targets[:, 0]))
    return Case(model, images[:number], target[:number], relevance, sum_channels(relevance), mosaic, mosaic_maps)


def add(metric, peer, theirs, ours, converted, why, by_hand=None):
    '''Print a row. Converted scores must be theirs, and theirs and ours what is worked out by hand.'''
    theirs, ours, converted = (torch.as_tensor(values).double().flatten() for values in (theirs, ours, converted))
    error = float((theirs - converted).abs().max())
    assert error <= 2e-6 * max(1, float(theirs.abs().max())), f'{metric}: {theirs.tolist()}, {converted.tolist()}'
    for found, hand in zip((theirs, ours), by_hand or ()):
        hand = torch.tensor(hand).double().flatten()
        assert torch.allclose(found, hand, rtol=0, atol=1e-6, equal_nan=True), f'{metric}: {found}, by hand {hand}'
    rows = [values.tolist() if by_hand else [float(values.mean())] for values in (theirs, ours, converted)]
    shown = ' | '.join(', '.join(f'{value:.6f}' for value in values) for values in rows)
    name = f'{metric} (by hand)' if by_hand else metric
    print(f'| {name} | {peer} | {len(theirs)} | {shown} | {error:.0e} | {why} |', flush=True)


def score(metric, model, images, target, maps, masks=None, **options):
    '''Scores by a metric of Quantus, of maps and masks without channels, or maps with all channels.'''
    maps = maps if maps.ndim == 4 else maps[:, None]
    arrays = [np.asarray(values) for values in (images, target, maps)]
    masks = None if masks is None else masks[:, None].numpy()
    return np.array(metric(model, *arrays, masks, channel_first=True, device='cpu', batch_size=len(images), **options))


def flipping(case):
    '''Deletion beside Quantus' PixelFlipping, of pixels and of their channels.'''
    import quantus
    flip = partial(quantus.PixelFlipping, perturb_baseline=0., return_auc_per_sample=True, **QUIET)
    peer = 'Quantus PixelFlipping'
    ours = metrics.insertion_deletion(case.model, case.images, case.maps, 0, case.target, step=STEP)
    why = 'leaves out the whole image; the area is not divided by the number of intervals'
    theirs = score(flip(3 * STEP), *case[:3], case.maps)
    add('deletion', peer, theirs, ours.deletion, torch.trapezoid(ours.deletion_curve[:, 1:]), why)

    # channels of pixels are the samples of a signal
    channels = metrics.insertion_deletion(
        lambda signals: case.model(signals.view(-1, 3, SIDE, SIDE)), case.images.flatten(1)[:, None],
        case.relevance.flatten(1), 0, case.target, step=3 * STEP,
    )
    theirs, area = score(flip(3 * STEP), *case[:3], case.relevance), torch.trapezoid(channels.deletion_curve[:, 1:])
    why = 'as above; given three channels, it ranks channels of pixels, not pixels'
    add('deletion, maps with channels', peer, theirs, ours.deletion, area, why)

    ours = metrics.insertion_deletion(MEAN, SMALL, SMALL, 0, 0, n_steps=4, output='identity')
    theirs, area = score(flip(1), MEAN, SMALL, [0], SMALL, softmax=False), torch.trapezoid(ours.deletion_curve[:, 1:])
    add('deletion', peer, theirs, ours.deletion, area, 'as the first', by_hand=(1.75, .9375))


def regions(case):
    '''The area between the curves of least and of most relevant first, beside Quantus' RegionPerturbation.'''
    import quantus
    size = SIDE // math.isqrt(POINTS)
    most, least = (
        score(quantus.RegionPerturbation(size, order, POINTS, perturb_baseline=0., **QUIET), *case[:3], case.maps)
        for order in ('morf', 'lerf')
    )
    pooled = F.avg_pool2d(case.maps[:, None], size).repeat_interleave(size, 2).repeat_interleave(size, 3)
    ours, first, last = (
        metrics.insertion_deletion(case.model, case.images, maps, 0, case.target, n_steps=POINTS)
        for maps in (case.maps, pooled, -pooled)
    )
    converted = (last.deletion_curve - first.deletion_curve)[:, 1:].mean(1)
    why = f'ranks squares of {size} x {size} pixels; mean over points without the whole image'
    add('ABPC', 'Quantus RegionPerturbation', (most - least).mean(1), ours.id_score, converted, why)


def percentiles(case):
    '''The same beside pytorch-grad-cam, with the mean colour instead of its imputation.'''
    from pytorch_grad_cam.metrics import perturbation_confidence as peer
    points = 8
    shares = [100 * part / points for part in range(1, points)]
    questions = [lambda output, label=label: output.softmax(0)[label] for label in case.target.tolist()]
    # ranks from 0 to 1, as theirs subtracts maps from one, after which close values are equal in single precision
    order = case.maps.flatten(1).argsort(stable=True).argsort().view_as(case.maps)
    unit = order / float(SIDE**2 - 1)
    cut = (unit - .6).clamp(min=0) / .4
    for name, maps in (('', unit), (', 60 % zero', cut)):
        most, least = (
            peer.AveragerAcrossThresholds(
                lambda percentile, order=order: peer.PerturbationConfidenceMetric(order(percentile, torch.mul)), shares
            )(case.images, maps.numpy(), questions, case.model)
            for order in (peer.RemoveMostRelevantFirst, peer.RemoveLeastRelevantFirst)
        )
        ours = metrics.insertion_deletion(case.model, case.images, maps, 0, case.target, n_steps=points)
        first, last = (
            metrics.insertion_deletion(case.model, case.images, values, 0, case.target, n_steps=points, ties='group')
            for values in (maps, 1 - maps)
        )
        converted = (last.deletion_curve - first.deletion_curve)[:, 1:-1].mean(1) / 2
        why = 'half of the difference; mean without both ends; ties of the percentile are removed'
        add(f'ABPC{name}', 'grad-cam, as ROADCombined', (least - most) / 2, ours.id_score, converted, why)


def curves(case):
    '''Insertion and deletion beside torch-cam.'''
    from torchcam.methods import GradCAM
    from torchcam.metrics import DeletionInsertionMetric

    def measure(model, images, target, maps, function, steps):
        '''Areas of insertion and of deletion.'''
        found = []
        for image, label, map in zip(images, target, maps):
            metric = DeletionInsertionMetric(Stored(model, map), function, steps=steps)
            metric.update(image[None], int(label))
            found.append([metric.summary()[f'{curve}_auc'] for curve in ('insertion', 'deletion')])
        return torch.tensor(found).T

    with GradCAM(case.model, 'layer4') as cam:
        own = [cam(label, case.model(image[None]))[0] for image, label in zip(case.images, case.target.tolist())]
    own = F.interpolate(torch.stack(own), (SIDE, SIDE), mode='bilinear')[:, 0].detach()
    for name, maps in (('', case.maps), (', its Grad-CAM', own)):
        curve = partial(metrics.insertion_deletion, case.model, case.images, maps, 0, case.target, step=STEP)
        ours, stable = curve(), curve(ties='stable')
        why = f'tied pixels ({float(ours.tied_share.mean()):.1%}) enter row by row'
        found = measure(*case[:3], maps, partial(torch.softmax, dim=1), POINTS)
        for theirs, key in zip(found, ('insertion', 'deletion')):
            add(f'{key}{name}', 'torch-cam', theirs, getattr(ours, key), getattr(stable, key), why)

    flat = torch.ones(1, 2, 2)
    theirs = measure(MEAN, SMALL, [0], flat, None, 4)
    curve = partial(metrics.insertion_deletion, MEAN, SMALL, flat, 0, 0, n_steps=4, output='identity')
    ours, stable = curve().id_score, curve(ties='stable').id_score
    add('ID of a constant map', 'torch-cam', theirs[0] - theirs[1], ours, stable, 'as above', by_hand=(.625, 0.))


def pointing(case):
    '''Pointing beside Quantus, with the own cells of mosaics as masks.'''
    import quantus
    masks = (case.mosaic.cells == case.mosaic.targets[..., None]).repeat_interleave(SIDE // 2, 1)
    masks = masks.repeat_interleave(SIDE // 2, 2)
    for name, count, metric in (
        ('the highest pixel', 1, quantus.PointingGame(**QUIET)),
        ('the top 1000', 1000, quantus.TopKIntersection(1000, **QUIET)),
        ('as many as in the mask', SIDE**2 // 2, quantus.RelevanceRankAccuracy(**QUIET)),
    ):
        theirs = score(metric, case.model, case.mosaic.images, case.mosaic.targets[:, 0], case.mosaic_maps, masks)
        ours = metrics.mask_pointing(case.mosaic_maps, masks, Fraction(100 * count, SIDE**2), absolute=False).share
        add(f'pointing, {name}', f'Quantus {type(metric).__name__}', theirs, ours, ours, 'equal')

    ties, masks = torch.tensor([[[5., 5.], [1., 0.]]] * 2), torch.tensor([[[0, 1], [0, 1]], [[0, 0], [0, 0]]])
    theirs = score(quantus.PointingGame(**QUIET), MEAN, ties[:, None], [0, 0], ties, masks)
    ours = metrics.mask_pointing(ties, masks, 25, absolute=False).share
    why = 'a hit if one of the tied pixels is; NaN for an empty mask is stored as a boolean, so it is a hit'
    hand = [1., 1.], [.5, math.nan]
    add('pointing, a tie, no mask', 'Quantus PointingGame', theirs, ours, ours.nan_to_num(1) > 0, why, by_hand=hand)


def focus(case):
    '''Focus beside Quantus.'''
    import quantus
    metric, (_, cells, target, _) = quantus.Focus(**QUIET), case.mosaic
    ours = metrics.grid_pointing(case.mosaic_maps, cells, target[:, 0]).share
    own = (cells == target[..., None]).flatten(1).int().tolist()
    theirs = score(metric, case.model, case.mosaic.images, target[:, 0], case.mosaic_maps, custom_batch=own)
    add('Focus', 'Quantus Focus', theirs, ours, ours, 'equal, but for 1e-9 in the divisor')

    # 3 x 3 pixels, and a map without positive relevance
    maps = torch.stack([torch.arange(1., 10.).view(3, 3), -torch.ones(3, 3)])
    theirs = score(metric, MEAN, maps[:, None], [0, 0], maps, custom_batch=[(1, 0, 1, 0)] * 2)
    ours, halves = (metrics.grid_pointing(maps, torch.tensor([[row]] * 2), 0) for row in ([0, 1], [0, 1, 1]))
    converted = halves.share.masked_fill(halves.empty, 0)
    why, hand = 'the middle column is of the right; an empty map has 0, not chance', ([12 / 45, 0], [19.5 / 45, .5])
    add('Focus, odd sides, an empty map', 'Quantus Focus', theirs, ours.share, converted, why, by_hand=hand)


def cascade(case):
    '''Randomization beside Quantus' MPRT, for two photographs.'''
    import quantus
    images, target = F.interpolate(case.images[:2], SIDE // 2, mode='area'), case.target[:2]

    def attribute(model):
        '''Maps of a network.'''
        return sum_channels(explain(model, images, target))

    original, network = attribute(case.model), copy.deepcopy(case.model)
    modules = [name for name, module in network.named_modules() if hasattr(module, 'reset_parameters')][::-1]
    theirs = score(
        quantus.MPRT(return_average_correlation=True, **QUIET), case.model, images, target, original,
        explain_func=lambda model, **_: attribute(model)[:, None].numpy(),
    )
    ours = metrics.randomization(case.model, attribute, modules).spearman.mean(1)
    found = [metrics.class_sensitivity(original, original).spearman]
    for name in modules:
        torch.manual_seed(43)
        network.get_submodule(name).reset_parameters()
        found.append(metrics.class_sensitivity(original, attribute(network)).spearman)
    why = 'initial parameters, the same seed for each layer; the mean includes the original network'
    add(f'randomization, {len(modules)} layers', 'Quantus MPRT', theirs, ours, torch.stack(found, 1).mean(1), why)


CHECKS = {
    'quantus==0.6.0': ('quantus', (flipping, regions, pointing, focus, cascade)),
    'grad-cam==1.5.7': ('pytorch_grad_cam', (percentiles,)),
    'torchcam==0.5.0': ('torchcam', (curves,)),
}


def main():
    '''Print the table.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=2, help='number of photographs, and of mosaics  [default: 2]')
    parser.add_argument('--check', help='only the check of this name')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    case = load(args.images)
    print('| metric | peer | maps | theirs | ours | ours by their protocol | largest difference | why |')
    print('|---|---|---|---|---|---|---|---|')
    for package, (name, checks) in CHECKS.items():
        if importlib.util.find_spec(name) is None:
            print(f'{name} is not installed, and its rows are left out: pip install "{package}"')
            continue
        for check in (check for check in checks if args.check in (None, check.__name__)):
            check(case)


if __name__ == '__main__':
    main()
