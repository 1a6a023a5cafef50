'''The examples of one screen run, and their figures are right.'''
import importlib.util
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from zennit_resnet.models import find_embedded, load_classifier

pytestmark = pytest.mark.once

FOLDER = Path(__file__).parent.parent / 'examples'
PICTURES = ('zennit_dropin', 'captum_dropin', 'timm_model', 'layer_relevance', 'compare_checkpoints')


def load(example):
    '''The module of an example.'''
    spec = importlib.util.spec_from_file_location(example, FOLDER / f'{example}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(example, **kwargs):
    '''Run an example on small photographs.'''
    pytest.importorskip('timm' if example == 'timm_model' else 'safetensors')
    module = load(example)
    if hasattr(module, 'load_classifier'):
        module.load_classifier = partial(load_classifier, size=64)
    module.main(**kwargs)


def floats(pattern, text):
    '''The numbers which a pattern with groups finds, a tuple for each place.'''
    return [tuple(map(float, match.groups())) for match in re.finditer(pattern, text)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    '''Pictures are written to a temporary folder.'''
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('name', (*PICTURES, 'own_resnet', 'evaluate_folder', 'quantus_metrics', 'stabilizer'))
def test_one_screen(name):
    '''Examples are of one screen.'''
    lines = (FOLDER / f'{name}.py').read_text(encoding='utf-8').splitlines()
    assert sum(map(bool, lines)) <= 40 and len(lines) <= 50


def check_picture(folder, name):
    '''The picture is there, and it is not blank.'''
    with Image.open(folder / f'{name}.png') as image:
        assert len(image.getcolors(image.width * image.height)) > 100


def test_zennit_dropin(folder, capsys):
    '''Only our composite conserves relevance.'''
    run('zennit_dropin')
    sums = floats(r'logit (\S+) +sum of relevance (\S+)', capsys.readouterr().out)
    assert len(sums) == 3 and sums[-1][0] == pytest.approx(sums[-1][1], abs=2e-4)
    assert all(abs(logit - total) > 1e-2 for logit, total in sums[:-1])
    check_picture(folder, 'zennit_dropin')


def test_captum_dropin(folder, capsys):
    '''The delta is what is missing, which is nothing for splitting.'''
    run('captum_dropin')
    deltas = dict(re.findall(r'(\w+) +logit \S+ +delta (\S+)', capsys.readouterr().out))
    assert list(deltas) == ['InputXGradient', 'ResNetLRP', 'C3LRP', 'RelativeLRP']
    assert abs(float(deltas['ResNetLRP'])) < 1e-3 < abs(float(deltas['InputXGradient']))
    check_picture(folder, 'captum_dropin')


def test_migration(capsys):
    '''What is said to be the same is the same, and only our composite conserves relevance.'''
    maps = load('migration').main()
    before, after = (maps[name] for name in ('EpsilonPlusFlat, Zennit', 'the same numbers'))
    assert (after - before).abs().max() < 1e-3 * before.abs().max()
    sums = floats(r'logit (\S+) +sum (\S+) +cosine (\S+)', capsys.readouterr().out)
    assert len(sums) == 8 and sums[-1][2] > .9999
    gaps = [abs(total / logit - 1) for logit, total, _ in sums[:6]]
    assert max(gaps[3:]) < 5e-3 < 5e-2 < min(gaps[:3])


def test_own_resnet(capsys):
    '''The network learns, and its relevance is on what it learned.'''
    run('own_resnet')
    output = capsys.readouterr().out
    (accuracy,), = floats(r'accuracy (\S+)', output)
    (share, chance), = floats(r'on the bar (\S+), by chance (\S+)', output)
    assert accuracy > 0.9 and share > 5 * chance


def test_electrocardiogram(folder, capsys):
    '''The network learns, and relevance is on the beat more than the signal itself.'''
    pytest.importorskip('pywt')
    torch.manual_seed(0)
    load('electrocardiogram').main()
    output = capsys.readouterr().out
    (accuracy,), = floats(r'accuracy (\S+)', output)
    (share, size, chance), = floats(r'relevance ([\d.]+), signal ([\d.]+), by chance ([\d.]+)', output)
    assert accuracy > 0.95 and share > 0.6 > 3 * chance and share > size
    check_picture(folder, 'electrocardiogram')


def test_timm_model(folder, capsys):
    '''Relevance is conserved, and all additions are found.'''
    run('timm_model', name='seresnet18')
    output = capsys.readouterr().out
    (logit, total), = floats(r'logit (\S+), sum of relevance (\S+)', output)
    assert logit == pytest.approx(total, abs=1e-4) and '8 additions: layer1.0.addition, layer1.1.addition' in output
    check_picture(folder, 'timm_model')


def test_layer_relevance(folder, capsys):
    '''The sum is the same at each layer.'''
    run('layer_relevance')
    sums = dict(re.findall(r'^(\w+) .* sum (\S+)', capsys.readouterr().out, re.M))
    assert list(sums) == ['layer4', 'layer3', 'layer2', 'layer1', 'pixels']
    assert all(float(total) == pytest.approx(1, abs=1e-4) for total in sums.values())
    check_picture(folder, 'layer_relevance')


def test_stabilizer(capsys):
    '''Without a stabilizer, BlockLRP is Gradient x Input, and less so with a larger one.'''
    module = load('stabilizer')
    assert module.EPSILONS[0] == 0 and list(module.EPSILONS) == sorted(module.EPSILONS)
    module.load_classifier, module.NAMES = partial(load_classifier, size=64), module.NAMES[:2]
    module.EPSILONS = module.EPSILONS[::2]
    module.main()
    cosines = [cosine for cosine, in floats(r'lowest cosine ([-.\d]+)', capsys.readouterr().out)]
    assert len(cosines) == 4 and cosines[0] > 1 - 1e-6
    assert cosines == sorted(cosines, reverse=True) and cosines[-1] < .5


def test_compare_checkpoints(folder, capsys):
    '''Random weights change the maps, the same checkpoint does not.'''
    run('compare_checkpoints')
    correlations = floats(r'rank correlation (\S+)', capsys.readouterr().out)
    assert len(correlations) == 2 and all(value < 0.95 for value, in correlations)
    check_picture(folder, 'compare_checkpoints')
    run('compare_checkpoints', second=str(find_embedded()))
    assert floats(r'rank correlation (\S+)', capsys.readouterr().out) == [(1.,), (1.,)]


def test_evaluate_folder(folder, capsys):
    '''Methods are compared, with controls, and a page is written.'''
    run('evaluate_folder', out='evaluation', limit=2, size=32)
    output = capsys.readouterr().out
    assert all(name in output for name in ('resnet_lrp_ratio', 'grad_cam', 'constant', 'Deletion', 'our protocol'))
    assert 'written evaluation/report.html' in output
    assert 'data:image/png;base64,' in (folder / 'evaluation' / 'report.html').read_text(encoding='utf-8')


def test_quantus_metrics(capsys):
    '''There is a row for each method and metric, and gradients depend on the class more than relevance.'''
    pytest.importorskip('quantus')
    module = load('quantus_metrics')
    run('quantus_metrics', runs=4, pixels=500)
    output = capsys.readouterr().out
    rows = re.findall(r'^(\S.*?) +(faithfulness correlation|random logit) +(\S+) ± (\S+)$', output, re.M)
    assert [row[0] for row in rows[::2]] == [row[0] for row in rows[1::2]] == list(module.METHODS)
    scores = {row[:2]: float(row[2]) for row in rows}
    assert len(scores) == 2 * len(module.METHODS) and all(-1 <= value <= 1 for value in scores.values())
    assert all(0 <= float(row[3]) < 1 for row in rows)
    first, second, third, *gradients = (scores[name, 'random logit'] for name in module.METHODS)
    assert max(gradients) < min(first, second, third)


def test_gallery(monkeypatch):
    '''There is a row for each photograph, and a column for each method.'''
    pytest.importorskip('safetensors')
    module = load('gallery')
    monkeypatch.setattr(module, 'CHOICE', {'resnet50': ('gc_cathedral', 'gc_dog')})
    picture = module.draw('resnet50', load_classifier(size=32), 40)
    assert picture.width > 40 * (1 + len(module.METHODS)) and picture.height > 2 * 40
    assert len(picture.getcolors(picture.width * picture.height)) > 100
