"""Contrasts and functions as targets, against Zennit's attributors."""

from functools import partial

import pytest
import torch
from helpers.networks import narrow_resnet18
from torch import nn
from zennit.attribution import Gradient

from captum_adapters.attr import (
    C3LRP,
    CompositeAttribution,
    LayerRelevance,
    RelativeLRP,
    ResNetLRP,
)
from zennit_resnet import composites, initial_relevance
from zennit_resnet.postprocess import heat_quantization

pytestmark = pytest.mark.once

CONTRASTS = ["centred", "softmax", "runner_up", 3, [0, 4], [[3, 0], [4, 1], [0, 2]]]
METHODS = {
    "zplus": (ResNetLRP, composites.ResNetLRP, {}),
    "epsilon": (ResNetLRP, composites.ResNetLRP, {"classifier": "epsilon"}),
    "relative": (RelativeLRP, composites.RelativeLRP, {}),
    "block": (C3LRP, composites.BlockLRP, {}),
}


@pytest.fixture(scope="module", name="model")
def _model():
    torch.manual_seed(0)
    return narrow_resnet18(num_classes=5).eval()


@pytest.fixture(scope="module", name="images")
def _images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _arguments(cls):
    return {"postprocess": None} if cls is C3LRP else {}


@pytest.mark.parametrize("contrast", CONTRASTS, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_the_same_as_with_zennit(model, images, name, contrast):
    cls, composite, options = METHODS[name]
    method = cls(model, **options, **_arguments(cls), contrast=contrast)
    found, delta = method.attribute(images, [1, 2, 1], return_convergence_delta=True)
    start = initial_relevance([1, 2, 1], contrast=contrast)
    output, expected = Gradient(model, composite(**options))(images, start)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    value = "one" if name in ("zplus", "relative") else "logit"
    initial = initial_relevance([1, 2, 1], value, contrast=contrast)(output.detach())
    sums = (delta + found.sum((1, 2, 3))).float()
    torch.testing.assert_close(sums, initial.sum(1), rtol=1e-4, atol=1e-4)


def test_contrasts_of_each_example_are_divided_like_the_batch(model, images):
    method = ResNetLRP(model, contrast=torch.tensor([[3], [4], [0]]))
    whole = method.attribute(images, [1, 2, 1])
    parts = method.attribute(images, [1, 2, 1], internal_batch_size=2)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match="contrasts of 3 examples for a batch of 2"):
        method.attribute(images[:2], [1, 2])


def test_rivals_count_half(model, images):
    """A target that keeps half of what it has in common with its rivals."""
    options = {"classifier": "epsilon", "contrast": "softmax"}
    whole = ResNetLRP(model, **options).attribute(images, 1)
    alone = ResNetLRP(model, classifier="epsilon").attribute(images, 1)
    method = ResNetLRP(model, **options, contrast_weight=0.25)
    found = method.attribute(images, 1)
    torch.testing.assert_close(found, 0.75 * alone + 0.25 * whole, rtol=1e-4, atol=1e-5)
    start = initial_relevance(1, contrast="softmax", contrast_weight=0.25)
    composite = composites.ResNetLRP(classifier="epsilon")
    _, expected = Gradient(model, composite)(images, start)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert "contrast_weight=0.25" in repr(method)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"contrast_weight": 0.5}, ValueError),
        ({"contrast": "centred", "contrast_weight": 0}, ValueError),
        ({"contrast": "centred", "contrast_weight": float("nan")}, ValueError),
        ({"contrast": "centred", "contrast_weight": "half"}, TypeError),
    ],
)
def test_bad_weights(model, options, error):
    for function in (partial(ResNetLRP, model), partial(initial_relevance, 1)):
        with pytest.raises(error, match=f"contrast_weight={options['contrast_weight']!r}"):
            function(**options)


def test_a_class_against_itself_has_no_relevance(model, images):
    method = ResNetLRP(model, contrast=2)
    assert not method.attribute(images, 2).any()


class _Segmentation(nn.Module):
    """Logits of shape (batch, 5, height, width) by two layers."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.classifier = nn.Conv2d(8, 5, 1)

    def forward(self, images):
        return self.classifier(self.features(images))


@pytest.fixture(scope="module", name="dense")
def _dense():
    torch.manual_seed(0)
    return _Segmentation().eval()


@pytest.mark.parametrize("contrast", [None, "centred", "softmax", "runner_up", 3])
def test_one_place_of_a_dense_output(dense, images, contrast):
    """Rivals of a class are the others at its place."""
    method = ResNetLRP(dense, contrast=contrast)
    found = method.attribute(images, (-4, 5, 6))
    at_place = ResNetLRP(dense, contrast=contrast, output=lambda y: y[:, :, 5, 6])
    torch.testing.assert_close(found, at_place.attribute(images, 1))
    # a kernel of 3 x 3 pixels sees this much
    assert found[:, :, 4:7, 5:8].any()
    outside = found.clone()
    outside[:, :, 4:7, 5:8] = 0
    assert not outside.any()


def test_a_class_within_a_region(dense, images):
    """A function of the output: all places of the region at once, and no others."""
    region = torch.zeros(32, 32)
    region[8:16, 8:16] = 1
    method = ResNetLRP(dense, classifier="epsilon")
    found, delta = method.attribute(
        images, lambda y: (y[:, 2] * region).sum((1, 2)), return_convergence_delta=True
    )
    places = [(2, row, column) for row in range(8, 16) for column in range(8, 16)]
    expected = sum(method.attribute(images, place) for place in places)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    outside = found.clone()
    outside[:, :, 7:17, 7:17] = 0
    assert found.any() and not outside.any()
    bias = 64 * float(dense.classifier.bias[2].detach())
    torch.testing.assert_close(delta, torch.full_like(delta, bias), rtol=1e-3, atol=1e-4)


def test_functions_are_divided_like_the_batch(model, images):
    method = ResNetLRP(model)
    whole = method.attribute(images, lambda y: y[:, 1] - y[:, 2])
    parts = method.attribute(images, lambda y: y[:, 1] - y[:, 2], internal_batch_size=1)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)
    expected = ResNetLRP(model, contrast=2).attribute(images, 1)
    torch.testing.assert_close(whole, expected)


def test_layers(model, images):
    method = LayerRelevance(model, "layer3", contrast="centred")
    relevance, delta = method.attribute(images, 1, return_convergence_delta=True)
    assert (relevance > 0).any() and (relevance < 0).any()
    torch.testing.assert_close(delta, torch.zeros(3), rtol=0, atol=1e-6)
    assert "contrast='centred'" in repr(method)


def test_values_of_a_function_are_weighed(model, images):
    """Where `initial_relevance` is a function, it says what the weights multiply."""
    method = CompositeAttribution(
        model, initial_relevance=lambda y: torch.full_like(y, 2.0), contrast=3
    )
    expected = 2 * ResNetLRP(model, contrast=3).attribute(images, 1)
    torch.testing.assert_close(method.attribute(images, 1), expected)


@pytest.mark.parametrize(
    ("contrast", "target", "error", "value"),
    [
        ("centered", 1, ValueError, "'centered'"),
        (1.5, 1, TypeError, "float32"),
        (7, 1, IndexError, "7"),
        (-1, 1, IndexError, "-1"),
        ([], 1, (TypeError, ValueError), r"\[\]|torch.float32"),
        ("centred", None, ValueError, r"\(3, 5\)"),
        ("centred", lambda y: y[:, 0], ValueError, "'centred'"),
        (None, lambda y: y, ValueError, r"\(3, 5\)"),
        (None, lambda y: 1.0, ValueError, "float"),
    ],
)
def test_bad_contrasts(model, images, contrast, target, error, value):
    with pytest.raises(error, match=value):
        ResNetLRP(model, contrast=contrast).attribute(images, target)


def test_a_single_output_has_no_rivals(images):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 1))
    for target in (None, 0):
        with pytest.raises(ValueError, match=r"\(3, 1\)"):
            ResNetLRP(net.eval(), contrast="centred").attribute(images, target)


def test_rules_of_others_do_not_say_what_to_start_from(model, images):
    method = CompositeAttribution(model, "epsilon_plus", contrast="centred")
    with pytest.raises(ValueError, match="'logit' for rules"):
        method.attribute(images, 1)
    method = CompositeAttribution(model, "epsilon_plus", "logit", contrast="centred")
    assert method.attribute(images, 1).any()


def test_quantized_signals():
    """Quantization is for any number of dimensions, contours are for images."""
    net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(120, 3))
    signals = torch.randn(2, 2, 32)
    found = ResNetLRP(net.eval(), postprocess="heat_quantization").attribute(signals, 1)
    curves = ResNetLRP(net).attribute(signals, 1).sum(1)
    expected = heat_quantization(curves, dims=1)
    torch.testing.assert_close(found.sum(1), expected, rtol=1e-5, atol=1e-7)
    assert len(expected[0].unique()) <= 8
    with pytest.raises(ValueError, match=r"'c3'.*\(2, 2, 32\)"):
        ResNetLRP(net, postprocess="c3").attribute(signals, 1)
