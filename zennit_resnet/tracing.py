'''An attribution as one graph: forward and backward pass of all rules, recorded once, to run, compile and export.'''
import copy
from contextlib import ExitStack

import torch
from torch.overrides import TorchFunctionMode
from zennit.core import Composite

from ._autograd import divides_by_output
from ._compat import is_recorded, module_around, origin_of_call
from ._graphs import fold, is_constant, lower_precision, record, simplify, write_in_place
from .arguments import check_choice, check_module, check_precision, check_rule, describe
from .attribution import check_key, select_output
from .canonizers.eager import check_evaluation
from .registration import registered, unwrap

# Methods of tensors that read values, by which code may decide what to do.
READS = frozenset(
    'item tolist numpy equal allclose __bool__ __int__ __float__ __index__ __array__ __contains__'.split()
)
OWN = ('zennit', __package__)

# Up to this number of positions, reading weights takes most time, which is faster with the channels last.
FEW = 2 ** 13


def trace(model, composite, input, output=None, rule_dtype=None):
    '''Record the attribution of a composite as a graph of aten operations.

    Parameters
    ----------
    model: :py:obj:`torch.nn.Module`
        The network, in evaluation mode. It is copied, and not changed.
    composite: :py:obj:`zennit.core.Composite`
        The composite.
    input: :py:obj:`torch.Tensor`
        An input of the network, of shape (batch, ...), for which the attribution runs once.
    output: str, int or callable, optional
        Which of several outputs of the network to explain, see
        :py:func:`~zennit_resnet.attribution.select_output`.
    rule_dtype: :py:obj:`torch.dtype`, optional
        With :py:obj:`torch.bfloat16`, convolutions and products with weights compute in it that are part of rules, and
        not of the network itself, which is faster on devices that have it. The output is the same, relevance has errors
        of about a thousandth.

    Returns
    -------
    :py:obj:`TracedAttribution`
        A module ``(input, initial_relevance) -> (output, relevance)``.

    Raises
    ------
    TypeError
        If an argument is of another type, or the network reads values of what it computes from the input, by which it
        may do something else for another input, or if its output for another input is not that of the graph.
    ValueError, RuntimeError, UnsupportedOperation
        If ``rule_dtype`` is another type, the network is in training mode, or one of its operations has no rule.

    Examples
    --------
    >>> import torch
    >>> from torchvision.models import resnet18
    >>> from zennit_resnet import ResNetLRP, initial_relevance
    >>> from zennit_resnet.tracing import trace
    >>> image = torch.rand(1, 3, 64, 64)
    >>> explain = trace(resnet18().eval(), ResNetLRP(), image)
    >>> output, relevance = explain(image, initial_relevance(3))
    >>> relevance.shape
    torch.Size([1, 3, 64, 64])
    '''
    check_module(model)
    check_rule('composite', composite, Composite)
    check_key(output)
    check_choice('rule_dtype', rule_dtype, (None, torch.bfloat16))
    with torch.inference_mode(False):
        # a composite keeps what belongs to its last call
        network, composite = copy.deepcopy((unwrap(model)[0], composite))
    traced = TracedAttribution(network.requires_grad_(False), composite, output, rule_dtype)
    traced.graph_for(input)
    return traced


class TracedAttribution(torch.nn.Module):
    '''What :py:func:`trace` has recorded: ``(input, initial_relevance) -> (output, relevance)``.

    Weights are those of when it was traced. Another shape, type or device of the input is traced again, once. Checks of
    values, such as whether an input is within the bounds of ``first_layer='zbox'``, were made for the first input only.
    '''
    def __init__(self, network, composite, output=None, rule_dtype=None):
        super().__init__()
        self.rule_dtype = rule_dtype
        # not as submodules, as their weights are not used
        self.source = (network, composite, output)
        self.graphs = {}

    def __repr__(self):
        shapes = ', '.join(str(tuple(shape)) for shape, *_ in self.graphs)
        return f'{type(self).__name__}({describe(self.source[1])}, shapes: {shapes})'

    def _apply(self, function, recurse=True):
        raise TypeError('A traced attribution cannot be moved or converted: move the network, and trace it again.')

    def forward(self, input, initial_relevance):
        '''The output of the network, and the relevance of an input of shape (batch, ...).

        It starts from a tensor of the output's shape (else a ValueError), or a function of the output that returns it,
        such as :py:func:`~zennit_resnet.attribution.initial_relevance`. For anything else, a TypeError is raised.
        '''
        return self.explain(input, initial_relevance)[:2]

    def explain(self, input, initial_relevance):
        '''Output and relevance, and what sinks keep of it, of shape (batch,), if there are any.'''
        graph = self.graph_for(input)
        with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
            return graph(input.contiguous(), initial_relevance)

    def graph_for(self, input):
        '''The graph for an input's shape, type and device, a module that is called like this one.'''
        if not isinstance(input, torch.Tensor) or not input.is_floating_point():
            raise TypeError(f'The input must be a tensor of floating point numbers, but is {_describe(input)}.')
        key = tuple(input.shape), input.dtype, input.device
        if key not in self.graphs:
            if torch.compiler.is_compiling():
                raise RuntimeError(f'Nothing was traced for {_describe(input)}: call it once before it is compiled.')
            with torch.inference_mode(False):
                # tensors of inference mode have no gradients
                module = self.record(input.clone() if input.is_inference() else input)
            self.add_module(f'graph_{len(self.graphs)}', module)
            self.graphs[key] = module
        return self.graphs[key]

    def record(self, input, layout=None):
        '''Record the graph for an input, with tensors in a memory format.'''
        network, composite, key = self.source
        check_evaluation(network)
        if layout is None and layout_for(input) is not torch.contiguous_format:
            try:
                return self.record(input, layout_for(input))
            except (RuntimeError, ValueError):
                # views and weights of five dimensions need contiguous memory
                pass
        layout = layout or torch.contiguous_format
        divides = None

        def attribute(image, start):
            nonlocal divides
            with torch.inference_mode(False), torch.enable_grad(), registered(composite, network, key):
                leaf = image.detach().contiguous(memory_format=layout).requires_grad_()
                with _ValueGuard(network):
                    output = select_output(network(leaf.clone()))
                divides = divides_by_output(output)
                relevance, = torch.autograd.grad(output, leaf, start)
                sinks = getattr(composite, 'sinks', None)
                kept = [sinks.total(start.detach())] if sinks else []
                if sinks:
                    # they are part of the graph
                    sinks.clear()
            return output.detach(), relevance.contiguous(), *kept

        with torch.no_grad(), torch.autocast(input.device.type, enabled=False):
            result = self._run(input, torch.contiguous_format)
            if layout is not torch.contiguous_format and not _is_close(self._run(input, layout), result):
                raise RuntimeError('Something is written to a view of what is contiguous otherwise.')
            dtype = torch.promote_types(result.dtype, torch.float32)
            start = torch.linspace(.5, 1.5, result.numel(), dtype=dtype, device=result.device).view(result.shape)
            graph, constants = record(attribute, input.contiguous(), start)
            _check_shapes(graph, constants)
            simplify(graph, constants)
            if self.rule_dtype is not None:
                lower_precision(graph, constants, self.rule_dtype)
            module = fold(graph, constants, layout)
            self._check_other(module, input, start)
        _insert_start(module.graph, divides)
        write_in_place(module)
        return module

    def _check_other(self, module, input, start):
        '''Refuse a graph whose output for another input is not that of the network, unless that is random.'''
        other, layout = (.75 * input.flip(-1)).contiguous(), torch.contiguous_format
        with torch.random.fork_rng([input.device] if input.is_cuda else []):
            output = self._run(other, layout)
            # folded weights are rounded in another place
            tolerance = max(1e-3, 16 * torch.finfo(output.dtype).eps)
            is_wrong = not _is_close(module(other, start)[0], output, tolerance) and (
                _is_close(self._run(other, layout), output, tolerance)
            )
        if is_wrong:
            raise TypeError(
                'The network cannot be traced: for another input, the graph returns something else. It keeps something '
                'of an input in a way that cannot be recorded, such as by torch.nn.Parameter or by assigning to .data. '
                'Explain it without tracing.'
            )

    def _run(self, input, layout):
        network, _, key = self.source
        network.to(memory_format=layout)
        with check_precision(network, input):
            return select_output(network(input.contiguous(memory_format=layout)), key)


def _is_close(one, other, tolerance=1e-3):
    '''Whether outputs are the same but for rounding.'''
    return torch.allclose(one, other, 0, tolerance * float(other.nan_to_num(0, 0, 0).abs().max()), equal_nan=True)


def layout_for(input):
    '''The memory format that is the fastest for inputs like this one.'''
    is_small = input.ndim == 4 and input[:, 0].numel() <= FEW and input.device.type == 'cpu'
    return torch.channels_last if is_small else torch.contiguous_format


def _describe(input):
    if not isinstance(input, torch.Tensor):
        return type(input).__name__
    return f'{input.dtype} of shape {tuple(input.shape)} on {input.device}'


def start_from(initial_relevance, output, divides):
    '''What relevance starts from, given as a tensor or a function of the output.'''
    if not isinstance(initial_relevance, torch.Tensor):
        if not callable(initial_relevance):
            raise TypeError(
                f'initial_relevance must be a tensor or a function of the output, but is {type(initial_relevance)}.'
            )
        with ExitStack() as modes:
            if not torch.compiler.is_compiling():
                # functions as targets take gradients
                modes.enter_context(torch.inference_mode(False))
                modes.enter_context(torch.enable_grad())
            given = output.detach().clone()
            # the graph of the output would tell what rule the last layer has
            given.divides_relevance = divides
            initial_relevance = initial_relevance(given)
    if initial_relevance.shape != output.shape:
        raise ValueError(
            f'The initial relevance is of shape {tuple(initial_relevance.shape)}, but the output of '
            f'{tuple(output.shape)}.'
        )
    return initial_relevance.detach()


def _insert_start(graph, divides):
    '''Have the initial relevance checked, or computed from the output, as soon as that is known.'''
    *_, start = graph.find_nodes(op='placeholder')
    (output, *_), = next(node for node in graph.nodes if node.op == 'output').args
    # what only the output is for, such as a copy, may be recorded after relevance
    first, needed = min(start.users), {output}
    for node in reversed(graph.nodes):
        needed.update(node.all_input_nodes if node in needed else ())
    for node in [node for node in graph.nodes if node in needed and first < node]:
        first.prepend(node)
    with graph.inserting_after(output):
        node = graph.call_function(start_from, (start, output, divides))
    node.meta.update(start.meta)
    start.replace_all_uses_with(node, lambda user: user is not node)


def _check_shapes(graph, constants):
    '''Refuse operations whose output has a shape that depends on values of the input.'''
    for node in graph.nodes:
        tags = getattr(node.target, 'tags', ())
        if torch.Tag.dynamic_output_shape not in tags or is_constant(constants, node):
            continue
        if node.target is torch.ops.aten.index.Tensor and not any(
            elem is not None and elem.meta['val'].dtype in (torch.bool, torch.uint8) for elem in node.args[1]
        ):
            continue
        raise TypeError(
            f'The network cannot be traced: the shape of what \'{node.target}\' returns depends on values, so it would '
            'be another for another input.'
        )


class _ValueGuard(TorchFunctionMode):
    '''Raises an error if a network reads values of what it computes from its input.'''
    def __init__(self, network):
        super().__init__()
        self.network = network

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, '__name__', '')
        if name in READS and any(map(is_recorded, args)):
            frame = origin_of_call(func)
            if frame.f_globals['__name__'].partition('.')[0] not in OWN:
                module = module_around(frame)
                label = next((key for key, each in self.network.named_modules() if each is module), '') or 'The network'
                raise TypeError(
                    f'{label} ({type(module).__name__}) cannot be traced: it reads a value of a tensor by \'{name}\', '
                    'by which it may do something else for another input. Have it use torch.where, or explain it '
                    'without tracing.'
                )
        return func(*args, **(kwargs or {}))
