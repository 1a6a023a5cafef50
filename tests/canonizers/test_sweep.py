'''The instruments outside of CI find what they are for: a part of benchmarks/sweep.py, and rules that are wrong.'''
import sys
from pathlib import Path

import pytest
import torch
from zennit.composites import EpsilonPlus, LayerMapComposite
from zennit.rules import Norm, Pass

from zennit_resnet import ResNetLRP, with_splitting
from zennit_resnet.layer import Convolution2d

sys.path.insert(0, str(Path(__file__).parents[2] / 'benchmarks'))
import explained  # noqa: E402
import sweep  # noqa: E402
import sweep_networks  # noqa: E402

pytestmark = pytest.mark.once


def outcomes(code, layer=None):
    '''Outcomes of all composites.'''
    return {label: sweep.cell(results) for label, results in sweep.attempt(code, layer).items()}


@pytest.mark.parametrize('code, layer, ratio', [
    ('h.permute(0, 2, 3, 1)', None, 'conserves'),
    ('F.avg_pool2d(h, 3, 2, 1)', None, 'conserves'),
    ('h + g', None, 'conserves'),
    ('h * s', None, 'conserves'),
    ('h * s.mean((2, 3), keepdim=True)', None, 'conserves'),
    ('F.gelu(h)', None, 'passes'),
    ('torch.cat((h, C.expand(2, -1, -1, -1)), 1)', None, 'absorbs'),
    ('h * g', None, 'conserves'),
    ('h.prod(3)', None, 'refuses'),
    ('k = h.clone(); k += g; k', None, 'conserves'),
    ('layer(h)', 'nn.Conv2d(8, 4, 3, 2)', 'conserves'),
    ('layer(v)', 'nn.LazyConv1d(4, 3)', 'conserves'),
    ('layer(d)', 'nn.BatchNorm3d(2)', 'passes'),
    ('layer(v, v, v)', 'nn.MultiheadAttention(12, 2, batch_first=True)', 'conserves'),
])
def test_outcomes(code, layer, ratio):
    '''Functions and layers are what the table says they are.'''
    found = outcomes(code, layer)
    assert found['ratio'] == ratio and found['block'] in ('exact', 'finite')
    # of several images, contributions of attention of torch.nn are not told apart
    is_refused = ratio == 'refuses' or 'Attention' in str(layer)
    assert found['relative'] == ('refuses' if is_refused else 'finite')


class Wrong(torch.nn.Module):
    '''A module with something wrong in it.'''
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.register_buffer('calls', torch.zeros(()))

    def forward(self, x):
        '''Identity, more or less.'''
        if self.kind == 'network changed':
            self.calls += 1
        if self.kind == 'depends on the batch':
            # by a function that nobody sees
            return x + torch.from_numpy(x.detach().numpy().mean((0, 2, 3), keepdims=True))
        return x.clone()


@pytest.mark.parametrize('kind', ['network changed', 'depends on the batch'])
def test_wrong_networks(kind, monkeypatch):
    '''Networks that change, and those whose images depend on each other.'''
    monkeypatch.setattr(sweep_networks.nn, 'Wrong', Wrong, raising=False)
    assert outcomes('layer(h)', f'nn.Wrong({kind!r})')['ratio'] == kind


@pytest.mark.parametrize('code, composite', [
    ('F.conv2d(h, K)', lambda: LayerMapComposite([])),
    ('h + g', lambda: with_splitting(EpsilonPlus())),
    ('F.avg_pool2d(h, 2)', lambda: ResNetLRP(layer_map=[(torch.nn.AvgPool2d, Norm()), (torch.nn.Linear, Norm())])),
])
def test_wrong_rules(code, composite, monkeypatch):
    '''Gradients in the place of rules, and rules that do not conserve relevance.'''
    monkeypatch.setitem(sweep.COMPOSITES, 'ratio', composite)
    results = sweep.attempt(code)['ratio']
    assert 'silent' in {outcome for outcome, _ in results}


def test_matrix(monkeypatch):
    '''The gradient of a linear function with weights of both signs is found, also if it conserves relevance.'''
    code = 'F.conv2d(h, torch.tensor([[2., -1], [-1, 2]]).double().repeat(4, 4)[:, :, None, None] * .25)'
    right = sweep.Probe(sweep.Network(code, True))
    assert right.matrix() == ''
    monkeypatch.setattr(sweep, 'ResNetLRP', lambda **kwargs: ResNetLRP(layer_map=[(Convolution2d, Pass())]))
    assert 'matrix' in right.matrix()


def test_crash(monkeypatch):
    '''Errors of this package are refusals, others are not.'''
    def fail(*args):
        return [][0]

    monkeypatch.setattr(explained, 'initial_relevance', fail)
    assert set(outcomes('h.clone()').values()) == {'crash'}


def test_twins():
    '''Spellings of a function agree, and those that do not are found.'''
    assert list(sweep.compare_twins(['*F.glu(h, 1)*'])) == []


def test_wrong_twins(monkeypatch):
    '''Two functions that are not the same.'''
    monkeypatch.setattr(sweep, 'TWINS', 'h.flip(3) | h.roll(1, 3)')
    assert {(label, outcome) for _, label, outcome, _ in sweep.compare_twins()} == {
        (label, 'twins differ') for label in (*sweep.COMPOSITES, 'symmetric')
    }


def test_page():
    '''The page has rows in groups, faults first.'''
    rows, skipped, twins = sweep.run(['tril', 'nn.PReLU'], with_database=False)
    assert not skipped and not twins and len(rows) == 5
    page = sweep.write(rows, skipped, twins)
    assert '| `nn.PReLU(8)` | passes | passes | exact | finite |' in page
    assert '## Faults' not in page and '### Passes' in page
    rows[0][3]['ratio'] = [('silent', 'sum off by 1')]
    assert sweep.write(rows, skipped, twins).index('## Faults') < sweep.write(rows, skipped, twins).index('## Moves')
    assert '## silent, ratio: 1' in sweep.summarize(rows, skipped, twins)
