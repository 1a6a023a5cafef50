'''Which networks of other packages can be explained: what is installed, with random weights, one after the other.

    python benchmarks/zoo.py --out zoo.jsonl
    python benchmarks/zoo.py --packages monai --names '*UNet*'

Nothing is installed or downloaded. Each network runs in a process of its own with limits of time and memory. Those that
are in the file already are left out. Exit status 1 if any is wrong. What is explained is the sum over positions.
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
from zennit.attribution import Gradient

from zennit_resnet import BlockLRP, RelativeLRP, ResNetLRP, initial_relevance

sys.path.insert(0, str(Path(__file__).parent))
from sweep import describe, differ, snapshot  # noqa: E402
from zoo_networks import PACKAGES  # noqa: E402

COMPOSITES = {
    'ratio': ResNetLRP,
    'merge': lambda: ResNetLRP(batch_norm='merge'),
    'symmetric': lambda: ResNetLRP('symmetric'),
    'relative': RelativeLRP,
    'block': BlockLRP,
}
CONSERVING = ('ratio', 'merge', 'symmetric')
GAP, TWINS = 1e-6, 1e-6


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


class Explained:
    '''A network with its images, explained by one composite after the other.'''
    def __init__(self, network, images):
        self.network, self.images = network, images
        plain = images.clone().requires_grad_()
        torch.manual_seed(2)
        self.plain = self.network(plain).detach()
        trainable = [param.requires_grad_(False) for param in network.parameters() if param.requires_grad]
        torch.manual_seed(2)
        self.frozen = self.network(images.clone().requires_grad_()).detach()
        for param in trainable:
            param.requires_grad_(True)
        with torch.no_grad():
            # as variational autoencoders do
            self.adds_noise = not torch.equal(self.network(images), self.network(images))
        self.targets = [1, 2] if self.plain.shape[1] > 2 else [0, 0]
        self.maps, self.kept = {}, 0.

    def explain(self, label, network=None, images=None, targets=None):
        '''Output and relevance.'''
        images = self.images if images is None else images
        targets = self.targets if targets is None else targets
        # some networks add noise also in evaluation
        torch.manual_seed(2)
        composite = COMPOSITES[label]()
        with Gradient(model=self.network if network is None else network, composite=composite) as attributor:
            output, relevance = attributor(images.clone(), initial_relevance(targets, 'one'))
        # of class tokens
        self.kept = sum(composite.sinks.values(), torch.zeros(len(images)))
        return output.detach(), relevance.detach()

    def check(self, label):
        '''Outcome of a composite, with a note.'''
        before, state = snapshot(self.network), {key: value.clone() for key, value in self.network.state_dict().items()}
        try:
            output, relevance = self.explain(label)
            failed = None
        except Exception as error:
            failed = describe(error)
        after = self.network.state_dict()
        if before != snapshot(self.network) or any(not torch.equal(after[key], value) for key, value in state.items()):
            return 'network changed', failed[1] if failed else 'state, hooks or flags'
        if failed:
            return failed
        self.maps[label] = relevance
        if not torch.equal(output, self.plain) and not torch.equal(output, self.frozen):
            return 'output changed', f'by {float((output - self.plain).abs().max()):.1e}'
        if not relevance.isfinite().all():
            return 'silent', 'relevance is not finite'
        gap = float((relevance.flatten(1).sum(1) + self.kept - 1).abs().max())
        if label in CONSERVING and gap > GAP:
            return 'silent', f'sum off by {gap:.1e}'
        return 'conserves' if label in CONSERVING else 'finite', ''

    def check_more(self, label):
        '''Whether a map is the same again, alone, and for twins of the network. Empty if it is.'''
        relevance = self.maps[label]
        is_first = label == 'ratio'
        # sums of branches may be small, and are divided by
        tolerance = 1e-4 if label == 'relative' else TWINS
        if is_first and not torch.equal(self.explain(label)[1], relevance):
            return 'not deterministic', ''
        # another number of images has other noise
        for num in () if self.adds_noise else range(2) if is_first else (1,):
            image = self.images[num:num + 1]
            try:
                with torch.no_grad():
                    output = self.network(image)
            except Exception:
                continue
            if output.shape != self.plain[:1].shape:
                continue
            alone = self.explain(label, images=image, targets=self.targets[num:num + 1])[1][0]
            whole = relevance[num]
            if label == 'relative':
                alone, whole = (elem / elem.abs().sum().clamp(min=1e-300) for elem in (alone, whole))
            if difference := differ(whole, alone, tolerance):
                itself = float((output - self.plain[num:num + 1]).abs().max())
                note = f', its output by {itself:.1e}' if itself > 1e-9 else ''
                return 'depends on the batch', f'image {num} alone differs by {difference:.1e}{note}'
        for name, twin in {
            'Sequential': lambda: nn.Sequential(self.network), 'functional_call': lambda: Functional(self.network),
            'deepcopy': lambda: copy.deepcopy(self.network),
        }.items():
            if not is_first and name != 'functional_call':
                continue
            try:
                twin = twin()
            except Exception:
                continue
            try:
                other = self.explain(label, network=twin)[1]
            except Exception as error:
                outcome, text = describe(error)
                if outcome == 'refuses' and name == 'functional_call':
                    continue
                return 'twins differ', f'{name}: {outcome}: {text}'
            if difference := differ(relevance, other, tolerance):
                return 'twins differ', f'{name} by {difference:.1e}'
        return None


def run_one(package, name, build, shapes):
    '''Everything about a network.'''
    start = time.time()
    found = {'package': package, 'name': name}
    try:
        network, images = prepare(build, shapes)
        explained = Explained(network, images)
    except Exception as error:
        text = ' '.join(str(error).split())[:160]
        return {**found, 'outcome': 'not built', 'note': f'{type(error).__name__}: {text}'}
    found['parameters'] = sum(param.numel() for param in network.parameters())
    found['results'] = {label: explained.check(label) for label in COMPOSITES}
    for label in ('ratio', 'merge', 'relative'):
        if found['results'][label][0] in ('conserves', 'finite'):
            found['results'][label] = explained.check_more(label) or found['results'][label]
    faults = {label: result for label, result in found['results'].items()
              if result[0] not in ('conserves', 'finite', 'refuses')}
    outcome, note = next(iter(faults.values()), found['results']['ratio'])
    if faults:
        note = f'{next(iter(faults))}: {note}'
    return {**found, 'outcome': outcome, 'note': note, 'seconds': round(time.time() - start, 1)}


def refuse(*args, **kwargs):
    '''Take the place of what looks up addresses.'''
    raise OSError('networks of the zoo download nothing')


def run_apart(package, name, build, shapes, seconds, memory, run=run_one):
    '''Run a network in a process of its own.'''
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(False)

    def work():
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(seconds + used.ru_utime + used.ru_stime) + 1
        resource.setrlimit(resource.RLIMIT_AS, (int(memory * 2 ** 30),) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        sender.send(run(package, name, build, shapes))

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
    return {'package': package, 'name': name, 'outcome': outcome, 'note': ''}


def summarize(records):
    '''A table of packages and outcomes, and all that is wrong, as lines.'''
    outcomes = list(dict.fromkeys(['conserves', 'refuses', *(record['outcome'] for record in records)]))
    packages = list(dict.fromkeys(record['package'] for record in records))
    counts = collections.Counter((record['package'], record['outcome']) for record in records)
    lines = ['| package | ' + ' | '.join(outcomes) + ' |', '|---' * (len(outcomes) + 1) + '|']
    for package in [*packages, 'all']:
        numbers = [counts[package, outcome] if package != 'all' else sum(counts[elem, outcome] for elem in packages)
                   for outcome in outcomes]
        lines.append(f'| {package} | ' + ' | '.join(map(str, numbers)) + ' |')
    for outcome in outcomes:
        chosen = [record for record in records if record['outcome'] == outcome]
        if outcome == 'conserves' or not chosen:
            continue
        lines += ['', f'## {outcome}: {len(chosen)}']
        if outcome == 'refuses':
            reasons = collections.defaultdict(list)
            for record in chosen:
                found = re.search(r"uses '(\S+)' on", record['note'])
                reason = record['note'].partition('relevance, and ')[2] or record['note']
                reason = f'{found[1]}: {reason}' if found else reason[:150]
                reasons[reason].append(f'{record["package"]}/{record["name"]}')
            lines += [f'- {len(names)} {reason}: {", ".join(names[:6])}'
                      for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1]))]
            continue
        lines += [f'- {record["package"]}/{record["name"]}: {record["note"]}' for record in chosen]
    other = collections.defaultdict(list)
    for record in records:
        for label, (outcome, note) in record.get('results', {}).items():
            if outcome not in ('conserves', 'finite') and outcome != record['outcome']:
                other[label, outcome].append(f'{record["package"]}/{record["name"]}: {note[:160]}')
    for (label, outcome), names in other.items():
        lines += ['', f'## also {label}, {outcome}: {len(names)}', *(f'- {name}' for name in names)]
    return lines


def main():
    '''Run networks, write a line for each, and print a summary.'''
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--packages', nargs='+', default=list(PACKAGES), choices=list(PACKAGES), help='by default, all')
    parser.add_argument('--names', action='append', help='pattern of names')
    parser.add_argument('--out', default='zoo.jsonl', help='file of results, which is added to (default: zoo.jsonl)')
    parser.add_argument('--seconds', type=float, default=90, help='CPU time for each network')
    parser.add_argument('--memory', type=float, default=12, help='limit for each network in GiB')
    parser.add_argument('--retry', nargs='+', default=[], help='outcomes of which networks run again')
    parser.add_argument('--summary', action='store_true', help='print the summary of the file only')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    socket.getaddrinfo = refuse
    path = Path(args.out)
    lines = path.read_text().splitlines() if path.exists() else []
    # the last line of a network counts
    records = {(record['package'], record['name']): record for record in map(json.loads, lines)}
    known = {key for key, record in records.items() if record['outcome'] not in args.retry}
    for package in () if args.summary else args.packages:
        try:
            networks = list(PACKAGES[package]())
        except ImportError as error:
            print(f'{package}: {error}', flush=True)
            continue
        for name, build, shapes in networks:
            is_wanted = not args.names or any(fnmatch.fnmatch(name, pattern) for pattern in args.names)
            if not is_wanted or (package, name) in known:
                continue
            record = run_apart(package, name, build, shapes, args.seconds, args.memory)
            records[package, name] = record
            with path.open('a') as file:
                file.write(json.dumps(record) + '\n')
            print(f'{package:14} {name:36} {record["outcome"]:20} {record["note"][:120]}', flush=True)
    records = list(records.values())
    print('\n'.join(summarize(records)))
    fine = ('conserves', 'refuses', 'not built', 'took too long')
    return 1 if any(record['outcome'] not in fine for record in records) else 0


if __name__ == '__main__':
    sys.exit(main())
