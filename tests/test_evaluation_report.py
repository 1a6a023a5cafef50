'''Reports say what is in the records: hand-made runs of which all means, tests and pictures are known.'''
import csv
import doctest
import io
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captum_adapters.cli import select_methods
from captum_adapters.evaluation import page as page_module
from captum_adapters.evaluation import report as report_module
from captum_adapters.evaluation import tables
from captum_adapters.evaluation.measures import COLUMNS
from captum_adapters.evaluation.presets import PRESETS, Preset
from captum_adapters.evaluation.records import Record, Run, SampleRecord
from captum_adapters.evaluation.report import summarize
from captum_adapters.metrics import bootstrap_interval

SETTINGS = {
    'data': 'data', 'layout': 'folder', 'manifest': 'm1', 'model': 'resnet50', 'weights_hash': 'w1',
    'classes': ['tench', 'church'], 'options': {'step': 500, 'initial': 'softmax'}, 'dtype': 'float32',
    'versions': {'torch': '2.4'}, 'command': 'python -m captum_adapters evaluate --data data --out run',
}


def build(scores, folder='run', seconds=0.5, curves=None, pictures=False, problems=None, samples=None, **settings):
    '''A run from, for each method, either a list of its primary scores or lists of scores by column.'''
    records = {}
    for method, columns in scores.items():
        columns = columns if isinstance(columns, dict) else {'id': columns}
        for number in range(len(next(iter(columns.values())))):
            name = f'{number:03d}.jpg'
            values = {key: float(column[number]) for key, column in columns.items() if column[number] is not None}
            heatmap = np.zeros((8, 8), np.int8)
            heatmap[number % 8] = 127
            lines = {} if curves is None else curves(number)
            records[name, method] = Record(
                name, method, None, values, lines, heatmap if pictures else None, seconds
            )
    for (name, method), reason in (problems or {}).items():
        records[name, method] = Record(name, method, reason, {}, {})
    names = sorted({name for name, _ in records})
    known = {
        name: SampleRecord(name, number % 2, number % 2, 0, 0.5, picture=jpeg(number) if pictures else None)
        for number, name in enumerate(names)
    }
    known.update(samples or {})
    settings = {**SETTINGS, 'samples': len(known), 'methods': list(scores), **settings}
    return Run(Path('/runs') / folder, settings, dict(sorted(known.items())), dict(sorted(records.items())), [])


def jpeg(number):
    '''A grey picture.'''
    buffer = io.BytesIO()
    Image.new('RGB', (16, 12), (10 * number,) * 3).save(buffer, 'JPEG', quality=95)
    return buffer.getvalue()


def report(*runs, **kwargs):
    '''A report with few resamples, as exact tests need no more.'''
    return summarize(runs, **{'n_resamples': 200, **kwargs})


def row(result, name):
    '''A row by its name.'''
    found, = [row for row in result.rows if row.name == name]
    return found


def read_csv(text):
    '''Rows of a CSV file by method.'''
    return {line['method']: line for line in csv.DictReader(io.StringIO(text))}


def test_means():
    '''Means are exact, each score has its own examples, and intervals are those of the bootstrap.'''
    values = [0.1, 0.2, 0.4, 0.5]
    run = build(
        {'grad_cam': {'id': values, 'pointing': [0.25, math.nan, 0.75, None], 'gap': [math.inf, 1, 2, 3]}},
        problems={('zzz.jpg', 'grad_cam'): 'the map has NaN or infinity'},
    )
    result = report(run)
    found = row(result, 'grad_cam')
    assert found.mean('id') == math.fsum(values) / 4
    interval = bootstrap_interval(values, n_resamples=200)
    assert found.statistics['id'][1:] == (float(interval.low), float(interval.high), 4)
    assert found.statistics['pointing'].mean == 0.5 and found.statistics['pointing'].num_examples == 2
    assert found.statistics['gap'].mean == 2 and found.statistics['gap'].num_examples == 3
    assert math.isnan(found.mean('deletion'))
    assert any('grad_cam: 1 infinite' in message for message in result.messages)
    assert len(found.records) == 4 and found.problems == {'zzz.jpg': 'the map has NaN or infinity'}
    assert found.seconds == 0.5
    assert result.columns == ('id', 'pointing', 'gap')
    assert 'Pointing is defined for 2 of 4 examples.' in result.table()
    line = read_csv(result.table('csv'))['grad_cam']
    assert float(line['id mean']) == found.mean('id') and line['id examples'] == '4'
    assert float(line['id high']) == found.statistics['id'].high
    assert (line['kind'], line['examples'], line['problems']) == ('baseline', '4', '1')


def test_order():
    '''In which order, and by how many processes records were written does not matter to the last digit.'''
    generator = random.Random(0)
    scores = {name: [generator.uniform(-1, 1) * 10 ** generator.randint(-9, 9) for _ in range(40)] for name in 'ab'}
    run = build({'grad_cam': scores['a'], 'resnet_lrp_ratio': scores['b'], 'random': scores['b'][::-1]})
    items = list(run.records.items())
    generator.shuffle(items)
    parts = [run._replace(records=dict(items[start::3])) for start in range(3)]
    expected = report(run)
    for other in (report(run._replace(records=dict(items))), report(*parts, run)):
        assert other.table('csv') == expected.table('csv')
        assert other.significance == expected.significance
        assert other.rows == expected.rows
    assert expected.rows[0].mean('id') == float(math.fsum(scores['a']) / 40)


def test_merge():
    '''Other methods and further samples are put together, also if the data is somewhere else.'''
    first = build({'grad_cam': [0.1, 0.2], 'random': [0, 0]}, 'one')
    further = build({'grad_cam': [9, 9, 0.6], 'random': [0, 0, 0.3]}, 'two', manifest='m2')
    further = further._replace(records={key: value for key, value in further.records.items() if key[0] == '002.jpg'})
    broken = {'001.jpg': SampleRecord('001.jpg', problem='?')}
    assert len(report(first, build({'rise': [0.3]}, 'two', manifest='m2', data='./data/')).groups) == 1
    elsewhere = build({'rise': [0.3, 0.5]}, 'three', data='/mnt/data', samples=broken)
    result = report(first, further, elsewhere)
    assert len(result.groups) == 1 and result.groups[0].name == 'one + two + three'
    assert [found.name for found in result.rows] == ['grad_cam', 'rise', 'random']
    assert row(result, 'grad_cam').mean('id') == pytest.approx(0.3, abs=1e-15)
    assert list(row(result, 'grad_cam').records) == ['000.jpg', '001.jpg', '002.jpg']
    # the problem of a sample in one run is none if it was solved in another
    assert result.groups[0].samples['001.jpg'].problem is None
    compared = [(item.method, item.num_examples) for item in result.significance[0].results]
    assert compared == [('grad_cam', 2), ('random', 2)]
    message, = [message for message in result.messages if 'same examples' in message]
    assert 'rise 2 of 3' in message and 'grad_cam' not in message


def test_merge_samples():
    '''Runs that explain other classes of the same examples are warned of, and what is noted in any is kept.'''
    first = build({'grad_cam': [0.1, 0.2, 0.3]}, 'one')
    known = [*first.samples.values()]
    other = [known[0]._replace(label=None, notes=('no label',)), known[1]._replace(label=None, target=0), known[2]]
    second = build({'rise': [0.3, 0.5, 0.6]}, 'two', samples={sample.sample: sample for sample in other})
    result = report(first, second)
    assert result.warnings[:2] == (
        'The runs of one + two differ in the explained class of 1 of 3 examples (001.jpg), so methods of different runs'
        ' are not compared on the same grounds there.',
        'The runs of one + two differ in the label of 2 of 3 examples (000.jpg, 001.jpg), so methods of different runs'
        ' are not compared on the same grounds there.',
    )
    assert result.groups[0].samples['000.jpg'] == known[0]._replace(notes=('no label',))
    # one that could not be read in a run has no class there
    broken = {'000.jpg': SampleRecord('000.jpg', problem='?')}
    assert not report(first, build({'rise': [0.3, 0.5, 0.6]}, 'two', samples=broken)).warnings


def test_merge_metrics():
    '''Scores of further metrics are added; of those that contradict, the first are used, and they are counted.'''
    first = build({'grad_cam': {'id': [0.1, 0.2, math.nan]}}, 'one', metrics=['insertion_deletion'])
    second = build({'grad_cam': {'id': [0.1, 0.7, math.nan], 'pointing': [0.5, 1, 0]}}, 'two', metrics=['pointing'])
    result = report(first, second)
    assert row(result, 'grad_cam').scores('id') == {'000.jpg': 0.1, '001.jpg': 0.2}
    assert row(result, 'grad_cam').mean('pointing') == 0.5
    assert [message for message in result.messages if '1 examples have other scores' in message]
    assert not [message for message in report(first, first).messages if 'other scores' in message]
    # a record without problems replaces one with
    broken = build({}, 'three', problems={('000.jpg', 'grad_cam'): 'NaN'})
    found = row(report(broken, first), 'grad_cam')
    assert not found.problems and found.scores('id') == {'000.jpg': 0.1, '001.jpg': 0.2}


def test_names():
    '''The same method in another way is another row, with as much of the folder as is needed, and it is said why.'''
    first = build({'grad_cam': [0.1, 0.2], 'rise': [0, 0]}, 'a/run')
    second = build({'grad_cam': [0.3, 0.4]}, 'b/run', versions={'torch': '2.5'})
    result = report(first, second)
    assert [found.name for found in result.rows] == ['grad_cam (a/run)', 'rise', 'grad_cam (b/run)']
    assert [found.mean('id') for found in result.rows] == [pytest.approx(0.15), 0, pytest.approx(0.35)]
    message, = [message for message in result.messages if 'differ' in message]
    assert message == (
        'a/run and b/run differ in versions.torch (2.4; 2.5): methods of both are shown for each, grad_cam.'
    )
    assert len(result.groups) == 1 and result.significance[0].baseline == 'grad_cam (b/run)'
    # files that only another method uses make no difference
    files = build({'grad_cam': [0.3, 0.4], 'abn:weights=x/abn.pt': [1, 1]}, 'c', identity={'files': {'abn.pt': '12'}})
    assert [found.name for found in report(first, files).rows] == ['grad_cam', 'rise', 'abn:weights=x/abn.pt']
    files = build({'grad_cam': [0.3, 0.4]}, 'c', identity={'files': {'m': '12'}})
    assert [found.name for found in report(first, files).rows] == ['grad_cam', 'rise']
    # those of other networks do for all methods, also if their names are without folders, as in earlier runs
    cross = [
        build({'grad_cam': [number, 0]}, f'c{number}', identity={'cross': ['vgg16=x/vgg.pt'], 'files': {name: value}})
        for number, (name, value) in enumerate((('vgg.pt', '12'), ('x/vgg.pt', '12'), ('x/vgg.pt', '34')))
    ]
    assert len(report(*cross[:2]).rows) == 1
    assert [found.name for found in report(*cross).rows] == ['grad_cam (c0)', 'grad_cam (c2)']


def test_not_comparable():
    '''Runs that differ in data, network or options are shown side by side, and never compared.'''
    first = build({'grad_cam': [0.1, 0.2], 'random': [0, 0]}, 'one')
    second = build({'grad_cam': [0.8, 0.9], 'random': [2, 2]}, 'two', options={'step': 100, 'initial': 'softmax'})
    third = build({'grad_cam': [0.5, 0.5]}, 'three', data='other', manifest='m3')
    result = report(first, second, third)
    assert [group.name for group in result.groups] == ['one', 'two', 'three']
    assert [found.name for found in result.rows] == [
        'grad_cam (one)', 'random (one)', 'grad_cam (two)', 'random (two)', 'grad_cam (three)'
    ]
    assert result.warnings[:2] == (
        'Rows of two can not be compared with those of one: the runs differ in options.step (500; 100).',
        'Rows of three can not be compared with those of one: the runs differ in data (data; other).',
    )
    assert [(item.group, item.baseline) for item in result.significance] == [
        (0, 'grad_cam (one)'), (1, 'grad_cam (two)')
    ]
    # each has its own best method, and its own controls
    table = result.results()[0]
    assert [title for title, _ in table.sections] == [
        'one: methods', 'one: controls', 'two: methods', 'two: controls', 'three: methods'
    ]
    assert [[cell[1].mark for cell in rows] for _, rows in table.sections] == [
        ['best'], [''], ['best'], ['above'], ['best']
    ]
    assert not any('one' in warning and 'random' in warning for warning in result.warnings)
    assert any('random (two) (2.000) is better than 1 of 1 methods' in warning for warning in result.warnings)
    assert all(name in result.text() for name in ('one: methods', 'ID compared with grad_cam (two) (two)'))


def test_significance():
    '''The best baseline, exact p-values, and Holm's correction, each on the examples that both have.'''
    base = [0.3, 0.1, 0.2, 0.3, 0.1, 0.2]
    run = build({
        'resnet_lrp_ratio': [value + 0.5 for value in base] + [9],
        'grad_cam': [*base, math.nan],
        'score_cam+quantize8': [value - 0.05 * (number % 2) for number, value in enumerate(base)] + [math.nan],
        'epsilon_plus+ratio': [value + 0.4 for value in base] + [9],
        'random': [math.nan, *(value - 0.2 for value in base[1:]), 9],
        'gaussian': [5, 5, 5, 5, 5, 5, 5],
    })
    result = report(run)
    item, = result.significance
    # neither ours nor a control
    assert item.baseline == 'grad_cam' and item.column == 'id'
    found = {entry.method: entry for entry in item.results}
    assert list(found) == ['resnet_lrp_ratio', 'score_cam+quantize8', 'epsilon_plus+ratio', 'random', 'gaussian']
    assert found['resnet_lrp_ratio'].difference == pytest.approx(0.5)
    assert found['resnet_lrp_ratio'].num_examples == 6
    assert found['resnet_lrp_ratio'].baseline_mean == pytest.approx(0.2)
    assert found['random'].difference == pytest.approx(-0.2)
    assert found['random'].num_examples == 5 and found['random'].baseline_mean == pytest.approx(0.18)
    # of 64 signs, two are as extreme; a difference in three of six examples has 2 of 8
    report_exact = report(run, n_resamples=9999)
    exact = {entry.method: entry for entry in report_exact.significance[0].results}
    assert exact['resnet_lrp_ratio'].p_value == 2 / 64 and exact['resnet_lrp_ratio'].p_holm == 5 * 2 / 64
    assert exact['score_cam+quantize8'].p_value == 2 / 8 and exact['score_cam+quantize8'].p_holm == 2 / 8
    lines = list(csv.DictReader(io.StringIO(report_exact._significance_csv())))
    assert [line['method'] for line in lines] == list(found) and float(lines[0]['p_holm']) == 0.15625
    assert float(lines[0]['low']) == exact['resnet_lrp_ratio'].low
    text = report_exact.text()
    assert 'ID compared with grad_cam' in text and 'Paired differences to grad_cam (0.200)' in text
    assert re.search(r'^resnet_lrp_ratio +6 +0\.700 +0\.500 \[0\.500, 0\.500\] +0\.156$', text, re.M)


def test_baseline():
    '''Another baseline by name, and another score, for which less may be better.'''
    run = build({
        'grad_cam': {'id': [0.5, 0.6], 'deletion': [0.3, 0.4]},
        'rise': {'id': [0.4, 0.5], 'deletion': [0.1, 0.1]},
        'sobel': {'id': [0.1, 0.1], 'deletion': [0.9, 0.9]},
    })
    assert report(run).significance[0].baseline == 'grad_cam'
    assert report(run, primary='deletion').significance[0].baseline == 'rise'
    assert report(run, baseline='sobel').significance[0].baseline == 'sobel'
    with pytest.raises(ValueError, match="baseline='lime' is not among the methods grad_cam, rise, sobel"):
        report(run, baseline='lime')
    with pytest.raises(ValueError, match="primary='pointing' .* There are deletion, id"):
        report(run, primary='pointing')
    # without any method of others
    ours = report(build({'resnet_lrp_ratio': [0.1, 0.2], 'random': [0, 0], 'sobel': [0.3, 0.3]}))
    assert ours.significance[0].baseline == 'sobel'
    assert any('best control' in message for message in ours.messages)
    # without the usual score
    other = report(build({'rise': {'pointing': [0.1, 0.2], 'gap': [1, 1]}, 'random': {'pointing': [0, 0]}}))
    assert other.primary == 'pointing' and any('compared by pointing' in message for message in other.messages)
    disjoint = build({'rise': [0.1, math.nan], 'random': [math.nan, 0.2]})
    assert not report(disjoint).significance
    assert any('random has id of no example that rise has' in message for message in report(disjoint).messages)
    # the best of few examples
    few = build({'rise': [0.9] + 4 * [math.nan], 'grad_cam': [0.8, 0.3, 0.3, math.nan, math.nan], 'random': 5 * [0.1],
                 'score_cam': [0.7, 0.2, 0.2, 0.2, 0.2]})
    assert report(few).significance[0].baseline == 'grad_cam'
    assert report(few, baseline='rise').significance[0].results[0].num_examples == 1


FLATTERED = {
    'resnet_lrp_ratio': {'id': [0.3], 'id_keio': [0.33], 'tied_share': [0.0]},
    'resnet_lrp_ratio+quantize8': {'id': [0.2], 'id_keio': [0.8], 'tied_share': [0.97]},
    'grad_cam': {'id': [0.25], 'id_keio': [0.4], 'tied_share': [0.0]},
    'constant': {'id': [0.0], 'id_keio': [0.81], 'tied_share': [1.0]},
    'random': {'id': [0.01], 'id_keio': [0.02], 'tied_share': [0.0]},
}


def test_warnings():
    '''Sentences on what a published protocol flatters, with the figures.'''
    code = 'published code of Otsuki et al. 2024'
    assert report(build(FLATTERED)).warnings == (
        f'Controls in ID, {code}: constant (0.810) is better than 3 of 3 methods, up to resnet_lrp_ratio+quantize8'
        ' (0.800).',
        f'resnet_lrp_ratio+quantize8: 97.0 % of pixels are tied with others, and ID is 0.800 by the {code}, 0.200 by'
        ' our protocol, a difference of 0.600.',
        f'constant: 100.0 % of pixels are tied with others, and ID is 0.810 by the {code}, 0.000 by our protocol, a'
        ' difference of 0.810.',
        f'2 of 3 methods change their rank in ID from our protocol to the {code}: resnet_lrp_ratio+quantize8 from 3 to'
        ' 1, resnet_lrp_ratio from 1 to 3.',
        f'resnet_lrp_ratio+quantize8 is better than resnet_lrp_ratio in ID by the {code} (0.800 and 0.330), but not by'
        ' our protocol (0.200 and 0.300).',
    )


@pytest.mark.parametrize('columns, titles', [
    (('pointing',), 'Pointing is the mean'), (('accuracy', 'distance'), 'Accuracy, Distance are means'),
    (('cross_accuracy', 'pointing', 'distance'), 'Cross accuracy, Pointing, Distance are means'),
])
@pytest.mark.parametrize('suffix', ['', '_magnitude'])
def test_top_warnings(columns, titles, suffix):
    '''The top pixels are said to be a matter of chance where they are tied.'''
    scores = {
        name: {**{column: [0.5] for column in columns}, 'tied_share': [0.0], f'tied_share{suffix}': [share]}
        for name, share in (('resnet_lrp_ratio', 0.0), ('resnet_lrp_ratio+quantize8', 0.97), ('grad_cam', 0.04))
    }
    warning, = report(build(scores)).warnings
    assert warning.startswith('resnet_lrp_ratio+quantize8: 97.0 % of pixels are tied with others')
    assert titles in warning
    # older runs do not have the share
    for columns in scores.values():
        columns.pop('tied_share')
        columns.pop('tied_share_magnitude', None)
    assert report(build(scores)).warnings == ()


def test_no_warnings():
    '''What is not the case is not said; it depends on the records alone.'''
    scores = {name: {key: list(value) for key, value in columns.items()} for name, columns in FLATTERED.items()}
    scores['resnet_lrp_ratio+quantize8'].update(id_keio=[0.1], tied_share=[0.04])
    scores['constant'].update(id_keio=[0.0], tied_share=[0.0])
    scores['grad_cam'].update(id_keio=[0.32])
    assert report(build(scores)).warnings == ()
    scores['random']['id'] = [0.22]
    warning, = report(build(scores)).warnings
    assert warning == (
        'Controls in ID, our protocol: random (0.220) is better than 1 of 3 methods, up to resnet_lrp_ratio+quantize8'
        ' (0.200).'
    )
    # better by both protocols
    scores['random']['id'] = [0.01]
    scores['resnet_lrp_ratio+quantize8'].update(id=[0.31], id_keio=[0.8])
    assert report(build(scores)).warnings == ()
    negative = {'grad_cam': {'distance': [0.2, 0.4], 'negative': [1, 0]}, 'sobel': {'distance': [0.1, 0.2]}}
    first, second = report(build(negative)).warnings
    assert 'Distance, our protocol: sobel (0.150) is better than 1 of 1 methods, up to grad_cam (0.300)' in first
    assert second.startswith('grad_cam: 50.0 % of its maps have no positive value')
    messages = report(build({'abn:weights=a.pt': [0.1], 'random': [0]})).messages
    assert 'abn:weights=a.pt: explained and measured with its own network.' in messages


def test_clusters():
    '''Whole classes are resampled, and few are warned of.'''
    scores = [0.1, 0.9, 0.15, 0.85, 0.05, 0.95]
    run = build({'grad_cam': scores, 'rise': [0.0] * 6})
    apart, together = report(run), report(run, clusters='class')
    expected = bootstrap_interval(scores, [0, 1] * 3, n_resamples=200)
    assert together.rows[0].statistics['id'][1:3] == (float(expected.low), float(expected.high))
    assert together.rows[0].mean('id') == apart.rows[0].mean('id')
    assert together.rows[0].statistics['id'] != apart.rows[0].statistics['id']
    assert together.significance[0].results[0].num_clusters == 2
    assert apart.significance[0].results[0].num_clusters == 6
    assert any('2 classes' in warning for warning in together.warnings)
    assert report(run, clusters='none').rows == apart.rows
    without = {name: sample._replace(label=None) for name, sample in run.samples.items()}
    result = report(run._replace(samples=without), clusters='class')
    assert result.rows[0].statistics['id'][:3] == pytest.approx(apart.rows[0].statistics['id'][:3])
    assert any('no labels' in message for message in result.messages)
    with pytest.raises(ValueError, match="clusters='label'"):
        report(run, clusters='label')


def test_terminal():
    '''Plain text that fits, in tables by protocol with ours first, of which all cells are there.'''
    long = 'resnet_lrp_ratio:projection=literal,coverage=literal,first_layer=ones,maxpool=avg2x2+quantize8'
    generator = np.random.default_rng(0)
    scores = {
        name: {key: generator.normal(size=5) for key in COLUMNS} for name in (long, 'grad_cam', 'random', 'constant')
    }
    run = build(scores, samples={'bad.jpg': SampleRecord('bad.jpg', problem='cannot be decoded: ' + 'very ' * 40)})
    result = report(run)
    text = result.text()
    assert max(map(len, text.splitlines())) <= 100
    titles = [line for line in text.splitlines() if line.startswith(('Insertion and', 'Top', 'Ties', 'Conserv'))]
    assert titles == [
        'Insertion and deletion, our protocol', 'Insertion and deletion, published code of Otsuki et al. 2024',
        'Insertion and deletion, published code of RISE', 'Insertion and deletion, text of C³-LRP', 'Top pixels',
        'Conservation', 'Ties',
    ]
    squeezed = re.sub(r'[\s–-]+', '', text)
    for table in result.results():
        shown = [cell.text for _, rows in table.sections for cells in rows for cell in cells[1:]]
        assert all(re.sub(r'[\s–-]+', '', cell) in squeezed for cell in shown)
    first = text.index('first_layer=ones')
    assert text.index('projection=literal') < first < text.index('maxpool=avg2x2')
    # the best of the two methods in each column, whatever controls have
    starred = sorted(float(number) for number in re.findall(r'\*(-?\d\S*)', text[:text.index('Insertion and', 10)]))
    means = {name: [scores[method][name].mean() for method in (long, 'grad_cam')] for name in COLUMNS}
    best = [max(means[name]) for name in ('insertion', 'id')] + [min(means['deletion'])]
    assert starred == pytest.approx(sorted(best), abs=5e-4)


def test_marks():
    '''The best method is marked in all formats, several if equal, and controls that are as good.'''
    result = report(build({
        'grad_cam': {'id': [0.5, 0.5], 'deletion': [0.5, 0.5]}, 'rise': {'id': [0.5, 0.5], 'deletion': [0.25, 0.25]},
        'constant': {'id': [0.5, 0.5], 'deletion': [0.3, 0.3]}, 'random': {'id': [0.1, 0.1], 'deletion': [0.1, 0.1]},
    }))
    markdown = tables.RENDERERS['markdown'](result.results()[0])
    lines = {line.split('|')[1].strip(): line for line in markdown.splitlines() if line.startswith('|')}
    assert lines['grad_cam'] == '| grad_cam | 0.500 [0.500, 0.500] | **0.500 [0.500, 0.500]** |'
    assert lines['rise'] == '| rise | **0.250 [0.250, 0.250]** | **0.500 [0.500, 0.500]** |'
    assert lines['constant'] == '| constant | 0.300 [0.300, 0.300] | 0.500 [0.500, 0.500] ! |'
    assert lines['random'] == '| random | 0.100 [0.100, 0.100] ! | 0.100 [0.100, 0.100] |'
    latex = result.table('latex')
    assert 'rise & \\textbf{0.250 [0.250, 0.250]} & \\textbf{0.500 [0.500, 0.500]} \\\\' in latex
    assert 'random & 0.100 [0.100, 0.100] ! & 0.100' in latex
    terminal = result.table()
    assert re.search(r'^rise +\*0\.250 \S+ \S+ +\*0\.500', terminal, re.M)
    assert re.search(r'^random +!0\.100 \S+ \S+ +0\.100', terminal, re.M)
    assert '<td class=number><strong>0.250' in tables.to_html(result.results()[0])
    with pytest.raises(ValueError, match="format='html' is not one of terminal, markdown, latex, csv"):
        result.table('html')
    with pytest.raises(ValueError, match="format='latex'"):
        result.text('latex')


def test_latex():
    '''Everything that LaTeX would take for a command is escaped, and rows have as many cells as columns.'''
    cells = (tables.Cell('[a]_b&50%#{x}^~\\<>$'), tables.Cell('-0.5 [-1.0, –]'))
    text = tables.RENDERERS['latex'](tables.Table('ID ↑ 10 %', ('Method', 'C³'), (('', (cells,)),)))
    row, = [line for line in text.splitlines() if '[a]' in line]
    assert row == (
        '{}[a]\\_b\\&50\\%\\#\\{x\\}\\textasciicircum{}\\textasciitilde{}\\textbackslash{}$<$$>$\\$'
        ' & $-$0.5 [$-$1.0, --] \\\\'
    )
    assert '\\caption{ID $\\uparrow$ 10 \\%.' in text and text.isascii()
    greek = tables.RENDERERS['latex'](tables.Table('LRP-αβ (2, −1)', ('Method',), (('', ()),)))
    assert '\\caption{LRP-$\\alpha$$\\beta$ (2, $-$1).' in greek
    for preset in PRESETS.values():
        assert report(build({'grad_cam': [0.1]}), presets=[preset]).table('latex').isascii()
    for part in ('table', 'tabular'):
        assert text.count(f'\\begin{{{part}}}') == text.count(f'\\end{{{part}}}') == 1


def test_markdown():
    '''Cells are not broken by what is in them.'''
    cells = (tables.Cell('a|b *c* <i>\nd'), tables.Cell('[x](y)'))
    line = tables.RENDERERS['markdown'](tables.Table('T', ('A', 'B'), (('', (cells,)),))).splitlines()[-1]
    assert line == '| a\\|b \\*c\\* \\<i> d | [x]\\(y) |'


@pytest.mark.parametrize('value, like, text', [
    (0.12345, None, '0.123'), (-0.0001, 0.5, '0.000'), (-0.5, None, '-0.500'), (12.345, None, '12.35'),
    (123.45, None, '123.5'), (50176.2, None, '50176'), (1e-5, None, '1.00e-05'), (2.5e9, None, '2.50e+09'),
    (0.0, None, '0.000'), (math.nan, None, '–'), (1.5, 1e-7, '1.50e+00'),
])
def test_numbers(value, like, text):
    '''Numbers have the digits that matter.'''
    assert tables.format_number(value, like) == text


def test_preset():
    '''The figures of a paper are beside those by its protocol and ours.'''
    preset = Preset(
        'Table 1', 'On other data.', {'grad_cam': 'Grad-CAM', 'rise': 'RISE', 'lrp_0': 'LRP'}, (), {},
        {'grad_cam': {'id_keio': 0.371}, 'lrp_0': {'id_keio': 0.011}}, ('id_keio', 'accuracy'),
    )
    grad_cam = {'id': [0.25, 0.25], 'id_keio': [0.5, 0.3], 'accuracy': [1, 0]}
    run = build({'grad_cam': grad_cam, 'rise': {'id': [0.1, 0.1]}})
    result = report(run, presets=[preset])
    table, = result.printed()
    assert table.title == 'Table 1' and table.note == 'On other data.'
    assert table.header == (
        'Method', 'ID ↑ printed', 'ID ↑ here, as published', 'ID ↑ here, our protocol', 'Accuracy ↑ here, our protocol'
    )
    assert [[cell.text for cell in cells] for cells in table.sections[0][1]] == [
        ['Grad-CAM: grad_cam', '0.371', '0.400', '0.250', '0.500'],
        ['RISE: rise', '–', '–', '0.100', '–'],
        ['LRP: lrp_0', '0.011', '–', '–', '–'],
    ]
    assert 'Grad-CAM: grad_cam' in result.table() and 'On other data.' in result.table('latex')
    assert report(run).printed() == []
    # by the name in the settings
    named = report(run._replace(settings={**run.settings, 'preset': 'lrp-for-resnet-table1'}))
    assert named.presets == (PRESETS['lrp-for-resnet-table1'],)
    shown = {cells[0].text: [cell.text for cell in cells[1:]] for cells in named.printed()[0].sections[0][1]}
    printed = named.presets[0].printed['grad_cam']['id_keio']
    assert shown['Grad-CAM: grad_cam'][-3:] == [f'{printed:.3f}', '0.400', '0.250']
    several = ['lrp-for-resnet-table1', 'c3-lrp-table1']
    two = report(run._replace(settings={**run.settings, 'preset': several}))
    assert [table.title for table in two.printed()] == [PRESETS[name].title for name in several]
    unknown = report(run._replace(settings={**run.settings, 'preset': ['x']}))
    assert unknown.presets == () and any('preset x' in message for message in unknown.messages)


def test_classes():
    '''The best and worst class, for figures of single classes.'''
    preset = Preset('Figure', '', {}, (), {}, {}, ('distance',), True)
    run = build({'grad_cam': {'distance': [0.25, 0.5, 0.25, 1.0]}, 'sobel': {'distance': [1, 0, 1, 0]}})
    table, = report(run, presets=[preset]).classes()
    assert [[cell.text for cell in cells] for _, rows in table.sections for cells in rows] == [
        ['grad_cam', 'tench', '0.250 (2)', 'church', '0.750 (2)'],
        ['sobel', 'church', '0.000 (2)', 'tench', '1.000 (2)'],
    ]
    assert not report(run, presets=[preset._replace(by_class=False)]).classes()


def test_problems():
    '''Whatever was left out is counted by reason, with a few examples.'''
    samples = {f'x{number}.jpg': SampleRecord(f'x{number}.jpg', problem='cannot be decoded') for number in range(7)}
    samples['000.jpg'] = SampleRecord('000.jpg', 0, notes=('no mask',))
    run = build(
        {'grad_cam': [0.1, 0.2], 'rise': [0.1, 0.2]}, problems={('001.jpg', 'rise'): 'NaN'}, samples=samples
    )
    run = run._replace(settings={**run.settings, 'samples': 12}, messages=['rank0.sqlite is damaged'])
    result = report(run)
    table, = result.problems()
    assert [[cell.text for cell in cells] for cells in table.sections[0][1]] == [
        ['left out', 'cannot be decoded', 'x0.jpg, x1.jpg, x2.jpg, x3.jpg, x4.jpg, …', '7'],
        ['no values of rise', 'NaN', '001.jpg', '1'], ['note', 'no mask', '000.jpg', '1'],
    ]
    assert result.messages[:3] == (
        'run: rank0.sqlite is damaged', 'run is not complete: 9 of 12 samples are evaluated.',
        '7 of 9 samples of run are left out, for the reasons under Problems.',
    )
    many = {f'{number}': SampleRecord(f'{number}', problem=f'reason {number}') for number in range(30)}
    rows = report(build({'rise': [0.1]}, samples=many)).problems()[0].sections[0][1]
    assert len(rows) == 21 and [cell.text for cell in rows[-1]] == ['others', '10 other reasons', '', '10']
    assert not report(build({'rise': [0.1]})).problems()


def test_gaps():
    '''What is missing is said of each run by its name, samples as well as methods.'''
    methods = ['grad_cam', 'rise', 'random']
    first = build({'grad_cam': [0.1, 0.2]}, 'a/run', methods=methods)
    second = build({'grad_cam': [0.1]}, 'b/run', methods=methods[:1], options={'step': 100})
    runs = [run._replace(settings={**run.settings, 'samples': 9}) for run in (first, second)]
    assert report(*runs).messages[:3] == (
        'a/run is not complete: 2 of 9 samples are evaluated.', 'a/run has no records of rise, random.',
        'b/run is not complete: 1 of 9 samples are evaluated.',
    )
    part = select_methods(first, {'grad_cam', 'lime'})
    assert [message for message in report(part).messages if 'no records' in message] == [
        'run has no records of random.'
    ]


def curves(number):
    '''Curves at positions that depend on the example.'''
    middle = (number + 1) / 10
    mask = math.nan if number == 1 else 1
    return {
        name: np.array(values, np.float32) for name, values in {
            'fractions': [0, middle, 1], 'insertion': [0, middle, 1], 'deletion': [1, 1 - middle, 0],
            'percents': [1, 50, 100], 'accuracy': [0, number % 2, 1], 'pointing': [mask, mask, mask * 0.5],
            'pointing_ceiling': [0, 0, 0] if number == 1 else [1, 1, 0.5], 'distance': [0, 0, 0.1 * mask],
            'cross_accuracy:a/b': [0, 1, 1],
        }.items()
    }


def test_curves():
    '''Curves of different positions are interpolated to common ones, and examples without are left out.'''
    run = build({'grad_cam': [0.1, 0.2, 0.3], 'random': [0, 0, 0]}, curves=curves)
    found = report(run).rows[0]
    names, values, positions = page_module._collect(found, 'insertion', 'fractions')
    assert names == ['000.jpg', '001.jpg', '002.jpg'] and values.shape == (3, 101)
    assert values == pytest.approx(np.tile(np.linspace(0, 1, 101), (3, 1)), abs=1e-6) and positions[-1] == 1
    names, values, positions = page_module._collect(found, 'pointing', 'percents')
    assert names == ['000.jpg', '002.jpg']
    assert values.tolist() == [[1, 1, 0.5]] * 2 and positions.tolist() == [1, 50, 100]
    assert page_module._collect(found, 'nothing', 'percents')[0] == []
    # examples of other lengths
    shorter = dict(found.records)
    shorter['000.jpg'] = shorter['000.jpg']._replace(
        curves={'fractions': np.array([0, 1], np.float32), 'insertion': np.array([0, 1], np.float32)}
    )
    _, values, _ = page_module._collect(found._replace(records=shorter), 'insertion', 'fractions')
    assert values[0] == pytest.approx(values[1], abs=1e-6)


def test_drawing(monkeypatch):
    '''Lines are the means of all examples, methods differ, controls are grey, and chance is there.'''
    drawn = []
    monkeypatch.setattr(page_module.Canvas, 'savefig', lambda canvas, target, **kwargs: drawn.append(canvas))
    methods = {name: [0.1, 0.2, 0.3] for name in ('grad_cam', 'rise', 'resnet_lrp_ratio')}
    scores = {name: {'id': values, 'pointing_chance': [0.5, None, 0.5]} for name, values in methods.items()}
    run = build({**scores, 'random': {'id': [0, 0, 0]}}, curves=curves)
    figures = page_module.draw_curves(report(run))
    assert list(figures) == ['insertion_deletion', 'accuracy', 'pointing', 'distance', 'cross_accuracy_a_b']
    assert len(drawn) == 5
    insertion, deletion = drawn[0].axes
    assert [axes.get_title() for axes in drawn[0].axes] == ['Insertion', 'Deletion']
    for line in insertion.get_lines():
        assert line.get_ydata() == pytest.approx(np.linspace(0, 1, 101), abs=1e-6)
    assert deletion.get_lines()[0].get_ydata() == pytest.approx(np.linspace(1, 0, 101), abs=1e-6)
    styles = [(line.get_color(), line.get_linestyle()) for line in insertion.get_lines()]
    assert len(set(styles)) == 4 and styles[-1] == ('0.45', ':')
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ['grad_cam (0.200)', 'rise (0.200)', 'resnet_lrp_ratio (0.200)', 'random (0.000)']
    accuracy = drawn[1].axes[0].get_lines()[0]
    assert accuracy.get_xdata().tolist() == [1, 50, 100] and accuracy.get_ydata() == pytest.approx([0, 1 / 3, 1])
    labels = [text.get_text() for text in drawn[2].legends[0].get_texts()]
    assert labels[-2:] == ['chance', 'ceiling']
    assert drawn[2].axes[0].get_lines()[-2].get_ydata() == [0.5, 0.5]
    assert drawn[2].axes[0].get_lines()[-1].get_ydata().tolist() == [1, 1, 0.5]


def test_examples():
    '''The best, median and worst example by the primary score, with heatmaps of the size of the picture.'''
    scores = {'grad_cam': {'deletion': [0.3, 0.1, 0.5, 0.2, 0.4]}, 'random': {'deletion': [0] * 5}}
    run = build(scores, pictures=True)
    found, notes = page_module.find_examples(report(run, primary='deletion'))
    (method, examples), = found
    assert method.name == 'grad_cam' and not notes
    assert [(item.rank, item.sample, item.score) for item in examples] == [
        ('best', '001.jpg', 0.1), ('median', '000.jpg', 0.3), ('worst', '002.jpg', 0.5)
    ]
    assert [item.explained for item in examples] == ['church', 'tench', 'tench']
    for item in examples:
        number = int(item.sample[:3])
        assert item.picture.shape == item.overlay.shape == (12, 16, 3)
        assert abs(int(item.picture[0, 0, 0]) - 10 * number) <= 2
        # the row of the map that is not zero
        red = item.overlay[..., 0].astype(int) - item.overlay[..., 2]
        assert abs(red.mean(1).argmax() - (number + 0.5) * 12 / 8) <= 1.5
    # of two there is no median, and without pictures there is nothing
    two = build({'grad_cam': [0.1, 0.2]}, pictures=True)
    assert [item.rank for item in page_module.find_examples(report(two))[0][0][1]] == ['best', 'worst']
    part = two._replace(samples={**two.samples, '001.jpg': two.samples['001.jpg']._replace(picture=None)})
    found, notes = page_module.find_examples(report(part))
    assert [item.sample for item in found[0][1]] == ['000.jpg'] and '1 of 2 examples' in notes[0]
    found, notes = page_module.find_examples(report(build({'grad_cam': [0.1, 0.2]})))
    assert not found and notes == ['Pictures and heatmaps of grad_cam were not kept.']
    assert page_module.draw_montage(report(build({'grad_cam': [0.1, 0.2]}))) is None
    many = {f'rise:seed={number}': [number / 10, 0] for number in range(10)}
    found, notes = page_module.find_examples(report(build(many, pictures=True)))
    assert [method.name for method, _ in found] == [f'rise:seed={number}' for number in range(2, 10)]
    assert notes == ['The 8 best of 10 methods are shown.']


class Checker(HTMLParser):
    '''Collect tags, and check that they are closed in order.'''
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text = [], [], ''

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ('meta', 'img', 'wbr'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page():
    '''One page that needs nothing else, with alternatives for pictures, in which nothing is taken for markup.'''
    evil = '<script>alert("&")</script>'
    run = build(
        {'grad_cam': [0.1, 0.2, 0.3], 'random': [0, 0, 0]}, curves=curves, pictures=True, command=f'evaluate {evil}',
        samples={evil: SampleRecord(evil, problem=evil)}, classes=[evil, 'church'],
    )
    result = report(run)
    page = page_module.make_page(result, page_module.draw_curves(result))
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    tags = [tag for tag, _ in checker.tags]
    assert 'script' not in tags and 'link' not in tags and checker.text.count(evil) >= 4
    images = [attrs for tag, attrs in checker.tags if tag == 'img']
    assert len(images) == 5 + 6
    assert all(attrs['src'].startswith(('data:image/png;base64,', 'data:image/jpeg;base64,')) for attrs in images)
    assert all(attrs['alt'] for attrs in images)
    targets = {attrs['id'] for _, attrs in checker.tags if 'id' in attrs}
    links = [attrs['href'] for tag, attrs in checker.tags if tag == 'a']
    assert links and all(link[0] == '#' and link[1:] in targets for link in links)
    assert targets >= {'settings', 'results', 'messages', 'significance', 'curves', 'examples', 'problems'}
    assert not re.search(r'(?:src|href)=.?https?:|url\(|@import', page)
    assert all(attrs.get('scope') for tag, attrs in checker.tags if tag == 'th')
    assert 'best: 0.300' in checker.text and '0.200 [' in checker.text


def test_write(tmp_path):
    '''The same records give the same files.'''
    runs = [
        build({'grad_cam': [0.1, 0.2, 0.3], 'random': [0, 0, 0]}, curves=curves, pictures=True),
        build({'grad_cam': [0.1, 0.2, 0.3]}, 'two', curves=curves, model='resnet18'),
    ]
    paths = report(*runs).write(tmp_path / 'a' / 'b')
    assert sorted(path.name for path in paths) == sorted(path.name for path in (tmp_path / 'a' / 'b').iterdir())
    names = [path.name for path in paths]
    assert names[:6] == ['report.html', 'report.md', 'table.md', 'table.csv', 'table.tex', 'significance.csv']
    assert names[-1] == 'montage.png' and 'curves_accuracy_1.png' in names and 'curves_accuracy_2.png' in names
    for path in paths:
        if path.suffix == '.png':
            with Image.open(path) as image:
                image.load()
                assert min(image.size) > 50
    assert (tmp_path / 'a/b/table.md').read_text(encoding='utf-8') == report(*runs).table('markdown')
    again = report(*runs).write(tmp_path / 'c')
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]
    # a report is replaced
    assert report(*runs).write(tmp_path / 'c') == again
    # bytes in paths that are no text
    odd = [
        build({'grad_cam': [0.1, 0.2]}, f'odd\udcff{step}', curves=curves, options={'step': step}, data='data\udcff')
        for step in (1, 2)
    ]
    report(*odd).write(tmp_path / 'd')
    page = (tmp_path / 'd' / 'report.html').read_text(encoding='utf-8')
    assert 'odd\\udcff1' in page and 'data?' in page


@pytest.mark.parametrize('methods', [{}, {'grad_cam': [0.5]}, {'random': [0.5, 0.1]}, {'grad_cam': [math.nan]}])
def test_little(tmp_path, methods):
    '''Runs without records, or with a single one, are reported too.'''
    result = report(build(methods, pictures=True))
    assert not result.significance
    text = result.text()
    assert ('There are no records to report.' in text) == (not methods)
    assert result.messages if len(methods.get('random', ())) != 2 else not result.significance
    paths = result.write(tmp_path)
    page = paths[0].read_text(encoding='utf-8')
    assert ('There are no records to report.' in page) == (not methods)
    assert len(read_csv(paths[3].read_text(encoding='utf-8'))) == len(methods)
    assert 'Traceback' not in text and result.table('latex')
    if not methods:
        assert 'run has no records.' in result.messages


def test_no_runs():
    '''There must be a run.'''
    with pytest.raises(ValueError, match='There are no runs'):
        report()


def test_documentation():
    '''The example runs.'''
    results = doctest.testmod(report_module)
    assert results.attempted > 0 and results.failed == 0


def test_many_curves(monkeypatch):
    '''Of many methods, the best ten are drawn, and all controls.'''
    def curves(number):
        return {name: np.linspace(0, 1, 3) for name in ('fractions', 'insertion', 'deletion')}

    names = ['grad_cam', *(f'resnet_lrp_ratio+quantize{number}' for number in range(2, 13)), 'random', 'constant']
    scores = {name: [number / 20, number / 20 + 0.01] for number, name in enumerate(names)}
    drawn, original = [], page_module.plot_curves

    def plot_curves(curves, *args, **kwargs):
        drawn.extend(curves)
        return original(curves, *args, **kwargs)

    monkeypatch.setattr(page_module, 'plot_curves', plot_curves)
    page_module.draw_curves(report(build(scores, curves=curves)))
    assert drawn == 2 * names[2:]
