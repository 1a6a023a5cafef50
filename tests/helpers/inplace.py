'''Composites for networks that change tensors in place.'''
from importlib.metadata import version

import torch
from torch import nn
from torch.nn import functional as F
from zennit.composites import EpsilonAlpha2Beta1, EpsilonPlusFlat, LayerMapComposite
from zennit.types import BatchNorm, Convolution

from zennit_resnet import BlockEpsilon, BlockLRP, ResNetLRP, with_splitting
from zennit_resnet.composites import RelativeLRP


class Squeeze(nn.Module):
    '''Squeeze and excitation.'''
    def __init__(self, channels, inplace):
        super().__init__()
        self.down, self.up, self.inplace = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1), inplace

    def forward(self, x):
        '''Gate the input.'''
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)), self.inplace)))
        return x.mul_(gate) if self.inplace else x * gate


# What blocks compute, with and without working in place.
BLOCKS = {
    'gate': (
        lambda m, x: m.squeeze(m.bn(m.conv(x))).add_(x),
        lambda m, x: m.squeeze(m.bn(m.conv(x))) + x,
    ),
    'gate-outside': (
        lambda m, x: m.other(m.squeeze(m.bn(m.conv(x)))),
        lambda m, x: m.other(m.squeeze(m.bn(m.conv(x)))),
    ),
    'gate-not-returned': (
        lambda m, x: (lambda h, _: m.other(h) + h)(*(lambda h: (h, m.squeeze(h)))(m.conv(x))),
        lambda m, x: (lambda h: m.other(h) + h)(m.squeeze(m.conv(x))),
    ),
    'relu-not-returned': (
        lambda m, x: (lambda h, _: m.other(h) + h)(*(lambda h: (h, m.relu(h)))(m.bn(m.conv(x)))),
        lambda m, x: (lambda h: m.other(h) + h)(m.relu(m.bn(m.conv(x)))),
    ),
    'relu-first': (
        lambda m, x: m.conv(m.relu(x)).add_(x),
        lambda m, x: (lambda x: m.conv(x) + x)(m.relu(x)),
    ),
    'relu-after-use': (
        lambda m, x: (lambda h: (lambda twice, _: m.other(twice + h))(h * 2, m.relu(h)))(m.bn(m.conv(x))),
        lambda m, x: (lambda h: m.other(h * 2 + m.relu(h)))(m.bn(m.conv(x))),
    ),
    'relu-part': (
        lambda m, x: (lambda h, _: m.other(h))(*(lambda h: (h, m.relu(h[:, :2])))(m.bn(m.conv(x)))),
        lambda m, x: (lambda h: m.other(torch.cat([m.relu(h[:, :2]), h[:, 2:]], 1)))(m.bn(m.conv(x))),
    ),
    'relu-part-of-view': (
        lambda m, x: (lambda h, _: m.other(h))(*(lambda h: (h, m.relu(h[:, :2])))(m.bn(m.conv(x))[:])),
        lambda m, x: (lambda h: m.other(torch.cat([m.relu(h[:, :2]), h[:, 2:]], 1)))(m.bn(m.conv(x))),
    ),
    'skip': (
        lambda m, x: m.other(m.relu(x.clone().add_(m.bn(m.conv(x))))),
        lambda m, x: m.other(m.relu(x + m.bn(m.conv(x)))),
    ),
    'unused-branch': (
        lambda m, x: (lambda h, _: h.mul_(.5))(*(lambda h: (h, m.other(h) is None))(m.conv(x))),
        lambda m, x: m.conv(x) * .5,
    ),
    'unused-norm': (
        lambda m, x: m.other(m.relu((lambda h: (h, m.bn(h) is None)[0])(m.conv(x)))),
        lambda m, x: m.other(m.relu(m.conv(x))),
    ),
    'norm-after-skip': (
        lambda m, x: m.bn(m.conv(x).add_(x)),
        lambda m, x: m.bn(m.conv(x) + x),
    ),
    'hardswish': (lambda m, x: m.other(m.swish(m.bn(m.conv(x)))),) * 2,
    'chain': (
        lambda m, x: (lambda h, _: m.other(h))(*(lambda h: (h, h.clamp_(-.1, .5).mul_(.01)))(m.conv(x))),
        lambda m, x: m.other(m.conv(x).clamp(-.1, .5) * .01),
    ),
    'keyword': (
        lambda m, x: m.other((lambda h, _: h)(*(lambda h: (h, torch.clamp_(input=h, max=.1).mul_(.01)))(m.conv(x)))),
        lambda m, x: m.other(m.conv(x).clamp(max=.1) * .01),
    ),
    'scale': (lambda m, x: m.other(m.conv(x).mul_(.001)), lambda m, x: m.other(m.conv(x) * .001)),
    'divide': (
        lambda m, x: m.other(m.relu(m.bn(m.conv(x)).div_(3).add_(.2).add_(x))),
        lambda m, x: m.other(m.relu(m.bn(m.conv(x)) / 3 + .2 + x)),
    ),
    'view': (
        lambda m, x: m.other((lambda h, _: h)(*(lambda h: (h, h.view(len(h), -1).mul_(.001)))(m.conv(x)))),
        lambda m, x: m.other((m.conv(x).flatten(1) * .001).view_as(x)),
    ),
    'out': (
        lambda m, x: m.other((lambda h: torch.mul(h.detach(), 1., out=h.detach()) * 0 + h)(m.conv(x))),
        lambda m, x: m.other((lambda h: h.detach() * 0 + h)(m.conv(x))),
    ),
}


class Block(nn.Module):
    '''A block.'''
    def __init__(self, name, inplace):
        super().__init__()
        self.conv, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn, self.squeeze = nn.BatchNorm2d(4), Squeeze(4, inplace)
        self.relu, self.swish = nn.ReLU(inplace), nn.Hardswish(inplace)
        self.function = BLOCKS[name][0 if inplace else 1]

    def forward(self, x):
        '''Run the block.'''
        return self.function(self, x)


COMPOSITES = {
    'block': BlockLRP, 'block-zero': lambda: BlockLRP(epsilon=0.), 'block-plus': lambda: BlockLRP(1e-2, 'plus'),
    'block-large': lambda: BlockLRP(epsilon=.1), 'block-type': lambda: BlockLRP(blocks=Block),
    'block-layers': lambda: BlockLRP(blocks=(Squeeze, nn.ReLU, Convolution, BatchNorm)),
    'rule': lambda: LayerMapComposite([((Block, nn.Linear, Convolution, BatchNorm), BlockEpsilon())]),
    'rule-layers': lambda: LayerMapComposite([((nn.Linear, Convolution, BatchNorm), BlockEpsilon())]),
    'resnet': ResNetLRP, 'resnet-merge': lambda: ResNetLRP('symmetric', batch_norm='merge'),
    'resnet-ablation': lambda: ResNetLRP(identity_skip=False),
    'resnet-block': lambda: ResNetLRP(layer_map=[(Block, BlockEpsilon(1e-3))]),
    'resnet-layers': lambda: ResNetLRP(layer_map=[(Convolution, BlockEpsilon(1e-3))]),
    'relative': RelativeLRP, 'relative-pass': lambda: RelativeLRP(batch_norm='pass', normalization='l1'),
    'splitting': lambda: with_splitting(EpsilonPlusFlat()), 'alpha-beta': lambda: with_splitting(EpsilonAlpha2Beta1()),
}

ZENNIT_1 = version('zennit').startswith('1.')
