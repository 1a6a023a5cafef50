'''Which functions and layers can be explained: a table of all of them, and whether spellings of one of them agree.

    python benchmarks/sweep.py --out docs/results/operations.md
    python benchmarks/sweep.py --names 'max*' --names 'nn.Max*'

Each runs in a small network in double precision, conv -> ReLU or not -> function -> linear, for two images.
With the package expecttest, samples of PyTorch's own tests run as well, one image each. Exit status 1 for any fault.
'''
import argparse
import collections
import fnmatch
import re
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from zennit_resnet import BlockLRP, RelativeLRP, ResNetLRP

sys.path.insert(0, str(Path(__file__).parent))
from explained import SEED, TOLERANCE, Explained, describe, differ  # noqa: E402
from sweep_networks import Network, database  # noqa: E402
from sweep_specs import FUNCTIONS, LAYERS, TWINS, parse  # noqa: E402

COMPOSITES = {
    'ratio': ResNetLRP,
    'merge': lambda: ResNetLRP(batch_norm='merge'),
    'block': lambda: BlockLRP(epsilon=1e-12),
    'relative': RelativeLRP,
}
TITLES = {'ratio': 'ResNetLRP', 'merge': "`batch_norm='merge'`", 'block': 'BlockLRP', 'relative': 'RelativeLRP'}
FAULTS = (
    'crash', 'silent', 'output changed', 'network changed', 'depends on the batch', 'not deterministic', 'twins differ',
)
SAMPLES = 'samples of PyTorch\'s own tests'


class Probe(Explained):
    '''A network with its images, explained by one composite after the other.'''
    def __init__(self, network):
        self.size = 2 if network.code is not None else 1
        torch.manual_seed(1)
        images = torch.randn(self.size, 3, 6, 6, dtype=torch.double)
        images[1:] *= 2
        super().__init__(network, images, [1, 2][:self.size])
        if not self.plain.isfinite().all() or not network.head.in_features:
            raise ValueError('not finite, or empty')
        images = images.clone().requires_grad_()
        torch.manual_seed(SEED)
        start = torch.eye(5, dtype=torch.double)[self.targets]
        self.gradient, = torch.autograd.grad(network(images), images, start)

    def check(self, label, full=True):
        '''Outcome of an explanation, with a note.'''
        composite, tapped = COMPOSITES[label](), {}
        relevance, fault = self.run(composite)
        if fault:
            return fault
        if full:
            for num in range(self.size if self.size > 1 else 0):
                if fault := self.alone(composite, relevance, num, 1e-6 if label == 'block' else TOLERANCE):
                    return fault
            try:
                again, tapped = self.tap(COMPOSITES[label]())
            except Exception as error:
                return describe(error)[0], f'with hooks of tensors: {describe(error)[1]}'
            if not torch.equal(again, relevance):
                return 'not deterministic', f'differs by {float((again - relevance).abs().max()):.1e}'
        return getattr(self, f'_{label}')(relevance, tapped)

    def tap(self, composite):
        '''Relevance of the input, and what is recorded before and after the function.'''
        self.network.tapped = {}
        try:
            return self.explain(composite)[1], self.network.tapped
        finally:
            self.network.tapped = None

    def _block(self, relevance, tapped):
        head, layer = self.network.head, self.network.layer
        if layer is not None and any(isinstance(elem, nn.Linear) and elem.bias is not None for elem in layer.modules()):
            # factors of layers do not cancel where biases are left out, Eq. (2)
            return 'finite', ''
        rest = (self.plain - head.bias).gather(1, torch.tensor(self.targets)[:, None])
        if bool((rest == 0).any()):
            return 'finite', 'logits are their biases'
        expected = self.images * self.gradient / rest.detach()[:, :, None, None]
        if float((expected - relevance).abs().max()) > 1e-12 and (difference := differ(expected, relevance, 1e-6)):
            return 'silent', f'differs from gradient x input / (y - b) by {difference:.1e}'
        return 'exact', ''

    def _relative(self, relevance, tapped):
        return ('finite', '') if relevance.any() else ('finite', 'all zero')

    def _merge(self, relevance, tapped):
        return self._ratio(relevance, tapped)

    def _ratio(self, relevance, tapped):
        gap = float((relevance.sum((1, 2, 3)) - 1).abs().max())
        function, values = self.network.evaluate, tapped.get('values', {})
        start, end = tapped.get('output'), [tapped[key] for key in ('h', 'g', 's') if key in tapped]
        if gap > TOLERANCE:
            note = f'sum off by {gap:.1e}'
            if start is None:
                return 'silent', note
            if not end:
                return 'absorbs', 'nothing that the input determines'
            torch.manual_seed(SEED)
            with torch.no_grad():
                output = function(**{key: value.clone() for key, value in values.items()})
                depends = torch.zeros_like(output, dtype=torch.bool)
                for scale in (1, 2, 5):
                    noise = {key: value + scale * torch.randn_like(value) for key, value in values.items()}
                    depends |= function(**noise) != output
            kept = float(start[~depends].sum())
            if kept and abs(float(relevance.sum()) + kept - len(relevance)) < TOLERANCE:
                return 'absorbs', f'constants in its output keep what they receive ({gap:.1e})'
            return 'silent', note + (', its plain gradient' if self._is_gradient(tapped) else '')
        if 's' in tapped and tapped['s'].any():
            return 'silent', 'the gate s receives relevance'
        if start is None or len(values) != 1:
            return 'conserves', ''
        value, end = values['h'], tapped.get('h')
        torch.manual_seed(SEED)
        with torch.no_grad():
            output = function(value.clone())
        before, after, start, end = (elem.flatten() for elem in (value, output, start, value if end is None else end))
        if len(start) == len(end) and not torch.equal(before, after) and not differ(start, end):
            return 'passes', ''
        return 'conserves', ''

    def _is_gradient(self, tapped):
        values = {key: value.clone().requires_grad_() for key, value in tapped['values'].items()}
        try:
            output = self.network.evaluate(**{key: value * 1 for key, value in values.items()})
            grads = torch.autograd.grad(output, list(values.values()), tapped['output'], allow_unused=True)
        except RuntimeError:
            return False
        return all(
            grad is None or key not in tapped or not differ(grad, tapped[key]) for key, grad in zip(values, grads)
        )

    def matrix(self, label='ratio'):
        '''Compare the relevance of a linear function with the rule of its matrix. Empty if it is right, or not linear.

        Contributions of relative LRP are compared up to a factor, and where all outputs have as many inputs.
        '''
        network = self.network
        with torch.no_grad():
            active = network.active(self.images)
        if len(active) != 1:
            return ''
        value = active['h']

        def function(tensor):
            torch.manual_seed(SEED)
            return network.evaluate(tensor * 1)

        noise, other = 3 * torch.randn_like(value), 3 * torch.randn_like(value)
        with torch.no_grad():
            first, second, both, none = (function(value + elem) for elem in (noise, other, noise + other, 0 * noise))
        if first.shape != none.shape or not torch.allclose(first + second, both + none, rtol=0, atol=1e-9):
            return ''
        _, tapped = self.tap(ResNetLRP(projection='literal') if label == 'ratio' else COMPOSITES[label]())
        if 'output' not in tapped or 'h' not in tapped:
            return ''
        rows = torch.autograd.functional.jacobian(function, value).reshape(none.numel(), value.numel())
        start = tapped['output'].reshape(-1)
        if label == 'relative':
            if not 1 < int((rows != 0).sum(1).min()) == int((rows != 0).sum(1).max()):
                return ''
            expected, found = value * (rows.T @ start).reshape(value.shape), tapped['h']
            expected, found = (elem / elem.flatten(1).abs().sum(1)[:, None, None, None] for elem in (expected, found))
            difference = differ(expected, found)
            return f'differs from the relative rule of its matrix by {difference:.1e}' if difference else ''
        parts = (rows * value.reshape(-1)).clamp(min=0)
        moved = ((rows != 0).sum(1) == 1)[:, None] * (rows != 0)
        parts = torch.where(moved.any(1, keepdim=True), moved.double(), parts)
        total = parts.sum(1)
        growth = float(tapped['h'].abs().sum() / start.abs().sum().clamp(min=1e-300))
        if bool(((total <= 1e-12) & (start.abs() > 1e-15)).any()):
            # shared by all inputs of a unit, whatever these are
            return f'magnitudes grow by {growth:.2f}' if growth > 1 + TOLERANCE else ''
        expected = (parts / total.clamp(min=1e-300)[:, None] * start[:, None]).sum(0)
        difference = differ(expected, tapped['h'].reshape(-1))
        return f'differs from z+ of its matrix by {difference:.1e}' if difference else ''


def attempt(function, layer=None, full=True, with_matrix=True):
    '''Outcomes of a function with and without a ReLU before it: a dict of composites, or a text if there is nothing.'''
    found, reasons = collections.defaultdict(dict), []
    for signed in (False, True):
        try:
            probe = Probe(Network(function, signed, layer))
        except Exception as error:
            reasons.append(f'{type(error).__name__}: {" ".join(str(error).split())[:100]}')
            continue
        for label in COMPOSITES:
            result = probe.check(label, full)
            if not full and result[0] == 'silent':
                # with what arrives before and after the function
                result = probe.check(label, True)
            if full and with_matrix and (label, result[0]) in (
                ('ratio', 'conserves'), ('ratio', 'passes'), ('relative', 'finite'),
            ):
                if note := probe.matrix(label):
                    result = 'silent', note
            found[label].setdefault(result, []).append('signed' if signed else 'ReLU')
    if not found:
        return reasons[0]
    return {label: list(results) for label, results in found.items()}


def rows_of(names=None):
    '''All rows of the tables: group, name, code, code of a layer, and whether its matrix tells its rule.'''
    def wanted(name, code):
        return not names or any(fnmatch.fnmatch(text, pattern) for text in (name, code) for pattern in names)

    for group, text in FUNCTIONS.items():
        for name, forms, _ in parse(text):
            for form in forms:
                if wanted(name.lstrip('~'), form):
                    yield group, name.lstrip('~'), form, None, not name.startswith('~')
    for default, text in LAYERS.items():
        for _, forms, _ in parse(text):
            for form in forms:
                layer, _, call = form.partition(' -> ')
                name = re.sub(r'\(.*', '', layer)
                if wanted(name, form):
                    # a padding of copies and samples at places are functions of their own, before a convolution
                    is_alone = 'padding_mode' not in layer and 'Deform' not in layer
                    yield 'layers', name, call or f'layer({default})', layer, is_alone


def compare_twins(names=None):
    '''Differences of the maps of twins: group, composite, outcome and note.'''
    composites = {**COMPOSITES, 'symmetric': lambda: ResNetLRP('symmetric')}
    for _, forms, notes in parse(TWINS):
        if names and not any(fnmatch.fnmatch(form, pattern) for form in forms for pattern in names):
            continue
        only = next((re.findall(r'\w+', note)[1:] for note in notes if note.startswith('only')), list(composites))
        only = [label for label in only if f'not {label}' not in ' '.join(notes)]
        for label in only:
            # with a ReLU some products have one sign only, where differences do not show
            maps, refused = {}, {}
            for form in forms:
                try:
                    probe = Probe(Network(form, True))
                    relevance = probe.explain(composites[label]())[1]
                    if label == 'relative':
                        relevance = relevance / relevance.abs().sum((1, 2, 3), keepdim=True)
                    maps[form] = relevance
                except Exception as error:
                    refused[form] = describe(error)
            if maps:
                reference, *others = maps.items()
                tolerance = 1e-6 if label == 'block' else TOLERANCE
                for form, relevance in others:
                    if difference := differ(reference[1], relevance, tolerance):
                        yield f'{form}  vs  {reference[0]}', label, 'twins differ', f'by {difference:.1e}'
            for form, (outcome, note) in refused.items():
                yield form, label, outcome if maps or outcome == 'crash' else 'refuses', note


def cell(results):
    '''Outcome of all runs of a form.'''
    outcomes = sorted({outcome for outcome, _ in results}, key=lambda elem: (elem not in FAULTS, elem))
    # what passes is often the identity after a ReLU
    return ', '.join(outcomes if outcomes != ['conserves', 'passes'] else ['passes'])


def shorten(note):
    '''A note without what all of them have in common.'''
    note = re.sub(r'^the model \(Network\) uses \'(\S+)\' on tensors that carry relevance, and ', r'\1: ', note)
    return note.replace('|', '\\|')[:200]


def table(rows):
    '''Lines of a table of rows: forms of one name with one outcome together.'''
    merged = {}
    for name, form, found in rows:
        cells = tuple(cell(found[label]) for label in COMPOSITES)
        notes = list(dict.fromkeys(shorten(note) for results in found.values() for _, note in results if note))
        merged.setdefault((name, cells, tuple(notes[:2])), []).append(form)
    lines = ['| function | ' + ' | '.join(TITLES.values()) + ' | note |', '|---' * (len(TITLES) + 2) + '|']
    for (_, cells, notes), forms in merged.items():
        code = ', '.join('`' + form.replace('|', '\\|') + '`' for form in forms)
        lines.append(f'| {code} | ' + ' | '.join(cells) + f' | {"; ".join(notes)} |')
    return lines


def run(names=None, with_database=True, progress=False):
    '''Run everything.

    Parameters
    ----------
    names: list of str, optional
        Patterns of names or code. By default, everything is run.
    with_database: bool, optional
        Whether the samples of PyTorch's own tests are run, too.
    progress: bool, optional
        Whether a line is printed now and then.

    Returns
    -------
    tuple
        Rows (group, name, form, outcomes of all composites), skipped rows (group, name, form, reason), and differences
        of twins (form, composite, outcome, note).
    '''
    rows, skipped = [], []
    start, num = time.time(), 0
    for group, name, code, layer, with_matrix in rows_of(names):
        found = attempt(code, layer, with_matrix=with_matrix)
        form = code if layer is None else layer if re.fullmatch(r'layer\([hvdu]\)', code) else f'{layer} -> {code}'
        (skipped if isinstance(found, str) else rows).append((group, name, form, found))
        num += 1
        if progress and num % 100 == 0:
            print(f'{num} forms, {time.time() - start:.0f} s', file=sys.stderr, flush=True)
    samples = {}
    for name, form, function in database() if with_database else ():
        if names and not any(fnmatch.fnmatch(name, pattern) for pattern in names):
            continue
        found = attempt(function, full=False)
        if isinstance(found, str):
            samples.setdefault((name, form), None)
            continue
        before = samples.get((name, form)) or {label: [] for label in COMPOSITES}
        samples[name, form] = {label: list(dict.fromkeys(before[label] + found[label])) for label in COMPOSITES}
        num += 1
        if progress and num % 100 == 0:
            print(f'{num} forms, {time.time() - start:.0f} s, {name}', file=sys.stderr, flush=True)
    for (name, form), found in samples.items():
        text = name if form == 'function' else f'{name}, {form}'
        (skipped if found is None else rows).append((SAMPLES, name, text, found))
    return rows, skipped, list(compare_twins(names))


INTRODUCTION = '''# Operations, one by one

Generated by `python benchmarks/sweep.py --out docs/results/operations.md` (PyTorch {version}). Each function or layer
is in a small network in double precision, after a convolution with and without a ReLU; names are in
`benchmarks/sweep_specs.py`.

- **conserves**: the relevance of the input sums to the initial relevance, the output is the same bit for bit, the
  network is as before, and each image has the map which it has alone. Linear functions have z+ of their matrix.
- **passes**: so it does, as the function works on each element: relevance stays where it is, whatever the values.
- **absorbs**: constants in its output that are not zero keep what they receive.
- **refuses**: an error: its first sentence is in the last column.
- **exact** (`BlockLRP`): gradient × input / (y − b), the closed form of the method, or **finite** where biases of
  linear layers in between are left out. `RelativeLRP` does not conserve: **finite**, and independent of the batch.

'''


def write(rows, skipped, twins):
    '''The page with all tables.'''
    is_fault = [any(outcome in FAULTS for results in found.values() for outcome, _ in results) for *_, found in rows]
    faults = [row[1:] for row, bad in zip(rows, is_fault) if bad]
    lines = INTRODUCTION.format(version=torch.__version__.partition('+')[0]).splitlines()
    if faults or any(outcome in FAULTS for _, _, outcome, _ in twins):
        lines += ['## Faults', '', *table(faults), '']
    if twins:
        lines += ['## Spellings that differ', '', '| form | composite | outcome | note |', '|---' * 4 + '|']
        lines += [f'| `{form}` | {label} | {outcome} | {shorten(note)} |' for form, label, outcome, note in twins]
        lines.append('')
    known = set(re.findall(r'\w+', ' '.join(FUNCTIONS.values())))
    good = [row for row, bad in zip(rows, is_fault) if not bad and (
        row[0] != SAMPLES or re.split('[ .]', row[1].partition(' (')[0])[-1] not in known)]
    for group in dict.fromkeys(row[0] for row in good):
        lines += ['## ' + group.capitalize(), '']
        if group == SAMPLES:
            lines += ['One image; the first of the inputs, or all of them, depend on it. Names that are in the tables '
                      'above are run, but left out here.', '']
        parts = {'conserves': [], 'passes': [], 'absorbs': [], 'refuses': [], 'depends on the form or the sign': []}
        for _, *row in (row for row in good if row[0] == group):
            parts.get(cell(row[2]['ratio']), parts['depends on the form or the sign']).append(row)
        for outcome, part in parts.items():
            if part:
                lines += [f'### {outcome.capitalize()}', '', *table(part), '']
    if skipped:
        names = ', '.join(f'`{form}`' for _, _, form, _ in skipped)
        lines += ['## Without a gradient', '', f'In double precision, or for these arguments: {names}.', '']
    return '\n'.join(lines)


def summarize(rows, skipped, twins):
    '''Counts of outcomes, and all faults by kind, as lines.'''
    lines = []
    for label in COMPOSITES:
        counts = collections.Counter(cell(found[label]) for *_, found in rows)
        lines.append(f'{label:9} ' + ', '.join(f'{outcome} {num}' for outcome, num in counts.most_common()))
    lines.append(f'{len(rows)} rows, {len(skipped)} without a gradient, {len(twins)} differences of twins')
    kinds = collections.defaultdict(dict)
    for group, _, form, found in rows:
        for label, results in found.items():
            for outcome, note in results:
                if outcome in FAULTS:
                    kinds[outcome, label].setdefault(form, f'[{group}] {note}')
    for form, label, outcome, note in twins:
        kinds[f'twins: {outcome}', label][form] = note
    for (outcome, label), faults in sorted(kinds.items()):
        lines += ['', f'## {outcome}, {label}: {len(faults)}', *(f'- {form}   {note}' for form, note in faults.items())]
    return lines


def main():
    '''Run, and print faults by kind.'''
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--out', help='Markdown page to write')
    parser.add_argument('--names', action='append', help='pattern of names or code, everything by default')
    parser.add_argument('--no-database', action='store_true', help='leave out the samples of PyTorch\'s own tests')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    rows, skipped, twins = run(args.names, not args.no_database, progress=True)
    if args.out:
        Path(args.out).write_text(write(rows, skipped, twins))
    print('\n'.join(summarize(rows, skipped, twins)))
    for group, name, form, reason in skipped:
        if group != SAMPLES:
            print(f'skipped: {name}: {form}: {reason}')
    faults = [row for row in rows if any(outcome in FAULTS for results in row[3].values() for outcome, _ in results)]
    return 1 if faults or any(outcome in FAULTS for _, _, outcome, _ in twins) else 0


if __name__ == '__main__':
    sys.exit(main())
