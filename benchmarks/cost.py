'''Cost of composites as a ratio to one input gradient of the same batch, in the same run.

Each round times one plain gradient and one attribution of every composite in turn, so that the machine's drift hits
all alike; the ratio's median over the rounds is printed. Peak memory is that of a process which does nothing else.
'''
import argparse
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torchvision
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus
from zennit.torchvision import ResNetCanonizer

from zennit_resnet import BlockLRP, GammaLRP, RelativeLRP, ResNetLRP, initial_relevance, with_splitting

COMPOSITES = {
    'gradient': lambda: None,
    'ratio': ResNetLRP,
    'symmetric': lambda: ResNetLRP(splitting='symmetric'),
    'ratio, literal projection': lambda: ResNetLRP(projection='literal'),
    'ratio, merged batch norm': lambda: ResNetLRP(batch_norm='merge'),
    'block': BlockLRP,
    'relative': RelativeLRP,
    'gamma': GammaLRP,
    'gamma, attention by halves': lambda: GammaLRP(attention='half'),
    'zennit EpsilonPlus': lambda: EpsilonPlus(canonizers=[ResNetCanonizer()]),
    'zennit EpsilonPlus with ratio splitting': lambda: with_splitting(EpsilonPlus()),
}


def attribute(model, composite, input):
    '''One attribution for class 0.'''
    with Gradient(model=model, composite=composite) as attributor:
        return attributor(input.detach().clone(), initial_relevance(0))[1]


def memory_status(key):
    '''Memory of this process in KiB, as Linux counts it (``ru_maxrss`` would include the parent's).'''
    return next(int(line.split()[1]) for line in Path('/proc/self/status').read_text().splitlines() if key in line)


def peak_memory(name, args):
    '''Peak memory of one attribution in a process of its own, beyond what there was before, in MiB.'''
    output = subprocess.run(
        [sys.executable, __file__, '--only', name, *(f'--{key}={getattr(args, key)}' for key in (
            'model', 'batch', 'size', 'threads'
        ))],
        check=True, capture_output=True, text=True,
    )
    return float(output.stdout.split()[-1])


def main():
    '''Print a table.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet50')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--select', default='', help='names that match a regular expression')
    parser.add_argument('--only', help=argparse.SUPPRESS)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = torchvision.models.get_model(args.model, weights=None).eval()
    input = torch.randn(args.batch, 3, args.size, args.size)
    if args.only:
        attribute(model, COMPOSITES[args.only](), input[:1])
        before = memory_status('VmRSS')
        attribute(model, COMPOSITES[args.only](), input)
        print((memory_status('VmHWM') - before) / 1024)
        return

    composites = {
        name: create for name, create in COMPOSITES.items() if name == 'gradient' or re.search(args.select, name)
    }
    times = {name: [] for name in composites}
    for num in range(args.rounds + 1):
        for name, create in composites.items():
            begin = time.perf_counter()
            attribute(model, create(), input)
            if num:
                times[name].append(time.perf_counter() - begin)
    print(f'{args.model}, batch {args.batch}, {args.size} x {args.size}, {args.threads} threads, {args.rounds} rounds')
    print(f'{"":42}{"seconds":>9}{"ratio":>8}{"min":>7}{"max":>7}{"MiB":>8}{"ratio":>8}')
    base = peak_memory('gradient', args)
    for name, values in times.items():
        ratios = [value / reference for value, reference in zip(values, times['gradient'])]
        memory = peak_memory(name, args)
        print(
            f'{name:42}{statistics.median(values):9.3f}{statistics.median(ratios):8.2f}{min(ratios):7.2f}'
            f'{max(ratios):7.2f}{memory:8.0f}{memory / base:8.2f}'
        )


if __name__ == '__main__':
    main()
