'''Where the lattices in heatmaps of residual networks come from, measured and drawn.

The share E(P) of a heatmap's spectral energy (mean removed) at the two-dimensional harmonics of 1/P is printed as a
mean over photographs: E(32) - E(4) for the coarse lattice of strided projections, E(4) and E(2) for the fine ones of
the max pooling and the first convolution. The worst deviation of the sum of relevance from the initial relevance is
beside it.
'''
import argparse
from pathlib import Path

import torch
from PIL import Image
from zennit.attribution import Gradient

from zennit_resnet import ResNetLRP, initial_relevance
from zennit_resnet.image import draw_comparison, draw_heatmap, read_image
from zennit_resnet.models import load_classifier
from zennit_resnet.postprocess import sum_channels

VARIANTS = {
    'projection literal': {'projection': 'literal'},
    'projection spread': {'coverage': 'literal'},
    'spread, even coverage': {},
}


def lattice_energy(heatmap, period):
    '''Share of spectral energy at the harmonics of 1 / period, for heatmaps of shape (batch, height, width).'''
    energy = torch.fft.fft2(heatmap.double()).abs() ** 2
    energy[:, 0, 0] = 0
    rows, cols = (length // period for length in heatmap.shape[1:])
    return energy[:, ::rows, ::cols].sum((1, 2)) / energy.sum((1, 2))


def main():
    '''Print a table and draw a figure.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    assets = Path(__file__).parent / 'assets' / 'photos'
    parser.add_argument('images', nargs='*', type=Path, default=sorted(assets.glob('*.jpg')))
    parser.add_argument('--splitting', choices=['ratio', 'symmetric'], default='ratio')
    parser.add_argument('--draw', nargs='*', default=['gc_monument3', 'gc_cathedral'], help='stems of photos to draw')
    parser.add_argument('--out', type=Path, default=Path('lattice.png'))
    args = parser.parse_args()

    classifier = load_classifier()
    input = torch.stack([classifier.transform(read_image(path)) for path in args.images])
    rows = {
        path: [classifier.photo(elem)] for path, elem in zip(args.images, input) if path.stem in args.draw
    }
    print(f'{len(input)} photographs, {args.splitting} splitting')
    print(f'{"":24}{"E(32)-E(4)":>12}{"E(4)":>10}{"E(2)":>10}{"|sum/initial - 1|":>20}')
    heatmaps = {'(photographs)': input.sum(1)}
    leaks = {}
    for name, settings in VARIANTS.items():
        parts, leak = [], 0.
        for batch in input.split(8):
            with Gradient(model=classifier.model, composite=ResNetLRP(args.splitting, **settings)) as attributor:
                with torch.no_grad():
                    target = classifier.model(batch).argmax(1)
                output, relevance = attributor(batch.clone(), initial_relevance(target))
            initial = output.detach().gather(1, target[:, None])[:, 0]
            leak = max(leak, float((relevance.double().sum((1, 2, 3)) / initial - 1).abs().max()))
            parts.append(sum_channels(relevance))
        heatmaps[name], leaks[name] = torch.cat(parts), leak
    for name, heatmap in heatmaps.items():
        energy = {period: float(lattice_energy(heatmap, period).mean()) for period in (32, 4, 2)}
        print(
            f'{name:24}{energy[32] - energy[4]:12.4f}{energy[4]:10.4f}{energy[2]:10.4f}'
            + (f'{leaks[name]:20.1e}' if name in leaks else '')
        )
    for num, path in enumerate(args.images):
        if path in rows:
            rows[path].extend(draw_heatmap(heatmaps[name][num].abs().numpy()) for name in VARIANTS)
    if rows:
        Image.fromarray(draw_comparison(list(rows.values()), ['photo', *VARIANTS])).save(args.out)
        print(f'written {args.out}')


if __name__ == '__main__':
    main()
