'''Rules of products of two signals and of attention, by loops over single connections, and their laws.'''
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import assert_close, attribute
from torch import nn
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlusFlat

from zennit_resnet import GammaLRP, ResNetLRP, initial_relevance, with_splitting
from zennit_resnet.canonizers import ResidualCanonizer
from zennit_resnet.layer import Gate, MatrixProduct, NonNegativeProduct, Product, Softmax
from zennit_resnet.rules import HalfEach, SignalTakesAll, SoftmaxTaylor
from zennit_resnet.tracing import trace


def surrogate(kind, function, **settings):
    '''A surrogate module of a function.'''
    module = kind()
    module.function = function
    for key, value in settings.items():
        setattr(module, key, value)
    return module


def naive_halves(left, right, relevance):
    '''Shares of the products of two matrices, one connection after the other.'''
    lower = torch.zeros_like(left), torch.zeros_like(right)
    for row in range(left.shape[0]):
        for column in range(right.shape[1]):
            products = [float(left[row, num] * right[num, column]) for num in range(left.shape[1])]
            total = sum(elem for elem in products if elem > 0)
            for num, product in enumerate(products):
                share = max(product, 0.) / total if total else 1 / len(products)
                lower[0][row, num] += relevance[row, column] * share / 2
                lower[1][num, column] += relevance[row, column] * share / 2
    return lower


def naive_softmax(logits, relevance):
    '''The rule of the softmax of vectors.'''
    lower = torch.zeros_like(logits)
    for row, values in enumerate(logits.tolist()):
        weights = [math.exp(elem) / sum(map(math.exp, values)) for elem in values]
        total = float(relevance[row].sum())
        for num, value in enumerate(values):
            lower[row, num] = value * (float(relevance[row, num]) - weights[num] * total)
    return lower


@pytest.fixture(name='signals')
def fixture_signals():
    '''Queries, keys and values of two examples with three tokens of four channels. Some are zero.'''
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 4).double()
    query[0, 1] = 0.
    value[1, :, 2] = -value[1, :, 2].abs()
    return query, key, value


def test_halves(signals):
    '''Each factor receives a half in proportion to positive contributions, and outputs without any spread theirs.'''
    left, right, _ = signals
    product = surrogate(MatrixProduct, lambda left, right: left @ right.mT)
    output, relevance, *lower = attribute(HalfEach(), product, left, right)
    assert torch.equal(output, left @ right.mT)
    for num in range(2):
        expected = naive_halves(left[num], right[num].T, relevance[num])
        assert_close(lower[0][num], expected[0])
        assert_close(lower[1][num], expected[1].T)
    for elem in lower:
        assert_close(elem.sum((1, 2)), relevance.sum((1, 2)) / 2)


def test_halves_of_other_inputs():
    '''The rule is for two factors.'''
    with pytest.raises(ValueError, match='not of 1'):
        attribute(HalfEach(), surrogate(MatrixProduct, lambda left: left), torch.rand(2, 2))


def test_softmax(signals):
    '''The Taylor rule, which masked elements have no part in.'''
    logits = signals[0][0]
    _, relevance, lower = attribute(SoftmaxTaylor(), surrogate(Softmax, lambda x: x.softmax(-1)), logits)
    assert_close(lower, naive_softmax(logits, relevance))
    masked = torch.cat([logits, torch.full((3, 1), -math.inf).double()], 1)
    start = torch.cat([relevance, torch.zeros(3, 1).double()], 1)
    _, _, more = attribute(SoftmaxTaylor(), surrogate(Softmax, lambda x: x.softmax(-1)), masked, relevance=start)
    assert_close(more[:, :4], lower)
    assert not more[:, 4].any()


class Function(nn.Module):
    '''A function of several tensors.'''
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        '''Call it.'''
        return self.function(*args)


def propagate(function, inputs, composite, relevance=None):
    '''Relevance of each input of a function, with that of the output, which is random.'''
    model, leaves = Function(function), [elem.clone().requires_grad_() for elem in inputs]
    expected = model(*leaves).detach()
    with composite.context(model):
        output = model(*leaves)
        if relevance is None:
            relevance = torch.rand(output.shape, generator=torch.Generator().manual_seed(1)).double()
        lower = torch.autograd.grad(output, leaves, relevance, allow_unused=True)
    assert torch.equal(output.detach(), expected)
    return relevance, lower


def written_out(query, key, value):
    '''Attention as functions.'''
    return ((query @ key.mT) / 2).softmax(-1) @ value


def test_value_of_attention(signals):
    '''All relevance goes to the values by z+, for which the weights are constants.'''
    query, key, value = signals
    relevance, lower = propagate(written_out, signals, ResNetLRP())
    assert lower[0] is None and lower[1] is None
    for num in range(2):
        weights = ((query[num] @ key[num].T) / 2).softmax(-1)
        expected = torch.zeros(3, 4).double()
        for row in range(3):
            for channel in range(4):
                parts = [max(float(weights[row, token] * value[num, token, channel]), 0.) for token in range(3)]
                # without any positive value, the weights are the shares
                parts = parts if any(parts) else weights[row].tolist()
                for token, part in enumerate(parts):
                    expected[token, channel] += relevance[num, row, channel] * part / sum(parts)
        assert_close(lower[2][num], expected)
    # and like that of the linear network which it is for fixed weights, but for dead units
    weights, value = (query @ key.mT / 2).softmax(-1), value.abs() - .1
    relevance, lower = propagate(written_out, (query, key, value), ResNetLRP())
    assert_close(lower[2], propagate(lambda value: weights @ value, [value], ResNetLRP(), relevance)[1][0])


def test_half_of_attention(signals):
    '''Halves go to weights and values, and those of the weights through the softmax to queries and keys.'''
    query, key, value = signals
    relevance, lower = propagate(written_out, signals, ResNetLRP(attention='half'))
    for num in range(2):
        logits = query[num] @ key[num].T / 2
        of_weights, of_value = naive_halves(logits.softmax(-1), value[num], relevance[num])
        expected = naive_halves(query[num], key[num].T, naive_softmax(logits, of_weights))
        assert_close(lower[2][num], of_value)
        assert_close(lower[0][num], expected[0])
        assert_close(lower[1][num], expected[1].T)


@pytest.mark.parametrize('attention', ['value', 'half'])
@pytest.mark.parametrize('settings', [
    {}, {'scale': .3}, {'is_causal': True}, {'attn_mask': torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 0]]).bool()},
    {'attn_mask': torch.linspace(-1, 1, 9).double().view(3, 3)},
])
def test_fused_attention(signals, settings, attention):
    '''Relevance is that of the functions that attention consists of.'''
    def plain(query, key, value):
        logits, mask = query @ key.mT * settings.get('scale', .5), settings.get('attn_mask')
        if settings.get('is_causal'):
            mask = torch.ones(3, 3).tril().bool()
        if mask is not None:
            logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
        return logits.softmax(-1) @ value

    composite = ResNetLRP(attention=attention)
    relevance, lower = propagate(lambda *args: F.scaled_dot_product_attention(*args, **settings), signals, composite)
    _, expected = propagate(plain, signals, composite, relevance)
    for actual, elem in zip(lower, expected):
        assert actual is elem is None or torch.allclose(actual, elem, atol=1e-12)


def test_rows_without_keys(signals):
    '''Outputs of queries whose keys are all masked receive no relevance from anything.'''
    mask = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0]]).bool()
    start = torch.ones(2, 3, 4).double()
    start[:, 1] = 0.
    _, lower = propagate(
        lambda *args: F.scaled_dot_product_attention(*args, attn_mask=mask), signals, ResNetLRP(), start
    )
    assert lower[2].isfinite().all()
    assert_close(lower[2].sum((1, 2)), start.sum((1, 2)))


@pytest.mark.parametrize('attention', ['value', 'half'])
@pytest.mark.parametrize('need_weights', [True, False])
def test_multi_head(signals, need_weights, attention):
    '''The module of torch.nn is the same as its layers one by one.'''
    torch.manual_seed(1)
    layer = nn.MultiheadAttention(4, 2, batch_first=True).double().eval().requires_grad_(False)
    for param in layer.parameters():
        nn.init.normal_(param)

    def plain(query, key, value):
        parts = [
            F.linear(elem, weight, bias).unflatten(-1, (2, 2)).transpose(1, 2) for elem, weight, bias
            in zip((query, key, value), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3))
        ]
        weights = (parts[0] @ parts[1].mT * math.sqrt(.5)).softmax(-1)
        return layer.out_proj((weights @ parts[2]).transpose(1, 2).flatten(2))

    composite = ResNetLRP(attention=attention)
    relevance, lower = propagate(lambda *args: layer(*args, need_weights=need_weights)[0], signals, composite)
    _, expected = propagate(plain, signals, composite, relevance)
    for actual, elem in zip(lower, expected):
        assert actual is elem is None or torch.allclose(actual, elem, atol=1e-10)
    assert attention == 'half' or torch.allclose(lower[2].sum((1, 2)), relevance.sum((1, 2)))


def test_heads_that_are_mixed(signals):
    '''Weights remain weights after a linear map, by which some have negative signs.'''
    mixing = torch.tensor([[1., -.5], [.3, .9]]).double()

    def attend(query, key, value):
        weights = (query @ key.mT).softmax(-1)
        return torch.einsum('hg,bgij->bhij', mixing, weights) @ value

    relevance, lower = propagate(attend, [elem[None] for elem in signals], ResNetLRP())
    assert lower[0] is None and lower[1] is None
    assert_close(lower[2].sum(), relevance.sum())


def test_products_without_weights(signals):
    '''Factors receive halves if neither is known to weight the other.'''
    for function, shares in (
        # in linear attention, keys of a softmax are weights of the values, and queries are not
        (lambda q, k, v: q @ (k.softmax(1).mT @ v), (.5, 0, .5)),
        (lambda q, k, v: q.relu() @ (k.relu().mT @ v), (.5, .25, .25)),
        # products of weights are weights
        (lambda q, k, v: (q.softmax(-1) @ k.mT.softmax(-1)) @ v, (0, 0, 1)),
    ):
        relevance, lower = propagate(function, signals, ResNetLRP())
        for share, elem in zip(shares, lower):
            assert elem is None if share == 0 else close(elem.sum((1, 2)), relevance.sum((1, 2)) * share)


def close(left, right):
    '''Up to rounding.'''
    return torch.allclose(left, right, atol=1e-12)


def test_choice_of_the_layer_map(signals):
    '''Products have the rule of the layer map.'''
    query, key, _ = signals
    composite = ResNetLRP(layer_map=[((Product, MatrixProduct), SignalTakesAll())])
    relevance, lower = propagate(lambda left, right: left * right, (query, key), composite)
    assert torch.equal(lower[0], relevance) and (lower[1] is None or not lower[1].any())
    relevance, lower = propagate(lambda left, right: left * right, (query, key), ResNetLRP())
    assert torch.equal(lower[0], relevance / 2) and torch.equal(lower[1], relevance / 2)


class Block(nn.Module):
    '''Transformer with a class token. Its second attention is over a fixed matrix, if one is given.'''
    def __init__(self, weights=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.values, self.head = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.keys, self.norm, self.token = nn.Linear(8, 8), nn.LayerNorm(8), nn.Parameter(torch.randn(1, 1, 8))
        self.position, self.weights = nn.Parameter(torch.randn(1, 6, 8)), weights

    def attend(self, h):
        '''Weights of all tokens.'''
        keys = self.keys(h)
        return (keys @ keys.mT).softmax(-1)

    def forward(self, x):
        '''Logits.'''
        h = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.position
        normed = self.norm(h)
        weights = self.attend(normed) if self.weights is None else self.weights
        return self.head((h + weights @ self.values(normed))[:, 0])


def explain(model, x, composite, target=(1, 2)):
    '''Output and relevance.'''
    with Gradient(model=model, composite=composite) as attributor:
        return attributor(x, initial_relevance(list(target), 'one'))


def test_frozen_weights():
    '''A network is explained like the one that has its weights as constants.'''
    x, model, found = torch.randn(2, 5, 3).double(), Block().double().eval(), []
    inner = model.attend
    model.attend = lambda h: found.append(inner(h)) or found[-1]
    _, relevance = explain(model, x, ResNetLRP())
    with torch.no_grad():
        model(x)
    model.weights = found[-1]
    assert_close(relevance, explain(model, x, ResNetLRP())[1])


def test_permutation():
    '''Tokens without positions are explained alike in any order.'''
    x, model, order = torch.randn(2, 5, 3).double(), Block().double().eval(), [3, 0, 4, 1, 2]
    model.position.data.zero_()
    for attention in ('value', 'half'):
        relevance, permuted = (explain(model, elem, ResNetLRP(attention=attention))[1] for elem in (x, x[:, order]))
        assert_close(permuted, relevance[:, order])


@pytest.mark.parametrize('build', [ResNetLRP, lambda: with_splitting(EpsilonPlusFlat())])
def test_surrogates(build):
    '''Modules stand for the products, with rules of any composite.'''
    x, model = torch.randn(2, 5, 3).double(), Block().double().eval()
    with torch.no_grad():
        expected = model(x)
    with Gradient(model=model, composite=build()) as attributor:
        output, relevance = attributor(x, initial_relevance([1, 2]))
        kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds['matrix_product'] is MatrixProduct and kinds['nonnegative_map'] is NonNegativeProduct
    assert close(output.detach(), expected) and relevance.isfinite().all()


class Weighted(nn.Module):
    '''Values that are weighted by what a function makes of two linear layers.'''
    def __init__(self, weights):
        super().__init__()
        torch.manual_seed(0)
        self.queries, self.keys, self.values = (nn.Linear(6, 6) for _ in range(3))
        self.head, self.weights = nn.Linear(6, 3), weights

    def forward(self, x):
        '''Logits.'''
        return self.head((x + self.weights(self.queries(x), self.keys(x), self.values(x))).mean(1))


@pytest.mark.parametrize('build', [ResNetLRP, GammaLRP, lambda: with_splitting(EpsilonPlusFlat())],
                         ids=('ratio', 'gamma', 'zennit'))
@pytest.mark.parametrize('weights', [
    lambda q, k, v: ((q @ k.mT).sigmoid() - .25) @ v, lambda q, k, v: torch.einsum('bij,bjk->bik', q @ k.mT.tanh(), v),
    lambda q, k, v: q.exp() / k.exp().sum(-1, keepdim=True) * v,
    lambda q, k, v: q.exp() * (1 / k.exp().sum(-1, keepdim=True)) * v,
], ids=('shifted', 'einsum', 'quotient', 'reciprocal'))
def test_examples_have_rules_of_their_own(weights, build):
    '''What is a gate, and which signs it may have, does not depend on the values of other examples.'''
    model = Weighted(weights).double().eval()
    x = torch.randn(12, 4, 6, generator=torch.Generator().manual_seed(1)).double()
    x *= torch.linspace(.5, 2, 12)[:, None, None]
    _, relevance = explain(model, x, build(), [1] * 12)
    alone = torch.cat([explain(model, elem[None], build(), [1])[1] for elem in x])
    assert_close(alone, relevance)


@pytest.mark.parametrize('build', [ResNetLRP, GammaLRP], ids=('ratio', 'gamma'))
def test_signs_of_a_gate_that_only_values_tell(build):
    '''A positive gate has the same map whether or not its graph tells the sign, also in a trace.'''
    def explained(weights):
        model = Weighted(lambda q, k, v: weights(q @ k.mT) @ v.relu().neg()).double().eval()
        output, relevance = explain(model, x, build())
        start = initial_relevance([1, 2], 'one')(output)
        assert_close(trace(model, build(), x)(x, start)[1], relevance)
        return relevance

    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1)).double()
    # values are negative, so all units are dead for z+, and share by the gate
    assert_close(explained(lambda h: 2 * h.softmax(-1) - h.softmax(-1)), explained(lambda h: h.softmax(-1)))


def test_rejected():
    '''Choices are named.'''
    for settings in ({'attention': 'both'}, {'parameters': 'lose'}):
        for kind in (ResNetLRP, ResidualCanonizer):
            with pytest.raises(ValueError, match=next(iter(settings.values()))):
                kind(**settings)


class Muted(nn.Module):
    '''Attention in which the first token weights nothing.'''
    def __init__(self, weights):
        super().__init__()
        torch.manual_seed(0)
        self.weights, self.qkv, self.head = weights, nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        '''Logits of tokens (batch, tokens, 4).'''
        q, k, v = self.qkv(x).unflatten(-1, (3, 4)).permute(2, 0, 1, 3).unbind(0)
        mask = torch.arange(x.shape[1]).clamp(max=1).to(x)[:, None]
        return self.head((self.weights(q @ k.mT) * mask @ v).mean(1))


@pytest.mark.parametrize('weights', [lambda w: w.softmax(-1), torch.tanh], ids=['softmax', 'tanh'])
def test_nothing_weighted(weights):
    '''Relevance of a token that weights nothing goes evenly to those that it might weight, also where images moved.'''
    model, x = Muted(weights).double().eval(), torch.randn(2, 2, 4).double()
    output, relevance = explain(model, x, ResNetLRP())
    alone = [explain(model, x[num:num + 1], ResNetLRP(), [num + 1])[1] for num in (0, 1)]
    assert_close(relevance, torch.cat(alone))
    assert_close(relevance.sum((1, 2)), torch.ones(2).double())
    _, traced = trace(model, ResNetLRP(), x)(x, torch.eye(3).double()[[1, 2]])
    assert_close(traced, relevance)


# -- recurrence --------------------------------------------------------------------------------------------------------

class Recurrent(nn.Module):
    '''An LSTM over the columns of an image, as functions.'''
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.given, self.hidden, self.head = nn.Linear(6, 16), nn.Linear(4, 16, bias=False), nn.Linear(4, 3)

    def forward(self, x):
        '''Logits.'''
        h = c = x.new_zeros(len(x), 4)
        for step in x.unbind(1):
            i, f, o, g = (self.given(step) + self.hidden(h)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


def test_recurrence():
    '''Relevance of products of gates goes to what they multiply, and is conserved.'''
    model, x = Recurrent().double().eval(), torch.randn(2, 5, 6).double()
    _, relevance = explain(model, x, ResNetLRP())
    assert_close(relevance.sum((1, 2)), torch.ones(2).double())
    with ResNetLRP().context(model):
        model(x.requires_grad_())
        gates = [module for module in model.modules() if isinstance(module, Gate)]
    assert len(gates) == 15
