'''Composites on residual networks: options, laws, use with Zennit, and the absence of a lattice on photographs.'''
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zennit.composites
import zennit.rules
from torchvision.models import resnet50
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.transforms import functional
from zennit.attribution import Gradient, IntegratedGradients, SmoothGrad
from zennit.composites import COMPOSITES, EpsilonPlus, NameLayerMapComposite
from zennit.core import Composite, Hook
from zennit.torchvision import ResNetCanonizer

from zennit_resnet.attribution import initial_relevance
from zennit_resnet.canonizers import ResidualCanonizer
from zennit_resnet.composites import ResNetLRP, SplittingComposite, with_splitting
from zennit_resnet.image import read_image
from zennit_resnet.layer import (
    Activation,
    Addition,
    AveragePool,
    Concatenation,
    Convolution2d,
    FullyConnected,
    Gate,
    MaxPool,
    Normalization,
    Padding,
    Subsampling,
)
from zennit_resnet.rules import PassThrough, RatioSplit, ResidualOnly, SinglePass, SymmetricSplit, ZPlus

ASSETS = Path(__file__).parent.parent / 'examples' / 'assets'
WEIGHTS = ASSETS / 'resnet50_imagenette.safetensors'
PHOTOS = ('gc_dog.jpg', 'gc_cathedral.jpg', 'gc_fish9.jpg', 'skimage_chelsea.jpg')
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TinyResNet(ResNet):
    '''A ResNet of few channels. Some blocks have an identity skip and some a projection.'''
    def __init__(self, block, layers=(2, 2), width=4, **kwargs):
        torch.nn.Module.__init__(self)
        self._norm_layer = torch.nn.BatchNorm2d
        self.inplanes, self.dilation, self.groups, self.base_width = width, 1, 1, 64
        self.conv1 = torch.nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        self.relu = torch.nn.ReLU(inplace=True)
        self.maxpool = torch.nn.MaxPool2d(3, 2, 1)
        for num in range(4):
            length = layers[num] if num < len(layers) else 0
            layer = self._make_layer(block, width << num, length, 1 + (num > 0)) if length else torch.nn.Identity()
            setattr(self, f'layer{num + 1}', layer)
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc = torch.nn.Linear(self.inplanes, 5)


def make_model(block=Bottleneck, **kwargs):
    '''A small network with random batch normalization in evaluation mode.'''
    torch.manual_seed(1)
    model = TinyResNet(block, **kwargs).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0., .3)
            module.running_var.uniform_(.5, 2.)
            # z+ does not change with the scale of a filter, but with its sign
            torch.nn.init.uniform_(module.weight, -.5, 1.5)
            torch.nn.init.normal_(module.bias, 0., .3)
    return model


def make_input(num=2, size=33):
    '''Input of an odd size.'''
    return torch.randn(num, 3, size, size, dtype=torch.float64)


def attribute(model, composite, input, target=1, attributor=Gradient, **kwargs):
    '''Relevance of the input for a class, and of the output.'''
    with attributor(model, composite, **kwargs) as instance:
        output, relevance = instance(input, torch.eye(5, dtype=input.dtype)[[target] * len(input)])
    return output.detach(), relevance.detach()


def relative(actual, expected):
    '''Largest deviation, relative to the largest value.'''
    return float((actual - expected).abs().max() / expected.abs().max())


def rules_of(composite, model, kind):
    '''The rules of all modules of a type, after a network has run.'''
    found = []
    with composite.context(model):
        model(torch.zeros(1, 3, 16, 16, dtype=torch.float64, requires_grad=True))
        for module in model.modules():
            if isinstance(module, kind):
                found.append([
                    hook.__self__ for hook in module._forward_pre_hooks.values()
                    if isinstance(getattr(hook, '__self__', None), Hook)
                ])
    return found


# -- registration and canonizers ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, rule', [('resnet_lrp_ratio', RatioSplit), ('resnet_lrp_symmetric', SymmetricSplit)])
@pytest.mark.parametrize('kwargs', [
    {}, {'canonizers': []}, {'canonizers': None}, {'canonizers': [], 'layer_map': []}, {'projection': 'literal'},
    {'first_layer': 'zbox', 'low': -2., 'high': 2.}, {'batch_norm': 'merge', 'maxpool': 'average'},
], ids=str)
def test_registered(name, rule, kwargs):
    '''Composites are found by name, and take the arguments of all others.'''
    composite = COMPOSITES[name](**kwargs)
    assert isinstance(composite, ResNetLRP)
    assert [type(elem) for elem in composite.canonizers] == [ResidualCanonizer]
    rules = rules_of(composite, make_model(), Addition)
    assert [[type(elem) for elem in hooks] for hooks in rules] == [[rule]] * 4


def test_registered_by_the_same_call_as_zennit():
    '''Each registered composite still works with only canonizers, as Quantus calls them.'''
    model, input = make_model(), make_input(1, 16)
    relevance = {}
    for name in ('resnet_lrp_ratio', 'resnet_lrp_symmetric'):
        composite = COMPOSITES[name](**{'canonizers': []})
        with Gradient(model=model, composite=composite) as attributor:
            relevance[name] = attributor(input, torch.eye(5, dtype=torch.float64)[[1]])[1]
    assert relative(relevance['resnet_lrp_ratio'], attribute(model, ResNetLRP(), input)[1]) == 0
    assert relative(relevance['resnet_lrp_symmetric'], attribute(model, ResNetLRP('symmetric'), input)[1]) == 0
    assert relative(*relevance.values()) > 1e-3


@pytest.mark.parametrize('splitting', ['ratio', 'symmetric'])
def test_canonizers(splitting):
    '''Without our canonizer, it is added, and a user's one is kept as it is.'''
    model, input = make_model(), make_input(1)
    expected = attribute(model, ResNetLRP(splitting), input)[1]
    for canonizers in (None, [], ()):
        composite = ResNetLRP(splitting, canonizers=canonizers)
        assert len(composite.canonizers) == 1
        assert relative(attribute(model, composite, input)[1], expected) == 0
    own = ResidualCanonizer(batch_norm='merge')
    given = [own]
    composite = ResNetLRP(splitting, canonizers=given)
    assert list(composite.canonizers) == [own] and given == [own]
    merged = attribute(model, ResNetLRP(splitting, batch_norm='merge'), input)[1]
    assert relative(attribute(model, composite, input)[1], merged) < 1e-12
    assert relative(merged, expected) > 1e-3


@pytest.mark.parametrize('make', [ResNetLRP, lambda canonizers: with_splitting(
    zennit.composites.EpsilonPlus(canonizers=canonizers)
)], ids=['ResNetLRP', 'with_splitting'])
def test_canonizer_of_zennit_is_replaced(make):
    '''Zennit's canonizer would take the additions away, ours which merges as well takes its place.'''
    composite = make(canonizers=[ResNetCanonizer()])
    canonizer, = composite.canonizers
    assert isinstance(canonizer, ResidualCanonizer) and canonizer.batch_norm == 'merge'


def test_other_canonizers_are_kept():
    '''Other canonizers remain, in their order.'''
    other = zennit.canonizers.SequentialMergeBatchNorm()
    composite = ResNetLRP(canonizers=[other])
    assert composite.canonizers[0] is other
    assert isinstance(composite.canonizers[1], ResidualCanonizer)


# -- layer maps --------------------------------------------------------------------------------------------------------

def test_layer_map_wins():
    '''The user's layer map comes before ours, and leaves all other types alone.'''
    model, input = make_model(), make_input(1)
    given = [(Addition, SymmetricSplit())]
    composite = ResNetLRP(layer_map=given)
    assert len(given) == 1
    assert relative(attribute(model, composite, input)[1], attribute(model, ResNetLRP('symmetric'), input)[1]) == 0
    composite = ResNetLRP(layer_map=[(torch.nn.Linear, zennit.rules.Epsilon()), (torch.nn.ReLU, None)])
    linear, = rules_of(composite, make_model(), torch.nn.Linear)
    assert [type(elem) for elem in linear] == [zennit.rules.Epsilon]
    assert {type(elem[0]) for elem in rules_of(composite, make_model(), torch.nn.Conv2d)} == {ZPlus}
    assert {type(elem[0]) for elem in rules_of(composite, make_model(), torch.nn.BatchNorm2d)} == {PassThrough}


@pytest.mark.parametrize('kwargs, rule', [
    ({}, RatioSplit), ({'splitting': 'symmetric'}, SymmetricSplit), ({'identity_skip': False}, ResidualOnly),
])
def test_rule_of_additions(kwargs, rule):
    '''Splitting rules come from the arguments.'''
    rules = rules_of(ResNetLRP(**kwargs), make_model(), Addition)
    assert [[type(elem) for elem in hooks] for hooks in rules] == [[rule]] * 4
    if rule is ResidualOnly:
        rules = rules_of(ResNetLRP('symmetric', **kwargs), make_model(), Addition)
        assert {type(elem.rule) for hooks in rules for elem in hooks} == {SymmetricSplit}


@pytest.mark.parametrize('projection, coverage, expected', [
    ('spread', None, 'even'), ('literal', None, 'literal'), ('spread', 'literal', 'literal'),
    ('literal', 'even', 'even'),
])
def test_rule_of_layers(projection, coverage, expected):
    '''Settings arrive at the rules of layers, and coverage follows the projection by default.'''
    composite = ResNetLRP(
        projection=projection, coverage=coverage, first_layer='wsquare', dead_units='drop', maxpool='average',
        stabilizer=.5,
    )
    rules = rules_of(composite, make_model(), (torch.nn.Conv2d, torch.nn.MaxPool2d))
    assert len(rules) == 1 + 1 + 4 * 3 + 2
    for rule, in rules:
        assert (rule.projection, rule.coverage, rule.first_layer) == (projection, expected, 'wsquare')
        assert (rule.dead_units, rule.maxpool) == ('drop', 'average')
        assert float(rule.stabilizer(torch.zeros(1))) == .5


@pytest.mark.parametrize('name, value', [
    ('splitting', 'half'), ('batch_norm', 'fold'), ('first_layer', 'z'), ('projection', 'even'), ('dead_units', True),
    ('maxpool', 'max'), ('coverage', 'full'),
])
def test_bad_arguments(name, value):
    '''Errors name the argument and its value.'''
    with pytest.raises(ValueError, match=f'{name}={value!r} is not one of '):
        ResNetLRP(**{name: value})


def test_zbox_needs_bounds():
    '''The box needs both of its bounds.'''
    with pytest.raises(ValueError, match='low and high'):
        ResNetLRP(first_layer='zbox')


# -- conservation and other laws ---------------------------------------------------------------------------------------

MAXPOOLS = ('winner', 'average', 'avg2x2')
SPLITTINGS = ('ratio', 'symmetric')


@pytest.mark.parametrize('first_layer', ['zplus', 'ones', 'zbox', 'wsquare', 'flat'])
@pytest.mark.parametrize('maxpool', MAXPOOLS)
@pytest.mark.parametrize('splitting', SPLITTINGS)
@pytest.mark.parametrize('identity_skip', [True, False])
def test_conservation(splitting, identity_skip, first_layer, maxpool):
    '''Input relevance sums to the initial relevance for all combinations of options, for each sample.'''
    # the average over 2 x 2 only knows even sizes
    input = make_input(2, 32 if maxpool == 'avg2x2' else 33)
    settings = {'splitting': splitting, 'identity_skip': identity_skip, 'first_layer': first_layer, 'maxpool': maxpool}
    # each pair of these meets, and each pair of one of them and one of the options
    networks = (
        (BasicBlock, 'pass', 'spread'), (Bottleneck, 'merge', 'spread'), (BasicBlock, 'merge', 'literal'),
        (Bottleneck, 'pass', 'literal'),
    )
    number = SPLITTINGS.index(splitting) + 2 * identity_skip
    block, batch_norm, projection = networks[(number + MAXPOOLS.index(maxpool)) % 4]
    coverage = ('literal', 'even', 'even', 'literal')[number] if first_layer == 'zplus' else None
    composite = ResNetLRP(
        batch_norm=batch_norm, projection=projection, coverage=coverage, **settings,
        **({'low': -5., 'high': 5.} if first_layer == 'zbox' else {}),
    )
    _, relevance = attribute(make_model(block), composite, input)
    sums = relevance.sum((1, 2, 3))
    assert float((sums - 1).abs().max()) < 1e-9
    assert first_layer == 'zbox' or float(relevance.min()) >= 0


def test_options_matter():
    '''No two settings are the same rule.'''
    model, input = make_model(), make_input(1, 48)
    settings = [
        {}, {'splitting': 'symmetric'}, {'identity_skip': False}, {'splitting': 'symmetric', 'identity_skip': False},
        {'batch_norm': 'merge'}, {'projection': 'literal'}, {'projection': 'literal', 'coverage': 'even'},
        {'coverage': 'literal'}, {'maxpool': 'average'}, {'maxpool': 'avg2x2'}, {'stabilizer': .1},
        {'first_layer': 'zbox', 'low': -5., 'high': 5.},
        *({'first_layer': elem} for elem in ('ones', 'wsquare', 'flat')),
    ]
    relevance = [attribute(model, ResNetLRP(**elem), input)[1] for elem in settings]
    for (num, one), (other_num, other) in itertools.combinations(enumerate(relevance), 2):
        assert relative(one, other) > 1e-3, (settings[num], settings[other_num])


def test_stabilizer_loses():
    '''A stabilizer loses relevance, a small one little.'''
    model, input = make_model(), make_input(1)
    lost = [1 - float(attribute(model, ResNetLRP(stabilizer=elem), input)[1].sum()) for elem in (0., 1e-6, 1e-2)]
    assert abs(lost[0]) < 1e-9 < lost[1] < 1e-3 < lost[2] < 1.


@pytest.mark.parametrize('kwargs', [{}, {'splitting': 'symmetric'}, {'coverage': 'literal'}], ids=str)
@pytest.mark.parametrize('block', [BasicBlock, Bottleneck])
@pytest.mark.parametrize('is_mixed', [False, True], ids=['signed', 'mixed'])
def test_batch(block, kwargs, is_mixed):
    '''A batch is the same as single images, also if only some of them have negative values.'''
    model, input = make_model(block), make_input(4)
    if is_mixed:
        input[1] = input[1].abs()
        input[2] = 0.
    output, relevance = attribute(model, ResNetLRP(**kwargs), input)
    for num in range(4):
        single = attribute(model, ResNetLRP(**kwargs), input[num:num + 1])
        assert relative(output[num:num + 1], single[0]) < 1e-12
        assert relative(relevance[num:num + 1], single[1]) < 1e-9


def test_linear_in_relevance():
    '''Relevance of a sum of outputs is the sum of relevances.'''
    model, input = make_model(), make_input(1)
    start = torch.rand(1, 5, dtype=torch.float64)
    with Gradient(model, ResNetLRP()) as attributor:
        relevance = attributor(input, start)[1]
        parts = [attributor(input, start * elem)[1] for elem in torch.eye(5, dtype=torch.float64)]
    assert relative(sum(parts), relevance) < 1e-10


def test_identity_skips_receive_nothing():
    '''Without identity skips, all relevance of a block goes through its residual branch.'''
    model, input = make_model(BasicBlock), make_input(1)
    recorded = {}
    conv = model.layer1[1].conv2
    for identity_skip in (True, False):
        captured = []
        with ResNetLRP(identity_skip=identity_skip).context(model):
            handle = conv.register_forward_hook(lambda module, args, output: captured.append(output))
            output = model(input.clone().requires_grad_())
            handle.remove()
            relevance, = torch.autograd.grad(output, captured, torch.eye(5, dtype=torch.float64)[[1]])
        recorded[identity_skip] = float(relevance.sum())
    assert recorded[False] == pytest.approx(1.)
    assert recorded[True] < .95


# -- use with Zennit ---------------------------------------------------------------------------------------------------

def test_context():
    '''In the context of the composite, the gradient is the relevance, and afterwards the gradient again.'''
    model, input = make_model(), make_input(1)
    source = input.clone().requires_grad_()
    before = torch.autograd.grad(model(source)[:, 1].sum(), source)[0]
    composite = ResNetLRP()
    with composite.context(model) as modified:
        output = modified(source)
        relevance, = torch.autograd.grad(output, source, torch.eye(5, dtype=torch.float64)[[1]])
    assert relative(relevance, attribute(model, ResNetLRP(), input)[1]) == 0
    assert torch.equal(torch.autograd.grad(model(source)[:, 1].sum(), source)[0], before)
    assert relative(relevance, before) > 1e-2


def test_composite_can_be_reused():
    '''The same composite serves several contexts and networks.'''
    composite = ResNetLRP()
    input = make_input(1)
    for model in (make_model(), make_model(BasicBlock), make_model()):
        expected = attribute(model, ResNetLRP(), input)[1]
        for _ in range(2):
            assert relative(attribute(model, composite, input)[1], expected) == 0


def test_model_is_unchanged():
    '''The network has no hooks, children, or other parameters afterwards, and its output is the same bit for bit.'''
    model, input = make_model(), make_input(1)
    before = model(input)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    identities = [id(elem) for elem in (*model.parameters(), *model.buffers())]
    names = [name for name, _ in model.named_modules()]
    for batch_norm in ('pass', 'merge'):
        assert torch.equal(attribute(model, ResNetLRP(batch_norm=batch_norm), input)[0], before)
    assert [name for name, _ in model.named_modules()] == names
    assert [id(elem) for elem in (*model.parameters(), *model.buffers())] == identities
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(elem.requires_grad for elem in model.parameters())
    for module in model.modules():
        assert not any(value for key, value in vars(module).items() if key.endswith('_hooks'))
    assert torch.equal(model(input), before)


def test_inactive_backward():
    '''An inactive composite has no gradient to fall back to, which the error says.'''
    model, input = make_model(), make_input(1).requires_grad_()
    composite = ResNetLRP()
    with composite.context(model):
        output = model(input)
        with composite.inactive():
            with pytest.raises(RuntimeError, match='inactive'):
                torch.autograd.grad(output.sum(), input)


def test_inactive_forward():
    '''A forward pass while the composite is inactive has the gradient of the network, as the error above says.'''
    model, input = make_model(), make_input(1).requires_grad_()
    expected, = torch.autograd.grad(model(input).sum(), input)
    composite = ResNetLRP()
    with composite.context(model):
        model(input)
        with composite.inactive():
            output = model(input)
            actual, = torch.autograd.grad(output.sum(), input)
        again, = torch.autograd.grad(model(input).sum(), input)
    assert relative(actual, expected) < 1e-10
    assert relative(again, expected) > 1e-2


def test_smooth_grad():
    '''SmoothGrad averages relevance over noise, and without noise is the relevance.'''
    model, input = make_model(), make_input(2)
    expected = attribute(model, ResNetLRP(), input)[1]
    still = attribute(model, ResNetLRP(), input, attributor=SmoothGrad, noise_level=0., n_iter=3)[1]
    assert relative(still, expected) < 1e-10
    noisy = attribute(model, ResNetLRP(), input, attributor=SmoothGrad, noise_level=.1, n_iter=3)[1]
    assert torch.allclose(noisy.sum((1, 2, 3)), torch.ones(2, dtype=torch.float64))
    assert relative(noisy, expected) > 1e-3


def test_integrated_gradients():
    '''IntegratedGradients multiplies its mean by the difference to the baseline.'''
    model, input = make_model(), make_input(1)
    actual = attribute(model, ResNetLRP(), input, attributor=IntegratedGradients, n_iter=1)[1]
    assert relative(actual, input * attribute(model, ResNetLRP(), input)[1]) < 1e-10


@pytest.mark.parametrize('attributor', [Gradient, SmoothGrad, IntegratedGradients])
def test_quantus(attributor):
    '''Quantus makes the composite with ``canonizers=[]`` and calls it with one-hot outputs.'''
    model, input = make_model(), make_input(2, 16)
    targets = torch.tensor([3, 1])
    composite = COMPOSITES['resnet_lrp_ratio'](canonizers=[])
    instance = attributor(model, composite)
    n_outputs = model(input).shape[1]
    with instance:
        _, relevance = instance(input, torch.eye(n_outputs, dtype=input.dtype)[targets])
    assert relevance.shape == input.shape and bool(relevance.isfinite().all())


# -- other composites with splitting -----------------------------------------------------------------------------------

STOCK = {
    'EpsilonPlus': zennit.composites.EpsilonPlus,
    'EpsilonPlusFlat': zennit.composites.EpsilonPlusFlat,
    'EpsilonGammaBox': lambda **kwargs: zennit.composites.EpsilonGammaBox(low=-5., high=5., **kwargs),
    'EpsilonAlpha2Beta1': zennit.composites.EpsilonAlpha2Beta1,
}


@pytest.mark.parametrize('name', STOCK)
def test_with_splitting(name):
    '''Any composite gets a rule for additions, and keeps its rules for everything else.'''
    model, input = make_model(), make_input(1)
    relevance = []
    for rule in (RatioSplit(), SymmetricSplit(), ResidualOnly()):
        original = STOCK[name]()
        composite = with_splitting(original, rule)
        assert isinstance(composite, SplittingComposite) and not original.canonizers
        rules = rules_of(composite, model, Addition)
        assert [[type(elem) for elem in hooks] for hooks in rules] == [[type(rule)]] * 4
        convolutions = {type(elem) for hooks in rules_of(composite, model, torch.nn.Conv2d) for elem in hooks}
        assert not any(issubclass(elem, ZPlus) for elem in convolutions)
        relevance.append(attribute(model, composite, input)[1])
        assert bool(relevance[-1].isfinite().all())
    for one, other in itertools.combinations(relevance, 2):
        assert relative(one, other) > 1e-3
    assert relative(attribute(model, with_splitting(STOCK[name]()), input)[1], relevance[0]) == 0


def test_with_splitting_first_layer_only():
    '''The first layer's rule of the other composite remains with the first layer.'''
    rules = rules_of(with_splitting(zennit.composites.EpsilonPlusFlat()), make_model(), torch.nn.Conv2d)
    assert [type(elem) for elem in rules[0]] == [zennit.rules.Flat]
    assert all([type(elem) for elem in hooks] == [zennit.rules.ZPlus] for hooks in rules[1:])


def test_with_splitting_conserves():
    '''A composite of Zennit's rules without bias conserves relevance together with splitting.'''
    composite = zennit.composites.LayerMapComposite([
        ((torch.nn.Conv2d, torch.nn.Linear), zennit.rules.ZPlus(1e-12, zero_params='bias')),
        ((torch.nn.ReLU, torch.nn.BatchNorm2d), zennit.rules.Pass()),
        (torch.nn.AdaptiveAvgPool2d, zennit.rules.Norm(1e-12)),
    ])
    model, input = make_model(), make_input(2)
    for elem in model.modules():
        # no dead units, whose relevance Zennit's rule loses
        if isinstance(elem, (torch.nn.Conv2d, torch.nn.Linear)):
            elem.weight.data[:, 0].abs_()
    relevance = attribute(model, with_splitting(composite), input)[1]
    expected = attribute(model, ResNetLRP(projection='literal', dead_units='drop'), input)[1]
    assert relative(relevance, expected) < 1e-6


def test_with_splitting_type_errors():
    '''Classes instead of instances, and rules which are none, give a clear error.'''
    for composite in (zennit.composites.EpsilonPlus, 'epsilon_plus', None, RatioSplit()):
        with pytest.raises(TypeError, match=r'composite=.* is not an instance of a composite'):
            with_splitting(composite)
    for rule in ('ratio', 1, lambda module: None):
        with pytest.raises(TypeError, match='rule='):
            with_splitting(zennit.composites.EpsilonPlus(), rule)
    assert isinstance(with_splitting(Composite()), SplittingComposite)


def test_with_splitting_class_of_rule():
    '''The class of a rule is not a rule.'''
    with pytest.raises(TypeError, match='rule='):
        with_splitting(zennit.composites.EpsilonPlus(), RatioSplit)


# -- photographs -------------------------------------------------------------------------------------------------------

def lattice(heatmap, period):
    '''E(P), the share of a heatmap's spectral energy at the harmonics of 1/P in both dimensions.

    Parameters
    ----------
    heatmap: :py:obj:`torch.Tensor`
        Heatmaps of shape (batch, height, width), both multiples of the period.
    period: int
        Distance P of the lattice in pixels.

    Returns
    -------
    :py:obj:`torch.Tensor`
        Shares between 0 and 1, of shape (batch,).
    '''
    heatmap = heatmap.double()
    energy = torch.fft.fft2(heatmap - heatmap.mean((1, 2), keepdim=True)).abs() ** 2
    height, width = heatmap.shape[1:]
    harmonics = energy[:, ::height // period, ::width // period].clone()
    harmonics[:, 0, 0] = 0.
    return harmonics.sum((1, 2)) / energy.sum((1, 2))


def test_lattice():
    '''The measure itself: all of the energy of a lattice, and next to none of noise or a smooth map.'''
    dots = torch.zeros(1, 224, 224)
    dots[:, 3::8, 5::8] = 1.
    for period, expected in ((8, 1.), (16, 1.), (32, 1.), (4, 15 / 63), (2, 3 / 63)):
        assert float(lattice(dots, period)) == pytest.approx(expected)
    noise = torch.rand(4, 224, 224)
    for period in (2, 4, 32):
        assert float(lattice(noise, period).mean()) == pytest.approx((period ** 2 - 1) / 224 ** 2, rel=1., abs=1e-4)


@pytest.fixture(scope='module')
def photographs():
    '''The embedded ResNet-50, a batch of photographs, and their relevance by composite.'''
    safetensors = pytest.importorskip('safetensors.torch', reason='safetensors reads the embedded ResNet-50')
    missing = [path for path in (WEIGHTS, *(ASSETS / 'photos' / name for name in PHOTOS)) if not path.is_file()]
    if missing:
        pytest.skip(f'{missing[0]} is missing, it only comes with a checkout of the project')
    model = resnet50(num_classes=10)
    state = safetensors.load_file(WEIGHTS)
    model.load_state_dict({key: elem.float() if elem.is_floating_point() else elem for key, elem in state.items()})
    model.eval()
    input = torch.stack([
        functional.normalize(functional.to_tensor(functional.resize(
            read_image(ASSETS / 'photos' / name), [224, 224], functional.InterpolationMode.BILINEAR
        )), MEAN, STD) for name in PHOTOS
    ])
    with torch.no_grad():
        before = model(input)
    results = {}

    def explain(**kwargs):
        '''Initial and input relevance for the predicted classes.'''
        key = tuple(kwargs.items())
        if key not in results:
            start = torch.eye(10)[before.argmax(1)] * before
            with Gradient(model, ResNetLRP(**kwargs)) as attributor:
                output, relevance = attributor(input, start)
            assert torch.equal(output, before)
            results[key] = start.sum(1).double(), relevance
        return results[key]

    return explain


@pytest.mark.parametrize('splitting', ['ratio', 'symmetric'])
def test_photographs_conservation(photographs, splitting):
    '''Relevance is conserved in single precision on a trained network.'''
    initial, relevance = photographs(splitting=splitting)
    gap = relevance.double().sum((1, 2, 3)) / initial - 1
    assert float(gap.abs().max()) <= 1e-3


@pytest.mark.parametrize('splitting', ['ratio', 'symmetric'])
def test_photographs_have_no_lattice(photographs, splitting):
    '''Neither the coarse lattice of strided projections, nor the fine ones of stem and max pooling.'''
    heatmap = photographs(splitting=splitting)[1].sum(1)
    energy = {period: float(lattice(heatmap, period).mean()) for period in (2, 4, 32)}
    assert energy[2] < .01
    assert energy[4] < .01
    if splitting == 'ratio':
        literal = photographs(splitting=splitting, projection='literal')[1].sum(1)
        coarse = float((lattice(literal, 32) - lattice(literal, 4)).mean())
        assert coarse > .1
        assert energy[32] - energy[4] <= .1 * coarse


class PaddedConvolution(torch.nn.Conv2d):
    '''A convolution with a module for its padding, or a function.'''
    def __init__(self, *args, is_module, **kwargs):
        super().__init__(*args, **kwargs)
        self.pad = torch.nn.ZeroPad2d(1) if is_module else lambda input: torch.nn.functional.pad(input, (1, 1, 1, 1))

    def forward(self, input):
        return torch.nn.functional.conv2d(self.pad(input), self.weight, self.bias, self.stride)


@pytest.mark.parametrize('is_module', [True, False])
def test_rule_runs_module_again(is_module):
    '''What is inside of a module has its own gradient while a rule of Zennit's runs the module again.'''
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.ReLU(),
        PaddedConvolution(4, 4, 3, bias=False, is_module=is_module), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(4 * 36, 2, bias=False),
    ).eval().double()
    input = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    relevance = [
        Gradient(model=model, composite=composite)(input.clone(), torch.eye(2, dtype=torch.float64))[1]
        for composite in (EpsilonPlus(), with_splitting(EpsilonPlus()))
    ]
    torch.testing.assert_close(relevance[1], relevance[0])


class Stop(SinglePass):
    '''Relevance ends here.'''
    def store(self, module, *inputs):
        '''Keep the shapes.'''
        return inputs

    def propagate(self, module, stored, relevance):
        '''Nothing.'''
        return tuple(map(torch.zeros_like, stored))


class Functions(torch.nn.Module):
    '''Each kind of operation as a function.'''
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 1)
        self.mean, self.var = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.ones(4))
        self.weight, self.head = torch.nn.Parameter(torch.rand(4, 4, 3, 3)), torch.nn.Parameter(torch.rand(5, 12))

    def forward(self, x):
        '''Logits.'''
        x = F.relu(F.batch_norm(self.conv(x), self.mean, self.var))
        x = F.conv2d(F.max_pool2d(x, 2), self.weight, padding=1) + F.max_pool2d(x, 2)
        x = x * torch.sigmoid(x[:, :1])
        x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        x = torch.cat((x, 2 * x), 1)
        return F.linear(F.avg_pool2d(x, 2).flatten(1), self.head)


@pytest.mark.parametrize('kind', [
    Activation, Addition, AveragePool, Concatenation, Convolution2d, FullyConnected, Gate, MaxPool, Normalization,
    Padding, Subsampling,
], ids=lambda kind: kind.label)
def test_maps(kind):
    '''Name maps and layer maps give rules to operations of every kind.'''
    torch.manual_seed(0)
    model, input, base = Functions().double().eval(), torch.rand(2, 3, 8, 8, dtype=torch.float64), ResNetLRP()
    relevance = {}
    for key, composite in {
        'plain': base,
        'name': NameLayerMapComposite([([kind.label], Stop())], base.layer_map, canonizers=[ResidualCanonizer()]),
        'type': ResNetLRP(layer_map=[(kind, Stop())]),
    }.items():
        with Gradient(model=model, composite=composite) as attributor:
            relevance[key] = attributor(input, initial_relevance([1, 2]))[1]
            assert isinstance(dict(model.named_modules())[kind.label], kind)
    assert bool(relevance['plain'].any())
    assert not torch.allclose(relevance['name'], relevance['plain'])
    assert not torch.allclose(relevance['type'], relevance['plain'])
