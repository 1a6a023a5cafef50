'''Tests for the evaluation of methods on a data set: its loop, processes, resuming, methods and metrics.'''
import contextlib
import importlib.metadata
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import resnet18

from captum_adapters import metrics
from captum_adapters.attr import CompositeAttribution
from captum_adapters.evaluation import (
    COLUMNS,
    PRESETS,
    Evaluation,
    Method,
    Process,
    RunError,
    blocks,
    evaluate,
    read_run,
    runner,
    summarize,
)
from captum_adapters.evaluation.measures import NAMES, Batch, MetricSettings, measure
from captum_adapters.evaluation.methods import Context, Explainer, group_of, names
from captum_adapters.evaluation.records import read_times
from captum_adapters.metrics import insertion_deletion
from zennit_resnet.models import load_classifier
from zennit_resnet.postprocess import heat_quantization

CLASSES = ('circle', 'square', 'stripes')
SIZE = 64
METHODS = ('resnet_lrp_ratio', 'resnet_lrp_ratio+quantize8', 'input_x_gradient')


@pytest.fixture(scope='module')
def assets(tmp_path_factory):
    '''Folder with a small data set, and the weights of a small network.'''
    folder = tmp_path_factory.mktemp('assets')
    torch.manual_seed(0)
    torch.save(resnet18(num_classes=len(CLASSES)).state_dict(), folder / 'net.pt')
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (folder / 'images' / name).mkdir(parents=True)
        for number in range(4):
            picture = generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / 'images' / name / f'{number}.png')
    # class names are in the metadata of safetensors only, so folders are matched by their order
    return folder


def setting(assets, out, **options):
    '''An evaluation of the small network on the small data set.'''
    options = {
        'methods': METHODS, 'step': 1024, 'batch_size': 4, 'forward_batch': 16, 'device': 'cpu', 'model': 'resnet18',
        'weights': str(assets / 'net.pt'), 'size': SIZE, 'data': str(assets / 'images'), **options,
    }
    return Evaluation(out=str(out), **options)


def run(assets, out, process=None, **options):
    '''Evaluate quietly, and read the records.'''
    evaluate(setting(assets, out, **options), process=process or Process(), quiet=True)
    return read_run(out)


def assert_same(first, other):
    '''Records of two runs are the same to the last digit, but for times.'''
    assert first.samples == other.samples
    assert list(first.records) == list(other.records)
    for one, two in zip(first.records.values(), other.records.values()):
        assert one.problem == two.problem
        assert list(one.values) == list(two.values)
        np.testing.assert_array_equal(list(one.values.values()), list(two.values.values()))
        assert list(one.curves) == list(two.curves)
        for name, curve in one.curves.items():
            np.testing.assert_array_equal(curve, two.curves[name])
        np.testing.assert_array_equal(one.heatmap, two.heatmap)


@pytest.fixture(scope='module')
def whole(assets, tmp_path_factory):
    '''A run by one process.'''
    return run(assets, tmp_path_factory.mktemp('whole') / 'run')


def test_records(whole, assets):
    '''There is a record for each sample and method, with the values of the metrics.'''
    methods = (*METHODS, 'random', 'constant', 'gaussian', 'sobel')
    sample_names = sorted(f'{name}/{number}.png' for name in CLASSES for number in range(4))
    assert list(whole.samples) == sample_names
    assert set(whole.records) == {(sample, method) for sample in sample_names for method in methods}
    assert whole.messages == []
    assert whole.settings['methods'] == list(methods)
    assert {record.problem for record in whole.records.values()} == {None}

    classifier = load_classifier('resnet18', str(assets / 'net.pt'), SIZE)
    sample = sample_names[5]
    with Image.open(assets / 'images' / sample) as image:
        input = classifier.transform(image)[None]
    output = classifier.model(input).detach()
    target = output.argmax(1)
    known = whole.samples[sample]
    assert known.label == 1
    assert known.target == known.prediction == int(target)
    assert known.probability == pytest.approx(float(output.softmax(1)[0, target]), abs=1e-6)
    relevance = CompositeAttribution(classifier.model, initial_relevance='softmax').attribute(input, target)
    heat = relevance.sum(1)
    for method, maps in (('resnet_lrp_ratio', heat), ('resnet_lrp_ratio+quantize8', heat_quantization(heat))):
        record = whole.records[sample, method]
        black = classifier.bounds()[0]
        default = insertion_deletion(
            classifier.model, input, maps, black, target, protocol='keio', ties='nearest', step=1024
        )
        published = insertion_deletion(classifier.model, input, maps, black, target, protocol='keio', step=1024)
        for name, expected in {
            'insertion': default.insertion, 'deletion': default.deletion, 'id': default.id_score,
            'insertion_keio': published.insertion, 'deletion_keio': published.deletion,
            'id_keio': published.id_score, 'relevance_sum': relevance.sum(),
            'initial': output.softmax(1)[0, target], 'score_full': default.score_full,
        }.items():
            assert record.values[name] == pytest.approx(float(expected), abs=2e-5), (method, name)
        # values that are equal may differ by rounding
        assert record.values['tied_share'] == pytest.approx(float(default.tied_share), abs=5e-3)
        assert record.values['distinct_levels'] == pytest.approx(float(default.distinct_levels), abs=5)
        assert abs(record.values['gap']) < 1e-4
        np.testing.assert_allclose(record.curves['insertion'], default.insertion_curve[0], atol=2e-5)
        np.testing.assert_allclose(record.curves['fractions'], default.fractions[0], atol=1e-6)
        assert record.seconds > 0
        assert record.metric_seconds > 0
        assert record.heatmap.shape == (SIZE, SIZE)
        np.testing.assert_array_equal(record.heatmap, (maps[0] / maps.abs().max() * 127).round())
    assert whole.records[sample, 'resnet_lrp_ratio+quantize8'].values['distinct_levels'] <= 8
    assert 'gap' not in whole.records[sample, 'random'].values
    constant = whole.records[sample, 'constant'].values
    assert constant['id'] == pytest.approx(0, abs=1e-6)
    assert constant['id_keio'] == pytest.approx(constant['score_full'] - constant['score_blank'], abs=1e-6)
    for record in whole.records.values():
        assert set(record.values) <= set(COLUMNS)
    with Image.open(io.BytesIO(known.picture)) as picture:
        assert picture.size == (SIZE, SIZE)


@pytest.mark.parametrize('world', [2, 3])
def test_processes(assets, whole, tmp_path, world):
    '''Several processes write the same records as one.'''
    for rank in range(world):
        evaluate(setting(assets, tmp_path / 'run'), process=Process(rank, world), quiet=True)
    several = read_run(tmp_path / 'run')
    assert len(list((tmp_path / 'run').glob('records-*.sqlite'))) == world
    assert several.messages == []
    assert_same(several, whole)


def test_resume(assets, whole, tmp_path, monkeypatch):
    '''After an error, the same call computes what is missing, also with another number of processes.'''
    original, calls = blocks.measure, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(blocks, 'measure', interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(assets, tmp_path / 'run')
    part = read_run(tmp_path / 'run')
    # each method of a block of four samples, but the one that was interrupted
    assert len(part.records) == 11 * 4
    monkeypatch.setattr(blocks, 'measure', original)
    for rank in range(2):
        monkeypatch.setattr(blocks, 'measure', lambda *args: calls.append(args) or original(*args))
        progress = evaluate(setting(assets, tmp_path / 'run'), process=Process(rank, 2), quiet=True)
    assert len(calls) == 12 + 3 * 7 - 11
    assert progress.done == progress.total == 12 * 7
    assert_same(read_run(tmp_path / 'run'), whole)
    # now there is nothing left to do
    run(assets, tmp_path / 'run')
    assert len(calls) == 12 + 3 * 7 - 11


def test_other_run(assets, whole, tmp_path, monkeypatch):
    '''A folder with another run is refused, with what differs.'''
    folder = tmp_path / 'run'
    shutil.copytree(whole.folder, folder)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    for options, what in (
        ({'step': 512}, r'step \(1024, now 512\)'),
        ({'methods': METHODS[:2]}, r'methods \(now without input_x_gradient\)'),
        ({'methods': (*METHODS, 'grad_cam')}, r'methods \(now with grad_cam\)'),
        ({'metrics': ('insertion_deletion',)}, r'metrics \(now without conservation\)'),
        ({'limit': 3}, r'samples \(12, now 3\)'),
        ({'amp': 'bfloat16'}, r'amp \(None, now bfloat16\)'),
        ({'size': 32}, 'size'),
    ):
        with pytest.raises(RunError, match=f'holds another run, which differs in .*{what}'):
            run(assets, folder, **options)
        with pytest.raises(RunError, match='holds another run'):
            evaluate(setting(assets, folder, **options), process=Process(), quiet=True, dry_run=True)
    other = resnet18(num_classes=3)
    torch.save(other.state_dict(), tmp_path / 'other.pt')
    with pytest.raises(RunError, match='differs in weights'):
        run(assets, folder, weights=str(tmp_path / 'other.pt'))
    images = tmp_path / 'images'
    shutil.copytree(assets / 'images', images)
    (images / 'circle' / '0.png').unlink()
    with pytest.raises(RunError, match='differs in manifest'):
        run(assets, folder, data=str(images))
    # the same number of images of the same size
    shutil.copy(assets / 'images' / 'circle' / '0.png', images / 'circle' / '00.png')
    with pytest.raises(RunError, match='differs in manifest'):
        run(assets, folder, data=str(images))
    version, load = importlib.metadata.version, runner.load_classifier
    with monkeypatch.context() as patch, pytest.raises(RunError, match=r'differs in torch \(.*, now 0\.4\)'):
        patch.setattr(importlib.metadata, 'version', lambda name: '0.4' if name == 'torch' else version(name))
        run(assets, folder)
    with monkeypatch.context() as patch, pytest.raises(RunError, match=r'differs in mean \(0\.48.*, now 0\.5, 0\.5'):
        mean = torch.full((3, 1, 1), 0.5)
        patch.setattr(runner, 'load_classifier', lambda *args: load(*args)._replace(mean=mean))
        run(assets, folder)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()) == before
    # how it is computed, and where the data is, does not matter
    shutil.copytree(assets / 'images', tmp_path / 'moved')
    run(assets, folder, batch_size=3, forward_batch=2, workers=1, data=str(tmp_path / 'moved'))


def test_problems(assets, tmp_path):
    '''What can not be used is recorded with its reason, and the rest is evaluated.'''
    images = tmp_path / 'images'
    shutil.copytree(assets / 'images' / 'circle', images)
    (images / 'broken.png').write_bytes(b'no image')
    Image.fromarray(np.full((SIZE, SIZE), 255, dtype=np.uint8)).save(images / 'mask.png')
    (images / 'manifest.csv').write_text(
        'image,label,mask\n0.png,0,mask.png\n1.png,1,missing.png\n2.png,7,\nbroken.png,1,\nabsent.png,2,\n3.png,2,\n'
    )
    result = run(
        assets, tmp_path / 'run', data=str(images / 'manifest.csv'), methods=('resnet_lrp_ratio',),
        metrics=('insertion_deletion', 'pointing', 'distance'), explain='label',
    )
    problems = {name: sample.problem for name, sample in result.samples.items() if sample.problem}
    assert set(problems) == {'2.png', 'broken.png', 'absent.png'}
    assert '7' in problems['2.png']
    assert 'image' in problems['broken.png']
    assert 'missing' in problems['absent.png']
    assert {name for name, _ in result.records} == {'0.png', '1.png', '3.png'}
    assert result.samples['1.png'].notes and 'mask' in result.samples['1.png'].notes[0]
    assert result.samples['0.png'].notes == result.samples['3.png'].notes == ()
    inside, without = (result.records[name, 'resnet_lrp_ratio'].values for name in ('0.png', '3.png'))
    assert inside['pointing'] == inside['pointing_chance'] == 1
    assert inside['distance'] == 0
    for name in ('pointing', 'pointing_chance', 'distance', 'distance_chance'):
        assert math.isnan(without[name])
    assert [result.samples[name].target for name in ('0.png', '1.png', '3.png')] == [0, 1, 2]
    # they count as done
    progress = evaluate(
        setting(
            assets, tmp_path / 'run', data=str(images / 'manifest.csv'), methods=('resnet_lrp_ratio',),
            metrics=('insertion_deletion', 'pointing', 'distance'), explain='label',
        ), process=Process(), quiet=True,
    )
    assert (progress.done, progress.total, progress.skipped) == (30, 30, 3)


@pytest.mark.parametrize('world', [1, 3])
def test_read_again(assets, whole, tmp_path, world):
    '''Images that could not be read, as a disk was missing, are tried at the next start, by whichever process.'''
    images = tmp_path / 'images'
    shutil.copytree(assets / 'images', images)
    options = {'data': str(images), 'layout': 'folder'}
    missing = [images / 'circle' / '1.png', images / 'stripes' / '0.png']
    original = blocks.Computation.block

    def block(*args):
        for path in missing:
            path.unlink(missing_ok=True)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks.Computation, 'block', block)
        part = run(assets, tmp_path / 'run', **options)
    # the first block was read before
    assert {name for name, sample in part.samples.items() if sample.problem} == {'stripes/0.png'}
    for path in missing:
        shutil.copy(assets / path.relative_to(tmp_path), path)
    before = evaluate(setting(assets, tmp_path / 'run', **options), process=Process(), quiet=True, dry_run=True)
    assert (before.done, before.skipped) == (11 * 7, 0)
    for rank in range(world):
        progress = evaluate(setting(assets, tmp_path / 'run', **options), process=Process(rank, world), quiet=True)
    assert (progress.done, progress.total, progress.skipped) == (12 * 7, 12 * 7, 0)
    again = read_run(tmp_path / 'run')
    assert again.samples == whole.samples and list(again.records) == list(whole.records)


def test_shared_maps(assets, tmp_path, monkeypatch):
    '''Methods that only differ in their post-processing share attributions, and have the records of each alone.'''
    (tmp_path / 'images').mkdir()
    for number in range(5):
        source = assets / 'images' / CLASSES[number % 3] / f'{number // 3}.png'
        shutil.copy(source, tmp_path / 'images' / f'{number}.png')
    families = (
        ('resnet_lrp_ratio+abs+c3', 'resnet_lrp_ratio', 'resnet_lrp_ratio+quantize8'),
        ('epsilon_plus_flat+ratio',), ('epsilon_plus_flat+abs',),
        ('rise:n_masks=8', 'rise:n_masks=8+c3'), ('random+c3', 'random'),
    )
    methods = tuple(name for family in families for name in family)
    passes, used, pause = [], [], 0.06
    original, create = Explainer.attribute, blocks.Computation.block

    def attribute(self, images, targets, names):
        passes.append(self.method.attribution)
        if self.method.base == 'resnet_lrp_ratio' and '4.png' in names:
            raise RuntimeError('a strange image')
        if self.method.base == 'rise':
            time.sleep(pause)
        return original(self, images, targets, names)

    def block(*args):
        used.append(create(*args))
        return used[-1]

    monkeypatch.setattr(Explainer, 'attribute', attribute)
    monkeypatch.setattr(blocks.Computation, 'block', block)
    options = {'data': str(tmp_path / 'images'), 'controls': False, 'batch_size': 3, 'step': 2048}
    together = run(assets, tmp_path / 'run', methods=methods, **options)
    # the image of the second block that fails is found by each method for itself
    assert {name: passes.count(name) for name in passes} == {
        'resnet_lrp_ratio': 1 + 3 * 3, 'epsilon_plus_flat+ratio': 2, 'epsilon_plus_flat': 2, 'rise:n_masks=8': 2,
        'random': 2,
    }
    assert [each.attributed for each in used] == [{}, {}]
    # as it costs alone
    assert min(record.seconds for (_, name), record in together.records.items() if name[:4] == 'rise') >= pause / 3

    alone = {}
    for name in methods:
        alone.update(run(assets, tmp_path / name, methods=(name,), **options).records)
    assert_same(together._replace(records=dict(sorted(alone.items()))), together)
    for rank in range(2):
        evaluate(setting(assets, tmp_path / 'two', methods=methods, **options), process=Process(rank, 2), quiet=True)
    assert_same(read_run(tmp_path / 'two'), together)

    # a method that is missing alone computes its own maps, and so it does for other images than the one before it
    def forget(*names, sample='%'):
        for name in names:
            connection = sqlite3.connect(tmp_path / 'run' / 'records-00000.sqlite')
            with connection:
                connection.execute('DELETE FROM records WHERE method = ? AND sample LIKE ?', (name, sample))
            connection.close()

    forget('rise:n_masks=8+c3', 'random', 'resnet_lrp_ratio+quantize8')
    forget('resnet_lrp_ratio', sample='1.png')
    passes.clear()
    again = run(assets, tmp_path / 'run', methods=methods, **options)
    assert {name: passes.count(name) for name in passes} == {
        'resnet_lrp_ratio': 2 + 3, 'rise:n_masks=8': 2, 'random': 2
    }
    assert again.records.keys() == together.records.keys()
    for result in (again, together):
        # computed without the others of its block
        result.records.pop(('1.png', 'resnet_lrp_ratio'))
    assert_same(again, together)

    # shared time counts once in the estimate
    forget(*families[3], sample='0.png')
    times = read_times(tmp_path / 'run', again.settings['fingerprint'])
    left = evaluate(setting(assets, tmp_path / 'run', methods=methods, **options), process=Process(), dry_run=True)
    costs = [times[name] for name in families[3]]
    assert left.seconds == pytest.approx(sum(map(sum, costs)) - min(cost[0] for cost in costs))


def test_not_finite(assets, tmp_path, monkeypatch):
    '''Maps with NaN or infinity are recorded as a problem of the method, and others of the batch are measured.'''
    original = CompositeAttribution.attribute

    def attribute(self, inputs, *args):
        result = original(self, inputs, *args)
        result[1, 0, 5, 5] = math.nan
        result[2, 0, 5, 5] = math.inf
        return result

    monkeypatch.setattr(CompositeAttribution, 'attribute', attribute)
    result = run(assets, tmp_path / 'run', methods=('resnet_lrp_ratio+c3',), controls=False, limit=4)
    problems = [record.problem for record in result.records.values()]
    assert problems == [None, 'the map has NaN or infinity', 'the map has NaN or infinity', None]
    for record in result.records.values():
        assert bool(record.values) == bool(record.curves) == (record.problem is None)


def test_failure(assets, tmp_path, monkeypatch):
    '''A method that fails at once is an error. One that fails later does so for the images that are the reason.'''
    original = CompositeAttribution.attribute

    def attribute(self, inputs, *args):
        if bad is None or any(torch.equal(image, bad) for image in inputs):
            raise RuntimeError('a strange\nimage')
        return original(self, inputs, *args)

    bad = None
    monkeypatch.setattr(CompositeAttribution, 'attribute', attribute)
    options = {'methods': ('resnet_lrp_ratio',), 'controls': False}
    message = r'resnet_lrp_ratio fails on circle/0.png \(RuntimeError: a strange image\): .*, and choose another --out'
    with pytest.raises(RunError, match=message):
        run(assets, tmp_path / 'first', **options)
    with pytest.raises(RunError, match='gaussian:sigma=0 fails .*sigma=0 is not positive'):
        run(assets, tmp_path / 'gaussian', methods=('gaussian:sigma=0',), controls=False)
    with Image.open(assets / 'images' / 'square' / '2.png') as image:
        bad = load_classifier('resnet18', str(assets / 'net.pt'), SIZE).transform(image)
    result = run(assets, tmp_path / 'later', **options)
    assert {name: record.problem for (name, _), record in result.records.items() if record.problem} == {
        'square/2.png': 'RuntimeError: a strange image'
    }
    assert len(result.records) == 12


def test_published_class(assets, tmp_path):
    '''Published protocols may measure the label, where ours measures the explained class.'''
    options = {'methods': ('resnet_lrp_ratio',), 'controls': False}
    explained = run(assets, tmp_path / 'explained', **options)
    label = run(assets, tmp_path / 'label', **options, score='label', published='label')
    both = run(assets, tmp_path / 'both', **options, published='label')
    wrong = 0
    for key, record in both.records.items():
        sample = both.samples[key[0]]
        wrong += sample.label != sample.prediction
        for name, value in record.values.items():
            expected = (label if name.endswith('_keio') else explained).records[key].values[name]
            assert value == pytest.approx(expected, abs=1e-6), name
    assert 0 < wrong < len(both.samples)


def test_same_data(assets, tmp_path, monkeypatch):
    '''Folders of the same relative path in different places are different data.'''
    for name in CLASSES[:2]:
        shutil.copytree(assets / 'images' / name, tmp_path / name / 'photos')
    runs = []
    for name, data, limit in (('circle', 'photos', 2), ('square', 'photos', None), ('circle', '../circle/photos/', 3)):
        monkeypatch.chdir(tmp_path / name)
        out = tmp_path / f'run {len(runs)}'
        runs.append(run(assets, out, data=data, methods=('random',), controls=False, limit=limit))
    groups = summarize(runs, n_resamples=99).groups
    assert [[run.folder.name for run in group.runs] for group in groups] == [['run 0', 'run 2'], ['run 1']]


def test_no_labels(assets, tmp_path):
    '''Without a label, the prediction is explained and measured, and that is noted.'''
    (tmp_path / 'images').mkdir()
    for name in CLASSES:
        shutil.copy(assets / 'images' / name / '0.png', tmp_path / 'images' / f'{name}.png')
    options = {'methods': ('resnet_lrp_ratio',), 'controls': False, 'data': str(tmp_path / 'images')}
    label = run(assets, tmp_path / 'label', **options, explain='label', score='label', published='label')
    prediction = run(assets, tmp_path / 'prediction', **options)
    for name, sample in label.samples.items():
        assert sample.label is None and sample.target == sample.prediction
        assert sample.notes == ('no label, so the prediction was used',)
        assert not prediction.samples[name].notes
    for key, record in prediction.records.items():
        assert record.values == label.records[key].values
    assert len(prediction.records) == 3


def test_dry_run(assets, whole, tmp_path):
    '''A dry run says what is left, and writes nothing.'''
    before = evaluate(setting(assets, tmp_path / 'run'), process=Process(), quiet=True, dry_run=True)
    assert not (tmp_path / 'run').exists()
    assert (before.total, before.done) == (84, 0)
    assert before.seconds > 0
    after = evaluate(setting(assets, whole.folder), process=Process(), quiet=True, dry_run=True)
    assert (after.total, after.done, after.seconds) == (84, 84, 0)


@pytest.mark.parametrize('amp, channels_last', [(None, True), ('bfloat16', False), ('bfloat16', True)])
def test_precision(assets, tmp_path, monkeypatch, amp, channels_last):
    '''Passes of metrics and RISE are in the precision that is chosen, others in single, all in the memory format.'''
    seen, original = [], torch.nn.Conv2d._conv_forward

    def convolve(self, *args):
        output = original(self, *args)
        if self.in_channels == 3:
            seen.append((output.dtype, output.is_contiguous(memory_format=torch.channels_last)))
        return output

    monkeypatch.setattr(torch.nn.Conv2d, '_conv_forward', convolve)
    run(
        assets, tmp_path / 'run', methods=('input_x_gradient', 'rise:n_masks=8'), controls=False, limit=1, step=4096,
        amp=amp, channels_last=channels_last,
    )
    # after a check at loading: prediction and gradient; then metrics of the first method, RISE, and its metrics
    single, chosen = (torch.float32, channels_last), (getattr(torch, amp or 'float32'), channels_last)
    assert seen[1:] == [single, single, chosen, chosen, chosen]


def test_compile(assets, whole, tmp_path, monkeypatch):
    '''The network is compiled for metrics if that is chosen, with batches of one size, which changes no record.'''
    compiled, sizes = [], []

    def compile(function, **options):
        compiled.append(options)

        def network(images):
            sizes.append(len(images))
            return function(images)

        return network

    monkeypatch.setattr(torch, 'compile', compile)
    options = {'methods': ('random',), 'controls': False, 'limit': 2}
    run(assets, tmp_path / 'run', **options)
    assert not compiled
    result = run(assets, tmp_path / 'compiled', **options, compile=True)
    assert compiled == [{'dynamic': False, 'options': {'freezing': True}}]
    assert set(sizes) == {16}
    assert len(result.records) == 2
    for key, record in result.records.items():
        assert list(record.values) == list(whole.records[key].values)
        for name, value in record.values.items():
            assert value == pytest.approx(whole.records[key].values[name], abs=1e-5), name


def test_progress(assets, tmp_path, monkeypatch, capsys):
    '''Off a terminal, progress is plain lines with rate and remaining time, of the first process alone.'''
    monkeypatch.setattr(runner, 'LINE_SECONDS', 0.)
    options = {'methods': ('random',), 'metrics': ('conservation',), 'controls': False, 'limit': 6, 'batch_size': 1}
    evaluate(setting(assets, tmp_path / 'run', **options), process=Process(1, 2))
    assert capsys.readouterr().err == ''
    evaluate(setting(assets, tmp_path / 'run', **options), process=Process(0, 2))
    error = capsys.readouterr().err
    assert '\r' not in error
    number = r'[\d.]+ ?'
    lines = re.findall(
        rf'^maps by 1 of 2: .*\| ([1-3])/3 \[[\d:]+<[\d:]+, +{number}(?:map/s|s/map)\]$', error, re.MULTILINE
    )
    assert lines[:2] == ['1', '2'] and lines[-1] == '3', error
    evaluate(setting(assets, tmp_path / 'quiet', **options), process=Process(), quiet=True)
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('seconds', [0., math.inf])
def test_commit_seconds(assets, tmp_path, monkeypatch, seconds):
    '''What took long is committed before the next method of the same images starts.'''
    monkeypatch.setattr(runner, 'COMMIT_SECONDS', seconds)
    original, found = Explainer.attribute, []

    def attribute(self, *args):
        if self.method.base == 'constant':
            found.extend(read_run(tmp_path / 'run').records)
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Explainer, 'attribute', attribute)
    options = {'methods': ('random', 'constant'), 'metrics': ('conservation',), 'controls': False, 'limit': 2}
    with pytest.raises(KeyboardInterrupt):
        run(assets, tmp_path / 'run', **options)
    assert {method for _, method in found} == ({'random'} if seconds == 0 else set())
    # at the end, whatever is complete is committed anyway
    assert {method for _, method in read_run(tmp_path / 'run').records} == {'random'}


def test_attention(assets, tmp_path):
    '''Maps are sorted by the attention that they pay to the object, as 0 or 1 for each image with a mask.'''
    images = tmp_path / 'images'
    shutil.copytree(assets / 'images' / 'circle', images)
    mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
    for name, side in (('center', 32), ('corner', 8)):
        mask[:] = 0
        start = (SIZE - side) // 2 if name == 'center' else 0
        mask[start:start + side, start:start + side] = 255
        Image.fromarray(mask).save(images / f'{name}.png')
    (images / 'manifest.csv').write_text('image,mask\n0.png,center.png\n1.png,corner.png\n2.png,\n')
    result = run(
        assets, tmp_path / 'run', data=str(images / 'manifest.csv'), methods=('gaussian:sigma=0.1', 'constant'),
        metrics=('attention',), controls=False,
    )
    types = ('correct', 'insufficient', 'over', 'wrong')

    def found(image, method):
        values = result.records[image, method].values
        return [name for name in types if values[f'attention_{name}'] == 1]

    assert found('0.png', 'gaussian:sigma=0.1') == ['correct']
    assert found('1.png', 'gaussian:sigma=0.1') == ['wrong']
    assert found('0.png', 'constant') == found('1.png', 'constant') == ['insufficient']
    values = result.records['0.png', 'gaussian:sigma=0.1'].values
    heatmap = result.records['0.png', 'gaussian:sigma=0.1'].heatmap / 127
    attended = heatmap > heatmap.mean()
    inside = attended[16:48, 16:48].sum()
    assert values['attention_coverage'] == pytest.approx(inside / 32 ** 2, abs=0.05)
    assert values['attention_precision'] == pytest.approx(inside / attended.sum(), abs=0.05)
    without = result.records['2.png', 'constant'].values
    assert all(math.isnan(without[f'attention_{name}']) for name in (*types, 'coverage', 'precision'))
    table = summarize([result], n_resamples=99).table('markdown')
    assert '## Attention' in table and 'Insertion' not in table


def test_no_masks(assets, tmp_path, capsys):
    '''It is said at the start that metrics of masks are not defined.'''
    options = {'methods': ('random',), 'controls': False, 'metrics': ('conservation', 'pointing')}
    evaluate(setting(assets, tmp_path / 'run', **options), process=Process(), dry_run=True)
    assert 'no masks or boxes in' in capsys.readouterr().err
    (tmp_path / 'boxes.csv').write_text(f"image,x0,y0,x1,y1\n{assets / 'images' / 'circle' / '0.png'},1,1,9,9\n")
    options = {**options, 'data': str(tmp_path / 'boxes.csv'), 'metrics': ('pointing',)}
    evaluate(setting(assets, tmp_path / 'run', **options), process=Process(), dry_run=True)
    assert 'no masks or boxes in' not in capsys.readouterr().err


def test_all_metrics(assets, tmp_path):
    '''All metrics fill columns that are known, and curves with their positions.'''
    result = run(
        assets, tmp_path / 'run', metrics=NAMES, cross=(f"resnet18={assets / 'net.pt'}",), limit=2,
        methods=('resnet_lrp_ratio',), percents=(10, 50), rank_by='magnitude', step=2048, controls=False,
    )
    for record in result.records.values():
        assert set(record.values) <= set(COLUMNS)
        assert {'id', 'id_keio', 'id_rise', 'id_c3', 'accuracy', 'cross_accuracy', 'gap'} <= set(record.values)
        assert math.isnan(record.values['pointing']) and math.isnan(record.values['distance'])
        np.testing.assert_array_equal(record.curves['percents'], [10, 50])
        assert len(record.curves['accuracy']) == 2
        # the other network is the same one, but has another input size
        assert 'cross_accuracy:resnet18' in record.curves


@pytest.mark.parametrize('rank_by', ['value', 'magnitude', None])
def test_ties(rank_by):
    '''Top pixels are the expected ones over orders of ties, of which the share is kept, without curves as well.'''
    settings = MetricSettings(
        percents=(1, 30), fill=torch.zeros(1, 3, 1, 1), others={'other': (lambda x: x.flatten(1), lambda x: x)},
        **({} if rank_by is None else {'rank_by': rank_by}),
    )
    suffix = '' if rank_by == 'value' else '_magnitude'
    masks = torch.zeros(2, 20, 20, dtype=torch.bool)
    masks[0, :10], masks[1, 10:] = True, True
    batch = Batch(torch.randn(2, 3, 20, 20), *[torch.tensor([0, 1])] * 2, masks)
    levels = torch.ones(20, 20)
    levels[:, 5:] = -1
    levels[:, 0] = torch.linspace(2, 3, 20)
    settings = settings._replace(step=50)
    for chosen in (
        ('pointing',), ('distance',), ('accuracy',), ('cross',), ('insertion_deletion', 'pointing', 'cross')
    ):
        rows = measure(chosen, lambda x: x.mean((2, 3)), batch, levels.expand(2, -1, -1), settings)
        for values, _ in rows:
            assert set(values) <= set(COLUMNS)
            assert values['tied_share'] == pytest.approx(380 / 400)
            assert values['distinct_levels'] == 22
            assert values[f'tied_share{suffix}'] == pytest.approx(380 / 400)
            assert ('tied_share_magnitude' in values) == (suffix != '')
        if 'pointing' in chosen:
            values = [values['pointing'] for values, _ in rows]
            # of the four highest pixels, none is above; of 30 %, the rest is tied
            shares = [0, (10 + 50) / 120], [1, 1 - 60 / 120]
            assert values == pytest.approx([np.mean(row) for row in shares])
    values, _ = zip(*measure(('pointing', 'distance'), None, batch, torch.ones(2, 20, 20), settings))
    for row in values:
        assert row['pointing'] == row['pointing_chance'] and row['distance'] == row['distance_chance']
        assert row[f'tied_share{suffix}'] == 1


def test_defaults():
    '''Functions, evaluations and their settings rank by the same.'''
    assert Evaluation('data', 'out').rank_by == MetricSettings().rank_by == 'magnitude'
    for function in (metrics.pixel_accuracy, metrics.cross_model_accuracy, metrics.keep_top, metrics.mask_pointing,
                     metrics.mask_distance):
        assert inspect.signature(function).parameters['absolute'].default is True
    assert Evaluation('data', 'out', percents=5).percents == (5,)


def test_other_networks(assets, tmp_path):
    '''Other networks of the same name, from files of the same name, are told apart.'''
    cross = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        torch.manual_seed(number + 1)
        torch.save(resnet18(num_classes=3).state_dict(), tmp_path / str(number) / 'net.pt')
        cross.append(f'resnet18={tmp_path / str(number) / "net.pt"}')
    options = {
        'metrics': ('cross',), 'cross': tuple(cross), 'methods': ('random',), 'controls': False, 'limit': 2,
        'percents': (50, 100),
    }
    result = run(assets, tmp_path / 'run', **options)
    for record in result.records.values():
        assert set(record.curves) == {'percents', *(f'cross_accuracy:{text}' for text in cross)}
    shutil.copy(tmp_path / '1' / 'net.pt', tmp_path / '0' / 'net.pt')
    with pytest.raises(RunError, match='differs in .*/0/net.pt'):
        run(assets, tmp_path / 'run', **options)
    with pytest.raises(ValueError, match='a network is named twice'):
        run(assets, tmp_path / 'run', **{**options, 'cross': (cross[0], cross[0])})


def test_pictures(assets, tmp_path):
    '''Pictures and heatmaps are kept for as many images as asked for.'''
    result = run(assets, tmp_path / 'run', methods=('random',), controls=False, pictures=4)
    assert [sample.picture is not None for sample in result.samples.values()] == [True] * 4 + [False] * 8
    assert [record.heatmap is not None for record in result.records.values()] == [True] * 4 + [False] * 8


def test_workers(assets, whole, tmp_path):
    '''Images read by other processes are the same.'''
    assert_same(run(assets, tmp_path / 'run', workers=2), whole)


@pytest.mark.parametrize('options, message', [
    ({'methods': ('grad_camera',)}, "unknown method 'grad_camera'"),
    ({'methods': ('grad_cam', '+rise')}, r"unknown method '\+rise'"),
    ({'methods': ()}, 'there are no methods'),
    ({'methods': ('grad_cam', 'grad_cam')}, 'named twice'),
    ({'methods': ('grad_cam:relu',)}, "option 'relu'"),
    ({'methods': ('grad_cam:colour=1',)}, "no option 'colour'"),
    ({'methods': ('resnet_lrp_ratio:first_layer=best',)}, 'first_layer'),
    ({'methods': ('resnet_lrp_ratio:initial=best',)}, 'initial'),
    ({'methods': ('resnet_lrp_ratio+ratio',)}, 'splitting is for'),
    ({'methods': ('grad_cam+blur',)}, r"'\+blur'"),
    ({'methods': ('grad_cam+quantize1',)}, 'has 1 levels: choose from 2'),
    ({'methods': ('lrp_0+zennit',)}, 'classic rules'),
    # Captum's, though Zennit has a composite of this name
    ({'methods': ('guided_backprop+ratio',)}, 'splitting is for'),
    ({'methods': ('guided_backprop:initial=logit',)}, "no option 'initial'"),
    ({'methods': ('abn',)}, 'abn:weights=FILE'),
    ({'metrics': ('beauty',)}, "unknown metric 'beauty'"),
    ({'metrics': ()}, 'there are no metrics'),
    ({'metrics': ('accuracy', 'accuracy')}, 'named twice'),
    ({'metrics': ('cross',)}, 'belong together'),
    ({'explain': 'truth'}, "explain='truth'"),
    ({'step': 0}, 'step=0'),
    ({'step': True}, 'step=True'),
    ({'step': 2.5}, 'step=2.5'),
    ({'step': math.nan}, 'step=nan'),
    ({'step': 4097}, 'step=4097 .*4096 pixels'),
    ({'step': 4097, 'metrics': ('conservation', 'c3')}, 'step=4097 .*4096 pixels'),
    ({'size': 14, 'metrics': ('rise',)}, 'step=224 .*196 pixels'),
    ({'forward_batch': 0.5}, 'forward_batch=0.5'),
    ({'limit': 0}, 'limit=0'),
    ({'limit': math.nan}, 'limit=nan'),
    ({'workers': True}, 'workers=True'),
    ({'percents': ()}, r'percents=\(\)'),
    ({'percents': '50'}, "percents='50'"),
    ({'percents': ('50',)}, "unlike '50'"),
    ({'percents': (math.nan,)}, 'unlike nan'),
    ({'percents': True}, 'unlike True'),
    ({'percents': -1}, 'unlike -1'),
    ({'percents': (50, 0.01), 'metrics': ('conservation', 'pointing')}, '0.01.*4096 pixels'),
    ({'pictures': -3}, 'pictures=-3'),
    ({'percents': (10, 200)}, 'unlike 200'),
    ({'percents': (0, 10)}, 'unlike 0'),
    ({'metrics': ('pointing', 'distance')}, 'no masks or boxes in .*, which the metrics pointing, distance need'),
    ({'batch_size': 0}, 'batch_size=0'),
    ({'device': 'abacus'}, "device 'abacus'"),
    ({'data': 'nowhere'}, 'nowhere'),
])
def test_errors(assets, tmp_path, options, message):
    '''What is wrong is said before anything is written.'''
    with pytest.raises(ValueError, match=message) as info:
        run(assets, tmp_path / 'run', **options)
    assert '\n' not in str(info.value)
    assert not (tmp_path / 'run').exists()


# -- methods -----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def context(assets):
    '''A small network.'''
    return Context(load_classifier('resnet18', str(assets / 'net.pt'), SIZE), forward_batch=16)


@pytest.mark.parametrize('name', sorted({
    *(name for preset in PRESETS.values() for name in preset.rows), *names(),
    'epsilon_plus_flat+ratio', 'epsilon_plus+symmetric+abs+c1c', 'relative_lrp+abs', 'lrp_gamma_0.25+ratio+quantize4',
    'rise:n_masks=8,grid_size=4', 'grad_cam:relu=False', 'beta_smooth',
} - {'abn'}))
def test_method(name, context):
    '''All methods of presets, and all there are, give maps, and leave the network as it was.'''
    if name.startswith('score_cam'):
        pytest.importorskip('torchcam')
    text = 'rise:n_masks=8' if name == 'rise' else name
    torch.manual_seed(1)
    # within the range of photographs, for methods that are given it
    images = torch.randn(2, 3, SIZE, SIZE).clamp(-1.8, 2.2)
    model = context.classifier.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        output = model(images)
    maps, total, initial = Method(text).create(context)(images, output.argmax(1), output, ['a', 'b'])
    assert maps.shape == (2, SIZE, SIZE)
    assert not maps.requires_grad
    if 'lrp_' not in name or name.startswith('resnet_lrp'):
        assert maps.isfinite().all()
    if name.startswith('resnet_lrp') and 'drop' not in name:
        torch.testing.assert_close(total, initial, rtol=1e-4, atol=0)
    with torch.no_grad():
        assert torch.equal(model(images), output)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_groups():
    '''Methods are ours, baselines or controls.'''
    assert {name: group_of(name) for name in (
        'resnet_lrp_ratio:maxpool=average+c3', 'relative_lrp', 'block_lrp', 'epsilon_plus+ratio', 'epsilon_plus+zennit',
        'grad_cam', 'lrp_0', 'random', 'sobel+c3', 'guided_backprop+ratio',
    )} == {
        'resnet_lrp_ratio:maxpool=average+c3': 'ours', 'relative_lrp': 'ours', 'block_lrp': 'ours',
        'epsilon_plus+ratio': 'ours', 'epsilon_plus+zennit': 'baseline', 'grad_cam': 'baseline', 'lrp_0': 'baseline',
        'random': 'control', 'sobel+c3': 'control', 'guided_backprop+ratio': 'baseline',
    }


def test_controls(context):
    '''Random maps depend on the sample alone, Gaussians are centred, and edges are where brightness changes.'''
    images = torch.zeros(3, 3, SIZE, SIZE)
    images[:, :, :, SIZE // 2:] = 1
    output = torch.zeros(3, 3)
    target = output.argmax(1)

    def maps(name, names=('a', 'b', 'a')):
        return Method(name).create(context)(images, target, output, names).maps

    noise = maps('random')
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1], maps('random', 'bca')[0])
    assert not torch.equal(noise, maps('random:seed=1'))
    bump = maps('gaussian')[0]
    torch.testing.assert_close(bump, bump.flip(0).flip(1))
    assert bump.argmax() in (SIZE * SIZE // 2 + SIZE // 2 - SIZE - 1 + offset for offset in (0, 1, SIZE, SIZE + 1))
    edges = maps('sobel')[0]
    assert edges[:, SIZE // 2 - 1:SIZE // 2 + 1].min() > 0.9
    assert edges[:, :SIZE // 2 - 1].abs().max() < 1e-6
    assert edges[:, SIZE // 2 + 1:].abs().max() < 1e-6
    assert torch.equal(maps('constant'), torch.ones(3, SIZE, SIZE))


# -- processes that are killed -----------------------------------------------------------------------------------------

def command(assets, out, world):
    '''Command of an evaluation by several processes.'''
    launcher = ['-m', 'torch.distributed.run', '--nproc-per-node', str(world), '-m'] if world > 1 else ['-m']
    return [
        sys.executable, *launcher, 'captum_adapters', 'evaluate', '--data', str(assets / 'images'), '--out', str(out),
        '--model', 'resnet18', '--weights', str(assets / 'net.pt'), '--size', str(SIZE), '--methods', ','.join(METHODS),
        '--step', '1024', '--batch-size', '1', '--forward-batch', '16', '--device', 'cpu', '--quiet',
    ]


def children(pid):
    '''Processes which a process has started.'''
    try:
        return [int(text) for text in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    except FileNotFoundError:
        return []


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='processes are found in /proc')
def test_kill(assets, tmp_path):
    '''Whatever is killed whenever, the same command ends up with each record once.

    There are two kills, or as many as the environment says in EVALUATION_KILLS.
    '''
    choose = random.Random(0)
    kills = int(os.environ.get('EVALUATION_KILLS', 2))
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'TORCHELASTIC_ERROR_FILE': os.devnull}
    expected = run(assets, tmp_path / 'expected', batch_size=1, forward_batch=16)
    folder, counts = tmp_path / 'run', []
    for number in range(kills):
        world = choose.choice([1, 2, 3])
        with subprocess.Popen(
            command(assets, folder, world), env=environment, start_new_session=True, stderr=subprocess.DEVNULL
        ) as process:
            # while it starts, or some time after the first record was written
            before = count(folder)
            limit, patience = time.monotonic() + 60, choose.random()
            while time.monotonic() < limit and process.poll() is None and count(folder) <= before:
                time.sleep(0.01)
            time.sleep(patience * 0.3)
            ranks = children(process.pid)
            whom = choose.choice(['launcher', 'rank']) if ranks else 'launcher'
            # a rank may have ended by itself by now
            with contextlib.suppress(ProcessLookupError):
                os.kill(choose.choice(ranks) if whom == 'rank' else process.pid, signal.SIGKILL)
            process.wait()
        counts.append(count(folder))
        if counts[-1] == len(expected.records) and number < kills - 1:
            # there is nothing left to interrupt
            shutil.rmtree(folder)
    world = choose.choice([1, 2, 3])
    subprocess.run(command(assets, folder, world), env=environment, check=True)
    result = read_run(folder)
    assert 0 < counts[0] < len(expected.records)
    assert_same(result, expected)


def count(folder):
    '''Number of records.'''
    return len(read_run(folder).records) if (folder / 'settings.json').exists() else 0


def test_launcher_is_gone(assets, tmp_path, monkeypatch):
    '''A process whose launcher was killed stops, such that it does not compete with a new one.'''
    with pytest.raises(RunError, match='launcher was killed'):
        run(assets, tmp_path / 'run', process=Process(0, 2, 0, launcher=1))
    monkeypatch.setenv('RANK', '2')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(RunError, match='RANK=2 does not fit WORLD_SIZE=2'):
        Process.current()
    monkeypatch.setenv('RANK', 'first')
    with pytest.raises(RunError, match="RANK='first'"):
        Process.current()


def test_settings_are_json(whole):
    '''Settings can be read by other programs.'''
    settings = json.loads((whole.folder / 'settings.json').read_text())
    assert settings == whole.settings
    assert settings['data'] == os.path.abspath(settings['evaluation']['data'])
    assert settings['classes'] == [f'class {number}' for number in range(3)]
    assert settings['options']['step'] == 1024
    assert settings['versions']['torch'] == torch.__version__.split('+')[0] or '+' in settings['versions']['torch']
