'''Modules that stand for operations which networks write as functions, to which a rule can be attached.

:py:class:`~zennit_resnet.canonizers.ResidualCanonizer` runs functions through one of them. Wherever Zennit knows a
module type for the same operation, it is a subclass of that, so that the layer maps of existing composites match.
'''
import itertools
import math

import torch
import torch.nn.functional as F

from ._compat import as_parameter


def linear(input, weight, bias=None):
    '''A fully connected layer in one product. For frozen weights, PyTorch makes one for each row of some inputs.'''
    if input.ndim < 3 or input.is_contiguous():
        return F.linear(input, weight, bias)
    # the same order of operations as with a weight that needs a gradient, so the last bits are the same
    output = input.flatten(0, -2) @ weight.T
    if bias is not None:
        output += bias
    return output.unflatten(0, input.shape[:-1])


class Operation(torch.nn.Module):
    '''A function call in the form of a module.

    It has the ``name`` of the function, and as ``function`` the intercepted call, ``(*tensors) -> tensor`` of the
    tensors that carry relevance, which is replaced each time the module to which the operation belongs reaches the call
    again. The result is a gate if all that enters is one and ``in_gate`` is true. So it is for activations and poolings
    of any type.
    '''
    label, in_gate = 'operation', False

    def __init__(self, name=''):
        # the torch.nn classes which are mixed in for their type only have arguments which the call itself defines
        torch.nn.Module.__init__(self)
        self.name = name
        self.function = None

    def forward(self, *inputs):
        return self.function(*inputs)

    def extra_repr(self):
        return self.name

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # the weights of a surrogate belong to another module, a checkpoint must not contain them twice
        pass


class Addition(Operation):
    '''Sum of two or more tensors, times ``factors`` (``alpha`` of :py:func:`torch.add`) unless these are None.'''
    label, in_gate = 'addition', True
    factors = None

    def forward(self, *addends):
        return sum(addends[1:], addends[0]) if self.function is None else self.function(*addends)


class Gate(Operation):
    '''Product of a signal, its only input, with a gate (squeeze-and-excitation) or a constant (layer scale).'''
    label, in_gate = 'gate', True


class Product(Operation):
    '''Product of two signals, element by element. Neither is a gate.'''
    label, in_gate = 'product', True


class MatrixProduct(Operation):
    '''Product of two signals over dimensions, such as that of queries and keys. It is linear in each of them.'''
    label, in_gate = 'matrix_product', True


class Softmax(Operation):
    '''Softmax along a dimension ``dim``, whose output weights the values of attention.'''
    label, in_gate, dim = 'softmax', True, -1


class Concatenation(Operation):
    '''Concatenation of tensors. Its gradient takes the slices apart again, which is the exact rule.'''
    label, in_gate = 'concatenation', True


class Padding(Operation):
    '''Padding of a tensor with a constant, by ``amounts`` (before, after) of elements for each padded dimension.'''
    label, in_gate = 'padding', True
    amounts = {}


class Filling(Operation):
    '''Elements of a tensor among constants. If entries are no examples, ``examples`` tells whose they are.'''
    label, in_gate = 'filling', True
    examples = None


class Subsampling(Operation):
    '''Indexing with ``steps`` along spatial dimensions, as ``x[:, :, ::2, ::2]`` in parameter-free shortcuts.'''
    label = 'subsampling'
    steps = ()


class Activation(Operation, torch.nn.ReLU):
    '''Functional element-wise activation with lower and upper ``bounds``, ``is_clipped`` if there are both.'''
    label = 'activation'
    is_clipped = False
    bounds = None, None


class Normalization(Operation, torch.nn.BatchNorm2d):
    '''Functional normalization (batch, layer, group, ...).'''
    label = 'normalization'

    def forward(self, *inputs):
        output = super().forward(*inputs)
        # hooks of Zennit 0.5 take what the graph's node returns for the layer's output, and some return statistics too
        return output.clone() if output.requires_grad else output


class AveragePool(Operation, torch.nn.AvgPool2d):
    '''Functional average over positions, or any other linear map with non-negative weights (sum, interpolation).'''
    label = 'average_pool'


class NonNegativeMap(AveragePool):
    '''Linear map with non-negative weights (sampling, cumulative sums), with ``examples`` as :py:class:`Filling`.'''
    label = 'nonnegative_map'
    examples = None


class NonNegativeProduct(NonNegativeMap):
    '''Product with constants without negative values, as those of attention. Its function takes a ``part`` of these.'''

    def add_up(self, input):
        '''Sums of all that the constants may weight.'''
        return self.function(input, part=torch.ones_like)


class Signed:
    '''Linear map with weights of both signs, other than convolutions and fully connected layers.'''
    def linear(self, input, part):
        '''The linear map without constants, with ``part`` of its weights, an element-wise function, in their place.'''
        raise NotImplementedError()


class Resampling(Signed, AveragePool):
    '''Interpolation with weights of both signs: ``matrices`` (output length, input length) of spatial dimensions.'''
    label = 'resampling'
    matrices = ()

    def linear(self, input, part):
        '''Products of weights of each dimension are positive if an even number of these is negative.'''
        total, dims = 0., range(input.ndim - len(self.matrices), input.ndim)
        for signs in itertools.product((1., -1.), repeat=len(self.matrices)):
            factor = float(part(torch.tensor(math.prod(signs))))
            if factor:
                term = input
                for sign, dim, matrix in zip(signs, dims, self.matrices):
                    matrix = (sign * matrix.to(input.dtype)).clamp(min=0)
                    term = (matrix @ term.transpose(dim, -2)).transpose(dim, -2) if dim < input.ndim - 1 else (
                        term @ matrix.T
                    )
                total = total + factor * term
        return total


class Reduction(Operation):
    '''Function over ``dims`` to which elements add ``amounts(input)`` without negative values (norm, deviation).'''
    label = 'reduction'
    amounts, dims = None, ()


class MaxPool(Operation, torch.nn.MaxPool2d):
    '''Functional maximum over positions.'''
    label = 'max_pool'


class FunctionalLinear(Operation):
    '''Functional linear map, with the tensors of the call as its parameters.'''
    padding_mode = 'zeros'

    def set_call(self, function, weight, bias, **settings):
        '''Take over a call of a function ``(input, weight, bias, **settings)``. Settings become attributes.'''
        # a copy of this module, which belongs to an earlier call, keeps the parameters of that
        self._parameters = type(self._parameters)()
        for key, value in (('weight', weight), ('bias', bias)):
            if value is not None and not isinstance(value, torch.nn.Parameter):
                value = as_parameter(value)
            self.register_parameter(key, value)
        for key, value in settings.items():
            setattr(self, key, value)
        self.function = lambda input: function(input, self.weight, self.bias, **settings)


def _calls_of(kind, name, label='convolution'):
    '''The class of calls of the function which a linear layer of torch.nn stands for.'''
    return type(name, (FunctionalLinear, kind), {
        '__module__': __name__, 'label': label,
        '__doc__': f'Call of the function of :py:class:`torch.nn.{kind.__name__}`.',
    })


FullyConnected = _calls_of(torch.nn.Linear, 'FullyConnected', 'linear')
Convolution1d = _calls_of(torch.nn.Conv1d, 'Convolution1d')
Convolution2d = _calls_of(torch.nn.Conv2d, 'Convolution2d')
Convolution3d = _calls_of(torch.nn.Conv3d, 'Convolution3d')
ConvolutionTranspose1d = _calls_of(torch.nn.ConvTranspose1d, 'ConvolutionTranspose1d')
ConvolutionTranspose2d = _calls_of(torch.nn.ConvTranspose2d, 'ConvolutionTranspose2d')
ConvolutionTranspose3d = _calls_of(torch.nn.ConvTranspose3d, 'ConvolutionTranspose3d')
# By the names of their functions.
LINEAR = {
    'linear': FullyConnected, 'conv1d': Convolution1d, 'conv2d': Convolution2d, 'conv3d': Convolution3d,
    'conv_transpose1d': ConvolutionTranspose1d, 'conv_transpose2d': ConvolutionTranspose2d,
    'conv_transpose3d': ConvolutionTranspose3d,
}


class _Product(Signed, FunctionalLinear):
    '''Product of a tensor and a constant, which is its weight.

    The ``product`` is a function ``(input, weight) -> output`` that is linear in both, and has no weights of its own
    with a negative sign.
    '''
    product = None

    def set_product(self, product, weight, original):
        '''Take over a call of ``original``, ``(input) -> output``, which runs unless a rule has replaced the weight.'''
        self.product = product
        self.set_call(None, weight, None)
        weight = self.weight
        self.function = lambda input: original(input) if self.weight is weight else product(input, self.weight)

    def linear(self, input, part):
        return self.product(input, part(self.weight.detach().to(input.dtype)))


class LinearMap(_Product, torch.nn.Linear):
    '''Any other product of a tensor and a constant (``einsum``, ``bmm``, ``deform_conv2d``), which is its weight.'''
    label = 'linear'


class WeightedMap(_Product, NonNegativeMap):
    '''Product with a gate that may have negative values, as far as the graph tells, such as mixed attention.

    Rules are those of :py:class:`NonNegativeMap`, whatever the signs are: these may differ between examples of a batch.
    '''
    label = 'weighted_map'

    def add_up(self, input):
        '''Sums of all that the constant may weight.'''
        return self.product(input, torch.ones_like(self.weight, dtype=input.dtype))

    def linear(self, input, part):
        # weights of a map without negative ones count as they are where rules take others for those of a layer
        return super().linear(input, torch.abs if part in (torch.square, torch.ones_like) else part)
