'''One table of methods of all libraries: conservation, evidence, faithfulness, cost, and what they do to the network.

    pip install grad-cam torchcam mlxtend
    python benchmarks/peers.py --data IMAGENETTE --train IMAGENETTE_TRAIN --out resnet50.jsonl
    python benchmarks/peers.py --data IMAGENETTE --out resnet50.jsonl --cost
    python benchmarks/peers.py --data IMAGENETTE --out resnet50.jsonl --summary > docs/results/peers/resnet50.md

Every result is a line of a file, and what is there is not computed again: stop when it takes too long, and go on in
another environment (another version of Zennit) with the same file. Methods that take minutes for an image deserve a run
of their own: ``--methods 'torch-cam ScoreCAM;RISE' --images 4 --mosaics 1 --focus 4 --deletions 4``.
'''
import argparse
import copy
import statistics
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from cost import memory_status
from evidence import Results, Study, add_options, run
from evidence_data import find_network, read_photos
from peer_methods import CONVOLUTIONAL, METHODS, TRANSFORMER, add_dynamic_lrp, available
from peer_tables import BASE, summarize
from torchvision.transforms.v2.functional import gaussian_blur
from zennit.rules import Epsilon

from captum_adapters.attr import CompositeAttribution
from captum_adapters.evaluation.methods import CONTROLS, Method
from captum_adapters.metrics import (
    class_sensitivity,
    conservation_gap,
    grid_pointing,
    insertion_deletion,
    randomization,
)
from zennit_resnet import ResNetLRP

CONTRAST = 'first_layer=zbox,classifier=epsilon,contrast=softmax,contrast_weight=0.5'
OURS = {
    'ours: ratio': 'resnet_lrp_ratio:first_layer=zbox,initial=one',
    'ours: symmetric': 'resnet_lrp_symmetric:first_layer=zbox,initial=one',
    'ours: ratio, epsilon classifier': 'resnet_lrp_ratio:first_layer=zbox,classifier=epsilon,initial=logit',
    'ours: ratio, half a contrast': f'resnet_lrp_ratio:{CONTRAST}',
    'ours: symmetric, half a contrast': f'resnet_lrp_symmetric:{CONTRAST}',
    'ours: ratio, half a contrast, all dense layers by epsilon': '',
    'EpsilonGammaBox with our ratio splitting': 'epsilon_gamma_box:initial=logit+ratio',
    'the same, half a contrast': 'epsilon_gamma_box:initial=logit,contrast=softmax,contrast_weight=0.5+ratio',
    'ours: gamma': 'gamma_lrp',
    'ours: gamma, half a contrast': 'gamma_lrp:contrast=softmax,contrast_weight=0.5',
    'ours: gamma, half a contrast, first layer by zbox':
        'gamma_lrp:first_layer=zbox,contrast=softmax,contrast_weight=0.5',
    # 'attention' is for transformers, and 'dense' for convolutional networks of several such layers
    'ours: gamma, attention by halves': 'gamma_lrp:attention=half',
    'ours: gamma, attention by halves, half a contrast':
        'gamma_lrp:attention=half,contrast=softmax,contrast_weight=0.5',
    'ours: R-LRP': 'relative_lrp:initial=one',
    'ours: block': 'block_lrp:initial=logit',
    **{f'control: {name}': name for name in CONTROLS},
}
# of DynamicLRP: a blur of 51 pixels with a deviation of 20 for 224, and an x-axis from 0 to 4
KERNEL, SIGMA, SCALE = 51 / 224, 20 / 224, 4
CELLS = 4  # of IDSDS, in a row


class Bench(Study):
    '''A network, and explanations of it by methods of all libraries.'''
    def __init__(self, classifier, methods, options):
        self.classifier, self.options = classifier, options
        self.kind = TRANSFORMER if 'vit' in (options.model or '') else CONVOLUTIONAL
        self.peers = available([name for name in methods if name not in OURS], self.kind)
        dense = sum(isinstance(module, torch.nn.Linear) for module in classifier.model.modules())
        is_for = {'attention': self.kind == TRANSFORMER, 'dense': dense > 1 and self.kind == CONVOLUTIONAL}
        self.methods = [
            SimpleNamespace(text=name) for name in methods
            if name in self.peers or name in OURS and all(fits for word, fits in is_for.items() if word in name)
        ]
        self.curves = copy.deepcopy(classifier.model).to(memory_format=torch.channels_last)
        self.photos = read_photos(options.data, classifier)
        self.labels = {photo.name: photo.label for photo in self.photos}
        self.layer = last_map(classifier.model, self.photos[0].image[None])
        self.tuned = None

    def counts(self):
        '''How many items each measure has.'''
        options = self.options
        return {
            'photo': options.images, 'random': options.randomized, 'idsds': options.deletions,
            'grid2': options.mosaics, 'focus2': options.focus,
        }

    def explainer(self, name, model, network):
        '''A function from images, targets and names of images to relevance and what it ought to sum to, if anything.

        ``model`` is what the method gets, and may change; ``network`` is the same, and stays what it is. The sum may be
        a function that computes it.
        '''
        classifier = self.classifier._replace(model=model)
        if name.startswith('control'):
            control = partial(CONTROLS[OURS[name]], std=classifier.std)
            return lambda images, targets, names: (control(images, names), None)
        if name in OURS:
            method = Method(OURS[name] or OURS[BASE])
            composite, initial = method.composite(classifier), method.initial
            if not OURS[name]:
                # the rule of Zennit's composites, with which a contrast starts from the logit
                rule = Epsilon(1e-6, zero_params='bias')
                low, high = classifier.bounds()
                composite = ResNetLRP(first_layer='zbox', low=low, high=high, layer_map=[(torch.nn.Linear, rule)])
                initial = 'logit'
            lrp = CompositeAttribution(
                model, composite, initial, contrast=method.contrast, contrast_weight=method.contrast_weight
            )
            return lambda images, targets, names: lrp.propagate(images, targets)
        peer = self.peers[name]
        subject = SimpleNamespace(
            **classifier._asdict(), bounds=classifier.bounds, kind=self.kind, forward_batch=self.options.batch,
            cam_layer=model.get_submodule(self.layer),
        )
        explain = peer.create(model, subject)

        def attribute(images, targets, names):
            with torch.enable_grad():
                relevance = explain(images.clone(), targets).detach().float()
            return relevance, partial(initial_of, peer.sums_to, network, images, targets)

        return attribute

    def attribute(self, name, network, images, targets, names):
        '''Relevance, the gap of its conservation, and whether it is finite; where not, it is replaced by zeros.'''
        with torch.no_grad():
            relevance, initial = self.explainer(name, copy.deepcopy(network), network)(images, targets, names)
        relevance = relevance if relevance.ndim == 4 else relevance[:, None]
        gap = torch.full((len(images),), torch.nan)
        if callable(initial):
            # not part of what the method costs
            initial = initial()
        if initial is not None:
            gap = conservation_gap(relevance.double(), initial).abs()
        # sums have to be finite, too
        finite = relevance.flatten(1).abs().sum(1).isfinite()
        return relevance.where(finite[:, None, None, None], 0), gap, finite

    def explained(self, methods, *arguments):
        '''The same by the name of the method, without those that raise errors, which are said.'''
        for method in methods:
            try:
                yield method.text, *self.attribute(method.text, *arguments)
            except Exception as error:  # pylint: disable=broad-exception-caught
                print(f'{method.text}: {type(error).__name__}: {error}', file=sys.stderr)

    def photo(self, images, names, methods):
        '''Conservation, ID score, ABPC, and likeness to the map of the runner-up.'''
        with torch.no_grad():
            target, rival = self.classifier.model(images).topk(2).indices.T
        both = images.repeat(2, 1, 1, 1), torch.cat([target, rival]), [*names] * 2
        labels, side = torch.tensor([self.labels[name] for name in names]), images.shape[-1]
        blurred = gaussian_blur(images, [round(KERNEL * side) // 2 * 2 + 1] * 2, [SIGMA * side] * 2)
        settings = {'max_examples_per_batch': self.options.batch}
        for text, relevance, gap, finite in self.explained(methods, self.classifier.model, *both):
            own, other = relevance.sum(1).split(len(images))
            row = {'target': target, 'gap': gap[:len(images)], 'finite': finite[:len(images)]}
            score = insertion_deletion(self.scores, images, own, None, target, n_steps=self.options.steps, **settings)
            row['id'] = score.id_score
            # keeping the most relevant pixels is removing the least relevant ones
            magnitude, curves = relevance[:len(images)].abs().sum(1), None
            for key, maps in (('abpc', magnitude), ('abpc_signed', own)):
                # the same where nothing is negative
                curves = curves if maps is own and torch.equal(own, magnitude) else insertion_deletion(
                    self.scores, images, maps, blurred, labels, n_steps=self.options.curve_steps, **settings
                )
                kept, removed = (
                    torch.trapezoid((classes == labels[:, None]).double(), curves.fractions.double(), dim=1)
                    for classes in (curves.insertion_classes, curves.deletion_classes)
                )
                row[key], row[f'{key}_softmax'] = SCALE * (kept - removed), curves.id_score
            yield text, {**row, 'pearson': class_sensitivity(own, other).pearson}

    def grid(self, mosaics, names, methods):
        '''Share of positive relevance in the own cell, mean of all cells.'''
        targets = mosaics.cells.flatten(1).T
        cells = mosaics.cells.repeat(len(targets), 1, 1)
        repeated = mosaics.images.repeat(len(targets), 1, 1, 1), targets.flatten(), [*names] * len(targets)
        for text, relevance, *_ in self.explained(methods, self.classifier.model, *repeated):
            share = grid_pointing(relevance, cells, targets.flatten()).share
            yield text, {'share': share.view(targets.shape).mean(0)}

    def focus(self, mosaics, names, methods):
        '''Share of positive relevance in the two cells of the class.'''
        target = mosaics.targets[:, 0]
        for text, relevance, *_ in self.explained(methods, self.classifier.model, mosaics.images, target, names):
            yield text, {'share': grid_pointing(relevance, mosaics.cells, target).share}

    def random(self, images, names, methods):
        '''SSIM with maps of the network whose last layer is random.'''
        with torch.no_grad():
            target = self.classifier.model(images).argmax(1)
        for method in methods:
            def explain(model, text=method.text):
                return self.attribute(text, model, images, target, names)[0].sum(1)

            try:
                result = randomization(self.classifier.model, explain, [last_linear(self.classifier.model)])
            except Exception as error:  # pylint: disable=broad-exception-caught
                print(f'{method.text}: {type(error).__name__}: {error}', file=sys.stderr)
                continue
            yield method.text, {'ssim': result.ssim[:, 0]}

    def idsds(self, images, names, methods):
        '''Rank correlation of relevance in cells with the logit that is lost without them, for a network used to it.'''
        labels = torch.tensor([self.labels[name] for name in names])
        side = images.shape[-1] // CELLS
        with torch.no_grad():
            whole, lost = self.tuned(images).gather(1, labels[:, None]), []
            for cell in torch.eye(CELLS ** 2).view(-1, 1, 1, CELLS, CELLS):
                kept = images * (1 - F.interpolate(cell, scale_factor=side))
                lost.append(whole - self.tuned(kept).gather(1, labels[:, None]))
        lost = torch.cat(lost, 1).view(-1, CELLS, CELLS)
        for text, relevance, *_ in self.explained(methods, self.tuned, images, labels, names):
            cells = F.avg_pool2d(relevance.sum(1, keepdim=True), side)[:, 0]
            yield text, {'spearman': class_sensitivity(cells, lost).spearman}

    def tune(self):
        '''The network, trained further on images without one of their cells (every second), as IDSDS does.'''
        path, options = Path(f'{self.options.out}.pt'), self.options
        model = copy.deepcopy(self.classifier.model)
        if path.is_file():
            model.load_state_dict(torch.load(path, weights_only=True))
            self.tuned = model.eval()
            return
        photos = read_photos(options.train, self.classifier)
        images, labels = torch.stack([photo.image for photo in photos]), torch.tensor([photo.label for photo in photos])
        generator, side = torch.Generator().manual_seed(0), images.shape[-1] // CELLS
        optimizer = torch.optim.SGD(model.parameters(), options.rate, momentum=.9, weight_decay=1e-4)
        batches = len(images) // 32
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * batches)
        # the order in memory changes the speed only
        model.train().to(memory_format=torch.channels_last)
        for epoch in range(options.epochs):
            for index in torch.randperm(len(images), generator=generator).split(32)[:batches]:
                cells = torch.eye(CELLS ** 2)[torch.randint(CELLS ** 2, (32,), generator=generator)]
                cells *= torch.randint(2, (32, 1), generator=generator)
                shown = images[index] * (1 - F.interpolate(cells.view(-1, 1, CELLS, CELLS), scale_factor=side))
                with torch.autocast('cpu', torch.bfloat16, enabled=options.amp):
                    output = model(shown.contiguous(memory_format=torch.channels_last)).float()
                loss = F.cross_entropy(output, labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            print(f'tuned on {len(images)} images, epoch {epoch + 1}: loss {float(loss):.3f}', file=sys.stderr)
        self.tuned = model.eval().to(memory_format=torch.contiguous_format)
        torch.save(model.state_dict(), path)


def last_map(model, image):
    '''Name of the last module that returns a map of features of more than one position, and is called once.

    Class activation maps at a module that is called several times are those of its first call.
    '''
    found, names = [], {module: name for name, module in model.named_modules()}

    def watch(module, args, output):
        if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[-1] > 1 and names[module]:
            found.append(names[module])

    handles = [module.register_forward_hook(watch) for module in model.modules()]
    with torch.no_grad():
        model(image)
    for handle in handles:
        handle.remove()
    return next(name for name in reversed(found) if found.count(name) == 1)


def last_linear(model):
    '''Name of the classifier.'''
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][-1]


def initial_of(kind, model, images, targets):
    '''What attributions of a method ought to sum to, of shape (batch,), if there is such a thing.'''
    if kind is None:
        return None
    if kind == 'one':
        return torch.ones(len(images))
    with torch.no_grad():
        logits, blank = (model(values).gather(1, targets[:, None])[:, 0] for values in (images, 0 * images))
    return (logits if kind == 'logit' else logits - blank).double()


# -- cost, and whether the network survives ----------------------------------------------------------------------------

def state_of(model, image):
    '''All that a method must leave as it was, by what it is.'''
    with torch.no_grad():
        state = {'output': model(image).numpy().tobytes()}
    for key, value in model.state_dict().items():
        state[f'values of {key}'] = value.numpy().tobytes()
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        state[f'object {key}'] = (id(value), value.requires_grad)
        state[f'gradient of {key}'] = value.grad is not None
    seen = {torch.nn.functional, torch.Tensor, torch.nn.Module}
    for name, module in model.named_modules():
        state[f'training of {name}'] = module.training
        state[f'attributes of {name}'] = sorted(vars(module))
        for key, value in vars(module).items():
            if key.endswith('hooks'):
                state[f'{key} of {name}'] = len(value)
        seen.update(type(module).__mro__)
        seen.add(sys.modules[type(module).__module__])
    for place in seen:
        for key, value in list(vars(place).items()):
            if callable(value):
                state[f'{place.__name__}.{key}'] = id(value)
    return state


def cost(bench, results, options):
    '''Time and memory of a batch, relative to one gradient in the same run, and what is left of the network.'''
    network = bench.classifier.model
    images = torch.stack([photo.image for photo in bench.photos[:options.cost_batch]])
    with torch.no_grad():
        targets = network(images).argmax(1)
    arguments = images, targets, [*map(str, range(len(images)))]

    def gradient(images, targets, _):
        leaf = images.clone().requires_grad_()
        torch.autograd.grad(network(leaf).gather(1, targets[:, None]).sum(), leaf)

    if options.only:
        run = gradient if options.only == 'gradient' else bench.explainer(
            options.only, copy.deepcopy(network), network
        )
        with torch.no_grad() if options.only != 'gradient' else torch.enable_grad():
            run(*(argument[:1] for argument in arguments))
            before = memory_status('VmRSS')
            run(*arguments)
        print((memory_status('VmHWM') - before) / 1024)
        return
    base = peak_memory('gradient', options)
    for method in bench.methods:
        if ('cost', '', method.text) in results.rows or method.text.startswith('control'):
            continue
        try:
            model = copy.deepcopy(network)
            before = state_of(model, images[:1])
            explain, ratios = bench.explainer(method.text, model, network), []
            for num in range(options.rounds + 1):
                times = [time.perf_counter()]
                gradient(*arguments)
                times.append(time.perf_counter())
                with torch.no_grad():
                    explain(*arguments)
                times.append(time.perf_counter())
                if num or options.rounds == 1:
                    ratios.append((times[2] - times[1]) / (times[1] - times[0]))
            del explain
            after = state_of(model, images[:1])
            changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        except Exception as error:  # pylint: disable=broad-exception-caught
            print(f'{method.text}: {error}', file=sys.stderr)
            continue
        results.add(
            measure='cost', item='', method=method.text, batch=options.cost_batch, changed=changed,
            time=statistics.median(ratios), memory=peak_memory(method.text, options) / base,
        )
        print(f'{method.text}: {statistics.median(ratios):.2f}, changed: {changed[:3]}', file=sys.stderr)


def peak_memory(name, options):
    '''Peak memory of a batch in a process of its own, beyond what there was before, in MiB.'''
    given = {key: getattr(options, key) for key in ('data', 'model', 'weights', 'cost_batch', 'threads', 'dynamic_lrp')}
    given = [f'--{key.replace("_", "-")}={value}' for key, value in given.items() if value is not None]
    output = subprocess.run(
        [sys.executable, __file__, '--only', name, '--out', '/dev/null', *given], check=True, capture_output=True,
        text=True,
    )
    return float(output.stdout.split()[-1])


def main():
    '''Compute what is missing, or print tables.'''
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, steps=10, out='peers.jsonl')
    parser.add_argument('--train', help='images to tune the network on without some of their cells, for IDSDS')
    parser.add_argument('--methods', help='separated by semicolons (default: all that there are)')
    parser.add_argument('--base', default=BASE, help='what others are compared with (default: %(default)s)')
    parser.add_argument('--dynamic-lrp', help='path of a checkout of DynamicLRP')
    for key, count, text in (
        ('images', 32, 'photographs'), ('mosaics', 16, 'mosaics of the grid pointing game'),
        ('focus', 32, 'mosaics of Focus'), ('deletions', 64, 'photographs of IDSDS'),
        ('randomized', 8, 'photographs for the random classifier'),
    ):
        parser.add_argument(f'--{key}', type=int, default=count, help=f'{text} (default: %(default)s)')
    parser.add_argument('--curve-steps', type=int, default=49, help='intervals of ABPC (default: %(default)s)')
    parser.add_argument('--epochs', type=int, default=2, help='of tuning (default: %(default)s)')
    parser.add_argument('--rate', type=float, default=1e-3, help='of tuning (default: %(default)s)')
    parser.add_argument('--cost', action='store_true', help='measure time and memory')
    parser.add_argument('--cost-batch', type=int, default=8, help='images for it (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=5, help='of time (default: %(default)s)')
    parser.add_argument('--threads', type=int, default=2, help='threads of PyTorch for it (default: %(default)s)')
    parser.add_argument('--only', help=argparse.SUPPRESS)
    options = parser.parse_args()
    # that hooks are set, that maps may be negative, and that Zennit merges batch normalization
    warnings.simplefilter('ignore')
    if options.dynamic_lrp:
        add_dynamic_lrp(options.dynamic_lrp)
    names = [*OURS, *METHODS] if options.methods is None else options.methods.split(';')
    if options.only:
        names = [options.only] if options.only != 'gradient' else []
    settings = {key: getattr(options, key) for key in (
        'data', 'model', 'weights', 'steps', 'curve_steps', 'threshold', 'full_size', 'amp', 'epochs', 'rate'
    )}
    try:
        classifier = find_network(options.model, options.weights)
        results = Results(options.out, settings) if not options.only else None
    except (ImportError, ValueError) as error:
        parser.error(str(error))
    if options.summary:
        name = options.model or 'the embedded ResNet-50'
        print(f'# Methods of all libraries on {name}\n\nMeans with intervals of 95 % '
              'by the bootstrap, and the number of images or mosaics. [What columns mean](../peers.md).\n')
        found = dict.fromkeys(row['method'] for row in results.rows.values() if row['method'])
        order = {name: num for num, name in enumerate(names)}
        summarize(results, sorted(found, key=lambda name: order.get(name, len(order))), options.base)
        return
    bench = Bench(classifier, names, options)
    if options.cost or options.only:
        torch.set_num_threads(options.threads)
        cost(bench, results, options)
        return
    if options.train or Path(f'{options.out}.pt').is_file():
        bench.tune()
    run(bench, results, bench.methods)


if __name__ == '__main__':
    main()
