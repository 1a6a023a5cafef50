'''A residual network of one's own: trained on bars in noise, explained, and whether relevance is on the bars.'''
import sys

import torch
from torch import nn
from zennit.attribution import Gradient

from zennit_resnet import ResNetLRP, initial_relevance


class Block(nn.Module):
    '''A residual block, with a functional addition and functional activations.'''
    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return (x + self.conv2(self.norm(self.conv1(x)).relu())).relu()


def draw_bars(number):
    '''Images of noise with a bar, the masks of the bars, and whether they are vertical.'''
    masks, labels = torch.zeros(number, 1, 24, 24), torch.randint(2, (number,))
    for mask, label, (row, col) in zip(masks, labels, torch.randint(1, 15, (number, 2)).tolist()):
        (mask if label else mask.mT)[:, row:row + 8, col:col + 2] = 1
    return 0.5 * torch.rand(number, 1, 24, 24) + masks, masks, labels


def main(steps=80):
    '''Train, and explain unseen images.'''
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2)
    model = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), Block(16), Block(16), *head)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(int(steps)):
        images, _, labels = draw_bars(64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    images, masks, labels = draw_bars(200)
    with Gradient(model=model.eval(), composite=ResNetLRP()) as attributor:
        output, relevance = attributor(images, initial_relevance(labels, 'one'))
    print(f'accuracy {(output.argmax(1) == labels).float().mean():.3f}')
    print(f'relevance on the bar {(relevance * masks).sum() / relevance.sum():.3f}, by chance {masks.mean():.3f}')


if __name__ == '__main__':
    main(*sys.argv[1:])
