'''Classifiers for the command line: network, weights, class names and preprocessing in one.'''
import json
import os
from collections import OrderedDict
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlparse

import numpy as np
import torch
import torchvision
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.transforms import functional

from ._text import one_line

EMBEDDED = Path('examples', 'assets', 'resnet50_imagenette.safetensors')
DEFAULT_MODEL = 'resnet50'
DEFAULT_SIZE = 224
SUFFIXES = ('.pt', '.pth', '.safetensors')
LARGEST_VIEW = 2 ** 30
SAVE = 'save them with torch.save(model.state_dict(), path)'
AGAIN = 'delete this file, and it is downloaded again'
# Keys under which training scripts commonly store the state dict beside other things
WRAPPERS = ('state_dict', 'model_state_dict', 'model')
# These have auxiliary classifiers, which only the state dict knows, and warn unless told about their initialization
AUXILIARY = {'googlenet': 'aux1.', 'inception_v3': 'AuxLogits.'}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Classifier(NamedTuple):
    '''A trained network, and what is necessary to use it on photographs.

    Attributes
    ----------
    model: :py:obj:`torch.nn.Module`
        The network in evaluation mode.
    classes: list[str]
        Names of the classes.
    transform: callable
        Preprocessing, from a PIL image to the normalized input of shape (3, height, width).
    mean, std: :py:obj:`torch.Tensor`
        Mean and standard deviation used in normalization, of shape (3, 1, 1).
    '''
    model: torch.nn.Module
    classes: list
    transform: Callable
    mean: torch.Tensor
    std: torch.Tensor

    def photo(self, input):
        '''Undo the normalization, to get the picture that the network sees.

        It is an array of shape (height, width, 3) and type uint8 for an input of shape (3, height, width).
        '''
        picture = (input.cpu() * self.std + self.mean).clamp(0, 1).movedim(0, -1)
        return (picture.numpy() * 255).round().astype(np.uint8)

    def bounds(self):
        '''Normalized values of black and white, the lowest and highest input, of shape (1, 3, 1, 1) each.'''
        return (-self.mean / self.std)[None], ((1 - self.mean) / self.std)[None]

    def find_class(self, text):
        '''Find the index of a class by its name in upper or lower case, or by its index as text.

        A ValueError is raised if there is no such class, or if several have this name.
        '''
        found = [num for num, name in enumerate(self.classes) if name.lower() == text.strip().lower()]
        if len(found) > 1:
            raise ValueError(f'class {text!r} is ambiguous: choose its index, one of {", ".join(map(str, found))}')
        if found:
            return found[0]
        try:
            number = int(text)
        except ValueError:
            raise ValueError(
                f'unknown class {text!r}: {_suggest(text, self.classes)}or an index from 0 to {len(self.classes) - 1}'
            ) from None
        if not 0 <= number < len(self.classes):
            raise ValueError(f'class {number} does not exist: choose an index from 0 to {len(self.classes) - 1}')
        return number


def load_classifier(model=None, weights=None, size=None):
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
        For state dicts, photographs are resized to a square of this side, 224 by default, and normalized with the mean
        and standard deviation of ImageNet.

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
        raise ValueError(f'unknown model {model!r}: {_suggest(model, names)}or any classification model of torchvision')
    if weights is None and model is not None:
        raise ValueError(
            f'--model {model} needs --weights (a name such as DEFAULT, or a file), since random weights explain nothing'
        )
    model = DEFAULT_MODEL if model is None else model
    weights = str(find_embedded()) if weights is None else weights
    path = Path(weights)
    if path.suffix.lower() in SUFFIXES or os.path.isfile(path):
        return _load_local(model, path, DEFAULT_SIZE if size is None else size)
    return _load_named(model, weights, size)


def find_embedded():
    '''Find the embedded ResNet-50, in the checkout of this package or under the current directory.

    A ValueError is raised if it is in neither, as it is not part of the installed package.
    '''
    for folder in (Path(__file__).resolve().parent.parent, Path.cwd()):
        if (folder / EMBEDDED).is_file():
            return folder / EMBEDDED
    raise ValueError(
        f'the embedded network ({EMBEDDED.as_posix()}) is only found in a checkout of the project: run the command '
        'there, or choose another network with --model and --weights'
    )


def _load_named(name, weights, size):
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
    _check_state(path, state, AGAIN)
    # a copy of the entry, since builders know what else changes with the weights, but would load them by themselves
    loaded = object.__new__(type(entry))
    vars(loaded).update(vars(entry), get_state_dict=lambda **kwargs: state)
    try:
        model = get_model(name, weights=loaded)
    except Exception as error:
        raise ValueError(f'the weights {path} do not fit the model {name}: {AGAIN}') from error
    transform = entry.transforms()
    return _classifier(model, entry.meta['categories'], transform, transform.mean, transform.std)


def _load_local(name, path, size):
    '''Load the weights of a model from a state dict.'''
    state, classes = read_state(path)
    kwargs = {}
    if name in AUXILIARY:
        kwargs = {'init_weights': False, 'aux_logits': any(key.startswith(AUXILIARY[name]) for key in state)}
    model = get_model(name, weights=None, **kwargs)
    last = [key for key, module in model.named_modules() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))][-1]
    misfit = f'the weights {path} do not fit the model {name}: '
    if state.get(f'{last}.weight', torch.empty(0)).ndim < 2:
        raise ValueError(f'{misfit}the last layer\'s {last}.weight is missing; choose the right one with --model')
    weight = state[f'{last}.weight']
    n_classes = len(weight)
    if not n_classes:
        raise ValueError(f'{misfit}the last layer\'s {last}.weight is of shape {tuple(weight.shape)}')
    if n_classes != len(model.get_submodule(last).weight):
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
    state._metadata = expected._metadata  # pylint: disable=protected-access
    # this also casts to single precision
    model.load_state_dict(state, strict=False)
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(f'{name} cannot process photographs of {size} x {size}: choose another --size') from error

    if classes is not None and len(classes) != n_classes:
        raise ValueError(f'the weights {path} name {len(classes)} classes in their metadata, but have {n_classes}')
    if classes is None and n_classes == 1000:
        classes = get_model_weights(DEFAULT_MODEL).DEFAULT.meta['categories']
    if classes is None:
        classes = [f'class {num}' for num in range(n_classes)]
    transform = partial(_preprocess, size=size)
    return _classifier(model, classes, transform, IMAGENET_MEAN, IMAGENET_STD)


def _classifier(model, classes, transform, mean, std):
    '''Create a classifier of which the model is in evaluation mode.'''
    mean, std = (torch.as_tensor(value, dtype=torch.float32).view(3, 1, 1) for value in (mean, std))
    return Classifier(model.eval(), list(classes), transform, mean, std)


def _preprocess(photo, size):
    '''Resize to a square, and normalize as ImageNet.'''
    photo = functional.resize(photo, [size, size], functional.InterpolationMode.BILINEAR)
    return functional.normalize(functional.to_tensor(photo), IMAGENET_MEAN, IMAGENET_STD)


def read_state(path):
    '''Read a state dict.

    Parameters
    ----------
    path: str or :py:obj:`pathlib.Path`
        A file of :py:obj:`torch.save` or, with the suffix ``.safetensors``, of safetensors. The state dict may also be
        the entry ``'state_dict'``, ``'model_state_dict'`` or ``'model'`` of what is in the file.

    Returns
    -------
    state: dict[str, :py:obj:`torch.Tensor`]
        Parameters and buffers of any precision on the CPU. The prefix of :py:obj:`torch.nn.DataParallel` is removed.
    classes: list[str] or None
        Names of the classes, if the metadata of safetensors has them.

    Raises
    ------
    ValueError
        If there is no such file, or it is not a state dict of dense tensors that can be loaded safely.
    '''
    path = Path(path)
    if not os.path.isfile(path):
        raise ValueError(f'there is no file {path} with weights')
    classes = None
    if path.suffix.lower() == '.safetensors':
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise ValueError(f'reading {path} needs another package: pip install safetensors') from error
        try:
            with safe_open(path, 'pt') as file:
                keys = file.keys()
                state = {key: file.get_tensor(key) for key in keys}
                classes = _parse_classes((file.metadata() or {}).get('classes'))
        except (OSError, SafetensorError) as error:
            raise ValueError(f'the weights {path} are not a safetensors file ({one_line(error)})') from error
    else:
        try:
            state = torch.load(path, map_location='cpu', weights_only=True)
        except Exception as error:  # anything may be raised for anything in the file
            raise ValueError(
                f'the weights {path} are not a state dict that can be loaded safely: {SAVE}'
            ) from error
    for key in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    _check_state(path, state, SAVE)
    # torch.nn.DataParallel puts a prefix before each key
    return {key.removeprefix('module.'): value for key, value in state.items()}, classes


def _check_state(path, state, advice):
    '''Refuse what is not a state dict of numbers.'''
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise ValueError(f'the weights {path} are not a state dict: {advice}')
    for key, value in state.items():
        # views of a few numbers may pretend to be of any size, more than the memory can hold
        if (value.layout != torch.strided or value.is_quantized or value.is_complex() or value.is_meta
                or value.nbytes > max(value.untyped_storage().nbytes(), LARGEST_VIEW)):
            raise ValueError(
                f'the weights {path} hold {key} in a form that is no dense tensor of real numbers: {advice}'
            )
        if value.is_floating_point() and value.float().isnan().any():
            raise ValueError(f'the weights {path} are broken: {key} holds NaN')


def _parse_classes(text):
    '''Get names of classes which are separated by commas, or a list in JSON.'''
    if not text:
        return None
    try:
        classes = json.loads(text)
    except ValueError:
        classes = None
    if not isinstance(classes, list):
        classes = text.split(',')
    return [' '.join(str(name).split()) for name in classes]


def _suggest(text, choices):
    '''The beginning of a sentence which suggests similar choices, or a few if there is none.'''
    similar = get_close_matches(text, choices, n=3)
    if similar:
        return f'did you mean {" or ".join(similar)}? Choose one of these names '
    return f'choose one of {", ".join(choices[:10])}{", …" if len(choices) > 10 else ""} '
