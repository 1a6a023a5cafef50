'''The loop of an evaluation: resuming, processes, problems, and what is refused.'''
import importlib.metadata
import io
import json
import math
import os
import re
import shutil
import time

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.evaluation import CLASSES, METHODS, SIZE, assert_same, run, setting
from helpers.networks import narrow_resnet18
from PIL import Image

from captum_adapters.attr import CompositeAttribution
from captum_adapters.evaluation import (
    COLUMNS,
    Process,
    RunError,
    accuracy,
    computation,
    estimate,
    evaluate,
    read_run,
    runner,
    summarize,
)
from captum_adapters.evaluation.methods import Explainer
from captum_adapters.evaluation.records import key_of
from captum_adapters.metrics import insertion_deletion
from zennit_resnet.models import load_classifier
from zennit_resnet.postprocess import heat_quantization

pytestmark = pytest.mark.once


def test_records(whole, assets):
    '''There is a record for each sample and method, with the values of the metrics.'''
    methods = (*METHODS, 'random', 'constant', 'gaussian', 'sobel')
    sample_names = sorted(f'{name}/{number}.png' for name in CLASSES for number in range(4))
    assert list(whole.samples) == sample_names
    assert set(whole.records.index) == {(sample, method) for sample in sample_names for method in methods}
    assert whole.messages == []
    assert whole.settings['identity']['methods'] == list(methods)
    assert whole.records['problem'].isna().all()

    classifier = load_classifier('narrow_resnet18', str(assets / 'net.pt'), SIZE)
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
        values, drawn = whole.records.loc[(sample, method)], whole.curves.loc[(sample, method)]
        black = classifier.bounds()[0]
        default = insertion_deletion(
            classifier.model, input, maps, black, target, protocol='keio', ties='nearest', step=512
        )
        published = insertion_deletion(classifier.model, input, maps, black, target, protocol='keio', step=512)
        for name, expected in {
            'insertion': default.insertion, 'deletion': default.deletion, 'id': default.id_score,
            'insertion_keio': published.insertion, 'deletion_keio': published.deletion,
            'id_keio': published.id_score, 'relevance_sum': relevance.sum(),
            'initial': output.softmax(1)[0, target], 'score_full': default.score_full,
        }.items():
            assert values[name] == pytest.approx(float(expected), abs=2e-5), (method, name)
        # values that are equal may differ by rounding
        assert values['tied_share'] == pytest.approx(float(default.tied_share), abs=5e-3)
        assert values['distinct_levels'] == pytest.approx(float(default.distinct_levels), abs=5)
        assert abs(values['gap']) < 1e-4
        np.testing.assert_allclose(drawn['insertion'], default.insertion_curve[0], atol=2e-5)
        np.testing.assert_allclose(drawn['fractions'], default.fractions[0], atol=1e-6)
        assert values['seconds'] > 0
        assert values['metric_seconds'] > 0
        np.testing.assert_array_equal(whole.heatmaps[sample, method], (maps[0] / maps.abs().max() * 127).round())
    assert whole.records.loc[(sample, 'resnet_lrp_ratio+quantize8'), 'distinct_levels'] <= 8
    assert math.isnan(whole.records.loc[(sample, 'random'), 'gap'])
    constant = whole.records.loc[(sample, 'constant')]
    assert constant['id'] == pytest.approx(0, abs=1e-6)
    assert constant['id_keio'] == pytest.approx(constant['score_full'] - constant['score_blank'], abs=1e-6)
    assert set(whole.records) - {'problem', 'seconds', 'metric_seconds'} <= set(COLUMNS)
    with Image.open(io.BytesIO(known.picture)) as picture:
        assert picture.size == (SIZE, SIZE)


@pytest.mark.parametrize('world', [2, 3])
def test_processes(assets, whole, tmp_path, world):
    '''Several processes write the same records as one.'''
    for rank in range(world):
        evaluate(setting(assets, tmp_path / 'run'), process=Process(rank, world), quiet=True)
    assert_same(read_run(tmp_path / 'run'), whole)


def test_resume(assets, whole, tmp_path, monkeypatch):
    '''After an error, the same call computes what is missing, also with another number of processes.'''
    original, calls = computation.measure, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(computation, 'measure', interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(assets, tmp_path / 'run')
    # each method of a batch of four samples is written at once, but the one that was interrupted
    assert len(read_run(tmp_path / 'run').records) == 11 * 4
    monkeypatch.setattr(computation, 'measure', lambda *args: calls.append(args) or original(*args))
    for rank in range(2):
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
    before = sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob('*'))
    torch.manual_seed(1)
    torch.save(narrow_resnet18(num_classes=3).state_dict(), tmp_path / 'other.pt')
    images = tmp_path / 'images'
    shutil.copytree(assets / 'images', images)
    # the same number of images of the same size
    (images / 'circle' / '0.png').rename(images / 'circle' / '00.png')
    for options, what in (
        ({'step': 128}, r'step \(512, now 128\)'),
        ({'methods': METHODS[:2]}, r'methods \(input_x_gradient, now none\)'),
        ({'metrics': ('insertion_deletion',)}, r'metrics \(conservation, now none\)'),
        ({'limit': 3}, r'limit \(None, now 3\), samples \(12, now 3\)'),
        ({'batch_size': 3}, r'batch_size \(4, now 3\)'),
        ({'forward_batch': 2}, r'forward_batch \(16, now 2\)'),
        ({'channels_last': False}, r'channels_last \(True, now False\)'),
        ({'compile': True}, r'compile \(False, now True\)'),
        ({'labels': 'ignore'}, r'labels \(given, now ignore\)'),
        ({'amp': 'bfloat16'}, r'amp \(None, now bfloat16\)'),
        ({'size': 48}, 'size'),
        ({'weights': str(tmp_path / 'other.pt')}, 'weights'),
        ({'data': str(images)}, '1 samples .*circle/0.png'),
    ):
        for dry_run in (False, True):
            with pytest.raises(RunError, match=what):
                evaluate(setting(assets, folder, **options), process=Process(), quiet=True, dry_run=dry_run)
    version, load = importlib.metadata.version, runner.load_classifier

    def other_version(package, number):
        monkeypatch.setattr(
            importlib.metadata, 'version', lambda name: number if name == package else version(name)
        )

    for package in ('torch', 'zennit'):
        other_version(package, '0.4.1')
        with pytest.raises(RunError, match=rf'{package} \(.*, now 0\.4\)'):
            run(assets, folder)
    monkeypatch.undo()
    mean = torch.full((3, 1, 1), 0.5)
    monkeypatch.setattr(runner, 'load_classifier', lambda *args: load(*args)._replace(mean=mean))
    with pytest.raises(RunError, match=r'mean \(0\.48.*, now 0\.5, 0\.5'):
        run(assets, folder)
    monkeypatch.undo()
    assert sorted((str(path), path.stat().st_mtime_ns) for path in folder.rglob('*')) == before
    # how it is computed, where the data is, and a patch release does not matter
    other_version('numpy', '.'.join([*version('numpy').split('.')[:2], '99']))
    shutil.copytree(assets / 'images', tmp_path / 'moved')
    run(assets, folder, workers=1, data=str(tmp_path / 'moved'))


def test_grow(assets, whole, tmp_path, monkeypatch):
    '''Methods and images are added to a finished run. Only what is missing is computed, as in a run that had them.'''
    folder, computed, original = tmp_path / 'run', [], computation.Computation.run_method

    def run_method(self, method, batch, heatmaps):
        computed.extend((name, method.text) for name in batch.names)
        return original(self, method, batch, heatmaps)

    monkeypatch.setattr(computation.Computation, 'run_method', run_method)
    first = run(assets, folder, methods=METHODS[2:], limit=4)
    files = {path: path.stat().st_mtime_ns for path in folder.rglob('*.zlib')}
    assert len(computed) == 4 * 5 and len(files) == 5
    more = run(assets, folder, methods=('grad_cam', *METHODS[2:]), limit=4)
    assert {method for _, method in computed[20:]} == {'grad_cam'} and len(computed) == 24
    assert more.settings['identity']['methods'] == [*METHODS[2:], 'random', 'constant', 'gaussian', 'sobel', 'grad_cam']
    pd.testing.assert_frame_equal(more.records.loc[first.records.index], first.records, check_exact=True)

    setting_all = {'methods': ('grad_cam', *METHODS[2:]), 'limit': 7}
    with pytest.raises(RunError, match=r'limit \(4, now 3\).*1 samples'):
        evaluate(setting(assets, folder, **{**setting_all, 'limit': 3}), process=Process(), quiet=True)
    before = evaluate(setting(assets, folder, **setting_all), process=Process(), quiet=True, dry_run=True)
    assert (before.done, before.total) == (4 * 6, 7 * 6) and before.seconds > 0
    assert read_run(folder).settings == more.settings
    computed.clear()
    for rank in range(2):
        evaluate(setting(assets, folder, **setting_all), process=Process(rank, 2), quiet=True)
    seven = read_run(folder)
    assert len(computed) == 3 * 6 and not {name for name, _ in computed} & {*first.samples}
    assert seven.settings['identity']['samples'] == len(seven.samples) == 7 and len(seven.records) == 7 * 6
    assert {path: path.stat().st_mtime_ns for path in files} == files
    # images that go through the network in other batches differ in the last digits at most
    result = run(assets, folder, methods=('grad_cam', *METHODS), limit=None)
    shared = result.records.index.intersection(whole.records.index)
    assert len(result.records) == 12 * 8 and len(shared) == 12 * 7
    np.testing.assert_allclose(result.records.loc[shared, 'id'], whole.records.loc[shared, 'id'], atol=1e-5)
    for options in ({'controls': False}, {'methods': METHODS}):
        with pytest.raises(RunError, match='methods .*, now none'):
            run(assets, folder, **{'methods': ('grad_cam', *METHODS), **options})


def test_growing_is_said(assets, tmp_path, capsys):
    '''What a run grows by is said, and its command is the last one.'''
    options = {'metrics': ('conservation',), 'controls': False}
    for methods, limit in ((('random',), 2), (('random', 'sobel'), 4)):
        evaluate(setting(assets, tmp_path / 'run', methods=methods, limit=limit, **options), process=Process())
    error = capsys.readouterr().err
    assert 'grows by sobel' in error and 'grows from 2 to 4 images' in error
    assert read_run(tmp_path / 'run').settings['evaluation']['limit'] == 4


def copy_with_masks(assets, folder):
    '''Two images with masks, in a folder that may be changed.'''
    shutil.copytree(assets / 'images' / 'circle', folder)
    Image.new('L', (SIZE, SIZE), 255).save(folder / 'mask.png')
    rows = [f'{number}.png,{number % 2},mask.png' for number in range(4)]
    (folder / 'manifest.csv').write_text('\n'.join(['image,label,mask', *rows]))
    return folder


@pytest.mark.parametrize('change, batches', [
    (lambda folder: shutil.copy(folder / '0.png', folder / '3.png'), [1]),
    (lambda folder: Image.new('L', (SIZE, SIZE)).save(folder / 'mask.png'), [0, 1]),
    (lambda folder: (folder / 'manifest.csv').write_text(
        (folder / 'manifest.csv').read_text().replace('3.png,1', '3.png,2')), [1]),
], ids=['image', 'mask', 'label'])
def test_changed_file(assets, tmp_path, capsys, change, batches):
    '''An image, mask or label that was changed under the same name is found, and its batch is computed again.'''
    folder = copy_with_masks(assets, tmp_path / 'images')
    options = {
        'data': str(folder), 'methods': ('random',), 'metrics': ('insertion_deletion', 'pointing'), 'controls': False,
        'batch_size': 2,
    }
    old = run(assets, tmp_path / 'run', **options)
    files = sorted((tmp_path / 'run').rglob('*.zlib'))
    times = [path.stat().st_mtime_ns for path in files]
    change(folder)
    evaluate(setting(assets, tmp_path / 'run', **options), process=Process(), dry_run=True)
    assert 'have changed, such as ' in capsys.readouterr().err
    progress = evaluate(setting(assets, tmp_path / 'run', **options), process=Process(), quiet=True)
    assert progress.done == progress.total == 4
    assert [row for row, path in enumerate(files) if path.stat().st_mtime_ns != times[row]] == batches
    result = read_run(tmp_path / 'run')
    assert result.samples != old.samples
    assert_same(result, run(assets, tmp_path / 'fresh', **options))


@pytest.mark.parametrize('change', [
    lambda path: path.write_bytes(b''), lambda path: shutil.copy(path.with_name('0.png'), path),
], ids=['damaged', 'image'])
def test_changed_and_changed_back(assets, tmp_path, monkeypatch, change):
    '''Records of a file that was another one for a while are not left, although the run was interrupted meanwhile.'''
    folder = tmp_path / 'images'
    shutil.copytree(assets / 'images' / 'circle', folder)
    options = {'data': str(folder), 'methods': ('sobel', 'random'), 'controls': False, 'batch_size': 2}
    expected = run(assets, tmp_path / 'run', **options)
    content = (folder / '1.png').read_bytes()
    change(folder / '1.png')
    original, calls = computation.measure, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(computation, 'measure', interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(assets, tmp_path / 'run', **options)
    (folder / '1.png').write_bytes(content)
    monkeypatch.undo()
    assert_same(run(assets, tmp_path / 'run', **options), expected)


def test_replaced_by_damaged_file(assets, tmp_path):
    '''There are no records of an image that is none now, until it is there again.'''
    folder = tmp_path / 'images'
    shutil.copytree(assets / 'images' / 'circle', folder)
    options = {'data': str(folder), 'methods': ('random',), 'controls': False, 'batch_size': 1}
    expected = run(assets, tmp_path / 'run', **options)
    content = (folder / '1.png').read_bytes()
    (folder / '1.png').write_bytes(b'no image')
    result = run(assets, tmp_path / 'run', **options)
    assert result.samples['1.png'].problem and '1.png' not in result.records.index.get_level_values('sample')
    assert len(result.records) == 3
    (folder / '1.png').write_bytes(content)
    assert_same(run(assets, tmp_path / 'run', **options), expected)


def test_moved_folder(assets, whole, tmp_path, monkeypatch):
    '''A folder that was copied or moved, with other times of files, goes on without computing anything.'''
    folder, data = tmp_path / 'run', tmp_path / 'images'
    shutil.copytree(whole.folder, folder)
    shutil.copytree(assets / 'images', data, copy_function=shutil.copyfile)
    monkeypatch.setattr(computation.Computation, 'run_method', lambda *args: 1 / 0)
    assert_same(run(assets, folder, data=str(data)), whole)
    # what is not there cannot be compared, and its records stay
    (data / 'circle' / '1.png').unlink()
    (data / 'circle' / '1.png').symlink_to(data / 'nowhere.png')
    assert_same(run(assets, folder, data=str(data)), whole)


DAMAGES = {
    'empty': lambda path: path.write_bytes(b''),
    'truncated': lambda path: path.write_bytes(path.read_bytes()[:-30]),
    'other': lambda path: path.write_bytes(b'[{"sample": 1}]'),
    'other run': lambda path: shutil.copy(path.with_name(path.name.replace('00000', '00001')), path),
}


@pytest.mark.parametrize('damage', [*DAMAGES.values()], ids=[*DAMAGES])
@pytest.mark.parametrize('suffix', ['zlib', 'json'])
def test_damaged_records(assets, tmp_path, capsys, damage, suffix):
    '''Damaged files are named, and computed again.'''
    options = {'methods': ('random', 'sobel'), 'controls': False, 'limit': 8}
    expected = run(assets, tmp_path / 'run', **options)
    path = min((tmp_path / 'run').rglob(f'00000*.{suffix}'))
    damage(path)
    evaluate(setting(assets, tmp_path / 'run', **options), process=Process())
    assert path.name in capsys.readouterr().err
    result = read_run(tmp_path / 'run')
    assert result.messages == []
    assert_same(result, expected)


def test_problems(assets, tmp_path):
    '''What cannot be used is recorded with its reason, and the rest is evaluated.'''
    images = tmp_path / 'images'
    shutil.copytree(assets / 'images' / 'circle', images)
    (images / 'broken.png').write_bytes(b'no image')
    Image.fromarray(np.full((SIZE, SIZE), 255, dtype=np.uint8)).save(images / 'mask.png')
    (images / 'manifest.csv').write_text(
        'image,label,mask\n0.png,0,mask.png\n1.png,1,missing.png\n2.png,7,\nbroken.png,1,\nabsent.png,2,\n3.png,2,\n'
    )
    result = run(
        assets, tmp_path / 'run', data=str(images / 'manifest.csv'), methods=('resnet_lrp_ratio',),
        metrics=('insertion_deletion', 'pointing', 'distance'), explain_class='label',
    )
    problems = {name: sample.problem for name, sample in result.samples.items() if sample.problem}
    assert set(problems) == {'2.png', 'broken.png', 'absent.png'}
    assert '7' in problems['2.png']
    assert 'image' in problems['broken.png']
    assert 'missing' in problems['absent.png']
    assert {name for name, _ in result.records.index} == {'0.png', '1.png', '3.png'}
    assert result.samples['1.png'].notes and 'mask' in result.samples['1.png'].notes[0]
    assert result.samples['0.png'].notes == result.samples['3.png'].notes == ()
    inside, without = (result.records.loc[(name, 'resnet_lrp_ratio')] for name in ('0.png', '3.png'))
    assert inside['pointing'] == inside['pointing_chance'] == 1
    assert inside['distance'] == 0
    for name in ('pointing', 'pointing_chance', 'distance', 'distance_chance'):
        assert math.isnan(without[name])
    assert [result.samples[name].target for name in ('0.png', '1.png', '3.png')] == [0, 1, 2]
    # they count as done
    progress = evaluate(
        setting(
            assets, tmp_path / 'run', data=str(images / 'manifest.csv'), methods=('resnet_lrp_ratio',),
            metrics=('insertion_deletion', 'pointing', 'distance'), explain_class='label',
        ), process=Process(), quiet=True,
    )
    assert (progress.done, progress.total, progress.skipped) == (30, 30, 3)


@pytest.mark.parametrize('world', [1, 3])
def test_read_again(assets, whole, tmp_path, monkeypatch, world):
    '''Images that could not be read, as a disk was missing, are tried at the next start, by whichever process.'''
    images = tmp_path / 'images'
    shutil.copytree(assets / 'images', images)
    options = {'data': str(images), 'layout': 'folder'}
    missing = [images / 'circle' / '1.png', images / 'stripes' / '0.png']
    original = computation.Computation.prepare

    def prepare(*args):
        for path in missing:
            path.unlink(missing_ok=True)
        return original(*args)

    monkeypatch.setattr(computation.Computation, 'prepare', prepare)
    part = run(assets, tmp_path / 'run', **options)
    monkeypatch.undo()
    # the first batch was read before
    assert {name for name, sample in part.samples.items() if sample.problem} == {'stripes/0.png'}
    for path in missing:
        shutil.copy(assets / path.relative_to(tmp_path), path)
    # the batch is computed again as a whole
    before = evaluate(setting(assets, tmp_path / 'run', **options), process=Process(), quiet=True, dry_run=True)
    assert (before.done, before.skipped) == (8 * 7, 0)
    for rank in range(world):
        progress = evaluate(setting(assets, tmp_path / 'run', **options), process=Process(rank, world), quiet=True)
    assert (progress.done, progress.total, progress.skipped) == (12 * 7, 12 * 7, 0)
    assert_same(read_run(tmp_path / 'run'), whole)


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
    passes, pause = [], 0.06
    original = Explainer.attribute

    def attribute(self, images, targets, output, names):
        passes.append(self.method.attribution)
        if self.method.name == 'resnet_lrp_ratio' and '4.png' in names:
            raise RuntimeError('a strange image')
        if self.method.name == 'rise':
            time.sleep(pause)
        return original(self, images, targets, output, names)

    monkeypatch.setattr(Explainer, 'attribute', attribute)
    options = {'data': str(tmp_path / 'images'), 'controls': False, 'batch_size': 3, 'step': 512}
    together = run(assets, tmp_path / 'run', methods=methods, **options)
    # the image of the second block that fails is found by each method for itself
    assert {name: passes.count(name) for name in passes} == {
        'resnet_lrp_ratio': 1 + 3 * 3, 'epsilon_plus_flat+ratio': 2, 'epsilon_plus_flat': 2, 'rise:n_masks=8': 2,
        'random': 2,
    }
    # as it costs alone
    assert together.records.xs('rise:n_masks=8', level='method')['seconds'].min() >= pause / 3

    for name in methods:
        alone, times = run(assets, tmp_path / name, methods=(name,), **options).records, ['seconds', 'metric_seconds']
        same = together.records.xs(name, level='method', drop_level=False)[[*alone]]
        pd.testing.assert_frame_equal(alone.drop(columns=times), same.drop(columns=times), check_exact=True)
    for rank in range(2):
        evaluate(setting(assets, tmp_path / 'two', methods=methods, **options), process=Process(rank, 2), quiet=True)
    assert_same(read_run(tmp_path / 'two'), together)

    # a method that is missing alone computes its own maps
    store = next((tmp_path / 'run').glob('*/'))
    for name in (methods[6], methods[2]):
        for path in store.glob(f'*-{key_of(name)}.zlib'):
            path.unlink()
    passes.clear()
    assert_same(run(assets, tmp_path / 'run', methods=methods, **options), together)
    assert {name: passes.count(name) for name in passes} == {'resnet_lrp_ratio': 1 + 3, 'rise:n_masks=8': 2}

    # shared time counts once in the estimate
    for number in (5, 6):
        (store / f'00000-{key_of(methods[number])}.zlib').unlink()
    left = evaluate(setting(assets, tmp_path / 'run', methods=methods, **options), process=Process(), dry_run=True)
    kept = read_run(tmp_path / 'run').records
    costs = [kept.xs(name, level='method')[['seconds', 'metric_seconds']].mean() for name in families[3]]
    assert left.seconds == pytest.approx(3 * (sum(map(sum, costs)) - min(cost['seconds'] for cost in costs)))


def test_not_finite(assets, tmp_path, monkeypatch):
    '''Maps with NaN or infinity are recorded as a problem of the method, and others of the batch are measured.'''
    original = CompositeAttribution.propagate

    def propagate(self, inputs, *args):
        result, initial = original(self, inputs, *args)
        result[1, 0, 5, 5] = math.nan
        result[2, 0, 5, 5] = math.inf
        return result, initial

    monkeypatch.setattr(CompositeAttribution, 'propagate', propagate)
    result = run(assets, tmp_path / 'run', methods=('resnet_lrp_ratio+c3',), controls=False, limit=4)
    assert result.records['problem'].notna().tolist() == [False, True, True, False]
    for scores in (result.records['id'], result.curves['insertion'], result.heatmaps):
        assert scores.isna().tolist() == [False, True, True, False]


def test_failure(assets, tmp_path, monkeypatch):
    '''A method that fails at once is an error. One that fails later does so for the images that are the reason.'''
    original = CompositeAttribution.propagate

    def propagate(self, inputs, *args):
        if bad is None or any(torch.equal(image, bad) for image in inputs):
            raise RuntimeError('a strange\nimage')
        return original(self, inputs, *args)

    bad = None
    monkeypatch.setattr(CompositeAttribution, 'propagate', propagate)
    options = {'methods': ('resnet_lrp_ratio',), 'controls': False}
    message = r'resnet_lrp_ratio .*circle/0.png .*RuntimeError: a strange image'
    with pytest.raises(RunError, match=message):
        run(assets, tmp_path / 'first', **options)
    with pytest.raises(RunError, match='gaussian:sigma=0 .*sigma=0 '):
        run(assets, tmp_path / 'gaussian', methods=('gaussian:sigma=0',), controls=False)
    with Image.open(assets / 'images' / 'square' / '2.png') as image:
        bad = load_classifier('narrow_resnet18', str(assets / 'net.pt'), SIZE).transform(image)
    result = run(assets, tmp_path / 'later', **options)
    assert result.records['problem'].dropna().to_dict() == {
        ('square/2.png', 'resnet_lrp_ratio'): 'RuntimeError: a strange image'
    }
    assert len(result.records) == 12


def test_published_class(assets, tmp_path):
    '''Published protocols may measure the label, where ours measures the explained class.'''
    options = {'methods': ('resnet_lrp_ratio',), 'controls': False, 'labels': 'order'}
    explained = run(assets, tmp_path / 'explained', **options)
    label = run(assets, tmp_path / 'label', **options, score='label', published='label')
    both = run(assets, tmp_path / 'both', **options, published='label')
    for name in both.records.columns.drop(['problem', 'seconds', 'metric_seconds']):
        expected = label if name.endswith('_keio') else explained
        np.testing.assert_allclose(both.records[name], expected.records[name], atol=1e-6)
    wrong = sum(sample.label != sample.prediction for sample in both.samples.values())
    assert 0 < wrong < len(both.samples)


def test_accuracy(assets, whole, tmp_path):
    '''Accuracy on labels, and how these were matched, are kept with the run.'''
    correct = sum(sample.prediction == sample.label for sample in whole.samples.values())
    assert accuracy(whole) == (correct, 12) and 0 < correct < 12
    classes = {name: f'class {number}' for number, name in enumerate(CLASSES)}
    assert whole.settings['labels'] == {'matched_by': 'order', 'classes': classes}
    left_out = whole.samples['circle/0.png']._replace(problem='it is broken', prediction=None)
    assert accuracy(whole._replace(samples={**whole.samples, 'circle/0.png': left_out}))[1] == 11
    without = run(assets, tmp_path / 'run', labels='ignore', methods=('random',), controls=False, limit=1)
    assert accuracy(without) == (0, 0) and without.settings['labels']['matched_by'] == 'none'


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
    label = run(assets, tmp_path / 'label', **options, explain_class='label', score='label', published='label')
    prediction = run(assets, tmp_path / 'prediction', **options)
    for name, sample in label.samples.items():
        assert sample.label is None and sample.target == sample.prediction
        assert sample.notes == ('no label, so the prediction was used',)
        assert not prediction.samples[name].notes
    pd.testing.assert_frame_equal(
        *(each.records.drop(columns=['seconds', 'metric_seconds']) for each in (prediction, label)), check_exact=True
    )
    assert len(prediction.records) == 3


COUNTED = 'insertion_deletion', 'rise', 'c3', 'contrastive', 'accuracy', 'conservation'


@pytest.mark.parametrize('method, own, tolerance, red', [
    ('random', 0, 0, True), ('constant', 0, 0, True), ('resnet_lrp_ratio+quantize8', 1, 0, True),
    # of a map that is not computed
    ('rise:n_masks=16+c3', 0, 0.25, True),
    # like the black image in one of its channels
    ('random', 0, 0, False), ('rise:n_masks=16', 0, 0.25, False),
])
def test_counted_passes(assets, tmp_path, monkeypatch, method, own, tolerance, red):
    '''Forward passes that an estimate counts are those of the evaluation, and are not done.'''
    images, original = [], torch.nn.Conv2d._conv_forward

    def convolve(self, input, *args):
        if self.in_channels == 3 and not torch.is_grad_enabled():
            images.append(len(input))
        return original(self, input, *args)

    picture = np.array(Image.open(assets / 'images' / 'circle' / '0.png'))
    picture[..., 0] *= red
    (tmp_path / 'images').mkdir()
    Image.fromarray(picture).save(tmp_path / 'images' / '0.png')
    options = {
        'methods': (method,), 'metrics': COUNTED, 'controls': False, 'step': 200, 'data': str(tmp_path / 'images'),
    }
    monkeypatch.setattr(torch.nn.Conv2d, '_conv_forward', convolve)
    run(assets, tmp_path / 'run', **options)
    # two for loading and prediction
    done = sum(images) - 2
    images.clear()
    monkeypatch.setattr(estimate.Estimate, '_seconds', lambda self, function: function() is None)
    monkeypatch.setattr(estimate.Estimate, '_time_pass', lambda self, *args: 1.)
    monkeypatch.setattr(computation.Computation, 'attribute', lambda self, method, batch: (
        self.explainers[method.text].attribute(batch.images, batch.targets, batch.output, batch.names), 0.))
    left = evaluate(setting(assets, tmp_path / 'dry', **options), process=Process(), quiet=True, dry_run=True)
    assert left.seconds == pytest.approx(done - own, rel=tolerance) and done > 60
    assert sum(images) == 2 + own


def test_estimate_of_much(assets, tmp_path, monkeypatch):
    '''Methods and metrics of many passes, and further maps, are estimated without these, and fail as in a run.'''
    monkeypatch.setattr(estimate.Estimate, '_time_pass', lambda self, *args: 0.1)
    times = []
    for metrics in (('conservation',), ('conservation', 'class_sensitivity', 'randomization')):
        options = {'methods': ('rise', 'integrated_gradients:n_steps=1000'), 'metrics': metrics, 'compile': True}
        if len(metrics) > 1:
            options.update(compile=False)
        begin = time.perf_counter()
        left = evaluate(setting(assets, tmp_path / 'run', **options), process=Process(), quiet=True, dry_run=True)
        times.append(left.seconds)
        # it would take minutes for each image
        assert time.perf_counter() - begin < 60 < left.seconds
    assert times[1] > 2 * times[0]
    with pytest.raises(RunError, match='gaussian:sigma=0 fails on circle/0.png'):
        options = {'methods': ('gaussian:sigma=0',), 'controls': False}
        evaluate(setting(assets, tmp_path / 'run', **options), process=Process(), dry_run=True)
    assert not (tmp_path / 'run').exists()


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
        assets, tmp_path / 'run', methods=('input_x_gradient', 'rise:n_masks=8'), controls=False, limit=1, step=1024,
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
    names = result.records.columns.drop(['problem', 'seconds', 'metric_seconds'])
    np.testing.assert_allclose(result.records[names], whole.records.loc[result.records.index, names], atol=1e-5)


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


def test_no_masks(assets, tmp_path, capsys):
    '''It is said at the start that metrics of masks are not defined.'''
    options = {'methods': ('random',), 'controls': False, 'metrics': ('conservation', 'pointing')}
    evaluate(setting(assets, tmp_path / 'run', **options), process=Process(), dry_run=True)
    assert 'no masks or boxes in' in capsys.readouterr().err
    (tmp_path / 'boxes.csv').write_text(f"image,x0,y0,x1,y1\n{assets / 'images' / 'circle' / '0.png'},1,1,9,9\n")
    options = {**options, 'data': str(tmp_path / 'boxes.csv'), 'metrics': ('pointing',)}
    evaluate(setting(assets, tmp_path / 'run', **options), process=Process(), dry_run=True)
    assert 'no masks or boxes in' not in capsys.readouterr().err


def test_pictures(assets, tmp_path):
    '''Pictures and heatmaps are kept for as many images as asked for.'''
    result = run(assets, tmp_path / 'run', methods=('random',), controls=False, pictures=4)
    assert [sample.picture is not None for sample in result.samples.values()] == [True] * 4 + [False] * 8
    assert result.heatmaps.notna().tolist() == [True] * 4 + [False] * 8


def test_workers(assets, whole, tmp_path):
    '''Images read by other processes are the same.'''
    assert_same(run(assets, tmp_path / 'run', workers=2), whole)


def test_launcher_is_gone(assets, tmp_path, monkeypatch):
    '''A process whose launcher was killed stops, so that it does not compete with a new one.'''
    with pytest.raises(RunError, match='launcher'):
        run(assets, tmp_path / 'run', process=Process(0, 2, 0, launcher=1))
    monkeypatch.setenv('RANK', '2')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(RunError, match='RANK=2 does not fit WORLD_SIZE=2'):
        Process.current()
    monkeypatch.setenv('RANK', 'first')
    with pytest.raises(RunError, match="RANK='first'"):
        Process.current()


@pytest.mark.parametrize('options, message', [
    ({'methods': ('grad_camera',)}, "'grad_camera'"),
    ({'methods': ('grad_cam', '+rise')}, r"'\+rise'"),
    ({'methods': ()}, 'methods'),
    ({'methods': ('grad_cam', ' grad_cam')}, 'twice'),
    ({'methods': 'sobel'}, r"methods='sobel' is a text: give a tuple, \('sobel',\)"),
    ({'preset': ('r-rlp',)}, "preset='r-rlp'"),
    ({'methods': ('grad_cam:relu',)}, "'relu'"),
    ({'methods': ('grad_cam:colour=1',)}, "'colour'"),
    ({'methods': ('resnet_lrp_ratio:first_layer=best',)}, 'first_layer'),
    ({'methods': ('resnet_lrp_ratio:initial=best',)}, 'initial'),
    ({'methods': ('resnet_lrp_ratio+ratio',)}, "'ratio'"),
    ({'methods': ('grad_cam+blur',)}, r"'\+blur'"),
    ({'methods': ('grad_cam+quantize1',)}, '1 levels'),
    ({'methods': ('lrp_0+zennit',)}, r'lrp_0\+zennit'),
    # Captum's, though Zennit has a composite of this name
    ({'methods': ('guided_backprop+ratio',)}, "'ratio'"),
    ({'methods': ('guided_backprop:initial=logit',)}, "'initial'"),
    ({'methods': ('abn',)}, 'abn:weights=FILE'),
    ({'metrics': ('beauty',)}, "'beauty'"),
    ({'metrics': ()}, 'metrics'),
    ({'metrics': ('accuracy', 'accuracy')}, 'twice'),
    ({'metrics': ('cross',)}, 'cross'),
    ({'explain_class': 'label'}, "explain_class='label' .*'circle' is 'class 0'.* --labels order"),
    ({'published': 'label'}, "published='label'"),
    ({'explain_class': 'truth'}, "explain_class='truth'"),
    ({'step': 0}, 'step=0'),
    ({'step': True}, 'step=True'),
    ({'step': 1025, 'metrics': ('conservation', 'c3')}, 'step=1025 .*1024 pixels'),
    ({'size': 14, 'metrics': ('rise',)}, 'step=224 .*196 pixels'),
    ({'limit': math.nan}, 'limit=nan'),
    ({'percents': ()}, r'percents=\(\)'),
    ({'percents': '50'}, "percents='50'"),
    ({'percents': ('50',)}, "unlike '50'"),
    ({'percents': (math.nan,)}, 'unlike nan'),
    ({'percents': (50, 0.01), 'metrics': ('conservation', 'pointing')}, '0.01.*1024 pixels'),
    ({'pictures': -3}, 'pictures=-3'),
    ({'percents': (10, 200)}, 'unlike 200'),
    ({'percents': (0, 10)}, 'unlike 0'),
    ({'metrics': ('pointing', 'distance')}, 'no masks or boxes in .*, which the metrics pointing, distance need'),
    ({'device': 'abacus'}, "device 'abacus'"),
    ({'data': 'nowhere'}, 'nowhere'),
])
def test_errors(assets, tmp_path, options, message):
    '''What is wrong is said before anything is written.'''
    with pytest.raises(ValueError, match=message) as info:
        run(assets, tmp_path / 'run', **options)
    assert '\n' not in str(info.value)
    assert not (tmp_path / 'run').exists()


def test_settings_are_json(whole):
    '''Settings can be read by other programs.'''
    settings = json.loads((whole.folder / 'settings.json').read_text())
    assert settings == whole.settings
    assert settings['data'] == os.path.abspath(settings['evaluation']['data'])
    assert settings['classes'] == [f'class {number}' for number in range(3)]
    assert settings['identity']['options']['step'] == 512
    assert settings['installed']['torch'].startswith(settings['identity']['versions']['torch'])
