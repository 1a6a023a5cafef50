'''Conservation of relevance: how much of it arrives at each layer, how much leaves it, and where the rest went.

It is measured on the edges of the graph of the forward pass, with all rules in place, so that none can pass unnoticed:
what all rows of the ledger lose adds up to the difference of the initial relevance and that at the input.
'''
import csv
import json
import math
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from zennit.core import Composite

from .._nested import map_tensors
from ..arguments import check_flag, check_module, check_number, check_precision, check_rule, show
from ..attribution import initial_relevance, select_output
from ..canonizers.eager import check_evaluation
from ..registration import registered
from ..rules.block import GradientTimesInput
from .losses import CAUSES, precise
from .plot import plot_ledger
from .recorder import Recorder


@dataclass(eq=False, repr=False)
class Ledger:
    '''How much relevance arrives at each layer, how much leaves it, and where the rest went.

    Iterating gives rows in the order of the backward pass. What they lose adds up to ``initial - final``. All tensors
    but output and relevance are of shape (batch,) and type float64.

    Attributes
    ----------
    rows, blocks: list[:py:obj:`~zennit_resnet.conservation.Row`]
        Layers and functions between them, and modules which contain others, which sum up what happens inside.
    initial, scale, final: :py:obj:`torch.Tensor`
        Sum of the initial relevance and of its magnitudes, and sum of the relevance at the input.
    output, relevance: :py:obj:`torch.Tensor`
        Output of the network, and relevance of the input, of its shape.
    composite: str or None
        The composite and its options, as text.
    sinks: dict[str, :py:obj:`torch.Tensor`]
        What parameters and other constants keep, such as a class token that is concatenated, by name. It is no loss.
    '''
    rows: list
    blocks: list
    initial: torch.Tensor
    scale: torch.Tensor
    final: torch.Tensor
    output: torch.Tensor
    relevance: torch.Tensor
    composite: str | None = None
    sinks: dict = field(default_factory=dict)

    def __iter__(self):
        return iter(self.rows)

    def __repr__(self):
        gaps = ', '.join(f'{value:+.1e}' for value in self.gap[:4].tolist())
        more = f', ... ({len(self.gap)} examples)' if len(self.gap) > 4 else ''
        return f'Ledger(composite={self.composite}, {len(self)} rows, {len(self.blocks)} blocks, gap [{gaps}{more}])'

    def __len__(self):
        return len(self.rows)

    @property
    def gap(self):
        '''Conservation gap (final + sinks - initial) / scale, of shape (batch,), zero if there is no relevance.'''
        gap = self.final + self.lost_by['sink'] - self.initial
        return torch.where(gap == 0, 0., gap / self.scale)

    @property
    def lost_by(self):
        '''What is lost in total by each cause, as a dict of tensors of shape (batch,).'''
        return {key: sum((row.lost_by[key] for row in self.rows), torch.zeros_like(self.initial)) for key in CAUSES}

    def find(self, name):
        '''All rows and blocks of a module by its path: calls, and functions in it. A KeyError if it has no row.'''
        found = [row for row in (*self.rows, *self.blocks) if row.name == name]
        if not found:
            raise KeyError(f'No relevance reaches a module {name!r}!')
        return found

    def example(self, index=None):
        '''The ledger of an example, by default of that with the largest deviation, or an IndexError, as below.'''
        index = self._index(index)
        return map_tensors(lambda tensor: tensor[index:][:1], self)

    def deviation(self, layers=True):
        '''Largest deviation from conservation, relative to the initial relevance, of shape (batch,).

        It is infinite where anything is NaN or infinite. With ``layers`` (default), each layer counts, otherwise only
        the input as compared with the output, for which losses and gains of layers may cancel.
        '''
        lost = torch.stack([self.gap * self.scale, *(row.missing for row in self.rows if layers)]).abs().amax(0)
        deviation = torch.where(lost == 0, 0., lost / self.scale)
        is_finite = self.relevance.detach().cpu().reshape(len(self.initial), -1).isfinite().all(1)
        for row in self.rows:
            is_finite &= row.nan + row.inf == 0
        return torch.where(deviation.isfinite() & is_finite, deviation, math.inf)

    def worst(self, number=3, example=0):
        '''Get the rows that lose or gain most in an example, those with NaN or infinite values first.'''
        example = self._index(example)

        def amount(row):
            lost = abs(float(row.missing[example]))
            return lost if math.isfinite(lost) else math.inf

        return [row for row in sorted(self.rows, key=amount, reverse=True) if amount(row)][:number]

    def assert_conserved(self, tolerance=1e-4, layers=True):
        '''Raise an AssertionError with the worst layers and the causes if :py:meth:`deviation` exceeds a tolerance.'''
        check_number('tolerance', tolerance, 0, finite=False)
        check_flag('layers', layers)
        bad = (~(self.deviation(layers) <= tolerance)).nonzero()[:, 0].tolist()
        if bad:
            others = f' (and {len(bad) - 1} more)' if len(bad) > 1 else ''
            raise AssertionError(
                f'Relevance is not conserved within {tolerance:g} in example {bad[0]}{others}:\n'
                + '\n'.join(self._summary(bad[0], tolerance))
            )

    def table(self, example=None, tolerance=1e-4, blocks=False, only_losses=False):
        '''Format as a table, from the output to the input, with a summary below.

        Functions which pass on all relevance are left out. A mark ``!`` is before rows that lose or gain more than the
        tolerance, relative to the initial relevance, or have NaN or infinite values. The example is an index in the
        batch, by default of the one with the largest deviation. With ``blocks``, these are shown in the place of layers
        and functions, and with ``only_losses`` only rows with a mark.
        '''
        check_number('tolerance', tolerance, 0, finite=False)
        check_flag('blocks', blocks)
        check_flag('only_losses', only_losses)
        index = self._index(example)
        scale = float(self.scale[index])
        threshold = tolerance * scale
        lines = [(
            '', 'layer', 'type', 'rule', 'arrives', 'leaves', 'factor', 'lost/initial', 'sum |R|', 'min |z|', 'cause'
        )]
        for row in [row.at(index) for row in self.blocks] if blocks else self.visible(index, threshold):
            is_bad = row.is_bad(threshold)
            if only_losses and not is_bad:
                continue
            lines.append((
                '!' if is_bad else '', f'{row.name or "(network)"}{f" #{row.call}" if row.call else ""}', row.type,
                row.rule or '-', f'{row.arrives:.5g}', f'{row.leaves:.5g}',
                f'{row.leaves / row.arrives:.5g}' if row.arrives else '-', f'{row.lost / scale:.1e}' if scale else '-',
                f'{row.leaves_magnitude:.3g}', '' if row.smallest in (None, math.inf) else f'{row.smallest:.1e}',
                row.causes(threshold),
            ))
        widths = [max(map(len, column)) for column in zip(*lines)]
        # numbers are aligned at the right
        text = ['  '.join(
            f'{cell:{">" if 4 <= num <= 9 else "<"}{width}}' for num, (cell, width) in enumerate(zip(line, widths))
        ).rstrip() for line in lines]
        text.insert(1, '-' * max(map(len, text)))
        if only_losses and len(lines) == 1:
            what = 'block' if blocks else 'layer'
            text = [f'no {what} loses or gains more than {tolerance:g} of the initial relevance', '']
        title = [f'example {index} of {len(self.initial)}'] if len(self.initial) > 1 else []
        return '\n'.join([*title, *text, text[1], *self._summary(index, tolerance)])

    def _summary(self, index, tolerance):
        '''Totals, worst rows and what can be done about them, as lines.'''
        initial, final, gap, scale = (elem[index].item() for elem in (self.initial, self.final, self.gap, self.scale))
        threshold = tolerance * scale
        lines = [f'initial {initial:.6g}, at the input {final:.6g} (gap {gap:+.2e})']
        if self.sinks:
            lines.append('kept by ' + ', '.join(f'{name} {elem[index]:.3g}' for name, elem in self.sinks.items()))
        lost = (f'{key.replace("_", " ")} {value[index]:.3g}' for key, value in self.lost_by.items())
        lines.append('lost by ' + ', '.join(lost))
        worst = [row for row in (row.at(index) for row in self.worst(3, index)) if row.is_bad(threshold)]
        for row in worst:
            lines.append(
                f'! {row.label} ({row.type}, {row.rule or "no rule"}): {row.arrives:.5g} arrives, {row.leaves:.5g} '
                f'leaves ({row.causes(threshold)})'
            )
        causes = {key for row in worst for key, value in row.lost_by.items() if abs(value) > threshold}
        lines += [f'  {key.replace("_", " ")}: {advice}' for key, (advice, _) in CAUSES.items() if key in causes]
        magnitude = float(precise(self.relevance[index]).abs().sum())
        grown = [row for row in (row.at(index) for row in self.rows) if row.arrives_magnitude > .01 * scale]
        if magnitude > 10 * scale and grown:
            row = max(grown, key=lambda row: row.leaves_magnitude / row.arrives_magnitude)
            lines.append(
                f'magnitudes sum to {magnitude:.3g} at the input, as terms cancel or are multiplied. They grow most in '
                f'{row.label} ({row.type}, {row.rule or "no rule"}): {row.arrives_magnitude:.3g} to '
                f'{row.leaves_magnitude:.3g}'
            )
        return lines

    def _index(self, example):
        '''Index of an example, by default of that with the largest deviation.'''
        if example is None:
            return int(self.deviation().argmax())
        if not 0 <= example < len(self.initial):
            raise IndexError(f'Example {example} is not among the {len(self.initial)} of the batch!')
        return example

    def visible(self, index, threshold):
        '''Rows of an example, see :py:meth:`Row.at`, without the functions which pass on all relevance.'''
        return [row for row in (row.at(index) for row in self.rows) if row.kind != 'function' or row.is_bad(threshold)]

    def plot(self, example=None, tolerance=1e-4):
        '''Plot what layers lose, and what is left, as a :py:obj:`matplotlib.figure.Figure`, see :py:meth:`table`.'''
        check_number('tolerance', tolerance, 0, finite=False)
        return plot_ledger(self, self._index(example), tolerance)

    def records(self):
        '''All rows and blocks of each example as dicts: :py:class:`Row`, and what is lost relative to the initial.'''
        records = []
        for index, scale in enumerate(self.scale):
            for order, row in enumerate((*self.rows, *self.blocks)):
                values = vars(row.at(index))
                lost_by, lost = values.pop('lost_by'), row.lost[index]
                records.append({
                    'example': index, 'order': order, **values, 'lost': lost.item(),
                    'lost_relative': float(lost / scale) if lost else 0.,
                    **{f'lost_by_{key}': value for key, value in lost_by.items()},
                })
        return records

    def to_csv(self, path):
        '''Write a table with a line for each example and row or block, see :py:meth:`records`.'''
        records = self.records()
        with open(path, 'w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, records[0])
            writer.writeheader()
            writer.writerows(records)

    def to_json(self, path):
        '''Write totals and all rows and blocks as JSON. Values that are NaN or infinite are null.'''
        content = {
            'initial': self.initial.tolist(), 'final': self.final.tolist(), 'gap': self.gap.tolist(),
            'lost_by': {key: value.tolist() for key, value in self.lost_by.items()},
            'rows': self.records(),
        }
        # JSON has neither NaN nor infinity
        content = json.loads(json.dumps(content), parse_constant=lambda name: None)
        with open(path, 'w', encoding='utf-8') as file:
            json.dump(content, file, indent=1, allow_nan=False)


def conservation_ledger(model, input, composite=None, attr_output=None, target=None, value='logit'):
    '''Follow relevance through a network, and find out where it is lost or gained.

    The network is run once forward and backward, as by Zennit's ``Gradient``, and left as it was found. Rules give the
    same relevance as without a ledger.

    Parameters
    ----------
    model: :py:obj:`torch.nn.Module`
        The network in evaluation mode.
    input: :py:obj:`torch.Tensor`
        Input of shape (batch, ...).
    composite: :py:obj:`zennit.core.Composite`, optional
        Any composite, which remains registered if it is. Default is None for input times gradient.
    attr_output: :py:obj:`torch.Tensor` or callable, optional
        Initial relevance of the shape of the output, or a function that computes it from the output, as for attributors
        of Zennit. Default is the output itself.
    target, value: optional
        In place of ``attr_output``, see :py:func:`~zennit_resnet.attribution.initial_relevance`.

    Returns
    -------
    :py:obj:`Ledger`
        What arrives at all layers, leaves them, and is lost in between.

    Raises
    ------
    TypeError
        If ``model``, ``input`` or ``composite`` is none, or the output is no tensor.
    ValueError
        If ``attr_output`` and ``target`` are both given, or shapes of initial relevance, output and input do not fit,
        or if the output does not depend on the input.
    RuntimeError
        If batch normalization, dropout or stochastic depth is in training mode.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from zennit.composites import EpsilonPlus
    >>> from zennit_resnet.conservation import conservation_ledger
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval()
    >>> for parameter in model.parameters():
    ...     _ = nn.init.ones_(parameter)
    >>> ledger = conservation_ledger(model, torch.ones(1, 2), EpsilonPlus())
    >>> for row in ledger:
    ...     print(f'{row.name} {row.type}: {row.arrives.item():.2f} arrives, {row.leaves.item():.2f} leaves')
    2 Linear: 10.00 arrives, 9.00 leaves
    1 ReLU: 9.00 arrives, 9.00 leaves
    0 Linear: 9.00 arrives, 6.00 leaves
    >>> print(f'gap {ledger.gap.item():.2f}, lost by biases {ledger.lost_by["bias"].item():.2f}')
    gap -0.40, lost by biases 4.00
    '''
    check_module(model)
    if not isinstance(input, torch.Tensor) or not input.numel() or not input.is_floating_point():
        given = f'of {input.dtype} and {_shape(input)}' if isinstance(input, torch.Tensor) else repr(input)
        raise TypeError(
            f'The input must be a tensor of floating point numbers and not empty, but is {given}: convert images with '
            'input.float(), or follow the network from its embedding on, given the output of that.'
        )
    name = 'input times gradient' if composite is None else show(composite)
    if composite is None:
        composite = Composite(module_map=lambda ctx, name, module: None if name else GradientTimesInput())
        composite.propagates = 'gradient'
    check_rule('composite', composite, Composite)
    if target is not None and attr_output is not None:
        raise ValueError('attr_output and target exclude each other: choose one')
    if attr_output is None:
        attr_output = torch.Tensor.detach if target is None else initial_relevance(target, value)
    check_evaluation(model)
    # a composite that is registered already remains so
    with nullcontext() if composite.handles else registered(composite, model), torch.enable_grad():
        recorder = Recorder(model, composite, len(input))
        try:
            input = input.detach().requires_grad_()
            with recorder.watch(), check_precision(model, input):
                output = model(input)
            _check_output(output, input)
            seed = attr_output(output) if callable(attr_output) else attr_output
            if not isinstance(seed, torch.Tensor) or seed.shape != output.shape:
                raise ValueError(
                    f'The initial relevance must be a tensor of the shape {tuple(output.shape)} of the output, but is '
                    f'{_shape(seed)}!'
                )
            relevance = recorder.propagate(output, input, seed.detach())
            rows, blocks = recorder.summarize()
        finally:
            recorder.probe.leave()
    initial, final = (precise(elem.detach()).cpu().reshape(len(input), -1) for elem in (seed, relevance))
    return Ledger(
        rows, blocks, initial.sum(1), initial.abs().sum(1), final.sum(1), output.detach(), relevance.detach(), name,
        {name: elem.cpu() for name, elem in getattr(composite, 'sinks', {}).items()},
    )


def assert_conserved(
    model, input, composite, attr_output=None, target=None, value='logit', tolerance=1e-4, layers=True
):
    '''Check in a test that a composite conserves relevance, and get the ledger.

    For arguments, and what is raised, see :py:func:`conservation_ledger` and :py:meth:`Ledger.assert_conserved`.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> from zennit_resnet import ResNetLRP
    >>> from zennit_resnet.conservation import assert_conserved
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).eval()
    >>> ledger = assert_conserved(model, torch.ones(1, 2), ResNetLRP())
    >>> bool((ledger.gap.abs() < 1e-4).all())
    True
    '''
    ledger = conservation_ledger(model, input, composite, attr_output, target, value)
    ledger.assert_conserved(tolerance, layers)
    return ledger


def _shape(value):
    '''What is wrong about a value where a tensor of another shape should be.'''
    return f'of shape {tuple(value.shape)}' if isinstance(value, torch.Tensor) else repr(value)


def _check_output(output, input):
    select_output(output)
    if output.grad_fn is None:
        raise ValueError('The output does not depend on the input by operations with a gradient!')
    if not output.ndim or len(output) != len(input):
        raise ValueError(
            f'The output must have as many examples as the input of shape {tuple(input.shape)}, but it is of shape '
            f'{tuple(output.shape)}!'
        )
