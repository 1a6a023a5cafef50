'''Canaries for what is private in Python, PyTorch and Zennit: each fails where an upgrade would make maps wrong.

Checked with Python 3.10 to 3.13, PyTorch 2.4 to 2.13, Zennit 0.5.1 and 1.0.0.
'''
import ast
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from zennit.composites import EpsilonPlus
from zennit.core import BasicHook, Composite
from zennit.rules import Epsilon

import zennit_resnet
from zennit_resnet import ResidualCanonizer, ResNetLRP, _compat

PACKAGE = Path(zennit_resnet.__file__).parent
# Names of autograd nodes, their numbers and what they save; modes, versions, hooks and frames.
PRIVATE = re.compile(
    r'torch\._|_saved_\w+|_sequence_nr|_forward_cls|_input_metadata|_forward(_pre)?_hooks|_getframe|_is_view|\._version|\._base\b'
    r'|_unsafe_preserve|_function_mode|_compiled_call_impl|_orig_mod|_conv_forward|_reversed_padding|_DropoutNd'
)


def test_private_names_are_fenced():
    '''No other module of the package uses them, docstrings and comments aside.'''
    found = []
    for path in PACKAGE.rglob('*.py'):
        if path.name in ('_compat.py', '_autograd.py'):
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        # what Zennit or this package call alike is their own
        code = re.sub(r'self\._version\b', '', ast.unparse(tree))
        found += [(path.name, match[0]) for match in PRIVATE.finditer(code)]
    assert found == []


# -- tensors -----------------------------------------------------------------------------------------------------------

def test_version_of():
    '''It counts changes in place, also those of views, and nobody counts within inference mode.'''
    tensor = torch.zeros(2, 2)
    before = _compat.version_of(tensor)
    tensor[0].add_(1)
    assert _compat.version_of(tensor) == before + 1
    assert _compat.version_of(tensor.detach()) == before + 1
    with torch.inference_mode():
        assert _compat.version_of(torch.zeros(1)) is None


def test_keep_version():
    '''Changes within the context are not counted.'''
    tensor = torch.zeros(2)
    before = _compat.version_of(tensor)
    with _compat.keep_version(tensor):
        tensor.add_(1)
    assert _compat.version_of(tensor) == before and tensor.tolist() == [1., 1.]


def test_is_view():
    '''Views are views, copies and detached tensors of no other are none.'''
    tensor = torch.zeros(2, 2, requires_grad=True) * 1
    assert _compat.is_view(tensor[0]) and not _compat.is_view(tensor.clone())


def test_base_of():
    '''That of a view of a view is the tensor with the memory, and writing into either changes it.'''
    tensor = torch.zeros(2, 2)
    view = tensor[:, 1:][0]
    assert _compat.base_of(view) is tensor and _compat.base_of(tensor) is None
    view.fill_(3)
    assert tensor.tolist() == [[0., 3.], [0., 0.]]


def test_is_out_of_memory():
    '''The message of the CPU is one of those that are known.'''
    with pytest.raises(RuntimeError) as error:
        # more than any machine has
        torch.empty(2 ** 55)
    assert _compat.is_out_of_memory(error.value) and _compat.is_out_of_memory(MemoryError())
    assert _compat.is_out_of_memory(torch.cuda.OutOfMemoryError())
    assert not _compat.is_out_of_memory(RuntimeError('shapes')) and not _compat.is_out_of_memory(ValueError())


def test_in_backward():
    '''Only the hooks of a backward pass run within it.'''
    tensor, seen = torch.ones(1, requires_grad=True), []
    (tensor * 2).register_hook(lambda _: seen.append(_compat.in_backward()))
    output = tensor * 2
    output.register_hook(lambda _: seen.append(_compat.in_backward()))
    output.sum().backward()
    assert seen == [True] and not _compat.in_backward()


def test_backward_pass():
    '''Each backward pass has a number of its own, also through the same graph.'''
    tensor, seen = torch.ones(1, requires_grad=True), []
    first = tensor * 2
    for elem in (first, first * 3):
        elem.register_hook(lambda _: seen.append(_compat.backward_pass()))
    output = first * 4
    for _ in range(2):
        torch.autograd.grad(output.sum(), tensor, retain_graph=True)
    assert len(set(seen)) == 2 and -1 not in seen and _compat.backward_pass() == -1


def test_set_grad_enabled():
    '''It sets the mode at once, and not only within a context.'''
    _compat.set_grad_enabled(False)
    is_off = not torch.is_grad_enabled()
    _compat.set_grad_enabled(True)
    assert is_off and torch.is_grad_enabled()


def test_modes():
    '''Modes are pushed and popped in order, see functions, and see none without torch functions.'''
    class Names(TorchFunctionMode):
        '''Names of functions.'''
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    mode, tensor = Names(), torch.ones(1)
    _compat.push_mode(mode)
    is_inside = _compat.function_modes()[-1] is mode
    torch.add(tensor, 1)
    with _compat.DisableTorchFunction():
        torch.mul(tensor, 1)
    popped = _compat.pop_mode()
    assert is_inside and popped is mode and mode not in _compat.function_modes()
    assert mode.names == ['add']


def test_overloads():
    '''Exported networks call overloads of aten.'''
    assert isinstance(torch.ops.aten.add.Tensor, _compat.OpOverload)


def test_dispatch_mode():
    '''It sees operations by name, and the module that runs them.'''
    found = []

    class Names(_compat.TorchDispatchMode):
        '''Names of operations.'''
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found.append((func.__name__, type(_compat.module_around(_compat.caller()))))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Names():
        torch.nn.Sequential(torch.nn.ReLU())(torch.ones(1))
    assert ('relu.default', torch.nn.ReLU) in found


# -- modules -----------------------------------------------------------------------------------------------------------

def test_body_of():
    '''A mode sees what is inside of the function of attention, which computes the same bits.'''
    class Names(torch.overrides.TorchFunctionMode):
        '''Names of functions.'''
        seen = []

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    layer, x = nn.MultiheadAttention(8, 2), torch.rand(3, 2, 8, requires_grad=True)
    given = (x, x, x, 8, 2, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0., layer.out_proj.weight,
             layer.out_proj.bias)
    with Names():
        outputs = _compat.body_of(nn.functional.multi_head_attention_forward)(*given, training=False)
    assert {'linear', 'softmax', 'bmm'} <= set(Names.seen) and 'multi_head_attention_forward' not in Names.seen
    assert torch.equal(outputs[0], layer.eval()(x, x, x)[0])
    replaced = _compat.body_of(
        nn.functional.multi_head_attention_forward, _in_projection_packed=lambda *args: 3 * (_compat.project(*args)[2],)
    )
    same = nn.functional.multi_head_attention_forward(x, x, x, *given[3:5], torch.cat(3 * [given[5][16:]]), *given[6:])
    assert torch.allclose(replaced(*given)[0], same[0], atol=1e-6)


def test_softmax_dim():
    '''The dimension of a softmax without one.'''
    values = torch.rand(2, 3, 4)
    for num in range(1, 4):
        elem = values.reshape(-1)[:2 ** num].view((2,) * num)
        dim = _compat.softmax_dim('softmax', num, 0)
        assert torch.equal(elem.softmax(dim), nn.functional.softmax(elem, dim=None, _stacklevel=0))


def test_rules_of():
    '''Hooks of Zennit and of this package are bound methods of their rules, before and after the module.'''
    module, rule = nn.Linear(2, 2), Epsilon()
    handles = rule.register(module)
    single, linear = ResNetLRP(), nn.Sequential(nn.Linear(2, 2))
    single.register(linear)
    assert _compat.rules_of(module) == [rule] and rule in _compat.rules_of(module, with_post=True)
    assert isinstance(rule, BasicHook) and len(_compat.pre_hooks_of(module)) == 1
    assert [type(elem).__name__ for elem in _compat.rules_of(linear[0])] == ['ZPlus']
    handles.remove()
    single.remove()
    assert not _compat.rules_of(module) and not _compat.rules_of(linear[0], with_post=True)


def test_pre_hooks_in_order():
    '''Hooks are in the order in which they run.'''
    module, order = nn.Identity(), []
    for num in range(3):
        module.register_forward_pre_hook(lambda *_, num=num: order.append(num))
    module(torch.zeros(1))
    for hook in _compat.pre_hooks_of(module):
        hook(module, ())
    assert order == [0, 1, 2, 0, 1, 2] and len(_compat.hooks_of(module)) == 0


def test_hooks_of_all():
    '''Hooks that run for each module.'''
    modules, calls = torch.nn.modules.module, []
    assert _compat.hooks_of_all() == []
    handles = [
        modules.register_module_forward_hook(lambda *args: calls.append(1)),
        modules.register_module_forward_pre_hook(lambda *args: calls.append(0)),
    ]
    try:
        for hook in _compat.hooks_of_all():
            hook()
        nn.Identity()(torch.zeros(1))
        assert calls == [0, 1, 0, 1]
    finally:
        for handle in handles:
            handle.remove()
    assert _compat.hooks_of_all() == []


def test_without_hooks():
    '''Hooks of the copy are those that compute weights. The network has all of its own, and its attributes.'''
    layer, calls = nn.utils.spectral_norm(nn.Linear(2, 2)).eval(), []
    module = nn.Sequential(layer, layer)
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook, module.register_forward_hook):
        register(lambda *args: calls.append(1))
    before = {name: list(elem) for name, elem in vars(layer).items() if name.endswith('_hooks')}
    bare = _compat.without_hooks(module)
    assert bare[0] is bare[1] is not layer and bare[0].weight_orig is layer.weight_orig
    assert torch.equal(bare(torch.ones(1, 2)), module(torch.ones(1, 2)))
    assert len(_compat.pre_hooks_of(bare[0])) == 1 and len(calls) == 5
    assert before == {name: list(elem) for name, elem in vars(layer).items() if name.endswith('_hooks')}
    bare[0].note = 'its own'
    assert not hasattr(layer, 'note')


def test_dropout():
    '''All dropouts are of one class.'''
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    assert all(issubclass(kind, _compat.Dropout) for kind in kinds)


def test_forward_parts():
    '''Convolutions run what subclasses override.'''
    assert all(part in dir(nn.ConvTranspose2d) + dir(nn.Conv2d) for part in _compat.FORWARD_PARTS)

    class Doubled(nn.Conv2d):
        '''Overrides a part.'''
        def _conv_forward(self, input, weight, bias):
            return 2 * super()._conv_forward(input, weight, bias)

    module = Doubled(1, 1, 1)
    input = torch.ones(1, 1, 2, 2)
    assert torch.equal(module(input), 2 * F.conv2d(input, module.weight, module.bias))


@pytest.mark.parametrize('dims', [1, 2, 3])
def test_padding_of(dims):
    '''It pads as the convolution does.'''
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    module = kind(1, 1, 3, padding=tuple(range(1, dims + 1)), padding_mode='circular', bias=False)
    input = torch.randn(1, 1, *(5,) * dims)
    padded = F.pad(input, _compat.padding_of(module), mode='circular')
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
    assert torch.allclose(module(input), function(padded, module.weight))


def test_compiled():
    '''Compiled modules keep the original and what they call under these names.'''
    inner = nn.Linear(1, 1)
    assert torch.compile(inner)._modules[_compat.COMPILED_MODULE] is inner
    inner.compile()
    assert vars(inner)[_compat.COMPILED_CALL] is not None


def test_can_be_compiled():
    '''Compiling loads the compiler.'''
    torch.compile(nn.Linear(1, 1))
    assert _compat.can_be_compiled()


# -- frames ------------------------------------------------------------------------------------------------------------

def test_caller():
    '''The frame of the caller.'''
    def ask():
        return _compat.caller()

    assert ask().f_code is test_caller.__code__


def test_is_running():
    '''A frame runs until its function returns.'''
    def inner():
        frame = _compat.caller(0)
        return frame, _compat.is_running(frame)

    frame, was_running = inner()
    assert was_running and not _compat.is_running(frame)


class Asking(ResidualCanonizer):
    '''Asks who registers it.'''
    def apply(self, root_module):
        '''Note the answer.'''
        self.answers.append(_compat.registering_composite())
        return []


@pytest.mark.parametrize('kind', [EpsilonPlus, type('Own', (Composite,), {
    'register': lambda self, module: Composite.register(self, module)
})])
def test_registering_composite(kind):
    '''Composites of Zennit are found from the call.'''
    canonizer = Asking()
    canonizer.answers = []
    composite = kind(canonizers=[canonizer])
    composite.register(nn.Linear(1, 1))
    composite.remove()
    assert canonizer.answers == [composite] and _compat.registering_composite() is None


def test_is_replacing():
    '''Zennit removes a composite before it registers it again.'''
    class Replaced(Composite):
        '''Asks when it is removed.'''
        def remove(self):
            '''Note the answer.'''
            Composite.remove(self)

    seen = []

    class Handle:
        '''Asks when it is removed.'''
        def remove(self):
            '''Note the answer.'''
            seen.append(_compat.is_replacing())

    composite = Replaced()
    for action in (lambda: composite.register(nn.Linear(1, 1)), composite.remove):
        composite.handles.append(Handle())
        action()
    assert seen == [True, False]


def test_canonizer_without_composite():
    '''If no composite can be found, it is an error, and not the default rules.'''
    with pytest.raises(RuntimeError, match='ResidualCanonizer'):
        ResidualCanonizer().apply(nn.Linear(1, 1))


# -- graphs ------------------------------------------------------------------------------------------------------------


def test_recorded():
    '''What is computed from the input of a graph that is recorded is told from constants, and numbers may be read.'''
    weight, found = torch.ones(2), []

    def function(input):
        output = input * weight
        found.append([_compat.is_recorded(elem) for elem in (input, output > 0, weight * 2, 3, torch.zeros(2))])
        found.append((_compat.is_traced(), _compat.has_values(weight)))
        assert float(output.sum()) == 3
        return output + float(weight.sum())

    graph = make_fx(function, tracing_mode='real', **_compat.RECORDING)(torch.tensor([1., 2.]))
    assert found == [[True, True, False, False, False], (True, False)]
    assert torch.equal(graph(torch.zeros(2)), torch.full((2,), 2.))
    assert not _compat.is_traced() and _compat.has_values(weight) and not _compat.is_recorded(weight)


def test_fake():
    '''Tensors without values are told from others.'''
    with FakeTensorMode():
        assert _compat.is_fake(torch.ones(2))
    assert not _compat.is_fake(torch.ones(2))


def test_recording():
    '''One mode makes what a graph knows of all tensors, and what is unrecorded is computed as ever.'''
    def function(x):
        with _compat.unrecorded():
            assert not _compat.is_traced() and bool((x.detach().exp() > 2).all())
        return (x + 1) * 2

    with _compat.recording():
        graph = make_fx(function, tracing_mode='real', **_compat.RECORDING)(torch.ones(2)).graph
    values = [node.meta['val'] for node in graph.nodes if node.op == 'call_function']
    assert [str(node.target) for node in graph.nodes][1:-1] == ['aten.add.Tensor', 'aten.mul.Tensor']
    assert len({id(value.fake_mode) for value in values}) == 1


def test_parameter():
    '''A parameter is what it was made of, also in a graph, where PyTorch takes it for a constant.'''
    def function(x):
        parameter = _compat.as_parameter(x * 3)
        assert isinstance(parameter, torch.nn.Parameter) and not parameter.requires_grad
        return parameter + 1

    graph = make_fx(function, tracing_mode='real', **_compat.RECORDING)(torch.ones(2))
    assert torch.equal(graph(torch.zeros(2)), torch.ones(2))
    assert torch.equal(function(torch.zeros(2)), torch.ones(2))


def test_origin():
    '''A call that a mode handles, and hands on to another, is that of the code around it.'''
    frames = []

    class Mode(TorchFunctionMode):
        '''Notes whose call it is.'''
        def __torch_function__(self, func, types, args=(), kwargs=None):
            frames.append(_compat.origin_of_call(func))
            return func(*args, **(kwargs or {}))

    with Mode(), Mode():
        torch.ones(2).sum().item()
    assert [frame.f_code.co_name for frame in frames] == ['test_origin'] * len(frames) and len(frames) == 6
