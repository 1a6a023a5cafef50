'''Which networks can be explained: those of timm, or of all packages that are installed, with random weights.

    python benchmarks/networks.py --names 'resnet*' --names 'ghostnet*'
    python benchmarks/networks.py --packages monai torchvision --out networks.jsonl
    python benchmarks/networks.py --packages timm_families --traced --composites ratio relative block

Nothing is installed or downloaded. Each network runs in a process of its own with limits of time and memory, and what
is explained is the sum over positions. Without names, networks of timm with less than 15 million parameters are run,
which takes hours. Those that are in the file already are left out. With --traced, attributions for another image by a
graph are compared with eager ones. Exit status 1 if any is wrong.
'''
import argparse
import collections
import copy
import fnmatch
import json
import multiprocessing
import re
import resource
import signal
import socket
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from zennit_resnet import BlockLRP, GammaLRP, RelativeLRP, ResNetLRP
from zennit_resnet.tracing import trace

sys.path.insert(0, str(Path(__file__).parent))
from explained import Explained, describe, differ  # noqa: E402
from network_sets import PACKAGES, parameters  # noqa: E402

COMPOSITES = {
    'ratio': ResNetLRP,
    'merge': lambda: ResNetLRP(batch_norm='merge'),
    'symmetric': lambda: ResNetLRP('symmetric'),
    'relative': RelativeLRP,
    'block': BlockLRP,
    'half': lambda: ResNetLRP(attention='half'),
    'gamma': GammaLRP,
}
CONSERVING = ('ratio', 'merge', 'symmetric')
# composites whose maps are also compared with those of single images, and of the network called in other ways
COMPARED = ('ratio', 'merge', 'relative')
FINE = ('conserves', 'finite', 'refuses', 'same', 'not built', 'took too long')
GAP, TRACED = 1e-6, 1e-7


class Logits(nn.Module):
    '''A network with the logits of its first output, summed over positions.'''
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        '''Logits of shape (batch, classes).'''
        output = self.network(x)
        while not isinstance(output, torch.Tensor):
            if getattr(output, 'logits', None) is not None:
                output = output.logits
            elif isinstance(output, dict):
                output = output.get('out', next(iter(output.values())))
            elif hasattr(output, 'last_hidden_state'):
                output = output.last_hidden_state
            else:
                output = output[0]
        if output.ndim == 1:
            return output[:, None]
        return output if output.ndim == 2 else output.flatten(2).sum(2)


class Functional(nn.Module):
    '''A network that is called with its own weights.'''
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        '''Logits.'''
        state = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        return torch.func.functional_call(self.network, state, (x,))


def prepare(build, shapes):
    '''A network in double precision with random statistics, and images of a size that it takes, of different scales.'''
    # of what networks create while they run
    torch.set_default_dtype(torch.double)
    torch.manual_seed(0)
    network = Logits(build()).double().eval()
    with torch.no_grad():
        for module in network.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if 'running' in name and buffer.is_floating_point():
                    buffer.uniform_(.5, 1.5) if 'var' in name else buffer.normal_(0, .2)
    error = None
    for shape in shapes:
        images = torch.randn(2, *shape, dtype=torch.double)
        images[1] *= 2
        try:
            with torch.no_grad():
                output = network(images)
            if len(output) != 2:
                raise ValueError(f'output of shape {tuple(output.shape)}')
            return network, images
        except (RuntimeError, AssertionError, ValueError, IndexError) as problem:
            error = error or problem
    raise error


def check(label, explained):
    '''Outcome of a composite, with a note.'''
    composite = COMPOSITES[label]()
    relevance, fault = explained.run(composite)
    if fault:
        return fault
    # class tokens keep a part
    gap = float((relevance.flatten(1).sum(1) + sum(composite.sinks.values()) - 1).abs().max())
    if label in CONSERVING and gap > GAP:
        return 'silent', f'sum off by {gap:.1e}'
    fault = compare(label, explained, relevance) if label in COMPARED else None
    return fault or ('conserves' if label in CONSERVING else 'finite', '')


def compare(label, explained, relevance):
    '''Whether a map is the same again, alone, and for twins of the network. None if it is.'''
    network, is_first = explained.network, label == 'ratio'
    # sums of branches may be small, and are divided by
    tolerance = 1e-4 if label == 'relative' else 1e-6
    if is_first and not torch.equal(explained.explain(COMPOSITES[label]())[1], relevance):
        return 'not deterministic', ''
    with torch.no_grad():
        # as variational autoencoders do: another number of images has other noise
        adds_noise = not torch.equal(network(explained.images), network(explained.images))
    for num in () if adds_noise else range(2) if is_first else (1,):
        if fault := explained.alone(COMPOSITES[label](), relevance, num, tolerance):
            return fault
    twins = {'functional_call': Functional, 'Sequential': nn.Sequential, 'deepcopy': copy.deepcopy}
    for name, make in twins.items() if is_first else [('functional_call', Functional)]:
        try:
            twin = make(network)
        except Exception:
            continue
        try:
            other = explained.explain(COMPOSITES[label](), network=twin)[1]
        except Exception as error:
            outcome, text = describe(error)
            if outcome == 'refuses' and name == 'functional_call':
                continue
            return 'twins differ', f'{name}: {outcome}: {text}'
        if difference := differ(relevance, other, tolerance):
            return 'twins differ', f'{name} by {difference:.1e}'
    return None


def compare_traced(label, explained):
    '''Whether a graph that is recorded with one image has the eager map of another one, with a note.'''
    network, (first, second) = explained.network, explained.images.split(1)
    start = torch.zeros_like(explained.plain[1:])
    start[:, explained.targets[1]] = 1
    maps, errors = [], []
    for function in (
        lambda: explained.explain(COMPOSITES[label](), second, explained.targets[1:]),
        lambda: trace(network, COMPOSITES[label](), first)(second, start),
    ):
        try:
            maps.append(function())
        except Exception as error:
            errors.append(describe(error))
    if len(errors) == 2:
        return 'refuses', errors[0][1]
    if errors:
        return 'trace fails' if maps else 'eager fails', ': '.join(errors[0])
    gaps = [differ(*pair, 0) for pair in zip(*maps)]
    note = 'output {:.1e}, relevance {:.1e}'.format(*gaps)
    # also if one is not a number
    return 'same' if all(gap < TRACED for gap in gaps) else 'differs', note


def run_one(record, build, shapes, labels, traced):
    '''Everything about a network.'''
    start = time.time()
    try:
        explained = Explained(*prepare(build, shapes))
    except Exception as error:
        text = ' '.join(str(error).split())[:160]
        return {**record, 'outcome': 'not built', 'note': f'{type(error).__name__}: {text}'}
    function = compare_traced if traced else check
    results = {label: function(label, explained) for label in labels}
    label, (outcome, note) = next(
        (item for item in results.items() if item[1][0] not in FINE), next(iter(results.items()))
    )
    note = f'{label}: {note}' if outcome not in FINE else note
    return {**record, 'outcome': outcome, 'note': note, 'results': results, 'seconds': round(time.time() - start, 1)}


def refuse(*args, **kwargs):
    '''Take the place of what looks up addresses.'''
    raise OSError('nothing is downloaded')


def run_apart(record, seconds, memory, *args):
    '''Run a network in a process of its own.'''
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(False)

    def work():
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(seconds + used.ru_utime + used.ru_stime) + 1
        resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2 ** 30),) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        sender.send(run_one(record, *args))

    process = context.Process(target=work)
    process.start()
    sender.close()
    try:
        # of a machine with other work to do
        if receiver.poll(5 * seconds):
            return receiver.recv()
        outcome = 'took too long'
    except EOFError:
        process.join()
        is_slow = -process.exitcode in (signal.SIGKILL, signal.SIGXCPU)
        outcome = 'took too long' if is_slow else f'ended with {process.exitcode}'
    finally:
        process.kill()
        process.join()
    return {**record, 'outcome': outcome, 'note': ''}


def summarize(records):
    '''Numbers of networks by package and outcome, and all that do not conserve by composite and reason, as lines.'''
    counts = collections.Counter((record['package'], record['outcome']) for record in records)
    lines = [f'{count:5} {package}: {outcome}' for (package, outcome), count in counts.items()]
    reasons = collections.defaultdict(list)
    for record in records:
        results = record.get('results') or {'': (record['outcome'], record['note'])}
        for label, (outcome, note) in results.items():
            if outcome not in ('conserves', 'finite', 'same'):
                found = re.search(r"uses '(\S+)' on .*relevance, and (.*)", note)
                reason = f'{found[1]}: {found[2]}' if found else note[:150]
                reasons[label, outcome, reason].append(f'{record["package"]}/{record["name"]}')
    for (label, outcome, reason), names in sorted(reasons.items(), key=lambda item: (*item[0][:2], -len(item[1]))):
        lines.append(f'{label} {outcome}, {len(names)} {reason}: {", ".join(names[:6])}')
    return lines


def main():
    '''Run networks, print and write a line for each, and print a summary.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--packages', nargs='+', default=['timm'], choices=list(PACKAGES), help='timm by default')
    parser.add_argument('--names', action='append', help='pattern of names')
    parser.add_argument('--parameters', type=float, default=15e6, help='largest number of timm\'s, without names')
    parser.add_argument('--composites', nargs='+', default=list(COMPOSITES), choices=list(COMPOSITES), help='all')
    parser.add_argument('--traced', action='store_true', help='compare graphs with eager attributions')
    parser.add_argument('--out', type=Path, help='file of results, which is added to')
    parser.add_argument('--seconds', type=float, default=300, help='CPU time for each network')
    parser.add_argument('--memory', type=float, default=12, help='limit for each network in GiB')
    parser.add_argument('--retry', nargs='+', default=[], help='networks with these outcomes run again')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    socket.getaddrinfo = refuse
    lines = args.out.read_text().splitlines() if args.out and args.out.exists() else []
    # the last line of a network counts
    records = {(record['package'], record['name']): record for record in map(json.loads, lines)}
    known = {key for key, record in records.items() if record['outcome'] not in args.retry}
    for package in args.packages:
        try:
            networks = list(PACKAGES[package]())
        except ImportError as error:
            print(f'{package}: {error}', flush=True)
            continue
        for name, build, shapes in networks:
            is_wanted = not args.names or any(fnmatch.fnmatch(name, pattern) for pattern in args.names)
            if not is_wanted or (package, name) in known:
                continue
            if package == 'timm' and not args.names and parameters(build) > args.parameters:
                continue
            record = {'package': package, 'name': name}
            record = run_apart(record, args.seconds, args.memory, build, shapes, args.composites, args.traced)
            records[package, name] = record
            if args.out:
                with args.out.open('a') as file:
                    file.write(json.dumps(record) + '\n')
            print(f'{package:14} {name:36} {record["outcome"]:20} {record["note"][:120]}', flush=True)
    print('\n'.join(summarize(records.values())))
    return any(record['outcome'] not in FINE for record in records.values())


if __name__ == '__main__':
    sys.exit(main())
