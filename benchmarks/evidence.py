'''Which map is faithful, and is evidence for the asked class: all rules and contrasts by one command.

For photographs: the ID score (insertion minus deletion, where ties enter together and a constant map has zero), and
the similarity of the map with that of the runner-up. For mosaics of confident photographs: the share of positive
relevance in the asked class's own cell. For a few photographs: the similarity with maps of a network whose last
layers are random. Images are divided into two halves: choose a method on one, and report it on the other.

Methods have the names of the evaluator. Three things are added: ``METHOD~15`` is smoothed by means of 15 x 15 pixels,
and ``0.5*METHOD | 0.5*METHOD`` is a sum of maps. Each result is a line of a file. What is there already is not
computed again.
'''
import argparse
import copy
import json
import math
import sys
import time
import warnings
from collections import Counter, defaultdict
from itertools import zip_longest

import torch
from evidence_data import find_network, read_photos
from torch.nn.functional import avg_pool2d

from captum_adapters.evaluation.methods import Context, Method
from captum_adapters.metrics import (
    Mosaics,
    class_sensitivity,
    contrastive_insertion_deletion,
    grid_pointing,
    insertion_deletion,
    mosaics,
    randomization,
)
from captum_adapters.metrics.statistics import bootstrap_interval, compare
from zennit_resnet._choices import split_names
from zennit_resnet.attribution import initial_relevance
from zennit_resnet.attributors import ManyTargets
from zennit_resnet.methods import find_entries

# by what they are called in tables: the second is the map of z+ alone
BASELINES = {'Grad-CAM': 'grad_cam', 'z+': 'resnet_lrp_ratio:first_layer=zbox,initial=one'}
# first, second and both
HALVES = ((0,), (1,), (0, 1))
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
    'grad_cam', 'score_cam', 'integrated_gradients:n_steps=20', 'input_x_gradient', 'constant', 'gaussian', 'sobel',
)
# what a measure gives, and how many digits of it are shown
COLUMNS = {
    'photo': ('id', 'contrastive', 'pearson', 'ssim'), 'grid2': ('share',), 'grid3': ('share',), 'random': None
}


def default_methods():
    '''All rules with all contrasts, also of less weight where that is any good; baselines and controls.'''
    found = []
    for rule, initial in RULES.items():
        options = f'{rule}{"," if ":" in rule else ":"}'
        found += [f'{options}initial={initial}', *(f'{options}contrast={name}' for name in CONTRASTS)]
        if 'classifier=epsilon' in rule:
            found += [f'{options}contrast=softmax,contrast_weight={weight}' for weight in (0.25, 0.5)]
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
    def __init__(self, classifier, questions, options):
        self.classifier, self.options = classifier, options
        self.photos = read_photos(options.data, classifier)
        # a copy, as the order of values in memory may change the last bits of maps
        self.curves = copy.deepcopy(classifier.model).to(memory_format=torch.channels_last)
        context = Context(classifier, forward_batch=options.batch)
        self.rules, self.explainers = {}, {}
        composites = find_entries()
        for method in {elem.text: elem for question in questions for _, elem in question.terms}.values():
            if method.name in composites and method.entry.composite is not None:
                key = (method.name, tuple(sorted(method.options.items())), method.splitting)
                self.rules.setdefault(key, []).append(method)
            else:
                self.explainers[method.text] = method.create(context)

    def counts(self):
        '''How many items each measure has.'''
        options = self.options
        return {
            'photo': options.images, 'random': options.randomized, 'grid2': options.mosaics, 'grid3': options.mosaics3
        }

    def scores(self, images):
        '''Outputs of the network for the curves, perhaps in lower precision.'''
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=self.options.amp):
            return self.curves(images).float()

    def maps(self, images, targets, names, questions):
        '''Maps of shape (targets, images, height, width) by question, of images of shape (images, 3, height, width).

        Targets are of shape (targets, images).
        '''
        found, wanted = {}, {method.text for question in questions for _, method in question.terms}
        for methods in self.rules.values():
            methods = [method for method in methods if method.text in wanted]
            if methods:
                found.update(self._relevance(images, targets, methods))
        explainers = wanted & self.explainers.keys()
        if explainers:
            with torch.no_grad():
                output = self.classifier.model(images)
            for text in explainers:
                found[text] = torch.stack([self.explainers[text](images, row, output, names) for row in targets])
        return {question.text: question.combine(found) for question in questions}

    def _relevance(self, images, targets, methods):
        '''Maps of methods with the same composite.'''
        starts = [
            initial_relevance(row, method.initial, contrast=method.contrast, contrast_weight=method.contrast_weight)
            for method in methods for row in targets
        ]
        with ManyTargets(self.classifier.model, methods[0].composite(self.classifier)) as attributor:
            relevance = attributor(images.clone(), starts)[1]
        parts = relevance.detach().sum(2).split(len(targets))
        return {
            method.text: method.process(part.flatten(0, 1)).view_as(part) for method, part in zip(methods, parts)
        }

    def photo(self, images, names, questions):
        '''ID scores, and similarity of the map with that of the runner-up.'''
        with torch.no_grad():
            target, rival = self.classifier.model(images).topk(2).indices.T
        settings = {'n_steps': self.options.steps, 'max_examples_per_batch': self.options.batch}
        for text, (own, other) in self.maps(images, torch.stack([target, rival]), names, questions).items():
            outputs = []

            def record(images, _, outputs=outputs):
                outputs.append(self.scores(images))
                return outputs[-1]

            # with an argument for each image, so that both have the same images in the same order
            result = insertion_deletion(record, images, own, None, target, rival, **settings)
            known = iter(outputs)
            contrast = contrastive_insertion_deletion(
                lambda _, known=known: next(known), images, own, target=target, rival=rival, **settings
            )
            similar = class_sensitivity(own, other)
            row = {
                'target': target, 'id': result.id_score, 'insertion': result.insertion,
                'contrastive': contrast.id_score, 'pearson': similar.pearson, 'ssim': similar.ssim,
            }
            yield text, row

    def grid(self, mosaics, names, questions):
        '''Share of positive relevance in the own cell, mean of all cells.'''
        targets = mosaics.cells.flatten(1).T
        for text, maps in self.maps(mosaics.images, targets, names, questions).items():
            shares = [grid_pointing(*each).share for each in zip(maps, [mosaics.cells] * len(targets), targets)]
            yield text, {'share': torch.stack(shares).mean(0)}

    def random(self, images, names, questions):
        '''SSIM with maps of networks whose last layers are random.'''
        with torch.no_grad():
            target = self.classifier.model(images).argmax(1)[None]

        def explain(model):
            return torch.cat([maps[0] for maps in self.maps(images, target, names, questions).values()])

        result = randomization(self.classifier.model, explain, self.options.layers.split(','))
        for question, ssim in zip(questions, result.ssim.split(len(images))):
            yield question.text, dict(zip(result.layers, ssim.T))


def names_of(mosaics):
    '''Names of mosaics by the numbers of their images.'''
    return [','.join(map(str, row)) for row in mosaics.indices.flatten(1).tolist()]


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


def in_halves(photos):
    '''Photos in an order in which both halves, and within them all classes, take turns.'''
    halves, seen = ([], []), defaultdict(int)
    single = len({photo.label for photo in photos}) == len(photos)
    for num, photo in enumerate(photos):
        rank = num if single else seen[photo.label]
        seen[photo.label] += 1
        halves[rank % 2].append((rank // 2, photo.label, photo))
    return [[photo for *_, photo in sorted(half, key=lambda elem: elem[:2])] for half in halves]


def make_mosaics(halves, results, size, count, options, focus=False):
    '''Mosaics of each half in turn, with a name and the number of the half.'''
    made = []
    for half in halves:
        scores = torch.tensor([results.rows['scores', photo.name, '']['scores'] for photo in half])
        made.append(mosaics(
            torch.stack([photo.image if photo.cell is None else photo.cell for photo in half]),
            [photo.label for photo in half], size, focus=focus, count=math.ceil(count / 2), scores=scores.softmax(1),
            threshold=options.threshold, rescale=not options.full_size,
        ))
    for num in range(count):
        half, index = num % 2, num // 2
        mosaic = Mosaics(*(field[index:index + 1] for field in made[half]))
        yield half, f'{half}:{names_of(mosaic)[0]}', mosaic


def tasks_of(study, results):
    '''All that is to be computed, in an order in which all measures make progress: (measure, half, item, input).'''
    options, photos = study.options, study.photos
    halves = in_halves(photos)
    for begin in range(0, len(photos), options.batch):
        part = [photo for photo in photos[begin:begin + options.batch]
                if ('scores', photo.name, '') not in results.rows]
        if part:
            with torch.no_grad():
                output = study.classifier.model(torch.stack([photo.image for photo in part]))
            for photo, row in zip(part, output.tolist()):
                results.add(measure='scores', item=photo.name, method='', scores=row, label=photo.label)
    tasks = []

    def add(measure, items, count):
        tasks.extend((num / count, measure, *item) for num, item in enumerate(items))

    ordered = [(num % 2, photo.name, photo.image[None])
               for num, photo in enumerate(photo for pair in zip_longest(*halves) for photo in pair if photo)]
    for measure, count in study.counts().items():
        if measure[-1].isdigit():
            size, focus = int(measure[-1]), measure.startswith('focus')
            add(measure, make_mosaics(halves, results, size, count, options, focus) if count else (), count)
        else:
            add(measure, ordered[:count], count)
    return [task[1:] for task in sorted(tasks, key=lambda task: task[0])]


def compute(study, results, questions, measure, tasks):
    '''Add what results do not have of items of the same measure, which are computed together.'''
    halves, names, inputs = zip(*tasks)
    todo = [question for question in questions
            if any((measure, name, question.text) not in results.rows for name in names)]
    if not todo:
        return
    if isinstance(inputs[0], Mosaics):
        batch = Mosaics(*map(torch.cat, zip(*inputs)))
        arguments = batch, names_of(batch)
    else:
        arguments = torch.cat(inputs), names
    found = getattr(study, measure.rstrip('0123456789'))(*arguments, todo)
    for text, columns in found:
        values = zip(*(column.tolist() for column in columns.values()))
        for half, name, row in zip(halves, names, values):
            if (measure, name, text) not in results.rows:
                results.add(measure=measure, item=name, half=half, method=text, **dict(zip(columns, row)))


def run(study, results, questions):
    '''Compute all that is missing, and say how far it is.'''
    begin, waiting = time.perf_counter(), defaultdict(list)
    tasks = tasks_of(study, results)
    left = Counter(measure for measure, *_ in tasks)
    for measure, *task in tasks:
        waiting[measure].append(task)
        left[measure] -= 1
        if len(waiting[measure]) == study.options.group or not left[measure]:
            compute(study, results, questions, measure, waiting.pop(measure))
            print(f'{time.perf_counter() - begin:7.0f} s {measure}, {left[measure]} left', file=sys.stderr, flush=True)


def summarize(rows, methods, min_count=2):
    '''Tables of means with 95 % intervals, and of paired differences to baselines, as Markdown.'''
    for measure, columns in COLUMNS.items():
        known = {'measure', 'item', 'half', 'method'}
        layers = {key: None for row in rows if row['measure'] == measure for key in row if key not in known}
        for column in columns or layers:
            values = defaultdict(dict)
            for row in rows:
                if row['measure'] == measure and column in row and row['method'] in methods:
                    values[row['method']][row['item']] = (row['half'], row[column])
            values = {name: values[name] for name in methods if len(values[name]) >= min_count}
            if not values:
                continue
            print(f'\n## {measure}: {column}\n\n| method | n | first half | second half | all '
                  f'{"".join(f"| minus {title}, all | second half " for title in BASELINES)}|')
            print(f'|---|{"---|" * (4 + 2 * len(BASELINES))}')
            for name, found in values.items():
                cells = [_mean([value for half, value in found.values() if half in halves]) for halves in HALVES]
                cells += [
                    '' if name == base else _difference(found, values.get(base, {}), halves)
                    for base in BASELINES.values() for halves in (HALVES[2], HALVES[1])
                ]
                label = name.replace('|', '\\|')
                print(f'| `{label}` | {len(found)} | {" | ".join(cells)} |')


def _mean(values):
    '''A mean with its interval.'''
    if not values:
        return ''
    mean, low, high, *_ = bootstrap_interval(values)
    return f'{float(mean):.3f} [{float(low):.3f}, {float(high):.3f}]'


def _difference(found, base, halves):
    '''The paired difference to a baseline, on the items that both have.'''
    common = sorted(key for key in found.keys() & base.keys() if found[key][0] in halves)
    if len(common) < 2:
        return ''
    result, = compare(
        {'method': [found[key][1] for key in common], 'base': [base[key][1] for key in common]}, baseline='base'
    )
    return f'{result.difference:+.3f} [{result.low:+.3f}, {result.high:+.3f}]'


def add_options(parser, steps, out):
    '''Add what all studies can be told.'''
    parser.add_argument('--data', required=True, help='images in one of the layouts of the evaluator, or digits')
    parser.add_argument('--model', help='a network of evidence_data.py, or of torchvision (default: the embedded one)')
    parser.add_argument('--weights', help='default: the embedded ResNet-50')
    parser.add_argument('--steps', type=int, default=steps, help='intervals of the ID score (default: %(default)s)')
    parser.add_argument('--threshold', type=float, default=0.9, help='probability in mosaics (default: %(default)s)')
    parser.add_argument('--full-size', action='store_true', help='do not shrink mosaics to the size of an image')
    parser.add_argument('--amp', action='store_true', help='bfloat16 for curves')
    parser.add_argument('--batch', type=int, default=8, help='images of a forward pass (default: %(default)s)')
    parser.add_argument('--group', type=int, default=1, help='images explained together (default: %(default)s)')
    parser.add_argument('--out', default=out, help='file of the results (default: %(default)s)')
    parser.add_argument('--summary', action='store_true', help='print tables of what is there, and compute nothing')


def main():
    '''Compute what is missing, and print tables.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, steps=20, out='evidence.jsonl')
    parser.add_argument('--images', type=int, default=32, help='photographs of the ID score (default: %(default)s)')
    parser.add_argument('--mosaics', type=int, default=24, help='mosaics of 2 x 2 (default: %(default)s)')
    parser.add_argument('--mosaics3', type=int, default=0, help='mosaics of 3 x 3 (default: %(default)s)')
    parser.add_argument('--randomized', type=int, default=0, help='photographs for random layers (default: 0)')
    parser.add_argument('--layers', default='fc,layer4', help='layers to be random (default: %(default)s)')
    parser.add_argument('--methods', help='separated by commas, or @FILE with one a line (default: the whole table)')
    options = parser.parse_args()
    names = default_methods() if options.methods is None else split_names(options.methods)
    if options.methods is not None and options.methods.startswith('@'):
        with open(options.methods[1:], encoding='utf-8') as file:
            names = [line.strip() for line in file if line.strip()]
    settings = {key: getattr(options, key) for key in ('data', 'weights', 'steps', 'threshold', 'full_size', 'amp')}
    # that hooks are set, that maps may be negative, and that Zennit merges batch normalization
    warnings.simplefilter('ignore')
    try:
        questions = [Question(name) for name in names]
        results = Results(options.out, settings)
        study = None if options.summary else Study(find_network(options.model, options.weights), questions, options)
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    if study:
        run(study, results, questions)
    print(f'# Class evidence in maps of {options.model or "the embedded ResNet-50"}\n\n'
          f'Curves of {options.steps} intervals{" in bfloat16" if options.amp else ""}; '
          f'mosaics {"of full size" if options.full_size else "shrunk to the size of an image"}, '
          f'of images with a probability of at least {options.threshold}. '
          'Intervals of 95 % by the bootstrap over images or mosaics, not corrected for the number of methods.')
    summarize([*results.rows.values()], [question.text for question in questions])


if __name__ == '__main__':
    main()
