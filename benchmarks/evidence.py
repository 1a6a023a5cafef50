'''Which map is faithful, and is evidence for the asked class: all rules and contrasts by one command.

For photographs: the ID score (insertion minus deletion, where ties enter together and a constant map has zero), and
the similarity of the map with that of the runner-up. For mosaics of confident photographs: the share of positive
relevance in the asked class's own cell. For a few photographs: the similarity with maps of a network of which the
last layers are random. Images are divided into two halves: choose a method on one, and report it on the other.

Methods have the names of the evaluator. Three things are added: ``METHOD~15`` is smoothed by means of 15 x 15 pixels,
and ``0.5*METHOD | 0.5*METHOD`` is a sum of maps. As relevance is linear in what it starts from, this is the map of the
weighted contrast. Each result is a line of a file. What is there already is not computed again.
'''
import argparse
import json
import math
import sys
import time
import warnings
from collections import defaultdict
from functools import partial

import torch
from torch.nn.functional import avg_pool2d
from zennit.attribution import Gradient

from captum_adapters.evaluation.data import Images, read_samples
from captum_adapters.evaluation.methods import Context, Method
from captum_adapters.metrics import class_sensitivity, grid_pointing, insertion_deletion, mosaics, randomization
from captum_adapters.metrics.statistics import bootstrap_interval, compare
from zennit_resnet.attribution import initial_relevance
from zennit_resnet.methods import find_entries, split_names
from zennit_resnet.models import load_classifier

try:
    from zennit_resnet.attributors import ManyTargets
except ImportError:
    ManyTargets = None

BASELINE = 'grad_cam'
CONTRASTS = ('centred', 'softmax', 'runner_up')
# rules that divide by the output start from the logit, others from one, whatever the sign of the logit
RULES = {
    'resnet_lrp_ratio:first_layer=zbox': 'one',
    'resnet_lrp_ratio:first_layer=zbox,classifier=epsilon': 'logit',
    'resnet_lrp_symmetric:first_layer=zbox': 'one',
    'resnet_lrp_symmetric:first_layer=zbox,classifier=epsilon': 'logit',
    'relative_lrp': 'one',
    'block_lrp': 'logit',
}
OTHERS = (
    BASELINE, 'integrated_gradients:n_steps=20', 'input_x_gradient', 'constant', 'gaussian', 'sobel',
)
# what a measure gives, and how many digits of it are shown
COLUMNS = {'photo': ('id', 'pearson', 'ssim'), 'grid2': ('share',), 'grid3': ('share',), 'random': ('fc', 'layer4')}
LAYERS = ('fc', 'layer4')


def default_methods():
    '''All rules with all contrasts, and one of half the weight; baselines and controls.'''
    found = []
    for rule, initial in RULES.items():
        options = f'{rule}{"," if ":" in rule else ":"}'
        found += [f'{options}initial={initial}', *(f'{options}contrast={name}' for name in CONTRASTS)]
        found.append(f'0.5*{options}initial={initial} | 0.5*{options}contrast=softmax')
    return [*found, *OTHERS]


class Question:
    '''A weighted sum of maps of methods, which may be smoothed.'''
    def __init__(self, text):
        self.text = text
        body, _, side = text.partition('~')
        self.side = int(side or 1)
        if self.side % 2 == 0:
            raise ValueError(f'{text}: the side {self.side} is even, but has to be odd')
        self.terms = []
        for term in body.split(' | '):
            weight, star, name = term.rpartition('*')
            self.terms.append((float(weight) if star else 1., Method(name)))

    def combine(self, maps):
        '''The map, given those of all methods by their names.'''
        heatmap = sum(weight * maps[method.text] for weight, method in self.terms)
        if self.side == 1:
            return heatmap
        return avg_pool2d(heatmap[:, None], self.side, 1, self.side // 2, count_include_pad=False)[:, 0]


class Study:
    '''A network, and methods whose maps are computed together where they have rules in common.'''
    def __init__(self, classifier, questions, batch, amp):
        self.classifier, self.batch, self.amp = classifier, batch, amp
        context = Context(classifier, forward_batch=batch)
        self.rules, self.explainers = {}, {}
        composites = find_entries()
        for method in {elem.text: elem for question in questions for _, elem in question.terms}.values():
            if method.name in composites and method.entry.composite is not None:
                key = (method.name, tuple(sorted(method.options.items())), method.splitting)
                self.rules.setdefault(key, []).append(method)
            else:
                self.explainers[method.text] = method.create(context)

    def scores(self, images):
        '''Outputs of the network, perhaps in lower precision.'''
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=self.amp):
            return self.classifier.model(images).float()

    def maps(self, image, targets, name, questions):
        '''Maps of shape (targets, height, width) by question, of an image of shape (1, 3, height, width).'''
        found, wanted = {}, {method.text for question in questions for _, method in question.terms}
        for methods in self.rules.values():
            methods = [method for method in methods if method.text in wanted]
            if methods:
                found.update(self._relevance(image, targets, methods))
        images, index = image.expand(len(targets), -1, -1, -1), torch.tensor(targets)
        for text in wanted & self.explainers.keys():
            output = self.scores(image).expand(len(targets), -1)
            found[text] = self.explainers[text](images, index, output, [name] * len(targets))
        return {question.text: question.combine(found) for question in questions}

    def _relevance(self, image, targets, methods):
        '''Maps of methods with the same composite.'''
        starts = [
            initial_relevance(target, method.initial, contrast=method.contrast)
            for method in methods for target in targets
        ]
        composite = methods[0].composite(self.classifier)
        if ManyTargets is None:
            with Gradient(self.classifier.model, composite) as attributor:
                relevance = torch.stack([attributor(image.clone(), start)[1] for start in starts])
        else:
            with ManyTargets(self.classifier.model, composite) as attributor:
                relevance = attributor(image.clone(), starts)[1]
        parts = relevance.detach().sum(2)[:, 0].split(len(targets))
        return {method.text: method.process(part) for method, part in zip(methods, parts)}

    def photo(self, image, name, steps, questions):
        '''ID score, and similarity of the map with that of the runner-up.'''
        target, rival = self.classifier.model(image).topk(2).indices[0].tolist()
        maps = self.maps(image, [target, rival], name, questions)
        for text, (own, other) in maps.items():
            row = {'target': target}
            if steps:
                result = insertion_deletion(
                    self.scores, image, own[None], target=target, n_steps=steps, max_examples_per_batch=self.batch
                )
                row |= {'id': float(result.id_score), 'insertion': float(result.insertion)}
            similar = class_sensitivity(own[None], other[None])
            yield text, row | {'pearson': float(similar.pearson), 'ssim': float(similar.ssim)}

    def grid(self, mosaic, name, questions):
        '''Share of positive relevance in the own cell, for each cell.'''
        targets = mosaic.cells.flatten().tolist()
        for text, maps in self.maps(mosaic.images, targets, name, questions).items():
            cells = mosaic.cells.expand(len(targets), -1, -1)
            shares = grid_pointing(maps, cells, targets).share.tolist()
            yield text, {'share': sum(shares) / len(shares), 'shares': [round(share, 5) for share in shares]}

    def random(self, image, name, questions):
        '''SSIM with maps of networks whose last layers are random.'''
        target = int(self.classifier.model(image).argmax())

        def explain(model):
            return torch.cat([*self.maps(image, [target], name, questions).values()])

        result = randomization(self.classifier.model, explain, LAYERS)
        for question, values in zip(questions, result.ssim.tolist()):
            yield question.text, dict(zip(LAYERS, values))


class Results:
    '''Lines of a file, by measure, item and method.'''
    def __init__(self, path, settings):
        self.rows = {}
        # pylint: disable-next=consider-using-with
        self.file = open(path, 'a+', encoding='utf-8')
        self.file.seek(0)
        lines = self.file.readlines()
        if lines and not lines[-1].endswith('\n'):
            # incomplete, as the machine went off
            lines.pop()
            self.file.truncate(sum(len(line.encode()) for line in lines))
        if not lines:
            self.file.write(json.dumps(settings) + '\n')
        elif json.loads(lines[0]) != settings:
            raise ValueError(f'{path} has other settings, {lines[0].strip()}, than {json.dumps(settings)}')
        for line in lines[1:]:
            self._keep(json.loads(line))

    def _keep(self, row):
        self.rows[row['measure'], row['item'], row['method']] = row

    def add(self, **row):
        '''Write a line at once.'''
        self.file.write(json.dumps(row) + '\n')
        self.file.flush()
        self._keep(row)


def in_halves(samples):
    '''Samples in an order in which both halves, and within them all classes, take turns.'''
    halves, seen = ([], []), defaultdict(int)
    for sample in samples:
        rank = seen[sample.label]
        seen[sample.label] += 1
        halves[rank % 2].append((rank // 2, sample.label, sample))
    return [[sample for *_, sample in sorted(half, key=lambda elem: elem[:2])] for half in halves]


def make_mosaics(halves, loaded, results, size, count, threshold, full_size):
    '''Mosaics of each half in turn, with a name and the number of the half.'''
    made = []
    for half in halves:
        images = torch.stack([loaded[sample.name] for sample in half])
        scores = torch.tensor([results.rows['scores', sample.name, '']['scores'] for sample in half])
        made.append(mosaics(
            images, [sample.label for sample in half], size, count=math.ceil(count / 2), scores=scores.softmax(1),
            threshold=threshold, rescale=not full_size,
        ))
    for num in range(count):
        half, index = num % 2, num // 2
        mosaic = type(made[half])(*(field[index:index + 1] for field in made[half]))
        yield half, f'{half}:' + ','.join(map(str, mosaic.indices.flatten().tolist())), mosaic


def tasks_of(study, args, results):
    '''All that is to be computed, such that all measures make progress: (measure, half, item, function).'''
    listing = read_samples(args.data, study.classifier.classes)
    usable = [sample for sample in listing.samples if sample.problem is None and sample.label is not None]
    halves, images = in_halves(usable), Images(usable, study.classifier.transform)
    loaded = {sample.name: images[index].image for index, sample in enumerate(usable)}
    for begin in range(0, len(usable), args.batch):
        part = [sample for sample in usable[begin:begin + args.batch]
                if ('scores', sample.name, '') not in results.rows]
        if part:
            with torch.no_grad():
                output = study.classifier.model(torch.stack([loaded[sample.name] for sample in part]))
            for sample, row in zip(part, output.tolist()):
                results.add(measure='scores', item=sample.name, method='', scores=row)
    tasks = []

    def add(measure, number, count, half, item, function):
        tasks.append((number / count, measure, half, item, function))

    photos = [sample.name for pair in zip(*halves) for sample in pair]
    for num, name in enumerate(photos[:args.images]):
        add('photo', num, args.images, num % 2, name, partial(study.photo, loaded[name][None], name, args.steps))
    for num, name in enumerate(photos[:args.randomized]):
        add('random', num, args.randomized, num % 2, name, partial(study.random, loaded[name][None], name))
    for size, count in ((2, args.mosaics), (3, args.mosaics3)):
        found = make_mosaics(halves, loaded, results, size, count, args.threshold, args.full_size) if count else ()
        for num, (half, item, mosaic) in enumerate(found):
            add(f'grid{size}', num, count, half, item, partial(study.grid, mosaic, item))
    return [task[1:] for task in sorted(tasks, key=lambda task: task[0])]


def summarize(rows, methods, min_count=2):
    '''Tables of means with 95 % intervals, of both halves, and differences to Grad-CAM, as Markdown.'''
    for measure, columns in COLUMNS.items():
        for column in columns:
            values = defaultdict(dict)
            for row in rows:
                if row['measure'] == measure and column in row and row['method'] in methods:
                    values[row['method']][row['item']] = (row['half'], row[column])
            values = {name: values[name] for name in methods if len(values[name]) >= min_count}
            if not values:
                continue
            print(f'\n{measure}: {column}\n\n| method | n | first half | second half | all | minus `{BASELINE}` |')
            print('|---|---|---|---|---|---|')
            for name, found in values.items():
                cells = [
                    _mean([value for half, value in found.values() if half in halves])
                    for halves in ((0,), (1,), (0, 1))
                ]
                label = name.replace('|', '\\|')
                print(f'| `{label}` | {len(found)} | {" | ".join(cells)} | {_difference(found, values, name)} |')


def _mean(values):
    '''A mean with its interval.'''
    if not values:
        return ''
    mean, low, high, *_ = bootstrap_interval(values)
    return f'{float(mean):.3f} [{float(low):.3f}, {float(high):.3f}]'


def _difference(found, values, name):
    '''The paired difference to the baseline, on the items that both have.'''
    base = values.get(BASELINE, {})
    common = sorted(found.keys() & base.keys())
    if name == BASELINE or len(common) < 2:
        return ''
    result, = compare(
        {name: [found[key][1] for key in common], BASELINE: [base[key][1] for key in common]}, baseline=BASELINE
    )
    return f'{result.difference:+.3f} [{result.low:+.3f}, {result.high:+.3f}]'


def main():
    '''Compute what is missing, and print tables.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', required=True, help='images in one of the layouts of the evaluator')
    parser.add_argument('--model', help='network of torchvision, for --weights')
    parser.add_argument('--weights', help='default: the embedded ResNet-50')
    parser.add_argument('--images', type=int, default=32, help='photographs of the ID score (default: %(default)s)')
    parser.add_argument('--mosaics', type=int, default=24, help='mosaics of 2 x 2 (default: %(default)s)')
    parser.add_argument('--mosaics3', type=int, default=0, help='mosaics of 3 x 3 (default: %(default)s)')
    parser.add_argument('--randomized', type=int, default=0, help='photographs for random layers (default: 0)')
    parser.add_argument('--methods', help='separated by commas, or @FILE with one a line (default: the whole table)')
    parser.add_argument('--steps', type=int, default=20, help='intervals of both curves (default: %(default)s)')
    parser.add_argument('--threshold', type=float, default=0.9, help='probability in mosaics (default: %(default)s)')
    parser.add_argument('--full-size', action='store_true', help='do not shrink mosaics to the size of an image')
    parser.add_argument('--amp', action='store_true', help='bfloat16 for the curves of the ID score')
    parser.add_argument('--batch', type=int, default=8, help='images of a forward pass (default: %(default)s)')
    parser.add_argument('--out', default='evidence.jsonl', help='file of the results (default: %(default)s)')
    parser.add_argument('--summary', action='store_true', help='print tables of what is there, and compute nothing')
    args = parser.parse_args()
    names = default_methods() if args.methods is None else split_names(args.methods)
    if args.methods is not None and args.methods.startswith('@'):
        with open(args.methods[1:], encoding='utf-8') as file:
            names = [line.strip() for line in file if line.strip()]
    settings = {key: getattr(args, key) for key in ('data', 'weights', 'steps', 'threshold', 'full_size', 'amp')}
    try:
        questions = [Question(name) for name in names]
        results = Results(args.out, settings)
        study = Study(load_classifier(args.model, args.weights), questions, args.batch, args.amp)
    except ValueError as error:
        parser.error(str(error))
    # that hooks are set, that maps may be negative, and that Zennit merges batch normalization
    warnings.simplefilter('ignore')
    begin = time.perf_counter()
    for measure, half, item, function in () if args.summary else tasks_of(study, args, results):
        todo = [question for question in questions if (measure, item, question.text) not in results.rows]
        for text, row in function(todo) if todo else ():
            results.add(measure=measure, item=item, half=half, method=text, **row)
        print(f'{time.perf_counter() - begin:7.0f} s {measure} {item}', file=sys.stderr, flush=True)
    summarize([*results.rows.values()], [question.text for question in questions])


if __name__ == '__main__':
    main()
