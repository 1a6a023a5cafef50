'''Reports say what is in the records: hand-made runs whose means, tests and pictures are all known.'''
import csv
import io
import math
import random
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from helpers.evaluation import jpeg, make_run
from PIL import Image

from captum_adapters.cli import select_methods
from captum_adapters.evaluation import COLUMNS, PRESETS, SampleRecord, summarize
from captum_adapters.evaluation.presets import Preset
from captum_adapters.evaluation.report import figures, tables
from captum_adapters.metrics import bootstrap_interval

pytestmark = pytest.mark.once


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


def has(texts, *parts):
    '''Whether one of the texts has all parts.'''
    return any(all(part in text for part in parts) for text in texts)


def cells(table):
    '''Texts of a table.'''
    return table.frame.values.tolist()


# -- means and merging -------------------------------------------------------------------------------------------------

def test_means():
    '''Means are exact, each score has its own examples, and intervals are those of the bootstrap.'''
    values = [0.1, 0.2, 0.4, 0.5]
    run = make_run(
        {'grad_cam': {'id': values, 'pointing': [0.25, math.nan, 0.75, math.nan], 'gap': [math.inf, 1, -2, 3]}},
        problems={('zzz.jpg', 'grad_cam'): 'the map has NaN or infinity'},
    )
    result = report(run)
    found = row(result, 'grad_cam')
    interval = bootstrap_interval(values, n_resamples=200)
    assert found.statistics.loc['id'].tolist() == [math.fsum(values) / 4, interval.low, interval.high, 4]
    assert found.statistics.loc['pointing'].tolist()[::3] == [0.5, 2]
    # gains and losses do not cancel
    assert found.statistics.loc['gap'].tolist()[::3] == [2, 3]
    assert found.statistics.loc['gap_largest'].tolist()[::3] == [3, 3]
    assert math.isnan(found.mean('deletion'))
    assert has(result.messages, 'grad_cam: 1 infinite')
    assert len(found.scores) == 4 and found.problems == {'zzz.jpg': 'the map has NaN or infinity'}
    assert found.seconds == 0.5
    assert result.columns == ('id', 'pointing', 'gap', 'gap_largest')
    assert 'Pointing is defined for 2 of 4 images.' in ' '.join(result.table().split())
    line = read_csv(result.table('csv'))['grad_cam']
    assert float(line['id mean']) == found.mean('id') and line['id examples'] == '4'
    assert float(line['id high']) == interval.high
    assert (line['kind'], line['examples'], line['problems']) == ('baseline', '4', '1')


def test_order():
    '''In which order, and by how many processes records were written does not matter to the last digit.'''
    generator = random.Random(0)
    scores = {name: [generator.uniform(-1, 1) * 10 ** generator.randint(-9, 9) for _ in range(40)] for name in 'ab'}
    run = make_run({'grad_cam': scores['a'], 'resnet_lrp_ratio': scores['b'], 'random': scores['b'][::-1]})
    mixed = run.records.sample(frac=1, random_state=0)
    parts = [run._replace(records=mixed.iloc[start::3]) for start in range(3)]
    expected = report(run)
    for other in (report(run._replace(records=mixed)), report(*parts, run)):
        assert other.table('csv') == expected.table('csv')
        assert other.significance == expected.significance
    assert expected.rows[0].mean('id') == math.fsum(scores['a']) / 40


def test_merge():
    '''Other methods and further samples are put together, also if the data is somewhere else.'''
    first = make_run({'grad_cam': [0.1, 0.2], 'random': [0, 0]}, 'one')
    further = make_run({'grad_cam': [9, 9, 0.6], 'random': [0, 0, 0.3]}, 'two', manifest='m2')
    further = further._replace(records=further.records.loc[['002.jpg']])
    broken = {'001.jpg': SampleRecord('001.jpg', problem='?')}
    assert len(report(first, make_run({'rise': [0.3]}, 'two', manifest='m2', data='./data/')).groups) == 1
    elsewhere = make_run({'rise': [0.3, 0.5]}, 'three', data='/mnt/data', samples=broken)
    result = report(first, further, elsewhere)
    assert len(result.groups) == 1 and result.groups[0].name == 'one + two + three'
    assert [found.name for found in result.rows] == ['grad_cam', 'rise', 'random']
    assert row(result, 'grad_cam').mean('id') == pytest.approx(0.3, abs=1e-15)
    assert row(result, 'grad_cam').scores.index.tolist() == ['000.jpg', '001.jpg', '002.jpg']
    # the problem of a sample in one run is none if it was solved in another
    assert result.groups[0].samples['001.jpg'].problem is None
    compared = [(item.method, item.num_examples) for item in result.significance[0].results]
    assert compared == [('grad_cam', 2), ('random', 2)]
    message, = [message for message in result.messages if 'same examples' in message]
    assert 'rise 2 of 3' in message and 'grad_cam' not in message


def test_merge_samples():
    '''Runs that explain other classes of the same examples are warned of, and what is noted in any is kept.'''
    first = make_run({'grad_cam': [0.1, 0.2, 0.3]}, 'one')
    known = [*first.samples.values()]
    other = [known[0]._replace(label=None, notes=('no label',)), known[1]._replace(label=None, target=0), known[2]]
    second = make_run({'rise': [0.3, 0.5, 0.6]}, 'two', samples={sample.sample: sample for sample in other})
    result = report(first, second)
    assert has(result.warnings[:1], 'one + two', 'explained class', '1 of 3', '(001.jpg)')
    assert has(result.warnings[1:2], 'one + two', 'label', '2 of 3', '(000.jpg, 001.jpg)')
    assert result.groups[0].samples['000.jpg'] == known[0]._replace(notes=('no label',))
    # one that could not be read in a run has no class there
    broken = {'000.jpg': SampleRecord('000.jpg', problem='?')}
    assert not report(first, make_run({'rise': [0.3, 0.5, 0.6]}, 'two', samples=broken)).warnings


def test_merge_metrics():
    '''Scores of further metrics are added; of those that contradict, the first are used, and they are counted.'''
    first = make_run({'grad_cam': {'id': [0.1, 0.2, math.nan]}}, 'one')
    second = make_run({'grad_cam': {'id': [0.1, 0.7, math.nan], 'pointing': [0.5, 1, 0]}}, 'two')
    result = report(first, second)
    assert row(result, 'grad_cam').of('id').to_dict() == {'000.jpg': 0.1, '001.jpg': 0.2}
    assert row(result, 'grad_cam').mean('pointing') == 0.5
    assert has(result.messages, 'grad_cam: 1 examples')
    assert not has(report(first, first).messages, 'grad_cam: ')
    # a record without problems replaces one with
    broken = make_run({}, 'three', problems={('000.jpg', 'grad_cam'): 'NaN'})
    found = row(report(broken, first), 'grad_cam')
    assert not found.problems and found.of('id').to_dict() == {'000.jpg': 0.1, '001.jpg': 0.2}


def test_versions():
    '''Runs by other versions or devices are put together, which is said, and if a score is another one.'''
    first = make_run({'grad_cam': [0.1, 0.2], 'rise': [0, 0]}, 'a/run')
    second = make_run({'score_cam': [0.3, 0.4]}, 'b/run', versions={'torch': '2.5'}, files={'net.pt': '12'})
    result = report(first, second)
    assert [found.name for found in result.rows] == ['grad_cam', 'rise', 'score_cam']
    assert has(result.messages, 'a/run and b/run', 'torch (2.4; 2.5)', 'net.pt (None; 12)')
    assert result.significance[0].baseline == 'score_cam' and len(result.significance[0].results) == 2
    again = report(first, make_run({'grad_cam': [0.1, 0.3]}, 'b/run', versions={'torch': '2.5'}))
    assert has(again.messages, 'torch') and has(again.messages, 'grad_cam: 1 examples')
    assert not has(report(first, make_run({'score_cam': [0.3, 0.4]}, 'b/run')).messages, 'differ')


def test_not_comparable():
    '''Runs that differ in data, network or options are shown side by side, and never compared.'''
    first = make_run({'grad_cam': [0.1, 0.2], 'random': [0, 0]}, 'one')
    second = make_run({'grad_cam': [0.8, 0.9], 'random': [2, 2]}, 'two', options={'step': 100, 'initial': 'softmax'})
    third = make_run({'grad_cam': [0.5, 0.5]}, 'three', data='other', manifest='m3')
    result = report(first, second, third)
    assert [group.name for group in result.groups] == ['one', 'two', 'three']
    assert [found.name for found in result.rows] == [
        'grad_cam (data=data, step=500)', 'random (data=data, step=500)', 'grad_cam (data=data, step=100)',
        'random (data=data, step=100)', 'grad_cam (data=other, step=500)',
    ]
    assert has(result.warnings[:1], 'Rows of two', 'one', 'step (500; 100)')
    assert has(result.warnings[1:2], 'Rows of three', 'one', 'data (data; other)')
    assert [(item.group, item.baseline) for item in result.significance] == [
        ('one', 'grad_cam (data=data, step=500)'), ('two', 'grad_cam (data=data, step=100)')
    ]
    # each has its own best method, and its own controls
    table = result.results()[0]
    assert table.frame['Run'].tolist() == ['one', 'one', 'two', 'two', 'three']
    assert table.marks['ID ↑'].tolist() == ['best', '', 'best', 'above', 'best']
    assert not has(result.warnings, 'step=500', 'random')
    assert has(result.warnings, 'random (data=data, step=100) (2.000) is better than 1 of 1 methods')
    assert 'ID compared with grad_cam (data=data, step=100) (two)' in result.text()


@pytest.mark.parametrize('settings, names', [
    ({'options': {'step': 100, 'initial': 'softmax', 'amp': None}}, ['step=500', 'step=100']),
    ({'model': 'vgg16', 'data': '/moved/data'}, ['model=resnet50', 'model=vgg16']),
    ({'weights': 'w2', 'weights_name': '/x/other.pt'}, ['weights=w1', 'weights=other.pt']),
    ({'data': '/x/other', 'manifest': 'm3'}, ['data=data', 'data=other']),
    # nothing that can be read
    ({'classes': ['x', 'y']}, ['a/run', 'b/run']),
])
def test_same_method_in_other_settings(settings, names):
    '''Methods of the same name are told apart by the setting that differs, others keep their name.'''
    first = make_run({'grad_cam': [0.1, 0.2], 'rise': [0, 0]}, 'a/run')
    result = report(first, make_run({'grad_cam': [0.8, 0.9], 'gradient': [2, 2]}, 'b/run', **settings))
    assert [row.name for row in result.rows] == [
        f'grad_cam ({names[0]})', 'rise', f'grad_cam ({names[1]})', 'gradient'
    ]


# -- comparisons -------------------------------------------------------------------------------------------------------

def test_significance():
    '''The best baseline, exact p-values, and Holm's correction, each on the examples that both have.'''
    base = [0.3, 0.1, 0.2, 0.3, 0.1, 0.2]
    run = make_run({
        'resnet_lrp_ratio': [value + 0.5 for value in base] + [9],
        'grad_cam': [*base, math.nan],
        'score_cam+quantize8': [value - 0.05 * (number % 2) for number, value in enumerate(base)] + [math.nan],
        'epsilon_plus+ratio': [value + 0.4 for value in base] + [9],
        'random': [math.nan, *(value - 0.2 for value in base[1:]), 9],
        'gaussian': [5, 5, 5, 5, 5, 5, 5],
    })
    item, = report(run).significance
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
    lines = list(csv.DictReader(io.StringIO(report_exact.significance_csv())))
    assert [line['method'] for line in lines] == list(found) and float(lines[0]['p_holm']) == 0.15625
    assert float(lines[0]['low']) == exact['resnet_lrp_ratio'].low
    table, = report_exact.comparisons()
    assert 'grad_cam' in table.title and '(0.200)' in table.note
    assert cells(table)[0] == ['resnet_lrp_ratio', '6', '0.700', '0.500 [0.500, 0.500]', '0.156']
    assert table.title in report_exact.text()


def test_baseline():
    '''Another baseline by name, and another score, for which less may be better.'''
    run = make_run({
        'grad_cam': {'id': [0.5, 0.6], 'deletion': [0.3, 0.4]},
        'rise': {'id': [0.4, 0.5], 'deletion': [0.1, 0.1]},
        'sobel': {'id': [0.1, 0.1], 'deletion': [0.9, 0.9]},
    })
    assert report(run).significance[0].baseline == 'grad_cam'
    assert report(run, primary='deletion').significance[0].baseline == 'rise'
    assert report(run, baseline='sobel').significance[0].baseline == 'sobel'
    with pytest.raises(ValueError, match="baseline='lime' .* grad_cam, rise, sobel"):
        report(run, baseline='lime')
    with pytest.raises(ValueError, match="primary='pointing' .* deletion, id"):
        report(run, primary='pointing')
    with pytest.raises(ValueError, match='no runs'):
        report()
    # without any method of others
    ours = report(make_run({'resnet_lrp_ratio': [0.1, 0.2], 'random': [0, 0], 'sobel': [0.3, 0.3]}))
    assert ours.significance[0].baseline == 'sobel' and has(ours.messages, 'best control')
    # without the usual score
    other = report(make_run({'rise': {'pointing': [0.1, 0.2], 'gap': [1, 1]}, 'random': {'pointing': [0, 0]}}))
    assert other.primary == 'pointing' and has(other.messages, 'compared by pointing')
    disjoint = report(make_run({'rise': [0.1, math.nan], 'random': [math.nan, 0.2]}))
    assert not disjoint.significance and has(disjoint.messages, 'random has id', 'rise')
    # the best of few examples
    few = make_run({
        'rise': [0.9] + 4 * [math.nan], 'grad_cam': [0.8, 0.3, 0.3, math.nan, math.nan], 'random': 5 * [0.1],
        'score_cam': [0.7, 0.2, 0.2, 0.2, 0.2],
    })
    assert report(few).significance[0].baseline == 'grad_cam'
    assert report(few, baseline='rise').significance[0].results[0].num_examples == 1


def test_clusters():
    '''Whole classes are resampled, and few are warned of.'''
    scores = [0.1, 0.9, 0.15, 0.85, 0.05, 0.95]
    run = make_run({'grad_cam': scores, 'rise': [0.0] * 6})
    apart, together = report(run), report(run, clusters='class')
    expected = bootstrap_interval(scores, [0, 1] * 3, n_resamples=200)
    found, other = (each.rows[0].statistics.loc['id'].tolist() for each in (together, apart))
    assert found[1:3] == [expected.low, expected.high] and found[0] == other[0] and found != other
    assert together.significance[0].results[0].num_clusters == 2
    assert apart.significance[0].results[0].num_clusters == 6
    assert has(together.warnings, '2 classes')
    assert report(run, clusters='none').table('csv') == apart.table('csv')
    without = {name: sample._replace(label=None) for name, sample in run.samples.items()}
    result = report(run._replace(samples=without), clusters='class')
    assert result.rows[0].statistics.loc['id'].tolist() == pytest.approx(other)
    assert has(result.messages, 'no labels')
    with pytest.raises(ValueError, match="clusters='label'"):
        report(run, clusters='label')


# -- warnings ----------------------------------------------------------------------------------------------------------

FLATTERED = {
    'resnet_lrp_ratio': {'id': [0.3], 'id_keio': [0.33], 'tied_share': [0.0]},
    'resnet_lrp_ratio+quantize8': {'id': [0.2], 'id_keio': [0.8], 'tied_share': [0.97]},
    'grad_cam': {'id': [0.25], 'id_keio': [0.4], 'tied_share': [0.0]},
    'constant': {'id': [0.0], 'id_keio': [0.81], 'tied_share': [1.0]},
    'random': {'id': [0.01], 'id_keio': [0.02], 'tied_share': [0.0]},
}


def test_warnings():
    '''Sentences on what a published protocol flatters, with the figures.'''
    controls, quantized, constant, ranks, suffix = report(make_run(FLATTERED)).warnings
    assert has([controls], 'constant (0.810)', '3 of 3', 'resnet_lrp_ratio+quantize8 (0.800)', 'Otsuki et al. 2024')
    assert has([quantized], 'resnet_lrp_ratio+quantize8: 97.0 %', '0.800', '0.200', 'difference of 0.600')
    assert has([constant], 'constant: 100.0 %', '0.810', '0.000')
    assert has([ranks], '2 of 3', 'resnet_lrp_ratio+quantize8 from 3 to 1, resnet_lrp_ratio from 1 to 3')
    assert has([suffix], 'resnet_lrp_ratio+quantize8', '(0.800 and 0.330)', '(0.200 and 0.300)')


def test_no_warnings():
    '''What is not the case is not said; it depends on the records alone.'''
    scores = {name: {key: list(value) for key, value in columns.items()} for name, columns in FLATTERED.items()}
    scores['resnet_lrp_ratio+quantize8'].update(id_keio=[0.1], tied_share=[0.04])
    scores['constant'].update(id_keio=[0.0], tied_share=[0.0])
    scores['grad_cam'].update(id_keio=[0.32])
    assert report(make_run(scores)).warnings == ()
    scores['random']['id'] = [0.22]
    warning, = report(make_run(scores)).warnings
    assert has([warning], 'our protocol', 'random (0.220)', '1 of 3', 'resnet_lrp_ratio+quantize8 (0.200)')
    # better by both protocols
    scores['random']['id'] = [0.01]
    scores['resnet_lrp_ratio+quantize8'].update(id=[0.31], id_keio=[0.8])
    assert report(make_run(scores)).warnings == ()
    negative = {'grad_cam': {'distance': [0.2, 0.4], 'negative': [1, 0]}, 'sobel': {'distance': [0.1, 0.2]}}
    first, second = report(make_run(negative)).warnings
    assert has([first], 'Distance', 'sobel (0.150)', '1 of 1', 'grad_cam (0.300)')
    assert second.startswith('grad_cam: 50.0 %')
    assert has(report(make_run({'abn:weights=a.pt': [0.1], 'random': [0]})).messages, 'abn:weights=a.pt: ', 'network')


@pytest.mark.parametrize('columns', [('pointing',), ('accuracy', 'distance')])
@pytest.mark.parametrize('suffix', ['', '_magnitude'])
def test_top_warnings(columns, suffix):
    '''The top pixels are said to be a matter of chance where they are tied.'''
    scores = {
        name: {**{column: [0.5] for column in columns}, 'tied_share': [0.0], f'tied_share{suffix}': [share]}
        for name, share in (('resnet_lrp_ratio', 0.0), ('resnet_lrp_ratio+quantize8', 0.97), ('grad_cam', 0.04))
    }
    warning, = report(make_run(scores)).warnings
    assert has([warning], 'resnet_lrp_ratio+quantize8: 97.0 %', *(COLUMNS[name].title for name in columns))


def test_gaps():
    '''What is missing is said of each run by its name, samples as well as methods.'''
    methods = ['grad_cam', 'rise', 'random']
    first = make_run({'grad_cam': [0.1, 0.2]}, 'a/run', methods=methods)
    second = make_run({'grad_cam': [0.1]}, 'b/run', methods=methods[:1], options={'step': 100}, samples={
        f'x{number}.jpg': SampleRecord(f'x{number}.jpg', problem='cannot be decoded') for number in range(7)
    })
    second.settings['identity']['samples'] = 9
    second = second._replace(messages=['00001-000.zlib is damaged'])
    result = report(first, second)
    messages = result.messages
    assert has(messages, 'a/run has no records of rise, random')
    assert has(messages, 'b/run: 00001-000.zlib is damaged')
    assert [text for text in result.introduction() if '8 of 9 images' in text] == [
        'b/run: 8 of 9 images, run not complete.'
    ] and not has(result.introduction(), 'a/run', 'not complete')
    assert has(messages, '7 of 8 samples of b/run')
    # an image without a record of one of the methods
    part = make_run({'grad_cam': [0.1, 0.2], 'rise': [0.3]})
    assert '1 of 2 images, run not complete' in report(part).text()
    part = select_methods(first, {'grad_cam', 'lime'})
    assert [text for text in report(part).messages if 'no records' in text] == ['run has no records of random.']


# -- tables ------------------------------------------------------------------------------------------------------------

def test_terminal():
    '''Plain text that fits, in tables by protocol with ours first, with all cells.'''
    long = 'resnet_lrp_ratio:projection=literal,coverage=literal,first_layer=ones,maxpool=avg2x2+quantize8'
    generator = np.random.default_rng(0)
    scores = {
        name: {key: generator.normal(size=5) for key in COLUMNS} for name in (long, 'grad_cam', 'random', 'constant')
    }
    result = report(make_run(scores))
    text = result.table()
    assert max(map(len, text.splitlines())) <= 105
    assert [table.title for table in result.results()] == [
        'Insertion and deletion, our protocol', 'Insertion and deletion, published code of Otsuki et al. 2024',
        'Insertion and deletion, published code of RISE', 'Insertion and deletion, text of C³-LRP', 'Top pixels',
        'Class evidence', 'Attention', 'Conservation', 'Ties', 'Images and time',
    ]
    squeezed = re.sub(r'[\s-]+', '', text)
    for table in result.results():
        assert all(re.sub(r'[\s-]+', '', cell) in squeezed for line in cells(table) for cell in line[1:])
    places = [text.index(part) for part in ('projection=literal', 'first_layer=ones', 'maxpool=avg2x2')]
    assert places == sorted(places)


def test_marks():
    '''The best method is marked in all formats, several if equal, and controls that are as good.'''
    result = report(make_run({
        'grad_cam': {'id': [0.5, 0.5], 'deletion': [0.5, 0.5]}, 'rise': {'id': [0.5, 0.5], 'deletion': [0.25, 0.25]},
        'constant': {'id': [0.5, 0.5], 'deletion': [0.3, 0.3]}, 'random': {'id': [0.1, 0.1], 'deletion': [0.1, 0.1]},
    }))
    marks = {
        method: [number for cell in line for number in re.findall(r'(\S*0\.\d+) \[[^]]*\](.*)', cell)]
        for method, _, *line in (re.split(r' *\| *', line)[1:-1] for line in result.table('markdown').splitlines()
                                 if line.startswith('| ') and '[' in line)
    }
    assert marks == {
        'grad_cam': [('0.500', ''), ('**0.500', '**')], 'rise': [('**0.250', '**'), ('**0.500', '**')],
        'constant': [('0.300', ''), ('0.500', ' !')], 'random': [('0.100', ' !'), ('0.100', '')],
    }
    assert 'rise & baseline & \\textbf{0.250 [0.250, 0.250]} & \\textbf{0.500' in result.table('latex')
    assert re.search(r'^rise +baseline +\*0\.250 \S+ \S+ +\*0\.500', result.table(), re.M)
    assert re.search(r'^random +control +!0\.100 \S+ \S+ +0\.100', result.table(), re.M)
    with pytest.raises(ValueError, match="format='html'"):
        result.table('html')
    with pytest.raises(ValueError, match="format='latex'"):
        result.text('latex')


def test_escapes():
    '''What LaTeX or Markdown would take for a command is escaped, and rows have as many cells as columns.'''
    frame = pd.DataFrame([['[a]_b&50%#{x}^~\\<>$', '-0.5 [-1.0, –]']], columns=['Method', 'C³'])
    text = tables.to_latex(tables.Table('ID ↑ 10 %, LRP-αβ (2, −1)', frame))
    line, = [line for line in text.splitlines() if '[a]' in line]
    assert line == (
        '{}[a]\\_b\\&50\\%\\#\\{x\\}\\textasciicircum{}\\textasciitilde{}\\textbackslash{}$<$$>$\\$'
        ' & $-$0.5 [$-$1.0, --] \\\\'
    )
    assert text.isascii() and 'toprule' in text
    for preset in PRESETS.values():
        assert report(make_run({'grad_cam': [0.1]}), presets=[preset]).table('latex').isascii()
    frame = pd.DataFrame([['a|b *c* <i>\nd', '[x](y)']], columns=['A', 'B'])
    line = tables.to_markdown(tables.Table('T', frame)).splitlines()[-1]
    assert ' '.join(line.split()) == '| a\\|b \\*c\\* \\<i> d | [x]\\(y) |'


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
    run = make_run({'grad_cam': grad_cam, 'rise': {'id': [0.1, 0.1]}})
    table, = report(run, presets=[preset]).printed()
    assert table.title == 'Table 1' and table.note == 'On other data.'
    assert [*table.frame] == [
        'Method', 'ID ↑ printed', 'ID ↑ here, as published', 'ID ↑ here, our protocol', 'Accuracy ↑ here, our protocol',
        'Images',
    ]
    assert cells(table) == [
        ['Grad-CAM: grad_cam', '0.371', '0.400', '0.250', '0.500', '2'],
        ['RISE: rise', '–', '–', '0.100', '–', '2'],
        ['LRP: lrp_0', '0.011', '–', '–', '–', '–'],
    ]
    assert report(run).printed() == []
    # by the names in the settings
    named = report(run._replace(settings={**run.settings, 'preset': ['lrp-for-resnet-table1', 'x']}))
    assert named.presets == (PRESETS['lrp-for-resnet-table1'],) and has(named.messages, 'preset x')
    line, = [line for line in cells(named.printed()[0]) if line[0] == 'Grad-CAM: grad_cam']
    assert line[-4:-1] == [f"{named.presets[0].printed['grad_cam']['id_keio']:.3f}", '0.400', '0.250']
    assert 'Grad-CAM: grad_cam' in named.table()


def test_problems():
    '''Whatever was left out is counted by reason, with a few examples.'''
    samples = {f'x{number}.jpg': SampleRecord(f'x{number}.jpg', problem='cannot be decoded') for number in range(7)}
    samples['000.jpg'] = SampleRecord('000.jpg', 0, notes=('no mask',))
    run = make_run(
        {'grad_cam': [0.1, 0.2], 'rise': [0.1, 0.2]}, problems={('001.jpg', 'rise'): 'NaN'}, samples=samples
    )
    table, = report(run).problems()
    assert cells(table) == [
        ['left out', 'cannot be decoded', 'x0.jpg, x1.jpg, x2.jpg, x3.jpg, x4.jpg, …', '7'],
        ['no values of rise', 'NaN', '001.jpg', '1'], ['note', 'no mask', '000.jpg', '1'],
    ]
    many = {f'{number}': SampleRecord(f'{number}', problem=f'reason {number}') for number in range(30)}
    rows = cells(report(make_run({'rise': [0.1]}, samples=many)).problems()[0])
    assert len(rows) == 21 and rows[-1] == ['others', '10 other reasons', '', '10']
    assert not report(make_run({'rise': [0.1]})).problems()


# -- figures and page --------------------------------------------------------------------------------------------------

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


def test_drawing(monkeypatch):
    '''Lines are the means of all examples, methods differ, controls are grey, and chance is there.'''
    drawn = []
    monkeypatch.setattr(figures.Figure, 'savefig', lambda canvas, target, **kwargs: drawn.append(canvas))
    methods = {name: [0.1, 0.2, 0.3] for name in ('grad_cam', 'rise', 'resnet_lrp_ratio')}
    scores = {name: {'id': values, 'pointing_chance': [0.5, math.nan, 0.5]} for name, values in methods.items()}
    run = make_run({**scores, 'random': {'id': [0, 0, 0]}}, curves=curves)
    assert list(figures.draw_curves(report(run))) == [
        'insertion_deletion', 'accuracy', 'pointing', 'distance', 'cross_accuracy_a_b'
    ]
    insertion, deletion = drawn[0].axes
    assert [axes.get_title() for axes in drawn[0].axes] == ['Insertion', 'Deletion']
    # positions of examples differ, so that these are interpolated
    for line in insertion.get_lines():
        assert line.get_ydata() == pytest.approx(np.linspace(0, 1, 101), abs=1e-6)
    assert deletion.get_lines()[0].get_ydata() == pytest.approx(np.linspace(1, 0, 101), abs=1e-6)
    styles = [(line.get_color(), line.get_linestyle()) for line in insertion.get_lines()]
    assert len(set(styles)) == 4 and styles[-1] == ('0.45', ':')
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ['grad_cam (0.200)', 'rise (0.200)', 'resnet_lrp_ratio (0.200)', 'random (0.000)']
    accuracy = drawn[1].axes[0].get_lines()[0]
    assert accuracy.get_xdata().tolist() == [1, 50, 100] and accuracy.get_ydata() == pytest.approx([0, 1 / 3, 1])
    # the second example has no mask
    pointing = drawn[2].axes[0].get_lines()
    assert pointing[0].get_ydata() == pytest.approx([1, 1, 0.5])
    assert [text.get_text() for text in drawn[2].legends[0].get_texts()][-2:] == ['chance', 'ceiling']
    assert pointing[-2].get_ydata() == [0.5, 0.5] and pointing[-1].get_ydata().tolist() == [1, 1, 0.5]


def test_many_curves(monkeypatch):
    '''Of many methods, the best ten are drawn, and all controls.'''
    names = ['grad_cam', *(f'resnet_lrp_ratio+quantize{number}' for number in range(2, 13)), 'random', 'constant']
    scores = {name: [number / 20, number / 20 + 0.01] for number, name in enumerate(names)}
    drawn, original = [], figures.plot_curves

    def plot_curves(curves, *args, **kwargs):
        drawn.extend(curves)
        return original(curves, *args, **kwargs)

    monkeypatch.setattr(figures, 'plot_curves', plot_curves)
    figures.draw_curves(report(make_run(scores, curves=lambda number: {
        name: np.linspace(0, 1, 3) for name in ('fractions', 'insertion', 'deletion')
    })))
    assert drawn == 2 * names[2:]


def montages(result):
    '''Images and scores of the montages of a report.'''
    return [
        [(item.sample, item.place, [tile and tile.score for tile in item.tiles]) for item in found.examples]
        for found in figures.make_montages(result)
    ]


def test_montage():
    '''The same images for all methods, evenly from best to worst, with maps of the size of the picture.'''
    first, second = [0.3, 0.1, 0.5, 0.2, 0.4], [0.3, 0.2, 0.6, 0.1, 0.5]
    run = make_run({
        'grad_cam': {'deletion': first}, 'rise': {'deletion': second}, 'random': {'deletion': [0] * 5}
    }, pictures=jpeg)
    found, = figures.make_montages(report(run, primary='deletion'))
    assert [row.name for row in found.rows] == ['grad_cam', 'rise'] and found.title == ''
    # the lower, the better
    assert [item.sample for item in found.examples] == ['001.jpg', '003.jpg', '000.jpg', '004.jpg', '002.jpg']
    assert [item.about for item in found.examples][:3] == [
        'church (50\u00a0%)', 'church (50\u00a0%)', 'tench (50\u00a0%)'
    ]
    for place, item in enumerate(found.examples, 1):
        number = int(item.sample[:3])
        assert item.place == f'{place} of 5'
        assert [tile.score for tile in item.tiles] == [first[number], second[number]]
        assert abs(item.picture.getpixel((0, 0))[0] - 10 * number) <= 2
        for tile in item.tiles:
            assert item.picture.size == tile.overlay.size == (16, 12)
            overlay = np.asarray(tile.overlay).astype(int)
            # the row of the map that is not zero
            red = overlay[..., 0] - overlay[..., 2]
            assert abs(red.mean(1).argmax() - (number + 0.5) * 12 / 8) <= 1.5
    # an image that is explained for another class than its label
    sample = run.samples['001.jpg']._replace(label=0)
    wrong = run._replace(samples={**run.samples, '001.jpg': sample})
    example = figures.make_montages(report(wrong, primary='deletion'))[0].examples[0]
    assert example.about == 'church (50\u00a0%), label: tench'


def test_montage_choice():
    '''Of many images and methods some are shown, which is said, and those that most methods have.'''
    many = {f'rise:seed={number}': [number / 10 + image / 1000 for image in range(11)] for number in range(10)}
    found, = figures.make_montages(report(make_run(many, pictures=jpeg)))
    assert [row.name for row in found.rows] == [f'rise:seed={number}' for number in range(2, 10)]
    assert [item.place for item in found.examples] == [f'{place} of 11' for place in (1, 3, 5, 7, 9, 11)]
    assert [item.sample for item in found.examples][::5] == ['010.jpg', '000.jpg']
    assert '8 best of 10' in found.note and '6 of 11' in found.note
    # a method of a further run has maps of some images only
    first = make_run({'grad_cam': [0.1, 0.2, 0.3]}, pictures=jpeg)
    second = make_run({'rise': [0.5, 0.1]}, 'two', pictures=jpeg)
    assert montages(report(first, second)) == [[('000.jpg', '1 of 2', [0.1, 0.5]), ('001.jpg', '2 of 2', [0.2, 0.1])]]
    third = make_run({'rise': [math.nan, math.nan, 0.2]}, 'two', pictures=jpeg)
    assert montages(report(first, third)) == [[('002.jpg', '1 of 1', [0.3, 0.2])]]
    part = first._replace(samples={**first.samples, '001.jpg': first.samples['001.jpg']._replace(picture=None)})
    assert [item[0] for item in montages(report(part))[0]] == ['002.jpg', '000.jpg']
    assert 'Of 1 others' in figures.make_montages(report(part))[0].note
    # the file of its samples is damaged
    del part.samples['001.jpg']
    assert [item[0] for item in montages(report(part))[0]] == ['002.jpg', '000.jpg']
    found, = figures.make_montages(report(make_run({'grad_cam': [0.1, 0.2]})))
    assert not found.examples and 'were kept' in found.note
    # controls are shown if there is nothing else, and groups have their own
    other = make_run({'random': [0.5, 0.1]}, 'two', pictures=jpeg, model='resnet18')
    titles = [(found.title, [row.name for row in found.rows]) for found in figures.make_montages(report(first, other))]
    assert titles == [('Examples of run', ['grad_cam']), ('Examples of two', ['random'])]


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
    run = make_run(
        {'grad_cam': [0.1, 0.2, 0.3], evil: [0, 0, 0]}, curves=curves, pictures=jpeg, command=f'evaluate {evil}',
        samples={evil: SampleRecord(evil, problem=evil)}, classes=[evil, 'church'],
    )
    result = report(run)
    page = figures.make_page(result, figures.draw_curves(result), figures.make_montages(result))
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert not checker.open
    tags = [tag for tag, _ in checker.tags]
    assert tags.count('script') == 1 and ('script', {}) in checker.tags and 'link' not in tags
    assert checker.text.count(evil) >= 9
    images = [attrs for tag, attrs in checker.tags if tag == 'img']
    assert len(images) == 5 + 3 * 3
    assert all(attrs['src'].startswith(('data:image/png;base64,', 'data:image/jpeg;base64,')) for attrs in images)
    assert all(attrs['alt'] for attrs in images)
    targets = {attrs['id'] for _, attrs in checker.tags if 'id' in attrs}
    links = [attrs['href'] for tag, attrs in checker.tags if tag == 'a']
    assert links and all(link[0] == '#' and link[1:] in targets for link in links)
    assert targets >= {'settings', 'results', 'messages', 'significance', 'curves', 'examples', 'problems', 'repeat'}
    assert links[0] == '#results' and links[-1] == '#settings'
    assert not re.search(r'(?:src|href)=.?https?:|url\(|@import', page)
    assert all(attrs.get('scope') for tag, attrs in checker.tags if tag == 'th')
    assert 'ID 0.300' in checker.text and '<strong>0.200 [' in page


def test_introduction():
    '''The network's accuracy and how its labels were matched are the first to be said, in the page and in the text.'''
    samples = {
        '000.jpg': SampleRecord('000.jpg', label=1, target=0, prediction=1),
        '001.jpg': SampleRecord('001.jpg', label=1, target=0, prediction=0),
        '002.jpg': SampleRecord('002.jpg', label=1, prediction=1, problem='?'),
        '003.jpg': SampleRecord('003.jpg', target=0, prediction=0),
    }
    for labels, text in (
        ({'labels': {'matched_by': 'name', 'classes': {}}}, 'by name'),
        ({'labels': {'matched_by': 'order', 'classes': {}}}, 'guess'), ({}, 'not kept'),
    ):
        result = report(make_run({'grad_cam': [0.1, 0.2, 0.3, 0.4]}, samples=samples, weights_name='net.pt', **labels))
        line, = result.introduction()
        assert line.startswith('resnet50 with net.pt classifies 1 of 2 images (50.0 %)') and text in line
        assert line in result.text().splitlines()[1]
        page = figures.make_page(result, {}, [])
        assert page.index(line) < page.index('<nav>') < page.index('id="results"')
    unknown = {name: sample._replace(label=None) for name, sample in samples.items()}
    line, = report(make_run({'grad_cam': [0.1, 0.2, 0.3, 0.4]}, samples=unknown)).introduction()
    assert 'not known' in line
    first, second = report(
        make_run({'grad_cam': [0.1]}, 'one'), make_run({'grad_cam': [0.1]}, 'two', model='vgg16')
    ).introduction()
    assert first.startswith('one: resnet50') and second.startswith('two: vgg16')


def test_beside():
    '''Controls that are better and ties are beside the table that they are about, and numbers of images are in it.'''
    scores = {**FLATTERED, 'rise': {'id': [0.1], 'pointing': [0.5], 'tied_share': [0.3], 'tied_share_magnitude': [0.6]}}
    run = make_run(scores, samples={'x.jpg': SampleRecord('x.jpg', problem='?')})
    result = report(run)
    ours, published, top = result.results()[:3]
    assert ours.frame['Images'].tolist() == ['1'] * 6 and 'Ties' not in ours.frame
    assert published.frame['Ties'].tolist() == ['0 %', '97 %', '0 %', '100 %', '0 %']
    assert top.frame[['Method', 'Ties']].values.tolist() == [['rise', '60 %']]
    assert '1 of 2 are left out' in ours.note
    assert {title for title, _ in result.beside} == {published.title, top.title}
    assert [text for _, text in result.beside] == [*result.warnings]
    page = figures.make_page(result, {}, [])
    places = [page.index(f'<h3>{table.title}') for table in (ours, published, top)]
    first, second, third = (page[start:end] for start, end in zip(places, [*places[1:], None]))
    assert 'constant (0.810) is better' in second and 'constant (0.810) is better' not in first + third
    assert '97.0 % of pixels are tied' in second and '60.0 % of pixels are tied' in third
    # once
    assert page.count('constant (0.810) is better') == 1 and 'id="warnings"' not in page


def test_write(tmp_path):
    '''The same records give the same files.'''
    runs = [
        make_run({'grad_cam': [0.1, 0.2, 0.3], 'random': [0, 0, 0]}, curves=curves, pictures=jpeg),
        make_run({'grad_cam': [0.1, 0.2, 0.3]}, 'two', curves=curves, model='resnet18'),
    ]
    paths = report(*runs).write(tmp_path / 'a' / 'b')
    assert sorted(path.name for path in paths) == sorted(path.name for path in (tmp_path / 'a' / 'b').iterdir())
    names = [path.name for path in paths]
    assert names[:6] == ['report.html', 'report.md', 'table.md', 'table.csv', 'table.tex', 'significance.csv']
    assert names[-1] == 'montage_1.png' and 'curves_accuracy_1.png' in names and 'curves_accuracy_2.png' in names
    for path in paths:
        if path.suffix == '.png':
            with Image.open(path) as image:
                image.load()
                assert min(image.size) > 50
    again = report(*runs).write(tmp_path / 'c')
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]
    # a report is replaced, and bytes in paths that are no text are shown
    odd = [
        make_run({'grad_cam': [0.1, 0.2]}, f'odd\udcff{step}', options={'step': step}, data='data\udcff')
        for step in (1, 2)
    ]
    report(*odd).write(tmp_path / 'c')
    page = (tmp_path / 'c' / 'report.html').read_text(encoding='utf-8')
    assert 'odd\\udcff1' in page and 'data?' in page


@pytest.mark.parametrize('methods', [{}, {'grad_cam': [0.5]}, {'random': [0.5, 0.1]}, {'grad_cam': [math.nan]}])
def test_little(tmp_path, methods):
    '''Runs without records, or with a single one, are reported too.'''
    result = report(make_run(methods, pictures=jpeg))
    assert not result.significance
    assert ('no records to report' in result.text()) == (not methods)
    paths = result.write(tmp_path)
    assert ('no records to report' in paths[0].read_text(encoding='utf-8')) == (not methods)
    assert len(read_csv(paths[3].read_text(encoding='utf-8'))) == len(methods)
    assert result.table('latex') and has(result.messages, 'run has no records.') == (not methods)
