'''Relevance is that of the weights which the forward pass used, whatever is in place before and after it.'''
import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from zennit.attribution import Gradient
from zennit.composites import EpsilonAlpha2Beta1, EpsilonPlus
from zennit.core import Hook
from zennit.rules import Epsilon, Gamma, Norm, Pass

from zennit_resnet import BlockLRP, RelativeLRP, ResidualCanonizer, ResNetLRP, initial_relevance, with_splitting
from zennit_resnet.rules import SinglePass

COMPOSITES = {
    'ratio': ResNetLRP,
    'merge': lambda: ResNetLRP('symmetric', batch_norm='merge'),
    'relative': RelativeLRP,
    'block': BlockLRP,
    'splitting': lambda: with_splitting(EpsilonPlus()),
    'splitting merge': lambda: with_splitting(EpsilonPlus(canonizers=[ResidualCanonizer(batch_norm='merge')])),
}
# rules that are run by this package have a copy of what they need, the others an error
SINGLE_PASS = ('ratio', 'merge', 'relative')


class Net(nn.Module):
    '''A block with batch normalization, and a convolution that is a function.'''
    def __init__(self, seed=0, checkpointed=False):
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.branch, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)
        self.weight, self.checkpointed = nn.Parameter(torch.randn(6, 6, 1, 1)), checkpointed
        self.norm.running_mean.normal_(0, .3)
        self.norm.running_var.uniform_(.5, 2)
        self.norm.weight.data.normal_()

    def forward(self, x):
        '''Logits.'''
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + (checkpoint(self.branch, x, use_reentrant=False) if self.checkpointed else self.branch(x)))
        return self.head(F.conv2d(x, self.weight).relu().mean((2, 3)))


class Wrapped(nn.Module):
    '''A network whose parameters are others only while it is called.'''
    def __init__(self, how, checkpointed=False):
        super().__init__()
        self.net, self.how = Net(0, checkpointed), how
        other = Net(1)
        named = *other.named_parameters(), *other.named_buffers()
        self.tensors = {name: elem.detach().clone() for name, elem in named}

    def forward(self, x):
        '''Logits.'''
        return getattr(self, self.how)(x)

    def functional(self, x):
        '''For a call, by torch.func.'''
        return torch.func.functional_call(self.net, self.tensors, (x,))

    def data(self, x):
        '''Other data is assigned.'''
        before = {name: elem.data for name, elem in self.net.named_parameters()}
        for name, param in self.net.named_parameters():
            param.data = self.tensors[name]
        output = self.net(x)
        for name, param in self.net.named_parameters():
            param.data = before[name]
        return output

    def change(self, x):
        '''They are changed in place, and changed back.'''
        before = {name: elem.detach().clone() for name, elem in self.net.named_parameters()}
        for name, param in self.net.named_parameters():
            param.data += self.tensors[name] - before[name]
        output = self.net(x)
        for name, param in self.net.named_parameters():
            param.data.copy_(before[name])
        return output

    def foreach(self, x):
        '''All at once.'''
        params = [param for _, param in self.net.named_parameters()]
        before = [param.detach().clone() for param in params]
        with torch.no_grad():
            torch._foreach_copy_(params, [self.tensors[name] for name, _ in self.net.named_parameters()])
        output = self.net(x)
        with torch.no_grad():
            torch._foreach_copy_(params, before)
        return output

    def replace(self, x):
        '''There are other parameter objects.'''
        modules = {name: (module, dict(module._parameters)) for name, module in self.net.named_modules()}
        for prefix, (module, parameters) in modules.items():
            for name in parameters:
                key = f'{prefix}.{name}'.lstrip('.')
                module._parameters[name] = nn.Parameter(self.tensors[key], requires_grad=False)
        output = self.net(x)
        for module, parameters in modules.values():
            module._parameters.update(parameters)
        return output


def explain(model, composite):
    '''Output and relevance of images with some negative values.'''
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    with Gradient(model=model.double().eval(), composite=composite) as attributor:
        return attributor(x, initial_relevance([1, 2]))


def reference(name, tensors):
    '''Output and relevance of a network that has these weights at all times.'''
    twin = nn.Module()
    twin.net = Net()
    twin.forward = twin.net.__call__
    twin.net.load_state_dict(tensors)
    return explain(twin, COMPOSITES[name]())


@pytest.mark.parametrize('how', ['functional', 'data', 'change', 'foreach', 'replace'])
@pytest.mark.parametrize('name', COMPOSITES)
def test_weights_of_the_call(name, how):
    '''The same map as with weights that stay, or an error, and the same network afterwards.'''
    model = Wrapped(how).double()
    model.tensors = {key: elem.double() for key, elem in model.tensors.items()}
    if how != 'functional':
        model.tensors.update(model.net.named_buffers())
    before = {key: elem.clone() for key, elem in model.state_dict().items()}
    # autograd keeps objects, so that BlockLRP is right where these are others
    if name in SINGLE_PASS or name == 'block' and how in ('functional', 'replace'):
        (output, relevance), (same, expected) = explain(model, COMPOSITES[name]()), reference(name, model.tensors)
        torch.testing.assert_close(output, same, rtol=0, atol=1e-12)
        torch.testing.assert_close(relevance, expected, rtol=1e-9, atol=1e-12)
    else:
        with pytest.raises(RuntimeError, match='weight'):
            explain(model, COMPOSITES[name]())
        return
    after = model.state_dict()
    assert all(torch.equal(elem, after[key]) for key, elem in before.items())


@pytest.mark.parametrize('name', COMPOSITES)
def test_checkpointed(name):
    '''A part that runs again in the backward pass has to have the same weights.'''
    state = Net().double().state_dict()
    twin = Net(0, checkpointed=True)
    torch.testing.assert_close(explain(twin, COMPOSITES[name]()), explain(Net(), COMPOSITES[name]()))
    assert all(torch.equal(elem, state[key]) for key, elem in twin.state_dict().items())
    model = Wrapped('functional', checkpointed=True).double()
    model.tensors = {key: elem.double() for key, elem in model.tensors.items()}
    with pytest.raises(RuntimeError, match='weights'):
        explain(model, COMPOSITES[name]())


@pytest.mark.parametrize('path', ['stem.weight', 'branch.weight', 'head.weight', 'weight', 'norm.running_var'])
@pytest.mark.parametrize('name', COMPOSITES)
def test_changed_before_the_backward_pass(name, path):
    '''What a rule reads must not be changed in place between the passes. What it does not read may be.'''
    model, x = Net().double().eval(), torch.rand(2, 3, 12, 12, dtype=torch.double, requires_grad=True)
    with COMPOSITES[name]().context(model):
        output = model(x)
        expected, = torch.autograd.grad(output, x, initial_relevance(1)(output), retain_graph=True)
        with torch.no_grad():
            owner, _, key = path.rpartition('.')
            getattr(model.get_submodule(owner), key).mul_(-1 if 'weight' in path else 2)
        try:
            relevance, = torch.autograd.grad(output, x, initial_relevance(1)(output))
        except RuntimeError as error:
            assert 'norm' not in path or name != 'ratio', error
        else:
            assert 'norm' in path
            torch.testing.assert_close(relevance, expected)


@pytest.mark.parametrize('name', SINGLE_PASS)
def test_parametrized_at_random(name):
    '''A weight that is computed whenever it is asked for is that of the call.'''
    class Noise(nn.Module):
        '''Another weight each time.'''
        def forward(self, weight):
            '''The weight with noise.'''
            drawn.append(weight + torch.randn_like(weight))
            return drawn[-1]

    drawn, model = [], Net().double()
    parametrize.register_parametrization(model.branch, 'weight', Noise())
    drawn.clear()
    relevance = explain(model, COMPOSITES[name]())[1]
    assert len(drawn) == 1
    twin = Net().double()
    twin.branch.weight.data = drawn[0].detach()
    torch.testing.assert_close(relevance, explain(twin, COMPOSITES[name]())[1])


@pytest.mark.parametrize('norm', [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm])
@pytest.mark.parametrize('name', COMPOSITES)
def test_normalized_weights(name, norm):
    '''Weights that are computed from others are those that are computed.'''
    model, twin = Net().double().eval(), Net().double().eval()
    for layer, other in ((model.branch, twin.branch), (model.head, twin.head)):
        norm(layer)
        layer(torch.zeros(1, 6, *(12, 12) * (layer is model.branch), dtype=torch.double))
        other.weight.data = layer.weight.detach().clone()
    if name.startswith('splitting'):
        # Zennit's rules modify parameters, and the weight is none
        with pytest.raises(RuntimeError, match='branch.*ZPlus'):
            explain(model, COMPOSITES[name]())
    else:
        torch.testing.assert_close(explain(model, COMPOSITES[name]()), explain(twin, COMPOSITES[name]()))


def test_rule_of_a_module_with_modules():
    '''A rule for a module with others inside, which are not copied, must find their weights again.'''
    class Twice(nn.Module):
        '''Two layers.'''
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            '''Both.'''
            return self.second(self.first(x))

    class Jacobian(SinglePass):
        '''Runs the module again.'''
        def store(self, module, *inputs):
            '''The input.'''
            return inputs

        def propagate(self, module, stored, relevance):
            '''Gradient times input.'''
            with torch.enable_grad():
                x = stored[0].detach().requires_grad_()
                return (x * torch.autograd.grad(module.forward(x), x, relevance)[0],)

    class Functional(nn.Module):
        '''Weights that are in place for the call only.'''
        def __init__(self):
            super().__init__()
            self.net, self.scale = nn.Sequential(nn.Linear(3, 4), Twice(), nn.Linear(4, 2)), 1

        def forward(self, x):
            '''Logits.'''
            tensors = {name: self.scale * elem.detach() for name, elem in self.net.named_parameters()}
            return torch.func.functional_call(self.net, tensors, (x,)) if self.scale != 1 else self.net(x)

    model, x = Functional().eval(), torch.rand(2, 3)
    explanation = Gradient(model, ResNetLRP(layer_map=[(Twice, Jacobian())]))(x, initial_relevance(1))
    assert bool(explanation[1].isfinite().all())
    model.scale = 2
    with pytest.raises(RuntimeError, match='Linear.*weights'):
        Gradient(model, ResNetLRP(layer_map=[(Twice, Jacobian())]))(x, initial_relevance(1))


class Hyper(nn.Module):
    '''A layer whose weights are those of others, or are computed from the input.'''
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.layer = (nn.Conv2d(3, 6, 3, bias=False) for _ in range(3))
        self.weight, self.head, self.how = nn.Linear(3, 6 * 27), nn.Linear(6, 4), how

    def call(self, x, weight):
        '''Run the layer with a weight.'''
        if self.how == 'function':
            return F.conv2d(x, weight)
        if self.how != 'attribute':
            return torch.func.functional_call(self.layer, {'weight': weight}, (x,))
        parameter = self.layer._parameters.pop('weight')
        self.layer.weight = weight
        output = self.layer(x)
        del self.layer.weight
        self.layer.weight = parameter
        return output

    def forward(self, x):
        '''Logits.'''
        if self.how == 'twice':
            x = self.call(x, self.first.weight) + self.call(x, self.second.weight)
        elif self.how == 'two':
            x = self.first(x) + self.second(x)
        else:
            x = self.call(x, self.weight(x.mean((0, 2, 3))[None]).view(6, 3, 3, 3))
        return self.head(x.relu().mean((2, 3)))


@pytest.mark.parametrize('name', ['ratio', 'merge', 'relative', 'block'])
def test_a_layer_with_two_weights(name):
    '''Each call has its own.'''
    expected = explain(Hyper('two'), COMPOSITES[name]())[1]
    torch.testing.assert_close(explain(Hyper('twice'), COMPOSITES[name]())[1], expected)
    with pytest.raises(RuntimeError, match='weight'):
        explain(Hyper('twice'), COMPOSITES['splitting']())


@pytest.mark.parametrize('how', ['function', 'functional', 'attribute'])
@pytest.mark.parametrize('name', ['ratio', 'merge', 'splitting'])
def test_weights_that_depend_on_the_input(name, how):
    '''Relevance should reach what they are computed from, for which there is no rule.'''
    model, x = Hyper(how).double().eval(), torch.randn(1, 3, 12, 12).double()
    with pytest.raises(RuntimeError, match='weight'):
        Gradient(model, COMPOSITES[name]())(x, initial_relevance(1))
    # of several images, they are the same for all
    with pytest.raises(RuntimeError, match='weight|one image at a time'):
        explain(model, COMPOSITES[name]())


@pytest.mark.parametrize('name', COMPOSITES)
def test_put_back(name):
    '''Weights that the network changes for a call and puts back are put back, also where that is an error.'''
    class Averaged(nn.Module):
        '''Runs with other weights.'''
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            '''Logits.'''
            before = [param.detach().clone() for param in self.net.parameters()]
            with torch.no_grad():
                for param in self.net.parameters():
                    param.mul_(.5)
            try:
                return self.net(x)
            finally:
                with torch.no_grad():
                    for param, value in zip(self.net.parameters(), before):
                        param.copy_(value)

    model = Averaged().double()
    state = {key: elem.clone() for key, elem in model.state_dict().items()}
    if name in SINGLE_PASS:
        explain(model, COMPOSITES[name]())
    else:
        with pytest.raises(RuntimeError):
            explain(model, COMPOSITES[name]())
    assert all(torch.equal(elem, state[key]) for key, elem in model.state_dict().items())


@pytest.mark.parametrize('how', ['data', 'parameter'])
@pytest.mark.parametrize('name', COMPOSITES)
def test_changed_by_hooks(name, how):
    '''Weights may be changed by hooks of the layer itself.'''
    def change(layer, args):
        kept.append(layer.weight.data if how == 'data' else layer.weight)
        set_weight(layer, layer.weight.detach() * -2)

    def put_back(layer, args, output):
        set_weight(layer, kept.pop())

    def set_weight(layer, value):
        if how == 'data':
            layer.weight.data = value
        else:
            layer.weight = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)

    kept, model, twin = [], Net().double(), Net().double()
    twin.branch.weight.data *= -2
    model.branch.register_forward_pre_hook(change)
    model.branch.register_forward_hook(put_back)
    if name in SINGLE_PASS or (name, how) == ('block', 'parameter'):
        torch.testing.assert_close(explain(model, COMPOSITES[name]()), explain(twin, COMPOSITES[name]()))
    else:
        with pytest.raises(RuntimeError, match='weight'):
            explain(model, COMPOSITES[name]())


# -- several calls of a layer ------------------------------------------------------------------------------------------

class Repeated(nn.Module):
    '''Layers of all types that are called twice, or have copies for the second call.'''
    def __init__(self, shared):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.act, self.head = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Linear(6, 4)
        first = nn.ModuleDict({
            'conv': nn.Conv2d(6, 6, 3, padding=1), 'act': nn.ReLU(), 'pool': nn.AvgPool2d(2, 1), 'mid': nn.Linear(6, 6),
        })
        self.first, self.second = first, first if shared else copy.deepcopy(first)

    def forward(self, x):
        '''Logits.'''
        x = self.act(self.stem(x))
        for part in (self.first, self.second):
            x = F.relu(part['pool'](part['act'](x + part['conv'](x))))
        x = F.avg_pool2d(x, 2).flatten(2).mean(2)
        for part in (self.first, self.second):
            x = F.linear(part['mid'](x).relu(), part['mid'].weight)
        return self.head(x)


class Output(Hook):
    '''Stores the output, and has relevance in proportion to it.'''
    def forward(self, module, input, output, *args):
        '''With Zennit 1, keyword arguments come before the output.'''
        self.stored_tensors['output'] = (args or (output,))[-1]

    def backward(self, module, grad_input, grad_output):
        '''Of the shape of the input.'''
        return (grad_output[0] * self.stored_tensors['output'].sigmoid(),)


RULES = {
    'splitting': lambda: with_splitting(EpsilonPlus()), 'alpha beta': lambda: with_splitting(EpsilonAlpha2Beta1()),
    'canonizer': lambda: EpsilonPlus(canonizers=[ResidualCanonizer()]),
    'layer map': lambda: ResNetLRP(layer_map=[
        (nn.Conv2d, Gamma(.5)), (nn.AvgPool2d, Norm()), (nn.Linear, Epsilon()), (nn.ReLU, Pass()),
    ]),
    'own': lambda: ResNetLRP(layer_map=[(nn.ReLU, Output())]),
    'relative': lambda: RelativeLRP(layer_map=[(nn.Conv2d, Gamma(.5))]),
    'block': lambda: BlockLRP(layer_map=[(nn.Conv2d, Epsilon(.5))]),
}


@pytest.mark.parametrize('name', RULES)
def test_rules_of_zennit_for_several_calls(name):
    '''They find the tensors of each call.'''
    expected, actual = (explain(Repeated(shared), RULES[name]()) for shared in (False, True))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize('name', RULES)
def test_rules_of_zennit_for_several_passes(name):
    '''The backward pass of one forward pass may come after others.'''
    model, seed = Repeated(False).double().eval(), initial_relevance(1)
    inputs = [torch.randn(2, 3, size, size).double().requires_grad_() for size in (12, 14, 12)]
    with RULES[name]().context(model):
        expected = []
        for x in inputs:
            output = model(x)
            expected += torch.autograd.grad(output, x, seed(output))
        outputs = [model(x) for x in inputs]
        with torch.no_grad():
            model(inputs[0].detach())
        for output, x, relevance in zip(outputs, inputs, expected):
            torch.testing.assert_close(torch.autograd.grad(output, x, seed(output))[0], relevance, rtol=1e-9, atol=0)


def test_calls_leave_nothing():
    '''What a rule of Zennit has stored is freed with the graph of each call.'''
    x, refs = torch.randn(2, 3, 12, 12).double().requires_grad_(), []
    model, composite = Repeated(True).double().eval(), RULES['own']()
    model.first['conv'].register_forward_hook(lambda module, args, output: refs.append(weakref.ref(output)))
    gc.disable()
    try:
        with composite.context(model):
            for _ in range(3):
                model(x).sum().backward()
            assert sum(ref() is not None for ref in refs[:-2]) == 0
        assert sum(ref() is not None for ref in refs) == 0
    finally:
        gc.enable()
