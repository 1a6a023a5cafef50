'''Arguments that cannot be right are errors which name the value, and objects show their arguments.'''
import copy
import pickle

import numpy as np
import pytest
import torch
import zennit.composites
import zennit.rules
from click.testing import CliRunner
from helpers.networks import narrow_resnet18
from torch import nn
from zennit.attribution import Gradient
from zennit.core import Stabilizer

from captum_adapters.attr import C3LRP, CompositeAttribution, LayerRelevance
from captum_adapters.attr import RelativeLRP as CaptumRelativeLRP
from captum_adapters.attr import ResNetLRP as CaptumResNetLRP
from captum_adapters.evaluation.methods import Method
from zennit_resnet import (
    BlockEpsilon,
    BlockLRP,
    RatioSplit,
    Relative,
    RelativeLRP,
    ResidualCanonizer,
    ResidualOnly,
    ResNetLRP,
    SelectOutput,
    SymmetricSplit,
    ZPlus,
    initial_relevance,
    with_splitting,
)
from zennit_resnet.classic import ClassicLRP
from zennit_resnet.cli import main
from zennit_resnet.composites import ResNetLRPSymmetric, SplittingComposite
from zennit_resnet.conservation import conservation_ledger
from zennit_resnet.rules import LinearSum, SignedAlphaBeta, SinglePass
from zennit_resnet.rules.branch_scaling import branch_factor

NETWORK = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).eval()
NETWORK(torch.zeros(1, 3, 6, 6))

# what takes a stabilizer
STABILIZERS = {
    'ZPlus': lambda value: ZPlus(stabilizer=value),
    'ResNetLRP': lambda value: ResNetLRP(stabilizer=value),
    'symmetric': lambda value: ResNetLRPSymmetric(stabilizer=value),
    'Captum': lambda value: CaptumResNetLRP(NETWORK, stabilizer=value),
    'BlockEpsilon': lambda value: BlockEpsilon(epsilon=value),
    'BlockLRP': lambda value: BlockLRP(epsilon=value),
    'C3LRP': lambda value: C3LRP(NETWORK, epsilon=value),
    'ClassicLRP': lambda value: ClassicLRP('zplus', stabilizer=value),
    'ClassicLRP epsilon': lambda value: ClassicLRP('epsilon', epsilon=value),
    'SignedAlphaBeta': lambda value: SignedAlphaBeta(stabilizer=value),
}
# what takes any other number that must not be negative
NUMBERS = {
    'gamma': lambda value: ClassicLRP('gamma', gamma=value),
    'tolerance': lambda value: branch_factor((torch.ones(1),) * 2, (torch.ones(1),) * 2, tolerance=value),
}
SIGNED = {
    'alpha': lambda value: ClassicLRP('alpha_beta', alpha=value),
    'beta': lambda value: SignedAlphaBeta(beta=value),
}
FLAGS = {
    'identity_skip': lambda value: ResNetLRP(identity_skip=value),
    'identity_skip of Captum': lambda value: CaptumResNetLRP(NETWORK, identity_skip=value),
    'with_bias': lambda value: BlockEpsilon(with_bias=value),
    'is_block': lambda value: BlockEpsilon(is_block=value),
    'with_bias of classic': lambda value: ClassicLRP(with_bias=value),
    'strict': lambda value: ResidualCanonizer(strict=value),
    'return_convergence_delta': lambda value: CaptumResNetLRP(NETWORK).attribute(
        torch.zeros(1, 3, 6, 6), 1, return_convergence_delta=value
    ),
    'attribute_to_layer_input': lambda value: LayerRelevance(NETWORK, '0').attribute(
        torch.zeros(1, 3, 6, 6), 1, attribute_to_layer_input=value
    ),
    'layers': lambda value: conservation_ledger(NETWORK, torch.rand(1, 3, 6, 6), ResNetLRP()).assert_conserved(
        layers=value
    ),
}


@pytest.mark.parametrize('create', [*STABILIZERS.values(), *NUMBERS.values()], ids=[*STABILIZERS, *NUMBERS])
def test_numbers(create):
    '''Numbers are finite and not negative, other types are refused, numbers of NumPy are numbers.'''
    for value in (float('nan'), float('inf'), -float('inf'), -1, -1e-9, np.float32('nan'), np.int64(-2)):
        with pytest.raises(ValueError) as info:
            create(value)
        assert repr(value) in str(info.value)
    for value in ('small', None, [1e-6], True, 1j, torch.tensor([1., 2.])):
        with pytest.raises(TypeError) as info:
            create(value)
        assert repr(value) in str(info.value)
    for value in (0, 0., 1, 1e-6, np.float32(.5), np.float64(.5), np.int64(1)):
        create(value)


@pytest.mark.parametrize('create', STABILIZERS.values(), ids=STABILIZERS)
def test_stabilizers(create):
    '''Functions and instances of stabilizers may be given, but no class of them, and none that is negative.'''
    create(torch.abs)
    create(Stabilizer(1e-3))
    with pytest.raises(ValueError, match='-0.5'):
        create(Stabilizer(-.5))
    with pytest.raises(TypeError, match='Stabilizer'):
        create(Stabilizer)


@pytest.mark.parametrize('create', SIGNED.values(), ids=SIGNED)
def test_signed_numbers(create):
    '''They may be negative, but not NaN or infinite.'''
    for value in (float('nan'), float('inf')):
        with pytest.raises(ValueError, match=repr(value)):
            create(value)
    for value in ('2', None, False):
        with pytest.raises(TypeError, match=repr(value)):
            create(value)


@pytest.mark.parametrize('name', FLAGS)
def test_flags(name):
    '''What is True or False is nothing else: the text 'no' is true.'''
    for value in ('no', 'True', 0, 1, 2., [], torch.tensor(True)):
        with pytest.raises(TypeError) as info:
            FLAGS[name](value)
        assert f'{name.split()[0]}={value!r}' in str(info.value)
    for value in (True, False, np.True_):
        FLAGS[name](value)


@pytest.mark.parametrize('text', [
    'resnet_lrp_ratio:stabilizer=-1', 'resnet_lrp_ratio:first_layer=zbox,stabilizer=-1', 'block_lrp:epsilon=-1',
    'resnet_lrp_symmetric:identity_skip=no', 'lrp_epsilon_1:with_bias=3', 'lrp_zplus:stabilizer=-1',
])
def test_methods_of_command_line(text):
    '''Options in the names of methods are checked before anything is computed.'''
    with pytest.raises(ValueError) as info:
        Method(text)
    key, value = text.rpartition(',')[2].rpartition(':')[2].split('=')
    assert f'{key}=' in str(info.value) and value in str(info.value)


def test_tolerance_of_command_line():
    '''NaN is no tolerance, although it is no less than the smallest.'''
    result = CliRunner().invoke(main, ['ledger', 'photo.png', '--tolerance', 'nan'])
    assert result.exit_code == 2 and 'nan' in result.output


# -- layer maps, canonizers, rules -------------------------------------------------------------------------------------

MAPPED = {
    'ResNetLRP': ResNetLRP, 'RelativeLRP': RelativeLRP, 'BlockLRP': BlockLRP, 'ClassicLRP': ClassicLRP,
    'Captum': lambda **kwargs: CaptumResNetLRP(NETWORK, **kwargs),
    'Captum relative': lambda **kwargs: CaptumRelativeLRP(NETWORK, **kwargs),
    'C3LRP': lambda **kwargs: C3LRP(NETWORK, **kwargs),
}


@pytest.mark.parametrize('create', MAPPED.values(), ids=MAPPED)
@pytest.mark.parametrize('layer_map, value', [
    ([(nn.Conv2d, 3)], '3'),
    ([(nn.ReLU, None), (nn.Conv2d, zennit.rules.Epsilon)], 'layer_map[1]'),
    ([(nn.Conv2d, RatioSplit(), 1)], 'layer_map[0]'),
    ([('conv1', None)], "'conv1'"),
    ([((nn.Conv2d, 'conv1'), None)], "'conv1'"),
    ([(NETWORK[0], RatioSplit())], 'Conv2d(3, 4'),
    ([nn.Conv2d], 'Conv2d'),
    ({nn.Conv2d: None}, 'Conv2d'),
    ('conv1', "'conv1'"),
    (3, 'layer_map=3'),
], ids=str)
def test_layer_maps(create, layer_map, value):
    '''The error names the entry.'''
    with pytest.raises(TypeError) as info:
        create(layer_map=layer_map)
    assert value in str(info.value)


@pytest.mark.parametrize('create', MAPPED.values(), ids=MAPPED)
def test_canonizers(create):
    '''Canonizers are instances, in a list.'''
    for canonizers in ([ResidualCanonizer], ResidualCanonizer(), ['merge'], 'merge'):
        with pytest.raises(TypeError, match='canonizers'):
            create(canonizers=canonizers)
    create(canonizers=(ResidualCanonizer(),), layer_map=(((nn.Conv2d, (nn.Linear,)), None), [nn.ReLU, ZPlus()]))


@pytest.mark.parametrize('create', [
    lambda value: ResidualOnly(value), lambda value: LinearSum(value),
    lambda value: SplittingComposite(zennit.composites.EpsilonPlus(), value),
    lambda value: with_splitting(zennit.composites.EpsilonPlus(), value),
], ids=['ResidualOnly', 'LinearSum', 'SplittingComposite', 'with_splitting'])
def test_rules(create):
    '''Rules are instances.'''
    for value in (RatioSplit, 'ratio', 3):
        with pytest.raises(TypeError) as info:
            create(value)
        assert repr(value) in str(info.value)


@pytest.mark.parametrize('composite', [
    ResNetLRP(), RelativeLRP(), BlockLRP(blocks=['0']), ClassicLRP(), with_splitting(zennit.composites.EpsilonPlus()),
], ids=str)
def test_functions_are_no_networks(composite):
    '''Rules are attached to modules.'''
    with pytest.raises(TypeError, match='torch.nn.Module.*function'):
        Gradient(model=lambda x: NETWORK(x), composite=composite)(torch.rand(1, 3, 6, 6))


# -- input bounds ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kwargs', [
    {'low': 2., 'high': -2.}, {'low': [0., 3., 0.], 'high': [1., 2., 1.]}, {'low': 0., 'high': (1., 1., -1.)},
    {'low': torch.zeros(1, 3, 1, 1), 'high': -torch.ones(1, 3, 1, 1)}, {'low': torch.zeros(3, 8, 8), 'high': -1},
    {'low': float('nan'), 'high': 1.}, {'low': 0., 'high': float('inf')}, {'low': torch.zeros(0), 'high': 1.},
    {'low': torch.zeros(3), 'high': torch.ones(4)}, {'low': None, 'high': 1.}, {'low': 0., 'high': None},
], ids=str)
@pytest.mark.parametrize('create', [ZPlus, ResNetLRP, MAPPED['Captum']])
def test_bad_bounds(create, kwargs):
    '''The lowest input is not above the highest, for any channel.'''
    with pytest.raises(ValueError, match='low|high'):
        create(first_layer='zbox', **kwargs)


@pytest.mark.parametrize('value', ['black', '1', [0., 'x'], object, True, 1j, torch.tensor(1j)], ids=str)
def test_types_of_bounds(value):
    '''Bounds are numbers.'''
    for kwargs in ({'low': value, 'high': 1.}, {'low': 0., 'high': value}):
        with pytest.raises(TypeError, match='low|high'):
            ZPlus(first_layer='zbox', **kwargs)


@pytest.mark.parametrize('first_layer', ['zplus', 'literal', 'ones', 'wsquare', 'flat'])
@pytest.mark.parametrize('kwargs', [{'low': 0.}, {'high': 1.}, {'low': 0., 'high': 1.}], ids=str)
def test_bounds_without_box(first_layer, kwargs):
    '''Bounds have no effect on other rules.'''
    with pytest.raises(ValueError, match=f"zbox.*{first_layer!r}"):
        ResNetLRP(first_layer=first_layer, **kwargs)


def propagate(model, input, **kwargs):
    '''Relevance of the z-box rule.'''
    return Gradient(model=model, composite=ResNetLRP(first_layer='zbox', **kwargs))(input, initial_relevance(1))[1]


@pytest.mark.parametrize('model, shape, dim', [
    (nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)), (2, 3, 6, 6), 1),
    (nn.Sequential(nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)), (2, 5, 6, 6), 1),
    (nn.Sequential(nn.Conv1d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)), (2, 4, 6), 1),
    (nn.Sequential(nn.Conv3d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)), (2, 3, 4, 4, 4), 1),
    (nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), (3, 6), 1),
    (nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Flatten(), nn.Linear(20, 2)), (3, 5, 6), 2),
    (nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 2, 3), nn.Flatten()), (2, 3, 6, 6), 1),
    (nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(3, 2, 3), nn.Flatten()), (2, 3, 6, 6), 1),
], ids=str)
def test_bounds_of_channels(model, shape, dim):
    '''One bound for each channel may be a list, tuple, array or tensor: the same as one that can be broadcast.'''
    model, channels = copy.deepcopy(model).double().eval(), shape[dim]
    input = torch.rand(shape, dtype=torch.float64)
    low, high = -torch.rand(channels, dtype=torch.float64), 1 + torch.rand(channels, dtype=torch.float64)
    wide = [1] * len(shape)
    wide[dim] = channels
    expected = propagate(model, input, low=low.view(wide), high=high.view(wide))
    for kind in (torch.Tensor.tolist, lambda value: tuple(value.tolist()), torch.Tensor.numpy, torch.Tensor.clone):
        assert torch.equal(propagate(model, input, low=kind(low), high=kind(high)), expected)
    assert torch.equal(propagate(model, input, low=low, high=high.view(wide)), expected)
    expected = propagate(model, input, low=-1., high=torch.full(wide, 2., dtype=torch.float64))
    for low, high in ((-1, 2), ([-1] * channels, 2.), (torch.tensor(-1), [2.]), (np.float32(-1), (2,) * channels)):
        assert torch.equal(propagate(model, input, low=low, high=high), expected)
    for low in (torch.zeros(channels + 1), [0.] * (channels + 1), torch.zeros(7, 1, 1, 1, 1, 1)):
        with pytest.raises(ValueError) as info:
            propagate(model, input, low=low, high=1.)
        text = str(info.value)
        assert str(tuple(torch.as_tensor(low).shape)) in text and str(shape[:dim + 1])[:-1] in text


def test_inputs_outside_of_bounds():
    '''The error says by how much, at the first layer only.'''
    model, input = copy.deepcopy(NETWORK), torch.rand(2, 3, 6, 6)
    assert propagate(model, input, low=0., high=1.).isfinite().all()
    for value, message in ((1.25, r'0\.25 above high=1'), (-.5, r'0\.5 below low=0'), (1.125, r'0\.125 above high=1')):
        outside = input.clone()
        outside[1, 2, 3, 3] = value
        with pytest.raises(ValueError, match=message):
            propagate(model, outside, low=0., high=1.)
        with pytest.raises(ValueError, match=message):
            CaptumResNetLRP(model, first_layer='zbox', low=[0.] * 3, high=torch.ones(1, 3, 1, 1)).attribute(outside, 1)
    channel = input.clone()
    channel[:, 1] += 1
    propagate(model, channel, low=[0., 1., 0.], high=[1., 2., 1.])
    with pytest.raises(ValueError, match='low=1'):
        propagate(model, channel, low=[1., 0., 0.], high=[2., 2., 2.])
    # bounds of other layers, and of a network that normalizes by itself
    behind = nn.Sequential(nn.BatchNorm2d(3), *model).eval()
    behind[0].running_mean.fill_(.5)
    with pytest.raises(ValueError, match='below low=0'):
        propagate(behind, input, low=0., high=1.)
    assert propagate(behind, input, low=-.5, high=.5 + 1e-3).isfinite().all()


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('bound_dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rounding_of_bounds(dtype, bound_dtype):
    '''Normalized 8-bit images are within bounds that were computed in any precision.'''
    mean, std = (torch.tensor(value, dtype=torch.float64).view(3, 1, 1)
                 for value in ((.485, .456, .406), (.229, .224, .225)))
    pixels = torch.tensor([0, 255, 1, 254]).repeat(27)[:108].view(1, 3, 6, 6)

    def normalize(value, kind):
        return (value.to(kind) / 255 - mean.to(kind)) / std.to(kind)

    low, high = (normalize(torch.full((3, 1, 1), value), bound_dtype) for value in (0, 255))
    rule = ZPlus(first_layer='zbox', low=low, high=high)
    module = copy.deepcopy(NETWORK[0]).to(dtype)
    handle = rule.register(module)
    input = normalize(pixels, dtype)
    module(input.requires_grad_())
    with pytest.raises(ValueError, match='above high'):
        module((input + .25).detach().requires_grad_())
    handle.remove()


# -- what is shown -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('value, texts', [
    (RatioSplit(), ['RatioSplit()']),
    (ZPlus(.25, 'zbox', low=[-1, 0], high=2), ["first_layer='zbox'", 'stabilizer=0.25', 'low=[-1, 0]', 'high=2']),
    (ZPlus(torch.abs), ['stabilizer=abs']),
    (ResidualOnly(SymmetricSplit()), ['ResidualOnly(rule=SymmetricSplit())']),
    (BlockEpsilon(.5, 'plus'), ["BlockEpsilon(epsilon=0.5, mode='plus'", 'with_bias=True']),
    (Relative('per_position'), ["Relative(cardinality='per_position')"]),
    (SignedAlphaBeta(3., -2.), ['alpha=3.0, beta=-2.0']),
    (ResNetLRP('symmetric', identity_skip=False), ["splitting='symmetric'", 'identity_skip=False', "coverage='even'"]),
    (ResNetLRP(layer_map=[(nn.Conv2d, ZPlus())]), ['layer_map=[(Conv2d, ZPlus(']),
    (ResNetLRP(canonizers=[ResidualCanonizer(strict=False)]), ['ResidualCanonizer(', 'strict=False']),
    (ResNetLRPSymmetric(maxpool='average'), ["ResNetLRPSymmetric(splitting='symmetric'", "maxpool='average'"]),
    (RelativeLRP(normalization='l1'), ["normalization='l1'"]),
    (BlockLRP(blocks=['layer1']), ["blocks=['layer1']", 'epsilon=1e-06']),
    (ClassicLRP('gamma', gamma=.75), ["rule='gamma'", 'gamma=0.75', 'stabilizer=drop_zero']),
    (with_splitting(zennit.composites.EpsilonPlus(), SymmetricSplit()), ['EpsilonPlus', 'rule=SymmetricSplit()']),
    (CaptumResNetLRP(NETWORK, 'symmetric', initial_relevance='one'),
     ['ResNetLRP(model=Sequential', "splitting='symmetric'", "initial_relevance='one'"]),
    (C3LRP(NETWORK, epsilon=.5), ["postprocess='c3'", 'epsilon=0.5']),
    (LayerRelevance(NETWORK, ['0', NETWORK[3]], output='logits'), ["layer=['0', Linear]", "output='logits'"]),
    (SelectOutput(NETWORK, 'logits'), ["output='logits'", 'Conv2d']),
], ids=lambda value: type(value).__name__)
def test_repr(value, texts):
    '''Options are shown, on one line but for modules.'''
    text = repr(value)
    assert all(elem in text for elem in texts), text
    assert isinstance(value, nn.Module) or ('\n' not in text and ' at 0x' not in text)


@pytest.mark.parametrize('rule', [
    RatioSplit(), ZPlus(.25, 'zbox', low=0, high=1), ResidualOnly(), BlockEpsilon(.5), Relative(), LinearSum(ZPlus()),
], ids=repr)
def test_repr_of_copies(rule):
    '''A copy has the same options.'''
    assert repr(rule.copy()) == repr(rule) == repr(copy.deepcopy(rule))


def test_repr_of_user():
    '''Rules of users show what they keep.'''
    class Scale(SinglePass):
        '''A rule with an option, and one that it does not keep.'''
        def __init__(self, factor=2., other=1):
            super().__init__()
            self.factor = factor

    assert repr(Scale(3.)) == 'Scale(factor=3.0)'
    # rules of Zennit keep none, so that their copies do not either
    assert repr(SignedAlphaBeta().copy()) == 'SignedAlphaBeta()'


def test_repr_of_ledger():
    '''A ledger shows its composite and what is lost.'''
    ledger = conservation_ledger(NETWORK, torch.rand(6, 3, 6, 6), ResNetLRP('symmetric'))
    for elem in (ledger, ledger.example(1)):
        assert "splitting='symmetric'" in repr(elem) and f'{len(ledger.rows)} rows' in repr(elem)
    assert '6 examples' in repr(ledger) and f'{float(ledger.gap[0]):+.1e}' in repr(ledger)
    assert 'input times gradient' in repr(conservation_ledger(NETWORK, torch.rand(1, 3, 6, 6)))


def test_pickle():
    '''Attribution objects can be copied, but not pickled, which an error says.'''
    model, x = narrow_resnet18(num_classes=3).eval(), torch.rand(1, 3, 32, 32)
    for method in (CaptumResNetLRP(model), CompositeAttribution(model, 'epsilon_plus'), LayerRelevance(model, 'conv1')):
        with pytest.raises(TypeError, match=type(method).__name__):
            pickle.dumps(method)
        expected = method.attribute(x, target=1)
        for duplicate in (copy.copy(method), copy.deepcopy(method)):
            assert torch.equal(duplicate.attribute(x, target=1), expected)
        assert copy.copy(method).model is model and copy.deepcopy(method).model is not model
