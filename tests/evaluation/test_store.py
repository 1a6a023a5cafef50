'''The files of a run: what is written is read, each file is complete or not there, and other runs are refused.'''
import json
import os
import signal

import numpy as np
import pandas as pd
import pytest

from captum_adapters.evaluation import records as store_records
from captum_adapters.evaluation.records import Record, RunError, SampleRecord, key_of, read_run
from captum_adapters.evaluation.store import Store, differences

pytestmark = pytest.mark.once

IDENTITY = {'methods': ['a', 'b'], 'samples': 7, 'files': {}, 'options': {'step': 500}}
NAMES = ['x.png', 'y.png', 'ä.png', 'a', 'b', 'c', 'd']
SETTINGS = {'format': 2, 'fingerprint': 'f', 'identity': IDENTITY, 'installed': {}, 'batch_size': 2}


@pytest.fixture
def store(tmp_path):
    '''A run without records.'''
    return Store(tmp_path / 'run', SETTINGS, NAMES)


def file_of(batch, method='a'):
    '''Name of a file of records.'''
    return f'{batch:05d}-{key_of(method)}.zlib'


def records(*names, problem=None, heatmap=True, **scores):
    '''Records of samples. The last one may have a problem.'''
    heatmap = np.arange(-127, 128, dtype=np.int8).reshape(15, 17) if heatmap else None
    curve, found = np.array([0., 0.1, 1 / 3], np.float32), []
    for number, name in enumerate(names):
        reason = problem if number == len(names) - 1 else None
        values = {'problem': reason, 'seconds': 0.25, 'metric_seconds': 0.75}
        if reason is None:
            values.update((key, column[number]) for key, column in scores.items())
            found.append(Record(name, values, {'fractions': curve, 'short': 2 * curve[:1]}, heatmap))
        else:
            found.append(Record(name, values))
    return found


def test_round_trip(store):
    '''Everything is read as it was written, to the last digit, sorted by sample and method.'''
    sample = SampleRecord('x.png', 1, 2, 3, 0.1 + 0.2, None, ('no mask', 'ä'), b'\xff\x00jpeg')
    skipped = SampleRecord('y.png', problem='it is no image')
    store.write_samples(0, [sample, skipped], ['1', '2'])
    found = {'id': [0.1 + 0.2, 1e-300], 'pointing': [float('nan'), 1.]}
    store.write_records(0, 'a', records('x.png', 'ä.png', **found))
    store.write_records(0, 'b', records('x.png', 'ä.png', problem='the map has NaN', heatmap=False, gap=[0.5]))
    run = read_run(store.folder)
    assert run.settings == SETTINGS and run.messages == []
    assert run.samples == {'x.png': sample, 'y.png': skipped}
    assert list(run.records.index) == [('x.png', 'a'), ('x.png', 'b'), ('ä.png', 'a'), ('ä.png', 'b')]
    assert run.records['id'].tolist()[::2] == found['id'] and run.records['id'].isna().tolist() == [0, 1, 0, 1]
    assert run.records['gap'].tolist()[1] == 0.5
    assert run.records['problem'].fillna('').tolist() == ['', '', '', 'the map has NaN']
    assert run.curves.loc[('x.png', 'a'), 'fractions'].tolist() == np.float32([0, 0.1, 1 / 3]).tolist()
    assert run.curves.loc[('x.png', 'a'), 'short'].shape == (1,)
    assert pd.isna(run.curves.loc[('ä.png', 'b'), 'fractions'])
    np.testing.assert_array_equal(run.heatmaps['x.png', 'a'], records('x.png')[0].heatmap)
    assert run.heatmaps['x.png', 'a'].dtype == np.int8 and run.heatmaps['x.png', 'b'] is None
    assert store.read_times('a') == (0.25, 0.75) and store.has(0, 'b') and not store.has(1, 'a')
    assert store.read_samples(0) == ([sample, skipped], ['1', '2']) and store.read_samples(1) is None


def test_each_file_is_read_once(store, monkeypatch):
    '''A run is read, and found to be complete, by opening each file once; its arrays are not copied for each sample.'''
    opened = []

    def watch(path, mode):
        opened.append(str(path))
        return open(path, mode)

    monkeypatch.setattr(store_records, 'open', watch, raising=False)
    for batch, names in enumerate(store.batches):
        for method in 'ab':
            store.write_records(batch, method, records(*names, id=[0.5] * len(names)))
    curves = read_run(store.folder).curves
    files = sorted(str(path) for path in store.records.glob('*.zlib'))
    assert len(files) == 8 and sorted(opened) == files
    # what samples have in common is there once
    assert curves.loc[('x.png', 'a'), 'fractions'] is curves.loc[('y.png', 'a'), 'fractions']
    store.write_records(0, 'a', [
        Record(name, {'problem': None, 'id': 0.5}, {'insertion': np.float32([row, 1])})
        for row, name in enumerate(store.batches[0])
    ])
    first, second = read_run(store.folder).curves['insertion'].dropna()
    assert first.tolist() == [0, 1] and second.tolist() == [1, 1] and first.base is second.base is not None
    opened.clear()
    other = Store(store.folder, SETTINGS, NAMES)
    for _ in range(2):
        assert all(other.has(batch, method) for batch in range(4) for method in 'ab')
    assert sorted(opened) == files


def test_killed_while_writing(store):
    '''What a process was writing when it was killed is not there, and what was written before is.'''
    pid = os.fork()
    if not pid:
        try:
            store.write_records(0, 'a', records('a'))
            os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
            store.write_records(1, 'a', records('b'))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    left = [path.name for path in store.records.iterdir() if path.name.startswith('.')]
    assert len(left) == 1 and left[0].startswith(f'.{file_of(1)[:-5]}')
    run = read_run(store.folder)
    assert list(run.records.index) == [('a', 'a')] and run.messages == [] and not store.has(1, 'a')


def test_full_disk(store):
    '''If the disk is full, what was written is kept, nothing incomplete is left, and the message says how to go on.'''
    resource = pytest.importorskip('resource')
    store.write_records(0, 'a', records('a'))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(RunError) as info:
            store.write_records(1, 'a', records('b'))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert str(store.records) in str(info.value) and '\n' not in str(info.value)
    assert sorted(path.name for path in store.records.iterdir()) == [file_of(0), 'batches.json']
    store.write_records(1, 'a', records('b'))
    assert len(read_run(store.folder).records) == 2


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write everywhere')
def test_read_only(store):
    '''A folder that cannot be written is an error, but can be read.'''
    store.write_records(0, 'a', records('a'))
    store.records.chmod(0o500)
    try:
        with pytest.raises(RunError, match=str(store.records)):
            store.write_records(1, 'a', records('b'))
        assert len(read_run(store.folder).records) == 1
    finally:
        store.records.chmod(0o700)


def test_no_folder(tmp_path):
    '''A folder that cannot be made is an error.'''
    (tmp_path / 'file').write_text('')
    with pytest.raises(RunError, match=str(tmp_path / 'file' / 'run')):
        Store(tmp_path / 'file' / 'run', SETTINGS, NAMES)


@pytest.mark.parametrize('text', [None, '[]', '{', json.dumps({'fingerprint': 'f', 'identity': IDENTITY})])
def test_no_run(tmp_path, text):
    '''A folder without a run, or with one of an earlier version, is an error.'''
    if text is not None:
        (tmp_path / 'settings.json').write_text(text)
    with pytest.raises(RunError, match=str(tmp_path)) as info:
        read_run(tmp_path)
    assert '\n' not in str(info.value)
    assert ('earlier version' in str(info.value)) == (text is not None and 'fingerprint' in text)
    if text is not None:
        with pytest.raises(RunError, match=str(tmp_path)):
            Store(tmp_path, SETTINGS, NAMES)


def test_other_run_with_mosaics(tmp_path):
    '''Mosaics forbid further samples, and do not hide which settings differ.'''
    identity = {**IDENTITY, 'metrics': ['grid_pointing']}
    settings = {**SETTINGS, 'identity': identity}
    Store(tmp_path / 'run', settings, NAMES)
    with pytest.raises(RunError, match=r'samples \(7, now 8\), which mosaics'):
        Store(tmp_path / 'run', settings, [*NAMES, 'more'])
    other = {'fingerprint': 'g', 'identity': {**identity, 'options': {'step': 100}}}
    with pytest.raises(RunError, match=r'differs in step \(500, now 100\): choose'):
        Store(tmp_path / 'run', {**SETTINGS, **other}, NAMES)


def test_growth(store):
    '''Methods and samples are added, in batches of their own; files of a method are its own in any order.'''
    assert store.batches == [['x.png', 'y.png'], ['ä.png', 'a'], ['b', 'c'], ['d']]
    store.write_records(3, 'b', records('d', id=[0.5]))
    identity = {**IDENTITY, 'methods': ['c', 'b', 'a'], 'samples': 9}
    grown = Store(store.folder, {**SETTINGS, 'identity': identity}, ['0', *NAMES, '1'])
    assert grown.batches == [*store.batches, ['0', '1']] and len(grown.messages) == 2
    assert grown.settings['identity']['methods'] == ['a', 'b', 'c'] and grown.has(3, 'b')
    run = read_run(store.folder)
    assert run.settings == grown.settings and list(run.records.index) == [('d', 'b')]
    again = Store(store.folder, {**SETTINGS, 'identity': identity}, ['0', *NAMES, '1'])
    assert again.batches == grown.batches and again.messages == []
    with pytest.raises(RunError, match=r'samples \(9, now 7\).*2 samples .*such as 0'):
        Store(store.folder, {**SETTINGS, 'identity': identity}, NAMES)


def test_method_without_records(store):
    '''A method that was never computed, as it has failed, can be left out or replaced.'''
    store.write_records(0, 'a', records('x.png', id=[0.5]))
    settings = {**SETTINGS, 'identity': {**IDENTITY, 'methods': ['a', 'c']}}
    changed = Store(store.folder, settings, NAMES)
    assert changed.settings['identity']['methods'] == ['a', 'c'] and changed.has(0, 'a')
    assert read_run(store.folder).settings == changed.settings


@pytest.mark.parametrize('place', [0, 2, 100, -1])
def test_changed_byte(store, place):
    '''A file with any other byte than was written is damaged.'''
    store.write_records(0, 'a', records('x.png', id=[0.5]))
    path = store.records / file_of(0)
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)
    other = Store(store.folder, SETTINGS, NAMES)
    assert not other.has(0, 'a') and path.name in other.messages[0]
    run = read_run(store.folder)
    assert not len(run.records) and path.name in run.messages[0]


def test_differences():
    '''Differences are named in one line.'''
    text = differences(
        {'a': 1, 'b': ['1', '2'], 'c': {'d': 1, 'e': 2}, 'gone': 'x' * 100},
        {'a': 2, 'b': ['2', '1'], 'c': {'d': 1, 'e': 3}, 'new': 0}, sign=', now ',
    )
    parts = ['a (1, now 2)', 'b (1, 2, now 2, 1)', 'e (2, now 3)', f"gone ({'x' * 59}…, now None)"]
    assert text == ', '.join([*parts, 'new (None, now 0)'])
