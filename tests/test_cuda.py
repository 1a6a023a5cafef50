'''Tests on a GPU where there is one: what is computed there is what is computed on CPU, and stays there.

They also run on CPU, so that they are known to work.
'''
import importlib.util

import pytest
import torch
from helpers.networks import CifarResNet, narrow_resnet18
from PIL import Image
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus

from captum_adapters.attr import C3LRP, RISE, LayerRelevance, ResNetLRP, ScoreCAM
from captum_adapters.evaluation import Evaluation, evaluate, read_run
from captum_adapters.metrics import (
    cross_model_accuracy,
    insertion_deletion,
    mask_distance,
    mask_pointing,
    pixel_accuracy,
)
from zennit_resnet import (
    BlockLRP,
    RelativeLRP,
    initial_relevance,
    with_splitting,
)
from zennit_resnet import (
    ResNetLRP as ResNetComposite,
)
from zennit_resnet.classic import ClassicLRP
from zennit_resnet.conservation import conservation_ledger
from zennit_resnet.postprocess import c1c, c3, heat_quantization
from zennit_resnet.tracing import trace

pytestmark = pytest.mark.once

DEVICES = ['cpu', pytest.param('cuda', marks=[
    pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'),
])]
COMPOSITES = {
    'ratio': ResNetComposite,
    'symmetric': lambda: ResNetComposite(splitting='symmetric'),
    'literal': lambda: ResNetComposite(projection='literal', dead_units='drop', maxpool='avg2x2', first_layer='ones'),
    'zbox': lambda: ResNetComposite(first_layer='zbox', low=-6., high=6., identity_skip=False),
    'merge': lambda: ResNetComposite(batch_norm='merge'),
    'block': BlockLRP,
    'relative': RelativeLRP,
    'per_position': lambda: RelativeLRP(cardinality='per_position', normalization='l1'),
    'splitting': lambda: with_splitting(EpsilonPlus()),
    'classic': lambda: ClassicLRP('zplus'),
}


@pytest.fixture(name='data')
def fixture_data():
    '''A network, images and targets, in double precision, on CPU.'''
    model = narrow_resnet18(num_classes=5).double().eval()
    return model, torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.tensor([1, 3])


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', COMPOSITES)
def test_composites(data, name, device):
    '''Relevance is the same on both devices.'''
    model, input, target = data
    results = []
    for place in ('cpu', device):
        model.to(place)
        with Gradient(model=model, composite=COMPOSITES[name]()) as attributor:
            results.append(attributor(input.to(place), initial_relevance(target))[1])
        assert results[-1].device.type == place
    assert float(results[0].abs().sum()) > 0
    torch.testing.assert_close(results[1].cpu(), results[0], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', ['ratio', 'symmetric', 'merge', 'relative', 'block'])
def test_no_synchronization(name, device):
    '''Neither an eager attribution nor a traced one waits for the device, which reading a value would need.'''
    model, input = CifarResNet(1).double().eval().to(device), torch.randn(2, 3, 32, 32, dtype=torch.float64).to(device)
    start = torch.eye(10)[:2].to(input)
    traced, other = trace(model, COMPOSITES[name](), torch.ones_like(input)), torch.randn_like(input)

    def explain():
        with Gradient(model=model, composite=COMPOSITES[name]()) as attributor:
            return attributor(other, start)[1]

    # what happens once, such as copies of constants
    explain(), traced(other, start)
    mode = torch.cuda.get_sync_debug_mode() if device == 'cuda' else None
    try:
        if device == 'cuda':
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode('error')
        results = explain(), traced(other, start)[1]
    finally:
        if device == 'cuda':
            torch.cuda.set_sync_debug_mode(mode)
    torch.testing.assert_close(results[1], results[0], rtol=1e-7, atol=1e-9 * float(results[0].abs().max()))


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('name', ['ratio', 'block', 'relative'])
def test_autocast(data, name, device):
    '''Relevance is kept in single precision under autocast, and is finite.'''
    model, input, target = data
    model, input = model.float().to(device), input.float().to(device)
    # contributions do not fit into float16
    dtype = torch.float16 if device == 'cuda' and name != 'relative' else torch.bfloat16
    with Gradient(model=model, composite=COMPOSITES[name]()) as attributor, torch.autocast(device, dtype):
        output, relevance = attributor(input, initial_relevance(target))
    assert output.dtype == dtype
    assert relevance.dtype == torch.float32 and relevance.device.type == device
    assert bool(relevance.isfinite().all()) and float(relevance.abs().sum()) > 0


@pytest.mark.parametrize('device', DEVICES)
def test_attributions(data, device):
    '''Captum's classes, with targets on either device, and the ledger.'''
    model, input, target = data
    methods = [
        (ResNetLRP, {}), (C3LRP, {}), (RISE, {'n_masks': 10, 'seed': 1}),
        (lambda model: LayerRelevance(model, model.layer3), {}),
    ]
    if importlib.util.find_spec('torchcam') is not None:
        methods.append((lambda model: ScoreCAM(model, model.layer1), {}))
    for method, options in methods:
        expected = method(model.to('cpu')).attribute(input, target=target, **options)
        for place in ('cpu', device):
            result = method(model.to(device)).attribute(input.to(device), target=target.to(place), **options)
            assert result.device.type == device
            torch.testing.assert_close(result.cpu(), expected, rtol=1e-6, atol=1e-10)
    ledger = conservation_ledger(model.to(device), input.to(device), ResNetComposite(), initial_relevance(target))
    assert float(ledger.gap.abs().max()) < 1e-10


@pytest.mark.parametrize('device', DEVICES)
def test_metrics(data, device):
    '''Metrics and post-processing give the same on both devices.'''
    model, input, target = data
    heat = torch.rand(2, 64, 64, dtype=torch.float64)
    masks = heat > .7

    def compute(place):
        network, images, maps = model.to(place), input.to(place), heat.to(place)
        yield from insertion_deletion(network, images, maps, target=target, n_steps=5)
        yield from insertion_deletion(network, images, heat_quantization(maps), target=target, n_steps=5)
        yield from insertion_deletion(network, images, maps, target=target, protocol='rise', step=2048, ties='random')
        yield from pixel_accuracy(network, images, maps, (5, 50), target)
        yield from cross_model_accuracy(network, images, maps, (5, 50), reference='prediction')
        yield from mask_pointing(maps, masks.to(place), (5, 50))
        yield from mask_distance(maps, masks.to(place), (5, 50))
        yield from (function(maps) for function in (heat_quantization, c1c, c3))

    for result, expected in zip(compute(device), list(compute('cpu'))):
        assert result.device.type == device
        torch.testing.assert_close(result.cpu(), expected, rtol=1e-7, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize('device', DEVICES)
def test_evaluation(data, device, tmp_path):
    '''The evaluator, with all controls and suffixes.'''
    model, input, _ = data
    torch.save(model.float().state_dict(), tmp_path / 'net.pt')
    (tmp_path / 'images').mkdir()
    for index, image in enumerate(input):
        pixels = image.clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / 'images' / f'{index}.png')
    methods = ('resnet_lrp_ratio', 'block_lrp+c3', 'grad_cam', 'epsilon_plus+ratio', 'rise:n_masks=10', 'captum_lrp')
    evaluate(Evaluation(
        str(tmp_path / 'images'), str(tmp_path / 'run'), methods=methods, model='narrow_resnet18',
        weights=str(tmp_path / 'net.pt'), size=64, step=1024, device=device,
    ), quiet=True)
    records = read_run(tmp_path / 'run').records
    assert len(records) == 2 * (len(methods) + 4)
    assert records['problem'].isna().all()
