"""Attention branch networks, whose attention map is an explanation."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple, Optional, Union

import torch
import torch.nn.functional as F
from captum.attr import Attribution
from captum.log import log_usage
from torch import Tensor
from torch.nn import AdaptiveAvgPool2d, BatchNorm2d, Conv2d, Linear, Module
from torchvision import models

from captum_adapters._validation import (
    TargetType,
    TensorOrTuple,
    at_least_single,
    check_evaluation,
    check_images,
    check_range,
    check_target,
    examples_where,
    split_args,
    suggest,
)
from zennit_resnet.models import SUFFIXES, read_state
from zennit_resnet.registration import unwrap

_TRUNK = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
_PERCEPTION = ("layer4", "avgpool", "fc")


class Branches(NamedTuple):
    """What an attention branch network computes for a batch of images.

    Attributes:
        attention_logits (Tensor): Class scores of the attention branch, (batch,
            classes).
        logits (Tensor): Class scores of the perception branch, (batch, classes): the
            output of the network.
        attention (Tensor): Attention maps with values from 0 to 1, of shape (batch, 1,
            height, width), with height and width of the feature extractor.
    """

    attention_logits: Tensor
    logits: Tensor
    attention: Tensor


class AttentionBranch(Module):
    """The branch which computes class scores and attention maps from features.

    The structure of Fukui et al. 2019, with batch normalization at the places of their
    published code (which, unlike the paper, has a 3 x 3 convolution for the map).

    Nothing about the start is random, or a short training would leave the sign of the
    map to chance: `stage` is copied with stride 1, the class maps are those of `fc`,
    scores their means, and the attention map the mean over classes.
    """

    def __init__(self, stage: Module, fc: Linear) -> None:
        super().__init__()
        channels, classes = fc.in_features, fc.out_features
        self.stage = copy.deepcopy(stage)
        for module in self.stage.modules():
            if isinstance(module, Conv2d):
                module.stride = (1, 1)
        self.norm = BatchNorm2d(channels)
        self.class_maps = Conv2d(channels, classes, 1, bias=False)
        self.class_norm = BatchNorm2d(classes)
        self.scores = Conv2d(classes, classes, 1, bias=False)
        self.pool = AdaptiveAvgPool2d(1)
        self.attention = Conv2d(classes, 1, 1, bias=False)
        self.attention_norm = BatchNorm2d(1)
        with torch.no_grad():
            self.class_maps.weight.copy_(fc.weight[:, :, None, None])
            self.scores.weight.copy_(torch.eye(classes)[:, :, None, None])
            self.attention.weight.fill_(1 / classes)
        self.to(fc.weight.device, fc.weight.dtype)
        self.requires_grad_()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores (batch, classes), and attention maps (batch, 1, height, width)."""
        maps = self.class_maps(self.norm(self.stage(features)))
        maps = self.class_norm(maps).relu()
        scores = self.pool(self.scores(maps)).flatten(1)
        return scores, self.attention_norm(self.attention(maps)).sigmoid()


class AttentionBranchNetwork(Module):
    """Attention branch network (ABN), made of a residual network.

    Fukui et al. 2019: the network up to its third stage is the feature extractor. From
    its features :math:`g(x)`, an :class:`AttentionBranch` computes class scores and a
    map of attention :math:`M(x)`. The perception branch, which is the rest of the
    network, computes class scores from :math:`(1 + M(x)) g(x)`: the output. Before it
    has been trained, see `examples/abn/train.py`, the attention means little. All
    parameters and buffers are copies, and the branches share none.

    Args:
        model (torch.nn.Module): A classifier with the modules of torchvision's
            :class:`~torchvision.models.ResNet`: `conv1`, `bn1`, `relu`, `maxpool`,
            `layer1` to `layer4`, `avgpool` and `fc`. The attention branch has its
            device, type, and training mode, and requires gradients in any case.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If it lacks any of these modules, or `fc` is not a linear layer.
    """

    def __init__(self, model: Module) -> None:
        super().__init__()
        if not isinstance(model, Module):
            raise TypeError(f"model must be a module, but is {type(model).__name__}.")
        parts = dict(model.named_children())
        missing = [name for name in (*_TRUNK, *_PERCEPTION) if name not in parts]
        if missing:
            raise ValueError(
                f"{type(model).__name__} has no {', '.join(missing)}: give a residual"
                " network with the modules of torchvision's."
            )
        fc = parts["fc"]
        if not isinstance(fc, Linear):
            raise ValueError(f"fc is {type(fc).__name__}, but must be a linear layer.")
        # copied at once: what these share is shared by the copies as well
        copies = copy.deepcopy({name: parts[name] for name in (*_TRUNK, *_PERCEPTION)})
        for name, module in copies.items():
            self.add_module(name, module)
        self.attention_branch = AttentionBranch(parts["layer4"], fc)
        self.attention_branch.train(model.training)
        self.training = model.training

    def extract_features(self, input: Tensor) -> Tensor:
        """Features from which both branches start, of images."""
        for name in _TRUNK:
            input = self.get_submodule(name)(input)
        return input

    def classify_features(self, features: Tensor) -> Branches:
        """Compute both branches of features.

        A ValueError is raised if `layer4` changes the size of features by other means
        than the stride of convolutions.
        """
        attention_logits, attention = self.attention_branch(features)
        if attention.shape[2:] != features.shape[2:]:
            raise ValueError(
                f"layer4 changes the size {tuple(features.shape[2:])} of features to"
                f" {tuple(attention.shape[2:])} by other means than strides."
            )
        hidden = features * (1 + attention)
        hidden = self.get_submodule("avgpool")(self.get_submodule("layer4")(hidden))
        logits = self.get_submodule("fc")(hidden.flatten(1))
        return Branches(attention_logits, logits, attention)

    def forward_branches(self, input: Tensor) -> Branches:
        """Compute both branches of images, see :meth:`classify_features`."""
        return self.classify_features(self.extract_features(input))

    def forward(self, input: Tensor) -> Tensor:
        """Class scores of the perception branch, of shape (batch, classes)."""
        return self.forward_branches(input).logits


class ABN(Attribution):
    """The attention map of an attention branch network, as an attribution.

    Fukui et al. 2019. The map is part of the network's forward pass, and there is one
    for each image: it does **not** depend on the target.

    Args:
        model (AttentionBranchNetwork): The network, in evaluation mode. It may be
            within :class:`torch.nn.DataParallel`,
            :class:`torch.nn.parallel.DistributedDataParallel` or a compiled model.

    Raises:
        TypeError: If `model` is another network.

    Examples:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from captum_adapters.attr.abn import ABN, AttentionBranchNetwork
        >>> net = AttentionBranchNetwork(resnet18(num_classes=5)).eval()
        >>> ABN(net).attribute(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 3, 64, 64])
    """

    def __init__(self, model: Module) -> None:
        network = unwrap(model)[0] if isinstance(model, Module) else model
        if not isinstance(network, AttentionBranchNetwork):
            raise TypeError(
                "ABN explains an AttentionBranchNetwork, but there is"
                f" {type(network).__name__}: make one of a residual network."
            )
        Attribution.__init__(self, model)
        self.network = network

    @classmethod
    def get_name(cls) -> str:
        """Name of the method, as shown in Captum Insights."""
        return "Attention Branch Network"

    @log_usage()
    def attribute(
        self, inputs: TensorOrTuple, target: TargetType = None,
        additional_forward_args: object = None,
    ) -> TensorOrTuple:
        """Args:
            inputs (Tensor or tuple[Tensor]): Images of shape (batch, channels, height,
                width).
            target, additional_forward_args: For Captum's manner of calling. The target
                is only checked, and the network has no further arguments.

        Returns:
            *Tensor* or *tuple[Tensor]*: Attention, resized to the images with bilinear
            interpolation, of the inputs' shape, in at least single precision. The
            channels have equal parts, so that their sum is the map with values from 0
            to 1. A tuple is returned if inputs are a tuple.

        Raises:
            ValueError: If there are several inputs or further arguments, inputs are not
                images, the target is out of range, attention is NaN, or the network is
                in training mode.
            TypeError: If inputs are not floating point tensors, or the target is not of
                integers.
        """
        images = check_images(inputs, [2])
        if not images.is_floating_point():
            raise TypeError(
                f"inputs of {images.dtype} must be converted to floating point numbers."
            )
        if split_args(additional_forward_args, 1)[0]:
            raise ValueError("The network has a single input: no additional_forward_args.")
        index = check_target(target, len(images))
        check_evaluation(self.network)
        with torch.no_grad():
            _, logits, attention = self.network.forward_branches(images)
        if index is not None:
            check_range(logits, index)
        # half precision would give neighbouring pixels the same value
        attention = at_least_single(attention)
        maps = F.interpolate(attention, images.shape[2:], mode="bilinear")
        wrong = examples_where(maps.isnan())
        if wrong:
            raise ValueError(
                f"Attention is NaN for the examples {wrong} of the batch: check the"
                " inputs and the weights."
            )
        attributions = (maps / images.shape[1]).repeat(1, images.shape[1], 1, 1)
        return (attributions,) if isinstance(inputs, tuple) else attributions


def save_abn(
    model: AttentionBranchNetwork, path: Union[str, Path],
    classes: Optional[Sequence[str]] = None,
) -> None:
    """Write the weights of an attention branch network.

    Args:
        model (AttentionBranchNetwork): The network.
        path (str or Path): File to write: a state dict in the format of safetensors
            (`.safetensors`, which needs this package) or of :func:`torch.save` (`.pt`,
            `.pth`).
        classes (sequence of str, optional): Names of the classes, for the metadata of
            safetensors.

    Raises:
        ValueError: If the suffix is unknown, safetensors is missing, or there are more
            or fewer names than classes.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} must end in one of {', '.join(SUFFIXES)}.")
    count = model.attention_branch.scores.out_channels
    if classes is not None and len(classes) != count:
        raise ValueError(f"There are {len(classes)} names for {count} classes.")
    items = model.state_dict().items()
    state = {key: value.detach().cpu().contiguous() for key, value in items}
    if path.suffix.lower() != ".safetensors":
        with open(path, "wb") as file:
            torch.save(state, file)
        return
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ValueError(
            f"writing {path} needs another package: pip install safetensors"
        ) from error
    metadata = None if classes is None else {"classes": json.dumps(list(classes))}
    path.write_bytes(save(state, metadata))


def load_abn(
    path: Union[str, Path], architecture: str = "resnet50"
) -> AttentionBranchNetwork:
    """Read the weights of an attention branch network, as :func:`save_abn` writes them.

    Args:
        path (str or Path): A state dict. The number of classes is the size of the last
            layer.
        architecture (str, optional): Name of the residual network in torchvision.

    Returns:
        AttentionBranchNetwork: The network on the CPU, in single precision and
        evaluation mode.

    Raises:
        ValueError: If there is no such residual network, the file cannot be read, or
            the weights do not fit.
    """
    names = [
        name
        for name in models.list_models(module=models)
        if models.get_model_builder(name).__module__ == models.resnet.__name__
    ]
    if architecture not in names:
        hint = suggest(architecture, names)
        raise ValueError(f"{architecture!r} is no residual network of torchvision{hint}")
    state, _ = read_state(path)
    if not any(key.startswith("attention_branch.") for key in state):
        raise ValueError(
            f"The weights {path} have no attention branch: train one with"
            " examples/abn/train.py."
        )
    last = state.get("fc.weight")
    if last is None or last.ndim != 2:
        raise ValueError(f"The weights {path} lack fc.weight, the last layer.")
    network = models.get_model(architecture, weights=None, num_classes=len(last))
    model = AttentionBranchNetwork(network)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        problems = [shorten(line, 120) for line in str(error).splitlines()[1:4]]
        raise ValueError(
            f"The weights {path} do not fit {architecture}: {' '.join(problems)}"
        ) from None
    return model.eval()
