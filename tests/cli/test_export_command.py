'''Tests for the command that writes an explanation as one file.'''
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn
from torchvision.models import _api
from torchvision.models.resnet import BasicBlock
from zennit.attribution import Gradient

from zennit_resnet import BlockLRP, ResNetLRP, initial_relevance
from zennit_resnet.cli.commands import main
from zennit_resnet.export import run_file

pytestmark = pytest.mark.once

CLASSES = ['tabby cat', 'golf ball', 'church']


def tiny_net(weights=None, num_classes=1000):
    '''A residual network that is traced in seconds, which none of torchvision is.'''
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), BasicBlock(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, num_classes),
    )


tiny_net.__module__ = 'torchvision.models.tiny'


@pytest.fixture(autouse=True)
def fixture_registered(monkeypatch):
    '''Have torchvision know the tiny network by name.'''
    monkeypatch.setitem(_api.BUILTIN_MODELS, 'tiny_net', tiny_net)


@pytest.fixture(name='weights', scope='module')
def fixture_weights(tmp_path_factory):
    '''Path of weights of the tiny network, for three classes.'''
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'tiny.safetensors'
    save_file(dict(tiny_net(num_classes=3).eval().state_dict()), path, {'classes': ','.join(CLASSES)})
    return path


@pytest.fixture(name='run')
def fixture_run(weights, tmp_path, monkeypatch):
    '''Run the command in a folder of its own.'''
    def run(*args):
        '''Run it without a terminal.'''
        monkeypatch.chdir(tmp_path)
        options = ['export', '--model', 'tiny_net', '--weights', weights, '--size', 32, *args]
        result = CliRunner().invoke(main, list(map(str, options)))
        # anything but a regular exit is a crash
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result
    return run


def network(weights):
    '''The network of the file.'''
    from zennit_resnet.models import load_classifier
    return load_classifier('tiny_net', weights, 32)


@pytest.mark.parametrize('suffix, name, composite', [
    ('.onnx', 'block_lrp:', lambda low, high: BlockLRP()),
    ('.pt2', 'resnet_lrp_ratio:first_layer=zbox,', lambda low, high: ResNetLRP(first_layer='zbox', low=low, high=high)),
], ids=['.onnx', '.pt2'])
def test_export(suffix, name, composite, run, weights, tmp_path):
    '''The file computes the logits and heatmaps of the method.'''
    if suffix == '.onnx':
        pytest.importorskip('onnxscript')
        pytest.importorskip('onnxruntime')
    out = tmp_path / f'explain{suffix}'
    method = f'{name}contrast=softmax,contrast_weight=0.5'
    result = run('--method', method, '--out', out, '--normalize', '--relevance', '--batch-size', 2)
    assert result.exit_code == 0, result.output
    assert list(tmp_path.iterdir()) == [out]
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines['written'] == f'{out}, {out.stat().st_size / 1e6:.1f} MB'
    assert method in lines['method'] and 'LRP' in lines['method']
    assert lines['method'].endswith('from logit' if suffix == '.onnx' else 'from one')
    assert 'image' in lines['inputs'] and 'heatmap' in lines['outputs']
    assert float(lines['check'].split()[4]) < 1e-4 and 'more than' not in lines['check']
    classifier, image = network(weights), torch.rand(2, 3, 32, 32)
    input, target = (image - classifier.mean) / classifier.std, torch.tensor([0, 2])
    start = initial_relevance(target, contrast='softmax', contrast_weight=.5)
    _, relevance = Gradient(classifier.model, composite(*classifier.bounds()))(input, start)
    found = run_file(out, image, target)
    expected = relevance.sum(1).numpy()
    assert np.abs(found['heatmap'] - expected).max() <= 1e-4 * np.abs(expected).max()
    assert found['relevance'].shape == (2, 3, 32, 32)
    if suffix == '.pt2':
        files = {'metadata.json': ''}
        torch.export.load(out, extra_files=files)
        metadata = json.loads(files['metadata.json'])
        assert json.loads(metadata['classes']) == CLASSES
        preprocessing = json.loads(metadata['preprocessing'])
        assert preprocessing['size'] == [32, 32] and 'mean' not in preprocessing
        assert json.loads(metadata['normalization'])['mean'] == pytest.approx([.485, .456, .406])
        # nothing is replaced unless that is asked for
        before = out.read_bytes()
        result = run('--out', out)
        assert result.exit_code == 2 and '--overwrite' in result.stderr and out.read_bytes() == before
        start = '--value', 'softmax', '--contrast', 'golf ball'
        result = run('--out', out, '--overwrite', '--method', 'block_lrp', *start)
        assert result.exit_code == 0, result.output
        torch.export.load(out, extra_files=files)
        metadata = json.loads(files['metadata.json'])
        assert json.loads(metadata['preprocessing'])['mean'] == pytest.approx([.485, .456, .406])
        assert metadata['value'] == 'softmax' and json.loads(metadata['contrast']) == [1]


@pytest.mark.parametrize('args, part', [
    (['--out', 'explain.pb'], '.pb'),
    (['--out', 'missing/explain.pt2'], 'missing'),
    (['--method', 'input_x_gradient'], 'input_x_gradient'),
    (['--method', 'resnet_lrp_ratio+c3'], 'c3'),
    (['--method', 'resnet_lrp_ratio+abs'], 'abs'),
    (['--method', 'resnet_lrp'], 'resnet_lrp'),
    (['--method', 'epsilon_plus_flat', '--splitting', 'zennit'], 'zennit'),
    (['--model', 'resnet0'], 'resnet0'),
    (['--weights', 'missing.pt'], 'missing.pt'),
    (['--contrast', 'trout'], 'trout'),
    (['--method', 'resnet_lrp_ratio:contrast=9'], '9'),
], ids=str)
def test_errors(args, part, run, tmp_path):
    '''An error is one line that names what is wrong, and no file is left.'''
    result = run('--out', 'explain.pt2', *args)
    assert result.exit_code == 2 and result.stdout == ''
    assert result.stderr.startswith('Error: ') and result.stderr.count('\n') == 1 and part in result.stderr
    assert not list(tmp_path.iterdir())


def test_check_finds_differences(tmp_path):
    '''A file that computes something else is noticed.'''
    from zennit_resnet.cli.export import compare_file

    class Other(nn.Module):
        '''Something else.'''
        def forward(self, image, target):
            '''Logits and heatmap.'''
            return image.mean((2, 3)) + 0 * target[:, None], image.sum(1)

    image, target = torch.rand(1, 3, 8, 8), torch.tensor([0])
    torch.export.save(torch.export.export(Other(), (image, target)), tmp_path / 'other.pt2')
    logits, heatmap = Other()(image, target)
    assert 'more than' not in compare_file(tmp_path / 'other.pt2', image, target, logits, heatmap)
    heatmap[0, 3, 3] += .01
    assert 'more than 0.0001' in compare_file(tmp_path / 'other.pt2', image, target, logits, heatmap)
    assert 'more than' in compare_file(tmp_path / 'other.pt2', image, target, logits, heatmap * torch.nan)
