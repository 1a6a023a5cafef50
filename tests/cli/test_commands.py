'''Tests for the command line and the loading of classifiers.'''
import contextlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.networks import narrow_resnet18
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import get_model, resnet18
from torchvision.transforms.functional import normalize, to_tensor
from zennit.attribution import Gradient
from zennit.composites import COMPOSITES, EpsilonGammaBox, EpsilonPlus
from zennit.torchvision import ResNetCanonizer

from zennit_resnet import models
from zennit_resnet.attribution import initial_relevance
from zennit_resnet.cli import main
from zennit_resnet.cli.session import save_picture
from zennit_resnet.composites import ResNetLRP, with_splitting
from zennit_resnet.explanation import unique_names
from zennit_resnet.image import color_range, draw_heatmap
from zennit_resnet.methods import Method
from zennit_resnet.models import load_classifier
from zennit_resnet.postprocess import c1c, c3, heat_quantization, sum_channels
from zennit_resnet.rules import SymmetricSplit

pytestmark = pytest.mark.once

CLASSES = ['tabby cat', 'golf ball', 'church']
ROOT = Path(__file__).resolve().parents[2]
SIZE = 64
# Side of small photographs in figures
TILE = 224


@pytest.fixture(name='tiny', scope='module')
def fixture_tiny():
    '''A ResNet-18 with three classes and statistics of batch normalization that fit its activations.'''
    torch.manual_seed(1)
    model = narrow_resnet18(num_classes=len(CLASSES))
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, SIZE, SIZE))
        # positive logits of comparable size
        model.fc.bias.copy_(torch.tensor([3., 3.5, 4.]))
    return model.eval()


@pytest.fixture(name='weights', scope='module')
def fixture_weights(tiny, tmp_path_factory):
    '''Path of a safetensors file with names of classes.'''
    path = tmp_path_factory.mktemp('weights') / 'tiny.safetensors'
    save_file(dict(tiny.state_dict()), path, {'classes': ','.join(CLASSES)})
    return path


@pytest.fixture(name='photos')
def fixture_photos(tmp_path):
    '''Paths of three photographs of different size.'''
    rng = np.random.default_rng(0)
    paths = [tmp_path / f'{name}.png' for name in ('first', 'second', 'third')]
    for path, shape in zip(paths, [(64, 64), (80, 50), (33, 70)]):
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(name='run')
def fixture_run(weights, tmp_path):
    '''Run a command on the tiny network, with ``out`` below the temporary folder.'''
    def run(command, *args):
        '''Run it without a terminal.'''
        out = tmp_path / ('out' if command == 'explain' else 'out.png')
        options = ['--model', 'narrow_resnet18', '--weights', weights, '--size', SIZE]
        # of an option given twice the last one counts
        result = CliRunner().invoke(main, [command, *map(str, [*options, '--out', out, '--overwrite', *args])])
        # anything but a regular exit is a crash
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result, out
    return run


def prepare(path):
    '''Preprocess a photograph independently of the command line.'''
    image = Image.open(path).convert('RGB').resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return normalize(to_tensor(image), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[None]


def relevance_of(tiny, path, composite, target=None, scale=None):
    '''Compute relevance by Zennit's means, and the initial relevance.'''
    input = prepare(path)
    logits = tiny(input).detach()[0]
    target = int(logits.argmax()) if target is None else target
    initial = 1. if scale is None else float(scale(logits)[target])
    seed = torch.eye(len(CLASSES))[[target]] * initial
    return Gradient(model=tiny, composite=composite)(input, seed)[1][0], initial


def find(out, stem, ending='relevance.npy'):
    '''The file of a photograph, explained by one method.'''
    path, = out.glob(f'{stem}_*_{ending}')
    return path


def assert_close(actual, expected, tolerance=1e-4):
    '''Compare relevance relative to its largest value.'''
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def read_report(output):
    '''Get the lines of each photograph's report as a dict from its path.'''
    reports, report = {}, {}
    for line in output.splitlines():
        if line.startswith('  '):
            key, text = line.split(maxsplit=1)
            report[key] = text
        else:
            report = reports[line] = {}
    return reports


@pytest.mark.parametrize('batch_size', [1, 2, 8])
def test_explain(run, tiny, photos, batch_size):
    '''The relevance written is that of the composite, in batches of any size.'''
    result, out = run('explain', *photos, '--batch-size', batch_size)
    assert result.exit_code == 0, result.output
    assert result.stderr == ''
    assert len(list(out.iterdir())) == 6 * 3
    reports = read_report(result.stdout)
    assert list(reports) == [str(path) for path in photos]
    for path in photos:
        expected, initial = relevance_of(tiny, path, ResNetLRP())
        relevance = np.load(find(out, path.stem))
        assert relevance.dtype == np.float32
        assert_close(relevance, expected)
        heatmap = sum_channels(expected[None])[0].numpy()
        size = Image.open(path).size
        picture = np.asarray(Image.open(find(out, path.stem, 'heatmap.png'))).astype(int)
        expected = np.asarray(Image.fromarray(draw_heatmap(heatmap)).resize(size, Image.Resampling.BILINEAR))
        assert np.abs(picture - expected).mean() < (1 if size == (SIZE, SIZE) else 15)
        overlay = Image.open(find(out, path.stem, 'overlay.png'))
        assert overlay.size == size and overlay.mode == 'RGB'
        placed = np.load(find(out, path.stem, 'heatmap.npy'))
        assert placed.shape == size[::-1]
        assert placed.sum() == pytest.approx(float(heatmap.sum()), rel=0.02)

        probabilities = tiny(prepare(path)).softmax(1)[0].tolist()
        best = max(probabilities)
        report = reports[str(path)]
        name = CLASSES[probabilities.index(best)]
        assert report['predicted'].startswith(f'{name} {100 * best:.1f} %')
        assert all(name in report['predicted'] for name in CLASSES)
        assert report['target'] == f'{name} (class {probabilities.index(best)}) {100 * best:.1f} %'
        words = report['relevance'].split()
        assert words[4] == '(one),'
        numbers = [float(words[num].strip(',')) for num in (1, 3, 6)]
        np.testing.assert_allclose(numbers, [initial, initial, 1.], rtol=1e-3)


@pytest.mark.parametrize('args, contrast, options', [
    (['--contrast', 'centred'], 'centred', {}),
    (['--contrast', 'golf ball'], 1, {}),
    (['--contrast', '1'], 1, {}),
    (['--contrast', 'runner_up', '--method', 'resnet_lrp_ratio:classifier=epsilon'], 'runner_up',
     {'classifier': 'epsilon'}),
    (['--method', 'resnet_lrp_ratio:contrast=softmax'], 'softmax', {}),
    # what the method says counts
    (['--method', 'resnet_lrp_ratio:contrast=1', '--contrast', 'softmax'], 1, {}),
], ids=str)
def test_contrast(run, tiny, photos, args, contrast, options):
    '''Why the target, and not another class.'''
    result, out = run('explain', photos[0], '--target', 'tabby cat', *args)
    assert result.exit_code == 0, result.output
    start = initial_relevance(0, contrast=contrast)
    output, expected = Gradient(tiny, ResNetLRP(**options))(prepare(photos[0]), start)
    relevance = np.load(find(out, 'first'))
    assert_close(relevance, expected[0])
    # the rival has more of all features than matter to the target
    assert relevance.min() < 0 and (options or relevance.max() > 0)
    initial = initial_relevance(0, 'logit' if options else 'one', contrast=contrast)(output.detach()).sum()
    report = read_report(result.stdout)[str(photos[0])]
    line = report['relevance']
    assert float(line.split()[3].strip(',')) == pytest.approx(float(initial), abs=1e-4)
    assert line.endswith('for the class less for its rivals')
    name = {'centred': 'others', 1: 'golf ball', 'runner_up': 'the next'}[contrast] if args[0] == '--contrast' else ''
    assert report['target'].endswith(f'% rather than {name}' if name else '%')
    # another contrast has other files
    assert run('explain', photos[0], '--target', 'tabby cat', '--out', out)[0].exit_code == 0
    assert len(list(out.glob('*_relevance.npy'))) == 2


def test_contrast_with_itself(run, photos):
    '''There is nothing to show, and why.'''
    result, _ = run('explain', photos[0], '--target', 1, '--contrast', 'golf ball')
    assert result.exit_code == 0, result.output
    assert 'empty, as golf ball is contrasted with itself' in read_report(result.stdout)[str(photos[0])]['pictures']


def test_contrast_of_input_x_gradient(run, tiny, photos):
    '''The difference of two logits, multiplied by the input.'''
    result, out = run('explain', photos[0], '--target', 0, '--contrast', 2, '--method', 'input_x_gradient')
    assert result.exit_code == 0, result.output
    input = prepare(photos[0]).requires_grad_()
    difference = tiny(input)[0, 0] - tiny(input)[0, 2]
    expected = torch.autograd.grad(difference, input)[0] * input
    assert_close(np.load(find(out, 'first')), expected[0].detach())
    line = read_report(result.stdout)[str(photos[0])]['relevance']
    assert float(line.split()[3].strip(',')) == pytest.approx(difference.item(), rel=1e-3)


def test_contrasts_side_by_side_and_in_the_ledger(run, photos, tmp_path):
    '''All commands know of them.'''
    methods = 'resnet_lrp_ratio,resnet_lrp_ratio:contrast=centred,block_lrp:contrast=2'
    result, out = run('compare', photos[0], '--methods', methods)
    assert result.exit_code == 0 and out.exists(), result.output
    result, _ = run('ledger', photos[0], '--contrast', 'centred', '--out', tmp_path / 'ledgers')
    assert result.exit_code == 0, result.output
    assert 'conserved: the largest deviation' in result.stdout and 'not conserved' not in result.stdout


@pytest.mark.parametrize('args, value', [
    (['--contrast', 'trout'], 'trout'),
    (['--contrast', '3'], '3'),
    (['--method', 'resnet_lrp_ratio:contrast=nearest'], 'nearest'),
    (['--method', 'resnet_lrp_ratio:classifier=gamma'], 'gamma'),
    (['--method', 'resnet_lrp_ratio:contrast=3'], '3'),
    (['--method', 'resnet_lrp_ratio:contrast_weight=0.5'], '0.5'),
    (['--method', 'resnet_lrp_ratio:contrast=1,contrast_weight=some'], 'some'),
])
def test_bad_contrast(run, photos, args, value):
    '''One line that names what is wrong.'''
    result, _ = run('explain', photos[0], *args)
    assert result.exit_code == 2
    assert value in result.stderr and result.stderr.count('\n') == 1


@pytest.mark.parametrize('target', ['golf ball', 'GOLF BALL', '1'])
def test_target(run, tiny, photos, target):
    '''The class to explain may be a name or an index.'''
    result, out = run('explain', photos[0], '--target', target)
    assert 'golf ball (class 1)' in result.stdout
    expected, _ = relevance_of(tiny, photos[0], ResNetLRP(), target=1)
    assert_close(np.load(find(out, 'first')), expected)


@pytest.mark.parametrize('value, scale', [
    ('logit', lambda logits: logits), ('softmax', lambda logits: logits.softmax(0)), ('one', torch.ones_like)
])
def test_value(run, tiny, photos, value, scale):
    '''Relevance starts from the value chosen.'''
    _, out = run('explain', photos[0], '--value', value)
    expected, _ = relevance_of(tiny, photos[0], ResNetLRP(), scale=scale)
    assert_close(np.load(find(out, 'first')), expected)


METHODS = {
    'resnet_lrp_symmetric': lambda: ResNetLRP(splitting='symmetric'),
    'epsilon_plus': EpsilonPlus,
    'epsilon_plus+symmetric': lambda: with_splitting(EpsilonPlus(), SymmetricSplit()),
    'epsilon_plus+zennit': lambda: EpsilonPlus(canonizers=[ResNetCanonizer()]),
    'epsilon_gamma_box': lambda: EpsilonGammaBox(
        low=normalize(torch.zeros(1, 3, SIZE, SIZE), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        high=normalize(torch.ones(1, 3, SIZE, SIZE), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ),
}


@pytest.mark.parametrize('method', METHODS)
def test_method(run, photos, weights, method):
    '''Other composites are used as by Zennit, with the splitting chosen.'''
    name, _, splitting = method.partition('+')
    result, out = run('explain', *photos[:2], '--method', name, *(['--splitting', splitting] if splitting else []))
    assert result.exit_code == 0, result.output
    for path in photos[:2]:
        # Zennit 1.0.0 does not restore models, so that they are not used again
        model = load_classifier('narrow_resnet18', weights, SIZE).model
        scale = None if name.startswith('resnet') else lambda logits: logits
        expected, _ = relevance_of(model, path, METHODS[method](), scale=scale)
        # addends that cancel amplify the rounding
        tolerance = 1e-2 if splitting == 'zennit' else 1e-4
        assert_close(np.load(find(out, path.stem)), expected, tolerance)


@pytest.mark.parametrize('method', sorted(COMPOSITES))
def test_all_composites(run, photos, method):
    '''Every composite that is registered works by its name.'''
    result, out = run('explain', photos[0], '--method', method)
    assert result.exit_code == 0, result.output
    assert np.isfinite(np.load(find(out, 'first'))).all()


@pytest.mark.parametrize('method', [
    'epsilon_plus+zennit', 'epsilon_plus', 'epsilon_plus_flat+ratio', 'resnet_lrp_ratio'
])
def test_model_unchanged(weights, method):
    '''No method changes the model for those that follow.'''
    classifier = load_classifier('narrow_resnet18', weights, SIZE)
    before = {key: value.clone() for key, value in classifier.model.state_dict().items()}
    Method(method).attribute(classifier, torch.randn(1, 3, SIZE, SIZE))
    after = classifier.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_input_x_gradient(run, tiny, photos):
    '''The baseline is the input times the gradient of the logit.'''
    _, out = run('explain', photos[0], '--method', 'input_x_gradient', '--value', 'one')
    input = prepare(photos[0]).requires_grad_()
    gradient, = torch.autograd.grad(tiny(input).max(), input)
    assert_close(np.load(find(out, 'first')), (gradient * input).detach()[0])


def test_quantize(run, photos):
    '''Quantization changes the picture, not the raw relevance.'''
    _, out = run('explain', photos[0], '--quantize', 8)
    relevance = torch.from_numpy(np.load(find(out, 'first')))
    assert len(relevance.sum(0).unique()) > 1000
    picture = np.asarray(Image.open(find(out, 'first', 'heatmap.png')))
    expected = draw_heatmap(heat_quantization(sum_channels(relevance[None]))[0].numpy(), percentile=100)
    np.testing.assert_array_equal(picture, expected)
    assert 2 < len(np.unique(picture.reshape(-1, 3), axis=0)) <= 8


@pytest.mark.parametrize('options, function', [
    (['--postprocess', 'c3'], c3),
    (['--postprocess', 'c1c'], c1c),
    (['--postprocess', 'quantize'], heat_quantization),
    (['--postprocess', 'quantize', '--quantize', 4], lambda heatmap: heat_quantization(heatmap, 4)),
    (['--method', 'resnet_lrp_ratio+quantize4', '--postprocess', 'c3'], lambda heatmap: heat_quantization(heatmap, 4)),
    (['--method', 'resnet_lrp_ratio+none', '--postprocess', 'c3'], lambda heatmap: heatmap),
])
def test_postprocess(run, photos, options, function):
    '''Post-processing changes the picture, not the raw relevance, and is reported.'''
    result, out = run('explain', photos[0], *options)
    assert result.exit_code == 0, result.output
    relevance = torch.from_numpy(np.load(find(out, 'first')))
    assert len(relevance.sum(0).unique()) > 1000
    picture = np.asarray(Image.open(find(out, 'first', 'heatmap.png')))
    percentile = 100 if 'quantize' in str(options) else 99.5
    expected = draw_heatmap(function(sum_channels(relevance[None]))[0].numpy(), percentile)
    np.testing.assert_array_equal(picture, expected)
    report = read_report(result.stdout)[str(photos[0])]
    postprocess = options[1].rpartition('+')[2].rstrip('4')
    assert report.get('pictures') == (None if postprocess == 'none' else f'post-processed by {postprocess}')


def test_empty_postprocess(run, photos, tiny, tmp_path):
    '''If nothing is left of a heatmap, that is said.'''
    state = tiny.state_dict() | {'fc.weight': tiny.fc.weight.detach() * 0}
    torch.save(state, tmp_path / 'constant.pt')
    args = [photos[0], '--weights', tmp_path / 'constant.pt']
    result, _ = run('explain', *args, '--method', 'input_x_gradient', '--postprocess', 'c3')
    assert result.exit_code == 0, result.output
    report = read_report(result.stdout)[str(photos[0])]
    assert report['pictures'] == 'post-processed by c3; empty, as c3 leaves nothing'
    result, _ = run('compare', *args, '--methods', 'input_x_gradient,input_x_gradient+c1c')
    assert result.stdout.splitlines()[1:] == [
        '  input_x_gradient: empty, as relevance is zero everywhere (all)',
        '  input_x_gradient+c1c: empty, as c1c leaves nothing (all)',
    ]


@pytest.mark.parametrize('method', [
    'resnet_lrp_ratio', 'resnet_lrp_ratio+c3', 'block_lrp', 'epsilon_plus', 'lrp_zplus'
])
def test_negative_logit(tiny, photos, tmp_path, method):
    '''Positive relevance is for the class, in pictures, whatever the sign of its logit.'''
    model = narrow_resnet18(num_classes=len(CLASSES))
    model.load_state_dict(tiny.state_dict())
    with torch.no_grad():
        model.fc.bias -= 10.
    torch.save(model.state_dict(), tmp_path / 'negative.pt')
    args = ['--model', 'narrow_resnet18', '--weights', tmp_path / 'negative.pt', '--size', SIZE, '--method', method]
    pictures, arrays = [], []
    for value in ('logit', 'one', 'softmax', None):
        out = tmp_path / str(value)
        options = [] if value is None else ['--value', value]
        result = CliRunner().invoke(main, ['explain', *map(str, [photos[0], *args, *options, '--out', out])])
        assert result.exit_code == 0, result.output
        arrays.append(np.load(find(out, 'first')))
        manifest = json.loads(find(out, 'first', 'manifest.json').read_text())
        is_turned = np.vdot(arrays[-1], np.load(find(out, 'first', 'heatmap.npy'))[None].repeat(3, 0)) < 0
        assert ('opposite sign' in result.stdout) == is_turned == ('against' in manifest['relevance']['positive is'])
        pictures.append(np.asarray(Image.open(find(out, 'first', 'heatmap.png'))).astype(int))
    # two of the three values give the array another sign
    assert np.vdot(arrays[0], arrays[1]) < 0
    for picture in pictures[1:]:
        assert np.abs(picture - pictures[0]).mean() < 0.2
    # without a value, nothing is turned
    default = 0 if method in ('block_lrp', 'epsilon_plus') else 1
    np.testing.assert_array_equal(arrays[3], arrays[default])


def test_same_stems(run, photos, tmp_path):
    '''Photographs of the same name in other folders, or with another suffix, do not overwrite each other.'''
    (tmp_path / 'other').mkdir()
    shutil.copy(photos[1], tmp_path / 'other' / 'first.png')
    Image.open(photos[2]).save(tmp_path / 'FIRST.bmp')
    paths = [photos[0], tmp_path / 'other' / 'first.png', tmp_path / 'FIRST.bmp', photos[0]]
    result, out = run('explain', *paths)
    assert result.exit_code == 0
    contents = [path.read_bytes() for path in out.glob('*_relevance.npy')]
    assert len(set(contents)) == len(contents) == 3
    assert 'first_2_resnet_lrp_ratio_heatmap.png' in read_report(result.stdout)[str(paths[1])]['written']


def test_unique_names():
    '''A number that is appended does not collide with another name either.'''
    paths = [Path(name) for name in ('a/x.png', 'b/x.png', 'c/x_2.png', 'd/X.png', 'e/y.png')]
    stems = unique_names(paths)
    assert len({stem.lower() for stem in stems}) == len(paths)
    assert stems[0] == 'x' and stems[-1] == 'y'


def test_bad_images(run, photos, tmp_path):
    '''What cannot be read gives one line each, and the others are explained.'''
    text, damaged, nan, pipe = (tmp_path / name for name in ('text.png', 'damaged.png', 'nan.tif', 'pipe.png'))
    text.write_text('no image')
    damaged.write_bytes(photos[0].read_bytes()[:-200])
    Image.fromarray(np.full((8, 8), np.nan, dtype=np.float32)).save(nan)
    bad = [tmp_path / 'missing.png', text, damaged, nan]
    if hasattr(os, 'mkfifo'):
        os.mkfifo(pipe)
        bad.append(pipe)
    result, out = run('explain', photos[0], *bad[:2], photos[1], *bad[2:], '--batch-size', 2)
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert len(lines) == len(bad)
    for line, path in zip(lines, bad):
        assert line.startswith(f'Error: {path}: ')
    assert 'NaN' in lines[3] and 'pipe' in lines[-1]
    assert {path.name.partition('_')[0] for path in out.glob('*.npy')} == {'first', 'second'}


def test_only_bad_images(run, tmp_path):
    '''If nothing is left to draw, nothing is written.'''
    for command in ('explain', 'compare'):
        result, out = run(command, tmp_path / 'missing.png')
        assert result.exit_code == 2
        assert len(result.stderr.splitlines()) == 1
        assert not out.is_file()


def test_not_finite(run, photos, tiny, tmp_path):
    '''Relevance that is not finite is an error of the photograph.'''
    state = tiny.state_dict() | {'bn1.weight': tiny.bn1.weight.detach() * float('inf')}
    torch.save(state, tmp_path / 'infinite.pt')
    result, out = run('explain', photos[0], '--weights', tmp_path / 'infinite.pt')
    assert result.exit_code == 2
    assert 'not finite' in result.stderr
    assert not list(out.iterdir())


@pytest.mark.parametrize('options, message', [
    (['--method', 'resnet_lrp'], "unknown method 'resnet_lrp'.*resnet_lrp_ratio"),
    (['--method', 'epsilon_plus+half'], r"unknown suffix '\+half' of epsilon_plus.*\+ratio.*\+c3"),
    (['--method', 'epsilon_plus+ratio', '--splitting', 'ratio'], 'more than one splitting'),
    (['--method', 'epsilon_plus+c3+quantize8'], 'more than one post-processing'),
    (['--method', 'epsilon_plus+quantize1'], 'quantize1 has 1 levels: choose from 2'),
    (['--method', 'epsilon_plus+quantize99999999999'], 'choose from 2 to 65536'),
    (['--quantize', '8', '--postprocess', 'c3'], '--postprocess c3 exclude each other'),
    (['--splitting', 'ratio'], "'ratio' cannot be added to resnet_lrp_ratio"),
    (['--target', 'curch'], "unknown class 'curch'.*church"),
    (['--target', '3'], 'class 3 .* from 0 to 2'),
    (['--target', '-1'], 'class -1 .* from 0 to 2'),
    (['--quantize', '1'], '--quantize 1'),
    (['--quantize', '9' * 30], '--quantize 999.*65536'),
    (['--device', 'abacus'], "'abacus'"),
    (['--device', 'meta'], "'meta'"),
    (['--model', 'resnet34'], 'do not fit the model resnet34'),
    (['--model', 'resnet50'], 'do not fit the model resnet50'),
    (['--model', 'vgg11'], 'do not fit the model vgg11.*classifier.6.weight'),
    (['--model', 'resnt18'], "unknown model 'resnt18'.*resnet18"),
    (['--model', 'resnet18', '--weights', 'IMAGENET'], "no weights 'IMAGENET'.*IMAGENET1K_V1.*DEFAULT"),
    (['--weights', 'missing.pth'], 'no file missing.pth'),
    (['--model', 'resnet18', '--weights', 'x' * 300], "no weights 'xxx"),
    (['--model', 'resnet18', '--weights', 'DEFAULT'], '--size'),
])
def test_bad_options(run, photos, options, message):
    '''What is wrong for all photographs ends the command with one line.'''
    result, _ = run('explain', photos[0], *options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ''
    assert len(result.stderr.splitlines()) == 1
    assert re.search(message, result.stderr), result.stderr


def test_rule_for_other_networks(run, photos, monkeypatch):
    '''Rules of Zennit which fail on a network end the command with one line, ours show where.'''
    def fail(*args):
        raise RuntimeError('hook \'backward\' has returned an incorrect number of values\n(got 1, but expected 3)')

    monkeypatch.setattr('zennit_resnet.methods.Method.attribute', fail)
    result, _ = run('explain', photos[0], '--method', 'epsilon_plus')
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert 'epsilon_plus cannot be used with this network (hook' in result.stderr
    with pytest.raises(AssertionError, match='incorrect number of values'):
        run('explain', photos[0])


def test_picture_too_large(tmp_path):
    '''A comparison that its format cannot hold is written as PNG.'''
    picture = Image.new('RGB', (1, 17000))
    assert save_picture(picture, tmp_path / 'tall.webp') == tmp_path / 'tall.png'
    assert [path.name for path in tmp_path.iterdir()] == ['tall.png']
    assert save_picture(picture, tmp_path / 'tall.bmp').suffix == '.bmp'


def test_model_needs_weights(photos):
    '''Random weights are not explained.'''
    result = CliRunner().invoke(main, ['explain', str(photos[0]), '--model', 'resnet18'])
    assert result.exit_code == 2
    assert '--model resnet18 needs --weights' in result.stderr


def test_no_embedded_network(photos, monkeypatch):
    '''An installed package has no embedded network, which the error tells with what to do.'''
    monkeypatch.setattr(models, 'EMBEDDED', Path('nowhere', 'none.safetensors'))
    result = CliRunner().invoke(main, ['explain', str(photos[0])])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert '--model and --weights' in result.stderr


def test_download_fails(photos, monkeypatch):
    '''Without internet, the error suggests local weights.'''
    def no_internet(*args, **kwargs):
        '''Fail like urllib.'''
        raise OSError('<urlopen error [Errno -2] Name or service not known>')

    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', no_internet)
    result = CliRunner().invoke(main, ['explain', str(photos[0]), '--model', 'resnet18', '--weights', 'IMAGENET1K_V1'])
    assert result.exit_code == 2
    assert "cannot download the weights 'IMAGENET1K_V1' of resnet18" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_named_weights(monkeypatch):
    '''Weights by name bring torchvision's preprocessing and classes, and the picture is what the network sees.'''
    monkeypatch.setattr(
        'torchvision.models._api.load_state_dict_from_url', lambda *args, **kwargs: resnet18().state_dict()
    )
    classifier = load_classifier('resnet18', 'DEFAULT')
    assert len(classifier.classes) == 1000
    assert classifier.find_class('golf ball') == 574
    with pytest.raises(ValueError, match='ambiguous.*264, 474'):
        classifier.find_class('cardigan')
    gradient = np.linspace(0, 255, 256).astype(np.uint8)
    photo = Image.fromarray(np.stack([np.tile(gradient, (256, 1))] * 3, -1))
    input = classifier.transform(photo)
    assert input.shape == (3, 224, 224)
    assert not classifier.model.training
    # the shorter side is resized to 256, and the center is cropped
    np.testing.assert_allclose(classifier.photo(input), np.asarray(photo.crop((16, 16, 240, 240))), atol=1)
    low, high = classifier.bounds()
    assert bool((input[None] >= low - 1e-6).all()) and bool((input[None] <= high + 1e-6).all())


@pytest.mark.parametrize('kind', ['half', 'wrapped', 'parallel', 'counted'])
def test_state_dicts(tiny, tmp_path, kind):
    '''State dicts are found in half precision, within a checkpoint, from DataParallel, and without counters.'''
    state = dict(tiny.state_dict())
    path = tmp_path / 'weights.pth'
    if kind == 'half':
        state = {key: value.half() if value.is_floating_point() else value for key, value in state.items()}
    if kind == 'parallel':
        state = {f'module.{key}': value for key, value in state.items()}
    if kind == 'counted':
        state = {key: value for key, value in state.items() if not key.endswith('num_batches_tracked')}
    torch.save({'epoch': 3, 'state_dict': state} if kind == 'wrapped' else state, path)
    classifier = load_classifier('narrow_resnet18', path, SIZE)
    assert classifier.classes == ['class 0', 'class 1', 'class 2']
    input = torch.randn(2, 3, SIZE, SIZE)
    tolerance = 3e-2 if kind == 'half' else 0
    assert all(param.dtype == torch.float32 for param in classifier.model.parameters())
    torch.testing.assert_close(classifier.model(input), tiny(input), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize('name', ['mobilenet_v3_small', 'squeezenet1_1', 'mnasnet0_5', 'googlenet', 'densenet121'])
def test_number_of_classes(tmp_path, name):
    '''The number of classes is that of the last layer, whatever its name.'''
    kwargs = {'init_weights': False} if name == 'googlenet' else {}
    torch.save(get_model(name, num_classes=4, **kwargs).state_dict(), tmp_path / 'weights.pt')
    assert len(load_classifier(name, tmp_path / 'weights.pt').classes) == 4


def test_size_does_not_fit(tmp_path):
    '''A size that the model cannot process is found when it is loaded.'''
    torch.save(get_model('squeezenet1_1', num_classes=4).state_dict(), tmp_path / 'weights.pt')
    with pytest.raises(ValueError, match='squeezenet1_1 cannot process photographs of 5 x 5.*--size'):
        load_classifier('squeezenet1_1', tmp_path / 'weights.pt', 5)


def test_unsupported_network(tmp_path, photos, run):
    '''A network with operations that no rule covers is refused with one line.'''
    torch.save(get_model('squeezenet1_1', num_classes=4).state_dict(), tmp_path / 'weights.pt')
    options = ['--model', 'squeezenet1_1', '--weights', tmp_path / 'weights.pt', '--size', 64]
    # there is more after its last layer than moves and means
    result, _ = run('explain', photos[0], *options, '--method', 'resnet_lrp_ratio:classifier=epsilon')
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "'ReLU'" in result.stderr


def test_transformer(tmp_path, photos, run):
    '''A network with attention has rules.'''
    torch.save(get_model('swin_t', num_classes=4).state_dict(), tmp_path / 'weights.pt')
    options = ['--model', 'swin_t', '--weights', tmp_path / 'weights.pt', '--size', 64]
    # its logits may be negative
    result, _ = run('explain', photos[0], *options, '--value', 'one')
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize('content', [b'', b'garbage', None])
@pytest.mark.parametrize('suffix', ['pt', 'safetensors'])
def test_bad_files(tmp_path, suffix, content, tiny):
    '''A file which is damaged, or holds something else, gives one line.'''
    path = tmp_path / f'weights.{suffix}'
    if content is None:
        # a whole model, which could run any code when it is loaded
        torch.save(tiny, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)) as info:
        load_classifier('narrow_resnet18', path)
    assert '\n' not in str(info.value)


def test_wrong_names_of_classes(tiny, tmp_path):
    '''Metadata that does not fit is not used silently.'''
    path = tmp_path / 'weights.safetensors'
    save_file(dict(tiny.state_dict()), path, {'classes': 'one,two'})
    with pytest.raises(ValueError, match='2 names of classes.*have 3'):
        load_classifier('narrow_resnet18', path)
    save_file(dict(tiny.state_dict()), path, {'classes': '["great white shark, Jaws", "b", "c"]'})
    assert load_classifier('narrow_resnet18', path).classes[0] == 'great white shark, Jaws'


def tiles(path, columns):
    '''The pictures of the first row of a figure of square photographs.'''
    figure = np.asarray(Image.open(path)).astype(int)
    assert figure.shape[1] == 8 + columns * (TILE + 8)
    lefts = [8 + num * (TILE + 8) for num in range(columns)]
    return [figure[56:56 + TILE, left:left + TILE] for left in lefts], figure


def enlarge(heatmap, percentile=99.5, method=Image.Resampling.BILINEAR):
    '''Draw a heatmap in the size of a tile.'''
    values = Image.fromarray(heatmap[0].float().numpy()).resize((TILE, TILE), method)
    return draw_heatmap(np.asarray(values), bound=color_range(heatmap[0].numpy(), percentile)).astype(int)


def test_compare(run, photos):
    '''One row for each photograph, one column for each method, and a legend.'''
    result, out = run('compare', photos[0], photos[0], '--methods', 'resnet_lrp_ratio,epsilon_plus+zennit')
    assert result.exit_code == 0, result.output
    (photo, *heatmaps), figure = tiles(out, 3)
    expected = Image.open(photos[0]).resize((TILE, TILE), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(photo, np.asarray(expected))
    assert all(tile.std() > 10 for tile in heatmaps)
    # below the pictures, a bar from blue to red
    legend = figure[56 + TILE:, 8 + TILE + 8:]
    assert (legend[..., 2] > legend[..., 0] + 100).any() and (legend[..., 0] > legend[..., 2] + 100).any()
    _, out = run('compare', photos[0], '--methods', 'resnet_lrp_ratio', '--show', 'both')
    assert len(tiles(out, 3)[0]) == 3
    # others have the shape of the photograph
    run('compare', photos[1], '--methods', 'resnet_lrp_ratio')
    width, height = Image.open(photos[1]).size
    assert np.asarray(Image.open(out)).shape[1] == 8 + 2 * (round(width * TILE / height) + 8)


def test_compare_draws_heatmaps(run, photos, tiny):
    '''The heatmap in the figure is the method's.'''
    _, out = run('compare', photos[0], '--methods', 'resnet_lrp_symmetric', '--target', 'golf ball')
    expected, _ = relevance_of(tiny, photos[0], ResNetLRP(splitting='symmetric'), target=1)
    assert np.abs(tiles(out, 2)[0][1] - enlarge(sum_channels(expected[None]))).mean() < 1


def test_compare_scales(run, photos, tiny):
    '''Methods, or all pictures, share a color range.'''
    methods = ['resnet_lrp_ratio', 'input_x_gradient']
    found = {}
    for scale in ('own', 'method', 'all'):
        args = ['compare', photos[0], photos[1], '--methods', ','.join(methods), '--value', 'logit']
        _, out = run(*args, '--scale', scale)
        found[scale] = tiles(out, 3)[0][1:]
    # what the largest relevance sets hides the rest
    brightness = {scale: [tile.max(-1).mean() for tile in pictures] for scale, pictures in found.items()}
    assert brightness['all'][0] < 0.7 * brightness['own'][0]
    assert abs(brightness['method'][0] - brightness['own'][0]) < 0.5 * brightness['own'][0]
    # relevance from one and from a logit is of other units
    result, _ = run('compare', photos[0], '--methods', ','.join(methods), '--scale', 'all')
    assert result.exit_code == 2 and 'logit and one' in result.stderr


def test_same_twice(run, photos):
    '''A method or photograph that is named twice is explained once.'''
    other = photos[0].parent / '..' / photos[0].parent.name / photos[0].name
    new = photos[0].parent / 'new'
    result, _ = run('explain', photos[0], other, '--methods', 'block_lrp,block_lrp', '--out', new)
    assert result.exit_code == 0 and result.stdout.count('written') == 1, result.output


@pytest.mark.parametrize('args, value', [
    (['--cmap', 'rainbow'], 'rainbow'), (['--smooth', 'inf'], 'inf'), (['--mean', '0.5,0.5'], '0.5,0.5'),
    (['--classes', 'missing.txt'], 'missing.txt'), (['--contrast', 'centred', '--value', 'logit'], "'logit'"),
])
def test_errors_in_one_line(run, photos, args, value):
    '''Options of pictures and networks are checked before anything is computed.'''
    result, out = run('explain', photos[0], *args)
    assert result.exit_code == 2 and value in result.stderr and result.stdout == ''
    assert result.stderr.splitlines()[-1].startswith('Error: ')


def test_compare_postprocess(run, photos, tiny):
    '''A suffix chooses a method's post-processing, the option that of all others.'''
    methods = 'resnet_lrp_symmetric+none,resnet_lrp_symmetric,resnet_lrp_symmetric+quantize8,resnet_lrp_symmetric+c1c'
    result, out = run('compare', photos[0], '--methods', methods, '--postprocess', 'c3')
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1
    relevance, _ = relevance_of(tiny, photos[0], ResNetLRP(splitting='symmetric'))
    heatmap, nearest = sum_channels(relevance[None]), Image.Resampling.NEAREST
    expected = [
        enlarge(heatmap), enlarge(c3(heatmap), method=nearest),
        enlarge(heat_quantization(heatmap), 100, nearest), enlarge(c1c(heatmap), method=nearest),
    ]
    for tile, drawn in zip(tiles(out, 5)[0][1:], expected):
        assert np.abs(tile - drawn).mean() < 1
    assert len({tile.tobytes() for tile in expected[:3]}) == 3


def test_postprocess_in_titles():
    '''The title of a method says how its heatmaps are post-processed.'''
    assert Method('epsilon_plus+zennit+c3').text == 'epsilon_plus+zennit+c3'
    assert Method('epsilon_plus+zennit', 'c3').text == 'epsilon_plus+zennit+c3'
    assert Method('epsilon_plus+quantize4', 'c3').text == 'epsilon_plus+quantize4'
    assert Method('epsilon_plus', 'quantize', 5).text == 'epsilon_plus+quantize5'


def test_compare_computes_once(run, photos, monkeypatch):
    '''Methods that only differ in their post-processing share their relevance.'''
    calls = []
    attribute = Method.attribute
    monkeypatch.setattr(Method, 'attribute', lambda self, *args: calls.append(self.text) or attribute(self, *args))
    run('compare', photos[0], '--methods', 'epsilon_plus,epsilon_plus+c3,epsilon_plus+ratio,epsilon_plus+ratio+c1c')
    assert calls == ['epsilon_plus', 'epsilon_plus+ratio']


def test_compare_errors(run, photos, tmp_path):
    '''Unknown methods and file types are found before anything is computed; missing photographs are left out.'''
    result, out = run('compare', photos[0], '--methods', 'resnet_lrp_ratio,nothing')
    assert result.exit_code == 2 and "'nothing'" in result.stderr
    result = CliRunner().invoke(main, ['compare', str(photos[0]), '--out', str(tmp_path / 'figure.xyz')])
    assert result.exit_code == 2 and 'figure.xyz' in result.stderr
    result, out = run('compare', photos[0], tmp_path / 'missing.png', photos[1], '--methods', 'resnet_lrp_ratio')
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
    assert out.is_file()


@pytest.mark.parametrize('number', [1, 3])
def test_progress_bar(photos, weights, tmp_path, number, monkeypatch, capsys):
    '''With a terminal and several photographs there is a bar, which does not mix with what is printed.'''
    fcntl, termios = pytest.importorskip('fcntl'), pytest.importorskip('termios')
    terminal, stderr = os.openpty()
    # 24 lines of 80 columns
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack('HHHH', 24, 80, 0, 0))
    args = [*photos[:number], '--model', 'narrow_resnet18', '--weights', weights, '--size', SIZE]
    with open(stderr, 'w', encoding='utf-8') as file:
        monkeypatch.setattr(sys, 'stderr', file)
        main(['explain', *map(str, args), '--out', str(tmp_path / 'out')], standalone_mode=False)
        monkeypatch.undo()
    stdout, shown = capsys.readouterr().out, b''
    with contextlib.suppress(OSError):  # which some systems raise at the end
        while chunk := os.read(terminal, 4096):
            shown += chunk
    os.close(terminal)
    assert (b'3/3' in shown) == (number == 3)
    assert number == 3 or shown == b''
    assert len(stdout.splitlines()) == 5 * number
    assert list(read_report(stdout)) == [str(path) for path in photos[:number]]


@pytest.mark.skipif(not (ROOT / models.EMBEDDED).is_file(), reason='the embedded network is only in a checkout')
def test_embedded_network(tmp_path):
    '''The README's first command: a photograph of a church is explained by the embedded ResNet-50.'''
    photo = ROOT / 'examples' / 'assets' / 'photos' / 'gc_cathedral.jpg'
    result = subprocess.run(
        [sys.executable, '-m', 'zennit_resnet', 'explain', photo, '--out', tmp_path],
        capture_output=True, text=True, check=True, env=os.environ | {'PYTHONPATH': str(ROOT)},
    )
    report = read_report(result.stdout)[str(photo)]
    assert report['target'].startswith('church (class 4) 9')
    assert report['predicted'].startswith('church 9')
    assert abs(float(report['relevance'].split()[-1]) - 1.) < 1e-3
    assert np.load(find(tmp_path, 'gc_cathedral')).shape == (3, 224, 224)
    assert result.stderr == ''


@pytest.mark.parametrize('command, out, code', [
    ('compare', '{}.png', 0), ('compare', '{}.txt', 2), ('compare', 'missing {}/../file/x.png', 2),
    ('explain', 'file/{}', 2), ('ledger', 'file/{}', 2), ('explain --model {}', 'ignored', 2),
    ('explain --target {}', 'ignored', 2), ('explain --{}', 'ignored', 2), ('{}', 'ignored', 2),
])
def test_odd_names(photos, weights, tmp_path, command, out, code):
    '''Escape sequences and line breaks in names do not reach the terminal.'''
    odd = 'red\x1b[31m\nline\u202e'
    (tmp_path / 'file').write_bytes(b'')
    command, *options = (part.format(odd) for part in command.split(' '))
    result = CliRunner().invoke(main, [
        command, '--model', 'narrow_resnet18', *options, str(photos[0]), '--weights', str(weights),
        '--size', str(SIZE), '--device', 'cpu', '--out', str(tmp_path / out.format(odd)),
    ])
    assert result.exit_code == code, result.output
    assert all(char.isprintable() or char == '\n' for char in result.output), ascii(result.output)
