'''A 3-D ResNet that tells whether a piece of a photograph moves over another one, and whether relevance is on it.'''
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.models.video import r3d_18
from zennit.attribution import Gradient

from zennit_resnet import ResNetLRP, initial_relevance
from zennit_resnet.image import draw_comparison, draw_strip, read_image
from zennit_resnet.postprocess import sum_channels

PHOTOS = Path(__file__).parent / 'assets' / 'photos'
DEPTH, SIZE, PIECE, SPEED = 6, 32, 12, 3  # frames, pixels of a side, and pixels per frame


def cut(photos, side):
    '''A random square of a random photograph.'''
    num, top, left = (int(torch.randint(limit, ())) for limit in (len(photos), *[photos.shape[2] - side + 1] * 2))
    return photos[num, :, None, top:top + side, left:left + side]


def draw_videos(photos, number):
    '''Videos with a piece that may move in one half and one that lies still in the other, their masks, and classes.'''
    videos = torch.stack([cut(photos, SIZE).repeat(1, DEPTH, 1, 1) for _ in range(number)])
    masks, labels = torch.zeros(number, 2, DEPTH, SIZE, SIZE), torch.randint(2, (number,))
    for video, pair, label in zip(videos, masks, labels.tolist()):
        halves = torch.randperm(2).tolist()
        for mask, half, speed in zip(pair, halves, (SPEED * label, 0)):
            piece, top = cut(photos, PIECE), half * SIZE // 2 + int(torch.randint(SIZE // 2 - PIECE, ()))
            start = int(torch.randint(SIZE - PIECE - SPEED * (DEPTH - 1) + 1, ()))
            for frame in range(DEPTH):
                left = start + frame * speed
                place = slice(top, top + PIECE), slice(left, left + PIECE)
                video[(slice(None), frame, *place)], mask[(frame, *place)] = piece[:, 0], 1
    return videos * 2 - 1, masks, labels


def main(steps=120, out='video.png'):
    '''Train on every second photograph, and explain videos of the others.'''
    paths = sorted(PHOTOS.glob('*.jpg'))
    photos = torch.stack([torch.from_numpy(np.array(read_image(path).resize((96, 96)))) for path in paths])
    photos = photos.permute(0, 3, 1, 2) / 255
    model = r3d_18(num_classes=2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(int(steps)):
        videos, _, labels = draw_videos(photos[::2], 8)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(videos), labels).backward()
        optimizer.step()
    videos, masks, labels = draw_videos(photos[1::2], 24)
    composite = ResNetLRP(first_layer='zbox', low=-1, high=1)
    with Gradient(model=model.eval(), composite=composite) as attributor:
        output, relevance = attributor(videos, initial_relevance(1, 'one'))
    print(f'accuracy {(output.argmax(1) == labels).float().mean():.3f}')
    moves = labels == 1
    heatmaps, masks = sum_channels(relevance, dims=3)[moves], masks[moves]
    moving, still = ((heatmaps * mask).sum() / heatmaps.sum() for mask in masks.unbind(1))
    print(f'relevance on the moving piece {moving:.3f}, on the other {still:.3f}, by chance {masks.mean():.3f}')
    rows = []
    for video, heatmap in zip(videos[moves][:3], heatmaps):
        frames = (video.permute(1, 2, 3, 0) * 127.5 + 127.5).to(torch.uint8)
        rows += [[draw_strip(None, frames)], [draw_strip(heatmap, frames)]]
    Image.fromarray(draw_comparison(rows, ['frames and relevance'], scale=3)).save(out)
    print(f'written {out}')


if __name__ == '__main__':
    torch.manual_seed(0)
    main(*sys.argv[1:])
