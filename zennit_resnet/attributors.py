'''Attributors that Zennit does not have.'''
import torch
from zennit.attribution import Gradient

from .arguments import show
from .attribution import check_gradients, select_output
from .rules.base import prepared_once


class ManyTargets(Gradient):
    '''Attributor for several questions about the same input: one forward pass, and a backward pass for each.

    The relevance is that of :py:class:`zennit.attribution.Gradient` for one question after the other. Rules of this
    package compute what has nothing to do with the question, such as the denominators of z+, once for all.

    Parameters
    ----------
    model, composite, create_graph, retain_graph: optional
        As of :py:class:`zennit.attribution.Gradient`. The network has to return a tensor, see
        :py:class:`~zennit_resnet.attribution.SelectOutput`. The graph is retained between the questions in any case.
    attr_output: sequence or callable, optional
        The questions, unless they are given in the call.

    Examples
    --------
    >>> import torch
    >>> from torchvision.models import resnet18
    >>> from zennit_resnet import ResNetLRP, initial_relevance
    >>> from zennit_resnet.attributors import ManyTargets
    >>> with ManyTargets(resnet18().eval(), ResNetLRP()) as attributor:
    ...     output, relevance = attributor(torch.rand(2, 3, 32, 32), [initial_relevance(k) for k in (3, 5, [3, 5])])
    >>> relevance.shape
    torch.Size([3, 2, 3, 32, 32])
    '''
    def forward(self, input, attr_output_fn):
        '''Compute the relevance of the input for all questions. It is called by ``attributor(input, questions)``.

        The input is of shape (batch, ...). Questions, or a function of the output that returns them, are a list of
        tensors of the output's shape and functions, such as :py:func:`~zennit_resnet.attribution.initial_relevance`
        returns, or a tensor with one more dimension in front. Returns the output, and relevance of the input of shape
        (questions, batch, ...).

        A ValueError is raised if there is no question, or an initial relevance is not of the output's shape, a
        TypeError if the questions are none of the above, or the network does not return a tensor, and a RuntimeError if
        gradients are disabled.
        '''
        check_gradients()
        input = input.view_as(input)
        if not input.requires_grad:
            input.requires_grad = True
        output = select_output(self.model(input))
        starts = _as_starts(attr_output_fn(output), output)
        relevance = None
        with prepared_once(output):
            for num, start in enumerate(starts, 1):
                gradient, = torch.autograd.grad(
                    (output,), (input,), (start,), create_graph=self.create_graph,
                    retain_graph=True if num < len(starts) else self.retain_graph,
                )
                if relevance is None:
                    # at once, as it may be large
                    relevance = gradient.new_empty((len(starts), *gradient.shape))
                relevance[num - 1] = gradient
        return output, relevance


def _as_starts(questions, output):
    '''Initial relevance of each question, as a list of tensors.'''
    if not isinstance(questions, (list, tuple, torch.Tensor)):
        raise TypeError(f'Questions have to be a list or a tensor, but are {type(questions).__name__}!')
    if isinstance(questions, torch.Tensor) and questions.ndim != output.ndim + 1:
        raise ValueError(
            f'Several questions are of shape (questions, *{tuple(output.shape)}), but these are of shape '
            f'{tuple(questions.shape)}: use Gradient for a single one, or give a list.'
        )
    starts = [elem(output) if callable(elem) else elem for elem in questions]
    if not starts:
        raise ValueError('The list of questions is empty: give at least one.')
    for index, start in enumerate(starts):
        if not isinstance(start, torch.Tensor):
            raise TypeError(
                f'Question {index} is {type(start).__name__}, but has to be initial relevance, a tensor or a function: '
                f'for a class, initial_relevance({show(start)}).'
            )
        if start.shape != output.shape:
            raise ValueError(
                f'Initial relevance of question {index} is of shape {tuple(start.shape)}, but the output is of shape '
                f'{tuple(output.shape)}.'
            )
    return starts
