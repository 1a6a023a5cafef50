'''Recurrences, step by step: relevance of a product goes to what its gate multiplies (Arras et al. 2017).'''
import torch
import torch.nn.functional as F

from .._nested import map_tensors
from .functions import run_twin


class Affine:
    '''Rows of the weights of a cell, as one linear layer of the input and the state.'''
    def __init__(self, rows, input_weight, state_weight, *biases):
        self.weights = input_weight[rows], state_weight[rows]
        self.joint = torch.cat(self.weights, 1)
        self.bias = sum(elem[rows] for elem in biases) if biases else None

    def __call__(self, input, state):
        if input.requires_grad and state.requires_grad:
            return F.linear(torch.cat([input, state], -1), self.joint, self.bias)
        # what is constant, such as the first state, is added as a constant
        pairs = list(zip((input, state), self.weights))
        (active, weight), (constant, other) = pairs if input.requires_grad else pairs[::-1]
        return F.linear(active, weight, self.bias) + F.linear(constant, other)


def _gated(gate, value):
    '''A product with a gate, which is a constant if the value is one: relevance does not go to gates.'''
    return gate * value if value.requires_grad else (gate * value).detach()


class Simple:
    '''A cell h' = f(W x + U h + b) with a function f.'''
    def __init__(self, function, *weights):
        self.function = function
        self.affine = Affine(slice(None), *weights)

    def __call__(self, input, state):
        hidden, = state
        return (self.function(self.affine(input, hidden)),)


class LSTM:
    '''A cell with c' = f c + i g and h' = o tanh(c'), and h' = P o tanh(c') with a projection P.'''
    def __init__(self, input_weight, state_weight, *others):
        size = len(input_weight) // 4
        is_projected = len(others) % 2
        biases, self.projection = others[:len(others) - is_projected], others[-1] if is_projected else None
        # rows are those of i, f, g and o
        rows = [slice(0, 2 * size), slice(3 * size, None), slice(2 * size, 3 * size)]
        self.memory, self.output, self.candidate = (
            Affine(elem, input_weight, state_weight, *biases) for elem in rows
        )

    def __call__(self, input, state):
        hidden, cell = state
        update, forget = self.memory(input, hidden).sigmoid().chunk(2, -1)
        cell = _gated(forget, cell) + update * self.candidate(input, hidden).tanh()
        hidden = self.output(input, hidden).sigmoid() * cell.tanh()
        return (hidden if self.projection is None else F.linear(hidden, self.projection)), cell


class GRU:
    '''A cell with n = tanh(W x + b + r (U h + d)) and h' = (1 - z) n + z h.'''
    def __init__(self, input_weight, state_weight, *biases):
        size = len(input_weight) // 3
        # rows are those of r, z and n
        self.gates = Affine(slice(0, 2 * size), input_weight, state_weight, *biases)
        self.weights = [elem[2 * size:] for elem in (input_weight, state_weight)]
        self.biases = [elem[2 * size:] for elem in biases] or [None, None]

    def __call__(self, input, state):
        hidden, = state
        reset, update = self.gates(input, hidden).sigmoid().chunk(2, -1)
        added, gated = (F.linear(*elem) for elem in zip((input, hidden), self.weights, self.biases))
        candidate = (added + _gated(reset, gated)).tanh()
        return ((1 - update) * candidate + _gated(update, hidden),)


CELLS = {
    'lstm': LSTM, 'gru': GRU,
    'rnn_tanh': lambda *weights: Simple(torch.tanh, *weights),
    'rnn_relu': lambda *weights: Simple(torch.relu, *weights),
}


def one_step(canonizer, call, function):
    '''A single step of a recurrence, of ``torch.nn.LSTMCell`` and others.'''
    names = 'input', 'hx', 'w_ih', 'w_hh', 'b_ih', 'b_hh'
    given = {'b_ih': None, 'b_hh': None, **function.bind(*names)}
    input, state, *weights = (given[key] for key in names)
    cell = CELLS[function.name.removesuffix('_cell')](*(elem for elem in weights if elem is not None))
    if function.name == 'lstm_cell':
        return _run(canonizer, function, lambda: cell(input, state))
    return _run(canonizer, function, lambda: cell(input, (state,))[0])


def all_steps(canonizer, call, function):
    '''All steps of a recurrence, of ``torch.nn.LSTM`` and others.'''
    names = 'input', 'hx', 'params', 'has_biases', 'num_layers', 'dropout', 'train', 'bidirectional', 'batch_first'
    given = function.bind(*names)
    if 'batch_sizes' in given or isinstance(given['has_biases'], (list, tuple)):
        return canonizer.refuse(call, function, 'its sequences are packed: give padded ones')
    input, state, weights, _, num_layers, dropout, is_training, is_bidirectional, batch_first = map(given.get, names)
    if dropout and is_training and num_layers > 1:
        return canonizer.refuse(call, function, 'its dropout is that of training: call model.eval()')
    states = list(zip(*(elem.unbind(0) for elem in (state if function.name == 'lstm' else (state,)))))
    number, dim = len(weights) // len(states), int(batch_first)

    def twin():
        output, ends = input, []
        for _ in range(num_layers):
            parts = []
            for is_reversed in (False, True)[:1 + is_bidirectional]:
                place = len(ends)
                cell = CELLS[function.name](*weights[number * place:number * (place + 1)])
                current, hidden = states[place], []
                steps = output.unbind(dim)
                for elem in reversed(steps) if is_reversed else steps:
                    current = cell(elem, current)
                    hidden.append(current[0])
                ends.append(current)
                parts.append(torch.stack(hidden[::-1] if is_reversed else hidden, dim))
            output = torch.cat(parts, -1) if is_bidirectional else parts[0]
        return output, *(torch.stack(elems) for elems in zip(*ends))

    return _run(canonizer, function, twin)


def _run(canonizer, function, twin):
    '''Run steps with the values of the function, whose last bits depend on whether weights need a gradient.'''
    args, kwargs = map_tensors(
        lambda elem: elem.detach().requires_grad_(elem.is_floating_point()), (function.args, function.kwargs)
    )
    return run_twin(canonizer, function._replace(args=args, kwargs=kwargs), twin)


def pad_sequence(sequences, batch_first=False, padding_value=0., padding_side='right'):
    '''Sequences of several lengths in one tensor.'''
    length = max(map(len, sequences))
    padded = []
    for elem in sequences:
        amounts = (0, length - len(elem)) if padding_side == 'right' else (length - len(elem), 0)
        padded.append(F.pad(elem, (0, 0) * (elem.ndim - 1) + amounts, value=padding_value))
    return torch.stack(padded, 0 if batch_first else 1)
