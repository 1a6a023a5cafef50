'''What explanations cost, by the number of multiplications: times are for benchmarks.'''
import pytest
import torch
from helpers.flops import Counter
from helpers.networks import build_torchvision
from torchvision.models import SwinTransformer, VisionTransformer
from zennit.attribution import Gradient

from zennit_resnet import BlockLRP, RelativeLRP, ResNetLRP, initial_relevance

pytestmark = pytest.mark.once


@pytest.mark.parametrize('name', ['resnet50', 'vgg16_bn'])
def test_operations(name):
    '''Ratio and symmetric splitting need three convolutions where a gradient needs two, the others no more than it.'''
    model, flops = build_torchvision(name).eval(), {}
    for label, composite in {
        'gradient': None, 'ratio': ResNetLRP(), 'symmetric': ResNetLRP('symmetric'), 'relative': RelativeLRP(),
        'block': BlockLRP(),
    }.items():
        with Counter() as counter, Gradient(model=model, composite=composite) as attributor:
            attributor(torch.randn(1, 3, 32, 32), initial_relevance(0))
        flops[label] = counter.flops
    ratios = {label: count / flops['gradient'] for label, count in flops.items()}
    assert flops['gradient'] > 0
    assert ratios['ratio'] <= 1.55 and ratios['symmetric'] <= 1.55
    assert ratios['relative'] <= 1.001 and ratios['block'] <= 1.001


@pytest.mark.parametrize('build, size', [
    (lambda: VisionTransformer(224, 16, 3, 12, 768, 3072, num_classes=7), 224),
    (lambda: SwinTransformer([4, 4], 48, [2, 2], [3, 6], [7, 7], num_classes=7), 64),
], ids=['vit', 'swin'])
def test_operations_of_transformers(build, size):
    '''Layers whose input has both signs need four products where a gradient needs two.'''
    model, flops = build().eval(), []
    for composite in (None, ResNetLRP()):
        with Counter() as counter, Gradient(model=model, composite=composite) as attributor:
            attributor(torch.randn(1, 3, size, size), initial_relevance(0))
        flops.append(counter.flops)
    assert 0 < flops[1] <= 1.9 * flops[0]
