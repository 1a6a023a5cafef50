'''What relevance starts from.'''
import dataclasses
from collections.abc import Mapping

import numpy as np
import torch

from ._autograd import divides_by_output
from ._choices import CONTRASTS, VALUES
from ._compat import caller
from .arguments import as_map, check_choice, check_module, check_number, show

# Names of the output to explain in libraries that return several, in the order in which to suggest one
LIKELY = ('logits', 'out', 'output', 'prediction', 'pred')


def parts_of(output):
    '''The parts of what a network returns by their keys, fields, attributes or indices, as a dict.'''
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, (tuple, list)):
        return dict(zip(getattr(output, '_fields', range(len(output))), output))
    if dataclasses.is_dataclass(output):
        # those with slots have no dict
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return {key: value for key, value in getattr(output, '__dict__', {}).items() if not key.startswith('_')}


def check_key(key):
    '''Raise a TypeError unless an argument can pick the output to explain, see :py:func:`select_output`.'''
    if key is not None and (isinstance(key, (bool, float, type, torch.Tensor)) or not (
        isinstance(key, (str, int)) or callable(key)
    )):
        raise TypeError(
            f'output={key!r} does not say which output to explain: it must be a key, index, name or function!'
        )


def select_output(output, key=None, remedy='SelectOutput(model, {}) in place of the model'):
    '''Pick the tensor to explain from what a network returns.

    Parameters
    ----------
    output: object
        A tensor, or a dict, tuple, list, namedtuple, dataclass, ``ModelOutput`` or any object with attributes.
    key: str, int or callable, optional
        The key, index or name of the tensor unless the output is one, or a function ``(output) -> tensor``.
    remedy: str, optional
        What to do if there is no key, for the message: a format string for the key and ``access`` to it.

    A TypeError, which names the keys that there are, is raised if it is no tensor, and a ValueError if there is no such
    key.
    '''
    parts = {} if isinstance(output, torch.Tensor) else parts_of(output)
    names = ', '.join(map(repr, parts))
    label = f'The network returns {type(output).__name__}' + (f' with {names}' if parts else '')
    if callable(key):
        picked = key(output)
        if not isinstance(picked, torch.Tensor):
            raise TypeError(f'output must return the tensor to explain, but returns {type(picked).__name__}. {label}.')
        return picked
    if isinstance(output, torch.Tensor):
        if key is not None:
            raise TypeError(f'The network returns a single tensor, so output={key!r} picks nothing: leave it out.')
        return output
    if key is None:
        tensors = [name for name, value in parts.items() if isinstance(value, torch.Tensor)]
        likely = [name for name in LIKELY if name in tensors] or tensors
        advice = remedy.format(repr(likely[0]) if likely else 'lambda output: ...', access=_access(output, *likely[:1]))
        raise TypeError(f'{label} instead of a tensor. Choose what to explain: {advice}.')
    if key in parts:
        picked = parts[key]
    elif isinstance(key, int) and -len(parts) <= key < len(parts) and not (
        isinstance(output, Mapping) and any(isinstance(name, int) for name in parts)
    ):
        picked = list(parts.values())[key]
    elif isinstance(key, str) and hasattr(output, key) and not isinstance(output, Mapping):
        # properties and slots
        picked = getattr(output, key)
    else:
        raise ValueError(f'{label}, but not with output={key!r}.')
    if not isinstance(picked, torch.Tensor):
        raise TypeError(
            f'output={key!r} picks {type(picked).__name__} instead of a tensor: give a function of what the network '
            f'returns, such as lambda output: output[{key!r}][0]. {label}.'
        )
    return picked


def _access(output, key=...):
    '''The Python code that gets a part of an output.'''
    is_field = isinstance(key, str) and not isinstance(output, Mapping)
    return f'.{key}' if is_field else '[...]' if key is ... else f'[{key!r}]'


class SelectOutput(torch.nn.Module):
    '''A network that returns one tensor of what another network returns, which may be a dict, tuple or dataclass.

    This is for all that needs a tensor as output, such as Zennit's ``Gradient``. The other network is the attribute
    ``model``, so names of modules begin with ``'model.'``. Rules apply to a function that picks a tensor as well, such
    as one that averages a map of logits.

    For ``output``, and what the forward pass raises, see the key of :py:func:`select_output`. A TypeError is raised at
    once if ``model`` is not a module, or ``output`` is of another type.

    Examples
    --------
    >>> import torch
    >>> from zennit.attribution import Gradient
    >>> from zennit_resnet import ResNetLRP, initial_relevance
    >>> from zennit_resnet.attribution import SelectOutput
    >>> class Network(torch.nn.Linear):
    ...     def forward(self, input):
    ...         return {'logits': super().forward(input)}
    >>> model = SelectOutput(Network(4, 3).eval(), 'logits')
    >>> output, relevance = Gradient(model, ResNetLRP())(torch.rand(2, 4), initial_relevance(1))
    >>> output.shape, relevance.shape
    (torch.Size([2, 3]), torch.Size([2, 4]))
    '''
    def __init__(self, model, output):
        check_module(model)
        check_key(output)
        super().__init__()
        self.model, self.output = model, output
        self.training = model.training

    def forward(self, *args, **kwargs):
        return select_output(self.model(*args, **kwargs), self.output)

    def extra_repr(self):
        return f'output={show(self.output)}'


def initial_relevance(target, value=None, output=None, contrast=None, contrast_weight=1.):
    '''Create a function that gives the relevance at the output, to be used as ``attr_output`` of Zennit's attributors.

    Relevance starts at class k with c_k v_k: a weight times a value. Without a contrast, the weight is one for the
    target and zero for all others. With one, it is negative for rivals, and all weights sum to zero (unless
    ``contrast_weight`` is another).

    Parameters
    ----------
    target: int, sequence of int, :py:obj:`torch.Tensor`, callable or None
        Index of the class to explain, one for all samples, or one for each sample of the batch. As in Captum, a single
        one may be negative to count from the last class. None for networks with a single output. For outputs of any
        shape (logits of a mask or box, an embedding), a function ``(output) -> (batch,)``: its gradient are the
        weights.
    value: str, optional
        ``'logit'`` (default) for the output y_k of a class, ``'softmax'`` for its probability, ``'one'`` for one. The
        default for a contrast or function is what the rule of the last layer needs, see ``contrast``.
    output: str, int or callable, optional
        Which of several outputs of the network to explain, see :py:func:`select_output`. Not for Zennit's attributors,
        which take gradients of all outputs: give them :py:class:`SelectOutput` ``(model, output)`` as a network.
    contrast: str, int, sequence of int or :py:obj:`torch.Tensor`, optional
        Why the target and not something else: what the weight -1 is shared among. ``'centred'`` all other classes
        evenly, -1 / (K - 1); ``'softmax'`` all others by their probabilities, -p_k / (1 - p_target), which is SGLRP
        (Iwana et al. 2019) with its scale p_target (1 - p_target) left out; ``'runner_up'`` the most probable other
        class; or classes: one, several for all examples, or a tensor of shape (batch, classes) of those of each.

        A rule that divides by the output (``ResNetLRP(classifier='epsilon')``, ``BlockLRP``) has to start from
        ``'logit'``, and relevance sums to the contrast of logits sum_k c_k y_k (less biases of the last layer). Other
        rules (z+, R-LRP) have to start from ``'one'``: their shares do not depend on the size of a logit, whose sign
        would turn them over. Relevance of z+ then sums to zero.
    contrast_weight: float, optional
        How much rivals count: their weights sum to minus this. Below one, what the target has in common with them is
        not taken away completely, as in FinerCAM (Zhang et al. 2025).

    Returns
    -------
    callable
        A function ``(output: (batch, classes)) -> (batch, classes)``, or ``(batch,) -> (batch,)`` for a single output,
        or of any other shape if the target is a function. It raises a ValueError for another number of targets than
        examples, a contrast of a single class, a softmax of probabilities, or if it is not known what to start from, an
        IndexError for a class outside the classes, and a TypeError, which names the outputs that there are, for what is
        no tensor.

    Raises
    ------
    ValueError
        If ``value`` or ``contrast`` is unknown, there is a contrast for a function, which has its own, or a weight
        without a contrast or that is not positive.
    TypeError
        If ``target`` or ``contrast`` is not made of integers, or ``output`` is none of the above.
    '''
    check_choice('value', value, (None, *VALUES))
    check_key(output)
    is_function = callable(target) and not isinstance(target, (type, torch.Tensor))
    target = target if target is None or is_function else as_indices('target', target, 1)
    contrast = as_contrast(contrast)
    check_contrast_weight(contrast, contrast_weight)
    _check_function(target, contrast)

    def attr_output(result):
        # the caller takes the gradient of all that the network has returned, after this
        is_zennit = not torch.compiler.is_compiling() and caller().f_globals.get('__name__') == 'zennit.attribution'
        if output is not None and is_zennit and not isinstance(result, torch.Tensor):
            raise TypeError(
                f'Zennit\'s attributors take the gradient of all that the network returns, which is '
                f'{type(result).__name__}: give them SelectOutput(model, {show(output)}), and no output here.'
            )
        if is_zennit:
            check_gradients()
        result = select_output(result, output)
        outputs, index = at_least_single(result.detach()), target
        if not callable(target):
            if result.ndim not in (1, 2):
                raise ValueError(
                    f'The output must be of shape (batch, classes) or (batch,), but is {tuple(result.shape)}. Of a map '
                    'of logits, explain for instance SelectOutput(model, lambda output: output.mean((2, 3))), or give '
                    'a function as a target.'
                )
            outputs = outputs.reshape(len(result), -1)
            index = _index(target, outputs)
        chosen = value or default_value(result, is_signed=callable(target) or contrast is not None)
        return weigh(output_weights(outputs, index, contrast, contrast_weight), outputs, chosen).reshape(result.shape)

    return attr_output


def at_least_single(tensor):
    '''A tensor in at least single precision, in which relevance is kept.'''
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def check_gradients():
    '''Raise a RuntimeError where autograd propagates nothing.'''
    if not torch.is_grad_enabled():
        raise RuntimeError(
            'Relevance is propagated by autograd: leave torch.no_grad() or torch.inference_mode(), within which the '
            'attributor is called.'
        )


def output_weights(outputs, target, contrast=None, contrast_weight=1.):
    '''Weights of outputs of shape (batch, classes, ...), of the same shape, see :py:func:`initial_relevance`.

    The target has indices of one output for each example, of shape (batch, dimensions but the batch) or (batch,), or is
    a function ``(outputs) -> (batch,)``, or None. Rivals, by :py:func:`as_contrast`, are other classes at the same
    place.
    '''
    _check_function(target, contrast)
    if callable(target):
        return _gradient_weights(target, outputs)
    if contrast is not None and (target is None or outputs.shape[1] == 1):
        raise ValueError(
            f'contrast={contrast!r} is for several classes, but the output is of shape {tuple(outputs.shape)}: leave '
            'it out.'
        )
    if target is None:
        return torch.ones_like(outputs)
    sizes = torch.tensor(outputs.shape[1:], device=outputs.device)
    index = target.to(outputs.device).reshape(len(outputs), -1) % sizes
    weights = torch.zeros_like(outputs)
    place = (torch.arange(len(outputs), device=outputs.device), slice(None), *index[:, 1:].unbind(1))
    logits, index = outputs[place], index[:, :1]
    one_hot = torch.zeros_like(logits).scatter_(1, index, 1.)
    weights[place] = one_hot if contrast is None else one_hot - contrast_weight * rival_shares(logits, index, contrast)
    return weights


def rival_shares(logits, index, contrast):
    '''Shares of rivals, of shape (batch, classes), given the target of each example of shape (batch, 1).'''
    num, classes = logits.shape
    shares = torch.zeros_like(logits)
    rivals = logits.scatter(1, index, -torch.inf)
    if isinstance(contrast, str):
        if contrast == 'centred':
            return (shares + 1 / (classes - 1)).scatter(1, index, 0.)
        if contrast == 'softmax':
            _check_logits(logits, 'contrast')
            return rivals.softmax(1)
        return shares.scatter(1, rivals.argmax(1, keepdim=True), 1.)
    others = contrast.to(logits.device)
    if others.ndim == 2 and len(others) != num:
        raise ValueError(f'There are contrasts of {len(others)} examples for a batch of {num}!')
    if bool(((others < 0) | (others >= classes)).any()):
        raise IndexError(f'Contrast {others.tolist()} is none of {classes} classes: choose from 0 to {classes - 1}!')
    others = others.expand(num, others.shape[-1])
    return shares.scatter_add(1, others, torch.full_like(others, 1 / others.shape[1], dtype=shares.dtype))


def _check_logits(outputs, name):
    '''Raise a ValueError if a softmax would be taken of outputs that are those of one.'''
    if outputs.numel() and bool(((outputs >= 0).all() & ((outputs.sum(1) - 1).abs() < 1e-4).all())):
        instead = ', or choose \'logit\', which is the probability then' if name == 'value' else ''
        raise ValueError(
            f'{name}=\'softmax\' takes the softmax of logits, but the output looks like probabilities: have the '
            f'network return what its softmax is computed from{instead}.'
        )


def _gradient_weights(function, outputs):
    '''Weights of all outputs in a scalar for each example: the gradient of a function ``(outputs) -> (batch,)``.'''
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        scalars = function(leaf)
    if not isinstance(scalars, torch.Tensor) or scalars.shape != outputs.shape[:1] or not scalars.requires_grad:
        found = f'shape {tuple(scalars.shape)}' if isinstance(scalars, torch.Tensor) else type(scalars).__name__
        raise ValueError(
            f'A function as a target must return a number for each of {len(outputs)} examples that depends on the '
            f'output of shape {tuple(outputs.shape)}, but returns {found}.'
        )
    return torch.autograd.grad(scalars.sum(), leaf)[0]


def weigh(weights, outputs, value):
    '''Weights times values of the outputs, see :py:func:`initial_relevance`.'''
    if value == 'one':
        return weights
    if value == 'softmax':
        if outputs.ndim < 2 or outputs.shape[1] == 1:
            raise ValueError(
                f'value=\'softmax\' is for several classes, but the output is of shape {tuple(outputs.shape)}: use '
                '\'logit\'.'
            )
        _check_logits(outputs, 'value')
        outputs = outputs.softmax(1)
    # outputs without a part in it may be infinite
    return (weights * outputs).masked_fill(weights == 0, 0.)


def default_value(output, is_signed):
    '''What weights of one sign (the logit) or both (what the rule of the last layer needs) start from by default.'''
    divides = not is_signed or divides_by_output(output)
    if divides is None:
        raise ValueError(
            'What a contrast or function starts from depends on the rule of the last layer, which is none of this '
            'package: choose \'logit\' for rules that divide by the output, such as LRP-epsilon, and \'one\' for '
            'gradients.'
        )
    return 'logit' if divides else 'one'


def as_contrast(contrast):
    '''Check a contrast, and get classes as a tensor of shape (rivals,) or (batch, rivals).'''
    if contrast is None or isinstance(contrast, str):
        check_choice('contrast', contrast, (None, *CONTRASTS))
        return contrast
    indices = as_indices('contrast', contrast, 2)
    if not indices.numel():
        raise ValueError(f'contrast={contrast!r} names no class: leave it out, or name one.')
    return indices.reshape(1) if not indices.ndim else indices


def check_contrast_weight(contrast, weight):
    '''Raise a ValueError unless a number says how much rivals of a contrast count.'''
    check_number('contrast_weight', weight)
    if weight <= 0 or contrast is None and weight != 1:
        reason = 'is for contrasts: name one' if contrast is None else 'is not positive: leave the contrast out'
        raise ValueError(f'contrast_weight={weight!r} {reason}.')


def _check_function(target, contrast):
    if callable(target) and contrast is not None:
        raise ValueError(f'contrast={contrast!r} is for classes: have the function return a difference.')


def as_indices(name, value, dims=torch.inf):
    '''Indices of classes as a tensor of no more than some dimensions.'''
    try:
        value = as_map(name, value) if isinstance(value, np.ndarray) else value
        # without elements, lists have no type
        indices = torch.as_tensor(value, dtype=torch.long if isinstance(value, (list, tuple)) and not value else None)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f'{name}={value!r} is not made of class indices!') from error
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool or indices.ndim > dims:
        raise TypeError(
            f'{name} is made of class indices, integers for all samples or one for each, not {indices.dtype} of shape '
            f'{tuple(indices.shape)}!'
        )
    return indices.long()


def _index(target, logits):
    '''Index of the class for each example, of shape (batch, 1).'''
    num, classes = logits.shape
    if target is None:
        if classes != 1:
            raise ValueError(f'target=None is for a single output, but there are {classes} classes: choose one!')
        target = torch.zeros((), dtype=torch.long)
    index = target.to(logits.device)
    if index.ndim == 1 and len(index) != num:
        raise ValueError(f'There are {len(index)} targets for a batch of {num}!')
    lowest = 0 if index.ndim else -classes
    if bool(((index < lowest) | (index >= classes)).any()):
        raise IndexError(f'Target {index.tolist()} is none of {classes} classes: choose from 0 to {classes - 1}!')
    return (index % classes).expand(num)[:, None]
