'''Attention: functions that compute weights from two signals, and values that are weighted.'''
import math

import torch

from .._compat import body_of, project, softmax_dim
from ..layer import NonNegativeProduct, Softmax
from .functions import FunctionCall, run_twin, with_values


def softmax(canonizer, call, function):
    '''A softmax, which relevance passes if it is the output of the network. As attention, it may have a rule.'''
    has_rule = canonizer.attention == 'half' and 'log' not in function.name
    if has_rule:
        input, = function.active
        dim = function.bind('input', 'dim').get('dim')
        dim = softmax_dim('softmax', input.ndim, 0) if dim is None else dim
        output = canonizer.run(call, Softmax, function.renamed('softmax'), dim=dim)
    else:
        output = canonizer.run_covered(function, function.active)
    canonizer.note_softmax(call, function.name, output, has_rule=has_rule)
    return output


def multi_head(canonizer, call, function):
    '''The function of torch.nn.MultiheadAttention: the canonizer sees what it calls.'''
    # of weights that are returned as well, it is seen that they come from a softmax
    is_value = canonizer.attention == 'value' and not function.kwargs.get('need_weights', True)
    with canonizer.interception:
        body = body_of(function.func, _in_projection_packed=_project) if is_value else body_of(function.func)
        return body(*function.args, **function.kwargs)


def _project(query, key, value, weight, bias=None):
    '''Queries and keys as constants, and values, which spares the rule two thirds of the layer.'''
    if not value.requires_grad:
        return project(query, key, value, weight, bias)
    with torch.no_grad():
        query, key, exact = project(query, key, value, weight, bias)
    rows = slice(2 * len(weight) // 3, None)
    projected = torch.nn.functional.linear(value, weight[rows], None if bias is None else bias[rows])
    return query, key, with_values(projected, exact)


def scaled_dot_product(canonizer, call, function):
    '''Values that are weighted by a softmax of products of queries and keys.'''
    given = {'attn_mask': None, 'is_causal': False, 'scale': None, 'enable_gqa': False, **function.bind(
        'query', 'key', 'value', 'attn_mask', 'dropout_p', 'is_causal', 'scale', 'enable_gqa'
    )}
    if canonizer.attention == 'half' or not given['value'].requires_grad:
        return run_twin(canonizer, function, lambda: _weights(given) @ _repeat(given, 'value'))
    with torch.no_grad():
        exact, weights = function(), _weights(given)
    value = _repeat(given, 'value')
    product = FunctionCall(torch.matmul, function.name, (weights, value), {}, [value])
    return with_values(canonizer.run(call, NonNegativeProduct, product), exact)


def _weights(given):
    query, key, mask = given['query'], _repeat(given, 'key'), given['attn_mask']
    scale = 1 / math.sqrt(query.shape[-1]) if given['scale'] is None else given['scale']
    logits = query @ key.transpose(-2, -1) * scale
    if given['is_causal']:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if mask is None:
        return logits.softmax(-1)
    if mask.dtype != torch.bool:
        return (logits + mask).softmax(-1)
    # queries without any key weight nothing
    return logits.masked_fill(~mask, -math.inf).softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0.)


def _repeat(given, name):
    '''Keys or values, which have fewer heads in some versions of attention.'''
    tensor = given[name]
    heads = given['query'].shape[-3] // tensor.shape[-3] if given['enable_gqa'] else 1
    return tensor if heads == 1 else tensor.repeat_interleave(heads, -3)
