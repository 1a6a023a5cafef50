'''What relevance starts from.'''
import collections
import dataclasses
import math
import types

import numpy as np
import pytest
import torch
from captum._utils.common import _select_targets
from helpers.networks import narrow_resnet18
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus

from captum_adapters.attr import CompositeAttribution
from zennit_resnet import initial_relevance as exported
from zennit_resnet.attribution import SelectOutput, initial_relevance
from zennit_resnet.composites import BlockLRP, RelativeLRP, ResNetLRP, with_splitting
from zennit_resnet.conservation import conservation_ledger

OUTPUT = torch.tensor([[1., 2., 3.], [-4., 0., 4.], [0., 0., 0.], [-1., -5., 2.]], dtype=torch.float64)


def naive(output, targets, value):
    '''One-hot at each sample's own target, times a value.'''
    relevance = torch.zeros_like(output)
    for num, target in enumerate(targets):
        relevance[num, target] = {
            'logit': output[num, target],
            'softmax': output[num, target].exp() / output[num].exp().sum(),
            'one': 1.,
        }[value]
    return relevance


def test_exported():
    '''The name is available from the package.'''
    assert exported is initial_relevance


@pytest.mark.parametrize('value', ['logit', 'softmax', 'one'])
@pytest.mark.parametrize('target, targets', [
    (1, [1, 1, 1, 1]), (torch.tensor(2), [2, 2, 2, 2]), ([0, 2, 1, 1], [0, 2, 1, 1]), ((2, 1, 0, 0), [2, 1, 0, 0]),
    (torch.tensor([1, 0, 2, 0]), [1, 0, 2, 0]), (torch.tensor([2, 2, 0, 1], dtype=torch.int32), [2, 2, 0, 1]),
], ids=str)
def test_values(target, targets, value):
    '''Each sample has its own target and value.'''
    relevance = initial_relevance(target, value)(OUTPUT)
    assert torch.allclose(relevance, naive(OUTPUT, targets, value), rtol=1e-12)
    assert relevance.dtype == OUTPUT.dtype


NAIVE = {
    'centred': lambda y, t: [1. if k == t else -1 / 2 for k in range(3)],
    'softmax': lambda y, t: [
        1. if k == t else -math.exp(y[k]) / sum(math.exp(y[j]) for j in range(3) if j != t) for k in range(3)
    ],
    'runner_up': lambda y, t: [
        float(k == t) - (k == max((j for j in range(3) if j != t), key=lambda j: y[j])) for k in range(3)
    ],
    1: lambda y, t: [float(k == t) - float(k == 1) for k in range(3)],
    (1, 2): lambda y, t: [float(k == t) - .5 * (k in (1, 2)) for k in range(3)],
}


@pytest.mark.parametrize('value', [None, 'logit', 'softmax', 'one'])
@pytest.mark.parametrize('contrast', NAIVE)
def test_contrasts(contrast, value):
    '''Weights, whose sum is zero, times a value of each class.'''
    targets = [2, 1, 0, 2]
    weights = torch.tensor([NAIVE[contrast](y.tolist(), t) for y, t in zip(OUTPUT, targets)], dtype=torch.float64)
    assert weights.sum(1).abs().max() < 1e-12
    values = {'logit': OUTPUT, 'softmax': OUTPUT.softmax(1)}.get(value, torch.ones_like(OUTPUT))
    actual = initial_relevance(targets, value, contrast=contrast)(OUTPUT)
    torch.testing.assert_close(actual, weights * values, rtol=1e-12, atol=1e-12)


def test_contrasts_of_each_example():
    '''Rivals may be others for each example. A contrast of a class with itself is zero.'''
    targets = torch.tensor([0, 1, 2, 0])
    actual = initial_relevance(targets, 'one', contrast=torch.tensor([[1], [1], [0], [2]]))(OUTPUT)
    assert actual.tolist() == [[1, -1, 0], [0, 0, 0], [-1, 0, 1], [1, 0, -1]]
    confident = torch.tensor([[900., 0., 0.]])
    assert initial_relevance(0, contrast='softmax')(confident).tolist() == [[1., -.5, -.5]]
    infinite = torch.tensor([[1., -torch.inf, 0.]])
    assert initial_relevance(0, 'logit')(infinite).tolist() == [[1., 0., 0.]]


@pytest.mark.parametrize('contrast, error, match', [
    ('median', ValueError, 'median'), (1.5, TypeError, 'contrast'), ([], ValueError, 'contrast'),
    (True, TypeError, 'contrast'), ([[[0]]], TypeError, 'contrast'), (3, IndexError, '3'), (-1, IndexError, '-1'),
    ([[1], [2]], ValueError, '2 examples'), (torch.zeros(4, 0, dtype=torch.long), ValueError, 'no class'),
])
def test_bad_contrasts(contrast, error, match):
    '''What is wrong is named.'''
    with pytest.raises(error, match=match):
        initial_relevance(0, contrast=contrast)(OUTPUT)


@pytest.mark.parametrize('contrast', ['centred', 'softmax', 'runner_up', 0])
def test_contrast_of_a_single_output(contrast):
    '''There is nothing else.'''
    with pytest.raises(ValueError, match='several classes'):
        initial_relevance(None, contrast=contrast)(torch.rand(2, 1))


STARTS = {
    'ratio': (ResNetLRP, 'one'), 'relative': (RelativeLRP, 'one'), 'block': (BlockLRP, 'logit'),
    'epsilon': (lambda: ResNetLRP(classifier='epsilon'), 'logit'),
    'splitting': (lambda: with_splitting(ResNetLRP(classifier='epsilon')), 'logit'),
}


@pytest.mark.parametrize('name', STARTS)
def test_what_a_contrast_starts_from(name):
    '''By default, what the rule of the last layer needs.'''
    create, value = STARTS[name]
    torch.manual_seed(0)
    model, images = narrow_resnet18(num_classes=4).double().eval(), torch.randn(2, 3, 32, 32).double()
    maps = [
        Gradient(model, create())(images.clone(), initial_relevance([1, 2], start, contrast='softmax'))[1]
        for start in (None, value)
    ]
    assert torch.equal(*maps) and maps[0].any()


@pytest.mark.parametrize('name', STARTS)
def test_functions(name):
    '''A function of the output is explained by its gradient: linear ones like classes and contrasts.'''
    create, value = STARTS[name]
    torch.manual_seed(0)
    model, images = narrow_resnet18(num_classes=4).double().eval(), torch.randn(2, 3, 32, 32).double()

    def explain(*args, **kwargs):
        return Gradient(model, create())(images.clone(), initial_relevance(*args, **kwargs))[1]

    torch.testing.assert_close(explain(lambda y: y[:, 1] - y[:, 2]), explain(1, contrast=2), rtol=1e-9, atol=0)
    torch.testing.assert_close(explain(lambda y: y[:, 1]), explain(1, value), rtol=1e-9, atol=0)
    reference = torch.randn(4).double()
    output = model(images).detach().requires_grad_()
    weights, = torch.autograd.grad(torch.cosine_similarity(output, reference[None]).sum(), output)
    weights = weights * output.detach() if value == 'logit' else weights
    expected = Gradient(model, create())(images.clone(), lambda output: weights)[1]
    actual = explain(lambda y: torch.cosine_similarity(y, reference[None]))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


def test_functions_of_maps():
    '''Relevance starts at a class in a region.'''
    output = torch.randn(2, 5, 6, 7)
    actual = initial_relevance(lambda y: y[:, 3, 1:4, 2:5].mean((1, 2)), 'logit')(output)
    expected = torch.zeros_like(output)
    expected[:, 3, 1:4, 2:5] = output[:, 3, 1:4, 2:5] / 9
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('function', [
    lambda y: y, lambda y: y.sum(), lambda y: y.detach().sum(1), lambda y: 3., lambda y: y.argmax(1)
])
def test_bad_functions(function):
    '''It must give one number for each example, with a gradient.'''
    with pytest.raises(ValueError, match='4 examples'):
        initial_relevance(function)(OUTPUT)
    with pytest.raises(ValueError, match='difference'):
        initial_relevance(function, contrast='centred')


def test_probabilities_have_no_softmax():
    '''Of probabilities, another softmax would be nearly the same for all rivals.'''
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4), torch.nn.Softmax(1)).eval()
    with pytest.raises(ValueError, match='looks like probabilities'):
        Gradient(model, ResNetLRP())(torch.rand(1, 3, 2, 2), initial_relevance(1, contrast='softmax'))
    with pytest.raises(ValueError, match='value=.softmax.* choose .logit.'):
        Gradient(model, ResNetLRP())(torch.rand(1, 3, 2, 2), initial_relevance(1, 'softmax'))
    # logits of one image may look so, those of a batch do not
    assert initial_relevance(0, 'softmax')(torch.tensor([[.2, .8], [2., 1.]])).shape == (2, 2)
    assert initial_relevance(lambda y: y[:, 1], 'softmax')(torch.empty(0, 3)).shape == (0, 3)


def test_what_a_contrast_of_other_rules_starts_from():
    '''Rules of Zennit may divide by the output or not.'''
    model, images = narrow_resnet18(num_classes=4).eval(), torch.randn(1, 3, 32, 32)
    with pytest.raises(ValueError, match="'logit' for rules"):
        Gradient(model, EpsilonPlus())(images.clone(), initial_relevance(1, contrast='centred'))
    Gradient(model, EpsilonPlus())(images.clone(), initial_relevance(1, 'logit', contrast='centred'))


def test_default_is_logit():
    '''The logit is what relevance starts from by default.'''
    assert torch.equal(initial_relevance(0)(OUTPUT), initial_relevance(0, 'logit')(OUTPUT))
    assert float(initial_relevance(0)(OUTPUT)[1, 0]) == -4.


def test_reused_for_batches():
    '''One target serves batches of any size, and outputs are not changed or connected.'''
    function = initial_relevance(1)
    output = OUTPUT.clone().requires_grad_()
    for num in (1, 4):
        relevance = function(output[:num])
        assert relevance.shape == (num, 3) and not relevance.requires_grad
    assert torch.equal(output, OUTPUT)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    '''Relevance starts in single precision.'''
    relevance = initial_relevance([0, 1, 2, 2], 'softmax')(OUTPUT.to(dtype))
    assert relevance.dtype == torch.float32
    assert torch.allclose(relevance, naive(OUTPUT, [0, 1, 2, 2], 'softmax').float(), rtol=1e-5)


@pytest.mark.parametrize('value', ['logits', 'Softmax', 1])
def test_unknown_value(value):
    '''The error names the value and the choices.'''
    with pytest.raises(ValueError, match='value=') as info:
        initial_relevance(0, value)
    assert all(repr(elem) in str(info.value) for elem in (value, 'logit', 'softmax', 'one'))


@pytest.mark.parametrize('target', [1., [0., 1.], torch.eye(3), torch.eye(3, dtype=torch.int64), True, [True, False]])
def test_target_type(target):
    '''Targets are indices, and not one-hot vectors.'''
    with pytest.raises(TypeError, match='class indices'):
        initial_relevance(target)


@pytest.mark.parametrize('targets', [[0], [0, 1, 2], [0] * 5, []])
def test_number_of_targets(targets):
    '''There is one target for each sample.'''
    with pytest.raises((ValueError, TypeError)) as info:
        initial_relevance(targets)(OUTPUT)
    assert not targets or f'{len(targets)} targets for a batch of 4' in str(info.value)


@pytest.mark.parametrize('target', [3, -4, [0, 1, 2, 3], [0, -2, 0, 0], [-1] * 4])
def test_target_outside_of_classes(target):
    '''Targets count from zero, and only a single one from the end.'''
    with pytest.raises(IndexError, match='3 classes'):
        initial_relevance(target)(OUTPUT)


@pytest.mark.parametrize('shape', [(), (2, 3, 1), (2, 3, 4, 4)])
def test_output_shape(shape):
    '''Outputs of anything but classifiers give an error with their shape.'''
    with pytest.raises(ValueError, match='batch, classes') as info:
        initial_relevance(0)(torch.zeros(shape))
    assert str(tuple(shape)) in str(info.value)


@pytest.mark.parametrize('target', [
    'cat', ['cat', 'dog'], None, True, 1.5, float('nan'), object, [[0]], (0, 1.)
], ids=str)
def test_bad_targets(target):
    '''The error names the target, or what it is of.'''
    with pytest.raises((TypeError, ValueError), match='target=|class indices'):
        initial_relevance(target)(OUTPUT)


@pytest.mark.parametrize('target', [-1, -2, -3, torch.tensor(-1), np.int64(-1)])
def test_negative_target(target):
    '''A single negative target counts from the last class, as in Captum.'''
    relevance = initial_relevance(target)(OUTPUT)
    assert torch.equal(relevance, initial_relevance(3 + int(target))(OUTPUT))
    assert torch.equal(relevance.sum(1), _select_targets(OUTPUT, int(target)))


@pytest.mark.parametrize('target', [None, 0, -1, [0, 0, 0, 0]])
@pytest.mark.parametrize('shape', [(4,), (4, 1)])
def test_single_output(target, shape):
    '''An output of shape (batch,) is one class, for which no target is necessary.'''
    output = OUTPUT[:, 0].reshape(shape)
    assert torch.equal(initial_relevance(target)(output), output)
    assert torch.equal(initial_relevance(target, 'one')(output), torch.ones_like(output))
    with pytest.raises(ValueError, match='softmax'):
        initial_relevance(target, 'softmax')(output)
    with pytest.raises(IndexError, match='1 classes'):
        initial_relevance(1)(output)
    with pytest.raises(ValueError, match='3 classes'):
        initial_relevance(None)(OUTPUT)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    model = torch.nn.Sequential(*model, torch.nn.Flatten(0)) if len(shape) == 1 else model
    output, relevance = Gradient(model, ResNetLRP())(torch.randn(4, 5), initial_relevance(target))
    assert torch.allclose(relevance.sum(1), output.flatten(), atol=1e-5)


Named = collections.namedtuple('Named', 'other, logits')


@dataclasses.dataclass(frozen=True, slots=True)
class Data:
    '''Output of a network.'''
    other: object
    logits: torch.Tensor


class ModelOutput(collections.OrderedDict):
    '''As in transformers: a dict with attributes and indices.'''
    def __init__(self, **kwargs):
        super().__init__(kwargs)
        vars(self).update(kwargs)

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


class Slots:
    '''An object without a dict.'''
    __slots__ = ('logits',)

    def __init__(self, logits):
        self.logits = logits


# what a network returns, names in the message without a key, and keys of the logits
OUTPUTS = {
    'dict': (lambda logits: {'other': None, 'logits': logits}, ["'other'", "'logits'"], ['logits', 1, -1]),
    'integers': (lambda logits: {7: logits, 1: None}, ['7'], [7]),
    'tuple': (lambda logits: (None, logits), ['0, 1'], [1, -1]),
    'list': (lambda logits: [logits], ['0'], [0]),
    'namedtuple': (lambda logits: Named(None, logits), ["'other', 'logits'"], ['logits', 1]),
    'dataclass': (lambda logits: Data(None, logits), ["'other', 'logits'"], ['logits', 1]),
    'ModelOutput': (lambda logits: ModelOutput(loss=None, logits=logits), ["'loss', 'logits'"], ['logits', 1]),
    'namespace': (lambda logits: types.SimpleNamespace(logits=logits), ["'logits'"], ['logits', 0]),
    'slots': (Slots, ['Slots'], ['logits']),
}


class Wrapped(torch.nn.Module):
    '''A residual network that returns its logits in something else.'''
    def __init__(self, wrap):
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.conv = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3, padding=1)
        self.head = torch.nn.Linear(4, 5, bias=False)
        self.wrap = wrap

    def forward(self, x, scale=1):
        '''Logits.'''
        x = self.stem(x).relu()
        return self.wrap(self.head((x + self.conv(x)).relu().mean((2, 3))) * scale)


@pytest.mark.parametrize('target', [np.array([2, 1])[::-1], np.array([1, 2], dtype='>i8'), np.array([1, 2], np.int16)])
def test_any_arrays(target):
    '''Arrays of any order are what they are.'''
    assert initial_relevance(target, 'one')(torch.ones(2, 3)).tolist() == [[0, 1, 0], [0, 0, 1]]


def test_empty_lists():
    '''They are of no type, and name nothing.'''
    with pytest.raises(ValueError, match=r'contrast=\[\] names no class'):
        initial_relevance(0, contrast=[])
    with pytest.raises(ValueError, match='0 targets for a batch of 2'):
        initial_relevance([])(torch.zeros(2, 3))


@pytest.mark.parametrize('composite', [ResNetLRP, RelativeLRP, BlockLRP, lambda: with_splitting(EpsilonPlus())])
@pytest.mark.parametrize('name', OUTPUTS)
def test_several_outputs(name, composite):
    '''The tensor is chosen by key, index, name or function, and the map is that of the network which returns it.'''
    wrap, names, keys = OUTPUTS[name]
    plain, model, input = Wrapped(lambda logits: logits).eval(), Wrapped(wrap).eval(), torch.randn(2, 3, 8, 8)
    expected = Gradient(plain, composite())(input, initial_relevance([3, 1]))
    tolerance = 1e-4 * float(expected[1].abs().max())
    for key in (*keys, lambda output: output.logits if name in ('slots', 'namespace', 'dataclass', 'namedtuple')
                else output[keys[0]]):
        output, relevance = Gradient(SelectOutput(model, key), composite())(input, initial_relevance([3, 1]))
        # the stabilizers of BlockLRP differ, as the network is a module inside of another
        assert torch.equal(output, expected[0]) and torch.allclose(relevance, expected[1], rtol=0, atol=tolerance)
        # of what the network returns, the initial relevance is that of the chosen tensor
        assert torch.equal(initial_relevance([3, 1], output=key)(model(input)), initial_relevance([3, 1])(plain(input)))
        captum = CompositeAttribution(model, composite(), output=key).attribute(input, target=[3, 1])
        assert torch.equal(captum, expected[1]) and 'forward' not in vars(model)
        with pytest.raises(TypeError, match='SelectOutput'):
            Gradient(model, composite())(input, initial_relevance([3, 1], output=key))
    for function in (
        lambda: Gradient(model, composite())(input, initial_relevance(3)),
        lambda: CompositeAttribution(model, composite()).attribute(input, target=3),
        lambda: conservation_ledger(model, input, composite(), target=3),
    ):
        with pytest.raises(TypeError) as info:
            function()
        assert all(elem in str(info.value) for elem in names)
    with pytest.raises(ValueError, match="output='nothing'"):
        SelectOutput(model, 'nothing')(input)
    with pytest.raises(ValueError, match="output='nothing'"):
        CompositeAttribution(model, composite(), output='nothing').attribute(input, target=3)
    assert 'forward' not in vars(model) and not model._forward_hooks


def test_what_is_no_output():
    '''Keys of tensors, of parts that are none, and values that are no keys.'''
    model, input = Wrapped(lambda logits: (logits, (logits, None))).eval(), torch.randn(1, 3, 8, 8)
    with pytest.raises(TypeError, match='output=1 picks tuple'):
        SelectOutput(model, 1)(input)
    with pytest.raises(TypeError, match='returns NoneType'):
        SelectOutput(model, lambda output: output[1][1])(input)
    with pytest.raises(TypeError, match="output='logits'.*leave it out"):
        SelectOutput(Wrapped(lambda logits: logits), 'logits')(input)
    with pytest.raises(TypeError, match='NoneType instead of a tensor'):
        initial_relevance(0)(None)
    with pytest.raises(ValueError, match='output=5'):
        SelectOutput(model, 5)(input)
    for key in (True, 1.5, ['logits'], torch.tensor(1)):
        for create in (lambda: SelectOutput(model, key), lambda: initial_relevance(0, output=key),
                       lambda: CompositeAttribution(model, output=key)):
            with pytest.raises(TypeError) as info:
                create()
            assert repr(key) in str(info.value)
    with pytest.raises(TypeError, match='torch.nn.Module'):
        SelectOutput(lambda x: x, 0)
    assert SelectOutput(model, 0)(input, scale=2).equal(2 * SelectOutput(model, lambda output: output[1][0])(input))
    assert not SelectOutput(model, 0).training and SelectOutput(model.train(), 0).training


@pytest.mark.parametrize('function', [
    lambda output: output['out'].mean((2, 3)), lambda output: output['out'][:, :, 2, 3],
    lambda output: output['out'][..., 1:4, 2:4].sum((2, 3)),
], ids=['mean', 'position', 'region'])
def test_regions_of_maps(function):
    '''Rules apply to the function that picks a tensor, such as a part of a map of logits: relevance is conserved.'''
    class Dense(Wrapped):
        '''A network for segmentation.'''
        def forward(self, x):
            '''A map of logits.'''
            x = self.stem(x).relu()
            return {'out': self.head((x + self.conv(x)).relu().movedim(1, -1)).movedim(-1, 1)}

    model, input = Dense(None).eval(), torch.randn(2, 3, 8, 8)
    output, relevance = Gradient(SelectOutput(model, function), ResNetLRP())(input, initial_relevance(2))
    assert torch.allclose(relevance.sum((1, 2, 3)), output[:, 2], rtol=1e-3)
    captum = CompositeAttribution(model, ResNetLRP(), output=function).attribute(input, target=2)
    assert torch.allclose(captum, relevance, atol=1e-6)


@pytest.mark.parametrize('value', ['logit', 'softmax', 'one'])
def test_attributor(value):
    '''It is used as the output relevance of Zennit's attributors, each sample with its own target.'''
    model = narrow_resnet18(num_classes=5).eval()
    input = torch.randn(3, 3, 32, 32)
    targets = [3, 0, 4]
    with Gradient(model, ResNetLRP()) as attributor:
        output, relevance = attributor(input, initial_relevance(targets, value))
        for num, target in enumerate(targets):
            single = attributor(input[num:num + 1], initial_relevance(target, value))[1][0]
            assert float((relevance[num] - single).abs().max()) < 1e-4 * float(single.abs().max())
    with Gradient(model, ResNetLRP(), initial_relevance(targets, value)) as attributor:
        assert torch.equal(attributor(input)[1], relevance)
    expected = naive(output.detach().double(), targets, value).sum(1)
    assert torch.allclose(relevance.double().sum((1, 2, 3)), expected, rtol=1e-3)
