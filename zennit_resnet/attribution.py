'''What relevance starts from.'''
import torch

from .core import check_choice

VALUES = ('logit', 'softmax', 'one')


def initial_relevance(target, value='logit'):
    '''Create a function that gives the relevance at the output, to be used as ``attr_output`` of Zennit's attributors.

    Relevance starts at the target only: it is a one-hot vector times a value.

    Parameters
    ----------
    target: int, sequence of int or :py:obj:`torch.Tensor`
        Index of the class to explain, one for all samples, or one for each sample of the batch.
    value: str, optional
        ``'logit'`` (default) for the target's output, ``'softmax'`` for its probability, ``'one'`` for one.

    Returns
    -------
    callable
        A function ``(output: (batch, classes)) -> (batch, classes)``. It raises a ValueError if the number of targets
        is not the batch size, and an IndexError for a target outside the classes.

    Raises
    ------
    ValueError
        If ``value`` is unknown.
    TypeError
        If ``target`` is not made of integers.
    '''
    check_choice('value', value, VALUES)
    target = torch.as_tensor(target)
    if target.is_floating_point() or target.dtype == torch.bool or target.ndim > 1:
        raise TypeError(
            f'Targets are class indices, one for all samples or one for each, not {target.dtype} of shape '
            f'{tuple(target.shape)}!'
        )

    def attr_output(output):
        '''Compute the relevance at the output.'''
        if output.ndim != 2:
            raise ValueError(f'The output must be of shape (batch, classes), but is {tuple(output.shape)}!')
        index = target.to(output.device, torch.long)
        if index.ndim == 1 and len(index) != len(output):
            raise ValueError(f'There are {len(index)} targets for a batch of {len(output)}!')
        if bool(((index < 0) | (index >= output.shape[1])).any()):
            raise IndexError(f'Target {index.tolist()} is not among the {output.shape[1]} classes!')
        index = index.expand(len(output))[:, None]
        output = output.detach()
        # relevance is kept in at least single precision
        output = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
        values = {'logit': lambda: output, 'softmax': lambda: output.softmax(1), 'one': lambda: torch.ones_like(output)}
        return torch.zeros_like(output).scatter_(1, index, values[value]().gather(1, index))

    return attr_output
