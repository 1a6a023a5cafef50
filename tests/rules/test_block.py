'''A residual block as one layer, Eq. (1) of C3-LRP.'''
import pytest
import torch
from golden_cases import golden_cases, relative_error, tensor
from helpers.golden import Capture, build_layer, build_network
from torchvision.models.resnet import BasicBlock, Bottleneck
from zennit.attribution import Gradient
from zennit.composites import COMPOSITES

from zennit_resnet import BlockEpsilon, BlockLRP, initial_relevance
from zennit_resnet.attribution import SelectOutput


@pytest.mark.parametrize('arrays, settings, case', golden_cases('layer_*', 'eq1'))
def test_layer(arrays, settings, case):
    '''Single layers, with the bias in the denominator.'''
    arguments = case['arguments']
    module = build_layer(arrays, settings['layer'])
    input = tensor(arrays, case['inputs']['input']).requires_grad_()
    handles = BlockEpsilon(epsilon=arguments['eps'], mode=arguments['eps_mode']).register(module)
    lower, = torch.autograd.grad(module(input), input, tensor(arrays, case['inputs']['relevance']))
    handles.remove()
    assert relative_error(lower, tensor(arrays, case['expected']['input_relevance'])) < 1e-8


@pytest.mark.parametrize('arrays, settings, case', golden_cases('network_*', 'eq1'))
def test_network(arrays, settings, case):
    '''Whole networks, with relevance at the inputs of all blocks.'''
    arguments = case['arguments']
    model = build_network(arrays, settings['arch'])
    blocks = [block['name'] for block in settings['arch']['blocks']]
    capture = Capture(model, ['avgpool', 'fc', 'bn1', *blocks])
    composite = BlockLRP(epsilon=arguments['eps'], mode=arguments['eps_mode'])
    with Gradient(model=model, composite=composite) as attributor:
        output, relevance = attributor(tensor(arrays, 'input'), tensor(arrays, case['inputs']['start']))
    assert relative_error(output, tensor(arrays, 'logits')) < 1e-9
    expected = {key: tensor(arrays, value) for key, value in case['expected'].items()}
    assert relative_error(relevance, expected['input']) < 1e-7
    names = {'avgpool': 'features', 'fc': 'pooled', 'bn1': 'conv1_out', **{name: f'{name}.input' for name in blocks}}
    for name, key in names.items():
        # gradients are relevance divided by the activation
        actual = capture.relevance[f'{name}.input'] * capture.inputs[f'{name}.input']
        assert relative_error(actual.flatten(1), expected[key].flatten(1)) < 1e-7


def make_block(kind, inplanes, planes, stride, projection, bias):
    '''A block with random batch normalization.'''
    width = planes * kind.expansion
    downsample = torch.nn.Sequential(
        torch.nn.Conv2d(inplanes, width, 1, stride, bias=False), torch.nn.BatchNorm2d(width)
    ) if projection else None
    block = kind(inplanes, planes, stride, downsample).double().eval()
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(.5, 2)
            torch.nn.init.uniform_(module.weight, -1, 1)
            if bias:
                module.running_mean.normal_()
                torch.nn.init.normal_(module.bias)
    return block


@pytest.mark.parametrize('kind, inplanes, planes, stride, projection', [
    (BasicBlock, 3, 3, 1, False), (BasicBlock, 2, 3, 2, True),
    (Bottleneck, 4, 1, 1, False), (Bottleneck, 3, 1, 2, True),
])
@pytest.mark.parametrize('epsilon, mode', [(0., 'sign'), (1e-3, 'sign'), (1e-3, 'plus')])
def test_jacobian(kind, inplanes, planes, stride, projection, epsilon, mode):
    '''Eq. (1) with the Jacobian written out.'''
    block = make_block(kind, inplanes, planes, stride, projection, bias=True)
    input = torch.rand(1, inplanes, 4, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(block, input)[0, ..., 0, :, :, :].flatten(3).flatten(0, 2)
    output = block(input).detach().flatten()
    relevance = torch.randn_like(output)
    if mode == 'plus' or epsilon == 0:
        denominator = output + epsilon
    else:
        denominator = output + epsilon * torch.where(output < 0, -1., 1.).double()
    share = torch.where(denominator == 0, 0, relevance / denominator.where(denominator != 0, 1))
    expected = input.flatten() * (share @ jacobian)

    handles = BlockEpsilon(epsilon=epsilon, mode=mode).register(block)
    input.requires_grad_()
    result = block(input)
    lower, = torch.autograd.grad(result, input, relevance.view_as(result))
    handles.remove()
    assert relative_error(lower.flatten(), expected) < 1e-12
    assert not block._forward_hooks and not block._forward_pre_hooks


def test_biases_absorb():
    '''Over a block, relevance changes exactly by what the biases contribute: J z = z' - (the biases' part).'''
    block = make_block(BasicBlock, 3, 3, 1, False, bias=True)
    input = torch.rand(1, 3, 5, 5, dtype=torch.float64)
    output, product = torch.autograd.functional.jvp(block, input, input)
    relevance = torch.rand_like(output)
    handles = BlockEpsilon(epsilon=0).register(block)
    input.requires_grad_()
    lower, = torch.autograd.grad(block(input), input, relevance)
    handles.remove()
    alive = output != 0
    absorbed = (relevance * (output - product) / output)[alive].sum() + relevance[~alive].sum()
    assert abs(float(absorbed)) > 1e-2
    assert float((relevance.sum() - lower.sum() - absorbed).abs()) < 1e-10 * float(relevance.sum())


def test_linear_block_is_lrp0():
    '''Without biases and activations, the rule is LRP-0, R'_i = sum_j w_ji z_i / z'_j R_j, and conserves.'''
    block = torch.nn.Sequential(torch.nn.Linear(4, 5, bias=False), torch.nn.Linear(5, 3, bias=False)).double()
    input = torch.rand(1, 4, dtype=torch.float64, requires_grad=True)
    weight = (block[1].weight @ block[0].weight).detach()
    relevance = torch.rand(1, 3, dtype=torch.float64)
    expected = (weight * input.detach() / (weight @ input.detach()[0])[:, None] * relevance[0, :, None]).sum(0)
    handles = BlockEpsilon(epsilon=0).register(block)
    lower, = torch.autograd.grad(block(input), input, relevance)
    handles.remove()
    assert relative_error(lower[0], expected) < 1e-12
    assert abs(float(lower.sum() - relevance.sum())) < 1e-12


class OwnBlock(torch.nn.Module):
    '''A user's block.'''
    def __init__(self, width):
        super().__init__()
        self.f = torch.nn.Sequential(
            torch.nn.Conv2d(width, width, 3, padding=1), torch.nn.BatchNorm2d(width), torch.nn.ReLU()
        )

    def forward(self, input):
        '''A skip connection.'''
        return input + self.f(input)


class OwnNetwork(torch.nn.Module):
    '''A user's network, with a long skip connection around two blocks.'''
    def __init__(self, nested=False):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 4, 3)
        self.nested = nested
        self.blocks = torch.nn.Sequential(OwnBlock(4), OwnBlock(4))
        if nested:
            self.blocks = OwnBlock(4)
            self.blocks.f = torch.nn.Sequential(OwnBlock(4), OwnBlock(4))
        self.head = torch.nn.Linear(4, 5)

    def forward(self, input):
        '''Scores.'''
        return self.head(self.blocks(self.stem(input).relu()).mean((2, 3)))


def layer_calls(model, composite, input):
    '''Names of the modules that were one layer.'''
    names = {module: name for name, module in model.named_modules()}
    with composite.context(model):
        output = model(input.clone().requires_grad_())
        found, queue, seen = set(), [output.grad_fn], set()
        while queue:
            node = queue.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            call = getattr(node, 'call', None)
            if call is not None and call.is_layer:
                found.add(names[call.module])
            queue.extend(parent for parent, _ in node.next_functions)
    return found - {''}


@pytest.mark.parametrize('nested, blocks, expected', [
    (False, None, {'stem', 'blocks.0', 'blocks.1', 'head'}),
    (True, None, {'stem', 'blocks', 'head'}),
    (False, OwnBlock, {'stem', 'blocks.0', 'blocks.1', 'head'}),
    (False, ['blocks.1'], {'stem', 'blocks.0.f.0', 'blocks.0.f.1', 'blocks.1', 'head'}),
    (False, lambda name, module: name == 'blocks', {'stem', 'blocks', 'head'}),
])
def test_blocks(nested, blocks, expected):
    '''Blocks are found, or given by type, name or predicate; the outermost counts.'''
    model = OwnNetwork(nested).eval()
    assert layer_calls(model, BlockLRP(blocks=blocks), torch.rand(2, 3, 8, 8)) == expected


@pytest.mark.parametrize('nested', [False, True])
def test_closed_form(nested):
    '''Without stabilizer, the factors telescope to Gradient x Input times R_k / (y_k - b_k).'''
    model = OwnNetwork(nested).double().eval()
    input = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    output = model(input)
    gradient, = torch.autograd.grad(output[:, 2].sum(), input)
    scale = (output[:, 2] / (output[:, 2] - model.head.bias[2])).detach()
    expected = (input * gradient).detach() * scale.view(-1, 1, 1, 1)
    with Gradient(model=model, composite=BlockLRP(epsilon=0)) as attributor:
        result, relevance = attributor(input.detach().clone(), initial_relevance(2))
    assert torch.equal(result, output)
    assert relative_error(relevance, expected) < 1e-10


class Adding(torch.nn.Module):
    '''A network that adds in its own forward, before its classifier.'''
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3, padding=1)
        self.fc = torch.nn.Linear(4, 3)

    def forward(self, x):
        '''Logits.'''
        hidden = self.first(x).relu()
        return self.fc((hidden + self.second(hidden)).relu().mean((2, 3)))


@pytest.mark.parametrize('wrap', [
    torch.nn.Sequential, lambda net: SelectOutput(net, lambda output: output), torch.nn.DataParallel,
    lambda net: torch.nn.Sequential(torch.nn.Identity(), torch.nn.Sequential(net)),
])
def test_whole_network(wrap):
    '''A network is no block, whatever it is wrapped in: the bias of its classifier is left out of the denominator.'''
    maps, x = [], torch.randn(2, 3, 6, 6).double()
    for model in (Adding(), wrap(Adding())):
        with Gradient(model=model.double().eval(), composite=BlockLRP()) as attributor:
            maps.append(attributor(x, initial_relevance([0, 1], contrast='softmax'))[1])
    assert torch.equal(*maps)


def test_batch_and_integrity():
    '''A batch equals its samples, and the network is left as it was, after exceptions too.'''
    model = OwnNetwork().eval()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    input = torch.rand(3, 3, 8, 8)

    def attribute(batch):
        with Gradient(model=model, composite=BlockLRP()) as attributor:
            return attributor(batch.clone(), initial_relevance(1))[1]

    batch = attribute(input)
    for num in range(3):
        assert relative_error(batch[num:num + 1], attribute(input[num:num + 1])) < 1e-5
    with pytest.raises(RuntimeError):
        attribute(input[:, :2])
    for name, module in model.named_modules():
        assert dict(module.__dict__).keys() == before[name].keys()
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(param.requires_grad for param in model.parameters())
    assert relative_error(attribute(input), batch) == 0


def test_errors_and_registration():
    '''Bad arguments, and the name of the composite.'''
    assert COMPOSITES['block_lrp'] is BlockLRP
    with pytest.raises(ValueError, match='minus'):
        BlockEpsilon(mode='minus')
    with pytest.raises(ValueError, match='-1'):
        BlockEpsilon(epsilon=-1)
    with pytest.raises(TypeError, match='blocks=3'):
        BlockLRP(blocks=3)
    with pytest.raises(TypeError, match='layer1.0'):
        BlockLRP(blocks=('layer1.0',))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    with pytest.raises(ValueError, match=r"no module 'layer1.9' in the Sequential, .* '0', '1'"):
        with BlockLRP(blocks=['1', 'layer1.9']).context(model):
            raise AssertionError('there is no such block')
    assert not model._forward_pre_hooks
