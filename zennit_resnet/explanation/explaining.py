'''One call from a network and photographs to heatmaps, pictures and files.'''
import os
from importlib.metadata import version

import numpy as np
import torch

from .. import __version__
from .._compat import COMPILED_MODULE
from ..arguments import as_integer, check_module
from ..attribution import CONTRASTS, as_contrast
from ..canonizers.eager import evaluating
from ..methods import Method
from ..models import Classifier, as_classifier, default_classes, hash_weights
from .photos import list_images, prepare, unique_names
from .result import Explanation, Explanations


def explain(
    model, images, target=None, method='resnet_lrp_ratio', *, classes=None, mean=None, std=None, size=None,
    keep_aspect=False, transform=None, value=None, contrast=None, batch_size=8
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
    classes, mean, std, size, keep_aspect, transform:
        See :py:func:`zennit_resnet.models.as_classifier`.
    value, contrast:
        What relevance starts from, see :py:meth:`zennit_resnet.methods.Method.attribute`.
    batch_size: int, optional
        How many images are explained at once.

    Returns
    -------
    :py:class:`Explanation` or :py:class:`Explanations`
        One of a single image, and a tuple of them for a list, folder or batch.

    Raises
    ------
    ValueError
        If an image cannot be read, its output or relevance is not finite, or an argument does not fit.
    TypeError
        If an argument is of another type.
    FileNotFoundError
        If there is no such file.
    UnsupportedOperation
        If the network does something that cannot be followed.

    Examples
    --------
    >>> import numpy as np
    >>> from torchvision.models import resnet18
    >>> from zennit_resnet.explanation import explain
    >>> photo = np.zeros((48, 64, 3), dtype=np.uint8)
    >>> explanation = explain(resnet18(num_classes=2).eval(), photo, classes=['cat', 'dog'], target='dog', size=32)
    >>> explanation.heatmap.shape, explanation.relevance.shape
    ((48, 64), (3, 32, 32))
    '''
    if isinstance(model, Classifier):
        given = {'classes': classes, 'mean': mean, 'std': std, 'size': size, 'transform': transform}
        given = [name for name, each in given.items() if each is not None] + ['keep_aspect'] * bool(keep_aspect)
        if given:
            raise TypeError(f'{", ".join(given)}: a Classifier has its own, leave it out or give the network.')
        classifier = model
    else:
        check_module(model)
        # as hooks need
        model = getattr(model, COMPILED_MODULE, model)
        classifier = as_classifier(model, classes, mean, std, size, keep_aspect, transform)
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
    '''Generate each image with a list of its explanations by each method, or the error that prevents them.'''
    batch_size = as_integer('batch_size', batch_size, 1)
    target = target.tolist() if isinstance(target, (np.ndarray, torch.Tensor)) else target
    targets = list(target) if isinstance(target, (list, tuple)) else [target] * len(items)
    if len(targets) != len(items):
        raise ValueError(f'there are {len(targets)} targets for {len(items)} images')
    if isinstance(contrast, str) and contrast not in CONTRASTS:
        contrast = with_names(classifier, None).find_class(contrast)
    contrast = as_contrast(contrast)
    is_each = isinstance(contrast, torch.Tensor) and contrast.ndim == 2
    if is_each and len(contrast) != len(items):
        raise ValueError(f'there are {len(contrast)} contrasts for {len(items)} images')
    places = {}
    names = unique_names([item if isinstance(item, (str, os.PathLike)) else 'image' for item in items])
    settings = describe_settings(classifier)
    for start in range(0, len(items), batch_size):
        chunk = range(start, min(start + batch_size, len(items)))
        results, groups = {}, {}
        for num in chunk:
            item = items[num]
            try:
                photo, input, box = prepare(classifier, item, places)
            except (FileNotFoundError, ValueError) as error:
                results[num] = error
                continue
            groups.setdefault(tuple(input.shape), []).append((num, input, {
                'photo': photo, 'box': box, 'contrast': contrast[num] if is_each else contrast, 'name': names[num],
                'source': str(item) if isinstance(item, (str, os.PathLike)) else '', 'settings': settings,
            }))
        for group in groups.values():
            nums, inputs, known = map(list, zip(*group))
            results.update(zip(nums, _explain_batch(
                classifier, torch.stack(inputs), methods, [targets[num] for num in nums], value,
                contrast[nums] if is_each else contrast, attribute, known,
            )))
        for num in chunk:
            yield items[num], results[num]


def _explain_batch(classifier, input, methods, targets, value, contrast, attribute, known):
    '''Explanations of images of the same shape, or an error, with what else is known of each.'''
    weight = next((tensor for tensor in classifier.model.parameters() if tensor.is_floating_point()), torch.zeros(()))
    input = input.to(weight.device, weight.dtype)
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
        index = [best if target is None else _find(classifier, target)
                 for best, target in zip(output.argmax(1).tolist(), targets)]
        computed = {}
        for method in methods:
            # methods that differ in their post-processing only have the same relevance
            if method.attribution not in computed:
                computed[method.attribution] = attribute(
                    method, classifier, input, torch.tensor(index), value, contrast
                )
    results = []
    for place, each in enumerate(known):
        if not output[place].isfinite().all():
            results.append(ValueError('the output of the network is not finite, check image and weights'))
            continue
        found = []
        for method in methods:
            result = computed[method.attribution]
            logits, relevance = (
                tensor[place].cpu().to(torch.promote_types(tensor.dtype, torch.float32)).numpy()
                for tensor in (result.output, result.relevance)
            )
            found.append(Explanation(
                relevance, logits, index[place], classifier.classes, method=method, initial=result.initial[place],
                sinks=result.sinks[place], value=result.value, sign=result.signs[place], **each,
            ) if np.isfinite(relevance).all() else None)
        is_lost = not any(found)
        results.append(ValueError(f'the relevance by {methods[0].text} is not finite') if is_lost else found)
    return results


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


def _find(classifier, target):
    if isinstance(target, str):
        return classifier.find_class(target)
    if isinstance(target, bool) or int(target) != target or not 0 <= int(target) < len(classifier.classes):
        raise ValueError(f'target={target!r} is not an index from 0 to {len(classifier.classes) - 1}')
    return int(target)


def with_names(classifier, number):
    '''A classifier with a name for each of a number of classes.'''
    classes = classifier.classes
    if classes is None and number is None:
        raise ValueError('classes have no names here: name them, or give an index')
    classes = default_classes(number) if classes is None else classes
    if number is not None and len(classes) != number:
        raise ValueError(f'there are {len(classes)} names of classes, but {number} outputs')
    return classifier._replace(classes=list(classes))


def describe_settings(classifier):
    '''Network, preprocessing, hash of the weights and versions, as a dict for JSON.'''
    return {
        'network': type(classifier.model).__name__,
        'weights sha256': hash_weights(classifier.model),
        'preprocessing': {
            'mean': [round(number, 6) for number in classifier.mean.flatten().tolist()],
            'std': [round(number, 6) for number in classifier.std.flatten().tolist()],
        },
        'versions': {
            'zennit-resnet': __version__, 'torch': torch.version.__version__,
            **{name: version(name) for name in ('torchvision', 'zennit')},
        },
    }
