'''Networks that are scripted, compiled or wrapped are explained like the network inside, or refused by name.'''
import warnings

import pytest
import torch
from helpers.networks import randomize
from helpers.state import Snapshot
from torch import nn
from torch.nn import functional as F
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus, EpsilonPlusFlat

from captum_adapters.attr import CompositeAttribution, LayerRelevance
from zennit_resnet import BlockLRP, ResNetLRP, with_splitting
from zennit_resnet.composites import RelativeLRP
from zennit_resnet.conservation import conservation_ledger

COMPOSITES = {
    'resnet': ResNetLRP, 'relative': RelativeLRP, 'block': BlockLRP,
    'splitting': lambda: with_splitting(EpsilonPlusFlat()),
}
INTERFACES = {
    'zennit': lambda model, build, x: native(model, build(), x),
    'ledger': lambda model, build, x: conservation_ledger(model, x, build(), target=1).relevance,
    'captum': lambda model, build, x: CompositeAttribution(model, build()).attribute(x, target=1),
    'layer': lambda model, build, x: LayerRelevance(model, 'stem', build()).attribute(x, target=1),
}
every_composite = pytest.mark.parametrize('build', [pytest.param(build, id=name) for name, build in COMPOSITES.items()])


class Block(nn.Module):
    '''A residual block.'''
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        '''Run the block.'''
        return F.relu(self.bn(self.conv(x)) + x)


class Network(nn.Module):
    '''A network of one block.'''
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.fc = nn.Conv2d(3, 4, 3, padding=1), Block(), nn.Linear(4, 3)

    def forward(self, x):
        '''Run the network.'''
        return self.fc(self.block(F.relu(self.stem(x))).mean((2, 3)))


def build_network():
    '''The network, always the same.'''
    torch.manual_seed(0)
    return randomize(Network()).eval()


def images():
    '''Some images.'''
    return torch.linspace(-1, 1, 216).view(2, 3, 6, 6)


def native(model, composite, x):
    '''Relevance by Zennit.'''
    with Gradient(model=model, composite=composite) as attributor:
        return attributor(x, lambda output: output * torch.eye(3)[[1, 1]])[1]


def with_block(change):
    '''The network with another block.'''
    model = build_network()
    model.block = change(model.block)
    return model


def compile_in_place(module):
    '''Compile a module by its method.'''
    module.compile(backend='eager')
    return module


def compile_function(module):
    '''Compile a module by a function.'''
    return torch.compile(module, backend='eager')


def wrap_distributed(module):
    '''A module for distributed training, without any process beside this one.'''
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(module)


WRAPPED = {
    'compiled': lambda: compile_function(build_network()),
    'compiled in place': lambda: compile_in_place(build_network()),
    'compiled block': lambda: with_block(compile_function),
    'compiled block in place': lambda: with_block(compile_in_place),
    'parallel': lambda: nn.DataParallel(build_network()),
    'distributed': lambda: wrap_distributed(build_network()),
}


@pytest.fixture(autouse=True)
def clean_state():
    '''No process group and no compiled code is left behind.'''
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch._dynamo.reset()


@every_composite
@pytest.mark.parametrize('name', WRAPPED)
def test_wrapped(name, build):
    '''Relevance is that of the network inside, and the model runs as before afterwards.'''
    model, x = WRAPPED[name](), images()
    if 'compiled' in name:
        # code was compiled before there are rules
        model(x)
    # the wrapper itself notes buffers when it runs
    snapshot = Snapshot(model.module if name == 'distributed' else model)
    for label, interface in INTERFACES.items():
        expected = interface(build_network(), build, x)
        assert torch.allclose(interface(model, build, x), expected, rtol=1e-5, atol=1e-7), label
        snapshot.check()
    assert torch.allclose(model(x), build_network()(x), atol=1e-6)


SCRIPTED = {
    'scripted block': (lambda: with_block(torch.jit.script), 'block'),
    'traced block': (lambda: with_block(lambda block: torch.jit.trace(block, torch.rand(1, 4, 6, 6))), 'block'),
    'scripted': (lambda: torch.jit.script(build_network()), 'The model'),
    'traced': (lambda: torch.jit.trace(build_network(), images()), 'The model'),
    'frozen': (lambda: torch.jit.freeze(torch.jit.script(build_network())), 'The model'),
}


@every_composite
@pytest.mark.parametrize('name', SCRIPTED)
def test_scripted(name, build):
    '''A scripted module is named, and told what to do.'''
    make, path = SCRIPTED[name]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = make()
    for interface in INTERFACES.values():
        with pytest.raises(TypeError, match=rf'^{path} \(\w+\) is a ScriptModule, .*: use the module it was made from'):
            interface(model, build, images())
    if path == 'block':
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in (model, model.stem, model.fc))
    assert model(images()).shape == (2, 3)


def test_scripted_without_canonizer():
    '''With any composite, classes of Captum refuse it as well.'''
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = with_block(torch.jit.script)
    with pytest.raises(TypeError, match='^block .* is a ScriptModule'):
        CompositeAttribution(model, EpsilonPlus()).attribute(images(), target=1)


@every_composite
def test_replicas(build):
    '''Replicas on several devices have no rules.'''
    model = nn.Sequential(nn.DataParallel(build_network()))
    model[0].device_ids = [0, 1]
    with pytest.raises(TypeError, match=r'^0 \(DataParallel\) runs replicas .* use the module inside'):
        native(model, build(), images())
