'''State dicts from files: read safely, and without what training scripts put around them.'''
import json
import os
from pathlib import Path

import torch

from ._text import one_line

SUFFIXES = ('.pt', '.pth', '.ckpt', '.safetensors')
LARGEST_VIEW = 2 ** 30
SAVE = 'save them with torch.save(model.state_dict(), path)'
AGAIN = 'delete this file, and it is downloaded again'
# Keys under which training scripts commonly store the state dict beside other things, also one within another
WRAPPERS = ('state_dict', 'model_state_dict', 'model', 'module', 'net', 'network')


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
            raise ValueError(f'the weights {path} are not a state dict that can be loaded safely: {SAVE}') from error
    while isinstance(state, dict):
        inner = [state[key] for key in WRAPPERS if isinstance(state.get(key), dict)]
        if not inner:
            break
        state = inner[0]
    check_state(path, state, SAVE)
    # torch.nn.DataParallel puts a prefix before each key
    return {key.removeprefix('module.'): value for key, value in state.items()}, classes


def check_state(path, state, advice):
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


def strip_prefix(state, expected, path):
    '''Remove what wrappers of a network put before each key, such as Lightning's ``model.``.'''
    # counters are not in every file
    needed = [key for key in expected if not key.endswith('.num_batches_tracked')]
    ends = {key.removesuffix(needed[0]) for key in state if key.endswith(needed[0])}
    prefixes = sorted(prefix for prefix in ends if all(f'{prefix}{key}' in state for key in needed))
    if '' in prefixes or not prefixes:
        return state
    if len(prefixes) > 1:
        raise ValueError(
            f'the weights {path} hold {len(prefixes)} networks, {", ".join(prefixes)}: save the state dict of one'
        )
    # what else is in the file are weights of a loss or the like
    return {key.removeprefix(prefixes[0]): value for key, value in state.items() if key.startswith(prefixes[0])}
