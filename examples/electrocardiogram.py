'''A 1-D ResNet that finds heartbeats in an electrocardiogram (of PyWavelets), and whether relevance is on the beat.'''
import sys

import numpy as np
import pywt.data
import torch
from PIL import Image
from scipy.signal import find_peaks
from torch import nn
from zennit.attribution import Gradient

from zennit_resnet import ResNetLRP, initial_relevance
from zennit_resnet.image import draw_signal
from zennit_resnet.postprocess import sum_channels

LENGTH, BEAT = 160, 12  # samples of a window, and on either side of a peak (360 samples are a second)


class Block(nn.Module):
    '''A residual block that halves the length.'''
    def __init__(self, width):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(width, width, 5, 2, 2), nn.Conv1d(width, width, 5, padding=2)
        self.norm1, self.norm2, self.skip = nn.BatchNorm1d(width), nn.BatchNorm1d(width), nn.Conv1d(width, width, 1, 2)

    def forward(self, x):
        return (self.skip(x) + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()


def draw_windows(ecg, peaks, number):
    '''Windows with noise and drift, masks of the beats in them, and whether there is one.'''
    starts = torch.randint(len(ecg) - LENGTH, (number,))[:, None] + torch.arange(LENGTH)
    beats = ((torch.arange(len(ecg))[:, None] - peaks).abs() <= BEAT).any(1)[starts]
    drift = torch.linspace(-1, 1, LENGTH) * torch.randn(number, 1) + torch.randn(number, 1)
    windows = ecg[starts] * (0.7 + 0.6 * torch.rand(number, 1)) + 0.3 * drift + 0.05 * torch.randn(number, LENGTH)
    # beats that are cut off belong to neither class
    number = beats.sum(1)
    kept = (number == 0) | (number == 2 * BEAT + 1)
    return windows[kept, None], beats[kept], (number[kept] > 0).long()


def main(steps=60, out='electrocardiogram.png'):
    '''Train on the first two beats, and explain the third.'''
    ecg = pywt.data.ecg().astype(np.float32)
    ecg = torch.from_numpy((ecg - ecg.mean()) / ecg.std())
    peaks = torch.from_numpy(find_peaks(ecg, height=2.5, distance=100)[0])
    split = 640
    head = nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(24, 2)
    model = nn.Sequential(nn.Conv1d(1, 24, 7, padding=3), nn.ReLU(), Block(24), Block(24), *head)
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    for _ in range(int(steps)):
        windows, _, labels = draw_windows(ecg[:split], peaks[peaks < split], 64)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(windows), labels).backward()
        optimizer.step()
    windows, beats, labels = draw_windows(ecg[split:], peaks[peaks >= split] - split, 200)
    with Gradient(model=model.eval(), composite=ResNetLRP()) as attributor:
        output, relevance = attributor(windows, initial_relevance(1, 'one'))
    print(f'accuracy {(output.argmax(1) == labels).float().mean():.3f}')
    found = labels == 1
    heatmap, beats = sum_channels(relevance, dims=1)[found], beats[found]
    share, size = ((each * beats).sum() / each.sum() for each in (heatmap, windows[found][:, 0].abs()))
    print(f'on the beat: relevance {share:.3f}, signal {size:.3f}, by chance {beats.float().mean():.3f}')
    Image.fromarray(draw_signal(windows[found][:4, 0], heatmap[:4])).save(out)
    print(f'written {out}')


if __name__ == '__main__':
    torch.manual_seed(0)
    main(*sys.argv[1:])
