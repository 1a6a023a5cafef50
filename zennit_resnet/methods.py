'''Attribution methods by name, with options, splitting and post-processing.

The grammar, ``NAME[:KEY=VALUE[,KEY=VALUE...]][+SUFFIX...]``, as in
``resnet_lrp_ratio:first_layer=ones,maxpool=avg2x2+quantize8``, is that of the command line and of the evaluator of
``captum_adapters``, which adds methods to those of :py:func:`find_entries`.
'''
import ast
import copy
import inspect
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from zennit.attribution import Gradient
from zennit.composites import COMPOSITES
from zennit.core import Composite
from zennit.torchvision import ResNetCanonizer
from zennit.types import Convolution

from ._autograd import divides_by_output
from ._choices import INPUT_X_GRADIENT, LEVELS, MAX_LEVELS, POSTPROCESSING, SPLITTING, VALUES
from ._text import suggest
from .attribution import as_contrast, check_contrast_weight, initial_relevance
from .classic import SETTINGS, ClassicLRP
from .composites import SPLITTING as RULES
from .composites import BlockLRP, RelativeLRP, ResNetLRP, with_splitting
from .conservation import conservation_ledger
from .gamma import GammaLRP
from .postprocess import EmptyMaskWarning, c1c, c3, heat_quantization, sum_channels

CLASSIC_OPTIONS = ('addition', 'batch_norm', 'stabilizer', 'with_bias')
# what composites are given by the network, or by the grammar
NO_OPTIONS = {'canonizers', 'layer_map', 'first_map', 'low', 'high'}


class Entry(NamedTuple):
    '''What is known about a method before there is a network.'''
    kind: str  # 'ours', 'baseline' or 'control'
    options: tuple = ()
    composite: Callable | None = None  # a function of the options, None for methods that are no composites
    splits: bool = False  # whether splitting at skip connections can be added


def find_entries():
    '''All methods, an :py:class:`Entry` by name: our composites, classic rules, the gradient, and Zennit's.'''
    composites = {
        name: Entry(
            'ours' if is_own(name) else 'baseline', tuple(sorted(set(_parameters(name)) - NO_OPTIONS)),
            COMPOSITES[name], not is_own(name)
        ) for name in COMPOSITES
    }
    own = {name: entry for name, entry in composites.items() if entry.kind == 'ours'}
    classic = {
        name: Entry('baseline', CLASSIC_OPTIONS, partial(ClassicLRP, **SETTINGS[name]), True) for name in SETTINGS
    }
    return {**own, **classic, INPUT_X_GRADIENT: Entry('baseline'), **composites}


def is_own(name):
    '''Find out whether a composite, by class or registered name, or a base class of it, is one of this package.'''
    composite = COMPOSITES.get(name, name)
    classes = composite.__mro__ if inspect.isclass(composite) else (composite,)
    return any(cls.__module__.partition('.')[0] == __name__.partition('.')[0] for cls in classes)


def _parameters(name):
    '''Parameters of a composite, with those that it hands on to the class it is derived from.'''
    composite, found = COMPOSITES[name], {}
    for cls in composite.__mro__ if inspect.isclass(composite) else (composite,):
        parameters = inspect.signature(cls).parameters
        found = {**parameters, **found}
        if not any(param.kind is param.VAR_KEYWORD for param in parameters.values()):
            break
    return {key: param for key, param in found.items() if param.kind not in (param.VAR_KEYWORD, param.VAR_POSITIONAL)}


def parse_options(text, options):
    '''Parse options ``key=value,…`` of a method, where values are numbers, words, or true and false.'''
    parsed = {}
    for part in filter(None, options.split(',')):
        key, sign, value = part.partition('=')
        if not sign or not key.isidentifier() or key in parsed:
            raise ValueError(f'option {part!r} of {text} is not of the form key=value, or repeated')
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[key] = {'true': True, 'false': False}.get(value.lower(), value)
    return parsed


class Method:
    '''An attribution method by name.

    Parameters
    ----------
    text: str
        A name, options and suffixes. Options of composites are their arguments, ``initial``, what relevance starts
        from, and ``contrast``, what the target is compared with (``'centred'``, ``'softmax'``, ``'runner_up'`` or the
        number of a class), and ``contrast_weight``, see :py:func:`zennit_resnet.attribution.initial_relevance`. To a
        composite that does not split relevance at skip connections by itself, ``'+ratio'``, ``'+symmetric'`` or
        ``'+zennit'`` may be appended; to all, ``'+abs'`` for the magnitude of the sum over channels, and one of
        ``'+quantize'`` (also with a number of levels, as in ``'+quantize8'``), ``'+c1c'``, ``'+c3'`` and ``'+none'``
        for the post-processing of their heatmaps.
    postprocess: str, optional
        Post-processing of a method to which none is appended. Default is ``'none'``.
    levels: int, optional
        Number of levels of ``'quantize'`` without a number. Default is 8.

    Attributes
    ----------
    text: str
        The name with all that belongs to it.
    name: str
        The name without options and suffixes.
    attribution: str
        The name without post-processing. Methods for which it is the same have their attributions in common.

    Raises
    ------
    ValueError
        If there is no such method, or an option or suffix is not for it. The message is a single line.
    '''
    def __init__(self, text, postprocess='none', levels=LEVELS):
        self.text = text.strip()
        head, *suffixes = self.text.split('+')
        self.name, _, options = head.partition(':')
        entries = self.entries()
        if self.name not in entries:
            raise ValueError(f'unknown method {self.name or self.text!r}{suggest(self.name, sorted(entries))}')
        self.entry = entries[self.name]
        self.splitting, self.magnitude, self.postprocess, self.levels = 'none', False, postprocess, levels
        kinds = [self._add_suffix(suffix) for suffix in suffixes]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise ValueError(f'{self.text} has more than one {kind}: choose one')
        if not 2 <= self.levels <= MAX_LEVELS:
            raise ValueError(f'{self.text} has {self.levels} levels: choose from 2 to {MAX_LEVELS}')
        if postprocess != 'none' and 'post-processing' not in kinds:
            self.text += f'+{postprocess}' + (str(levels) if postprocess == 'quantize' else '')
        if self.splitting != 'none' and not self.entry.splits:
            raise ValueError(
                f'splitting {self.splitting!r} cannot be added to {self.name}: it is for composites of Zennit and '
                'classic rules'
            )
        if self.splitting == 'zennit' and self.name in SETTINGS:
            raise ValueError(f'{self.text}: classic rules find additions by themselves, choose +ratio or +symmetric')
        self.attribution = head if self.splitting == 'none' else f'{head}+{self.splitting}'
        self.options = parse_options(self.text, options)
        self.initial, self.contrast, self.contrast_weight = None, None, 1.
        if self.entry.composite is not None:
            self.initial = self.options.pop('initial', None)
            if self.initial not in (None, *VALUES):
                raise ValueError(f'{self.text}: initial={self.initial} is not one of {", ".join(VALUES)}')
            try:
                self.contrast = as_contrast(self.options.pop('contrast', None))
                self.contrast_weight = self.options.pop('contrast_weight', 1.)
                check_contrast_weight(self.contrast, self.contrast_weight)
            except (TypeError, ValueError) as error:
                raise ValueError(f'{self.text}: {" ".join(str(error).split())}') from error
        for key in self.options:
            if key not in self.entry.options:
                known = ', '.join(self.entry.options) or 'none'
                raise ValueError(f'{self.text}: {self.name} has no option {key!r}, but {known}')
        if self.entry.composite is not None:
            self._check_composite()

    @classmethod
    def of(cls, method):
        '''Get a method of a name, a method, or a composite of Zennit's or this package.'''
        if isinstance(method, Method):
            return method
        if isinstance(method, str):
            return cls(method)
        if not isinstance(method, Composite):
            example = f', such as {method.__name__}()' if isinstance(method, type) else ''
            raise TypeError(f'method={method!r} is neither a name nor a composite: give an instance of one{example}.')
        made = cls('resnet_lrp_ratio')
        made.text = made.name = made.attribution = type(method).__name__
        made.entry = Entry('ours' if is_own(type(method)) else 'baseline', (), lambda: method)
        return made

    @staticmethod
    def entries():
        return find_entries()

    @property
    def kind(self):
        '''``'ours'``, ``'baseline'`` or ``'control'``. A composite of others is ours with our splitting.'''
        return 'ours' if self.splitting in ('ratio', 'symmetric') else self.entry.kind

    def _add_suffix(self, suffix):
        quantize = re.fullmatch('quantize([0-9]+)', suffix)
        if suffix in SPLITTING:
            self.splitting = suffix
            return 'splitting'
        if suffix == 'abs':
            self.magnitude = True
            return 'magnitude'
        if quantize:
            self.postprocess, self.levels = 'quantize', int(quantize[1])
        elif suffix in ('none', *POSTPROCESSING):
            self.postprocess = suffix
        else:
            choices = ', '.join(f'+{choice}' for choice in (*SPLITTING, 'abs', *POSTPROCESSING))
            raise ValueError(f"unknown suffix '+{suffix}' of {self.name}: choose one of {choices}")
        return 'post-processing'

    def _check_composite(self):
        '''Check values of options, as far as that is possible without a network.'''
        required = [
            key for key, param in (() if self.name in SETTINGS else _parameters(self.name).items())
            if param.default is param.empty and key not in self.options
        ]
        self.needs_bounds = set(required) == {'low', 'high'} or self.options.get('first_layer') == 'zbox'
        if required and not self.needs_bounds:
            raise ValueError(f'method {self.name!r} cannot be used here, since it needs {", ".join(required)}')
        bounds = {'low': torch.zeros(()), 'high': torch.ones(())} if self.needs_bounds else {}
        try:
            self.entry.composite(**self.options, **bounds)
        except (TypeError, ValueError) as error:
            raise ValueError(f'{self.text}: {" ".join(str(error).split())}') from error

    def composite(self, classifier):
        '''Create the composite for a :py:class:`~zennit_resnet.models.Classifier`, or None for the gradient.'''
        if self.entry.composite is None:
            return None
        options = dict(self.options)
        if self.needs_bounds:
            device = next((param.device for param in classifier.model.parameters()), None)
            options.update(zip(('low', 'high'), (bound.to(device) for bound in classifier.bounds())))
        if self.name in SETTINGS:
            return self.entry.composite(**options, **({} if self.splitting == 'none' else {'addition': self.splitting}))
        if self.splitting == 'zennit':
            options['canonizers'] = [ResNetCanonizer()]
        composite = self.entry.composite(**options)
        return with_splitting(composite, RULES[self.splitting]()) if self.splitting in RULES else composite

    def process(self, heatmap):
        '''Post-process heatmaps, sums over channels of shape (batch, height, width).'''
        heatmap = heatmap.abs() if self.magnitude else heatmap
        if self.postprocess == 'none':
            return heatmap
        if self.postprocess == 'quantize':
            return heat_quantization(heatmap, self.levels)
        with warnings.catch_warnings():
            # an empty heatmap is drawn and measured like any other
            warnings.simplefilter('ignore', EmptyMaskWarning)
            return {'c1c': c1c, 'c3': c3}[self.postprocess](heatmap)

    def attribute(self, classifier, input, target=None, value=None, contrast=None):
        '''Compute relevance of a classifier's normalized input, of shape (batch, channels, height, width).

        The result is :py:class:`Attributed`. By default, the target is the predicted class of each sample, an index, or
        one for each. ``value`` and ``contrast`` are what relevance starts from, and what the target is compared with,
        see :py:func:`zennit_resnet.attribution.initial_relevance`, unless ``initial`` and ``contrast`` are options of
        the method. By default, the value is what makes relevance that supports the target positive: the logit where the
        rule of the last layer divides by it, and one elsewhere. Input times gradient always explains the logit.
        '''
        is_gradient = self.entry.composite is None
        attr_output, found = self._start(classifier, input, target, 'one' if is_gradient else value, contrast)
        # Zennit 1.0.0 does not restore a model completely after merging batch normalization
        model = copy.deepcopy(classifier.model) if self.splitting == 'zennit' else classifier.model
        composite = self.composite(classifier)
        output, relevance = Gradient(model=model, composite=composite)(input, attr_output)
        output, start = output.detach(), found['start']
        if is_gradient:
            # an attribution of logits, so these are what its sum has to be compared with
            relevance, start, found['value'] = relevance * input, start * output, 'logit'
            found['signs'] = [1] * len(output)
        sinks = getattr(composite, 'sinks', None)
        kept = start.new_zeros(len(start)) if sinks is None else sinks.total(start)
        return Attributed(
            output, relevance.detach(), found['targets'], start.double().sum(1).tolist(), kept.tolist(),
            found['value'], found['signs'],
        )

    def ledger(self, classifier, input, target=None, value=None, contrast=None):
        '''Get a :py:class:`~zennit_resnet.conservation.Ledger` and the targets, see :py:meth:`attribute`.'''
        is_plain = value is None and self.contrast is contrast is None
        value = 'logit' if is_plain or self.entry.composite is None else value
        attr_output, found = self._start(classifier, input, target, value, contrast)
        ledger = conservation_ledger(classifier.model, input, self.composite(classifier), attr_output)
        return ledger, found['targets']

    def _start(self, classifier, input, target, value, contrast):
        '''The relevance at the output as a function of it, and a dict which all that it decides is put into.'''
        contrast = contrast if self.contrast is None else self.contrast
        composite = self.composite(classifier)
        turns = turns_sign(composite, classifier.model, input)
        found = {}

        def attr_output(output):
            targets = output.argmax(1) if target is None else torch.as_tensor(target).expand(len(output))
            divides = composite is not None and divides_by_output(output)
            divides = turns if divides is None else divides
            chosen = self.initial or value or ('logit' if divides else 'one')
            is_turned = (chosen == 'logit') != divides
            if contrast is not None and is_turned and chosen != 'softmax':
                raise ValueError(
                    f'{self.text} started from {chosen!r} would mix up the signs of a contrast: start from '
                    f'{"logit" if divides else "one"!r}, or leave the value out'
                )
            found['targets'], found['value'] = targets.tolist(), chosen
            found['start'] = initial_relevance(
                targets, chosen, contrast=contrast, contrast_weight=self.contrast_weight
            )(output)
            # started from one where the rule divides by the logit, or the other way round, maps have its sign
            signs = output.detach().gather(1, targets.to(output.device)[:, None])[:, 0].sign().tolist()
            found['signs'] = [int(sign) or 1 if is_turned and contrast is None else 1 for sign in signs]
            return found['start']

        return attr_output, found

    def heatmap(self, relevance, sign=1, smooth=0.):
        '''The heatmap to draw, an array of shape (height, width), and notes of what is unusual about it.

        Relevance of one image, of shape (channels, height, width), is multiplied with a sign, see
        :py:class:`Attributed`. Before its sum over channels is post-processed, it is smoothed with a Gaussian of
        standard deviation ``smooth``, in pixels, which does not change the sum.
        '''
        heatmap, notes = sign * sum_channels(torch.as_tensor(relevance)[None]).cpu(), []
        if smooth:
            from scipy.ndimage import gaussian_filter
            heatmap = torch.from_numpy(gaussian_filter(heatmap.numpy(), (0, smooth, smooth), mode='reflect'))
        if sign < 0:
            notes.append('drawn with the opposite sign, as the logit is negative: positive is for the class')
        processed = self.process(heatmap)
        if self.postprocess in ('c1c', 'c3') and not processed.any():
            notes.append(f'empty, as {self.postprocess} leaves nothing')
        return processed[0].numpy(), notes


class Attributed(NamedTuple):
    '''What a method has computed for a batch.

    Output of the model of shape (batch, classes), relevance of the shape of the input, the class explained of each
    example, the sum of what relevance starts from, and how much of it sinks keep (:py:attr:`ResNetLRP.sinks`), what it
    starts from, ``'logit'``, ``'softmax'`` or ``'one'``, and signs: 1, or -1 where positive relevance is against the
    target, as its logit is negative and relevance has its sign.
    '''
    output: torch.Tensor
    relevance: torch.Tensor
    targets: list
    initial: list
    sinks: list
    value: str
    signs: list


def turns_sign(composite, model, input):
    '''Whether the rule of a network's last layer gives the opposite sign to contributions to a negative output.

    So do rules that divide by the output, if relevance starts from one, which is tried on a layer of two weights. It is
    None for gradients and our own composites: their graph tells.
    '''
    if composite is None or isinstance(composite, (ResNetLRP, GammaLRP, RelativeLRP, BlockLRP)):
        return None
    called, context, rules = [], {}, {}
    handles = [
        module.register_forward_hook(lambda module, args, output: called.append(module))
        for module in model.modules() if isinstance(module, (torch.nn.Linear, Convolution))
    ]
    try:
        with torch.no_grad():
            model(input[:1])
    finally:
        for handle in handles:
            handle.remove()
    for name, module in model.named_modules():
        rules[module] = composite.module_map(context, name, module)
    rule = rules.get(called[-1]) if called else None
    if rule is None:
        return False
    # without random weights
    layer = torch.nn.Linear(2, 1, bias=False, device='meta').to_empty(device='cpu')
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1., -3.]]))
    handles = rule.register(layer)
    try:
        with torch.enable_grad():
            trial = torch.ones(1, 2, requires_grad=True)
            relevance, = torch.autograd.grad(layer(trial).sum(), trial)
    finally:
        handles.remove()
    return bool((relevance * layer.weight < 0).all())
