"""LRP of residual networks: the composites of :mod:`zennit_resnet.composites`."""

from collections.abc import Sequence
from typing import Any, Callable, Optional, Union

from torch import Tensor
from torch.nn import Module

import zennit_resnet.composites as composites
from captum_adapters.attr.composite import (
    CompositeAttribution,
    Contrast,
    InitialRelevance,
    Output,
    Postprocess,
)

Stabilizer = Union[float, Callable[[Tensor], Tensor]]
LayerMap = list[tuple[Any, Any]]


class ResNetLRP(CompositeAttribution):
    """LRP for ResNet (Otsuki et al. 2024): splitting at skip connections, and z+.

    At the addition which ends a block, relevance is split between the skip connection
    :math:`h_s` and the residual branch :math:`h_m`, Eqs. (4) to (7): by :math:`|h_s| /
    (|h_s| + |h_m|)` or in half. All other layers have the z+ rule, Eq. (2). Relevance
    is conserved, so that attributions sum to the target's logit, and the delta is what
    rounding leaves of it.

    Args:
        splitting, identity_skip, batch_norm, first_layer, classifier, ...: See
            :class:`zennit_resnet.composites.ResNetLRP`.
        model, initial_relevance, postprocess, output, contrast, traced, ...: See
            :class:`CompositeAttribution`, as for errors. The paper's post-processing is
            `"heat_quantization"`, which does not conserve relevance.

    Examples:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from captum_adapters.attr import ResNetLRP
        >>> net, images = resnet18().eval(), torch.rand(2, 3, 32, 32)
        >>> lrp = ResNetLRP(net, splitting="symmetric", initial_relevance="softmax")
        >>> attributions = lrp.attribute(images, target=3)
        >>> torch.allclose(attributions.sum((1, 2, 3)), net(images).softmax(1)[:, 3])
        True
    """

    _name = "ResNet LRP"

    def __init__(
        self, model: Module, splitting: str = "ratio", identity_skip: bool = True,
        batch_norm: str = "pass", first_layer: str = "zplus",
        projection: str = "spread", dead_units: str = "spread", maxpool: str = "winner",
        stabilizer: Stabilizer = 0.0, layer_map: Optional[LayerMap] = None,
        canonizers: Optional[list[Any]] = None,
        low: Union[None, float, Sequence[float], Tensor] = None,
        high: Union[None, float, Sequence[float], Tensor] = None,
        coverage: Optional[str] = None, classifier: str = "zplus",
        attention: str = "value", parameters: str = "pass", *,
        initial_relevance: InitialRelevance = None, postprocess: Postprocess = None,
        output: Output = None, contrast: Contrast = None, contrast_weight: float = 1.0,
        traced: bool = False,
    ) -> None:
        composite = composites.ResNetLRP(
            splitting, identity_skip, batch_norm, first_layer, projection, dead_units,
            maxpool, stabilizer, layer_map, canonizers, low, high, coverage,
            classifier, attention, parameters,
        )
        super().__init__(
            model, composite, initial_relevance, postprocess, output, contrast,
            contrast_weight, traced,
        )


class RelativeLRP(CompositeAttribution):
    r"""Relative LRP (Nyiri & Gibaru, R-LRP): contributions without divisions.

    The contribution of neuron i is :math:`z_i = \frac{Card(J_i)}{N} \sum_{j \in J_i}
    \frac{1}{M_j} w_{ij} x_i z_j` (Definition 9), and branches of residual blocks are
    rescaled (Proposition 14). Every layer multiplies by its inputs, so contributions
    are not conserved: only their ratios within one example have a meaning, each example
    has a scale of its own, and the delta tells nothing. The natural logarithm of the
    scale is `composite.log_scale`, of the last (part of the) batch.

    Args:
        cardinality, normalization, batch_norm, layer_map, canonizers: See
            :class:`zennit_resnet.composites.RelativeLRP`.
        model, initial_relevance, postprocess, output, contrast, traced, ...: See
            :class:`CompositeAttribution`.
    """

    _name = "Relative LRP"

    def __init__(
        self, model: Module, cardinality: str = "constant",
        normalization: str = "signed", batch_norm: str = "merge",
        layer_map: Optional[LayerMap] = None, canonizers: Optional[list[Any]] = None, *,
        initial_relevance: InitialRelevance = None, postprocess: Postprocess = None,
        output: Output = None, contrast: Contrast = None, contrast_weight: float = 1.0,
        traced: bool = False,
    ) -> None:
        composite = composites.RelativeLRP(
            cardinality, normalization, batch_norm, layer_map, canonizers
        )
        super().__init__(
            model, composite, initial_relevance, postprocess, output, contrast,
            contrast_weight, traced,
        )


class C3LRP(CompositeAttribution):
    r"""C³-LRP (Doublet et al.): a block as one layer, then contour and component.

    A block with input z, output z' and Jacobian J propagates :math:`R_z = z \odot J^T
    (R_{z'} / z')`, Eqs. (1) and (2). The heatmap is then restricted to what the
    interior of its largest contour and its largest component have in common. Without
    that (`postprocess=None`), it is Gradient × Input up to a factor, for inputs of any
    shape. The delta is what biases absorb, and what was cut off.

    Args:
        epsilon, mode, blocks, layer_map, canonizers: See
            :class:`zennit_resnet.composites.BlockLRP`.
        model, postprocess, initial_relevance, output, contrast, traced, ...: See
            :class:`CompositeAttribution`.
    """

    _name = "C3-LRP"

    def __init__(
        self, model: Module, epsilon: Stabilizer = 1e-6, mode: str = "sign",
        blocks: Any = None, layer_map: Optional[LayerMap] = None,
        canonizers: Optional[list[Any]] = None, *, postprocess: Postprocess = "c3",
        initial_relevance: InitialRelevance = None, output: Output = None,
        contrast: Contrast = None, contrast_weight: float = 1.0, traced: bool = False,
    ) -> None:
        composite = composites.BlockLRP(epsilon, mode, blocks, layer_map, canonizers)
        super().__init__(
            model, composite, initial_relevance, postprocess, output, contrast,
            contrast_weight, traced,
        )
