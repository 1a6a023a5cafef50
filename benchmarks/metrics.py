'''Cost of insertion and deletion as a ratio to bare forwards of as many images, in the same run.

Each round times the metric and as many images in chunks of the same sizes through the network, in turn, such that the
machine's drift hits all alike; the ratio's median over the rounds is printed, and the peak of memory beyond that of the
bare forwards, which is bounded by the chunks and does not grow with the number of points.
'''
import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision

from captum_adapters.metrics import insertion_deletion

SETTINGS = {
    'default': {},
    'default, 8 levels': {'levels': 8},
    'keio': {'protocol': 'keio', 'baselines': -2.},
    'rise': {'protocol': 'rise'},
}


class Counter:
    '''A function which counts the images of each call.'''
    def __init__(self, model):
        self.model, self.sizes = model, []

    def __call__(self, input):
        self.sizes.append(len(input))
        return self.model(input)


def create(args):
    '''Network, images and maps.'''
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = torchvision.models.get_model(args.model, weights=None).eval()
    input = torch.randn(args.batch, 3, args.size, args.size)
    heatmap = torch.rand(args.batch, args.size, args.size)
    if args.channels_last:
        model, input = (value.to(memory_format=torch.channels_last) for value in (model, input))
    return model, input, heatmap


def measure(function, input, heatmap, args, levels=None, **options):
    '''Both curves of all images.'''
    if levels is not None:
        heatmap = (heatmap * levels).floor()
    return insertion_deletion(
        function, input, heatmap, target=0, max_examples_per_batch=args.chunk, n_steps=args.steps, **options
    )


def forward(model, chunk, sizes):
    '''Nothing but forwards.'''
    with torch.no_grad():
        for size in sizes:
            model(chunk[:size])


def memory_status(key):
    '''Memory of this process in KiB, as Linux counts it (``ru_maxrss`` would include the parent's).'''
    return next(int(line.split()[1]) for line in Path('/proc/self/status').read_text().splitlines() if key in line)


def peak_memory(name, args):
    '''Peak memory of one setting in a process of its own, in MiB.'''
    keys = ('model', 'batch', 'size', 'threads', 'steps', 'chunk')
    output = subprocess.run(
        [sys.executable, __file__, '--only', name, *(f'--{key}={getattr(args, key)}' for key in keys),
         *(['--channels-last'] if args.channels_last else [])],
        check=True, capture_output=True, text=True,
    )
    return float(output.stdout.split()[-1])


def main():
    '''Print a table.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet50')
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--steps', type=int, default=50, help='intervals of each curve')
    parser.add_argument('--chunk', type=int, default=32, help='images at a time')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--only', help=argparse.SUPPRESS)
    args = parser.parse_args()

    model, input, heatmap = create(args)
    chunk = input.repeat(args.chunk // len(input) + 1, 1, 1, 1)[:args.chunk]
    if args.only:
        if args.only == 'forwards':
            forward(model, chunk, [args.chunk] * 2)
        else:
            measure(model, input, heatmap, args, **SETTINGS[args.only])
        print(memory_status('VmHWM') / 1024)
        return

    print(
        f'{args.model}, batch {args.batch}, {args.size} x {args.size}, {args.steps} steps, chunks of {args.chunk}, '
        f'{args.threads} threads, {args.rounds} rounds'
    )
    print(f'{"":22}{"images":>8}{"seconds":>9}{"ratio":>8}{"min":>7}{"max":>7}{"MiB":>8}{"beyond":>8}')
    base = peak_memory('forwards', args)
    for name, options in SETTINGS.items():
        counter = Counter(model)
        measure(counter, input, heatmap, args, **options)
        times, ratios = [], []
        for _ in range(args.rounds):
            begin = time.perf_counter()
            forward(model, chunk, counter.sizes)
            middle = time.perf_counter()
            measure(model, input, heatmap, args, **options)
            times.append(time.perf_counter() - middle)
            ratios.append(times[-1] / (middle - begin))
        memory = peak_memory(name, args)
        print(
            f'{name:22}{sum(counter.sizes):8}{statistics.median(times):9.2f}{statistics.median(ratios):8.3f}'
            f'{min(ratios):7.3f}{max(ratios):7.3f}{memory:8.0f}{memory - base:8.0f}', flush=True
        )


if __name__ == '__main__':
    main()
