'''Cost of finding operations while a network runs, as a ratio to blocks that were written by hand.

The hand-written ResNet-50 calls a module for the addition that ends each block, so its rules need no canonizer. Both
give the same relevance.
'''
import argparse
import statistics
import time

import torch
from torchvision.models import resnet50
from torchvision.models.resnet import Bottleneck
from zennit.attribution import Gradient
from zennit.composites import LayerMapComposite

from zennit_resnet import ResNetLRP, initial_relevance
from zennit_resnet.layer import Addition


class HandWritten(Bottleneck):
    '''A bottleneck block with a module for its addition.'''
    def forward(self, input):
        '''Add skip connection and residual branch.'''
        out = self.relu(self.bn1(self.conv1(input)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        skip = input if self.downsample is None else self.downsample(input)
        return self.relu(self.addition(out, skip))


def main():
    '''Print the ratio.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model, hand_written = resnet50().eval(), resnet50().eval()
    hand_written.load_state_dict(model.state_dict())
    for module in hand_written.modules():
        if isinstance(module, Bottleneck):
            module.__class__ = HandWritten
            module.addition = Addition()
            # in-place, as torchvision's block
            module.addition.function = torch.Tensor.add_
    hand_written.requires_grad_(False)
    input = torch.randn(args.batch, 3, args.size, args.size)

    def attribute(model, composite):
        begin = time.perf_counter()
        with Gradient(model=model, composite=composite) as attributor:
            _, relevance = attributor(input.clone(), initial_relevance(0))
        return time.perf_counter() - begin, relevance

    ratios = []
    for num in range(args.rounds + 1):
        runs = [
            lambda: attribute(model, ResNetLRP()),
            lambda: attribute(hand_written, LayerMapComposite(ResNetLRP().layer_map)),
        ]
        # whoever comes first may pay for memory
        order = 1 if num % 2 else -1
        found, written = [run() for run in runs[::order]][::order]
        assert torch.allclose(found[1], written[1], rtol=1e-3, atol=1e-6 * float(written[1].abs().max()))
        if num:
            ratios.append(found[0] / written[0])
    print(f'batch {args.batch}: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}')


if __name__ == '__main__':
    main()
