'''One call from a network and photographs to heatmaps, pictures and files.'''
import os
from functools import cache
from importlib.metadata import version
from typing import NamedTuple

import numpy as np
import torch

from .. import __version__
from .._compat import COMPILED_MODULE
from ..arguments import check_module, check_number
from ..attribution import as_contrast
from ..canonizers.eager import evaluating
from ..methods import Method
from ..models import Classifier, as_classifier, default_classes, hash_weights
from .photos import list_images, prepare, unique_names
from .result import Explanation, Explanations


class Item(NamedTuple):
    '''An image, and what is asked about it.'''
    photo: np.ndarray
    input: torch.Tensor
    box: tuple
    target: object
    contrast: object
    origin: dict  # name, source and settings of its explanations


def explain(
    model, images, target=None, method='resnet_lrp_ratio', *, value=None, contrast=None, batch_size=8, **preprocessing
):
    '''Explain what a classifier sees in photographs.

    The network is explained in evaluation mode, on its device, and left as it was.

    Parameters
    ----------
    model: :py:obj:`torch.nn.Module` or :py:class:`~zennit_resnet.models.Classifier`
        A network from images of shape (batch, 3, height, width) to logits of shape (batch, classes).
    images: path, :py:obj:`PIL.Image.Image`, :py:obj:`numpy.ndarray`, :py:obj:`torch.Tensor`, or a list of these
        A photograph, as the path of a file, image of Pillow, or array of shape (height, width[, channels]), of uint8 or
        with values from 0 to 1; a folder of them; arrays of shape (batch, height, width, 3); or normalized inputs of
        the network, tensors of a floating point type and shape (3, height, width) or (batch, 3, height, width).
    target: int, str or list of these, optional
        Index or name of the class to explain, one for all or one for each. Default is the predicted class.
    method: str, :py:obj:`zennit.core.Composite`, optional
        See :py:class:`zennit_resnet.methods.Method`, or a composite.
    value, contrast:
        What relevance starts from, see :py:meth:`zennit_resnet.methods.Method.attribute`.
    batch_size: int, optional
        How many images are explained at once.
    classes, mean, std, size, keep_aspect, transform:
        See :py:func:`zennit_resnet.models.as_classifier`.

    Returns
    -------
    :py:class:`Explanation` or :py:class:`Explanations`
        One of a single image, and a tuple of them for a list, folder or batch.

    Raises
    ------
    ValueError
        If an image cannot be read, its output or relevance is not finite, or an argument does not fit.
    UnsupportedOperation
        If the network does something that cannot be followed.

    Examples
    --------
    >>> from torchvision.models import resnet18
    >>> import numpy as np
    >>> photo = np.zeros((48, 64, 3), dtype=np.uint8)
    >>> explanation = explain(resnet18(num_classes=2).eval(), photo, classes=['cat', 'dog'], target='dog', size=32)
    >>> explanation.heatmap.shape, explanation.relevance.shape
    ((48, 64), (3, 32, 32))
    '''
    if isinstance(model, Classifier):
        if preprocessing:
            raise TypeError(f'{", ".join(preprocessing)}: a Classifier has its own, leave it out or give the network.')
        classifier = model
    else:
        check_module(model)
        # as hooks need
        classifier = as_classifier(getattr(model, COMPILED_MODULE, model), **preprocessing)
    items, is_single = list_images(images)
    found = []
    for item, result in explain_each(classifier, items, [Method.of(method)], target, value, contrast, batch_size):
        if isinstance(result, Exception):
            if isinstance(result, ValueError) and isinstance(item, (str, os.PathLike)):
                raise ValueError(f'{item}: {result}') from result
            raise result
        found.extend(result)
    return found[0] if is_single else Explanations(found)


def explain_each(
    classifier, items, methods, target=None, value=None, contrast=None, batch_size=8, attribute=Method.attribute
):
    '''Generate each image with a list of its explanations by each method, or the error why there are none.

    Methods that differ in their post-processing only are computed once, by a function ``attribute`` with the arguments
    of :py:meth:`Method.attribute`. For all else, see :py:func:`explain`.
    '''
    check_number('batch_size', batch_size, 1)
    target = target.tolist() if isinstance(target, (np.ndarray, torch.Tensor)) else target
    targets = list(target) if isinstance(target, (list, tuple)) else [target] * len(items)
    if len(targets) != len(items):
        raise ValueError(f'there are {len(targets)} targets for {len(items)} images')
    contrast = as_contrast(classifier.find_contrast(contrast))
    contrasts = [contrast] * len(items)
    if isinstance(contrast, torch.Tensor):
        if contrast.ndim == 2 and len(contrast) != len(items):
            raise ValueError(f'there are {len(contrast)} contrasts for {len(items)} images')
        contrasts = list(contrast.expand(len(items), contrast.shape[-1]))
    sources = [str(item) if isinstance(item, (str, os.PathLike)) else '' for item in items]
    names = unique_names([source or 'image' for source in sources])
    settings, place = describe_settings(classifier), cache(classifier.place)
    for start in range(0, len(items), batch_size):
        chunk = range(start, min(start + batch_size, len(items)))
        results, groups = {}, {}
        for num in chunk:
            origin = {'name': names[num], 'source': sources[num], 'settings': settings}
            try:
                item = Item(*prepare(classifier, items[num], place), targets[num], contrasts[num], origin)
                groups.setdefault(tuple(item.input.shape), {})[num] = item
            except (FileNotFoundError, ValueError) as error:
                results[num] = error
        for group in groups.values():
            found = _explain_batch(classifier, [*group.values()], methods, value, attribute)
            results.update(zip(group, found))
        for num in chunk:
            yield items[num], results[num]


def _explain_batch(classifier, items, methods, value, attribute):
    '''Explanations, or an error, of each of some images of the same shape.'''
    weight = next((tensor for tensor in classifier.model.parameters() if tensor.is_floating_point()), torch.zeros(()))
    input = torch.stack([item.input for item in items]).to(weight.device, weight.dtype)
    contrast = items[0].contrast
    if isinstance(contrast, torch.Tensor):
        contrast = torch.stack([item.contrast for item in items])
    with evaluating(classifier.model), torch.inference_mode(False), torch.enable_grad():
        # tensors of inference mode have no gradients
        input = input.clone()
        output = _forward(classifier.model, input)
        if not isinstance(output, torch.Tensor) or output.ndim != 2:
            found = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ValueError(
                f'the network returns {found}, not logits of shape (batch, classes): have SelectOutput pick them'
            )
        classifier = with_names(classifier, output.shape[1])
        index = [
            best if item.target is None else classifier.find_class(
                item.target if isinstance(item.target, str) else f'index:{item.target}'
            ) for best, item in zip(output.argmax(1).tolist(), items)
        ]
        # methods that differ in their post-processing only have the same relevance
        computed = {}
        for method in methods:
            if method.attribution not in computed:
                computed[method.attribution] = attribute(
                    method, classifier, input, torch.tensor(index), value, contrast
                )
    for place, item in enumerate(items):
        if not output[place].isfinite().all():
            yield ValueError('the output of the network is not finite, check image and weights')
            continue
        found = []
        for method in methods:
            result = computed[method.attribution]
            logits, relevance = (
                each[place].cpu().to(torch.promote_types(each.dtype, torch.float32)).numpy()
                for each in (result.output, result.relevance)
            )
            found.append(Explanation(
                relevance, logits, index[place], classifier.classes, item.photo, item.box, method,
                result.initial[place], result.sinks[place], result.value, item.contrast, result.signs[place],
                **item.origin,
            ) if np.isfinite(relevance).all() else None)
        yield found if any(found) else ValueError(f'the relevance by {methods[0].text} is not finite')


def _forward(model, input):
    '''The output of a network, or a ValueError that tells why it has none.'''
    try:
        with torch.no_grad():
            return model(input)
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise ValueError(
            f'the network cannot process an input of shape {tuple(input.shape)}: {reason}. Some take squares of one '
            'size only, see size and keep_aspect (--size, --keep-aspect)'
        ) from error


def with_names(classifier, number):
    '''A classifier with a name for each of a number of classes.'''
    classes = default_classes(number) if classifier.classes is None else classifier.classes
    if len(classes) != number:
        raise ValueError(f'there are {len(classes)} names of classes, but {number} outputs')
    return classifier._replace(classes=list(classes))


def describe_settings(classifier):
    '''Network, preprocessing, hash of the weights and versions, as a dict for JSON.'''
    return {
        'network': type(classifier.model).__name__,
        'weights sha256': hash_weights(classifier.model),
        'preprocessing': classifier.normalization(),
        'versions': {
            'zennit-resnet': __version__, 'torch': torch.version.__version__,
            **{name: version(name) for name in ('torchvision', 'zennit')},
        },
    }
