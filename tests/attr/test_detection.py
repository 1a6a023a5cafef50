"""Class scores of boxes, explained from the logits that torchvision's detectors compute."""

import pytest
import torch
from torch import nn
from torchvision.models import detection

from captum_adapters.attr import C3LRP, RelativeLRP, ResNetLRP

pytestmark = pytest.mark.once


class Anchors(nn.Module):
    """Logits of all anchors, of shape (batch, classes, anchors)."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images):
        features = list(self.detector.backbone(images).values())
        return self.detector.head(features)["cls_logits"].transpose(1, 2)


class Boxes(nn.Module):
    """Logits of given boxes of shape (1, boxes, 4), of shape (1, classes, boxes)."""

    def __init__(self, detector):
        super().__init__()
        self.detector = detector

    def forward(self, images, boxes):
        features, heads = self.detector.backbone(images), self.detector.roi_heads
        pooled = heads.box_roi_pool(features, list(boxes), [images.shape[-2:]])
        logits, _ = heads.box_predictor(heads.box_head(pooled))
        return logits.T[None]


def _weights(module):
    """Varied numbers in all normalizations, which frozen ones must be folded with."""
    for each in module.modules():
        if hasattr(each, "running_var"):
            each.running_var.uniform_(0.5, 2)
            each.running_mean.normal_(0, 0.1)
    return module.eval()


def _detector(name):
    create = getattr(detection, name)
    detector = create(weights=None, weights_backbone=None, num_classes=4)
    if name.startswith("retinanet"):
        return _weights(Anchors(detector)), None
    boxes = torch.tensor([[[5.0, 5.0, 40.0, 50.0], [20.0, 10.0, 60.0, 64.0]]])
    return _weights(Boxes(detector)), (boxes,)


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "fasterrcnn_resnet50_fpn"])
def test_class_of_a_box(name):
    """Relevance is conserved through pyramids and pooled regions."""
    model, args = _detector(name)
    images = torch.randn(1, 3, 64, 64)
    logits = model(images, *(args or ())).detach()
    method = ResNetLRP(model)
    attributions, delta = method.attribute(images, (2, 1), args, True)
    torch.testing.assert_close(attributions.sum(), logits[0, 2, 1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        delta / logits[0, 2, 1], torch.zeros(1), rtol=0, atol=1e-6
    )
    # why this class of the box and not another one, in two ways
    found = ResNetLRP(model, contrast=0).attribute(images, (2, 1), args)
    expected = method.attribute(images, lambda y: y[:, 2, 1] - y[:, 0, 1], args)
    torch.testing.assert_close(found, expected)
    assert (found > 0).any() and (found < 0).any()
    for cls in (RelativeLRP, C3LRP):
        options = {"postprocess": None} if cls is C3LRP else {}
        found = cls(model, **options).attribute(images, (2, 1), args)
        assert found.isfinite().all() and found.any()
