'''Methods of the evaluator by name: all give maps, and leave the network as it was.'''
import numpy as np
import pytest
import torch
from helpers.evaluation import SIZE, make_batch
from zennit.attribution import Gradient

from captum_adapters.evaluation import PRESETS, Method, columns, layouts, methods, metrics, names
from captum_adapters.evaluation.methods import Context, find_entries
from captum_adapters.evaluation.metrics import MetricSettings, measure
from zennit_resnet._choices import split_names
from zennit_resnet.attribution import initial_relevance
from zennit_resnet.methods import Method as Grammar
from zennit_resnet.models import load_classifier

pytestmark = pytest.mark.once


@pytest.fixture(scope='module')
def context(assets):
    '''A small network.'''
    return Context(load_classifier('narrow_resnet18', str(assets / 'net.pt'), SIZE), forward_batch=16)


# composites but for gradients
RELEVANCE = {name for name, entry in find_entries().items() if entry.composite is not None} | {'input_x_gradient'}
RELEVANCE -= {'beta_smooth', 'deconvnet'}


@pytest.mark.parametrize('name', sorted({
    *(name for preset in PRESETS.values() for name in preset.rows), *find_entries(),
    'epsilon_plus_flat+ratio', 'epsilon_plus+symmetric+abs+c1c', 'relative_lrp+abs', 'lrp_gamma_0.25+ratio+quantize4',
    'rise:n_masks=8,grid_size=4', 'grad_cam:relu=False', 'beta_smooth',
} - {'abn'}))
def test_method(name, context):
    '''All methods of presets, and all there are, give maps, and leave the network as it was.'''
    if name.startswith('score_cam'):
        pytest.importorskip('torchcam')
    text = 'rise:n_masks=8' if name == 'rise' else name
    torch.manual_seed(1)
    # within the range of photographs, for methods that are given it
    images = torch.randn(2, 3, SIZE, SIZE).clamp(-1.8, 2.2)
    model = context.classifier.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        output = model(images)
    explainer = Method(text).create(context)
    attributed = explainer.attribute(images, output.argmax(1), output, ['a', 'b'])
    maps, total, initial = explainer.process(attributed.maps), attributed.total, attributed.initial
    assert maps.shape == (2, SIZE, SIZE)
    assert not maps.requires_grad
    if 'lrp_' not in name or name.startswith('resnet_lrp'):
        assert maps.isfinite().all()
    if name.startswith('resnet_lrp') and 'drop' not in name:
        torch.testing.assert_close(total, initial.sum(1), rtol=1e-4, atol=0)
    # sensitivities are no relevance that could be conserved
    assert (total is not None) == (initial is not None) == (explainer.method.name in RELEVANCE)
    with torch.no_grad():
        assert torch.equal(model(images), output)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


@pytest.mark.parametrize('text, contrast, value', [
    ('resnet_lrp_ratio:contrast=centred', 'centred', 'one'),
    ('resnet_lrp_ratio:contrast=1,classifier=epsilon', 1, 'logit'),
    ('resnet_lrp_symmetric:contrast=softmax,initial=one', 'softmax', 'one'),
    ('block_lrp:contrast=runner_up+c3', 'runner_up', 'logit'),
    ('resnet_lrp_ratio:contrast=centred,contrast_weight=0.5', 'centred', 'one'),
])
def test_contrasts(text, contrast, value, context):
    '''A contrast starts from what the rule needs, not from the probability as the others.'''
    images = torch.randn(2, 3, SIZE, SIZE)
    model = context.classifier.model
    output = model(images).detach()
    target = torch.tensor([0, 2])
    explainer = Method(text).create(context)
    attributed = explainer.attribute(images, target, output, ['a', 'b'])
    weight = .5 if 'contrast_weight' in text else 1.
    start = initial_relevance(target, value, contrast=contrast, contrast_weight=weight)
    _, relevance = Gradient(model, explainer.method.composite(context.classifier))(images, start)
    torch.testing.assert_close(attributed.maps, relevance.sum(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(attributed.initial.float(), start(output), rtol=1e-4, atol=1e-5)
    batch = make_batch(images, target, output=output)
    found, _ = measure(
        ['conservation'], model, batch, attributed.maps, MetricSettings(), attributed.total, attributed.initial
    )
    # relative to what there is of both signs, not to their sum, which may be zero
    scale = start(output).abs().sum(1).double()
    expected = (relevance.double().sum((1, 2, 3)) - start(output).double().sum(1)) / scale
    np.testing.assert_allclose(found['gap'], expected, atol=1e-5)


def test_kinds():
    '''Methods are ours, baselines or controls, by the names that reports know as well.'''
    for name in [*find_entries(), 'epsilon_plus+ratio', 'lrp_0:stabilizer=0.1+symmetric', 'sobel+c3']:
        try:
            kind = Method(name).kind
        except ValueError:
            # bounds of images are options that are given by a network
            continue
        assert names.kind_of(name) == kind, name
    assert {name: names.kind_of(name) for name in (
        'resnet_lrp_ratio:maxpool=average+c3', 'relative_lrp', 'block_lrp', 'epsilon_plus+ratio', 'epsilon_plus+zennit',
        'grad_cam', 'lrp_0', 'random', 'sobel+c3', 'guided_backprop+ratio',
    )} == {
        'resnet_lrp_ratio:maxpool=average+c3': 'ours', 'relative_lrp': 'ours', 'block_lrp': 'ours',
        'epsilon_plus+ratio': 'ours', 'epsilon_plus+zennit': 'baseline', 'grad_cam': 'baseline', 'lrp_0': 'baseline',
        'random': 'control', 'sobel+c3': 'control', 'guided_backprop+ratio': 'baseline',
    }


def test_names():
    '''What the command line knows without PyTorch is what there is.'''
    assert names.OTHERS == tuple(methods.OTHERS) and names.CONTROLS == tuple(methods.CONTROLS)
    assert set(names.OWN) == {name for name, entry in find_entries().items() if entry.kind == 'ours'}
    assert columns.METRICS == (*metrics.METRICS, 'conservation')
    assert names.LAYOUTS == tuple(layouts.READERS)


def test_controls(context):
    '''Random maps depend on the sample alone, Gaussians are centred, and edges are where brightness changes.'''
    images = torch.zeros(3, 3, SIZE, SIZE)
    images[:, :, :, SIZE // 2:] = 1
    output = torch.zeros(3, 3)
    target = output.argmax(1)

    def maps(name, names=('a', 'b', 'a')):
        return Method(name).create(context)(images, target, output, names)

    noise = maps('random')
    assert torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[0], noise[1])
    assert torch.equal(noise[1], maps('random', 'bca')[0])
    assert not torch.equal(noise, maps('random:seed=1'))
    bump = maps('gaussian')[0]
    torch.testing.assert_close(bump, bump.flip(0).flip(1))
    assert bump.argmax() in (SIZE * SIZE // 2 + SIZE // 2 - SIZE - 1 + offset for offset in (0, 1, SIZE, SIZE + 1))
    edges = maps('sobel')[0]
    assert edges[:, SIZE // 2 - 1:SIZE // 2 + 1].min() > 0.9
    assert edges[:, :SIZE // 2 - 1].abs().max() < 1e-6
    assert edges[:, SIZE // 2 + 1:].abs().max() < 1e-6
    assert torch.equal(maps('constant'), torch.ones(3, SIZE, SIZE))


def test_one_grammar():
    '''Names of methods mean the same on both command lines.'''
    names = 'resnet_lrp_ratio:first_layer=ones,maxpool=avg2x2+abs+quantize8,epsilon_plus+ratio,lrp_gamma_0.25'
    assert split_names(names) == [
        'resnet_lrp_ratio:first_layer=ones,maxpool=avg2x2+abs+quantize8', 'epsilon_plus+ratio', 'lrp_gamma_0.25'
    ]
    for name in split_names(names):
        first, second = Method(name), Grammar(name)
        assert {**vars(first), 'entry': None} == {**vars(second), 'entry': None} and first.kind == second.kind
    ratio = Method(split_names(names)[0])
    assert ratio.options == {'first_layer': 'ones', 'maxpool': 'avg2x2'} and ratio.levels == 8 and ratio.magnitude
    assert ratio.attribution == 'resnet_lrp_ratio:first_layer=ones,maxpool=avg2x2'
    assert set(Grammar.entries()) - {'input_x_gradient'} <= set(Method.entries())


@pytest.mark.parametrize('text, key, value', [
    ('resnet_lrp_ratio:identity_skip=false', 'identity_skip', False),
    ('resnet_lrp_ratio:identity_skip=TRUE,coverage=even+quantize8', 'identity_skip', True),
    ('lrp_0:with_bias=False', 'with_bias', False),
    ('grad_cam:relu=false+abs', 'relu', False),
])
def test_switches(text, key, value):
    '''Words for True and False are these in any case, and make one method.'''
    method = Method(text)
    assert method.options[key] is value and f'{key}={value}' in method.text
    assert Method(method.text).text == method.text


@pytest.mark.parametrize('text', ['grad_cam:relu=no', 'grad_cam:relu=0', 'resnet_lrp_ratio:identity_skip=off'])
def test_no_switch(text):
    '''Other values are refused, rather than taken for True.'''
    with pytest.raises(ValueError, match=text.partition('=')[2]):
        Method(text)


OPTIONS = {
    'relative_lrp': {'normalization': 'l1', 'cardinality': 'per_position'},
    'resnet_lrp_ratio': {'attention': 'half', 'parameters': 'sink', 'first_layer': 'ones', 'splitting': 'symmetric'},
    'gamma_lrp': {
        'attention': 'half', 'parameters': 'sink', 'first_layer': 'zplus', 'conv_gamma': '1', 'linear_gamma': '0',
    },
    'block_lrp': {'blocks': "['layer1.0']", 'mode': 'plus', 'epsilon': '0.1'},
    'rise': {'grid_size': '4', 'n_masks': '8', 'normalization': 'coverage', 'probability': '0.3', 'seed': '3'},
    'integrated_gradients': {'method': 'riemann_trapezoid', 'n_steps': '4'},
    '': {
        'stabilizer': '0.1', 'with_bias': 'false', 'addition': 'ratio', 'batch_norm': 'merge', 'epsilon': '0.1',
        'gamma': '0.5', 'zero_params': 'bias', 'beta_smooth': '5', 'classifier': 'epsilon', 'coverage': 'even',
        'dead_units': 'drop', 'identity_skip': 'false', 'maxpool': 'average', 'projection': 'literal', 'abs': 'false',
        'relu': 'false', 'seed': '3', 'sigma': '0.1',
    },
}


@pytest.mark.parametrize('name', sorted(set(find_entries()) - {'abn'}))
def test_listed_options(context, name):
    '''Each option that a method lists can be given, and its map is finite.'''
    image = torch.rand(1, 3, SIZE, SIZE) - 0.5
    output, target = context.classifier.model(image).detach(), torch.tensor([0])
    symmetric = name.replace('symmetric', 'ratio')
    for option in find_entries()[name].options:
        value = OPTIONS.get(symmetric, {}).get(option) or OPTIONS[''][option]
        text = f'{name}:{option}={value}' + ',n_masks=8' * (name == 'rise' and option != 'n_masks')
        assert Method(text).create(context)(image, target, output, ['x']).isfinite().all(), text


@pytest.mark.parametrize('name', [
    'epsilon_plus+zennit', 'epsilon_plus_flat+ratio', 'lrp_epsilon_1', 'resnet_lrp_ratio:classifier=epsilon',
    'gamma_lrp',
])
def test_negative_logits(name, context, monkeypatch):
    '''Rules that divide by the logit start from it, as from the probability maps of negative ones are turned over.'''
    bias = context.classifier.model.fc.bias
    monkeypatch.setattr(bias, 'data', bias - 100.)
    images, sign = torch.randn(2, 3, SIZE, SIZE).clamp(-1.8, 2.2), ':' if ':' not in name else ','
    with torch.no_grad():
        output = context.classifier.model(images)
    assert (output < 0).all()

    def explain(text):
        return Method(text).create(context)(images, output.argmax(1), output, ['a', 'b'])

    def start(value):
        head, plus, tail = name.partition('+')
        return f'{head}{sign}initial={value}{plus}{tail}'

    maps = explain(name)
    torch.testing.assert_close(maps, explain(start('logit')), rtol=0, atol=0)
    turned = explain(start('softmax'))
    assert ((maps * turned).flatten(1).sum(1) < 0).all()
    # shares of z+ do not depend on the logit
    assert (explain('resnet_lrp_ratio') >= 0).all()
