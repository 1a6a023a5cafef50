'''Rules and composites against golden cases (see ``tests/golden``).'''
import pytest
import torch
from golden_cases import golden_cases, relative_error, tensor
from helpers.golden import FIRST_LAYER, Capture, build_layer, build_network
from zennit.attribution import Gradient

from zennit_resnet.composites import ResNetLRP
from zennit_resnet.layer import Addition
from zennit_resnet.rules import RatioSplit, ResidualOnly, SymmetricSplit, ZPlus

PRECISIONS = [pytest.param(torch.float64, 1e-9, id='float64'), pytest.param(torch.float32, 1e-3, id='float32')]
def stabilizer(arguments):
    '''The stabilizer of a case, where the denominators may be signed.'''
    eps = arguments['eps']
    return eps if arguments.get('eps_mode') == 'sign' or eps == 0 else lambda value: value + eps


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
