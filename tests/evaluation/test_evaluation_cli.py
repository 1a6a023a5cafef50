'''Tests for the command line of the evaluation.'''
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from captum_adapters.cli import duration, main
from captum_adapters.evaluation import COLUMNS, PRESETS, Method, make_evaluation, read_run
from captum_adapters.evaluation.methods import Context
from zennit_resnet.cli import main as zennit_main
from zennit_resnet.image import read_image
from zennit_resnet.models import load_classifier

pytestmark = pytest.mark.once


@pytest.fixture(scope='module')
def photos(tmp_path_factory, assets):
    '''Folder with some images. One is broken.'''
    folder = tmp_path_factory.mktemp('photos')
    for number in range(3):
        shutil.copy(assets / 'images' / 'circle' / f'{number}.png', folder)
    (folder / 'broken.png').write_bytes(b'')
    return folder


def call(*args):
    '''Call the command.'''
    return CliRunner().invoke(main, [str(arg) for arg in args])


def evaluate(assets, photos, out, *args):
    '''Evaluate the small network.'''
    return call(
        'evaluate', '--data', photos, '--out', out, '--model', 'narrow_resnet18', '--weights', assets / 'net.pt',
        '--size', 32, '--step', 512, '--device', 'cpu', *args,
    )


def test_evaluate_and_report(assets, photos, tmp_path):
    '''From images to a page.'''
    methods = 'resnet_lrp_ratio:first_layer=ones,maxpool=average+quantize4,grad_cam'
    result = evaluate(assets, photos, tmp_path / 'run', '--methods', methods)
    assert result.exit_code == 0, result.output
    assert '24 of 24 records (1 images left out, see the report)' in result.output
    assert f'report: python -m captum_adapters report {tmp_path}/run' in result.output
    run = read_run(tmp_path / 'run')
    assert run.settings['identity']['methods'][:2] == [
        'resnet_lrp_ratio:first_layer=ones,maxpool=average+quantize4', 'grad_cam'
    ]
    again = evaluate(assets, photos, tmp_path / 'run', '--methods', methods, '--dry-run')
    assert '24 of 24 records (1 images left out, see the report), 0 left, about 0 s' in again.output

    report = call('report', tmp_path / 'run', '--out', tmp_path / 'report')
    assert report.exit_code == 0, report.output
    assert 'grad_cam' in report.output
    assert 'broken.png' in report.output
    page = (tmp_path / 'report' / 'report.html').read_text()
    assert 'data:image/png;base64,' in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    for style, start in (('markdown', '#'), ('csv', 'run,'), ('latex', r'\begin')):
        printed = call('report', tmp_path / 'run', '--format', style)
        assert printed.exit_code == 0, printed.output
        assert start in printed.output
    assert 'Error: ' in call('report', tmp_path / 'run', '--baseline', 'rise').output
    # some methods only, with the controls
    part = call('report', tmp_path / 'run', '--methods', 'grad_cam', '--format', 'csv').output
    assert 'grad_cam' in part and 'sobel' in part and 'resnet_lrp_ratio' not in part
    typo = call('report', tmp_path / 'run', '--methods', 'grad_cam,grad_camera')
    assert typo.exit_code == 2
    assert typo.output.startswith("Error: there are no records of 'grad_camera', but of constant, gaussian, grad_cam, ")
    assert 'has no records of' not in call('report', tmp_path / 'run', '--methods', 'grad_cam').output
    preset = call('report', tmp_path / 'run', '--preset', 'lrp-for-resnet-table1').output
    assert 'Grad-CAM: grad_cam' in ' '.join(preset.split()) and 'quantize4' not in preset


def test_command(assets, photos, tmp_path, monkeypatch):
    '''The command is kept so that it can be given again, and none if it was another program.'''
    args = [
        '--data', photos, '--out', tmp_path / 'a run', '--model', 'narrow_resnet18', '--weights', assets / 'net.pt',
        '--size', 32, '--methods', 'random', '--no-controls', '--step', 512, '--device', 'cpu',
    ]
    command = ['-m', 'captum_adapters', 'evaluate', *map(str, args)]
    monkeypatch.setattr(sys, 'argv', command[1:])
    with pytest.raises(SystemExit) as info:
        runpy.run_module('captum_adapters', run_name='__main__', alter_sys=True)
    assert not info.value.code
    assert shlex.split(read_run(tmp_path / 'a run').settings['command']) == ['python', *command]
    call('evaluate', *args, '--out', tmp_path / 'other')
    assert read_run(tmp_path / 'other').settings['command'] is None


def test_report_of_chosen_methods(assets, photos, tmp_path):
    '''Runs of methods that are not chosen are left out, and do not lack records.'''
    names = 'grad_cam', 'gradient'
    for name in names:
        evaluate(assets, photos, tmp_path / name, '--methods', name, '--no-controls')
    report = call('report', *(tmp_path / name for name in names), '--methods', 'gradient').output
    assert 'gradient' in report and 'grad_cam' not in report and 'records' not in report


def test_exit_codes(assets, photos, tmp_path):
    '''Those of docs/evaluation.md.'''
    assert evaluate(assets, photos, tmp_path / 'run', '--no-controls', '--dry-run').exit_code == 0
    assert evaluate(assets, photos, tmp_path / 'run', '--methods', 'lime').exit_code == 2
    result = call('report', tmp_path)
    assert result.exit_code == 2 and result.output.startswith('Error: ') and 'holds no run' in result.output
    assert call('report', tmp_path, '--page').exit_code == 2 and call('report').exit_code == 2
    assert evaluate(assets, photos, tmp_path / 'run', '--seed', 'x').exit_code == 2


def test_quiet(assets, photos, tmp_path):
    '''Nothing is printed.'''
    result = evaluate(assets, photos, tmp_path / 'run', '--methods', 'grad_cam', '--no-controls', '--quiet')
    assert (result.exit_code, result.output) == (0, '')


@pytest.mark.parametrize('args, message', [
    (('--methods', 'grad_camera'), "unknown method 'grad_camera'"),
    (('--metrics', 'beauty'), "metrics='beauty'"),
    (('--preset', 'table3'), 'table3'),
    (('--percents', '1,many'), 'not made of numbers'),
    (('--methods', ','), "no names in ','"),
    (('--methods', '+grad_cam'), '+grad_cam is for what a preset has besides'),
    (('--explain-class', 'truth'), 'truth'),
    (('--preset', 'c3-lrp-table1', '--preset', 'r-lrp-fig25'), 'differ in their protocol'),
])
def test_errors(assets, photos, tmp_path, args, message):
    '''What is wrong is said in one line, without a traceback.'''
    result = evaluate(assets, photos, tmp_path / 'run', *args)
    assert result.exit_code != 0
    assert message in result.output
    assert result.output.strip().splitlines()[-1].startswith('Error: ')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('missing', ['--data', '--out'])
def test_missing(tmp_path, missing):
    '''What is necessary is asked for in one line, whether or not click notices that it is missing.'''
    given = {'--data': tmp_path, '--out': tmp_path / 'run'}
    del given[missing]
    result = call('evaluate', *(text for pair in given.items() for text in pair))
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit)
    last = result.output.strip().splitlines()[-1]
    assert last.startswith('Error: ') and missing in last
    with pytest.raises(ValueError, match=missing):
        make_evaluation({key.lstrip('-'): str(value) for key, value in given.items()})


def test_list():
    '''All methods are listed.'''
    names = call('evaluate', '--list').output.split()
    assert {'resnet_lrp_ratio', 'grad_cam', 'rise', 'lrp_0', 'epsilon_plus', 'sobel', 'abn'} <= set(names)
    assert len(set(names)) == len(names)
    for name in names:
        assert Method(name).text == name


def test_presets():
    '''Presets are complete, and are combined and changed by what is given.'''
    for name, preset in PRESETS.items():
        evaluation = make_evaluation({'data': 'x', 'out': 'y', 'preset': (name,)})
        assert evaluation.methods == tuple(name for name in preset.rows if name != 'abn')
        assert evaluation.preset == (name,)
        assert set(preset.columns) <= set(COLUMNS)
        assert set(preset.printed) <= set(preset.rows)
        assert all(set(row) <= set(COLUMNS) for row in preset.printed.values())
        for text in preset.rows:
            Method(text)
    both = make_evaluation({'data': 'x', 'out': 'y', 'preset': ('c3-lrp-table1', 'c3-lrp-table2')})
    assert both.methods[:2] == ('rise', 'grad_cam')
    assert sorted(both.methods) == sorted({*PRESETS['c3-lrp-table1'].rows, *PRESETS['c3-lrp-table2'].rows} - {'abn'})
    assert (both.published, both.initial) == ('label', 'softmax')
    masks = make_evaluation({'data': 'x', 'out': 'y', 'preset': ('r-lrp-fig25', 'r-lrp-fig28')})
    assert masks.metrics == ('pointing', 'distance')
    assert masks.rank_by == 'magnitude'
    more = make_evaluation({
        'data': 'x', 'out': 'y', 'preset': ('c3-lrp-table2',), 'methods': ('+grad_cam', 'rise'), 'initial': 'one',
    })
    assert more.methods == (*PRESETS['c3-lrp-table2'].rows, 'grad_cam', 'rise')
    assert (more.published, more.initial) == ('label', 'one')
    other = make_evaluation({'data': 'x', 'out': 'y', 'preset': ('c3-lrp-table2',), 'methods': ('grad_cam',)})
    assert other.methods == ('grad_cam',)


@pytest.mark.parametrize('seconds, text', [
    (0, '0 s'), (29, '29 s'), (60, '1 min'), (3540, '59 min'), (3600, '1 h 0 min'), (90061, '25 h 1 min'),
])
def test_duration(seconds, text):
    '''Times are readable.'''
    assert duration(seconds) == text


def test_options_of_baselines(assets, photos, tmp_path):
    '''A preset's baseline is meant with any options, but not a method of ours.'''
    methods = 'rise:n_masks=8,block_lrp+c3,block_lrp:epsilon=0.1+c3'
    evaluate(assets, photos, tmp_path / 'run', '--methods', methods)
    result = call('report', tmp_path / 'run', '--preset', 'c3-lrp-table1')
    assert 'RISE: rise:n_masks=8' in result.output
    assert 'ABN: abn' in result.output
    assert 'Ours: block_lrp+c3' in result.output
    assert 'epsilon' not in result.output


def test_same_names(assets, photos, tmp_path):
    '''Methods have the same names in explain and compare, and give the same heatmap.'''
    names = 'resnet_lrp_ratio:first_layer=ones,maxpool=avg2x2+abs+quantize4', 'lrp_gamma_0.25:initial=softmax+ratio'
    options = ['--model', 'narrow_resnet18', '--weights', assets / 'net.pt', '--size', 32, '--device', 'cpu']
    args = ['compare', photos / '0.png', *options, '--methods', ','.join(names), '--out', tmp_path / 'compare.png']
    result = CliRunner().invoke(zennit_main, [str(arg) for arg in args])
    assert result.exit_code == 0 and (tmp_path / 'compare.png').exists(), result.output
    classifier = load_classifier('narrow_resnet18', str(assets / 'net.pt'), 32)
    images = classifier.transform(read_image(photos / '0.png'))[None]
    output = classifier.model(images).detach()
    for name in names:
        args = ['explain', photos / '0.png', *options, '--method', name, '--value', 'softmax', '--out', tmp_path]
        result = CliRunner().invoke(zennit_main, [str(arg) for arg in args])
        assert result.exit_code == 0, result.output
        path, = tmp_path.glob(f'0_{name.partition(":")[0].partition("+")[0]}*_relevance.npy')
        relevance = torch.from_numpy(np.load(path))
        attributed = Method(name).create(Context(classifier)).attribute(images, output.argmax(1), output, ['0'])
        torch.testing.assert_close(relevance.sum(0), attributed.maps[0])
    args = ['explain', photos / '0.png', *options, '--method', 'resnet_lrp_ratio:first_layer=best']
    result = CliRunner().invoke(zennit_main, [str(arg) for arg in args])
    assert result.exit_code == 2 and 'best' in result.output and len(result.output.splitlines()) == 1


ODD = 'red\x1b[31m\nline\u202e'


def assert_printable(result, code):
    '''Nothing but line breaks controls the terminal.'''
    assert result.exit_code == code, result.output
    assert all(char.isprintable() or char == '\n' for char in result.output), ascii(result.output)


def test_odd_names(assets, photos, tmp_path):
    '''Escape sequences and line breaks in names do not reach the terminal, in all that is printed.'''
    (tmp_path / ODD).mkdir()
    for name in (f'{ODD}.png', f'broken {ODD}.png'):
        (tmp_path / ODD / name).write_bytes(b'' if 'broken' in name else (photos / '0.png').read_bytes())
    out = tmp_path / f'run {ODD}'
    options = ('--methods', 'grad_cam', '--no-controls', '--data', tmp_path / ODD)
    result = evaluate(assets, photos, out, *options)
    assert_printable(result, 0)
    assert f"report: python -m captum_adapters report '{tmp_path}/run red?[31m?line?'" in result.output
    for style in ('terminal', 'markdown', 'csv', 'latex'):
        result = call('report', out, '--format', style, '--out', tmp_path / f'report {ODD}')
        assert_printable(result, 0)
        if style == 'terminal':
            assert 'broken red?[31m?line?' in ' '.join(result.output.split()), result.output
            assert re.search(r'^written .*/report red\?\[31m\?line\?/', result.output, re.M)
    assert_printable(evaluate(assets, photos, out, *options, '--model', ODD), 2)
    assert_printable(evaluate(assets, photos, out, '--data', tmp_path / f'missing {ODD}'), 2)
    assert_printable(call('report', tmp_path / f'missing {ODD}'), 2)
    assert_printable(call('evaluate', '--explain-class', ODD), 2)
    assert_printable(call(ODD), 2)


HIDDEN = '''
import runpy, sys
import captum_adapters.attr, captum_adapters.metrics

packages, sys.argv[1:] = sys.argv[1:], ['report', 'x']
assert not set(packages) & set(sys.modules)
for package in packages:
    before, sys.modules[package] = set(sys.modules), None
    try:
        runpy.run_module('captum_adapters', run_name='__main__')
    except SystemExit as error:
        assert error.code == 2
    for name in set(sys.modules) - before | {package}:
        if name.split('.')[0] in ('captum_adapters', package):
            del sys.modules[name]
'''


def test_without_packages():
    '''Without its packages, the evaluator says in one line what to install, and all else can be imported.'''
    packages = 'pandas', 'jinja2', 'tabulate'
    result = subprocess.run([sys.executable, '-c', HIDDEN, *packages], capture_output=True, text=True, check=True)
    lines = result.stderr.splitlines()
    assert len(lines) == len(packages) and not result.stdout
    for package, line in zip(packages, lines):
        assert package in line and 'zennit-resnet[evaluation]' in line
