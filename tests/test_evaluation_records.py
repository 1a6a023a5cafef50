'''Tests for the files of an evaluation: what is written is read, whatever happened to the rest.'''
import os
import sqlite3
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from captum_adapters.evaluation.records import (
    Record,
    RunError,
    SampleRecord,
    Writer,
    differences,
    fingerprint,
    open_run,
    read_done,
    read_run,
    read_times,
)

IDENTITY = {'methods': ['a', 'b'], 'options': {'step': 500}}
KEY = fingerprint(IDENTITY)
SETTINGS = {'fingerprint': KEY, 'identity': IDENTITY}


@pytest.fixture
def folder(tmp_path):
    '''A run without records.'''
    open_run(tmp_path / 'run', SETTINGS)
    return tmp_path / 'run'


def record(sample='x.png', method='a', **fields):
    '''A record.'''
    curve = np.array([0., 0.1, 1 / 3], dtype=np.float32)
    values = {'id': 0.1 + 0.2, 'pointing': float('nan'), 'deletion': 1e-300}
    heatmap = np.arange(-127, 128, dtype=np.int8).reshape(15, 17)
    return Record(**{**{
        'sample': sample, 'method': method, 'problem': None, 'values': values,
        'curves': {'fractions': curve, 'insertion': curve * 2, 'short': curve[:1]}, 'heatmap': heatmap,
        'seconds': 0.25, 'metric_seconds': 0.75,
    }, **fields})


def write(folder, *rows, rank=0, commit=True, key=KEY):
    '''Write records or samples by a process of its own.'''
    writer = Writer(folder, rank, key)
    for row in rows:
        (writer.add_sample if isinstance(row, SampleRecord) else writer.add)(row)
    if commit:
        writer.commit()
    writer.close()
    return writer


def test_round_trip(folder):
    '''Everything is read as it was written.'''
    sample = SampleRecord('x.png', 1, 2, 3, 0.1, None, ('no mask', 'ä'), b'jpeg')
    skipped = SampleRecord('y.png', problem='it is no image')
    failed = record(method='b', problem='the map has NaN', values={}, curves={}, heatmap=None)
    write(folder, sample, record(), failed, skipped)
    run = read_run(folder)
    assert run.settings == SETTINGS
    assert run.samples == {'x.png': sample, 'y.png': skipped}
    result = run.records['x.png', 'a']
    expected = record()
    assert result[:3] == expected[:3]
    assert str(result.values) == str(expected.values)
    assert list(result.curves) == list(expected.curves)
    for name, curve in expected.curves.items():
        np.testing.assert_array_equal(result.curves[name], curve)
    np.testing.assert_array_equal(result.heatmap, expected.heatmap)
    assert result.heatmap.dtype == np.int8
    assert run.records['x.png', 'b'] == failed
    assert run.messages == []
    assert read_done(folder, KEY) == ({'y.png'}, {('x.png', 'a'), ('x.png', 'b')}, [])
    assert read_times(folder, KEY) == {'a': (0.25, 0.75), 'b': (0.25, 0.75)}


def test_order(folder):
    '''Records are sorted, and each is counted once, whoever wrote it.'''
    write(folder, record('b'), record('a'), rank=1)
    write(folder, record('c'), record('a', 'b'), record('a'), rank=0)
    run = read_run(folder)
    assert list(run.records) == [('a', 'a'), ('a', 'b'), ('b', 'a'), ('c', 'a')]
    assert run.messages == [
        '1 records are in more than one file, as processes of an earlier start were still running: each is counted once'
    ]


def test_replace(folder):
    '''What is written again replaces what was written, and a sample that could be read at last has no problem.'''
    write(folder, record(seconds=1.), SampleRecord('x.png', problem='missing'))
    write(folder, record(seconds=2.), SampleRecord('y.png', problem='missing'))
    write(folder, SampleRecord('x.png', 1), rank=1)
    write(folder, SampleRecord('z.png', 2))
    write(folder, SampleRecord('z.png', problem='missing'), rank=1)
    run = read_run(folder)
    assert run.samples['z.png'] == SampleRecord('z.png', 2)
    assert run.records['x.png', 'a'].seconds == 2.
    assert run.samples['x.png'].problem is None
    assert run.samples['y.png'].problem == 'missing'
    assert read_done(folder, KEY)[0] == {'y.png'}


def test_commit(folder):
    '''Only what is committed is kept.'''
    write(folder, record('a'))
    write(folder, record('b'), commit=False)
    assert list(read_run(folder).records) == [('a', 'a')]


def test_killed_while_writing(folder):
    '''What a process was writing when it was killed is dropped, and what was committed before is kept.'''
    script = textwrap.dedent(f'''
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from pathlib import Path
        from test_evaluation_records import KEY, Writer, record
        writer = Writer(Path({str(folder)!r}), 0, KEY)
        writer.add(record("a"))
        writer.commit()
        # beyond the cache, so that pages are in the file
        writer._connection.execute("PRAGMA cache_size = 1")
        for number in range(200):
            writer.add(record(f"b{{number}}"))
        os.kill(os.getpid(), signal.SIGKILL)
    ''')
    process = subprocess.run([sys.executable, '-c', script], check=False)
    assert process.returncode == -9
    assert (folder / 'records-00000.sqlite-journal').exists()
    assert list(read_run(folder).records) == [('a', 'a')]
    assert write(folder, record('c')).messages == []
    assert list(read_run(folder).records) == [('a', 'a'), ('c', 'a')]


def test_in_use(folder):
    '''A file that another process still writes to is left alone.'''
    first = Writer(folder, 0, KEY)
    first.add(record('a'))
    first.commit()
    second = write(folder, record('b'))
    assert second.path.name == 'records-00000-1.sqlite'
    assert 'records-00000.sqlite is in use' in second.messages[0]
    assert list(read_run(folder).records) == [('a', 'a'), ('b', 'a')]
    first.add(record('c'))
    first.commit()
    first.close()
    assert list(read_run(folder).records) == [('a', 'a'), ('b', 'a'), ('c', 'a')]
    # now it is free again
    assert write(folder, record('d')).path.name == 'records-00000.sqlite'


def damage(path, how):
    '''Damage a file.'''
    content = bytearray(path.read_bytes())
    if how == 'truncated':
        content = content[:len(content) // 2]
    elif how == 'header':
        content[:100] = b'x' * 100
    elif how == 'tail':
        content[-len(content) // 3:] = b'\xff' * (len(content) // 3 + 1)
    else:
        content = bytearray()
    path.write_bytes(content)


@pytest.mark.parametrize('how', ['truncated', 'header', 'tail', 'empty'])
def test_damaged(folder, how):
    '''A damaged file is reported and read as far as possible, and the rest is evaluated again.'''
    every = [record(f'{number:03}.png') for number in range(100)]
    path = write(folder, *every).path
    write(folder, record('other.png'), rank=1)
    damage(path, how)
    run = read_run(folder)
    assert ('other.png', 'a') in run.records
    assert len(run.records) < 101
    _, done, messages = read_done(folder, KEY)
    if how != 'empty':
        assert len(run.messages) == len(messages) == 1
        assert path.name in messages[0]
    kept = path.read_bytes()
    again = write(folder, *(elem for elem in every if (elem.sample, 'a') not in done))
    if how == 'empty':
        assert again.path == path
    else:
        assert again.path != path
        assert f'{path.name} is damaged' in again.messages[0]
        assert path.read_bytes() == kept
    assert len(read_run(folder).records) == 101


def test_locked(folder, monkeypatch):
    '''A file that can not be read as it is locked is left out with a message.'''
    path = write(folder, record('a')).path
    write(folder, record('b'), rank=1)
    monkeypatch.setattr('captum_adapters.evaluation.records.TIMEOUT', 0.1)
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute('BEGIN EXCLUSIVE')
    run = read_run(folder)
    assert list(run.records) == [('b', 'a')]
    assert 'records-00000.sqlite can not be read (database is locked)' in run.messages[0]
    connection.close()
    assert len(read_run(folder).records) == 2


def test_full_disk(folder):
    '''If the disk is full, what was committed is kept, and the message says how to go on.'''
    writer = Writer(folder, 0, KEY)
    writer.add(record('a'))
    writer.commit()
    pages = writer._connection.execute('PRAGMA page_count').fetchone()[0]
    writer._connection.execute(f'PRAGMA max_page_count = {pages + 2}')
    message = r'cannot write to .*run \(database or disk is full\): what was written before'
    with pytest.raises(RunError, match=message) as info:
        for number in range(1000):
            writer.add(record(f'b{number}'))
            if number % 10 == 9:
                writer.commit()
    assert '\n' not in str(info.value)
    writer.close()
    count = len(read_run(folder).records)
    assert count >= 1
    write(folder, record('c'))
    assert len(read_run(folder).records) == count + 1


@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root may write everywhere')
def test_read_only(folder):
    '''A folder that can not be written is an error, but can be read.'''
    write(folder, record('a'))
    folder.chmod(0o500)
    try:
        with pytest.raises(RunError, match='cannot write to'):
            Writer(folder, 1, KEY)
        assert list(read_run(folder).records) == [('a', 'a')]
    finally:
        folder.chmod(0o700)


def test_read_only_file(folder, monkeypatch):
    '''So is a file that can not be written, also for root, and it is not taken for a damaged one.'''
    write(folder, record('a'))
    connect = sqlite3.connect

    def read_only(path, **options):
        return connect(f'{path.as_uri()}?mode=ro', uri=True, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, 'connect', read_only)
        message = r'cannot write to .*run \(attempt to write a readonly database\): what was written before is kept'
        with pytest.raises(RunError, match=message) as info:
            Writer(folder, 0, KEY)
    assert '\n' not in str(info.value)
    assert [path.name for path in folder.glob('*.sqlite')] == ['records-00000.sqlite']
    assert list(read_run(folder).records) == [('a', 'a')]


def test_not_writable(tmp_path):
    '''A folder that can not be made is an error.'''
    (tmp_path / 'file').write_text('')
    with pytest.raises(RunError, match='cannot write to'):
        open_run(tmp_path / 'file' / 'run', SETTINGS)


def test_no_run(tmp_path):
    '''A folder without a run is an error, which says what is expected.'''
    with pytest.raises(RunError, match='holds no run: give a folder that evaluate --out has written'):
        read_run(tmp_path)
    (tmp_path / 'settings.json').write_text('[]')
    with pytest.raises(RunError, match='not written by evaluate'):
        read_run(tmp_path)
    (tmp_path / 'settings.json').write_text('{')
    with pytest.raises(RunError, match='cannot read'):
        read_run(tmp_path)


def test_other_run(folder):
    '''Another run is refused, and a file of another run is left out.'''
    other = {'methods': ['a'], 'options': {'step': 100}}
    with pytest.raises(RunError, match=r'differs in methods \(now without b\), step \(500, now 100\): choose another'):
        open_run(folder, {'fingerprint': fingerprint(other), 'identity': other})
    write(folder, record('a'), rank=3, key='other')
    run = read_run(folder)
    assert run.records == {}
    assert run.messages == ['records-00003.sqlite is left out, as it is of another run']
    assert write(folder, record('a'), rank=3).path.name == 'records-00003-1.sqlite'


def test_fingerprint():
    '''The order of keys does not matter, but everything else does.'''
    assert fingerprint({'a': 1, 'b': [1, 2]}) == fingerprint({'b': [1, 2], 'a': 1})
    assert len({fingerprint(value) for value in ({'a': 1}, {'a': 2}, {'b': 1}, {'a': [1, 2]}, {'a': [2, 1]})}) == 5


def test_differences():
    '''Differences are named in one line.'''
    text = differences(
        {'identity': {'a': 1, 'b': [1, 2], 'c': {'d': 1, 'e': 2}, 'gone': 'x' * 100}},
        {'identity': {'a': 2, 'b': [2, 1], 'c': {'d': 1, 'e': 3}, 'new': 0}},
    )
    assert text == (
        f"a (1, now 2), b (now in another order), e (2, now 3), gone ({'x' * 57}..., now None), new (None, now 0)"
    )
