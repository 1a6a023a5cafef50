'''Time of post-processing per heatmap, for a batch on one core.

Maps are of two kinds: noise, which has hundreds of components and contours, and smooth blobs with some noise, as
heatmaps are. The median and the largest time over the rounds are printed.
'''
import argparse
import statistics
import time

import cv2
import torch
from torch.nn import functional

from zennit_resnet.postprocess import c1c, c3, heat_quantization


def main():
    '''Print a table.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--rounds', type=int, default=9)
    args = parser.parse_args()

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.manual_seed(0)
    shape = (args.batch, args.size, args.size)
    noise = torch.randn(shape)
    blobs = functional.interpolate(torch.rand(args.batch, 1, 6, 6) ** 4, shape[1:], mode='bicubic')[:, 0]
    maps = {'noise': noise, 'blobs': blobs + 0.05 * noise}
    functions = {
        'c1c': lambda heatmap: c1c(heatmap, return_masks=True),
        'c3': lambda heatmap: c3(heatmap, return_masks=True),
        'heat_quantization': heat_quantization,
    }
    print(f'batch {args.batch}, {args.size} x {args.size}, 1 thread, {args.rounds} rounds, milliseconds per map')
    print(f'{"":20}{"maps":8}{"median":>8}{"max":>8}')
    for name, function in functions.items():
        for kind, heatmap in maps.items():
            times = []
            for num in range(args.rounds + 1):
                begin = time.perf_counter()
                function(heatmap)
                if num:
                    times.append(1e3 * (time.perf_counter() - begin) / args.batch)
            print(f'{name:20}{kind:8}{statistics.median(times):8.2f}{max(times):8.2f}')


if __name__ == '__main__':
    main()
