'''Element-wise functions that are limited by memory.'''
import torch

# From this number of elements on, memory is asked for anew each time, which takes longer than what is computed
LARGE = 2 ** 21


def by_example(function, *tensors):
    '''Apply a function which treats examples independently to one example after the other, where this is faster.

    On CPU, intermediate results of large tensors do not fit into the cache, and their memory comes from the operating
    system and goes back to it. Those of a single example are much smaller.

    Parameters
    ----------
    function: callable
        A function of as many tensors, which returns a new tensor with an entry of its first dimension for each example.
    *tensors: tuple of :py:obj:`torch.Tensor`
        Tensors of which the first dimension is that of examples, or which can be broadcast.

    Returns
    -------
    :py:obj:`torch.Tensor`
        What the function returns for the tensors.
    '''
    # tensors of fewer dimensions are broadcast along that of the examples
    first, lengths = tensors[0], {(elem.ndim, *elem.shape[:1]) for elem in tensors}
    if first.device.type != 'cpu' or first.numel() < LARGE or len(lengths) > 1 or first.shape[:1].numel() < 2:
        return function(*tensors)
    result = None
    for index, parts in enumerate(zip(*(elem.split(1) for elem in tensors))):
        part = function(*parts)
        if result is None:
            # of the layout of the input where possible, such as channels last
            result = (torch.empty_like(first, dtype=part.dtype) if first.shape[1:] == part.shape[1:]
                      else part.new_empty((len(first), *part.shape[1:])))
        result[index:index + 1] = part
    return result
