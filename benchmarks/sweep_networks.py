'''Networks of benchmarks/sweep.py: a function or layer between convolutions of the input and a linear layer.'''
import copy
import random
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torchvision import ops


class Ours(nn.Conv2d):
    '''A subclass which does what its class does.'''
    def forward(self, input):
        '''Convolution.'''
        return F.conv2d(input, self.weight, self.bias, padding=1)


class OurNorm(nn.BatchNorm2d):
    '''A subclass which does what its class does.'''
    def forward(self, input):
        '''Batch normalization.'''
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class OurPool(nn.MaxPool2d):
    '''A subclass which does what its class does.'''
    def forward(self, input):
        '''Max pooling.'''
        return F.max_pool2d(input, 3, 2, 1)


class Fixed(ops.FrozenBatchNorm2d):
    '''FrozenBatchNorm2d, and its arithmetic.'''
    @property
    def factor(self):
        '''Scale of each channel.'''
        return (self.weight * (self.running_var + self.eps).rsqrt())[:, None, None]

    @property
    def shift(self):
        '''What is added to each channel.'''
        return self.bias[:, None, None] - self.running_mean[:, None, None] * self.factor


def randomize(module):
    '''Random parameters and statistics, less regular than those of fresh layers.'''
    for child in module.modules():
        for name, buffer in child.named_buffers(recurse=False):
            if nn.parameter.is_lazy(buffer):
                return module
            if buffer.is_floating_point() and 'running' in name:
                buffer.uniform_(.5, 1.5) if 'var' in name else buffer.normal_(0, .3)
        is_norm = 'Norm' in type(child).__name__
        for name, param in (*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)):
            if is_norm and name in ('weight', 'bias'):
                param.data.uniform_(.3, 1.5)
                param.data[::3] *= -1
    return module


def twin_modules(net):
    '''Modules that stand in brackets in the table of twins, with the weights of a network.'''
    conv = nn.Conv2d(8, 4, 3, padding=1)
    conv.weight, conv.bias = nn.Parameter(net.K.detach().clone()), nn.Parameter(net.b.detach()[:4].clone())

    def same(kind, **settings):
        other = kind(8, 4, 3, padding=1, **settings)
        other.load_state_dict(conv.state_dict())
        return other

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input):
            return self.inner(input)

    class Parametrization(nn.Module):
        def forward(self, weight):
            return weight * 1

    norm = randomize(nn.BatchNorm2d(4)).eval()

    def same_norm(kind, **settings):
        other = kind(4, **settings)
        other.load_state_dict({key: value for key, value in norm.state_dict().items() if key in other.state_dict()})
        return other

    transposed = nn.ConvTranspose2d(8, 4, 3, stride=2, bias=False)
    transposed.weight = nn.Parameter(net.T.detach().clone())
    parametrized = same(nn.Conv2d)
    nn.utils.parametrize.register_parametrization(parametrized, 'weight', Parametrization())
    changed, alone = (nn.Conv2d(8, 4, 3, padding=1) for _ in range(2))
    alone.load_state_dict(changed.state_dict())
    other_norm = randomize(nn.BatchNorm2d(4)).eval()
    linear = nn.Linear(8, 5)
    linear.weight, linear.bias = nn.Parameter(net.W.detach().clone()), nn.Parameter(net.b.detach().clone())
    parametrized_linear = copy.deepcopy(linear)
    nn.utils.parametrize.register_parametrization(parametrized_linear, 'weight', Parametrization())
    parametrized_subclass = same(Ours)
    nn.utils.parametrize.register_parametrization(parametrized_subclass, 'weight', Parametrization())
    return {
        'changed': changed, 'alone': alone, 'othernorm': other_norm, 'linear': linear,
        'parametrizedlinear': parametrized_linear, 'wrappedlinear': Wrapper(linear),
        'normchanged': nn.Sequential(changed, other_norm), 'normconv': nn.Sequential(conv, norm),
        'parametrizedsubclass': parametrized_subclass,
        'weightnormsubclass': nn.utils.parametrizations.weight_norm(same(Ours)),
        'oldweightnorm': nn.utils.weight_norm(same(nn.Conv2d)),
        'oldweightnormsubclass': nn.utils.weight_norm(same(Ours)),
        'conv': conv, 'wrapped': Wrapper(nn.Sequential(conv)), 'parametrized': parametrized,
        'weightnorm': nn.utils.parametrizations.weight_norm(same(nn.Conv2d)), 'subclass': same(Ours),
        'transposed': transposed, 'wrappedtransposed': nn.Sequential(Wrapper(transposed)),
        'norm': norm, 'normed': nn.Sequential(conv, norm, nn.ReLU()), 'frozen': same_norm(Fixed, eps=1e-5),
        'syncnorm': same_norm(nn.SyncBatchNorm), 'subclassnorm': same_norm(OurNorm),
        'folded': nn.utils.fuse_conv_bn_eval(conv.eval(), norm.eval()),
        'maxpool': nn.MaxPool2d(3, 2, 1), 'subclassmaxpool': OurPool(3, 2, 1),
        'maxpoolindices': nn.MaxPool2d(3, 2, 1, return_indices=True), 'avgpool': nn.AvgPool2d(2),
        'globalpool': nn.AdaptiveAvgPool2d(1), 'glu': nn.GLU(1), 'silu': nn.SiLU(), 'siluinplace': nn.SiLU(True),
        'relu': nn.ReLU(), 'zeropad': nn.ZeroPad2d(1), 'constantpad': nn.ConstantPad2d(1, 0.),
        'subsampled': nn.MaxPool2d(1, 2), 'pixelshuffle': nn.PixelShuffle(2), 'upsample': nn.Upsample(scale_factor=2),
        'bilinear': nn.Upsample((5, 5), mode='bilinear'), 'layernorm': nn.LayerNorm((6, 6), elementwise_affine=False),
        'unfold': nn.Unfold(2, stride=2), 'dropout': nn.Dropout(), 'identity': nn.Identity(),
    }


class Network(nn.Module):
    '''A function or layer between convolutions of the input and a linear layer.

    Parameters
    ----------
    function: str or callable
        Code in terms of the names of sweep_specs, or a function of a tensor of one image that returns what depends on
        the input, and its output.
    signed: bool
        Whether there are no ReLU before the function.
    layer: str, optional
        Code of the layer that is called ``layer`` in the function.
    '''
    def __init__(self, function, signed, layer=None):
        super().__init__()
        torch.manual_seed(0)
        torch.set_default_dtype(torch.double)
        try:
            self.build(function, signed, layer)
        finally:
            torch.set_default_dtype(torch.float)

    def build(self, function, signed, layer):
        '''Make layers, parameters and code.'''
        self.first, self.second, self.third = (nn.Conv2d(3, 8, 3, padding=1) for _ in range(3))
        for name, shape in {
            'c': (8, 1, 1), 'C': (8, 6, 6), 'B': (6, 6), 'W': (5, 8), 'b': (5,), 'K': (4, 8, 3, 3), 'K1': (4, 8, 3),
            'K3': (4, 2, 3, 3, 3), 'T': (8, 4, 3, 3), 'T1': (8, 4, 3), 'T3': (2, 4, 3, 3, 3),
        }.items():
            setattr(self, name, nn.Parameter(torch.randn(shape) * (1 if len(shape) < 3 or 'C' == name else .3)))
        self.register_buffer('o', torch.rand(6, 6) > .4)
        self.register_buffer('i', torch.tensor([4, 0, 2, 5]))
        self.register_buffer('mu', torch.randn(8) * .3)
        self.register_buffer('var', torch.rand(8) + .5)
        self.register_buffer('boxes', torch.tensor([[0, .3, 0, 4.6, 5], [1, 1, .7, 5, 4]]))
        self.signed, self.function, self.code = signed, function, None
        if isinstance(function, str):
            code = function
            if '[' in code and layer is None:
                modules = twin_modules(self)
                used = {name for name in re.findall(r'\[([a-z]+)\]', code) if name in modules}
                self.twins = nn.ModuleDict({name: modules[name] for name in modules if name in used})
                for name in used:
                    code = code.replace(f'[{name}]', f'twins[{name!r}]')
            *statements, value = code.split('; ')
            self.code = compile('; '.join(statements), function, 'exec') if statements else None, compile(
                value, function, 'eval')
            self.used = set(re.findall(r'\b[A-Za-z]\w*\b', code))
        self.layer = None if layer is None else randomize(eval(layer, dict(nn=nn, ops=ops, torch=torch, prune=prune)))
        self.head = None
        # in an additional run, relevance before and after the function is recorded
        self.tapped = None
        self.eval()
        # layers that are lazy have parameters after a call
        images = torch.randn(1 + isinstance(function, str), 3, 6, 6, dtype=torch.double)
        with torch.no_grad():
            output = self(images)
            for module in self.modules():
                if 'BatchNorm' in type(module).__name__ and self.layer is not None:
                    randomize(module)
        torch.manual_seed(3)
        self.head = nn.Linear(output.shape[1], 5).double()
        self.eval()

    def active(self, x):
        '''Tensors that depend on the input.'''
        def conv(layer):
            return layer(x) if self.signed else layer(x).relu()

        found = {'h': conv(self.first)}
        if self.code is not None and self.used & set('gwn'):
            found['g'] = conv(self.second)
        if self.code is not None and 's' in self.used:
            found['s'] = self.third(x).sigmoid()
        return found

    def evaluate(self, h, g=None, s=None):
        '''What the function returns.'''
        if self.code is None:
            return self.function(h)
        make = {
            'h': lambda: h, 'g': lambda: g, 's': lambda: s, 'u': lambda: h[:, :, 0, 0], 'w': lambda: g[:, :, 0, 0],
            'v': lambda: h.flatten(2)[:, :, :12], 'd': lambda: h.reshape(2, 2, 4, 6, 6), 'm': lambda: h[:, 0],
            'n': lambda: g[:, 0], 'p': lambda: h.relu() + .1, 'q': lambda: h.tanh() * .9, 't': lambda: h.relu() + 1.5,
        }
        if len(h) != 2:
            # of a single example of the batch
            make['d'] = lambda: h.reshape(1, 2, 4, 6, 6)
        scope = {name: value() for name, value in make.items() if name in self.used}
        for name in self.used & set('c C B W b K K1 K3 T T1 T3 o i mu var boxes'.split()):
            scope[name] = getattr(self, name)
        scope.update(torch=torch, F=F, nn=nn, ops=ops, layer=self.layer, twins=getattr(self, 'twins', None))
        statements, value = self.code
        if statements is not None:
            exec(statements, scope)
        output = eval(value, scope)
        while isinstance(output, (tuple, list)):
            output = output[0]
        return output

    def forward(self, x):
        '''Logits.'''
        found = self.active(x)
        before = dict(found)
        # copies of single examples run without gradients
        is_tapped = self.tapped is not None and all(tensor.requires_grad for tensor in found.values())
        if is_tapped:
            for name, tensor in found.items():
                tensor.register_hook(lambda grad, name=name: self.tapped.__setitem__(name, grad))
        output = self.evaluate(**found)
        if is_tapped and output.requires_grad:
            self.tapped['values'] = {key: value.detach() for key, value in before.items()}
            output.register_hook(lambda grad: self.tapped.__setitem__('output', grad))
        output = output.flatten(1) if output.ndim > 1 else output.reshape(len(x), -1)
        return output if self.head is None else self.head(output)


def database():
    '''Functions of PyTorch's own tests with up to two samples each, as functions of an image.'''
    try:
        from torch.testing._internal.common_methods_invocations import op_db
    except ImportError:
        return
    for info in op_db:
        if not info.supports_autograd or not info.supports_dtype(torch.double, 'cpu'):
            continue
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        try:
            samples = list(info.sample_inputs('cpu', torch.double, requires_grad=False))
        except Exception:
            continue
        samples = [sample for sample in samples if 1 < count(sample.input) <= 288]
        name = info.name if not info.variant_test_name else f'{info.name} ({info.variant_test_name})'
        for sample in samples[:1] + samples[-1:] if len(samples) > 1 else samples:
            forms = {'function': info.op, 'method': info.method_variant, 'in place': info.inplace_variant}
            for form, function in forms.items():
                if function is not None:
                    for every in (False, True):
                        yield name, form, as_function(function, sample, every, form == 'in place')


def count(value):
    '''Number of elements of a tensor, or of a sequence of them.'''
    if isinstance(value, torch.Tensor):
        return value.numel() if value.dtype == torch.double and value.layout == torch.strided else 0
    return sum(map(count, value)) if isinstance(value, (list, tuple)) else 0


def as_function(function, sample, every, in_place):
    '''A function of an image by a sample: its first input, or all of them, are shifted by the image.'''
    def run(h):
        flat = h.flatten() * .05

        def shift(value, is_first):
            if isinstance(value, torch.Tensor) and count(value) and (is_first or every) and value.numel() <= 288:
                return value.detach() + flat[:value.numel()].reshape(value.shape)
            if isinstance(value, (list, tuple)):
                return type(value)([shift(elem, is_first and num == 0) for num, elem in enumerate(value)])
            return value.detach().clone() if isinstance(value, torch.Tensor) else value

        first = shift(sample.input, True)
        args = [shift(value, False) for value in sample.args]
        kwargs = {key: shift(value, False) for key, value in sample.kwargs.items()}
        output = function(first.clone() if in_place else first, *args, **kwargs)
        while isinstance(output, (tuple, list)):
            output = output[0]
        output = torch.view_as_real(output) if output.is_complex() else output
        return output.reshape(1, -1)

    return run
