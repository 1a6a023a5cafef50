'''Cost of several classes by one forward pass, as a ratio to one attribution and to one input gradient in the same run.

Each round times all of them in turn, so that the machine's drift hits all alike. Ratios are those of the minima.
'''
import argparse
import time

import torch
import torchvision
from cost import COMPOSITES
from zennit.attribution import Gradient

from zennit_resnet import ManyTargets, initial_relevance


def main():
    '''Print a table.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='resnet50')
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--classes', type=int, default=10)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--select', default='', help='composites of names that contain this')
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = torchvision.models.get_model(args.model, weights=None).eval()
    input = torch.randn(args.batch, 3, args.size, args.size)
    questions = [initial_relevance(target) for target in range(args.classes)]

    def attribute(attributor, question):
        '''Seconds, with the relevance.'''
        begin = time.perf_counter()
        with attributor:
            relevance = attributor(input.clone(), question)[1]
        return time.perf_counter() - begin, relevance

    print(f'{args.model}, batch {args.batch}, {args.size} x {args.size}, {args.threads} threads, {args.rounds} rounds')
    print(f'{"":42}{"one":>8}{args.classes:>8}{"ratio":>8}{"of gradient":>13}{"difference":>12}')
    for name, create in COMPOSITES.items():
        if args.select not in name:
            continue
        times = []
        for _ in range(args.rounds + 1):
            times.append((
                attribute(Gradient(model), questions[0])[0], attribute(Gradient(model, create()), questions[0])[0],
                attribute(ManyTargets(model, create()), questions)[0],
            ))
        gradient, one, many = map(min, zip(*times[1:]))
        expected = attribute(Gradient(model, create()), questions[-1])[1]
        actual = attribute(ManyTargets(model, create()), questions)[1][-1]
        difference = float((actual - expected).abs().max() / expected.abs().max())
        print(f'{name:42}{one:8.3f}{many:8.3f}{many / one:8.2f}{many / gradient:13.2f}{difference:12.1e}')


if __name__ == '__main__':
    main()
