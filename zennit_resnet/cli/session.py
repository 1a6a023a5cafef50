'''What the commands do with a network and photographs.'''
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import click
import torch
from tqdm import tqdm

from .._choices import CONTRASTS, INPUT_X_GRADIENT, LEVELS, MAX_LEVELS
from .._files import check_free, whole
from .._text import one_line
from ..attribution import as_contrast
from ..canonizers import UnsupportedOperation
from ..explanation import explain_each, list_images
from ..explanation.result import Style, name_rivals
from ..methods import Method
from ..models import load_classifier

STYLE = ('smooth', 'percentile', 'contours', 'cmap')


class Session:
    '''What commands share: options, explanations, and messages. What makes it useless to go on is a ClickException.'''
    def __init__(self, images, methods, folder, options):
        self.value, self.batch_size, self.overwrite = (options[key] for key in ('value', 'batch_size', 'overwrite'))
        self.style = {key: options[key] for key in STYLE if options.get(key) is not None}
        self.folder, self.failed, self.conserved = Path(folder), False, True
        postprocess, levels = options.get('postprocess', 'none'), options.get('quantize', 0)
        if levels == 1 or levels > MAX_LEVELS:
            raise click.ClickException(f'--quantize {levels}: choose from 2 to {MAX_LEVELS} levels, or 0 for none')
        if levels and postprocess in ('c1c', 'c3'):
            raise click.ClickException(f'--quantize and --postprocess {postprocess} exclude each other: choose one')
        if levels:
            postprocess = 'quantize'
        suffix = '' if options.get('splitting', 'none') == 'none' else f'+{options["splitting"]}'
        try:
            # a photograph that is named twice is explained once
            found = {}
            for path in (path for each in images for path in photographs(each)):
                found.setdefault(os.path.realpath(path), path)
            self.images = list(found.values())
            methods = [Method(text + suffix, postprocess, levels or LEVELS) for text in methods]
            self.methods = list({method.text: method for method in methods}.values())
            Style(**self.style)
            self.classifier = load_classifier(*(
                options[key] for key in ('model', 'weights', 'size', 'classes', 'mean', 'std', 'keep_aspect')
            ))
            self.target = None if options['target'] is None else self.classifier.find_class(options['target'])
            self.contrast = options['contrast']
            if self.contrast is not None and self.contrast not in CONTRASTS:
                self.contrast = self.classifier.find_class(self.contrast)
            self.rivals = name_rivals(as_contrast(self.contrast), self.classifier.classes)
        except (ValueError, TypeError, OSError) as error:
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
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise click.ClickException(
                f'cannot make the folder {self.folder} ({reason}): choose another --out'
            ) from error
        self.bar = tqdm(total=len(self.images), unit='image', disable=len(self.images) == 1 or not sys.stderr.isatty())

    def check_free(self, paths):
        '''Refuse to overwrite what is there, before anything is computed.'''
        taken = []
        for path in paths:
            try:
                check_free(path, self.overwrite)
            except FileExistsError:
                taken.append(path)
            except OSError as error:
                raise click.ClickException(f'cannot write {path}: {error.strerror or error}') from error
        if taken:
            more = f' and {len(taken) - 1} other files exist' if len(taken) > 1 else ' exists'
            raise click.ClickException(f'{taken[0]}{more} already: choose another --out, or --overwrite')

    def fail(self, path, reason):
        '''Print what is wrong with a photograph, to go on with the others.'''
        self.failed = True
        tqdm.write(f'Error: {one_line(path)}: {one_line(reason)}', file=sys.stderr)

    def explanations(self):
        '''Generate the path of each photograph with its explanations by each method.'''
        for path, found in explain_each(
            self.classifier, self.images, self.methods, self.target, self.value, self.contrast, self.batch_size,
            self.attribute,
        ):
            if isinstance(found, Exception):
                self.fail(path, reason_of(found))
            else:
                yield path, found
            self.bar.update()

    def attribute(self, method, *args, what='attribute'):
        '''Compute relevance or the ``'ledger'``, and end the program with a message if a method cannot be used.'''
        try:
            return getattr(method, what)(*args)
        except UnsupportedOperation as error:
            raise click.ClickException(f'{method.text}: {one_line(error)}') from error
        except torch.cuda.OutOfMemoryError as error:
            raise click.ClickException('out of memory: use a smaller --batch-size') from error
        except (ValueError, IndexError) as error:
            if self.contrast is None and method.contrast is None:
                raise
            raise click.ClickException(f'{method.text}: {one_line(error)}') from error
        except RuntimeError as error:
            if method.name == INPUT_X_GRADIENT or method.entry.kind == 'ours':
                raise
            # rules of Zennit are not for all networks
            raise click.ClickException(
                f'{method.text} cannot be used with this network ({one_line(error)}): choose another method'
            ) from error

    def finish(self):
        '''End the progress bar and the program, with a status that says what went wrong.'''
        self.bar.close()
        if self.failed or not self.conserved:
            sys.exit(2 if self.failed else 1)


def photographs(path):
    '''Paths of the photographs in a folder, or the path itself.'''
    try:
        return list_images(path)[0]
    except ValueError:
        # it fails in its turn, so that others are explained
        return [path]


def reason_of(error):
    '''Why a photograph cannot be explained, for people.'''
    return 'there is no such file, check the path' if isinstance(error, FileNotFoundError) else str(error)


@contextmanager
def writing(path):
    '''End the program with a message if a file cannot be written.'''
    try:
        yield
    except OSError as error:
        raise click.ClickException(f'cannot write {path}: {error.strerror or error}') from error


def save_picture(picture, path, overwrite=True):
    '''Save a picture, as PNG if it is too large for another format, and return the path that it was saved to.'''
    try:
        with whole(path, overwrite) as name:
            picture.save(name)
    except Exception as error:  # formats raise anything
        # of the file system, errors have a number
        if getattr(error, 'errno', None) is not None or path.suffix == '.png':
            raise
        return save_picture(picture, path.with_suffix('.png'), overwrite)
    return path
