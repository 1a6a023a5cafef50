'''From Zennit's ResNetCanonizer and Captum's LRP to this package: the same numbers first, then what gets better.'''
import copy

import torch
from captum.attr import LRP
from captum.attr._utils.custom_modules import Addition_Module
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlusFlat
from zennit.rules import Norm
from zennit.torchvision import ResNetCanonizer

from captum_adapters.attr import C3LRP
from zennit_resnet import ResidualCanonizer, ResNetLRP, initial_relevance, with_splitting
from zennit_resnet.layer import Addition
from zennit_resnet.rules import LinearSum

COMPOSITES = {
    'EpsilonPlusFlat, Zennit': EpsilonPlusFlat(canonizers=[ResNetCanonizer()]),
    'the same numbers': EpsilonPlusFlat(
        canonizers=[ResidualCanonizer(batch_norm='merge')], layer_map=[(Addition, LinearSum(Norm()))]),
    'with_splitting': with_splitting(EpsilonPlusFlat(canonizers=[ResNetCanonizer()])),
    'without biases': with_splitting(EpsilonPlusFlat(canonizers=[ResNetCanonizer()], zero_params='bias')),
    'batch norm not merged': with_splitting(EpsilonPlusFlat(zero_params='bias')),
    'ResNetLRP': ResNetLRP(),
}


class Rewritten(BasicBlock):
    '''A block as captum.attr.LRP needs it, with a module for the addition and for each ReLU.'''
    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        return self.relu2(self.addition(self.bn2(self.conv2(out)), identity))


def main():
    '''Print sums of relevance beside the logit, and how similar maps are.'''
    torch.manual_seed(0)
    model, images = resnet18().eval(), torch.rand(2, 3, 64, 64)
    rewritten, maps = copy.deepcopy(model), {}
    for name, composite in COMPOSITES.items():
        # Zennit 1.0.0 does not restore all of a network
        with Gradient(model=copy.deepcopy(model), composite=composite) as attributor:
            output, maps[name] = attributor(images, initial_relevance(3))
    for block in rewritten.modules():
        if isinstance(block, BasicBlock):
            block.__class__ = Rewritten
            block.relu, block.relu2, block.addition = torch.nn.ReLU(), torch.nn.ReLU(), Addition_Module()
    maps['captum.attr.LRP, rewritten'] = LRP(rewritten).attribute(images, target=3)
    maps['C3LRP, for captum.attr.LRP'] = C3LRP(model, epsilon=0., postprocess=None).attribute(images, target=3)
    first = None
    for name, relevance in maps.items():
        first = relevance.flatten(1) if name in ('EpsilonPlusFlat, Zennit', 'captum.attr.LRP, rewritten') else first
        cosine = torch.cosine_similarity(relevance.flatten(1), first).min()
        print(f'{name:28} logit {output[0, 3]:.4f}   sum {relevance[0].sum():.4f}   cosine {cosine:.5f}')
    return maps


if __name__ == '__main__':
    main()
