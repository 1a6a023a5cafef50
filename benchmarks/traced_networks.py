'''Whether traced attributions are the eager ones, for networks of other packages, in double precision.

    python benchmarks/traced_networks.py --packages timm --names 'resne*'

Weights are random. Each is traced with one image and compared for another one. Prints the largest difference of
relevance relative to its largest magnitude, and that of the output. Exit status 1 if any differs, or only one of them
raises an error.
'''
import argparse
import fnmatch
import json
import socket
import sys
import time
import warnings
from pathlib import Path

import torch
from zennit.attribution import Gradient

from zennit_resnet.tracing import trace

sys.path.insert(0, str(Path(__file__).parent))
from sweep import describe  # noqa: E402
from zoo import COMPOSITES, prepare, refuse, run_apart  # noqa: E402
from zoo_networks import IMAGE, PACKAGES, smallest  # noqa: E402

TOLERANCE = 1e-7


def families():
    '''The smallest network of each family of torchvision, however large.'''
    from torchvision import models

    def build(name):
        return models.get_model(name, weights=None)

    for name in smallest(models.list_models(module=models), build, 2e8):
        yield name, lambda name=name: build(name), [IMAGE, (3, 96, 96), (3, 224, 224)]


def measure(one, other):
    '''Largest difference, relative to the largest magnitude.'''
    if not torch.equal(one.isfinite(), other.isfinite()):
        return float('inf')
    one, other = one.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0)
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-300))


def compare(label, network, images):
    '''Outcome of a composite, with a note.'''
    input = images[1:]
    with torch.no_grad():
        start = torch.zeros_like(network(input))
    start[:, start.shape[1] // 2] = 1

    def explain():
        with Gradient(model=network, composite=COMPOSITES[label]()) as attributor:
            return attributor(input.clone(), start)

    maps, errors = [], []
    for function in (explain, lambda: trace(network, COMPOSITES[label](), images[:1])(input, start)):
        try:
            maps.append(function())
        except Exception as error:
            errors.append(describe(error))
    if len(errors) == 2:
        return 'refuses', errors[0][1]
    if errors:
        return 'trace fails' if maps else 'eager fails', ': '.join(errors[0])
    (output, relevance), (other, traced) = maps
    gaps = measure(relevance, traced), measure(output, other)
    return 'same' if max(gaps) < TOLERANCE else 'differs', '{:.1e}, output {:.1e}'.format(*gaps)


def run_one(package, name, build, shapes):
    '''Everything about a network.'''
    begin, found = time.time(), {'package': package, 'name': name}
    try:
        network, images = prepare(build, shapes)
    except Exception as error:
        return {**found, 'outcome': 'not built', 'note': str(error)[:160]}
    results = {label: compare(label, network, images) for label in ('ratio', 'relative', 'block')}
    order = ['trace fails', 'eager fails', 'differs', 'same', 'refuses']
    return {
        **found, 'outcome': min((outcome for outcome, _ in results.values()), key=order.index),
        'note': '; '.join(f'{label} {": ".join(result)}' for label, result in results.items()), 'results': results,
        'seconds': round(time.time() - begin, 1), 'shape': list(images.shape),
    }


def main():
    '''Run networks, write a line for each, and print it.'''
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--packages', nargs='+', default=['families', 'torchvision', 'timm'],
                        choices=['families', *PACKAGES])
    parser.add_argument('--names', action='append', help='pattern of names')
    parser.add_argument('--out', help='file that a line of JSON is added to for each')
    parser.add_argument('--seconds', type=float, default=300, help='CPU time for each network')
    parser.add_argument('--memory', type=float, default=12, help='limit for each network in GiB')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    socket.getaddrinfo = refuse
    is_bad = False
    for package in args.packages:
        for name, build, shapes in (families if package == 'families' else PACKAGES[package])():
            if args.names and not any(fnmatch.fnmatch(name, pattern) for pattern in args.names):
                continue
            record = run_apart(package, name, build, shapes, args.seconds, args.memory, run_one)
            is_bad = is_bad or record['outcome'] in ('differs', 'trace fails', 'eager fails')
            print(f'{package:12} {name:32} {record["outcome"]:12} {record["note"][:200]}', flush=True)
            if args.out:
                with open(args.out, 'a') as file:
                    file.write(json.dumps(record) + '\n')
    return is_bad


if __name__ == '__main__':
    sys.exit(main())
