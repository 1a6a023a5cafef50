'''Cost of eager, traced and compiled attributions as a ratio to one eager gradient of the same batch, in the same run.

Each round times everything in turn, so that the machine's drift hits all alike, and the smallest ratio of the rounds
to their smallest gradient is printed.
'''
import argparse
import ctypes
import gc
import time
from pathlib import Path

import torch
import torchvision
from cost import COMPOSITES, memory_status
from zennit.attribution import Gradient

from zennit_resnet.tracing import trace

NAMES = ('ratio', 'symmetric', 'relative', 'block')


def variants(model, name, input, start, args):
    '''Functions to time, by name.'''
    composite = COMPOSITES[name]

    def gradient(network=model):
        leaf = input.detach().requires_grad_()
        return torch.autograd.grad(network(leaf), leaf, start)

    def eager():
        with Gradient(model=model, composite=composite()) as attributor:
            return attributor(input, start)

    found = {'gradient': gradient, 'eager': eager}
    traced = trace(model, composite(), input)
    found['traced'] = lambda: traced(input, start)
    if args.bfloat16:
        rounded = trace(model, composite(), input, rule_dtype=torch.bfloat16)
        found['bfloat16'] = lambda: rounded(input, start)
    if args.lxt:
        from peer_methods import lxt
        explain, targets = lxt(model, None), start.argmax(1)
        found['LXT'] = lambda: explain(input, targets)
    if args.compile:
        compiled = torch.compile(traced, fullgraph=True, options={'freezing': args.freezing})
        found['compiled'] = lambda: compiled(input, start)
        network = torch.compile(model)
        found['compiled gradient'] = lambda: gradient(network)
    return found


def peak(function):
    '''Largest amount of memory that a call has beyond what there is before it, in MiB, on Linux.'''
    function()
    gc.collect()
    # give back what was freed, and forget the peak so far
    ctypes.CDLL('libc.so.6').malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')
    before = memory_status('VmRSS')
    function()
    return (memory_status('VmHWM') - before) / 1024


def main():
    '''Print a table.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet50')
    parser.add_argument('--sizes', type=int, nargs='+', default=[32, 64, 224])
    parser.add_argument('--batches', type=int, nargs='+', default=[1])
    parser.add_argument('--names', nargs='+', default=['ratio', 'relative', 'block'], choices=NAMES)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--compile', action='store_true', help='takes minutes')
    parser.add_argument('--freezing', action='store_true', help='have the compiler repack weights')
    parser.add_argument('--bfloat16', action='store_true', help='also trace with rules in bfloat16')
    parser.add_argument('--lxt', action='store_true', help='also LXT, for transformers of torchvision')
    parser.add_argument('--memory', action='store_true', help='print peak memory in place of time')
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = torchvision.models.get_model(args.model, weights=None).eval()
    # else the compiler has the gradients of weights computed, too; frozen, those of transformers take longer
    model.requires_grad_(not args.compile)
    for size in args.sizes:
        for batch in args.batches:
            input = torch.randn(batch, 3, size, size)
            with torch.no_grad():
                start = torch.rand_like(model(input))
            for name in args.names:
                functions = variants(model, name, input, start, args)
                if args.memory:
                    cells = [f'{key} {peak(function):.0f} MiB' for key, function in functions.items()]
                    print(f'{args.model} {batch} x {size} {name}:', ', '.join(cells), flush=True)
                    continue
                times = {key: [] for key in functions}
                for function in functions.values():
                    function()
                for _ in range(args.rounds):
                    for key, function in functions.items():
                        begin = time.perf_counter()
                        function()
                        times[key].append(time.perf_counter() - begin)
                best = {key: min(elem) for key, elem in times.items()}
                cells = [f'{key} {value / best["gradient"]:.2f}' for key, value in best.items()]
                print(f'{args.model} {batch} x {size} {name}: {best["gradient"] * 1e3:.1f} ms;', ', '.join(cells),
                      flush=True)


if __name__ == '__main__':
    main()
