'''Relative LRP against golden cases (see ``tests/golden``).'''
import pytest
import torch
from golden_cases import golden_cases, relative_error, tensor
from helpers.golden import Capture, build_layer, build_network
from zennit.attribution import Gradient

from zennit_resnet.composites import RelativeLRP
from zennit_resnet.rules import Relative, RelativeMaxPool
from zennit_resnet.rules.branch_scaling import branch_factor

PRECISIONS = [pytest.param(torch.float64, 1e-9, id='float64'), pytest.param(torch.float32, 1e-3, id='float32')]


@pytest.mark.parametrize('dtype, tolerance', PRECISIONS)
@pytest.mark.parametrize('arrays, settings, case', golden_cases('layer_*', 'rlrp'))
def test_layer(arrays, settings, case, dtype, tolerance):
    '''Single layers, Eqs. (8) and (12) and Proposition 13, with the factors as they are.'''
    module = build_layer(arrays, settings['layer']).to(dtype)
    kind = RelativeMaxPool if isinstance(module, torch.nn.MaxPool2d) else Relative
    handles = kind(cardinality=case['arguments']['card_mode']).register(module)
    input = tensor(arrays, case['inputs']['input'], dtype).requires_grad_()
    output = module(input)
    assert relative_error(output, tensor(arrays, case['inputs']['output'])) < tolerance
    relevance = tensor(arrays, case['inputs']['relevance'], dtype)
    lower, = torch.autograd.grad(output, input, relevance)
    handles.remove()
    assert relative_error(lower, tensor(arrays, case['expected']['input_relevance'])) < tolerance


@pytest.mark.parametrize('arrays, settings, case', golden_cases('prop14_joins', 'prop14'))
def test_branch_factor(arrays, settings, case):
    '''Proposition 14.'''
    normalization = case['arguments']['norm']
    total = 0.
    for branch in ('main', 'skip'):
        begin, end = (tensor(arrays, case['inputs'][f'{branch}_{key}']) for key in ('begin', 'end'))
        sums = [(elem.sum((1, 2, 3)), elem.abs().sum((1, 2, 3))) for elem in (begin, end)]
        factor, replaced = branch_factor(*sums, normalization=normalization)
        expected = tensor(arrays, case['expected'][f'factor_{branch}'])
        if normalization == 'signed' and float(begin.sum()) == 0 and bool(begin.any()):
            # the golden case drops the branch, the sums of magnitudes are used here
            assert bool(replaced)
            assert float(factor) == pytest.approx(float(end.abs().sum() / begin.abs().sum()), rel=1e-12)
            return
        assert not bool(replaced)
        assert float(factor) == pytest.approx(float(expected), rel=1e-12, abs=0)
        total = total + factor * begin
    expected = tensor(arrays, case['expected']['relevance'])
    assert float((total - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize('dtype, tolerance', [
    pytest.param(torch.float64, 1e-8, id='float64'), pytest.param(torch.float32, 1e-3, id='float32'),
])
@pytest.mark.parametrize('arrays, settings, case', golden_cases('network_*', 'rlrp'))
def test_network(arrays, settings, case, dtype, tolerance):
    '''Whole networks, up to the factor of two of each block at its beginning.'''
    arguments = case['arguments']
    assert arguments['share'] == 'full' and arguments['norm'] == 'signed'
    model = build_network(arrays, settings['arch']).to(dtype)
    composite = RelativeLRP(
        cardinality=arguments['card_mode'], batch_norm={'pass': 'pass', 'fold': 'merge'}[arguments['batch_norm']]
    )
    blocks = [block['name'] for block in settings['arch']['blocks']]
    capture = Capture(model, ['avgpool', *blocks])
    with Gradient(model=model, composite=composite) as attributor:
        _, relevance = attributor(
            tensor(arrays, 'input', dtype), tensor(arrays, case['inputs']['start'], dtype)
        )
    expected = {key: tensor(arrays, value) for key, value in case['expected'].items()}
    scale = composite.log_scale.exp().item() * 2 ** len(blocks)
    assert relative_error(relevance * scale, expected['input']) < tolerance
    for name in blocks:
        actual, target = capture.relevance[f'{name}.input'], expected[f'{name}.input']
        factor = float(target.abs().max() / actual.abs().max())
        assert relative_error(actual * factor, target) < tolerance
        # one power of two for each block, and those by which contributions were rescaled
        assert factor == pytest.approx(2 ** round(torch.tensor(factor).log2().item()), rel=tolerance)
