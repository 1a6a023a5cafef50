'''Attribution methods by name, with splitting and post-processing.'''
import copy
import inspect
import re

import torch
from zennit.attribution import Gradient
from zennit.composites import COMPOSITES
from zennit.torchvision import ResNetCanonizer

from .attribution import initial_relevance
from .composites import with_splitting
from .conservation import conservation_ledger
from .postprocess import c1c, c3, heat_quantization, sum_channels
from .rules import RatioSplit, SymmetricSplit

INPUT_X_GRADIENT = 'input_x_gradient'
# Zennit's canonizer merges batch normalization, and splits relevance in proportion to the signed addends
SPLITTING = ('ratio', 'symmetric', 'zennit')
POSTPROCESSING = ('quantize', 'c1c', 'c3')
LEVELS = 8
# more than the colors of a picture can show
MAX_LEVELS = 65536


class Method:
    '''An attribution method by name.

    Parameters
    ----------
    text: str
        Name of a composite registered in Zennit's ``COMPOSITES`` or ``'input_x_gradient'``. To a composite that does
        not split relevance at skip connections by itself, ``'+ratio'``, ``'+symmetric'`` or ``'+zennit'`` may be
        appended, and to all ``'+quantize'`` (also with a number of levels, as in ``'+quantize8'``), ``'+c1c'`` or
        ``'+c3'`` for the post-processing of their heatmaps.
    postprocess: str, optional
        Post-processing of a method to which none is appended. Default is ``'none'``.
    levels: int, optional
        Number of levels of ``'quantize'`` without a number. Default is 8.

    Raises
    ------
    ValueError
        If there is no such method. The message is a single line.
    '''
    def __init__(self, text, postprocess='none', levels=LEVELS):
        self.text = text.strip()
        self.name, *suffixes = self.text.split('+')
        self.splitting, self.postprocess, self.levels = 'none', postprocess, levels
        kinds = []
        for suffix in suffixes:
            quantize = re.fullmatch('quantize([0-9]+)', suffix)
            if suffix in SPLITTING:
                self.splitting = suffix
            elif suffix in ('none', *POSTPROCESSING):
                self.postprocess = suffix
            elif quantize:
                self.postprocess, self.levels = 'quantize', int(quantize[1])
            else:
                choices = ', '.join(f'+{choice}' for choice in (*SPLITTING, *POSTPROCESSING))
                raise ValueError(f"unknown suffix '+{suffix}' of {self.name}: choose one of {choices}")
            kinds.append('splitting' if suffix in SPLITTING else 'post-processing')
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise ValueError(f'{self.text} has more than one {kind}: choose one')
        if not 2 <= self.levels <= MAX_LEVELS:
            raise ValueError(f'{self.text} has {self.levels} levels: choose from 2 to {MAX_LEVELS}')
        if postprocess != 'none' and 'post-processing' not in kinds:
            self.text += f'+{postprocess}' + (str(levels) if postprocess == 'quantize' else '')
        names = [INPUT_X_GRADIENT, *COMPOSITES]
        if self.name not in names:
            raise ValueError(f'unknown method {self.name!r}: choose one of {", ".join(sorted(names))}')
        if self.name == INPUT_X_GRADIENT:
            own, required = True, []
        else:
            composite = COMPOSITES[self.name]
            own = is_own(self.name)
            required = [
                key for key, param in inspect.signature(composite).parameters.items()
                if param.default is param.empty and param.kind not in (param.VAR_POSITIONAL, param.VAR_KEYWORD)
            ]
        if own and self.splitting != 'none':
            raise ValueError(f'splitting {self.splitting!r} cannot be added to {self.name}: it is for other composites')
        self.needs_bounds = set(required) == {'low', 'high'}
        if required and not self.needs_bounds:
            raise ValueError(f'method {self.name!r} cannot be used here, since it needs {", ".join(required)}')

    def composite(self, classifier):
        '''Create the composite, or None for the gradient.'''
        if self.name == INPUT_X_GRADIENT:
            return None
        bounds = dict(zip(('low', 'high'), classifier.bounds())) if self.needs_bounds else {}
        return create_composite(self.name, self.splitting, **bounds)

    def attribute(self, classifier, input, target=None, value='logit'):
        '''Compute relevance.

        Parameters
        ----------
        classifier: :py:obj:`zennit_resnet.models.Classifier`
            The classifier to explain.
        input: :py:obj:`torch.Tensor`
            Normalized input of shape (batch, 3, height, width).
        target: int or :py:obj:`torch.Tensor`, optional
            Index of the class to explain, or one for each sample. Default is None, the predicted class of each sample.
        value: str, optional
            What relevance starts from, see :py:func:`zennit_resnet.attribution.initial_relevance`. Input times gradient
            always explains the logit.

        Returns
        -------
        output: :py:obj:`torch.Tensor`
            Output of the model of shape (batch, classes).
        relevance: :py:obj:`torch.Tensor`
            Relevance of the shape of ``input``.
        target: list[int]
            The explained class of each sample.
        initial: list[float]
            The initial relevance of each sample.
        '''
        attr_output, targets = self._start(input, target, 'one' if self.name == INPUT_X_GRADIENT else value)
        # Zennit 1.0.0 does not restore a model completely after merging batch normalization
        model = copy.deepcopy(classifier.model) if self.splitting == 'zennit' else classifier.model
        output, relevance = Gradient(model=model, composite=self.composite(classifier))(input, attr_output)
        if self.name == INPUT_X_GRADIENT:
            # an attribution of the logit, so this is what its sum has to be compared with
            relevance, value = relevance * input, 'logit'
        output = output.detach()
        initial = initial_relevance(targets, value)(output).double().sum(1)
        return output, relevance.detach(), targets.tolist(), initial.tolist()

    def ledger(self, classifier, input, target=None, value='logit'):
        '''Find out where relevance is lost or gained.

        Parameters
        ----------
        classifier, input, target, value:
            See :py:meth:`attribute`.

        Returns
        -------
        ledger: :py:obj:`zennit_resnet.conservation.Ledger`
            The ledger.
        target: list[int]
            The explained class of each sample.
        '''
        attr_output, targets = self._start(input, target, 'logit' if self.name == INPUT_X_GRADIENT else value)
        ledger = conservation_ledger(classifier.model, input, self.composite(classifier), attr_output)
        return ledger, targets.tolist()

    @staticmethod
    def _start(input, target, value):
        '''The relevance at the output as a function of it, and a tensor for the targets, which may be predicted.'''
        targets = torch.zeros(len(input), dtype=torch.long)

        def attr_output(output):
            '''Remember the targets.'''
            targets.copy_(output.argmax(1) if target is None else torch.as_tensor(target).expand(len(output)))
            return initial_relevance(targets, value)(output)

        return attr_output, targets

    def heatmap(self, relevance):
        '''Get the heatmap to draw.

        Where there is negative relevance only, it is the magnitude that is post-processed and drawn.

        Parameters
        ----------
        relevance: :py:obj:`torch.Tensor`
            Relevance of shape (3, height, width).

        Returns
        -------
        heatmap: :py:obj:`numpy.ndarray`
            Heatmap of shape (height, width).
        notes: list[str]
            What is unusual about it.
        '''
        heatmap, notes = sum_channels(relevance[None]), []
        if is_negative(relevance):
            heatmap = -heatmap
            notes.append('of the magnitude, as all relevance is negative')
        if self.postprocess == 'quantize':
            heatmap = heat_quantization(heatmap, self.levels)
        elif self.postprocess != 'none':
            choice = {'c1c': c1c, 'c3': c3}[self.postprocess](heatmap, return_masks=True)
            heatmap = choice.heatmap
            if choice.empty:
                notes.append(f'empty, as {self.postprocess} leaves nothing')
        return heatmap[0].cpu().numpy(), notes


def is_own(name):
    '''Find out whether a registered composite is one of this package, which splits relevance by itself.'''
    return COMPOSITES[name].__module__.partition('.')[0] == __package__


def create_composite(name, splitting='none', **options):
    '''Create a registered composite, and add splitting at skip connections to it.

    Parameters
    ----------
    name: str
        Name in Zennit's ``COMPOSITES``.
    splitting: str, optional
        One of ``'ratio'``, ``'symmetric'`` and ``'zennit'``. Default is ``'none'``.
    **options
        Arguments of the composite.

    Returns
    -------
    :py:obj:`zennit.core.Composite`
        The composite.
    '''
    if splitting == 'zennit':
        options['canonizers'] = [ResNetCanonizer()]
    composite = COMPOSITES[name](**options)
    if splitting in ('ratio', 'symmetric'):
        composite = with_splitting(composite, {'ratio': RatioSplit, 'symmetric': SymmetricSplit}[splitting]())
    return composite


def is_negative(relevance):
    '''Find out whether there is negative relevance only.

    Rules of positive contributions give relevance the sign of the target's logit everywhere. Logits have no natural
    zero, and the most probable class may well have a negative one, so that the magnitude is what is to be seen.
    '''
    return bool(relevance.max() <= 0) and bool(relevance.min() < 0)
