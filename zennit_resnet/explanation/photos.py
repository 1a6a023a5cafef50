'''Photographs in all forms, and what a network sees of them.'''
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..image import read_image, to_rgb
from ..models import Unfollowed

# Bytes of a name
LONGEST = 150


def list_images(images):
    '''Get a list of images, and whether there is a single one, see :py:func:`explain`.'''
    if isinstance(images, (str, os.PathLike)):
        if not os.path.isdir(images):
            return [Path(images)], True
        known = {suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN}
        paths = sorted(
            path for path in Path(images).iterdir()
            if path.suffix.lower() in known and not path.name.startswith('.') and not path.is_dir()
        )
        if not paths:
            raise ValueError(f'there are no photographs in the folder {images}')
        return paths, False
    if isinstance(images, Image.Image):
        return [images], True
    if isinstance(images, (np.ndarray, torch.Tensor)):
        is_batch = images.ndim == 4
        return (list(images) if is_batch else [images]), not is_batch
    if not isinstance(images, (list, tuple)):
        raise TypeError(f'images of type {type(images).__name__}: give paths, images of Pillow, arrays or tensors.')
    if not len(images):
        raise ValueError('there is no image to explain')
    return [item for each in images for item in list_images(each)[0]], False


def prepare(classifier, item, places=None):
    '''Photograph, input, and the box of what the network sees, which the dict ``places`` keeps by size.'''
    places = {} if places is None else places
    if isinstance(item, torch.Tensor) and item.is_floating_point():
        if item.ndim != 3 or len(item) != len(classifier.mean) or not item.numel():
            raise ValueError(f'an input is of shape {tuple(item.shape)}, not ({len(classifier.mean)}, height, width)')
        if not item.isfinite().all():
            raise ValueError('the input is not finite')
        input = item.detach().float()
        if input.amin() >= 0 and input.amax() <= 1 and classifier.mean.any():
            warnings.warn('values from 0 to 1 look as if they were not normalized, as inputs of the network are')
        photo = classifier.photo(input)
        return photo, input, (0, 0, photo.shape[1], photo.shape[0])
    photo = as_photo(item)
    input = classifier.transform(photo)
    try:
        if photo.size not in places:
            places[photo.size] = classifier.place(photo.size)
        box = places[photo.size]
    except Unfollowed:
        # drawn on what the network sees
        photo = Image.fromarray(classifier.photo(input))
        box = (0, 0, *photo.size)
    return np.asarray(photo), input, box


def as_photo(item):
    '''Get a photograph as 8-bit RGB of Pillow, see :py:func:`explain`.'''
    if isinstance(item, (str, os.PathLike)):
        return read_image(item)
    if isinstance(item, Image.Image):
        return to_rgb(item)
    if isinstance(item, torch.Tensor):
        if item.ndim == 3 and len(item) not in (1, 3, 4):
            raise ValueError(f'a photograph as a tensor is of shape {tuple(item.shape)}, not (3, height, width)')
        item = item.detach().cpu()
        item = (item.movedim(0, -1) if item.ndim == 3 else item).numpy()
    values = np.asarray(item)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if not values.size or not (values.ndim == 2 or values.ndim == 3 and values.shape[2] in (3, 4)):
        raise ValueError(f'a photograph is of shape {values.shape}, not (height, width, 3)')
    if values.dtype.kind == 'f':
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f'a photograph of type {values.dtype} has values from {values.min():g} to {values.max():g}: give '
                'values from 0 to 1, uint8, or a normalized input as a tensor'
            )
        values = (values * 255).round().astype(np.uint8)
    if values.dtype != np.uint8:
        raise ValueError(f'a photograph is of type {values.dtype}: give uint8, or values from 0 to 1')
    return to_rgb(Image.fromarray(values))


def unique_names(paths):
    '''Names to write files under, one for each: the stem, with a number where another path has the same.'''
    names, taken = [], set()
    for path in paths:
        # with a method and an ending, a name must not become too long
        stem, num = os.fsencode(Path(path).stem)[:LONGEST].decode(errors='ignore') or 'image', 1
        name = stem
        # some file systems do not distinguish upper and lower case
        while name.lower() in taken:
            num += 1
            name = f'{stem}_{num}'
        taken.add(name.lower())
        names.append(name)
    return names
