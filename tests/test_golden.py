'''Rules and composites against golden cases (see ``tests/golden``).'''
import pytest
import torch
from golden_cases import golden_cases, relative_error, tensor
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from zennit.attribution import Gradient

from zennit_resnet.composites import ResNetLRP
from zennit_resnet.layer import Addition
from zennit_resnet.rules import RatioSplit, ResidualOnly, SymmetricSplit, ZPlus

PRECISIONS = [pytest.param(torch.float64, 1e-9, id='float64'), pytest.param(torch.float32, 1e-3, id='float32')]
FIRST_LAYER = {'literal': 'literal', 'ones': 'ones', 'alpha1beta0': 'zplus'}


def stabilizer(arguments):
    '''The stabilizer of a case, where the denominators may be signed.'''
    eps = arguments['eps']
    return eps if arguments.get('eps_mode') == 'sign' or eps == 0 else lambda value: value + eps


def build_layer(arrays, layer):
    '''The layer of a golden case.'''
    if layer['type'] == 'dense':
        module = torch.nn.Linear(layer['in_features'], layer['out_features'], bias=layer['has_bias'])
    elif layer['type'] == 'conv2d':
        module = torch.nn.Conv2d(
            layer['in_shape'][0], layer['out_channels'], layer['kernel_size'], layer['stride'], layer['padding'],
            layer['dilation'], layer['groups'], layer['has_bias'],
        )
    elif layer['type'] == 'avgpool2d':
        module = torch.nn.AvgPool2d(
            layer['kernel_size'], layer['stride'], layer['padding'], count_include_pad=layer['count_include_pad']
        )
    elif layer['type'] == 'adaptive_avgpool2d':
        module = torch.nn.AdaptiveAvgPool2d(layer['output_size'])
    elif layer['type'] == 'maxpool2d':
        module = torch.nn.MaxPool2d(layer['kernel_size'], layer['stride'], layer['padding'], layer['dilation'])
    module = module.double()
    module.load_state_dict({key: tensor(arrays, key)[0] for key in ('weight', 'bias') if key in arrays.files})
    return module


@pytest.mark.parametrize('dtype, tolerance', PRECISIONS)
@pytest.mark.parametrize('arrays, settings, case', golden_cases('layer_*', 'zplus'))
def test_zplus(arrays, settings, case, dtype, tolerance):
    '''z+ of single layers, Eq. (2).'''
    arguments = case['arguments']
    if dtype == torch.float32 and arguments['negatives'] == 'literal' and 'mixed' in case['inputs']['input']:
        pytest.skip('denominators of the literal rule vanish for signed inputs')
    rule = ZPlus(
        stabilizer=stabilizer(arguments), first_layer=FIRST_LAYER[arguments['negatives']], projection='literal',
        dead_units='drop',
    )
    module = build_layer(arrays, settings['layer']).to(dtype)
    input = tensor(arrays, case['inputs']['input'], dtype).requires_grad_()
    relevance = tensor(arrays, case['inputs']['relevance'], dtype)
    handles = rule.register(module)
    output = module(input)
    assert relative_error(output, tensor(arrays, case['inputs']['output'])) < tolerance
    lower, = torch.autograd.grad(output, input, relevance)
    handles.remove()
    assert relative_error(lower, tensor(arrays, case['expected']['input_relevance'])) < tolerance
    if 'lost' not in case['expected']:
        return
    lost = float(arrays[case['expected']['lost']])
    assert abs(float(lower.sum()) + lost - float(relevance.sum())) < tolerance * float(relevance.abs().sum())


@pytest.mark.parametrize('arrays, settings, case', golden_cases('split_joins', 'split_relevance'))
def test_split(arrays, settings, case):
    '''Splitting at an addition, Eqs. (4) to (7).'''
    arguments = case['arguments']
    if arguments['zero_zero'] != 'half':
        pytest.skip('where both addends are zero, each always receives half here')
    rule = {'ratio': RatioSplit, 'symmetric': SymmetricSplit}[arguments['mode']]()
    if not arguments['propagate_identity']:
        rule = ResidualOnly(rule)
    skip, main, relevance = (tensor(arrays, case['inputs'][key]) for key in ('h_skip', 'h_main', 'relevance'))
    skip.requires_grad_()
    main.requires_grad_()
    if arguments['skip_is_identity']:
        # a residual branch with the values of the case, which depends on the skip connection
        branch = main + 0 * skip
    else:
        branch = main * 1
    module = Addition()
    handles = rule.register(module)
    lower = torch.autograd.grad(module(skip, branch), (skip, branch), relevance)
    handles.remove()
    # the gradient of the branch with respect to the skip connection is zero
    assert torch.equal(sum(lower), relevance) or relative_error(sum(lower), relevance) < 1e-15
    for actual, key in zip(lower, ('relevance_skip', 'relevance_main')):
        expected = tensor(arrays, case['expected'][key])
        assert float((actual - expected).abs().max()) <= 1e-9 * float(relevance.abs().max())


def build_network(arrays, arch):
    '''The network of a golden case, from torchvision's blocks.'''
    class Network(ResNet):
        '''A ResNet of any blocks.'''
        def __init__(self):
            torch.nn.Module.__init__(self)
            stem = arch['stem']
            channels = stem['channels']
            self.conv1 = torch.nn.Conv2d(
                3, channels, stem['kernel'], stem['stride'], stem['padding'], bias=False
            )
            self.bn1 = torch.nn.BatchNorm2d(channels)
            self.relu = torch.nn.ReLU(inplace=True)
            pool = stem['maxpool']
            self.maxpool = torch.nn.Identity() if pool is None else torch.nn.MaxPool2d(
                pool['kernel'], pool['stride'], pool['padding']
            )
            layers = {f'layer{num}': [] for num in range(1, 5)}
            for block in arch['blocks']:
                kind = {'basic': BasicBlock, 'bottleneck': Bottleneck}[block['type']]
                width = block['planes'] * kind.expansion
                downsample = torch.nn.Sequential(
                    torch.nn.Conv2d(channels, width, 1, block['stride'], bias=False), torch.nn.BatchNorm2d(width)
                ) if block['downsample'] else None
                # torchvision scales the inner width by groups * base_width / 64
                groups = block.get('groups', 1)
                layers[block['name'].split('.')[0]].append(kind(
                    channels, block['planes'], block['stride'], downsample, groups,
                    block.get('base_width', 64),
                ))
                channels = width
            for name, blocks in layers.items():
                setattr(self, name, torch.nn.Sequential(*blocks))
            self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
            self.fc = torch.nn.Linear(channels, arch['classes'])

    network = Network().double().eval()
    state = {key[len('param.'):]: tensor(arrays, key)[0] for key in arrays.files if key.startswith('param.')}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and all(key.endswith('num_batches_tracked') for key in missing)
    return network


class Capture:
    '''Relevance at the inputs and outputs of modules.'''
    def __init__(self, model, names):
        self.relevance, self.inputs = {}, {}
        modules = dict(model.named_modules())
        self.handles = [modules[name].register_forward_pre_hook(self.keep(f'{name}.input')) for name in names]

    def keep(self, key):
        '''A forward hook which keeps the gradient of the input.'''
        def hook(module, args):
            self.inputs[key] = args[0].detach().clone()
            args[0].register_hook(lambda grad: self.relevance.__setitem__(key, grad.detach().clone()))
        return hook


@pytest.mark.parametrize('dtype, tolerance', [
    pytest.param(torch.float64, 1e-8, id='float64'), pytest.param(torch.float32, 1e-3, id='float32'),
])
@pytest.mark.parametrize('arrays, settings, case', golden_cases('network_*', 'conserving'))
def test_network(arrays, settings, case, dtype, tolerance):
    '''Whole networks with ratio and symmetric splitting, with and without identity skip connections.'''
    arguments = case['arguments']
    if dtype == torch.float32 and arguments['first_layer'] == 'literal':
        pytest.skip('denominators of the literal rule vanish for signed inputs')
    model = build_network(arrays, settings['arch']).to(dtype)
    composite = ResNetLRP(
        splitting=arguments['splitting'],
        identity_skip=arguments['propagate_identity'],
        batch_norm={'pass': 'pass', 'fold': 'merge'}[arguments['batch_norm']],
        first_layer=FIRST_LAYER[arguments['first_layer']],
        projection='literal',
        dead_units='drop',
        maxpool=arguments['maxpool'],
        stabilizer=arguments['eps'],
    )
    blocks = [block['name'] for block in settings['arch']['blocks']]
    capture = Capture(model, ['avgpool', 'fc', *blocks])
    input = tensor(arrays, 'input', dtype)
    start = tensor(arrays, case['inputs']['start'], dtype)
    with Gradient(model=model, composite=composite) as attributor:
        output, relevance = attributor(input, start)
    assert relative_error(output.detach(), tensor(arrays, 'logits')) < tolerance
    expected = {key: tensor(arrays, value) for key, value in case['expected'].items()}
    assert relative_error(relevance, expected['input']) < tolerance
    for name in blocks:
        assert relative_error(capture.relevance[f'{name}.input'], expected[f'{name}.input']) < tolerance
    assert relative_error(capture.relevance['avgpool.input'], expected['features']) < tolerance
    assert relative_error(capture.relevance['fc.input'].flatten(1), expected['pooled'].flatten(1)) < tolerance
    lost = float(expected['lost'])
    assert abs(float(relevance.sum()) + lost - float(start.sum())) < tolerance * float(start.abs().sum())
