'''Command line, to explain what a network sees in photographs.'''
import io
import math
import sys
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .. import __version__
from .._choices import (
    CONTRASTS,
    INPUT_X_GRADIENT,
    LEVELS,
    MAX_LEVELS,
    POSTPROCESSING,
    SPLITTING,
    VALUES,
    split_names,
)
from .._text import one_line
from ..canonizers import UnsupportedOperation
from ..image import draw_comparison, draw_heatmap, draw_overlay, read_image
from ..methods import Method
from ..models import load_classifier
from .group import Commands

# Formats to write a comparison in
PICTURES = ('.png', '.jpg', '.jpeg', '.webp', '.tif', '.tiff', '.bmp', '.gif', '.pdf')
DEFAULT_METHODS = (
    f'resnet_lrp_ratio,resnet_lrp_symmetric,epsilon_plus_flat+zennit,epsilon_plus+zennit,{INPUT_X_GRADIENT}'
)


class Tolerance(click.FloatRange):
    '''A number in a range, which nan is not for Python.'''
    def convert(self, value, param, ctx):
        '''Parse the number.'''
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f'{value} is not a number', param, ctx)
        return number


class Session:
    '''What the commands share: checked options, photographs in batches, and messages that go with a progress bar.

    Anything that makes it useless to go on raises a :py:obj:`click.ClickException`.
    '''
    def __init__(self, images, methods, folder, options):
        # a photograph that is named twice is explained once
        self.images = list(dict.fromkeys(images))
        self.value = options['value']
        self.batch_size = options['batch_size']
        self.failed = False
        postprocess, levels = options.get('postprocess', 'none'), options.get('quantize', 0)
        if levels == 1 or levels > MAX_LEVELS:
            raise click.ClickException(f'--quantize {levels}: choose from 2 to {MAX_LEVELS} levels, or 0 for none')
        if levels and postprocess in ('c1c', 'c3'):
            raise click.ClickException(f'--quantize and --postprocess {postprocess} exclude each other: choose one')
        if levels:
            postprocess = 'quantize'
        try:
            self.methods = [Method(text, postprocess, levels or LEVELS) for text in methods]
            self.classifier = load_classifier(options['model'], options['weights'], options['size'])
            self.target = None if options['target'] is None else self.classifier.find_class(options['target'])
            self.contrast = options['contrast']
            if self.contrast is not None and self.contrast not in CONTRASTS:
                self.contrast = self.classifier.find_class(self.contrast)
        except ValueError as error:
            raise click.ClickException(one_line(error)) from error
        device = options['device'] or ('cuda' if torch.cuda.is_available() else 'cpu')
        try:
            self.device = torch.device(device)
            # some devices hold no values
            torch.zeros(1, device=self.device).item()
            self.classifier.model.to(self.device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            # which one it is depends on the device and on how PyTorch was built
            raise click.ClickException(f'device {device!r} cannot be used: try --device cpu') from error
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise click.ClickException(f'cannot make the folder {folder} ({reason}): choose another --out') from error
        self.stems = {path: folder / stem for path, stem in unique_stems(self.images).items()}
        self.bar = tqdm(
            total=len(self.images), unit='image', disable=len(self.images) == 1 or not sys.stderr.isatty()
        )

    def fail(self, path, reason):
        '''Print what is wrong with a photograph, to go on with the others.'''
        self.failed = True
        tqdm.write(f'Error: {one_line(path)}: {one_line(reason)}', file=sys.stderr)
        self.bar.update()

    def batches(self):
        '''Generate lists of paths, each with a batch of normalized inputs of shape (batch, 3, height, width).'''
        for start in range(0, len(self.images), self.batch_size):
            paths, inputs = [], []
            for path in self.images[start:start + self.batch_size]:
                try:
                    inputs.append(self.classifier.transform(read_image(path)))
                    paths.append(path)
                except FileNotFoundError:
                    self.fail(path, 'there is no such file, check the path')
                except ValueError as error:
                    self.fail(path, str(error))
            if paths:
                yield paths, torch.stack(inputs).to(self.device)

    def run(self, method, input, target, what='attribute'):
        '''Compute relevance or the ``'ledger'``, and end the program with a message if a method can not be used.'''
        try:
            return getattr(method, what)(self.classifier, input, target, self.value, self.contrast)
        except UnsupportedOperation as error:
            raise click.ClickException(f'{method.text}: {one_line(error)}') from error
        except torch.cuda.OutOfMemoryError as error:
            raise click.ClickException(f'out of memory: use a --batch-size below {len(input)}') from error
        except (ValueError, IndexError) as error:
            if self.contrast is None and method.contrast is None:
                raise
            raise click.ClickException(f'{method.text}: {one_line(error)}') from error
        except RuntimeError as error:
            if method.name == INPUT_X_GRADIENT or method.entry.kind == 'ours':
                raise
            # rules of Zennit are not for all networks
            raise click.ClickException(
                f'{method.text} can not be used with this network ({one_line(error)}): choose another method'
            ) from error

    def draw(self, photo, method, relevance):
        '''Draw the heatmap and the overlay of relevance of shape (3, height, width), with notes on both.'''
        heatmap, notes = method.heatmap(relevance)
        # all levels of a quantized heatmap get their own color
        percentile = 100 if method.postprocess == 'quantize' else 99.5
        return draw_heatmap(heatmap, percentile), draw_overlay(photo, heatmap), notes

    def finish(self):
        '''End the progress bar, and the program if a photograph failed.'''
        self.bar.close()
        if self.failed:
            sys.exit(1)


def add_options(options):
    '''Create a function that adds options to a command.'''
    def decorate(command):
        '''Add them such that they are listed in their order.'''
        for option in reversed(options):
            command = option(command)
        return command
    return decorate


NETWORK_OPTIONS = [
    click.option('--model', help='Classification model of torchvision.  [default: resnet50]'),
    click.option(
        '--weights', metavar='NAME|PATH',
        help='Name of weights which torchvision downloads, such as DEFAULT, or a state dict (.pt, .pth, '
        '.safetensors).  [default without --model: the embedded ResNet-50 with 10 classes]'
    ),
    click.option(
        '--size', type=click.IntRange(min=1),
        help='For a local state dict, photographs are resized to a square of this side.  [default: 224]'
    ),
]
START_OPTIONS = [
    click.option(
        '--value', type=click.Choice(VALUES),
        help='What relevance starts from: the target\'s logit, its softmax probability, or one.  [default: logit; with '
        'a contrast, what the rule of the last layer needs]'
    ),
    click.option(
        '--contrast', metavar='centred|softmax|runner_up|NUMBER|NAME',
        help='Why the target and not something else: all other classes evenly, all others by their probabilities, the '
        'most probable other class, or a class.'
    ),
]
common_options = add_options([
    click.argument('images', metavar='IMAGE...', nargs=-1, required=True, type=click.Path(path_type=Path)),
    *NETWORK_OPTIONS,
    click.option('--target', metavar='NUMBER|NAME', help='The class to explain.  [default: the predicted class]'),
    *START_OPTIONS,
    click.option('--device', help='Device of PyTorch.  [default: cuda if available, else cpu]'),
    click.option('--batch-size', type=click.IntRange(min=1), default=8, show_default=True),
])
heatmap_options = add_options([
    click.option(
        '--postprocess', type=click.Choice(['none', *POSTPROCESSING]), default='none', show_default=True,
        help='What is done to heatmaps before they are drawn: heat quantization, the largest connected component '
        '(C1C), or what it and the largest contour have in common (C3).'
    ),
    click.option(
        '--quantize', metavar='LEVELS', type=click.IntRange(min=0), default=0,
        help=f'The same as --postprocess quantize, to this number of levels.  [default: {LEVELS}]'
    ),
])
method_options = add_options([
    click.option(
        '--method', default='resnet_lrp_ratio', show_default=True,
        help=f'A composite in Zennit\'s COMPOSITES, a classic rule or {INPUT_X_GRADIENT}, with options and suffixes '
        'as in resnet_lrp_ratio:first_layer=ones+quantize8.'
    ),
    click.option(
        '--splitting', type=click.Choice(['none', *SPLITTING]), default='none', show_default=True,
        help='Splitting at skip connections for a method that does not split by itself: by our rules, or as Zennit\'s '
        'ResNetCanonizer.'
    ),
])


def unique_stems(paths):
    '''Give each path a name to write files under, which is its stem unless another path has the same one.'''
    stems, taken = {}, set()
    for path in paths:
        stem, num = path.stem, 1
        # some file systems do not distinguish upper and lower case
        while stem.lower() in taken:
            num += 1
            stem = f'{path.stem}_{num}'
        taken.add(stem.lower())
        stems[path] = stem
    return stems


@contextmanager
def writing(path):
    '''End the program with a message if a file can not be written.'''
    try:
        yield
    except OSError as error:
        raise click.ClickException(f'cannot write {path}: {error.strerror or error}') from error


def save_picture(picture, path):
    '''Save a picture, as PNG if it is too large for another format, and return the path that it was saved to.'''
    try:
        picture.save(path)
    except Exception:  # formats raise anything
        path.unlink(missing_ok=True)
        path = path.with_suffix('.png')
        picture.save(path)
    return path


@click.group(cls=Commands, context_settings={'help_option_names': ['-h', '--help']})
@click.version_option(__version__)
def main():
    '''Explain what residual networks see in photographs, with Layer-wise Relevance Propagation.'''
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # names of files and classes may have characters which the encoding of the output has not
            stream.reconfigure(errors='backslashreplace')


@main.command()
@common_options
@heatmap_options
@method_options
@click.option(
    '--out', type=click.Path(path_type=Path), default='heatmaps', show_default=True, help='Folder to write to.'
)
def explain(images, method, splitting, out, **options):
    '''Write the heatmap of each photograph, an overlay, and the raw relevance.'''
    session = Session(images, [method if splitting == 'none' else f'{method}+{splitting}'], out, options)
    classes = session.classifier.classes
    for paths, input in session.batches():
        result = session.run(session.methods[0], input, session.target)
        for path, photo, output, relevance, target, initial in zip(paths, input, *result):
            if not output.isfinite().all():
                session.fail(path, 'the output of the network is not finite, check the --weights')
                continue
            if not relevance.isfinite().all():
                session.fail(path, f'the relevance by {method} is not finite, try another --method')
                continue
            heatmap, overlay, notes = session.draw(session.classifier.photo(photo), session.methods[0], relevance)
            if session.methods[0].postprocess != 'none':
                notes.insert(0, f'post-processed by {session.methods[0].postprocess}')
            stem = session.stems[path]
            with writing(f'{stem}_*'):
                Image.fromarray(heatmap).save(f'{stem}_heatmap.png')
                Image.fromarray(overlay).save(f'{stem}_overlay.png')
                np.save(f'{stem}_relevance.npy', relevance.float().cpu().numpy())
            values, indices = output.float().softmax(0).topk(min(3, len(classes)))
            top = ', '.join(f'{classes[index]} {100 * value:.1f} %' for value, index in zip(values.tolist(), indices))
            total = float(relevance.double().sum())
            # that of rivals has the opposite sign, so that both may sum to zero
            is_signed = session.contrast is not None or session.methods[0].contrast is not None
            ratio = f'{total / initial:.6f}' if initial and not is_signed else 'undefined'
            tqdm.write('\n'.join([
                one_line(path),
                f'  predicted  {top}',
                f'  target     {classes[target]} (class {target})',
                f'  relevance  sum {total:.6g}, initial {initial:.6g}, ratio {ratio}',
                *([f'  pictures   {"; ".join(notes)}'] if notes else []),
                f'  written    {one_line(stem)}_heatmap.png, _overlay.png, _relevance.npy',
            ]), file=sys.stdout)
            session.bar.update()
    session.finish()


@main.command()
@common_options
@heatmap_options
@click.option(
    '--methods', default=DEFAULT_METHODS, show_default=True,
    help='Methods as for explain, separated by commas, where +ratio, +symmetric or +zennit adds splitting, and '
    '+quantize8, +c1c or +c3 post-processing instead of that of --postprocess, and :first_layer=ones options.'
)
@click.option(
    '--show', type=click.Choice(['heatmap', 'overlay', 'both']), default='heatmap', show_default=True,
    help='What to draw beside the photograph.'
)
@click.option(
    '--out', type=click.Path(path_type=Path), default='compare.png', show_default=True, help='Picture to write.'
)
def compare(images, methods, show, out, **options):
    '''Draw several methods side by side in one figure, one row for each photograph.'''
    if out.suffix.lower() not in PICTURES:
        raise click.ClickException(f'--out {out} is not a picture: choose a name that ends with {", ".join(PICTURES)}')
    if not split_names(methods):
        raise click.ClickException('--methods is empty: name at least one')
    session = Session(images, split_names(methods), out.parent, options)
    classes = session.classifier.classes
    rows, captions, notes = [], [], {}
    for paths, input in session.batches():
        with torch.no_grad():
            output = session.classifier.model(input)
        target = output.argmax(1) if session.target is None else torch.full((len(input),), session.target)
        batch_rows = [[session.classifier.photo(photo)] for photo in input]
        # methods that differ in their post-processing only have the same relevance
        computed = {}
        for method in session.methods:
            if method.attribution not in computed:
                computed[method.attribution] = session.run(method, input, target)[1]
            for path, row, logits, relevance in zip(paths, batch_rows, output, computed[method.attribution]):
                if logits.isfinite().all() and relevance.isfinite().all():
                    *pictures, found = session.draw(row[0], method, relevance)
                else:
                    # a method that fails leaves its place empty
                    pictures, found = [row[0] * 0] * 2, ['left out, as output or relevance is not finite']
                    session.failed = True
                for note in found:
                    notes.setdefault((method.text, note), []).append(path.name)
                row.extend({'heatmap': pictures[:1], 'overlay': pictures[1:], 'both': pictures}[show])
        for path, row, index, probabilities in zip(paths, batch_rows, target.tolist(), output.float().softmax(1)):
            rows.append(row)
            captions.append(f'{path.name}: {classes[index]} {100 * float(probabilities[index]):.1f} %')
            session.bar.update()
    if rows:
        titles = [method.text for method in session.methods for _ in range(2 if show == 'both' else 1)]
        picture = Image.fromarray(draw_comparison(rows, ['photo', *titles], captions))
        with writing(out):
            out = save_picture(picture, out)
        tqdm.write(f'written {one_line(out)}', file=sys.stdout)
        for (text, note), names in notes.items():
            shown, more = names[:3], len(names) - 3
            which = ', '.join(map(one_line, shown)) + (f' and {more} more' if more > 0 else '')
            which = 'all' if len(names) == len(rows) else which
            tqdm.write(f'  {text}: {note} ({which})', file=sys.stdout)
    session.finish()


@main.command()
@common_options
@method_options
@click.option(
    '--tolerance', type=Tolerance(min=0), default=1e-4, show_default=True,
    help='Largest part of the initial relevance that a layer, or the whole network, may lose or gain.'
)
@click.option('--blocks', is_flag=True, help='List blocks in the place of layers.')
@click.option(
    '--out', type=click.Path(path_type=Path), default='ledgers', show_default=True, help='Folder to write to.'
)
def ledger(images, method, splitting, tolerance, blocks, out, **options):
    '''Show how much relevance arrives at each layer and leaves it, and where the rest went.

    Writes a plot, a table (CSV), and all as JSON. The exit status is 1 if relevance is not conserved.
    '''
    session = Session(images, [method if splitting == 'none' else f'{method}+{splitting}'], out, options)
    classes = session.classifier.classes
    for paths, input in session.batches():
        batch, targets = session.run(session.methods[0], input, session.target, 'ledger')
        for num, (path, target) in enumerate(zip(paths, targets)):
            single, stem = batch.example(num), session.stems[path]
            figure = single.plot(tolerance=tolerance)
            figure.suptitle(one_line(f'{path.name}: {session.methods[0].text}, {classes[target]}'), parse_math=False)
            with writing(f'{stem}_ledger.*'):
                figure.savefig(f'{stem}_ledger.png')
                single.to_csv(f'{stem}_ledger.csv')
                single.to_json(f'{stem}_ledger.json')
            deviation = float(single.deviation())
            is_conserved = deviation <= tolerance
            session.failed |= not is_conserved
            tqdm.write('\n'.join([
                one_line(path),
                f'  target     {classes[target]} (class {target})',
                f'  written    {one_line(stem)}_ledger.png, _ledger.csv, _ledger.json',
                single.table(tolerance=tolerance, blocks=blocks),
                f'{"conserved" if is_conserved else "not conserved"}: the largest deviation is {deviation:.2g} of the '
                f'initial relevance, the tolerance is {tolerance:g}',
            ]), file=sys.stdout)
            session.bar.update()
    session.finish()
