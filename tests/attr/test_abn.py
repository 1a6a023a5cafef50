'''Tests for attention branch networks: structure, attribution, weights, and the script which trains them.'''
import copy
import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from captum.attr import Attribution
from helpers.networks import narrow_resnet18
from PIL import Image
from torch.nn.functional import batch_norm, conv2d, cross_entropy, interpolate
from torchvision.models import resnet50, vgg11

from captum_adapters.attr.abn import ABN, AttentionBranchNetwork, load_abn, save_abn

pytestmark = pytest.mark.once

SCRIPT = Path(__file__).parent.parent.parent / 'examples' / 'abn' / 'train.py'
N_CLASSES = 3


def randomize(module):
    '''Give all parameters and statistics of batch normalization values as if they had been trained.'''
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.ndim == 1:
            value.data.uniform_(.5, 1.5) if name.endswith(('weight', 'var')) else value.data.normal_(0, .1)
        elif name.endswith(('scores.weight', 'attention.weight')):
            value.data.normal_()
    return module


@pytest.fixture(scope='module')
def trained():
    '''A network with random values.'''
    torch.manual_seed(0)
    return randomize(AttentionBranchNetwork(narrow_resnet18(num_classes=N_CLASSES))).eval()


@pytest.fixture
def net(trained):
    '''A copy of it that tests may change.'''
    return copy.deepcopy(trained)


@pytest.fixture
def input():
    '''Images.'''
    return torch.randn(2, 3, 64, 64)


def constant_attention(net, bias):
    '''Make attention the sigmoid of a constant.'''
    torch.nn.init.zeros_(net.attention_branch.attention_norm.weight)
    torch.nn.init.constant_(net.attention_branch.attention_norm.bias, bias)


# -- structure ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('function,size,side', [(narrow_resnet18, 112, 7), (resnet50, 64, 4), (narrow_resnet18, 80, 5)])
def test_shapes(function, size, side):
    '''Attention has a sixteenth of the size and values in [0, 1], and the output is the perception branch's.'''
    net = randomize(AttentionBranchNetwork(function(num_classes=N_CLASSES))).eval()
    input = torch.randn(2, 3, size, size)
    with torch.no_grad():
        # statistics for which attention is not saturated
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train().momentum = 1.
        net(input)
        net.eval()
        attention_logits, logits, attention = net.forward_branches(input)
        assert torch.equal(net(input), logits)
    assert attention_logits.shape == logits.shape == (2, N_CLASSES)
    assert not torch.allclose(attention_logits, logits)
    assert attention.shape == (2, 1, side, side)
    assert bool(((attention > 0) & (attention < 1)).all()) and float(attention.std()) > 1e-3


@torch.no_grad()
def test_perception_branch(input):
    '''Without attention, this is the residual network, and with full attention features are doubled.'''
    model = randomize(narrow_resnet18(num_classes=N_CLASSES)).eval()
    net = AttentionBranchNetwork(model)
    constant_attention(net, -1e4)
    assert torch.equal(net(input), model(input))
    constant_attention(net, 1e4)
    handle = model.layer3.register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(net(input), model(input))
    handle.remove()
    constant_attention(net, 0)
    model.layer3.register_forward_hook(lambda module, args, output: 1.5 * output)
    assert torch.equal(net(input), model(input))


@torch.no_grad()
def test_attention_branch(net, input):
    '''The attention branch is that of the equations.'''
    net, input = net.double(), input.double()
    branch = net.attention_branch
    features = net.extract_features(input)

    def normalize(values, name):
        norm = branch.get_submodule(name)
        return batch_norm(values, norm.running_mean, norm.running_var, norm.weight, norm.bias)

    maps = conv2d(normalize(branch.stage(features), 'norm'), branch.class_maps.weight)
    maps = normalize(maps, 'class_norm').clamp(min=0)
    scores = torch.einsum('bkhw,ck->bchw', maps, branch.scores.weight[..., 0, 0]).mean((2, 3))
    hidden = torch.einsum('bkhw,k->bhw', maps, branch.attention.weight.flatten())[:, None]
    attention = 1 / (1 + torch.exp(-normalize(hidden, 'attention_norm')))
    result = net.forward_branches(input)
    torch.testing.assert_close(result.attention_logits, scores)
    torch.testing.assert_close(result.attention, attention)


@torch.no_grad()
@pytest.mark.parametrize('function,strided', [(narrow_resnet18, 'conv1'), (resnet50, 'conv2')])
def test_stage(function, strided):
    '''The stage is the last one without stride: convolutions have the same values at every second position.'''
    model = randomize(function(num_classes=N_CLASSES)).eval()
    stage = AttentionBranchNetwork(model).attention_branch.stage
    features = torch.randn(2, model.layer4[0].conv1.in_channels, 6, 6)
    assert stage(features).shape == (2, model.fc.in_features, 6, 6)
    inner = torch.randn(2, model.layer4[0].get_submodule(strided).in_channels, 6, 6)
    for name, values in ((strided, inner), ('downsample', features)):
        result, expected = (block.get_submodule(name)(values) for block in (stage[0], model.layer4[0]))
        assert result.shape[2:] == (6, 6) and expected.shape[2:] == (3, 3)
        torch.testing.assert_close(result[..., ::2, ::2], expected, rtol=1e-4, atol=1e-4)
    output = torch.randn(2, model.fc.in_features, 6, 6)
    assert torch.equal(stage[1:](output), model.layer4[1:](output))


def test_start():
    '''The start is the classifier's: class maps of its last layer, and attention where there is evidence.'''
    model = narrow_resnet18(num_classes=N_CLASSES).eval()
    first, branch = AttentionBranchNetwork(model).state_dict(), AttentionBranchNetwork(model).attention_branch
    for key, value in branch.state_dict(prefix='attention_branch.').items():
        assert torch.equal(value, first[key]), key
    maps = torch.rand(1, N_CLASSES, 2, 2)
    torch.testing.assert_close(branch.scores(maps), maps)
    torch.testing.assert_close(branch.attention(maps), maps.mean(1, keepdim=True))
    torch.testing.assert_close(branch.class_maps.weight[..., 0, 0], model.fc.weight)


def test_model_is_left_as_found(input):
    '''The given model shares nothing with the network, which has its type, and can be trained even if it cannot.'''
    model = narrow_resnet18(num_classes=N_CLASSES).double().eval().requires_grad_(False)
    model.bn1.train()
    before = copy.deepcopy(model.state_dict())
    net = AttentionBranchNetwork(model)
    assert not net.training and net.bn1.training and not net.layer4.training
    assert not any(module.training for module in net.attention_branch.modules())
    assert {value.dtype for value in net.parameters()} == {torch.float64}
    assert all(param.requires_grad for param in net.attention_branch.parameters())
    assert not any(param.requires_grad for param in net.layer4.parameters())
    pointers = [value.data_ptr() for value in net.state_dict().values()]
    assert len(set(pointers)) == len(pointers)
    assert not set(pointers) & {value.data_ptr() for value in model.state_dict().values()}
    net.train()(input.double()).sum().backward()
    with torch.no_grad():
        for value in net.parameters():
            value.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.bn1.training and not model.training and not model.layer4.training
    assert not any(param.requires_grad or param.grad is not None for param in model.parameters())
    assert model.layer4[0].conv1.stride == net.layer4[0].conv1.stride == (2, 2)
    assert AttentionBranchNetwork(narrow_resnet18(num_classes=2).train()).attention_branch.norm.training


def test_gradient(net, input):
    '''The loss of both branches has gradients everywhere, and that of either reaches the attention branch.'''
    target = torch.tensor([0, 2])
    attention_logits, logits, _ = net.forward_branches(input.requires_grad_())
    (cross_entropy(attention_logits, target) + cross_entropy(logits, target)).backward()
    for name, value in [*net.named_parameters(), ('input', input)]:
        assert value.grad is not None and bool(value.grad.isfinite().all()), name
        assert bool(value.grad.any()), name
    for loss, untouched in ((net(input)[:, 0].sum(), 'scores'), (net.forward_branches(input)[0].sum(), 'attention')):
        net.zero_grad()
        loss.backward()
        assert bool(net.attention_branch.class_maps.weight.grad.any())
        assert net.attention_branch.get_submodule(untouched).weight.grad is None


def test_network_errors():
    '''What is missing is named.'''
    with pytest.raises(ValueError, match='VGG has no conv1, bn1, relu, maxpool, layer1, .*, layer4, fc: '):
        AttentionBranchNetwork(vgg11(num_classes=2))
    with pytest.raises(TypeError, match='must be a module, but is function'):
        AttentionBranchNetwork(narrow_resnet18)
    model = narrow_resnet18(num_classes=2)
    model.fc = torch.nn.Sequential(torch.nn.Dropout(), model.fc)
    with pytest.raises(ValueError, match='fc is Sequential, but must be a linear layer'):
        AttentionBranchNetwork(model)
    model = narrow_resnet18(num_classes=2)
    model.layer4 = torch.nn.Sequential(torch.nn.Conv2d(32, 64, 1), torch.nn.MaxPool2d(2))
    with pytest.raises(ValueError, match=r'size \(4, 4\) of features to \(2, 2\) by other means'):
        AttentionBranchNetwork(model)(torch.rand(1, 3, 64, 64))


# -- attribution -------------------------------------------------------------------------------------------------------

def test_attribute(net, input):
    '''Channels have equal parts of the map, which does not depend on the target or the rest of the batch.'''
    method = ABN(net)
    assert isinstance(method, Attribution) and method.get_name() == 'Attention Branch Network'
    attributions = method.attribute(input)
    with torch.no_grad():
        attention = net.forward_branches(input).attention
    assert attributions.shape == input.shape and attributions.dtype == torch.float32
    assert not attributions.requires_grad
    expected = interpolate(attention, (64, 64), mode='bilinear', align_corners=False)
    torch.testing.assert_close(attributions.sum(1), expected[:, 0])
    torch.testing.assert_close(attributions, expected.expand_as(input) / 3)
    for target in (1, [0, 2], torch.tensor([2, 1]), torch.tensor(0)):
        assert torch.equal(method.attribute(input, target), attributions)
    single = method.attribute(input[1:], additional_forward_args=())
    torch.testing.assert_close(single, attributions[1:], rtol=1e-4, atol=1e-5)
    in_tuple = method.attribute((input,), target=1)
    assert isinstance(in_tuple, tuple) and len(in_tuple) == 1 and torch.equal(in_tuple[0], attributions)
    # memory of its own for each value
    attributions[:, 0] = 0
    assert bool((attributions[:, 1] > 0).all())


def test_attribute_wrapped(net, input):
    '''The network is found within others.'''
    expected = ABN(net).attribute(input)
    assert torch.equal(ABN(torch.nn.DataParallel(net)).attribute(input), expected)
    assert torch.equal(ABN(torch.compile(net)).attribute(input), expected)


def test_attribute_precision(net, input):
    '''Maps of half precision have as many levels as there are pixels, and those of double precision stay so.'''
    assert ABN(copy.deepcopy(net).double()).attribute(input.double()).dtype == torch.float64
    expected = ABN(net).attribute(input)
    with torch.autocast('cpu', torch.bfloat16):
        mixed = ABN(net).attribute(input)
    half = ABN(net.bfloat16()).attribute(input.bfloat16())
    for result in (mixed, half):
        assert result.dtype == torch.float32
        assert len(result[0, 0].unique()) > .4 * len(expected[0, 0].unique())
        torch.testing.assert_close(result, expected, rtol=.1, atol=.02)


def test_attribute_leaves_network(net, input):
    '''Neither gradients nor statistics are left, nor is the image changed.'''
    before, image = copy.deepcopy(net.state_dict()), input.clone()
    with torch.inference_mode():
        ABN(net).attribute(input)
    ABN(net).attribute(input.requires_grad_())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(param.grad is None and param.requires_grad for param in net.parameters())
    assert torch.equal(input, image) and input.grad is None


@pytest.mark.parametrize('change,error,match', [
    ({'inputs': torch.rand(3, 64, 64)}, ValueError, r'of shape \(3, 64, 64\)'),
    ({'inputs': torch.rand(0, 3, 64, 64)}, ValueError, 'empty'),
    ({'inputs': torch.ones(1, 3, 64, 64, dtype=torch.uint8)}, TypeError, 'inputs of torch.uint8'),
    ({'inputs': (torch.rand(1, 3, 64, 64),) * 2}, ValueError, 'tuple of 2'),
    ({'inputs': torch.full((1, 3, 64, 64), torch.nan)}, ValueError, r'NaN for the examples \[0\] of the batch'),
    ({'target': 3}, ValueError, 'target 3 is out of range for 3 classes'),
    ({'target': [0, 1]}, ValueError, 'for each of 1 examples'),
    ({'target': .5}, TypeError, 'target.*float32'),
    ({'additional_forward_args': torch.ones(2)}, ValueError, 'single input'),
])
def test_attribute_errors(trained, change, error, match):
    '''Wrong arguments are named.'''
    with pytest.raises(error, match=match):
        ABN(trained).attribute(**{'inputs': torch.rand(1, 3, 64, 64), **change})


def test_attribution_errors(net, input):
    '''Other networks, and networks in training mode, are refused.'''
    with pytest.raises(TypeError, match='AttentionBranchNetwork, but there is NarrowResNet'):
        ABN(narrow_resnet18(num_classes=2))
    with pytest.raises(TypeError, match='there is function'):
        ABN(narrow_resnet18)
    with pytest.raises(ValueError, match='training mode'):
        ABN(net.train()).attribute(input)


# -- weights -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('suffix', ['.safetensors', '.pt'])
def test_save_and_load(net, input, tmp_path, suffix):
    '''Weights are the same after writing and reading, whatever their order in memory.'''
    if suffix == '.safetensors':
        pytest.importorskip('safetensors')
    path = tmp_path / f'abn{suffix}'
    save_abn(copy.deepcopy(net).to(memory_format=torch.channels_last), str(path), ['a', 'b', 'c, d'])
    loaded = load_abn(path, 'narrow_resnet18')
    assert not any(module.training for module in loaded.modules())
    expected = net.state_dict()
    assert list(loaded.state_dict()) == list(expected)
    assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())
    with torch.no_grad():
        for result, value in zip(loaded.forward_branches(input), net.forward_branches(input)):
            assert torch.equal(result, value)
    if suffix == '.safetensors':
        from safetensors import safe_open
        with safe_open(path, 'pt') as file:
            assert json.loads(file.metadata()['classes']) == ['a', 'b', 'c, d']
    else:
        assert set(torch.load(path, weights_only=True)) == set(expected)


def test_load_other_depth(tmp_path):
    '''The number of classes is that of the weights, of any precision, and the architecture is ResNet-50 by default.'''
    net = AttentionBranchNetwork(resnet50(num_classes=7)).half()
    save_abn(net, tmp_path / 'abn.pth')
    loaded = load_abn(tmp_path / 'abn.pth')
    assert loaded.fc.out_features == loaded.attention_branch.scores.out_channels == 7
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}


def test_save_and_load_errors(net, tmp_path):
    '''What does not fit is named.'''
    pytest.importorskip('safetensors')
    with pytest.raises(ValueError, match=r'abn.bin must end in one of .pt'):
        save_abn(net, tmp_path / 'abn.bin')
    with pytest.raises(ValueError, match='2 names for 3 classes'):
        save_abn(net, tmp_path / 'abn.pt', ['a', 'b'])
    for name in ('abn.safetensors', 'abn.pt'):
        with pytest.raises(OSError):
            save_abn(net, tmp_path / 'missing' / name)
    assert not [*tmp_path.iterdir()]
    path = tmp_path / 'abn.pt'
    with pytest.raises(ValueError, match='no file .*abn.pt'):
        load_abn(path)
    save_abn(net, path)
    with pytest.raises(ValueError, match=r'do not fit resnet34.*layer1\.2\.conv1\.weight'):
        load_abn(path, 'resnet34')
    with pytest.raises(ValueError, match='do not fit resnet50'):
        load_abn(path, 'resnet50')
    for name in ('vgg16', 'googlenet', 'resnet17'):
        with pytest.raises(ValueError, match=f"'{name}' is no residual network of torchvision: .*resnet18"):
            load_abn(path, name)
    state = net.state_dict()
    torch.save({key: value for key, value in state.items() if key != 'fc.weight'}, path)
    with pytest.raises(ValueError, match='lack fc.weight'):
        load_abn(path, 'narrow_resnet18')
    torch.save({**state, 'more': torch.ones(2)}, path)
    with pytest.raises(ValueError, match='"more"'):
        load_abn(path, 'narrow_resnet18')
    torch.save(narrow_resnet18().state_dict(), path)
    with pytest.raises(ValueError, match='have no attention branch: train one'):
        load_abn(path, 'narrow_resnet18')


# -- training ----------------------------------------------------------------------------------------------------------

@pytest.fixture
def data(tmp_path):
    '''Images of three colors, as a folder of folders and as a CSV file.'''
    rows = []
    for label, name in enumerate(('blue', 'green', 'red')):
        (tmp_path / 'data' / name).mkdir(parents=True)
        for num in range(8):
            color = [20 + 5 * num] * 3
            color[2 - label] = 255
            path = tmp_path / 'data' / name / f'{num}.png'
            Image.new('RGB', (64, 64), tuple(color)).save(path)
            rows.append({'file': path.relative_to(tmp_path).as_posix(), 'class_index': label})
    with open(tmp_path / 'labels.csv', 'w', encoding='utf-8', newline='') as file:
        writer = csv.DictWriter(file, ['file', 'class_index'])
        writer.writeheader()
        writer.writerows(rows)
    torch.manual_seed(1)
    torch.save(narrow_resnet18(num_classes=3).state_dict(), tmp_path / 'classifier.pt')
    return tmp_path


@pytest.fixture
def train(data, monkeypatch):
    '''Run the script with arguments.'''
    def run(*arguments):
        given = (
            '--model', 'narrow_resnet18', '--weights', data / 'classifier.pt', '--size', 64, '--out', data / 'abn.pt'
        )
        monkeypatch.setattr(sys, 'argv', [str(SCRIPT), *map(str, (*given, *arguments))])
        runpy.run_path(str(SCRIPT), run_name='__main__')

    return run


def test_train(train, data, capsys):
    '''Colors are learned by both branches, without changing the trunk. The seed decides.'''
    arguments = ('--data', data / 'data', '--validation', data, '--epochs', 6, '--batch-size', 8, '--rate', 1e-3)
    train(*arguments)
    captured = capsys.readouterr()
    numbers = captured.out.split('accuracy on 24 images: ')[1].split('\n')[0].replace(',', '').split()
    before, perception, attention = (float(numbers[num]) for num in (1, 4, 7))
    assert before < .8 and perception > .9 and attention > .9, captured.out
    assert '2 x 24 x 32 x 4 x 4 in half precision, 0.0 MB of memory' in captured.err + captured.out
    given = torch.load(data / 'classifier.pt', weights_only=True)
    state = torch.load(data / 'abn.pt', weights_only=True)
    changed = {key.split('.')[0] for key, value in given.items() if not torch.equal(state[key], value)}
    assert changed == {'layer4', 'fc'}
    loaded = load_abn(data / 'abn.pt', 'narrow_resnet18')
    assert ABN(loaded).attribute(torch.rand(1, 3, 64, 64)).shape == (1, 3, 64, 64)
    train(*arguments)
    again = torch.load(data / 'abn.pt', weights_only=True)
    assert all(torch.equal(again[key], value) for key, value in state.items())


def test_train_options(train, data, capsys):
    '''The classifier can be kept, a tenth of the images is left out, and bfloat16 works.'''
    train('--data', data / 'labels.csv', '--quick', '--keep', '--amp', '--batch-size', 4)
    assert 'accuracy on 2 images' in capsys.readouterr().out
    given = torch.load(data / 'classifier.pt', weights_only=True)
    state = torch.load(data / 'abn.pt', weights_only=True)
    assert all(torch.equal(state[key], value) for key, value in given.items())
    branch = {key.removeprefix('attention_branch.'): value for key, value in state.items() if 'branch' in key}
    assert branch['stage.0.conv1.weight'].shape == given['layer4.0.conv1.weight'].shape
    assert not torch.equal(branch['stage.0.conv1.weight'], given['layer4.0.conv1.weight'])


def test_train_errors(train, data, capsys):
    '''Errors of the user are a single line.'''
    (data / 'broken.csv').write_text('file,class_index\ndata/red/0.png,5\n')
    (data / 'text.csv').write_text('file,class_index\ndata/red/0.png,red\n')
    (data / 'columns.csv').write_text('file,label\ndata/red/0.png,red\n')
    (data / 'unreadable.csv').write_text('image,class_index\nclassifier.pt,2\n')
    for arguments, message in [
        (['--data', data / 'missing'], 'there is no file or folder'),
        (['--data', data / 'data' / 'red'], '0.png: it has no label'),
        (['--data', data / 'broken.csv'], "0.png: label 'class_index 5' is not a class"),
        (['--data', data / 'text.csv'], "0.png: label 'class_index red' is not a class"),
        (['--data', data / 'columns.csv'], "0.png: label 'red' is not a class"),
        (['--data', data / 'unreadable.csv'], 'too few images'),
        (['--data', data, '--validation', data / 'unreadable.csv'], 'classifier.pt: '),
        (['--data', data, '--epochs', 0], '--epochs must be positive'),
        (['--data', data, '--out', data / 'missing' / 'abn.pt'], 'be in a folder that exists'),
        (['--data', data, '--out', data / 'abn.bin'], 'must end in one of .pt'),
        (['--data', data, '--model', 'vgg16'], 'do not fit the model vgg16'),
    ]:
        with pytest.raises(SystemExit) as caught:
            train(*arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1], arguments
