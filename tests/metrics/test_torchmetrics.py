'''Metrics over data sets, with torchmetrics, in one and in two processes.'''
import importlib
import pickle
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from captum_adapters import metrics

pytestmark = pytest.mark.once

torchmetrics = pytest.importorskip('torchmetrics')
accumulate = pytest.importorskip('captum_adapters.metrics.torchmetrics')


def model(images):
    '''Outputs of three classes.'''
    return images.mean((2, 3)) * 40


def dataset(size=11):
    '''Arguments of all metrics, for a number of examples.'''
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 6, 6, generator=generator)
    masks = torch.rand(size, 6, 6, generator=generator) < 0.3
    masks[2] = False
    return {
        'inputs': images, 'attributions': torch.randn(size, 3, 6, 6, generator=generator).round(), 'masks': masks,
        'target': torch.randint(3, (size,), generator=generator), 'initial': torch.randn(size, generator=generator),
    }


CASES = {
    'insertion_deletion': (
        accumulate.InsertionDeletionMetric, {'n_steps': 9, 'ties': 'random', 'baselines': 0.1},
        ('inputs', 'attributions', 'target'),
    ),
    'pixel_accuracy': (
        accumulate.PixelAccuracyMetric, {'percents': (30, 5), 'unit': 'input'}, ('inputs', 'attributions', 'target')
    ),
    'mask_pointing': (accumulate.MaskPointingMetric, {'percents': [20], 'absolute': True}, ('attributions', 'masks')),
    'mask_distance': (accumulate.MaskDistanceMetric, {'normalization': 'mean'}, ('attributions', 'masks')),
    'conservation_gap': (accumulate.ConservationGapMetric, {}, ('attributions', 'initial')),
}
# random orders of ties are chosen by the examples' identities
ORDERED = ('insertion_deletion', 'pixel_accuracy')


def arguments(name, rows, data=None):
    '''Arguments of a metric for some of the examples.'''
    data = dataset() if data is None else data
    selected = {key: data[key][rows] for key in CASES[name][2]}
    return {'forward_func': model, **selected} if 'inputs' in selected else selected


def assert_same(actual, expected):
    '''Equal tensors, or named tuples of these, where NaN is equal to itself.'''
    assert type(actual) is type(expected)
    pairs = [(actual, expected)] if isinstance(actual, torch.Tensor) else list(zip(actual, expected))
    for pair in pairs:
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-6, equal_nan=True)


def expected_scores(name):
    '''What the function returns for all examples at once.'''
    options = dict(CASES[name][1])
    if name in ORDERED:
        options['sample_ids'] = torch.arange(11) + 100
    return getattr(metrics, name)(**arguments(name, slice(None)), **options)


@pytest.mark.parametrize('name', CASES)
def test_batches(name):
    '''The results of all batches are those of a single one, each once, and in the order of the examples.'''
    kind, options, _ = CASES[name]
    metric = kind(**options)
    batches = [torch.tensor(rows) for rows in ([9, 4], [0], [1, 2, 3], [5, 9, 6, 7], [8, 10, 0])]
    for rows in batches:
        metric.update(sample_ids=rows + 100, **arguments(name, rows))
    for _ in range(2):
        result = metric.compute()
        assert result.sample_ids.tolist() == list(range(100, 111))
        assert_same(result.scores, expected_scores(name))
    restored = pickle.loads(pickle.dumps(metric))
    assert_same(restored.compute().scores, expected_scores(name))
    metric.reset()
    # a single example has the same number of dimensions, and forward returns the result of its batch
    for _ in range(2):
        rows = torch.tensor([3])
        result = metric(rows + 100, **arguments(name, rows))
        assert result.sample_ids.tolist() == [103]
        single = getattr(metrics, name)(**arguments(name, rows), **{
            **options, **({'sample_ids': [103]} if name in ORDERED else {}),
        })
        assert_same(result.scores, single)
    metric([104], **arguments(name, torch.tensor([4])))
    assert metric.compute().sample_ids.tolist() == [103, 104]
    metric.reset()
    with pytest.warns(UserWarning, match='before'), pytest.raises(ValueError, match='no results'):
        metric.compute()


def test_merge():
    '''States of two metrics can be merged, and live on the CPU if wanted.'''
    first, second = (accumulate.MaskPointingMetric(percents=[20], compute_on_cpu=True) for _ in range(2))
    first.update(range(100, 106), **arguments('mask_pointing', slice(0, 6)))
    second.update(range(106, 111), **arguments('mask_pointing', slice(6, None)))
    first.merge_state(second)
    assert_same(first.compute().scores, expected_scores('mask_pointing'))


def test_collection():
    '''A collection gives each metric its arguments, and does not confuse metrics with other options.'''
    collection = torchmetrics.MetricCollection({
        **{name: kind(**options) for name, (kind, options, _) in CASES.items()},
        'signed': accumulate.MaskPointingMetric(percents=[20], absolute=False),
    })
    data = dataset()
    # in the first batch, signed and absolute attributions rank alike
    data['attributions'][:2] = data['attributions'][:2].abs()
    for rows in (torch.arange(2), torch.arange(2, 11)):
        everything = {key: value[rows] for key, value in data.items()}
        collection.update(sample_ids=rows + 100, forward_func=model, **everything)
    results = collection.compute()
    assert set(results) == {*CASES, 'signed'}
    for name, absolute in (('mask_pointing', True), ('signed', False)):
        expected = metrics.mask_pointing(data['attributions'], data['masks'], [20], absolute=absolute)
        assert_same(results[name].scores, expected)
    assert not torch.equal(results['signed'].scores.share, results['mask_pointing'].scores.share)


@pytest.mark.parametrize('convert', [torch.clone, torch.Tensor.numpy, lambda fill: (fill,)])
def test_collection_large_options(convert):
    '''Nor metrics with large tensors as options, of which the text shows but the corners.'''
    fills = torch.zeros(2, 1, 1, 40, 40)
    fills[1, ..., 15:25, 15:25] = 9
    collection = torchmetrics.MetricCollection({
        str(number): accumulate.PixelAccuracyMetric(percents=[1], baselines=convert(fill))
        for number, fill in enumerate(fills)
    })
    # the class is whether the image is bright, which the whole first batch is
    images = torch.cat([torch.full((2, 1, 40, 40), 99.), torch.zeros(2, 1, 40, 40)])
    maps = torch.rand(4, 40, 40)
    maps[:, 15:25, 15:25] = -0.1

    def bright(images):
        total = images.sum((1, 2, 3))
        return torch.stack([total * 0 + 1, total], 1)

    for rows in torch.arange(4).split(2):
        collection.update(
            sample_ids=rows, forward_func=bright, inputs=images[rows], attributions=maps[rows], target=[1, 1]
        )
    found = collection.compute()
    assert found['0'].scores.predictions[:, 0].tolist() == [1, 1, 0, 0]
    assert found['1'].scores.predictions[:, 0].tolist() == [1, 1, 1, 1]


def test_image_sizes():
    '''Numbers of pixels of images of different sizes are told for each.'''
    metric = accumulate.MaskPointingMetric(percents=(10, 50))
    for number, size in enumerate((10, 20)):
        metric.update([number], torch.rand(1, size, size), torch.ones(1, size, size))
    result = metric.compute().scores
    assert result.counts.tolist() == [[10, 50], [40, 200]]
    assert result.percents.tolist() == [10, 50]


def test_curve_sizes():
    '''Images whose curves have another number of points are refused, and results so far are kept.'''
    metric, other = accumulate.InsertionDeletionMetric(), accumulate.InsertionDeletionMetric()
    small, large, even = (torch.rand(1, 1, size, size) for size in (15, 16, 18))
    for number, images in enumerate((large, even)):
        metric.update([number], lambda x: x.mean((1, 2, 3)), images, images)
    with pytest.raises(ValueError, match='Curves have 101 and 102 points.*resize'):
        metric.update([2], lambda x: x.mean((1, 2, 3)), small, small)
    assert metric.compute().scores.insertion_curve.shape == (2, 101)
    other.update([3], lambda x: x.mean((1, 2, 3)), small, small)
    other.merge_state(metric)
    with pytest.raises(ValueError, match='Curves have 101 and 102 points'):
        other.compute()


def test_errors():
    '''Identities that do not fit, and unknown options.'''
    metric = accumulate.ConservationGapMetric()
    for ids, message in (([1], '1 sample_ids for 2'), ([1., 2.], 'float'), ([[1, 2]], r'\(1, 2\)')):
        with pytest.raises(ValueError, match=message):
            metric.update(ids, torch.rand(2, 3), 1)
    with pytest.raises(ValueError, match='steps'):
        accumulate.InsertionDeletionMetric(steps=3)
    with pytest.raises(ValueError, match='target'):
        accumulate.PixelAccuracyMetric(target=3)
    for kind, name, value in (
        (accumulate.InsertionDeletionMetric, 'step', 0), (accumulate.InsertionDeletionMetric, 'step', True),
        (accumulate.InsertionDeletionMetric, 'n_steps', 2.5),
        (accumulate.InsertionDeletionMetric, 'n_steps', float('nan')),
        (accumulate.PixelAccuracyMetric, 'n_orders', -1), (accumulate.PixelAccuracyMetric, 'max_examples_per_batch', 0),
        (accumulate.MaskPointingMetric, 'percents', (101,)), (accumulate.MaskDistanceMetric, 'percents', (5, -1)),
    ):
        with pytest.raises(ValueError, match=f'{name}.*{value[-1] if name == "percents" else value}'):
            kind(**{name: value})
    with pytest.raises(TypeError, match='True'):
        accumulate.MaskPointingMetric(percents=(True,))
    with pytest.raises(ValueError, match='step=500 .*64 pixels'):
        accumulate.InsertionDeletionMetric(step=500).update([0], torch.sum, torch.rand(1, 1, 8, 8), torch.rand(1, 8, 8))


def test_arrays():
    '''A single percentage, and arrays.'''
    data, metric = dataset(), accumulate.MaskPointingMetric(percents=20)
    for row in range(11):
        metric.update([row], data['attributions'][row].sum(0).numpy(), data['masks'][row].numpy())
    result = metric.compute().scores
    assert_same(result, metrics.mask_pointing(data['attributions'], data['masks'], (20,)))


def test_missing(monkeypatch):
    '''Without torchmetrics, the message says what to install.'''
    monkeypatch.setitem(sys.modules, 'torchmetrics', None)
    monkeypatch.delitem(sys.modules, 'captum_adapters.metrics.torchmetrics')
    message = r'metrics.torchmetrics needs torchmetrics.*pip install "zennit-resnet\[metrics\]"'
    with pytest.raises(ImportError, match=message):
        importlib.import_module('captum_adapters.metrics.torchmetrics')


def evaluate_shard(rank, path):
    '''Evaluate the shard of a process, as with a sampler that repeats examples.'''
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{path}/store', rank=rank, world_size=2, timeout=timedelta(minutes=2)
    )
    # curves of another number of points than those of the other process
    metric, images = accumulate.InsertionDeletionMetric(), torch.rand(1, 3, 15 + rank, 15 + rank)
    metric.update([rank], model, images, images, target=0)
    with pytest.raises(ValueError, match='Curves have 101 and 102 points'):
        metric.compute()
    results = {}
    for name, (kind, options, _) in CASES.items():
        for setup, shards in (('shards', ([0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 0])), ('empty', (range(11), []))):
            metric = kind(**options)
            for rows in torch.tensor(shards[rank], dtype=torch.long).split(4):
                if len(rows):
                    metric.update(rows + 100, **arguments(name, rows))
            result = metric.compute() if shards[rank] else compute_silently(metric)
            results[name, setup] = result.sample_ids, result.scores
            # own results are left for further batches
            assert not isinstance(metric.sample_ids, torch.Tensor)
    torch.save(results, Path(path) / f'{rank}.pt')
    torch.distributed.destroy_process_group()


def compute_silently(metric):
    '''Compute a metric that was never updated.'''
    with pytest.warns(UserWarning):
        return metric.compute()


def test_distributed(tmp_path):
    '''Both processes have all results, each once, even if one process has no examples at all.'''
    # this process is the second one
    other = torch.multiprocessing.spawn(evaluate_shard, (str(tmp_path),), nprocs=1, join=False)
    evaluate_shard(1, str(tmp_path))
    assert other.join(120)
    for rank in range(2):
        results = torch.load(tmp_path / f'{rank}.pt', weights_only=False)
        assert len(results) == 10
        for (name, _), (ids, scores) in results.items():
            assert ids.tolist() == list(range(100, 111))
            assert_same(scores, expected_scores(name))
