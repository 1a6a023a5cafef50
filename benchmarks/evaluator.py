'''Overhead of the evaluator over the forwards and attributions that it needs, in the same run.

Each round evaluates some photographs, from reading files to writing records, and then does nothing but the same
attributions and the same forward passes in batches of the same sizes. The ratio's median over the rounds is printed, of
the processor's time, which does not depend on what else runs, and of the time on the clock.
'''
import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from captum_adapters.evaluation import Evaluation, Process
from captum_adapters.evaluation.runner import Loop

PHOTOS = Path(__file__).parent.parent / 'examples' / 'assets' / 'photos'


class Log:
    '''A network which notes the sizes of its batches.'''
    def __init__(self, function):
        self.function, self.sizes = function, []

    def __call__(self, input):
        self.sizes.append(len(input))
        return self.function(input)


def clock():
    '''Time of the processor, and on the clock.'''
    return torch.tensor([time.process_time(), time.perf_counter()])


def main():
    '''Print a table.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--methods', default='resnet_lrp_ratio,resnet_lrp_ratio+quantize8,input_x_gradient,random')
    parser.add_argument('--metrics', default='insertion_deletion,conservation')
    parser.add_argument('--limit', type=int, default=8, help='images')
    parser.add_argument('--batch', type=int, default=4)
    parser.add_argument('--step', type=int, default=2000)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--amp', choices=['bfloat16'])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    ratios, totals = [], []
    for turn in range(args.rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            loop = Loop(Evaluation(
                str(PHOTOS), folder, tuple(args.methods.split(',')), tuple(args.metrics.split(',')), limit=args.limit,
                batch_size=args.batch, step=args.step, amp=args.amp, controls=False,
            ), Process(), True)
            computation = loop.prepare()
            # without it in the time, as it happens once
            loop.prepare = lambda computation=computation: computation
            log = computation.forward = Log(computation.forward)
            begin = clock()
            loop.run()
            evaluated = clock() - begin

            images = torch.stack([loop.images[number].image for number in range(len(loop.images))])
            batches = images.to(memory_format=torch.channels_last).split(args.batch)
            repeats = max(log.sizes) // len(images) + 1
            chunk = images.repeat(repeats, 1, 1, 1).to(memory_format=torch.channels_last)
            begin = clock()
            for batch in batches:
                with torch.no_grad():
                    output = loop.classifier.model(batch)
                # methods that only differ in their post-processing have attributions in common
                distinct = {each.method.attribution: each for each in computation.explainers.values()}
                for explainer in distinct.values():
                    explainer.attribute(batch, output.argmax(1), output, [''] * len(batch))
            with torch.no_grad():
                for size in log.sizes:
                    log.function(chunk[:size])
            bare = clock() - begin
        if turn == 0:
            # the first passes of a process allocate memory and choose algorithms
            continue
        ratios.append((evaluated / bare).tolist())
        totals.append([evaluated.tolist(), bare.tolist()])

    print(
        f'{len(loop.samples)} photographs, {len(loop.methods)} methods, {sum(log.sizes)} forwards, '
        f'{args.threads} threads, {args.rounds} rounds'
    )
    print(f'{"":12}{"evaluator":>11}{"bare":>9}{"ratio":>8}{"min":>7}{"max":>7}')
    for row, name in enumerate(('processor', 'clock')):
        column = [ratio[row] for ratio in ratios]
        seconds = [statistics.median(total[part][row] for total in totals) for part in (0, 1)]
        print(
            f'{name:12}{seconds[0]:11.2f}{seconds[1]:9.2f}{statistics.median(column):8.3f}{min(column):7.3f}'
            f'{max(column):7.3f}'
        )


if __name__ == '__main__':
    main()
