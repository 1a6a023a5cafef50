'''Networks with attention: conservation, the same bits, nothing left behind, and what class tokens keep.'''
import pytest
import torch
import torchvision.models as tv
from helpers.layers import Products
from helpers.ledger import check_sums
from helpers.state import Snapshot
from torch import nn
from torchvision.models import swin_transformer as swin
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus, EpsilonPlusFlat

from captum_adapters.attr import LayerRelevance
from captum_adapters.attr import ResNetLRP as CaptumResNetLRP
from zennit_resnet import (
    BlockLRP,
    GammaLRP,
    RelativeLRP,
    ResNetLRP,
    UnsupportedOperation,
    initial_relevance,
    with_splitting,
)
from zennit_resnet.conservation import assert_conserved, conservation_ledger
from zennit_resnet.methods import Method


class Encoder(nn.Sequential):
    '''The transformer of PyTorch.'''
    def __init__(self):
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        super().__init__(
            nn.Conv2d(3, 16, 16, 16), nn.Flatten(2), nn.Linear(16, 16), nn.TransformerEncoder(layer, 2),
            nn.Flatten(), nn.Linear(256, 7),
        )


def vit(**settings):
    '''A small vision transformer.'''
    return tv.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=7, **settings)


def swin_network(**settings):
    '''A small Swin transformer. Every other block shifts its windows.'''
    return tv.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [2, 2], num_classes=7, **settings)


NETWORKS = {
    'vit': (vit, 32),
    'swin': (swin_network, 32),
    'swin_v2': (lambda: swin_network(block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2), 32),
    'maxvit': (lambda: tv.MaxVit((64, 64), 8, 2, [8, 16], [1, 1], 4, 0., num_classes=7), 64),
    'encoder': (Encoder, 64),
}
COMPOSITES = {
    'ratio': ResNetLRP,
    'symmetric': lambda: ResNetLRP('symmetric'),
    'residual': lambda: ResNetLRP(identity_skip=False),
    'merge': lambda: ResNetLRP(batch_norm='merge'),
    'sink': lambda: ResNetLRP(parameters='sink'),
}


def prepare(name):
    '''A network with random parameters, and images.'''
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    model = build().double().eval()
    for param in model.parameters():
        if param.ndim < 3:
            nn.init.normal_(param, std=.3)
    return model, torch.randn(2, 3, size, size).double()


def explain(model, x, composite):
    '''Output and relevance.'''
    with Gradient(model=model, composite=composite) as attributor:
        return attributor(x, initial_relevance([1, 2][:len(x)], 'one'))


def total(relevance, composite):
    '''What arrives at images and constants.'''
    return relevance.sum((1, 2, 3)) + sum(composite.sinks.values())


@pytest.mark.parametrize('create', [ResNetLRP, GammaLRP, lambda: ResNetLRP(attention='half')])
def test_one_product_for_all_tokens(create):
    '''Frozen weights do not make a product for each token, neither those of the network nor those of rules.'''
    model = vit().eval()
    image = torch.rand(2, 3, 32, 32, requires_grad=True)
    expected = model(image)
    with create().context(model) as modified, Products() as products:
        output = modified(image)
        torch.autograd.grad(output, image, torch.ones_like(output))
    assert products.repeated == 0
    assert torch.equal(output, expected)


class Cross(nn.Module):
    '''Attention between features and their mirror images, whose projections are parts of one weight.'''
    def __init__(self):
        super().__init__()
        self.conv, self.attention = nn.Conv2d(3, 8, 3, padding=1), nn.MultiheadAttention(36, 3, batch_first=True)

    def forward(self, x):
        '''Logits.'''
        h = self.conv(x).relu()
        return self.attention(*(elem.flatten(2) for elem in (h, h.flip(1), h.flip(2))), need_weights=False)[0].sum(2)


@pytest.mark.parametrize('name', ['conv', 'attention', 'attention.in_proj_weight', 'attention.out_proj'])
def test_partly_frozen(name):
    '''Parts of a network that were frozen before keep their bits as well as others do.'''
    for seed in range(3):
        torch.manual_seed(seed)
        model, x = Cross().double().eval(), torch.rand(2, 3, 6, 6, dtype=torch.double)
        for key, param in model.named_parameters():
            param.requires_grad_(not key.startswith(name))
        expected = model(x.clone().requires_grad_())
        with ResNetLRP().context(model) as modified:
            assert torch.equal(modified(x.clone().requires_grad_()), expected)


@pytest.mark.parametrize('name', NETWORKS)
def test_networks(name):
    '''Relevance is conserved, with the bits of the network, which is left as it was found.'''
    model, x = prepare(name)
    expected = model(x.clone().requires_grad_()).detach()
    frozen = model.requires_grad_(False)(x.clone().requires_grad_()).detach()
    model.requires_grad_(True)
    before = Snapshot(model)
    for build in COMPOSITES.values():
        composite = build()
        output, relevance = explain(model, x, composite)
        before.check()
        assert torch.equal(output.detach(), expected)
        assert torch.allclose(total(relevance, composite), torch.ones(2).double(), atol=1e-9)
        alone = explain(model, x[:1], composite)[1]
        assert torch.allclose(alone, relevance[:1], atol=1e-9)
    for build in (lambda: ResNetLRP(attention='half'), BlockLRP):
        output, relevance = explain(model, x, build())
        before.check()
        assert torch.equal(output, expected) or torch.equal(output, frozen)
        assert relevance.isfinite().all() and relevance.any()


@pytest.mark.parametrize('name', NETWORKS)
def test_relative(name):
    '''Contributions of several images are not told apart where attention mixes the first dimension, which is said.'''
    model, x = prepare(name)
    assert explain(model, x[:1], RelativeLRP())[1].isfinite().all()
    if name == 'maxvit':
        assert explain(model, x, RelativeLRP())[1].isfinite().all()
    else:
        with pytest.raises(ValueError, match='one at a time'):
            explain(model, x, RelativeLRP())


@pytest.mark.parametrize('create', [EpsilonPlus, EpsilonPlusFlat])
def test_composites_of_zennit(create):
    '''Zennit has a rule for attention as an activation, which is left out: that of a single input has no three.'''
    model, images = vit().double().eval(), torch.rand(2, 3, 32, 32).double()
    nn.init.normal_(model.heads.head.weight)
    with Gradient(model=model, composite=with_splitting(create(epsilon=1e-9, zero_params='bias'))) as attributor:
        _, relevance = attributor(images, initial_relevance([1, 2], 'one'))
    assert bool(relevance.isfinite().all()) and bool(relevance.any())


def test_values_without_input():
    '''Of values that are constants, only the weights depend on the input, which has no rule by default.'''
    class Memory(nn.Module):
        '''Attention over parameters.'''
        def __init__(self):
            super().__init__()
            self.keys, self.values = (nn.Parameter(torch.randn(6, 4).double()) for _ in range(2))

        def forward(self, x):
            '''Logits.'''
            return nn.functional.scaled_dot_product_attention(x, self.keys, self.values).mean(1)

    model, x = Memory(), torch.randn(2, 3, 4).double()
    with pytest.raises(UnsupportedOperation, match='softmax'):
        explain(model, x, ResNetLRP())
    assert explain(model, x, ResNetLRP(attention='half'))[1].any()


# -- sinks -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('splitting', ['ratio', 'symmetric'])
def test_class_token(splitting):
    '''The class token keeps its part, which the ledger and the delta know.'''
    model, x = prepare('vit')
    composite = ResNetLRP(splitting)
    _, relevance = explain(model, x, composite)
    kept, = composite.sinks.values()
    assert list(composite.sinks) == ['class_token'] and bool((kept > .01).all())
    ledger = assert_conserved(model, x, ResNetLRP(splitting), target=[1, 2], value='one', tolerance=1e-9)
    check_sums(ledger)
    assert torch.allclose(ledger.sinks['class_token'], kept) and torch.allclose(ledger.lost_by['sink'], kept)
    assert f'kept by class_token {float(kept[1]):.3g}' in ledger.table(1)
    assert ledger.example(1).sinks['class_token'].shape == (1,)
    for size in (None, 1):
        attributions, delta = CaptumResNetLRP(model, splitting, initial_relevance='one').attribute(
            x, [1, 2], return_convergence_delta=True, internal_batch_size=size
        )
        assert torch.allclose(attributions, relevance) and torch.allclose(delta, torch.zeros(2).double(), atol=1e-9)


def test_positions():
    '''What is added is split from the signal, and the same as if it were computed from the input.'''
    model, x = prepare('vit')
    composite = ResNetLRP(parameters='sink')
    _, relevance = explain(model, x, composite)
    assert set(composite.sinks) == {'class_token', 'encoder.pos_embedding'}
    ledger = assert_conserved(model, x, ResNetLRP(parameters='sink'), target=[1, 2], value='one', tolerance=1e-9)
    row = next(row for row in ledger.find('encoder.addition') if row.type == 'Addition')
    assert row.rule == 'RatioSplit'
    assert torch.allclose(row.lost, composite.sinks['encoder.pos_embedding'])


@pytest.mark.parametrize('function, sign', [
    (lambda h, p: h + p, 1), (lambda h, p: p + h, 1), (lambda h, p: h - p, 1), (lambda h, p: h.clone().add_(p), 1),
    (lambda h, p: torch.add(h, p, alpha=-2), 2),
])
def test_share_of_an_embedding(function, sign):
    '''What is added receives the share of an addend, unless it is the same for all positions.'''
    class Added(nn.Module):
        '''A sum.'''
        def __init__(self, shape):
            super().__init__()
            self.position = nn.Parameter(torch.randn(shape).double())

        def forward(self, x):
            '''Tokens.'''
            return function(x, self.position)

    x = torch.randn(2, 3, 4).double().requires_grad_()
    for shape in ((3, 4), (1, 3, 4), (4,), (1, 1, 4)):
        model, start, composite = Added(shape), torch.rand(2, 3, 4).double(), ResNetLRP(parameters='sink')
        expected = model(x).detach()
        with composite.context(model):
            output = model(x)
            lower, = torch.autograd.grad(output, x, start)
        assert torch.equal(output.detach(), expected)
        share = x.abs() / (x.abs() + sign * model.position.abs()) if 3 in shape else torch.ones(2, 3, 4)
        assert torch.allclose(lower, start * share)
        if 3 in shape:
            assert torch.allclose(composite.sinks['position'], (start - lower).sum((1, 2)))
        else:
            assert not composite.sinks


@pytest.mark.parametrize('fill, name', [
    (lambda h, mask, token: torch.where(mask, token, h), '0.token'),
    (lambda h, mask, token: h.masked_scatter(mask, token.expand_as(h)), '0.token'),
    (lambda h, mask, token: h.masked_fill(mask, .7), 'masked_fill in 0'),
    (lambda h, mask, token: h.masked_fill(mask, 0.), None),
])
def test_mask_tokens(fill, name):
    '''What is put in the place of tokens keeps its part, but zeros.'''
    class Masked(nn.Module):
        '''Every third token is another.'''
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.rand(1, 1, 4).double() + .5)

        def forward(self, x):
            '''All tokens.'''
            return fill(x.relu(), (torch.arange(6) % 3 == 0)[None, :, None], self.token)

    model = nn.Sequential(Masked(), nn.Linear(4, 3).double(), nn.ReLU())
    x = torch.randn(2, 6, 4).double().requires_grad_()
    composite, start = ResNetLRP(), torch.rand(2, 6, 3).double()
    with composite.context(model):
        lower, = torch.autograd.grad(model(x), x, start)
    assert list(composite.sinks) == ([] if name is None else [name])
    assert torch.allclose(lower.sum((1, 2)) + composite.sinks.get(name, 0.), start.sum((1, 2)))


def test_several_backward_passes():
    '''Sinks are those of the last backward pass.'''
    model, x = prepare('vit')
    composite, sinks = ResNetLRP(), []
    x.requires_grad_()
    with composite.context(model):
        output = model(x)
        for factor in (1., 2.):
            torch.autograd.grad(output, x, torch.full_like(output, factor), retain_graph=True)
            sinks.append(composite.sinks['class_token'])
    assert torch.allclose(sinks[1], 2 * sinks[0])


def test_examples_along_the_second_dimension():
    '''Tokens that are concatenated before the examples are told apart.'''
    class Tokens(nn.Module):
        '''Tokens come first.'''
        def __init__(self):
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.randn(1, 1, 4).double()), nn.Linear(4, 3).double()

        def forward(self, x):
            '''Logits.'''
            h = torch.cat([self.token.expand(1, len(x), -1), x.transpose(0, 1)])
            return self.layer(h).relu().sum(0)

    model, x, composite = Tokens(), torch.randn(2, 4, 4).double(), ResNetLRP()
    _, relevance = explain(model, x, composite)
    assert torch.allclose(relevance.sum((1, 2)) + composite.sinks['token'], torch.ones(2).double())


def test_part_of_a_network():
    '''Of a part that runs by itself, it is not known how many examples there are.'''
    class Tokens(nn.Module):
        '''A token before others.'''
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.ones(1, 1, 4).double())

        def forward(self, x):
            '''All tokens.'''
            return torch.cat([self.token.expand(len(x), -1, -1), x], 1)

    model, x, composite = nn.Sequential(Tokens()), torch.rand(2, 3, 4).double().requires_grad_(), ResNetLRP()
    with composite.context(model):
        torch.autograd.grad(model[0](x).sum(), x)
        assert composite.sinks['0.token'].tolist() == [8.]
        torch.autograd.grad(model(x).sum(), x)
    assert composite.sinks['0.token'].tolist() == [4., 4.]


def test_layers():
    '''Relevance of tokens and heads.'''
    model, x = prepare('vit')
    block = 'encoder.layers.encoder_layer_1'
    method = LayerRelevance(model, [block, f'{block}.self_attention.nonnegative_map'], initial_relevance='one')
    tokens, heads = method.attribute(x, [1, 2])
    assert tokens.shape == (2, 5, 16) and heads.shape == (2, 2, 5, 8)
    assert torch.allclose(tokens.sum((1, 2)), torch.ones(2).double())
    ledger = conservation_ledger(model, x, ResNetLRP(), target=[1, 2], value='one')
    row, = ledger.find(f'{block}.self_attention.nonnegative_map')
    assert torch.allclose(heads.sum((1, 2, 3)), row.arrives)


def test_bits_of_constants():
    '''Linear layers of constants, such as queries that are learned, run as they do outside as well.'''
    class Pooled(nn.Module):
        '''Tokens that learned queries pool.'''
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.query, self.head = nn.Parameter(torch.randn(5, 16)), nn.Linear(16, 3)
            self.attention = nn.MultiheadAttention(16, 2)

        def forward(self, x):
            '''Logits of sequences (batch, tokens, channels).'''
            tokens, query = x.transpose(0, 1), self.query[:, None].expand(-1, len(x), -1)
            return self.head(self.attention(query, tokens, tokens, need_weights=False)[0].mean(0))

    model, x = Pooled().double().eval(), torch.randn(2, 5, 16).double()
    for attention in ('value', 'half'):
        assert torch.equal(explain(model, x, ResNetLRP(attention=attention))[0], model(x))


def test_method():
    '''Methods by name have the options.'''
    composite = Method('resnet_lrp_symmetric:attention=half,parameters=sink').composite(None)
    assert (composite.splitting, composite.attention, composite.parameters) == ('symmetric', 'half', 'sink')
    with pytest.raises(ValueError, match='all'):
        Method('resnet_lrp_ratio:attention=all')
