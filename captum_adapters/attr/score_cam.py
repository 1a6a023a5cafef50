"""Score-CAM by torch-cam, in Captum's manner."""

from functools import partial
from importlib import import_module
from typing import Any, Callable, Optional

import torch
from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor

from captum_adapters._compat import cam_activation, set_cam_activation
from captum_adapters._validation import (
    DEFAULT_CHUNK,
    Inputs,
    TargetType,
    at_least_single,
    check_target,
    evaluate_rows,
    positive_integer,
    select_target,
)
from captum_adapters.attr.rise import check_maskable
from zennit_resnet.canonizers.eager import evaluating


class ScoreCAM(LayerAttribution):
    r"""Score-CAM: class activation maps that are weighted by scores, not gradients.

    Wang et al. 2020: each channel of a layer's output, scaled to values from 0 to 1 and
    resized to the image (the paper resizes first), is a mask H. The weight of channel k
    is the softmax over all channels of the target's output for the masked image, and
    the map is

    .. math::
        L = \mathrm{ReLU}\Big(\sum_k w_k A_k\Big), \quad
        w = \mathrm{softmax}_k \big(f(X \odot H_k) - f(X_b)\big).

    The computation is `torch-cam <https://pypi.org/project/torchcam>`_'s, which is an
    optional dependency: `pip install "zennit-resnet[cam]"`. Images are evaluated one by
    one, without gradients, and in evaluation mode unless `forward_func` is a function
    that hides its network. It takes as many evaluations of the network as the layer has
    channels: 2048 for the last stage of ResNet-50.

    Args:
        forward_func (callable): A network, or any function of images which uses it.
        layer (torch.nn.Module): Layer with an output of shape (batch, channels, height,
            width), usually the last stage of convolutions.

    Raises:
        ImportError: If torch-cam is not installed.

    Examples:
        >>> import torch
        >>> from captum_adapters.attr import ScoreCAM
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3, stride=2), torch.nn.ReLU(),
        ...     torch.nn.Flatten(), torch.nn.Linear(72, 5))
        >>> method = ScoreCAM(net, net[1])
        >>> attributions = method.attribute(torch.rand(2, 3, 8, 8), target=[1, 4])
        >>> attributions.shape
        torch.Size([2, 1, 3, 3])
        >>> ScoreCAM.interpolate(attributions, (8, 8), "bilinear").shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self, forward_func: Callable[..., Any], layer: torch.nn.Module
    ) -> None:
        LayerAttribution.__init__(self, forward_func, layer)
        try:
            self._library = import_module("torchcam.methods")
        except ImportError as error:
            raise ImportError(
                'ScoreCAM needs torch-cam: pip install "zennit-resnet[cam]"'
            ) from error

    @classmethod
    def get_name(cls) -> str:
        """Name for users, as in Captum Insights."""
        return "Score-CAM"

    @log_usage()
    def attribute(
        self, inputs: Inputs, target: TargetType = None,
        additional_forward_args: object = None,
        perturbations_per_eval: int = DEFAULT_CHUNK,
    ) -> Tensor:
        """Args:
            inputs (Tensor or tuple[Tensor]): Images of shape (batch, channels, height,
                width). Further inputs belong into `additional_forward_args`.
            target, additional_forward_args: See :meth:`CompositeAttribution.attribute`.
                The target should be a logit.
            perturbations_per_eval (int, optional): Number of masked images to evaluate
                at once.

        Returns:
            *Tensor*: Non-negative maps of shape (batch, 1, height, width), as those of
            the layer, in units of its activations. Resize them with
            :meth:`LayerAttribution.interpolate`.

        Raises:
            ValueError: If a shape does not fit, the layer has no part in the network,
                the target is missing or out of range, or an output is NaN.
            TypeError: If the layer's output, or the network's, is not a tensor, or the
                target is not of integers.
        """
        images = check_maskable(inputs)
        if len(images) > 1:
            raise ValueError(
                f"There are {len(images)} inputs, but Score-CAM masks a single one:"
                " give the others as additional_forward_args."
            )
        positive_integer("perturbations_per_eval", perturbations_per_eval)
        batch = len(images[0])
        index = check_target(target, batch, allow_negative=True)
        network = _SingleScore(
            self.forward_func, self.layer, index, additional_forward_args, batch
        )
        maps = []
        for row, image in enumerate(images[0].detach().split(1)):
            network.row = row
            with (
                torch.no_grad(),
                evaluating(network),
                self.layer.register_forward_hook(_check_layer),
                self._library.ScoreCAM(
                    network, self.layer, batch_size=perturbations_per_eval
                ) as extractor,
            ):
                # called after torch-cam's hook
                copying = partial(_copy_activation, extractor)
                with self.layer.register_forward_hook(copying):
                    network(image)
                if cam_activation(extractor) is None:
                    raise ValueError(
                        f"The layer {type(self.layer).__name__} is not used by"
                        " forward_func: choose one that is."
                    )
                maps.extend(extractor(0, normalized=False))
        return torch.stack(maps)


class _SingleScore(torch.nn.Module):
    """The target's output of the example in a row, with images as only input."""

    def __init__(
        self, forward_func: Callable[..., Any], layer: torch.nn.Module,
        target: Optional[Tensor], args: object, batch: int,
    ) -> None:
        super().__init__()
        # both are found among the modules of this one, also if forward_func is none
        self.layer, self.forward_func = layer, forward_func
        self.target, self.args, self.batch = target, args, batch
        self.row = 0

    def forward(self, images: Tensor) -> Tensor:
        """Output of shape (images, 1)."""
        rows = torch.full((len(images),), self.row, device="cpu")
        # images may be changed in place
        result = evaluate_rows(
            self.forward_func, [images.clone()], self.args, self.batch, rows
        )
        index = None if self.target is None else self.target[rows].to(result.device)
        scores = at_least_single(select_target(result, index))
        # torch-cam would make it a map of zeros
        if bool(scores.isnan().any()):
            raise ValueError("forward_func returns NaN for a masked image.")
        return scores[:, None]


def _check_layer(module: torch.nn.Module, _: Any, output: Any) -> None:
    """Refuse layers whose output is no image."""
    name = type(module).__name__
    if not isinstance(output, Tensor):
        raise TypeError(
            f"The layer {name} returns {type(output).__name__} instead of a tensor:"
            " choose another layer."
        )
    if output.ndim < 3:
        raise ValueError(
            f"The layer {name} has an output of shape {tuple(output.shape)} without"
            " spatial dimensions: choose a convolution or a stage of them."
        )


def _copy_activation(extractor: Any, *_: Any) -> None:
    """Copy what torch-cam keeps, as the network may change its layer's output."""
    set_cam_activation(extractor, cam_activation(extractor).clone())
