'''Explanations as files, which run without this package.'''
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.networks import TinyResNet, randomize
from torch import nn
from zennit.attribution import Gradient

from zennit_resnet import BlockLRP, GammaLRP, RelativeLRP, ResNetLRP, initial_relevance
from zennit_resnet.export import LARGEST, export, run_file
from zennit_resnet.tracing import trace

pytestmark = pytest.mark.once


@pytest.fixture(name='model', scope='module')
def fixture_model():
    '''The network. Some of its channels are never active.'''
    torch.manual_seed(0)
    model = randomize(TinyResNet(5)).eval()
    with torch.no_grad():
        model.bn1.bias[:2] = -100.
        model.block.bn1.bias[3:5] = -100.
    return model


@pytest.fixture(name='images', scope='module')
def fixture_images():
    '''Two images.'''
    return torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(name='traced', scope='module')
def fixture_traced(model, images):
    '''An attribution of the network by ratio splitting.'''
    return trace(model, ResNetLRP(), images)


TARGET = torch.tensor([1, 4])
START = initial_relevance(TARGET)


def attribute(model, composite, images, start=START):
    '''Logits and relevance by Zennit.'''
    output, relevance = Gradient(model, composite)(images, start)
    return output.detach().numpy(), relevance.detach().numpy()


def assert_close(actual, expected, tolerance=1e-4):
    '''Compare relative to the largest value.'''
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


class Skip(nn.Module):
    '''A skip connection around one convolution, as each layer more takes ONNX half a second.'''
    def __init__(self):
        super().__init__()
        self.conv, self.other, self.norm = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        self.pool, self.linear = nn.MaxPool2d(3, 2, 1), nn.Linear(8, 5)

    def forward(self, x):
        '''Logits.'''
        x = self.pool(self.conv(x).relu())
        return self.linear((x[..., 1:-1, 1:-1] + self.norm(self.other(x))).relu().mean((2, 3)))


@pytest.mark.parametrize('composite', [
    ResNetLRP(),
    ResNetLRP('symmetric', classifier='epsilon', first_layer='zbox', low=-1., high=1., batch_norm='merge'),
    ResNetLRP(projection='literal', maxpool='average', dead_units='drop'),
    RelativeLRP(), BlockLRP(), GammaLRP(),
], ids=['ratio', 'zbox', 'literal', 'relative', 'block', 'gamma'])
def test_onnx(composite, model, images, tmp_path):
    '''ONNX Runtime computes what PyTorch does, for other images, too: with negative values, and for a black one.'''
    pytest.importorskip('onnxscript')
    pytest.importorskip('onnxruntime')
    if not isinstance(composite, ResNetLRP):
        model = randomize(Skip()).eval()
    path = tmp_path / 'explain.onnx'
    export(trace(model, composite, images), images, path, relevance=True)
    for image in (images, images.flip(0, 3) * .7, images.abs(), torch.zeros_like(images)):
        output, relevance = attribute(model, composite, image)
        found = run_file(path, image, TARGET)
        assert list(found) == ['logits', 'heatmap', 'relevance']
        assert_close(found['logits'], output)
        assert_close(found['relevance'], relevance)
        assert_close(found['heatmap'], relevance.sum(1))


@pytest.fixture(name='small', scope='module')
def fixture_small(images):
    '''A network of two layers, with a traced attribution for each rule of the classifier.'''
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)).eval()
    return model, {rule: trace(model, ResNetLRP(classifier=rule), images) for rule in ('zplus', 'epsilon')}


@pytest.mark.parametrize('classifier, options', [
    *((rule, options) for rule in ('zplus', 'epsilon') for options in (
        {}, {'value': 'one'}, {'contrast': 'softmax', 'contrast_weight': .5},
    )),
    ('zplus', {'value': 'softmax'}), ('zplus', {'contrast': 'centred'}),
    ('epsilon', {'contrast': 'runner_up', 'value': 'logit'}), ('zplus', {'contrast': 3}),
    ('epsilon', {'contrast': [0, 2]}), ('zplus', {'contrast': torch.tensor([[0], [2]])}),
], ids=str)
def test_start(classifier, options, small, images, tmp_path):
    '''What relevance starts from is computed in the file, for any target. By default, it is what rules need.'''
    model, traced = small
    composite = ResNetLRP(classifier=classifier)
    metadata = export(traced[classifier], images, tmp_path / 'explain.pt2', **options)
    for target in (TARGET, torch.tensor([2, 0])):
        found = run_file(tmp_path / 'explain.pt2', images, target)
        _, relevance = attribute(model, composite, images, initial_relevance(target, **options))
        assert_close(found['heatmap'], relevance.sum(1), 1e-5)
    start = 'logit' if classifier == 'epsilon' or 'contrast' not in options else 'one'
    assert metadata['value'] == options.get('value', start)


@pytest.mark.parametrize('suffix', ['.onnx', '.pt2'])
def test_file(suffix, model, traced, images, tmp_path):
    '''A file has its own normalization, and says what it is. The predicted class need not be known.'''
    if suffix == '.onnx':
        pytest.importorskip('onnxscript')
        runtime = pytest.importorskip('onnxruntime')
    path, composite = tmp_path / f'explain{suffix}', ResNetLRP()
    mean, std = [.4, .5, .6], [.5, .4, .6]
    own = {'classes': ['a', 'é', '中', 'd', 'e'], 'method': 'ratio'}
    written = export(traced, images, path, contrast=2, normalization=(mean, std), metadata=own)
    assert list(tmp_path.iterdir()) == [path]
    image = images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    predicted = model(images).argmax(1)
    output, relevance = attribute(model, composite, images, initial_relevance(predicted, contrast=2))
    for target in (predicted, torch.tensor([-1, -1])):
        found = run_file(path, image, target)
        assert_close(found['logits'], output)
        assert_close(found['heatmap'], relevance.sum(1))
    # a class that there is not, and a batch of another size
    for wrong in ((image, torch.tensor([0, 5])), (image[:1], TARGET[:1])):
        with pytest.raises(Exception, match='(?i)ind|shape|dim|size|guard'):
            run_file(path, *wrong)
    if suffix == '.onnx':
        session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
        found = session.get_modelmeta().custom_metadata_map
        assert [(each.name, each.shape, each.type) for each in session.get_inputs()] == [
            ('image', [2, 3, 24, 24], 'tensor(float)'), ('target', [2], 'tensor(int64)')
        ]
    else:
        files = {'metadata.json': ''}
        torch.export.load(path, extra_files=files)
        found = json.loads(files['metadata.json'])
    assert found == written
    assert json.loads(found['classes']) == own['classes'] and found['method'] == 'ratio'
    assert found['composite'] == repr(composite) and json.loads(found['contrast']) == [2]
    assert json.loads(found['normalization'])['mean'] == pytest.approx(mean)
    assert set(json.loads(found['outputs'])) == {'logits', 'heatmap'}
    # nothing of this machine
    assert str(tmp_path.parent).encode() not in path.read_bytes() and b'site-packages' not in path.read_bytes()


def test_without_this_package(model, traced, images, tmp_path):
    '''A file needs nothing of this package or Zennit.'''
    path = tmp_path / 'explain.pt2'
    export(traced, images, path)
    np.save(tmp_path / 'images.npy', images.numpy())
    code = '''
import sys
import numpy, torch
sys.modules.update(zennit=None, zennit_resnet=None, torchvision=None)
images = torch.from_numpy(numpy.load('images.npy'))
output, heatmap = torch.export.load('explain.pt2').module()(images, torch.tensor([1, 4]))
numpy.save('heatmap.npy', heatmap.numpy())
'''
    subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)
    assert_close(np.load(tmp_path / 'heatmap.npy'), attribute(model, ResNetLRP(), images)[1].sum(1), 1e-5)


def test_single_output_and_signals(tmp_path):
    '''An output of shape (batch,) is one class, and signals have one dimension.'''
    layers = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 1))
    model, signals = nn.Sequential(layers, nn.Flatten(0)).eval(), torch.rand(3, 2, 9)
    export(trace(model, ResNetLRP(), signals), signals, tmp_path / 'signal.pt2')
    found = run_file(tmp_path / 'signal.pt2', signals, torch.zeros(3, dtype=torch.long))
    output, relevance = attribute(model, ResNetLRP(), signals, initial_relevance(None))
    assert found['logits'].shape == (3,)
    assert_close(found['logits'], output)
    assert_close(found['heatmap'], relevance.sum(1), 1e-5)


@pytest.mark.parametrize('options, kind, part', [
    ({'path': 'explain.pb'}, ValueError, '.pb'),
    ({'value': 'probability'}, ValueError, 'probability'),
    ({'contrast': 'nearest'}, ValueError, 'nearest'),
    ({'contrast': 7}, IndexError, '7'),
    ({'contrast_weight': .5}, ValueError, '0.5'),
    ({'normalization': ([.5] * 2, [.5] * 3)}, ValueError, 'mean'),
    ({'normalization': ([.5] * 3, [0.] * 3)}, ValueError, 'std'),
    ({'metadata': {'classes': 'a', 'value': 'softmax'}}, ValueError, "'value' is what the file itself"),
    ({'relevance': 1}, TypeError, '1'),
    ({'traced': nn.ReLU()}, TypeError, 'ReLU'),
    ({'input': [1.]}, TypeError, 'list'),
], ids=str)
def test_arguments(options, kind, part, traced, images, tmp_path):
    '''Errors name what is wrong, and nothing is written.'''
    args = {'traced': traced, 'input': images, 'path': 'explain.pt2', **options}
    args['path'] = tmp_path / args['path']
    with pytest.raises(kind, match=part):
        export(**args)
    assert not list(tmp_path.iterdir())


def test_overwrite(traced, images, tmp_path, monkeypatch):
    '''A file is replaced if that is asked for, as a whole or not at all.'''
    path = tmp_path / 'explain.pt2'
    path.write_text('something else')
    with pytest.raises(FileExistsError, match='explain.pt2'):
        export(traced, images, path)

    def fail(program, path, **kwargs):
        with open(path, 'w') as file:
            file.write('half of')
        raise OSError('disk full')

    with monkeypatch.context() as patch, pytest.raises(OSError, match='disk full'):
        patch.setattr(torch.export, 'save', fail)
        export(traced, images, path, overwrite=True)
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == 'something else'
    export(traced, images, path, overwrite=True)
    assert run_file(path, images, TARGET)['heatmap'].shape == (2, 24, 24)
    with pytest.raises(FileNotFoundError, match='missing'):
        export(traced, images, tmp_path / 'missing' / 'explain.pt2')


def test_dense_output(tmp_path):
    '''A map of logits has no class to explain.'''
    model, images = nn.Conv2d(3, 4, 3).eval(), torch.rand(1, 3, 6, 6)
    with pytest.raises(ValueError, match=r'\(1, 4, 4, 4\)'):
        export(trace(model, ResNetLRP(), images), images, tmp_path / 'explain.pt2')


def test_no_form_in_onnx(tmp_path):
    '''An operation that ONNX does not have is named, and the layer that it is from.'''
    pytest.importorskip('onnxscript')

    class Special(nn.Module):
        '''A function that ONNX does not have.'''
        def forward(self, x):
            '''Some values.'''
            return torch.special.bessel_j0(x.detach()) + x

    network = nn.Sequential()
    network.add_module('odd', Special())
    network.add_module('last', nn.Linear(4, 3))
    images = torch.rand(2, 4)
    with pytest.raises(ValueError, match=r'bessel_j0.*odd \(Special\)'):
        export(trace(network.eval(), ResNetLRP(), images), images, tmp_path / 'explain.onnx')
    assert not list(tmp_path.iterdir())


def test_too_large(traced, images, tmp_path, monkeypatch):
    '''A file of ONNX is of 2 GB at most.'''
    pytest.importorskip('onnxscript')
    assert 2 ** 30 < LARGEST < 2 ** 31
    monkeypatch.setattr('zennit_resnet.export.LARGEST', 1000)
    with pytest.raises(ValueError, match='GB'):
        export(traced, images, tmp_path / 'explain.onnx')
    assert not list(tmp_path.iterdir())


def test_packages_are_missing(traced, images, tmp_path, monkeypatch):
    '''What to install is said before anything is computed.'''
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    pytest.importorskip('onnx')
    with pytest.raises(ImportError, match='pip install'):
        export(traced, images, tmp_path / 'explain.onnx')
