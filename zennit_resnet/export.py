'''An explanation as one file, which runs without Python and this package: ONNX, or a program of torch.export.'''
import copy
import importlib
import json
import re
import warnings
from pathlib import Path

import torch

from . import __version__
from ._compat import TorchDispatchMode, caller, module_around
from ._files import check_free, whole
from ._graphs import fold, record
from ._pooling import DECOMPOSITIONS
from .arguments import check_choice, check_flag, check_rule
from .attribution import VALUES, as_contrast, at_least_single, check_contrast_weight, default_value, rival_shares, weigh
from .tracing import TracedAttribution, layout_for

FORMATS = ('.onnx', '.pt2')
METADATA = 'metadata.json'
# What a message of protobuf can hold, less what is not weights.
LARGEST = 2 ** 31 - 2 ** 24
# What is recorded about the origin of operations, such as paths of this machine.
ORIGINS = ('stack_trace', 'nn_module_stack', 'source_fn_stack', 'torch_fn', 'from_node')


def export(
    traced, input, path, value=None, contrast=None, contrast_weight=1., relevance=False, normalization=None,
    metadata=None, overwrite=False,
):
    '''Write a file that maps an input and a target to logits and a heatmap.

    Inputs of the file are ``image``, of the shape (with its batch) and type of ``input``, and ``target`` of shape
    (batch,) and type int64: the class to explain of each example, where a negative one is that which is predicted.
    Its outputs are ``logits`` of shape (batch, classes), ``heatmap``, the sum over channels of shape (batch, height,
    width), and with ``relevance=True`` the ``relevance`` of the input's shape.

    Parameters
    ----------
    traced: :py:obj:`~zennit_resnet.tracing.TracedAttribution`
        What :py:func:`~zennit_resnet.tracing.trace` returns.
    input: :py:obj:`torch.Tensor`
        An input of the network, of shape (batch, channels, ...), in the shape of those that the file takes.
    path: str or :py:obj:`pathlib.Path`
        The file, of suffix ``.onnx`` or ``.pt2``, which :py:func:`torch.export.load` reads. The first needs the extra
        ``export`` of this package, and PyTorch from 2.6.
    value, contrast, contrast_weight: optional
        What relevance starts from, see :py:func:`~zennit_resnet.attribution.initial_relevance`.
    relevance, overwrite: bool, optional
        Whether the relevance of each channel is an output, too, and whether to replace a file that exists.
    normalization: tuple[sequence of float, sequence of float], optional
        Mean and standard deviation of each channel, by which the file is to normalize images.
    metadata: dict, optional
        What else to write into the file's metadata, by key, none that it has by itself, such as ``'value'``. What is
        no string is written as JSON.

    Returns
    -------
    dict[str, str]
        The metadata: ``properties.custom_metadata_map`` of ONNX Runtime, the extra file ``metadata.json`` of ``.pt2``.

    Raises
    ------
    TypeError
        If an argument is of another type.
    ValueError
        If an argument is not one of its choices, a key of ``metadata`` is taken, the network's output is not of shape
        (batch, classes) or (batch,), the file would be larger than ONNX can be, or an operation has no form in ONNX.
        The message names it.
    OSError
        If there is such a file already, or it cannot be written.
    ImportError
        If packages are missing that ONNX needs.

    Examples
    --------
    >>> import tempfile
    >>> import torch
    >>> from zennit_resnet import ResNetLRP
    >>> from zennit_resnet.export import export, run_file
    >>> from zennit_resnet.tracing import trace
    >>> layers = torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    >>> model, image = torch.nn.Sequential(*layers, torch.nn.Linear(8, 10)).eval(), torch.rand(1, 3, 32, 32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     metadata = export(trace(model, ResNetLRP(), image), image, f'{folder}/explain.pt2')
    ...     outputs = run_file(f'{folder}/explain.pt2', image, torch.tensor([3]))
    >>> outputs['heatmap'].shape
    (1, 32, 32)
    '''
    path = Path(path)
    check_rule('traced', traced, TracedAttribution)
    if path.suffix == '.onnx' and traced.rule_dtype is not None:
        raise ValueError(
            f'ONNX Runtime has no convolutions of {traced.rule_dtype} on CPU: trace without rule_dtype, or write .pt2.'
        )
    check_path(path, overwrite)
    check_flag('relevance', relevance)
    check_choice('value', value, (None, *VALUES))
    rivals = as_contrast(contrast)
    check_contrast_weight(rivals, contrast_weight)
    graph = traced.graph_for(input)
    if layout_for(input) != torch.contiguous_format:
        # another layout needs views which other formats have not
        graph = traced.record(input, torch.contiguous_format)
    with torch.no_grad():
        start, outputs, value = _record_start(graph, input, value, rivals, contrast_weight)
        graph = _standalone(graph, DECOMPOSITIONS if path.suffix == '.onnx' else {})
        explanation = _Explanation(graph, start, relevance, normalization, input)
        target = torch.zeros(len(input), dtype=torch.long, device=input.device)
        image = input if normalization is None else input * explanation.std + explanation.mean
        program = torch.export.export(explanation, (image, target), strict=False)
    for node in program.graph.nodes:
        for key in ORIGINS:
            node.meta.pop(key, None)
    names = ['logits', 'heatmap', *['relevance'] * relevance]
    shapes = outputs.shape, (*input.shape[:1], *input.shape[2:]) if input.ndim > 2 else input.shape, input.shape
    own = {
        'package': f'zennit_resnet {__version__}', 'torch': torch.version.__version__,
        'composite': repr(traced.source[1]), 'value': value,
        **({} if rivals is None else {
            'contrast': rivals if isinstance(rivals, str) else rivals.tolist(), 'contrast_weight': contrast_weight,
        }),
        **({} if normalization is None else {
            'normalization': {'mean': explanation.mean.flatten().tolist(), 'std': explanation.std.flatten().tolist()},
        }),
        'inputs': {'image': _describe(input.shape, input.dtype), 'target': _describe(target.shape, target.dtype)},
        'outputs': {name: _describe(shape, outputs.dtype if name == 'logits' else input.dtype)
                    for name, shape in zip(names, shapes)},
    }
    taken = sorted(own.keys() & (metadata or {}).keys())
    if taken:
        raise ValueError(f'metadata: {taken[0]!r} is what the file itself tells there: choose another key.')
    entries = {**own, **(metadata or {})}
    texts = {key: entry if isinstance(entry, str) else json.dumps(entry) for key, entry in entries.items()}
    with whole(path, overwrite) as file:
        if path.suffix == '.onnx':
            _write_onnx(program, file, names, texts, traced)
        else:
            torch.export.save(program, file, extra_files={METADATA: json.dumps(texts)})
    return texts


def _describe(shape, dtype):
    return f'{str(dtype).removeprefix("torch.")} of shape {tuple(shape)}'


def check_path(path, overwrite=False):
    '''Raise an error unless a file can be written: its suffix, that nothing is there, what is installed.'''
    check_flag('overwrite', overwrite)
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f'path={str(path)!r} is of no format that there is: choose one of {", ".join(FORMATS)}.')
    check_free(path, overwrite)
    if not path.parent.is_dir():
        raise FileNotFoundError(f'There is no folder {path.parent}: make it first.')
    if path.suffix == '.onnx':
        try:
            for name in ('onnx', 'onnxscript'):
                importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f'{error}. Writing ONNX needs more packages: pip install onnx onnxscript') from error


class _Explanation(torch.nn.Module):
    '''Normalization, attribution, what it starts from, and the sum over channels.'''
    def __init__(self, graph, start, with_relevance, normalization, input):
        super().__init__()
        self.attribution, self.start, self.with_relevance = graph, start, with_relevance
        for name, value in zip(('mean', 'std'), normalization or (None, None), strict=True):
            self.register_buffer(name, None if value is None else self.constant(name, value, input))

    @staticmethod
    def constant(name, value, input):
        '''Mean or standard deviation in the shape in which it is broadcast.'''
        value = torch.as_tensor(value, dtype=input.dtype, device=input.device).flatten()
        if len(value) not in (1, input.shape[1]) or not value.isfinite().all() or name == 'std' and (value <= 0).any():
            raise ValueError(
                f'normalization: {name}={value.tolist()} is not a{" positive" * (name == "std")} number for each of '
                f'{input.shape[1]} channels.'
            )
        return value.view(1, -1, *(1,) * (input.ndim - 2))

    def forward(self, image, target):
        if self.mean is not None:
            image = (image - self.mean) / self.std
        output, relevance, *_ = self.attribution(image, lambda output: self.start(output, target))
        heatmap = relevance.sum(1) if relevance.ndim > 2 else relevance.clone()
        return (output, heatmap, relevance) if self.with_relevance else (output, heatmap)


def _record_start(graph, input, value, contrast, contrast_weight):
    '''What relevance starts from as a graph ``(output, target) -> start``, the output, and the name of the value.'''
    found = []

    def record_start(output):
        if output.ndim not in (1, 2):
            raise ValueError(
                f'The output must be of shape (batch, classes) or (batch,), but is {tuple(output.shape)}: choose a '
                'part by trace(..., output=lambda output: ...).'
            )
        chosen = value or default_value(output, is_signed=contrast is not None)

        def start(output, target):
            logits = at_least_single(output).reshape(len(output), -1)
            index = torch.where(target < 0, logits.argmax(1), target)[:, None]
            # no class is an error, which a remainder would hide
            weights = torch.zeros_like(logits).scatter(1, index, 1.)
            if contrast is not None:
                weights = weights - contrast_weight * rival_shares(logits, index, contrast)
            return weigh(weights, logits, chosen).reshape(output.shape)

        target = output.reshape(len(output), -1).argmax(1)
        found.extend([fold(*record(start, output, target)), output, chosen])
        return start(output, target)

    graph(input, record_start)
    return found


def _standalone(module, decompositions):
    '''A module of the same weights, with functions replaced, where weights are contiguous and share no memory.'''
    graph, seen = copy.deepcopy(module.graph), set()
    for node in graph.nodes:
        node.target = decompositions.get(node.target, node.target)
    result = torch.fx.GraphModule(module, graph)
    for name, value in list(result.named_buffers()):
        if value.untyped_storage().data_ptr() in seen or not value.is_contiguous():
            result.register_buffer(name, value.clone(memory_format=torch.contiguous_format))
        seen.add(value.untyped_storage().data_ptr())
    return result


def _write_onnx(program, path, names, metadata, traced):
    size = sum(value.nbytes for value in (*program.state_dict.values(), *program.constants.values()))
    if size > LARGEST:
        raise ValueError(
            f'The weights are of {size / 2 ** 30:.1f} GB, but a file of ONNX is of 2 GB at most: write .pt2.'
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            result = torch.onnx.export(
                program, input_names=['image', 'target'], output_names=names, dynamo=True, verbose=False
            )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(_reason(error, traced)) from error
    model = result.model
    for node in model.graph:
        node.metadata_props.clear()
        for output in node.outputs:
            output.metadata_props.clear()
    model.metadata_props.clear()
    model.metadata_props.update(metadata)
    model.producer_name, model.doc_string = 'zennit_resnet', metadata['composite']
    result.save(path, external_data=False)


def _reason(error, traced):
    '''Why there is no ONNX: the operation, and which layers it is from.'''
    messages = []
    cause = error
    while cause is not None:
        messages.append(' '.join(str(cause).split()))
        cause = cause.__cause__
    found = re.search(r'No ONNX function found for <OpOverload\(op=\'([\w.]+)\'', ' '.join(messages))
    if not found:
        return f'The attribution cannot be written as ONNX ({messages[-1][:200]}): write .pt2.'
    name = found[1]
    layers = _layers_with(traced, name.partition('.')[2])
    where = f', which is from {", ".join(layers[:3])}{", …" * (len(layers) > 3)},' if layers else ''
    return f'The operation {name}{where} has no form in ONNX: write .pt2, or have the network use another one.'


def _layers_with(traced, name):
    '''Modules that run an operation, or the one that it is the gradient of.'''
    network, name = traced.source[0], _stem(name)
    labels, found = {module: label for label, module in network.named_modules()}, {}

    class Search(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if _stem(func.__name__.partition('.')[0]) == name:
                module = module_around(caller())
                found[f'{labels.get(module) or "the network"} ({type(module).__name__})'] = None
            return func(*args, **(kwargs or {}))

    shape, dtype, device = next(iter(traced.graphs))
    with torch.no_grad(), Search():
        network(torch.zeros(shape, dtype=dtype, device=device))
    return list(found)


def _stem(name):
    return name.removesuffix('_backward').strip('_').removeprefix('special_')


def run_file(path, image, target):
    '''Run a file that :py:func:`export` has written on tensors, by ONNX Runtime or PyTorch, to get arrays by name.'''
    if Path(path).suffix == '.onnx':
        import onnxruntime
        session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, {'image': image.cpu().numpy(), 'target': target.cpu().numpy()})))
    outputs = torch.export.load(path).module()(image, target)
    return {name: value.cpu().numpy() for name, value in zip(('logits', 'heatmap', 'relevance'), outputs)}
