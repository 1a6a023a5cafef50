"""Attributions that are recorded as a graph are those that are not."""

import copy
import types

import pytest
import torch
from captum.attr import NoiseTunnel
from helpers.networks import TinyResNet, randomize
from torch import nn

from captum_adapters.attr import C3LRP, CompositeAttribution, RelativeLRP, ResNetLRP

pytestmark = pytest.mark.once


@pytest.fixture(name="net", scope="module")
def fixture_net():
    """A residual network in double precision."""
    torch.manual_seed(0)
    return randomize(TinyResNet()).double().eval()


@pytest.fixture(name="images", scope="module")
def fixture_images():
    """Four images."""
    torch.manual_seed(1)
    return torch.rand(4, 3, 32, 32).double()


@pytest.fixture(name="small", scope="module")
def fixture_small():
    """A network of two layers, which is traced faster."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    return nn.Sequential(*layers).double().eval()


@pytest.mark.parametrize(
    "create",
    [
        lambda net, **options: ResNetLRP(net, classifier="epsilon", **options),
        lambda net, **options: ResNetLRP(net, initial_relevance="softmax", **options),
        lambda net, **options: C3LRP(net, **options),
        lambda net, **options: RelativeLRP(net, **options),
        lambda net, **options: CompositeAttribution(net, "epsilon_plus", **options),
    ],
)
def test_equal(net, images, create):
    """With targets for each example, a delta, and parts of the batch."""
    plain, traced = create(net), create(net, traced=True)
    expected, delta = plain.attribute(images, [1, 2, 3, 4], return_convergence_delta=True)
    result, same = traced.attribute(
        images, [1, 2, 3, 4], return_convergence_delta=True, internal_batch_size=2
    )
    scale = expected.abs().flatten(1).amax(1)[:, None, None, None]
    if isinstance(plain, RelativeLRP):
        # each part of a batch has the same scale for each of its examples
        result, expected = (
            each / each.abs().amax((1, 2, 3), keepdim=True) for each in (result, expected)
        )
        scale = torch.ones_like(scale)
    assert ((result - expected).abs() <= 1e-7 * scale).all()
    if not isinstance(plain, RelativeLRP):
        assert torch.allclose(delta, same, atol=1e-9)


def test_contrasts(small, images):
    """Contrasts and functions of the output start from the same."""
    for options in ({"contrast": "softmax"}, {"contrast": [4, 5]}):
        expected = ResNetLRP(small, **options).attribute(images, 3)
        result = ResNetLRP(small, traced=True, **options).attribute(images, 3)
        assert torch.allclose(result, expected, atol=1e-12)
    lrp = ResNetLRP(small, traced=True)
    result = lrp.attribute_targets(images, [3, lambda output: output[:, 3] * 2])
    assert torch.allclose(2 * result[0], result[1] * small(images)[:, 3].view(-1, 1, 1, 1))


def test_other_weights(net, images):
    """A network whose weights have changed is traced again."""
    net = copy.deepcopy(net)
    lrp = ResNetLRP(net, traced=True)
    before = lrp.attribute(images, 3)
    assert torch.equal(lrp.attribute(images, 3), before)
    with torch.no_grad():
        net.linear.weight[3] = net.linear.weight[4]
    expected = ResNetLRP(net).attribute(images, 3)
    assert torch.allclose(lrp.attribute(images, 3), expected, atol=1e-12)
    assert not torch.allclose(before, expected)
    assert not torch.equal(copy.deepcopy(lrp).attribute(images, 3), before)
    with pytest.raises(RuntimeError, match="eval"):
        ResNetLRP(net.train(), traced=True).attribute(images, 3)


def change_output(net):
    """Change a network by a hook."""
    net.bn1.register_forward_hook(lambda module, args, output: 2 * output)


def change_setting(net):
    """Change a setting of a module."""
    net.bn1.eps = 1.0


def change_forward(net):
    """Change what a module computes."""
    net.bn1.forward = types.MethodType(lambda self, x: x + self.bias[:, None, None], net.bn1)


class Doubled(TinyResNet):
    """Another network of the same modules."""

    def forward(self, x):
        """Logits."""
        return super().forward(2 * x)


def change_class(net):
    """Change what the network computes."""
    net.__class__ = Doubled


@pytest.mark.parametrize(
    "change", [change_output, change_setting, change_forward, change_class]
)
def test_other_settings(net, images, change):
    """So is one whose hooks, settings or functions have changed."""
    net = copy.deepcopy(net)
    # tensors have no single truth to compare
    net.anchors = (torch.rand(2), 1)
    lrp = ResNetLRP(net, traced=True)
    before = lrp.attribute(images, 3)
    net.anchors = (torch.rand(2), 2)
    change(net)
    expected = ResNetLRP(net).attribute(images, 3)
    assert torch.allclose(lrp.attribute(images, 3), expected, atol=1e-12)
    assert not torch.allclose(before, expected)


def test_other_composite(net, images):
    """The composite is that of now, and so are hooks of all modules."""
    lrp = ResNetLRP(net, traced=True)
    before = lrp.attribute(images, 3)

    def double(module, args, output):
        return 2 * output if isinstance(module, nn.BatchNorm2d) else None

    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        expected = ResNetLRP(net).attribute(images, 3)
        assert torch.allclose(lrp.attribute(images, 3), expected, atol=1e-12)
    finally:
        handle.remove()
    assert not torch.allclose(before, expected)
    assert torch.equal(lrp.attribute(images, 3), before)
    plain = RelativeLRP(net)
    lrp.composite = RelativeLRP(net).composite
    expected, result = plain.attribute(images, 3), lrp.attribute(images, 3)
    assert torch.allclose(result / result.abs().max(), expected / expected.abs().max())


def test_other_class_forward(net, images, monkeypatch):
    """A function of the class may be replaced as well."""
    lrp = ResNetLRP(net, traced=True)
    before = lrp.attribute(images, 3)
    forward = TinyResNet.forward
    monkeypatch.setattr(TinyResNet, "forward", lambda self, x: forward(self, 2 * x))
    result = lrp.attribute(images, 3)
    assert torch.allclose(result, ResNetLRP(net).attribute(images, 3), atol=1e-12)
    assert not torch.allclose(result, before)


def test_inference_mode(net, images):
    """The first call may be within it, as without tracing."""
    expected = ResNetLRP(net).attribute(images, 3)
    lrp = ResNetLRP(net, traced=True)
    with torch.inference_mode():
        assert torch.allclose(lrp.attribute(images.clone(), 3), expected, atol=1e-12)
    assert torch.allclose(lrp.attribute(images, 3), expected, atol=1e-12)


def test_precision(net, images):
    """Of another precision than the network, an input is refused as without tracing."""
    for lrp in (ResNetLRP(net), ResNetLRP(net, traced=True)):
        with pytest.raises(TypeError, match="convert one of them"):
            lrp.attribute(images.float(), 3)


def test_noise_tunnel(small, images):
    """Methods of Captum on top of it."""
    torch.manual_seed(2)
    tunnel = NoiseTunnel(ResNetLRP(small, traced=True))
    result = tunnel.attribute(images, nt_samples=2, target=3)
    assert result.shape == images.shape and result.isfinite().all()


def test_errors(net, images):
    """What cannot be traced is an error."""
    with pytest.raises(TypeError, match="traced"):
        ResNetLRP(net, traced=1)

    class Two(nn.Module):
        """A network with two inputs."""

        def forward(self, first, second):
            """Logits."""
            return net(first + second)

    with pytest.raises(ValueError, match="single input"):
        ResNetLRP(Two().eval(), traced=True).attribute((images, images), 3)
