'''Metrics of class evidence in the evaluator.'''
import math

import numpy as np
import pytest
import torch
from helpers.evaluation import SIZE, assert_same, run
from helpers.networks import narrow_resnet18
from PIL import Image

from captum_adapters import metrics
from captum_adapters.evaluation import Process, read_run
from captum_adapters.evaluation import methods as all_methods
from captum_adapters.evaluation.config import Evaluation, check
from captum_adapters.evaluation.data import Images, read_samples
from captum_adapters.evaluation.grids import CELLS, CONFIDENCE, Grids
from captum_adapters.evaluation.methods import CONTROLS, Method
from zennit_resnet.models import load_classifier

pytestmark = pytest.mark.once

COLORS = {'red': (220, 30, 30), 'green': (30, 220, 30), 'blue': (30, 30, 220), 'white': (240, 240, 240)}
EVIDENCE = ('grid_pointing', 'class_sensitivity', 'randomization', 'contrastive')


@pytest.fixture(scope='module')
def colors(tmp_path_factory):
    '''A data set of four classes, and a network whose last layer was fitted to it.'''
    folder = tmp_path_factory.mktemp('colors')
    generator = np.random.default_rng(0)
    for name, color in COLORS.items():
        (folder / 'images' / name).mkdir(parents=True)
        for number in range(3):
            noise = generator.normal(0, 12, (SIZE, SIZE, 3))
            picture = (np.array(color) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(picture).save(folder / 'images' / name / f'{number}.png')
    torch.manual_seed(0)
    network = narrow_resnet18(num_classes=4).eval()
    torch.save(network.state_dict(), folder / 'net.pt')
    transform = load_classifier('narrow_resnet18', str(folder / 'net.pt'), SIZE).transform
    # folders in sorted order are the classes
    names = sorted(COLORS)
    paths = [folder / 'images' / name / f'{number}.png' for name in names for number in range(3)]
    images = torch.stack([transform(Image.open(path)) for path in paths])
    fc, network.fc = network.fc, torch.nn.Identity()
    with torch.no_grad():
        features = torch.cat([network(images), torch.ones(12, 1)], 1).double()
        # with a clear runner-up
        wanted = (12 * torch.eye(4) + 3 * torch.eye(4).roll(1, 1)).double().repeat_interleave(3, 0)
        found = torch.linalg.pinv(features, rtol=1e-6) @ wanted
        fc.weight.copy_(found[:-1].T)
        fc.bias.copy_(found[-1])
    network.fc = fc
    torch.save(network.state_dict(), folder / 'net.pt')
    return folder


def run_colors(folder, out, **options):
    '''Evaluate class evidence.'''
    options = {'methods': ('resnet_lrp_ratio', 'gradient'), 'metrics': EVIDENCE, **options}
    return run(folder, out, **options)


@pytest.fixture(scope='module')
def evaluated(colors, tmp_path_factory):
    '''A run with controls.'''
    return run_colors(colors, tmp_path_factory.mktemp('evidence') / 'run')


def test_controls(evaluated):
    '''Maps that say nothing have the values of maps that say nothing.'''
    records = evaluated.records
    assert (records['problem'].isna()).all() and records[['grid_pointing', 'contrastive_id']].notna().all(axis=None)
    for name in ('constant', 'gaussian'):
        found = records.xs(name, level='method')
        # a Gaussian in the middle has a quarter in each cell
        assert found['grid_pointing'].tolist() == pytest.approx([0.25] * 12)
        assert found[['class_pearson', 'class_ssim', 'random_ssim']].to_numpy() == pytest.approx(1.)
    assert records['grid_pointing_chance'].eq(0.25).all()
    assert records.xs('constant', level='method')['contrastive_id'].tolist() == pytest.approx([0] * 12, abs=1e-6)
    assert set(records.index.unique('method')) == {'resnet_lrp_ratio', 'gradient', *CONTROLS}
    ours = records.xs('resnet_lrp_ratio', level='method')
    assert ours['class_ssim'].max() < 1 and ours['random_ssim'].max() < 1


def test_by_hand(evaluated, colors):
    '''Scores of a sample are those of the metrics themselves.'''
    classifier = load_classifier('narrow_resnet18', str(colors / 'net.pt'), SIZE)
    images = torch.stack([
        classifier.transform(Image.open(colors / 'images' / name / f'{number}.png'))
        for name in sorted(COLORS) for number in range(3)
    ])
    labels = torch.arange(4).repeat_interleave(3)
    with torch.no_grad():
        output = classifier.model(images)
    assert (output.argmax(1) == labels).all() and output.softmax(1).amax(1).min() > CONFIDENCE
    method = Method('resnet_lrp_ratio')

    def explain(target):
        return method.attribute(classifier, images, target, 'softmax')[1]

    rival = output.scatter(1, labels[:, None], -math.inf).argmax(1)
    similar = metrics.class_sensitivity(explain(labels), explain(rival))
    random = metrics.randomization(classifier.model, lambda model: explain(labels), ['fc'])
    contrast = metrics.contrastive_insertion_deletion(
        classifier.model, images, explain(labels), classifier.bounds()[0], labels, protocol='keio', step=512,
        ties='nearest',
    )
    found = evaluated.records.xs('resnet_lrp_ratio', level='method')
    expected = {
        'class_ssim': similar.ssim, 'class_pearson': similar.pearson, 'random_ssim': random.ssim[:, 0],
        'contrastive_id': contrast.id_score,
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-3, atol=1e-3)


def test_mosaics(colors):
    '''An image is in the cell of its class, three others of other classes are around it, and all places occur.'''
    classifier = load_classifier('narrow_resnet18', str(colors / 'net.pt'), SIZE)
    samples = read_samples(colors / 'images', classifier.classes).samples
    dataset = Images(samples, classifier.transform)
    grids = Grids(samples, dataset, classifier.model, torch.device('cpu'))
    assert grids.problem == '' and len(grids.images) == 12
    images = torch.stack([dataset[row].image for row in range(12)])
    labels = torch.tensor([sample.label for sample in samples])
    names = [sample.name for sample in samples]
    with torch.no_grad():
        output = classifier.model(images)
    mosaics, cells = grids.make(names, images, labels, output)
    assert mosaics.shape == images.shape and cells.shape == (12, CELLS, CELLS)
    places = set()
    for image, mosaic, cell, label in zip(images, mosaics, cells, labels.tolist()):
        assert sorted(cell.flatten().tolist()) == [0, 1, 2, 3]
        row, column = (cell == label).nonzero()[0].tolist()
        part = mosaic[:, row * SIZE // 2:][:, :SIZE // 2, column * SIZE // 2:][:, :, :SIZE // 2]
        assert torch.allclose(part.mean((1, 2)), image.mean((1, 2)), atol=0.1)
        places.add((row, column))
    assert len(places) == 4
    # whatever else is in the batch
    again = grids.make(names[5:6], images[5:6], labels[5:6], output[5:6])
    assert torch.equal(again[0][0], mosaics[5]) and torch.equal(again[1][0], cells[5])
    # wrong, unsure, or of no known class
    wrong = torch.stack([output[0], output[0] / 100, output[0]])
    given = torch.tensor([1, labels[0], -1])
    assert (grids.make(names[:3], images[:3], given, wrong)[1] == -1).all()


def test_resumed(colors, evaluated, tmp_path):
    '''Two processes, one image at a time, find the same mosaics.'''
    for rank in range(2):
        run_colors(colors, tmp_path / 'run', process=Process(rank, 2))
    assert_same(read_run(tmp_path / 'run'), evaluated)


def test_missing(assets, colors, tmp_path):
    '''Too few classes for mosaics leave the score out, or are an error if there is no other.'''
    options = {'methods': ('gradient',), 'controls': False, 'limit': 2}
    result = run(assets, tmp_path / 'run', metrics=('grid_pointing', 'class_sensitivity'), **options)
    assert result.records['grid_pointing'].isna().all() and result.records['class_ssim'].notna().all()
    with pytest.raises(ValueError, match='4 classes'):
        run(assets, tmp_path / 'other', metrics=('grid_pointing',), **options)
    options['metrics'] = ('grid_pointing', 'contrastive')
    result = run_colors(colors, tmp_path / 'ignored', labels='ignore', **options)
    assert result.records['grid_pointing'].isna().all()
    with pytest.raises(ValueError, match='randomization'):
        check(Evaluation('data', 'out', metrics=('randomization',), compile=True))


def test_not_finite(colors, tmp_path, monkeypatch):
    '''Where a further map has NaN, its score is missing, and others are not.'''
    def broken(images, names, std):
        maps = torch.rand(images.shape[0], *images.shape[2:])
        if calls:
            maps[0] = math.nan
        calls.append(None)
        return maps

    calls = []
    monkeypatch.setitem(all_methods.CONTROLS, 'constant', broken)
    options = {'methods': ('constant',), 'controls': False, 'metrics': ('class_sensitivity',), 'limit': 4}
    result = run_colors(colors, tmp_path / 'run', batch_size=4, **options)
    assert result.records['class_ssim'].isna().tolist() == [True, False, False, False]
    assert result.records['problem'].isna().all()
