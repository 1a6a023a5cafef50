'''Tests of what all single-pass rules have in common.'''
import copy

import pytest
import torch
from helpers.layers import (
    LAYERS,
    assert_close,
    assert_conserved,
    attribute,
    box,
    make_input,
    naive_zplus,
    with_dead_units,
)
from torch.nn import functional as F

from zennit_resnet.layer import Addition, Gate
from zennit_resnet.rules import (
    PassThrough,
    RatioSplit,
    ResidualOnly,
    SignalTakesAll,
    SinglePass,
    SymmetricSplit,
    Uncrop,
    ZPlus,
)

# -- behaviour of single-pass rules ------------------------------------------------------------------------------------

def hooks_of(module):
    '''All hooks of a module.'''
    return [hook for key, value in vars(module).items() if key.endswith('_hooks') for hook in value.values()]


RULES = [
    (ZPlus(), torch.nn.Conv2d(2, 3, 3, 2), 1), (ZPlus(), torch.nn.Linear(5, 4), 1), (ZPlus(), torch.nn.AvgPool2d(2), 1),
    (ZPlus(coverage='even'), torch.nn.MaxPool2d(3, 2), 1), (ZPlus(dead_units='drop'), torch.nn.MaxPool2d(3, 2), 1),
    (ZPlus(maxpool='average'), torch.nn.MaxPool2d(3, 2), 1), (PassThrough(), torch.nn.ReLU(), 1),
    (RatioSplit(), Addition(), 2), (SymmetricSplit(), Addition(), 2), (ResidualOnly(), Addition(), 2),
]
RULE_IDS = [f'{type(rule).__name__}-{type(module).__name__}-{num}' for num, (rule, module, _) in enumerate(RULES)]


@pytest.mark.parametrize('rule, module, num', RULES, ids=RULE_IDS)
def test_remove(rule, module, num):
    '''After the handles are removed, the module has no hooks, and its own gradient.'''
    inputs = [torch.randn(2, 2, 6, 5, requires_grad=True) for _ in range(num)]
    before = module(*inputs)
    gradients = torch.autograd.grad(before.sum(), inputs)
    rule = rule.copy()
    handles = rule.register(module)
    during = module(*inputs)
    torch.autograd.grad(during.sum(), inputs)
    handles.remove()
    assert hooks_of(module) == []
    after = module(*inputs)
    assert torch.equal(before, during) and torch.equal(before, after)
    for actual, expected in zip(torch.autograd.grad(after.sum(), inputs), gradients):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize('rule, module, num', RULES, ids=RULE_IDS)
def test_no_grad(rule, module, num):
    '''Without gradients, and for inputs which require none, nothing happens.'''
    inputs = [torch.randn(2, 2, 6, 5, requires_grad=True) for _ in range(num)]
    handles = rule.copy().register(module)
    with torch.no_grad():
        output = module(*inputs)
        assert not torch.is_grad_enabled()
    assert output.grad_fn is None and not output.requires_grad
    assert torch.is_grad_enabled()
    detached = module(*(elem.detach() for elem in inputs))
    assert torch.equal(detached, output)
    handles.remove()
    with torch.no_grad():
        assert torch.equal(module(*inputs), output)


def test_exception_in_layer():
    '''If the layer raises, gradients are enabled again, and the next call works.'''
    module = torch.nn.Conv2d(2, 3, 3).double()
    handles = ZPlus().register(module)
    with pytest.raises(RuntimeError):
        module(torch.ones(1, 7, 5, 5, dtype=torch.float64, requires_grad=True))
    assert torch.is_grad_enabled()
    input = make_input((1, 2, 5, 5), 'positive').requires_grad_()
    output = module(input)
    lower, = torch.autograd.grad(output, input, torch.ones_like(output))
    handles.remove()
    assert_close(lower, naive_zplus(module, input.detach(), torch.ones_like(output)))


def test_called_twice():
    '''A module which is called several times keeps the state of each call.'''
    module = torch.nn.Linear(4, 4).double()
    left, right = (make_input((2, 4), sign).requires_grad_() for sign in ('positive', 'signed'))
    handles = ZPlus().register(module)
    outputs = module(left), module(right)
    relevance = [torch.rand(2, 4, dtype=torch.float64) for _ in range(2)]
    # the first call is asked first, which is not the reverse order
    for input, output, upper in zip((left, right), outputs, relevance):
        lower, = torch.autograd.grad(output, input, upper)
        assert_close(lower, naive_zplus(module, input.detach(), upper))
    nested = module(left)
    output = module(nested)
    middle, lower = torch.autograd.grad(output, (nested, left), relevance[0])
    handles.remove()
    assert_close(middle, naive_zplus(module, nested.detach(), relevance[0]))
    assert_close(lower, naive_zplus(module, left.detach(), middle))


def test_backward_twice():
    '''Relevance of several outputs can be computed from the same graph.'''
    module = torch.nn.Conv2d(2, 3, 3, padding=1).double()
    input = make_input((1, 2, 4, 4), 'signed').requires_grad_()
    handles = ZPlus().register(module)
    output = module(input)
    for _ in range(2):
        relevance = torch.rand_like(output)
        lower, = torch.autograd.grad(output, input, relevance, retain_graph=True)
        assert_close(lower, naive_zplus(module, input.detach(), relevance))
    handles.remove()


@pytest.mark.parametrize('kind', [torch.nn.ReLU, torch.nn.ReLU6, torch.nn.Hardtanh])
def test_inplace_activation(kind):
    '''Activations which overwrite their input do not disturb rules before or after them.'''
    convs = [torch.nn.Conv2d(2, 3, 3).double(), torch.nn.Conv2d(3, 2, 3).double()]
    input = make_input((2, 2, 7, 7), 'signed')
    lower = []
    for inplace in (False, True):
        modules = [convs[0], kind(inplace=inplace), convs[1]]
        handles = [rule.register(elem) for rule, elem in zip((ZPlus(), PassThrough(), ZPlus()), modules)]
        source = input.clone().requires_grad_()
        output = torch.nn.Sequential(*modules)(source)
        lower.append(torch.autograd.grad(output, source, torch.ones_like(output))[0])
        for handle in handles:
            handle.remove()
    assert torch.equal(*lower)


def test_inplace_after_projection():
    '''An in-place ReLU on the output of a layer does not change what the layer keeps.'''
    module = torch.nn.Linear(4, 3).double()
    input = make_input((2, 4), 'signed').requires_grad_()
    handles = ZPlus().register(module)
    output = module(input).relu_()
    relevance = torch.rand_like(output) * (output.detach() > 0) + 0.
    lower, = torch.autograd.grad(output, input, relevance)
    handles.remove()
    assert_close(lower, naive_zplus(module, input.detach(), relevance))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['linear', 'conv2d stride padding', 'average 2d', 'adaptive 2d global'])
def test_half_precision(name, dtype):
    '''Half precision inputs have half precision relevance, which is computed in single precision.'''
    build, shape = LAYERS[name]
    module = build().to(dtype)
    input = make_input((2, *shape), 'signed').to(dtype)
    output, relevance, lower = attribute(ZPlus(), module, input)
    assert output.dtype == dtype and lower.dtype == dtype
    expected = naive_zplus(copy.deepcopy(module).double(), input.double(), relevance.double())
    assert_close(lower.double(), expected, 2e-2)


@pytest.mark.skipif(
    not hasattr(torch.autograd.function.FunctionCtx, 'set_output_grad_dtype'),
    reason='this version of torch rounds gradients to the precision of the output',
)
def test_half_precision_small_relevance():
    '''Relevance between layers which is too small for half precision survives in single precision.'''
    modules = [torch.nn.Linear(1, 2048).half(), torch.nn.Linear(2048, 1).half()]
    for module in modules:
        module.weight.data.abs_()
    input = torch.ones(1, 1, dtype=torch.float16, requires_grad=True)
    handles = [ZPlus().register(module) for module in modules]
    output = modules[1](modules[0](input)).float()
    # each of the units between the layers has about 5e-9
    relevance = torch.full((1, 1), 1e-5)
    lower, = torch.autograd.grad(output, input, relevance)
    for handle in handles:
        handle.remove()
    assert_conserved(lower, relevance, .02)


def test_single_precision():
    '''Single precision conserves relevance up to rounding.'''
    module = torch.nn.Conv2d(8, 16, 3, 2, 1)
    input = torch.randn(2, 8, 17, 17).clamp(min=0)
    for rule in (ZPlus(), ZPlus(coverage='even')):
        _, relevance, lower = attribute(rule, module, input)
        assert lower.dtype == torch.float32
        assert_conserved(lower, relevance, 1e-5)


@pytest.mark.parametrize('coverage', ['literal', 'even'])
@pytest.mark.parametrize('name', ['linear', 'conv2d', 'conv2d stride padding', 'average 2d', 'average 2d ceil'])
def test_batch(name, coverage):
    '''Samples do not depend on each other, also if only some of them have negative values.'''
    build, shape = LAYERS[name]
    module = build().double()
    input = torch.cat([make_input((1, *shape), sign) for sign in ('positive', 'signed', 'negative')])
    _, relevance, lower = attribute(ZPlus(coverage=coverage), module, input)
    for num in range(3):
        single = (elem[num:num + 1] for elem in (input, relevance))
        expected = attribute(ZPlus(coverage=coverage), module, next(single), relevance=next(single))[2]
        assert_close(lower[num:num + 1], expected, 1e-12)


def test_zero_relevance():
    '''No relevance stays none, also at dead units.'''
    module, input = with_dead_units('conv2d')
    _, _, lower = attribute(ZPlus(), module, input, relevance=torch.zeros_like(module(input).detach()))
    assert float(lower.abs().max()) == 0


def test_subclass_with_own_forward():
    '''A convolution which does not compute what its class does is left alone.'''
    class Standardized(torch.nn.Conv2d):
        '''A convolution with weights of zero mean.'''
        def forward(self, input):
            '''Convolve.'''
            return F.conv2d(input, self.weight - self.weight.mean(), self.bias)

    class Named(torch.nn.Conv2d):
        '''A convolution of another name.'''

    handles = ZPlus().register(Standardized(2, 3, 3))
    handles.remove()
    module = Standardized(2, 3, 3).double()
    handles = ZPlus().register(module)
    assert hooks_of(module) == []
    handles.remove()
    module = Named(2, 3, 3).double()
    input = make_input((1, 2, 5, 5), 'signed')
    _, relevance, lower = attribute(ZPlus(), module, input)
    assert_close(lower, naive_zplus(module, input, relevance))


def test_copy():
    '''A copy has all settings, but no state of its original.'''
    low, high = box()
    settings = {
        'stabilizer': .25, 'first_layer': 'zbox', 'low': low, 'high': high, 'projection': 'literal',
        'dead_units': 'drop', 'maxpool': 'average', 'coverage': 'even',
    }
    rule = ZPlus(**settings)
    duplicate = rule.copy()
    assert type(duplicate) is ZPlus and duplicate is not rule
    for key, value in settings.items():
        if key == 'stabilizer':
            assert float(duplicate.stabilizer(torch.zeros(1))) == .25
        else:
            assert getattr(duplicate, key) is value
    mutable = [key for key, value in vars(rule).items() if isinstance(value, (dict, list))]
    assert mutable and all(getattr(rule, key) is not getattr(duplicate, key) for key in mutable)
    assert type(ResidualOnly(SymmetricSplit()).copy().rule) is SymmetricSplit
    for rule in (RatioSplit(), SymmetricSplit(), PassThrough(), SignalTakesAll(), Uncrop()):
        assert type(rule.copy()) is type(rule) and rule.copy() is not rule


def test_copy_is_independent():
    '''To deactivate a copy does not deactivate its original.'''
    rule = ZPlus()
    duplicate = rule.copy()
    duplicate.active = False
    assert rule.active
    assert rule.copy().active


@pytest.mark.parametrize('name, value', [
    ('first_layer', 'z+'), ('projection', 'spred'), ('dead_units', None), ('maxpool', 'max'), ('coverage', True),
])
def test_bad_arguments(name, value):
    '''Errors name the argument, its value and the choices.'''
    with pytest.raises(ValueError, match=name) as info:
        ZPlus(**{name: value})
    choices = {
        'first_layer': ('zplus', 'literal', 'ones', 'zbox', 'wsquare', 'flat'), 'projection': ('spread', 'literal'),
        'dead_units': ('spread', 'drop'), 'maxpool': ('winner', 'average', 'avg2x2'), 'coverage': ('literal', 'even'),
    }[name]
    assert all(repr(elem) in str(info.value) for elem in (value, *choices))


@pytest.mark.parametrize('bounds', [{}, {'low': -1.}, {'high': 1.}])
def test_zbox_needs_bounds(bounds):
    '''The box needs both of its bounds.'''
    with pytest.raises(ValueError, match='low and high'):
        ZPlus(first_layer='zbox', **bounds)


def test_needs_tensor():
    '''A module which returns something else gives a clear error.'''
    module = Gate()
    module.function = lambda tensor: {'output': tensor}
    with pytest.raises(TypeError, match='PassThrough.*Gate'):
        attribute(PassThrough(), module, torch.ones(1))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize('part', [None, 'shape'])
def test_input_without_relevance(part):
    '''Rules may leave out an input, and give relevance of the shape of a broadcast one.'''
    class Second(SinglePass):
        '''The second input takes all.'''
        def propagate(self, module, stored, relevance):
            '''Leave out the first.'''
            return (None if part is None else torch.zeros_like(relevance)), relevance

    first, second = torch.rand(2, 3, 4), torch.rand(1, 4)
    _, relevance, *lower = attribute(Second(), Addition(), first, second)
    assert lower[0] is None if part is None else not lower[0].any()
    assert_close(lower[1], relevance.sum((0, 1))[None])
