'''Explanation functions for Quantus: their contract without it, and its metrics with it.'''
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import (
    DeepLiftShap,
    FeatureAblation,
    InputXGradient,
    IntegratedGradients,
    LayerActivation,
    LayerGradCam,
    LayerGradientXActivation,
    NoiseTunnel,
    Saliency,
)
from helpers.networks import UserNetwork, randomize

from captum_adapters.attr import C3LRP, LayerRelevance, RelativeLRP, ResNetLRP
from captum_adapters.attr.rise import RISE
from captum_adapters.metrics import NegativeMapWarning
from captum_adapters.quantus import explain, explainer

TARGETS = np.array([1, 4, 0])
# random networks have negative logits
pytestmark = pytest.mark.filterwarnings('ignore:The maps of the examples')


def network():
    '''A residual network.'''
    return randomize(UserNetwork()).eval()


def arrays(batch=3, height=9, width=11):
    '''Random images as Quantus gives them.'''
    return np.random.default_rng(0).normal(size=(batch, 3, height, width)).astype(np.float32)


def tensors(**kwargs):
    '''The same as tensors.'''
    return torch.from_numpy(arrays(**kwargs))


@pytest.mark.parametrize('method', [ResNetLRP, RelativeLRP, C3LRP, InputXGradient, IntegratedGradients, Saliency])
def test_methods(method):
    '''The result is the sum over channels of the attributions, whether a method is given by name, class or function.'''
    model = network()
    expected = method(model).attribute(tensors().requires_grad_(), target=torch.from_numpy(TARGETS))
    expected = expected.detach().sum(1, keepdim=True).numpy()
    for given in (method.__name__, method, lambda model: method(model), method(model)):
        result = explain(model, arrays(), TARGETS, given)
        assert isinstance(result, np.ndarray) and result.dtype == np.float32 and result.shape == (3, 1, 9, 11)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
        np.testing.assert_array_equal(explainer(given)(model=model, inputs=arrays(), targets=TARGETS), result)


@pytest.mark.parametrize('change', [lambda each: each[..., ::-1], lambda each: each.astype('>f8')])
def test_any_arrays(change):
    '''Those that are flipped, or of another byte order, are what they are.'''
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    inputs = change(np.random.default_rng(0).random((2, 1, 3, 4)))
    targets = np.array([1, 2], dtype='>i4')[::-1]
    baselines = change(np.random.default_rng(1).random((2, 1, 3, 4)))
    options = {'method': 'IntegratedGradients', 'attribute_kwargs': {'baselines': baselines}}
    result = explain(model, inputs, targets, **options)
    same = inputs.astype(np.float64).copy()
    options['attribute_kwargs'] = {'baselines': baselines.astype(np.float64).copy()}
    np.testing.assert_array_equal(result, explain(model, same, np.array([2, 1]), **options))


def test_default():
    '''Without a method, it is ResNetLRP, to which further arguments are given.'''
    model = network()
    for kwargs in ({}, {'splitting': 'symmetric'}):
        expected = ResNetLRP(model, **kwargs).attribute(tensors(), target=TARGETS.tolist()).sum(1, keepdim=True)
        np.testing.assert_allclose(explain(model, arrays(), TARGETS, **kwargs), expected.detach().numpy(), rtol=1e-5)
    assert not np.allclose(explain(model, arrays(), TARGETS), explain(model, arrays(), TARGETS, splitting='symmetric'))


def test_keywords():
    '''Quantus calls with keywords, a device, and in evaluate with the name of the method, which do not disturb.'''
    model = network()
    function = explainer('InputXGradient', reduce=None)
    call = {'model': model, 'inputs': arrays(), 'targets': TARGETS}
    reference = function(**call)
    assert reference.shape == (3, 3, 9, 11)
    for kwargs in ({'device': 'cpu'}, {'device': None}, {'device': torch.device('cpu')}, {'method': 'of any name'}):
        np.testing.assert_array_equal(function(**call, **kwargs), reference)
    # explain_func_kwargs replace settings
    np.testing.assert_allclose(function(**call, reduce='sum'), reference.sum(1, keepdims=True), rtol=1e-5)
    # the function itself takes the method from evaluate
    np.testing.assert_array_equal(explain(**call, method='InputXGradient', reduce=None), reference)


def test_further_arguments():
    '''Arguments of attribute are given to it, arrays as tensors of the right type.'''
    model = network()
    baselines = np.random.default_rng(1).random((1, 3, 9, 11))
    result = explain(
        model, arrays(), TARGETS, 'IntegratedGradients', reduce=None,
        attribute_kwargs={'n_steps': 5, 'baselines': baselines}
    )
    expected = IntegratedGradients(model).attribute(
        tensors(), torch.from_numpy(baselines).float(), TARGETS.tolist(), n_steps=5
    )
    np.testing.assert_allclose(result, expected.numpy(), rtol=1e-4, atol=1e-7)
    mask = np.arange(9)[:, None] // 3 * np.ones((1, 11), dtype=int)
    result = explain(
        model, arrays(), TARGETS, FeatureAblation, reduce=None, attribute_kwargs={'feature_mask': mask[None, None]}
    )
    expected = FeatureAblation(model).attribute(
        tensors(), target=TARGETS.tolist(), feature_mask=torch.from_numpy(mask)[None, None]
    )
    np.testing.assert_allclose(result, expected.numpy(), rtol=1e-5)
    types = []

    class Recorder(InputXGradient):
        '''A method with further arguments.'''
        def attribute(self, inputs, target=None, **kwargs):
            '''Attributions.'''
            types.append({key: value.dtype for key, value in kwargs.items()})
            return super().attribute(inputs, target)

    explain(model, arrays(), TARGETS, Recorder, attribute_kwargs={'index': mask, 'flag': mask > 1, 'value': baselines})
    assert types == [{'index': torch.int64, 'flag': torch.bool, 'value': torch.float32}]
    settings = {'n_masks': 20, 'grid_size': 3}
    result = explainer('RISE', attribute_kwargs=settings, reduce=None)(model, arrays(), TARGETS)
    np.testing.assert_allclose(
        result, RISE(model).attribute(tensors(), TARGETS.tolist(), **settings).numpy(), rtol=1e-5
    )
    # nothing is added to the caller's dictionary
    assert settings == {'n_masks': 20, 'grid_size': 3}


@pytest.mark.parametrize('method, kwargs', [
    ('ResNetLRP', {}), ('LayerGradCam', {'layer': 'conv'}), ('RISE', {'attribute_kwargs': {'n_masks': 9}}),
])
def test_batches(method, kwargs):
    '''The size of batches has no influence.'''
    model, sizes = network(), []
    kwargs = {**kwargs, 'layer': next(name for name, module in model.named_modules()
                                      if isinstance(module, torch.nn.Conv2d))} if 'layer' in kwargs else kwargs
    reference = explain(model, arrays(), TARGETS, method, **kwargs)
    with model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0]))):
        result = explain(model, arrays(), TARGETS, method, batch_size=2, **kwargs)
    assert max(sizes) < 3 or method == 'RISE'
    np.testing.assert_allclose(result, reference, rtol=1e-4, atol=1e-5 * np.abs(reference).max())


def test_layers():
    '''Layers are given by name; their attributions are summed over channels and resized to the inputs.'''
    model = network()
    name = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)][-1]
    layer = model.get_submodule(name)
    expected = LayerGradCam(model, layer).attribute(tensors(), target=TARGETS.tolist()).detach()
    assert expected.shape[2:] != (9, 11)
    expected = F.interpolate(expected, (9, 11), mode='bilinear').numpy()
    for given in (name, layer):
        result = explain(model, arrays(), TARGETS, 'LayerGradCam', layer=given)
        assert result.shape == (3, 1, 9, 11)
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6)
    summed = LayerGradientXActivation(model, layer).attribute(tensors(), target=TARGETS.tolist()).detach().sum(1, True)
    np.testing.assert_allclose(
        explain(model, arrays(), TARGETS, LayerGradientXActivation, layer=name),
        F.interpolate(summed, (9, 11), mode='bilinear').numpy(), rtol=1e-4, atol=1e-5
    )
    relevance = LayerRelevance(model, layer).attribute(tensors(), target=TARGETS.tolist()).detach().sum(1, True)
    np.testing.assert_allclose(
        explain(model, arrays(), TARGETS, 'LayerRelevance', layer=name),
        F.interpolate(relevance, (9, 11), mode='bilinear').numpy(), rtol=1e-4, atol=1e-5
    )
    # a class activation map has no channels to keep
    result = explain(model, arrays(), TARGETS, 'LayerGradCam', layer=name, reduce=None)
    assert result.shape == (3, 1, 9, 11)
    # methods of this package know operations by name
    relevance = LayerRelevance(model, 'addition').attribute(tensors(), target=TARGETS.tolist()).sum(1, True)
    np.testing.assert_allclose(
        explain(model, arrays(), TARGETS, LayerRelevance, layer='addition'),
        F.interpolate(relevance, (9, 11), mode='bilinear').numpy(), rtol=1e-4, atol=1e-5
    )
    # a method without targets
    activation = LayerActivation(model, layer).attribute(tensors()).detach().sum(1, True)
    np.testing.assert_allclose(
        explain(model, arrays(), TARGETS, LayerActivation, layer=name),
        F.interpolate(activation, (9, 11), mode='bilinear').numpy(), rtol=1e-4, atol=1e-5
    )


def test_reduce():
    '''Channels are summed, kept, or the sum's magnitude is taken.'''
    model = network()
    channels = explain(model, arrays(), TARGETS, 'InputXGradient', reduce=None)
    total = explain(model, arrays(), TARGETS, 'InputXGradient')
    assert channels.shape == (3, 3, 9, 11) and (total < 0).any()
    np.testing.assert_allclose(total, channels.sum(1, keepdims=True), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(explain(model, arrays(), TARGETS, 'InputXGradient', reduce='abs_sum'), np.abs(total))


def test_negative_maps():
    '''Maps of negative relevance are warned of.'''
    model = network()
    with torch.no_grad():
        logits = model(tensors())
    targets = logits.argmin(1).numpy()
    assert bool((logits.amin(1) < 0).all())
    with pytest.warns(NegativeMapWarning, match=r'\[0, 1, 2\]') as caught:
        assert (explain(model, arrays(), targets) <= 0).all()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert (explain(model, arrays(), targets, initial_relevance='one') >= 0).all()


def test_score_cam():
    '''Score-CAM is found by name, too.'''
    pytest.importorskip('torchcam', reason='torch-cam is not installed (extra "cam")')
    model = network()
    name = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d))
    result = explain(model, arrays(), TARGETS, 'ScoreCAM', layer=name)
    assert result.shape == (3, 1, 9, 11) and (result >= 0).all() and result.any()


def test_functions():
    '''Any function of the model may create the attribution, for instance in a noise tunnel.'''
    model = network()
    function = explainer(lambda model: NoiseTunnel(Saliency(model)), attribute_kwargs={'stdevs': 0., 'nt_samples': 2})
    expected = NoiseTunnel(Saliency(model)).attribute(
        tensors().requires_grad_(), target=TARGETS.tolist(), stdevs=0., nt_samples=2
    )
    np.testing.assert_allclose(function(model, arrays(), TARGETS), expected.sum(1, True).numpy(), rtol=1e-4)


@pytest.mark.parametrize('shape', [(7,), (3, 7), (3, 4, 5), (2, 3, 4, 5)])
def test_dimensions(shape):
    '''Inputs of any dimensions; features have no channels to be summed.'''
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(int(np.prod(shape)), 5))
    input = np.random.default_rng(0).random((3, *shape))
    result = explain(model, input, TARGETS, 'InputXGradient')
    expected = input * model[1].weight.detach().numpy()[TARGETS].reshape(input.shape)
    expected = expected if len(shape) == 1 else expected.sum(1, keepdims=True)
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('kind', [np.float16, np.float32, np.float64, np.uint8])
def test_types(dtype, kind):
    '''Inputs are converted to the type of the model, and results to one that NumPy has.'''
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5)).to(dtype)
    input = np.random.default_rng(0).integers(1, 9, (3, 3, 2, 2)).astype(kind)
    input.flags.writeable = False
    result = explain(model, input, TARGETS, 'InputXGradient')
    assert result.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    weight = model[1].weight.detach().double().numpy()[TARGETS].reshape(3, 3, 2, 2)
    tolerance = 0.02 if dtype == torch.bfloat16 else 1e-5
    np.testing.assert_allclose(result, (input.astype(float) * weight).sum(1, keepdims=True), tolerance, 10 * tolerance)


class Shapeless(torch.nn.Module):
    '''A network without weights.'''
    def forward(self, x):
        '''Squares.'''
        return (x ** 2).flatten(1)


def test_targets():
    '''Targets may be one for each input, one for all, indices of several dimensions, or none.'''
    model = network()
    reference = explain(model, arrays(), TARGETS, 'InputXGradient')
    for given in (TARGETS.tolist(), TARGETS[:, None], TARGETS.astype(np.uint8), torch.from_numpy(TARGETS)):
        np.testing.assert_array_equal(explain(model, arrays(), given, 'InputXGradient'), reference)
    np.testing.assert_array_equal(
        explain(model, arrays(), 4, 'InputXGradient'), explain(model, arrays(), [4, 4, 4], 'InputXGradient')
    )
    input = np.arange(12.).reshape(3, 1, 2, 2)
    several = torch.nn.Sequential(Shapeless(), torch.nn.Unflatten(1, (2, 2)))
    result = explain(several, input, np.array([[0, 1], [1, 1], [0, 0]]), 'InputXGradient')
    expected = np.zeros_like(input)
    for row, (first, second) in enumerate([(0, 1), (1, 1), (0, 0)]):
        expected[row, 0, first, second] = 2 * input[row, 0, first, second] ** 2
    np.testing.assert_allclose(result, expected)
    single = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 1))
    assert explain(single, input, None, 'InputXGradient').shape == (3, 1, 2, 2)


def test_side_effects():
    '''Neither the arrays nor the model change, and nothing is warned of.'''
    model, input = network(), arrays()
    before = input.copy()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        result = explain(model, input, TARGETS, 'InputXGradient', batch_size=2)
    result[:] = 0
    np.testing.assert_array_equal(input, before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize('kwargs, error, message', [
    ({'method': 'ResnetLRP'}, ValueError, "method='ResnetLRP' is unknown: did you mean 'ResNetLRP'"),
    ({'method': 'explain'}, ValueError, "method='explain' is unknown"),
    ({'method': lambda model: model}, TypeError, 'returns Sequential'),
    ({'method': InputXGradient(torch.nn.Identity())}, ValueError, 'another model'),
    ({'method': 'instance', 'multiply_by_inputs': True}, TypeError, 'multiply_by_inputs'),
    ({'method': 'LayerGradCam', 'layer': 'conf'}, ValueError, "layer='conf' is not a module of Sequential: .*conv"),
    ({'method': 'InputXGradient', 'unknown': 1}, TypeError, 'unknown'),
    ({'attribute_kwargs': {'unknown': 1}}, TypeError, 'unknown'),
    ({'method': 'IntegratedGradients', 'attribute_kwargs': {'return_convergence_delta': True}}, ValueError, 'delta'),
    ({'reduce': 'mean'}, ValueError, "reduce='mean'"),
    ({'batch_size': 0}, ValueError, 'batch_size=0'),
    ({'inputs': np.ones(4)}, ValueError, r'\(4,\)'),
    ({'inputs': np.ones((0, 3, 4, 4))}, ValueError, r'\(0, 3, 4, 4\)'),
    ({'targets': np.array([0, 1])}, ValueError, r'shape \(2,\) is neither one for all nor one for each of 3'),
    ({'targets': np.array([0., 1., 2.])}, TypeError, 'float64'),
    ({'device': 'meta'}, ValueError, "device='meta', but the model is on cpu"),
    ({'method': lambda model: LayerActivation(model, model.linear)}, ValueError, r'shape \(3, 5\) do not fit'),
    ({'method': 'LayerRelevance', 'layer': 'conv', 'reduce': None}, ValueError, r'shape \(3, 2, 2, 2\) do not fit'),
    ({'model': torch.nn.Sequential(torch.nn.Linear(4, 7), torch.nn.Linear(7, 5)), 'inputs': np.ones((3, 4)),
      'method': 'LayerRelevance', 'layer': '0'}, ValueError, r'shape \(3, 7\) do not fit inputs of shape \(3, 4\)'),
])
def test_errors(kwargs, error, message):
    '''Errors name what is wrong.'''
    model = torch.nn.Sequential()
    model.conv, model.flatten = torch.nn.Conv2d(3, 2, 3), torch.nn.Flatten()
    model.linear = torch.nn.Linear(8, 5)
    if kwargs.get('method') == 'instance':
        kwargs = {**kwargs, 'method': InputXGradient(model)}
    with pytest.raises(error, match=message):
        explain(**{
            'model': model, 'inputs': np.ones((3, 3, 4, 4)), 'targets': TARGETS, 'method': 'InputXGradient', **kwargs
        })


@pytest.fixture(scope='module')
def quantus():
    '''The optional dependency.'''
    return pytest.importorskip('quantus', reason='Quantus is not installed (extra "quantus")')


def test_metric(quantus):
    '''A metric that explains by itself gets what explain gives.'''
    model = network()
    metric = {'nr_runs': 10, 'subset_size': 9, 'disable_warnings': True, 'return_aggregate': False}
    scores = []
    for kwargs in (
        {'explain_func': explainer(ResNetLRP, initial_relevance='one')},
        {'a_batch': explain(model, arrays(), TARGETS, initial_relevance='one')},
    ):
        np.random.seed(0)
        scores.append(quantus.FaithfulnessCorrelation(**metric)(
            model=model, x_batch=arrays(), y_batch=TARGETS, device='cpu', **{'a_batch': None, **kwargs}
        ))
    assert len(scores[0]) == 3 and np.isfinite(scores[0]).all()
    np.testing.assert_allclose(scores[0], scores[1], rtol=1e-4)


def test_randomization(quantus):
    '''Metrics that change the model or the target explain again, for that model.'''
    model = network()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    calls = []

    def method(model):
        calls.append(model)
        return ResNetLRP(model, initial_relevance='one')

    call = {
        'model': model, 'x_batch': arrays(), 'y_batch': TARGETS, 'a_batch': None, 'explain_func': explainer(method)
    }
    similarity = quantus.MPRT(disable_warnings=True, similarity_func=quantus.correlation_pearson)(**call)
    assert len({id(elem) for elem in calls}) > 1
    assert any(abs(np.mean(value)) < 0.99 for value in similarity.values())
    scores = quantus.RandomLogit(num_classes=5, disable_warnings=True)(**call)
    assert len(scores) == 3 and all(score < 1 for score in scores)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_evaluate(quantus):
    '''evaluate compares methods by name.'''
    model = network()
    results = quantus.evaluate(
        metrics={'sparseness': quantus.Sparseness(disable_warnings=True)},
        xai_methods={
            'InputXGradient': explain, 'Saliency': explain, 'mine': explainer('ResNetLRP', initial_relevance='one')
        },
        model=model, x_batch=arrays(), y_batch=TARGETS, explain_func_kwargs={'batch_size': 2}, agg_func=np.mean,
        verbose=False,
    )
    for name, method, kwargs in (
        ('InputXGradient', 'InputXGradient', {}), ('Saliency', 'Saliency', {}),
        ('mine', 'ResNetLRP', {'initial_relevance': 'one'}),
    ):
        maps = np.abs(explain(model, arrays(), TARGETS, method, **kwargs)).reshape(3, -1)
        order = np.sort(maps, 1)
        count = maps.shape[1]
        index = 2 * np.arange(1, count + 1) - count - 1
        gini = (index * order).sum(1) / (count * order.sum(1))
        np.testing.assert_allclose(results[name]['sparseness'], gini.mean(), rtol=1e-4)


def test_deep_lift_shap():
    '''A distribution of baselines is not divided into batches.'''
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.ReLU(), torch.nn.Linear(5, 5))
    baselines = np.random.default_rng(1).random((4, 3, 2, 2)).astype(np.float32)
    input = arrays(height=2, width=2)
    result = explain(
        model, input, TARGETS, 'DeepLiftShap', batch_size=1, reduce=None, attribute_kwargs={'baselines': baselines}
    )
    expected = DeepLiftShap(model).attribute(
        torch.from_numpy(input), torch.from_numpy(baselines), target=TARGETS.tolist()
    )
    np.testing.assert_allclose(result, expected.detach().numpy(), rtol=1e-4, atol=1e-6)
