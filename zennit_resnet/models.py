'''Classifiers for the command line: network, weights, class names and preprocessing in one.'''
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.transforms import functional

from ._text import one_line, suggest
from .arguments import as_map
from .checkpoints import AGAIN, SUFFIXES, check_state, read_state, strip_prefix

EMBEDDED = Path('examples', 'assets', 'resnet50_imagenette.safetensors')
DEFAULT_MODEL = 'resnet50'
DEFAULT_SIZE = 224
# These have auxiliary classifiers, which only the state dict knows, and warn unless told about their initialization
AUXILIARY = {'googlenet': 'aux1.', 'inception_v3': 'AuxLogits.'}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Unfollowed(ValueError):
    '''A preprocessing that moves pixels in a way that is not undone.'''


def _fit_line(values, chosen):
    '''The values that a line has at the ends of an array, or None if what is chosen is on no line that rises.'''
    positions = np.arange(len(values)) + 0.5
    if chosen.sum() < 2:
        return None
    first, last = np.flatnonzero(chosen)[[0, -1]]
    quarter = (last - first) // 4
    # what is reflected in padding is at the ends
    kept = chosen & (positions > first + quarter) & (positions < last - quarter + 1)
    kept = kept if kept.sum() > 1 else chosen
    for _ in range(4):
        slope, start = np.polyfit(positions[kept], values[kept], 1)
        near = chosen & (np.abs(start + slope * positions - values) < 0.012)
        if near.sum() < 2:
            return None
        kept = near
    return (start, start + slope * len(values)) if slope > 0 and kept.sum() > 0.4 * chosen.sum() else None


class Classifier(NamedTuple):
    '''A trained network, and what is necessary to use it on photographs.

    Attributes
    ----------
    model, classes: :py:obj:`torch.nn.Module`, list[str]
        The network in evaluation mode, and names of the classes.
    transform: callable
        Preprocessing, from a PIL image to the normalized input of shape (3, height, width): resizing, cropping and
        padding in any order, but nothing random.
    mean, std: :py:obj:`torch.Tensor`
        Mean and standard deviation used in normalization, of shape (3, 1, 1).
    '''
    model: torch.nn.Module
    classes: list
    transform: Callable
    mean: torch.Tensor
    std: torch.Tensor

    def photo(self, input):
        '''The picture that the network sees (height, width, 3), uint8, of a normalized input (3, height, width).'''
        picture = (input.cpu() * self.std + self.mean).clamp(0, 1).movedim(0, -1)
        return (picture.numpy() * 255).round().astype(np.uint8)

    def place(self, size):
        '''Find the part of a photograph of a size, width and height, that the network sees.

        Returns its left, top, right and bottom in pixels of the photograph, outside of it where the input is padded. A
        ValueError is raised if the preprocessing does more than to resize, crop and pad, such as to mirror or rotate
        images, or normalizes by another mean and standard deviation than the classifier's.
        '''
        width, height = size
        # brightness tells the position, so that any preprocessing can be followed
        ramps = np.zeros((height, width, 3), dtype=np.uint8)
        ramps[..., 0] = ((np.arange(width) + 0.5) / width * 255).round()
        ramps[..., 1] = ((np.arange(height) + 0.5) / height * 255).round()[:, None]
        seen, black, white = (
            (self.transform(Image.fromarray(picture)) * self.std + self.mean)[:2].double().numpy()
            for picture in (ramps, np.zeros_like(ramps), np.full_like(ramps, 255))
        )
        # what is padded is the same in both
        shown = white > black + 0.1
        levels = [float(np.median(values[shown])) if shown.any() else 0. for values in (black, white)]
        if np.abs(np.subtract(levels, (0, 1))).max() > 0.02:
            raise ValueError(
                f'the preprocessing makes black {levels[0]:.3g} and white {levels[1]:.3g}, not 0 and 1, once mean and '
                'std are undone: give those that it has'
            )
        ends = []
        for values, valid, axis, side in zip(seen, shown, (0, 1), size):
            # what is padded is not in the middle
            middle = np.take(values, range(3 * values.shape[axis] // 8, 5 * values.shape[axis] // 8 + 1), axis)
            line, valid = np.median(middle, axis), valid.mean(axis) > 0
            pair = _fit_line(line, valid & (line > 0.02) & (line < 0.98))
            if pair is None or np.abs(middle - np.expand_dims(line, axis)).mean() > 0.004:
                raise Unfollowed('the preprocessing does more than to resize, crop and pad')
            # brightness is rounded
            pair = np.array(pair) * side
            near = np.abs(pair - (0, side)) < 0.004 * side + 0.5
            ends.append(np.where(near, (0, side), pair).tolist())
        return ends[0][0], ends[1][0], ends[0][1], ends[1][1]

    def bounds(self):
        '''Normalized values of black and white, the lowest and highest input, of shape (1, 3, 1, 1) each.'''
        return (-self.mean / self.std)[None], ((1 - self.mean) / self.std)[None]

    def find_class(self, text):
        '''Find the index of a class by its name in upper or lower case, or by its index.

        ``'name:5'`` and ``'index:5'`` say which one is meant where ``'5'`` may be both. A ValueError is raised if there
        is no such class, if several have this name, or if it may be a name and an index.
        '''
        kind, _, rest = str(text).partition(':')
        kind, name = (kind, rest) if kind in ('name', 'index') else (None, str(text))
        named = [] if kind == 'index' else [
            num for num, each in enumerate(self.classes) if each.lower() == name.strip().lower()
        ]
        if len(named) > 1:
            raise ValueError(f'class {text!r} is ambiguous: choose its index, one of {", ".join(map(str, named))}')
        try:
            number = None if kind == 'name' else int(name)
        except ValueError:
            number = None
        if named and number not in (None, named[0]) and 0 <= number < len(self.classes):
            raise ValueError(
                f'class {text!r} is ambiguous, the name of class {named[0]} and the index of {self.classes[number]!r}: '
                f'choose name:{name} or index:{number}'
            )
        if named:
            return named[0]
        if number is None:
            raise ValueError(
                f'unknown class {text!r}{suggest(name, self.classes)} Indices are from 0 to {len(self.classes) - 1}.'
            )
        if not 0 <= number < len(self.classes):
            raise ValueError(f'class {number} does not exist: choose an index from 0 to {len(self.classes) - 1}')
        return number


def as_classifier(model, classes=None, mean=None, std=None, size=None, keep_aspect=False, transform=None):
    '''Make a classifier of a network.

    Parameters
    ----------
    model: :py:obj:`torch.nn.Module`
        A network of images of shape (batch, 3, height, width). Its weights are not copied.
    classes: list[str] or path, optional
        Names of the classes, see :py:func:`read_classes`. Default are ImageNet's names for 1000, and else numbers,
        once the output is known.
    mean, std: sequence of float, optional
        Mean and standard deviation of normalization, for RGB values from 0 to 1. Default are those of a network of
        timm's, and ImageNet's.
    size: int, optional
        Side of the square that photographs are resized to. Default is that of a network of timm's, and 224.
    keep_aspect: bool, optional
        Resize the shorter side instead, for networks that take images of any shape.
    transform: callable, optional
        Preprocessing in the place of the last two, see :py:class:`Classifier`.

    Returns
    -------
    :py:class:`Classifier`
        In the mode of training or evaluation that the network is in.

    Raises
    ------
    ValueError
        If names of classes cannot be read, or mean and std are not made of three numbers, positive ones for std.
    '''
    known = getattr(model, 'pretrained_cfg', None) or {}
    mean = known.get('mean', IMAGENET_MEAN) if mean is None else mean
    std = known.get('std', IMAGENET_STD) if std is None else std
    size = known.get('input_size', (3, DEFAULT_SIZE))[-1] if size is None else size
    mean, std = (_as_channels(name, value) for name, value in (('mean', mean), ('std', std)))
    if transform is None:
        transform = partial(_preprocess, size=size, keep_aspect=keep_aspect, mean=mean, std=std)
    return Classifier(model, None if classes is None else read_classes(classes), transform, mean, std)


def _as_channels(name, value):
    '''Mean or standard deviation as a tensor of shape (3, 1, 1).'''
    if not isinstance(value, torch.Tensor):
        try:
            value = as_map(name, np.asarray(value, np.float32))
        except (TypeError, ValueError) as error:
            raise ValueError(f'{name}={value!r} is not made of three numbers, for red, green, blue') from error
    value = value.float().flatten()
    if len(value) != 3 or not value.isfinite().all() or name == 'std' and (value <= 0).any():
        raise ValueError(
            f'{name} {value.tolist()} is not made of three{" positive" * (name == "std")} numbers, for red, green, blue'
        )
    return value.view(3, 1, 1)


def read_classes(source):
    '''Names of classes: a list, or the path of a file with one in each line or a list in JSON, or a ValueError.'''
    if not isinstance(source, (str, os.PathLike)):
        return _list_classes(source, 'classes')
    try:
        text = Path(source).read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f'names of classes cannot be read from the file {str(source)!r} ({one_line(error)})'
        ) from error
    try:
        classes = json.loads(text)
    except ValueError:
        classes = text.splitlines()
    return _list_classes(classes, source)


def default_classes(number):
    '''Names for a number of classes that nothing else is known of: those of ImageNet for 1000, and else numbers.'''
    if number == 1000:
        return get_model_weights(DEFAULT_MODEL).DEFAULT.meta['categories']
    return [f'class {num}' for num in range(number)]


def hash_weights(model):
    '''SHA-256 of the names, types, shapes and values of all parameters and buffers of a network, in hexadecimal.'''
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        # modules may have an extra state of any type
        if isinstance(value, torch.Tensor):
            digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _list_classes(classes, source):
    '''Names of classes in a list, or in a dict from indices to names as that of ImageNet.'''
    if isinstance(classes, dict):
        numbers = {int(key) if str(key).isdecimal() else -1: name for key, name in classes.items()}
        classes = [numbers[num] for num in sorted(numbers)] if sorted(numbers) == list(range(len(numbers))) else []
    if not isinstance(classes, (list, tuple)):
        classes = []
    classes = [' '.join(str(name[-1] if isinstance(name, list) and name else name).split()) for name in classes]
    while classes and not classes[-1]:
        classes.pop()
    if not classes:
        raise ValueError(f'{source} holds no names of classes: write one in each line, in the order of the outputs')
    return classes


def load_classifier(model=None, weights=None, size=None, classes=None, mean=None, std=None, keep_aspect=False):
    '''Load a classifier.

    Without arguments, this is the ResNet-50 that comes with the project's examples.

    Parameters
    ----------
    model: str, optional
        Name of a classification model of torchvision. Default is ``'resnet50'``.
    weights: str, optional
        Name of the model's weights in torchvision, which are downloaded and bring along preprocessing and class names,
        or the path of a state dict (``.pt``, ``.pth`` or ``.safetensors``). The number of classes of a state dict is
        the size of the last layer's weight. Names of classes are taken from ``classes`` in the metadata of safetensors
        (separated by commas, or a list in JSON); without it, 1000 classes are assumed to be ImageNet's.
    size: int, optional
        For state dicts, photographs are resized to a square of this side, 224 by default.
    classes, mean, std, keep_aspect:
        See :py:func:`as_classifier`. With ``keep_aspect``, weights of torchvision get the whole photograph, resized to
        the usual height or width, instead of a square cut out of it.

    Returns
    -------
    :py:obj:`Classifier`
        The classifier on the CPU.

    Raises
    ------
    ValueError
        If anything about the arguments or the state dict does not fit. The message is a single line.
    '''
    names = list_models(module=torchvision.models)
    if model is not None and model not in names:
        raise ValueError(f'unknown model {model!r} of torchvision{suggest(model, names)}')
    if weights is None and model is not None:
        raise ValueError(
            f'--model {model} needs --weights (a name such as DEFAULT, or a file), since random weights explain nothing'
        )
    model = DEFAULT_MODEL if model is None else model
    weights = str(find_embedded()) if weights is None else weights
    path = Path(weights)
    classes = None if classes is None else read_classes(classes)
    settings = {'mean': mean, 'std': std, 'keep_aspect': keep_aspect}
    if path.suffix.lower() in SUFFIXES or os.path.isfile(path):
        return _load_local(model, path, DEFAULT_SIZE if size is None else size, classes, settings)
    return _load_named(model, weights, size, classes, settings)


def find_embedded():
    '''The embedded ResNet-50, in the checkout of this package or under the current directory, or a ValueError.'''
    for folder in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if (folder / EMBEDDED).is_file():
            return folder / EMBEDDED
    raise ValueError(
        f'the embedded network ({EMBEDDED.as_posix()}) is only found in a checkout of the project: run the command '
        'there, or choose another network with --model and --weights'
    )


def _load_named(name, weights, size, classes, settings):
    '''Load weights which torchvision knows by name.'''
    members = get_model_weights(name).__members__
    # torchvision also writes them as ResNet50_Weights.DEFAULT
    entry = members.get(weights.rpartition('.')[2])
    if entry is None:
        raise ValueError(
            f'{name} has no weights {weights!r}: choose one of {", ".join(members)}, or the path of a state dict '
            f'({", ".join(SUFFIXES)})'
        )
    if size is not None:
        raise ValueError(f'--size is for local weights, but the weights {weights!r} bring their own preprocessing')
    if not entry.meta.get('categories'):
        raise ValueError(f'the weights {weights!r} of {name} cannot classify: choose others')
    path = Path(torch.hub.get_dir(), 'checkpoints', os.path.basename(urlparse(entry.url).path))
    try:
        # by default, torchvision runs whatever code is in the file
        state = entry.get_state_dict(map_location='cpu', check_hash=True, weights_only=True)
    except Exception as error:  # anything may be raised for anything in the file
        if path.exists() and not isinstance(error, OSError):
            raise ValueError(f'the weights {path} are not a state dict that can be loaded safely: {AGAIN}') from error
        raise ValueError(
            f'cannot download the weights {weights!r} of {name} ({one_line(error)}): use --weights with a local file'
        ) from error
    check_state(path, state, AGAIN)
    # a copy of the entry, since builders know what else changes with the weights, but would load them by themselves
    loaded = object.__new__(type(entry))
    vars(loaded).update(vars(entry), get_state_dict=lambda **kwargs: state)
    try:
        model = get_model(name, weights=loaded)
    except Exception as error:
        raise ValueError(f'the weights {path} do not fit the model {name}: {AGAIN}') from error
    transform = entry.transforms()
    settings = {key: getattr(transform, key, None) if value is None else value for key, value in settings.items()}
    for key in ('mean', 'std'):
        setattr(transform, key, settings[key])
    kept = {} if settings['keep_aspect'] else {'transform': transform}
    classes = _check_classes(classes or entry.meta['categories'], len(entry.meta['categories']), path)
    return as_classifier(model.eval(), classes, size=transform.crop_size[0], **settings, **kept)


def _check_classes(classes, number, path):
    '''Raise a ValueError unless there is a name for each class.'''
    if len(classes) != number:
        raise ValueError(f'there are {len(classes)} names of classes, but the weights {path} have {number}')
    return classes


def _load_local(name, path, size, names, settings):
    '''Load the weights of a model from a state dict.'''
    state, classes = read_state(path)
    kwargs = {}
    if name in AUXILIARY:
        kwargs = {'init_weights': False, 'aux_logits': any(AUXILIARY[name] in key for key in state)}
    with torch.device('meta'):
        # only to see what is in it
        model = get_model(name, weights=None, **kwargs)
    state = strip_prefix(state, list(model.state_dict()), path)
    last = [key for key, module in model.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))][-1]
    misfit = f'the weights {path} do not fit the model {name}: '
    if state.get(f'{last}.weight', torch.empty(0)).ndim < 2:
        raise ValueError(f'{misfit}the last layer\'s {last}.weight is missing; choose the right one with --model')
    weight = state[f'{last}.weight']
    n_classes = len(weight)
    if not n_classes:
        raise ValueError(f'{misfit}the last layer\'s {last}.weight is of shape {tuple(weight.shape)}')
    model = get_model(name, weights=None, num_classes=n_classes, **kwargs)

    # compared by hand, since load_state_dict lists every single difference
    expected = model.state_dict()
    problems = [
        (f'{len(keys)} {what} such as {keys[0]}')
        for what, keys in (
            # counted since PyTorch 0.4.1 only, and never used in evaluation
            ('missing', [key for key in expected if key not in state and not key.endswith('.num_batches_tracked')]),
            ('unknown', [key for key in state if key not in expected]),
            ('of other shape', [key for key in expected if key in state and expected[key].shape != state[key].shape]),
        ) if keys
    ]
    if problems:
        raise ValueError(f'{misfit}{", ".join(problems)}; choose the right one with --model')
    state = OrderedDict(state)
    # some modules ask for the version that saved them, which not every file format keeps
    state._metadata = expected._metadata
    # this also casts to single precision
    model.load_state_dict(state, strict=False)
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f'{name} cannot process photographs of {size} x {size}: choose another --size') from error

    classes = classes if names is None else names
    classes = default_classes(n_classes) if classes is None else classes
    return as_classifier(model, _check_classes(classes, n_classes, path), size=size, **settings)


def _preprocess(photo, size, keep_aspect, mean, std):
    '''Resize to a square, or the shorter side, and normalize.'''
    photo = functional.resize(photo, size if keep_aspect else [size, size], functional.InterpolationMode.BILINEAR)
    return (functional.to_tensor(photo) - mean) / std
