'''The epsilon rule for the last layer: R'_i = h_i sum_j w_ji R_j / y_j, with the bias in y.'''
import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import randomize
from torch import nn
from zennit.attribution import Gradient
from zennit.rules import Epsilon

from zennit_resnet import RelativeLRP, ResNetLRP, UnsupportedOperation, initial_relevance
from zennit_resnet.conservation import conservation_ledger
from zennit_resnet.rules import ZPlus

CONTRASTS = (None, 'centred', 'softmax', 'runner_up', 2, torch.tensor([[0], [3]]))


class Net(nn.Module):
    '''A block and a classifier, which may be written in several ways.'''
    def __init__(self, head='layer'):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.block = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.fc, self.head = nn.BatchNorm2d(6), nn.Linear(6, 4), head

    def features(self, x):
        '''Of shape (batch, 6).'''
        h = self.stem(x).relu()
        return (h + self.norm(self.block(h))).relu().mean((2, 3))

    def forward(self, x):
        '''Logits.'''
        return (self.head if callable(self.head) else HEADS[self.head])(self.fc, self.features(x))


HEADS = {
    'layer': lambda fc, h: fc(h), 'function': lambda fc, h: F.linear(h, fc.weight, fc.bias),
    'product': lambda fc, h: h @ fc.weight.T + fc.bias, 'addmm': lambda fc, h: torch.addmm(fc.bias, h, fc.weight.T),
    'left': lambda fc, h: (fc.weight @ h.T).T + fc.bias,
    'einsum': lambda fc, h: torch.einsum('bi,ki->bk', h, fc.weight) + fc.bias,
    'convolution': lambda fc, h: F.conv2d(h[:, :, None, None], fc.weight[:, :, None, None], fc.bias).flatten(1),
}


def build(head='layer'):
    '''A network in double precision.'''
    return randomize(Net(head)).double().eval()


def explain(model, contrast=None, composite=None, target=(1, 2)):
    '''Relevance of two images.'''
    images = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1)).double()
    composite = ResNetLRP(classifier='epsilon') if composite is None else composite
    start = initial_relevance(list(target), 'logit', contrast=contrast)
    return Gradient(model, composite)(images, start)[1]


@pytest.mark.parametrize('contrast', CONTRASTS, ids=str)
def test_equation(contrast):
    '''Features receive h_i sum_k c_k w_ki, and z+ goes on from there.'''
    model = build()
    features = []
    handle = model.fc.register_forward_pre_hook(lambda module, args: features.append(args[0].detach()))
    actual = explain(model, contrast)
    handle.remove()
    logits = model.fc(features[0]).detach()
    weights = initial_relevance([1, 2], 'one', contrast=contrast)(logits)
    received = features[0] * (weights @ model.fc.weight)

    class Features(nn.Module):
        '''The network without its classifier.'''
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            '''Features.'''
            return self.model.features(x)

    images = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1)).double()
    expected = Gradient(Features().eval(), ResNetLRP())(images, lambda output: received.detach())[1]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    total = (weights * (logits - model.fc.bias)).sum(1)
    torch.testing.assert_close(actual.sum((1, 2, 3)), total.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('batch_norm', ['pass', 'merge'])
@pytest.mark.parametrize('head', HEADS)
def test_spellings(head, batch_norm):
    '''However the last layer is written.'''
    def create():
        return ResNetLRP(classifier='epsilon', batch_norm=batch_norm)

    expected, actual = explain(build(), 'centred', create()), explain(build(head), 'centred', create())
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('contrast', CONTRASTS[1:], ids=str)
def test_heads_with_equal_probabilities(contrast):
    '''Weights W and W + 1 v^T have the same softmax, and the same map. That of a logit differs, and so does z+.'''
    model = build()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.fc.weight += torch.randn(1, 6, generator=torch.Generator().manual_seed(2)).double()
    torch.testing.assert_close(explain(model, contrast), explain(twin, contrast), rtol=1e-9, atol=1e-12)
    assert not torch.allclose(explain(model), explain(twin), rtol=.1)
    assert not torch.allclose(explain(model, contrast, ResNetLRP()), explain(twin, contrast, ResNetLRP()), rtol=.1)


def test_only_the_last_layer():
    '''Others have z+, also if they are of the same type. Of several branches, each has a last one.'''
    class Deep(Net):
        '''Two linear layers, or two heads.'''
        def __init__(self, is_parallel):
            super().__init__()
            self.hidden, self.is_parallel = nn.Linear(6, 6), is_parallel
            self.other = nn.Linear(6, 4)

        def forward(self, x):
            '''Logits.'''
            h = self.features(x)
            return torch.cat([self.fc(h), self.other(h)], 1) / 2 if self.is_parallel else self.fc(self.hidden(h).relu())

    for is_parallel in (False, True):
        model = randomize(Deep(is_parallel)).double().eval()
        marked = {}
        with Gradient(model, ResNetLRP(classifier='epsilon')) as attributor:
            rules = {
                name: next(rule for rule in module._forward_hooks.values() if isinstance(
                    getattr(rule, '__self__', None), ZPlus
                )).__self__ for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))
            }
            for name, rule in rules.items():
                find = rule._constants
                vars(rule)['_constants'] = lambda *args, name=name, find=find: (
                    marked.setdefault(name), find(*args)
                )[1]
            attributor(torch.randn(2, 3, 9, 9).double(), initial_relevance([1, 6] if is_parallel else [1, 2]))
        assert set(marked) == ({'fc', 'other'} if is_parallel else {'fc'})


# what may come after the last layer, by the name in the message
TAILS = {
    'sigmoid': lambda fc, h: fc(h).sigmoid(),
    'tanh': lambda fc, h: fc(h).tanh(),
    'Softmax': lambda fc, h: fc(h).softmax(1),
    'LogSoftmax': lambda fc, h: fc(h).log_softmax(1),
    'batch_norm': lambda fc, h: F.batch_norm(fc(h), torch.arange(4.).double(), torch.full((4,), 2.).double()),
    'mean': lambda fc, h: F.conv2d(h[:, :, None, None], fc.weight[:, :, None, None], fc.bias).mean((2, 3)),
    'interpolate': lambda fc, h: F.interpolate(fc(h)[:, :, None], scale_factor=2.).flatten(1),
    'add': lambda fc, h: fc(h) + fc(h / 2),
}


@pytest.mark.parametrize('name', TAILS)
def test_what_comes_after_the_last_layer(name):
    '''It would change proportions, so that dividing by the output of the layer turns maps over: an error.'''
    model, images = Net(TAILS[name]), torch.randn(2, 3, 9, 9).double()
    model = randomize(model).double().eval()
    for contrast in (None, 'runner_up'):
        with Gradient(model, ResNetLRP(classifier='epsilon')) as attributor:
            with pytest.raises(UnsupportedOperation, match=f'{name}.* classifier=.epsilon.'):
                attributor(images, initial_relevance(1, contrast=contrast))
    with Gradient(model, ResNetLRP()) as attributor:
        attributor(images, initial_relevance(1, 'one'))


def test_normalization_after_the_last_layer():
    '''It is part of that layer if it is folded into it.'''
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), norm).double().eval()
    norm.running_mean.normal_()
    norm.running_var.fill_(.3)
    twin = copy.deepcopy(model)[:3]
    with torch.no_grad():
        scale = (norm.running_var + norm.eps) ** -.5
        twin[2].weight *= scale[:, None]
        twin[2].bias.copy_((twin[2].bias - norm.running_mean) * scale)
    images, start = torch.randn(3, 6).double(), initial_relevance(1, contrast='centred')
    with Gradient(twin, ResNetLRP(classifier='epsilon')) as attributor:
        _, expected = attributor(images.clone(), start)
    with Gradient(model, ResNetLRP(classifier='epsilon', batch_norm='merge')) as attributor:
        _, actual = attributor(images.clone(), start)
    torch.testing.assert_close(actual, expected)
    with Gradient(model, ResNetLRP(classifier='epsilon')) as attributor:
        with pytest.raises(UnsupportedOperation, match='BatchNorm1d'):
            attributor(images.clone(), start)


@pytest.mark.parametrize('combine', [
    lambda first, second: torch.cat([first, second], 1), lambda first, second: first + second,
], ids=['joined', 'added'])
def test_relative_contrast_of_two_heads(combine):
    '''Relevance of both signs may sum to zero where branches begin, which is no reason to scale it to nothing.'''
    class Heads(Net):
        '''Two linear layers side by side.'''
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(6, 4)

        def forward(self, x):
            '''Logits.'''
            h = self.features(x)
            return combine(self.fc(h), self.other(h))

    model = randomize(Heads()).double().eval()
    with Gradient(model, RelativeLRP()) as attributor:
        _, relevance = attributor(torch.randn(2, 3, 9, 9).double(), initial_relevance(0, contrast=1))
    assert relevance.flatten(1).any(1).all()


def test_relative_contrast_within_a_head():
    '''A head beside it that has no part in the question leaves the map as it is, but for its scale.'''
    class Heads(Net):
        '''One linear layer, or two side by side.'''
        is_joined = True

        def __init__(self):
            super().__init__()
            self.other = nn.Linear(6, 4)

        def forward(self, x):
            '''Logits.'''
            h = self.features(x)
            return torch.cat([self.fc(h), self.other(h)], 1) if self.is_joined else self.fc(h)

    model = randomize(Heads()).double().eval()
    images, maps = torch.randn(4, 3, 9, 9).double(), []
    for model.is_joined in (True, False):
        for contrast in (1, [2, 3], 'runner_up'):
            start = initial_relevance(0, contrast=contrast)
            if contrast == 'runner_up':
                # within the first head
                start = initial_relevance(0, contrast=model(images)[:, :4].scatter(
                    1, torch.zeros(4, 1, dtype=torch.long), -torch.inf
                ).argmax(1, keepdim=True))
            maps.append(Gradient(model, RelativeLRP())(images.clone(), start)[1].flatten(1))
    for joined, single in zip(maps[:3], maps[3:]):
        torch.testing.assert_close(F.normalize(joined), F.normalize(single), rtol=1e-9, atol=1e-12)


def test_composite_of_zennit_at_the_end():
    '''A rule of the user for the last layer stays, and those before it have z+.'''
    expected = explain(build(), composite=ResNetLRP(layer_map=[(nn.Linear, Epsilon(epsilon=0.))]))
    actual = explain(build(), composite=ResNetLRP(layer_map=[(nn.Linear, Epsilon(epsilon=0.))], classifier='epsilon'))
    assert torch.equal(actual, expected)
    torch.testing.assert_close(explain(build()), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 5e-2), (torch.float32, 1e-4)])
def test_precision(dtype, tolerance):
    '''Half precision keeps relevance in single precision.'''
    images = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    maps = [
        Gradient(build().to(kind), ResNetLRP(classifier='epsilon'))(
            images.to(kind), initial_relevance([1, 2], contrast='centred')
        )[1].double() for kind in (dtype, torch.float64)
    ]
    assert float((maps[0] - maps[1]).norm() / maps[1].norm()) < tolerance


def test_ledger():
    '''What the biases of the last layer keep is named.'''
    model = build()
    start = initial_relevance([1, 2], contrast='centred')
    ledger = conservation_ledger(
        model, torch.randn(2, 3, 9, 9).double(), ResNetLRP(classifier='epsilon'), start
    )
    row, = (row for row in ledger.rows if row.name == 'fc')
    weights = initial_relevance([1, 2], 'one', contrast='centred')(torch.zeros(2, 4).double())
    torch.testing.assert_close(row.lost_by['bias'], (weights @ model.fc.bias).detach(), rtol=1e-9, atol=1e-12)
    assert row.lost_by['unexplained'].abs().max() < 1e-9
    assert sum(elem.lost_by['bias'].abs().max() for elem in ledger if elem is not row) == 0


def test_dead_logits():
    '''An output of exactly zero has no share, and nothing becomes NaN.'''
    model = build()
    with torch.no_grad():
        model.fc.weight[1], model.fc.bias[1] = 0., 0.
    relevance = explain(model, 'centred')
    assert relevance.isfinite().all() and relevance.any()


def test_unknown():
    '''The choice is checked.'''
    with pytest.raises(ValueError, match='gamma'):
        ResNetLRP(classifier='gamma')
