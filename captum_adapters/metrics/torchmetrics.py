"""Metrics over data sets, for loops and trainers that use torchmetrics.

Each class computes one of the functions of :mod:`captum_adapters.metrics` batch by
batch, and keeps the result of every example together with its identity. In distributed
evaluation, the results of all processes are put together, and examples that a sampler
has repeated to give all processes the same number are counted once.
"""

import inspect
import zlib
from typing import Any, Callable, ClassVar, Generic, Optional, Sequence, TypeVar, Union

import torch
from torch import Tensor

from captum_adapters._validation import TargetType, as_argument, positive_integer
from captum_adapters.metrics._ranking import check_ids, percent_list, top_counts
from captum_adapters.metrics.conservation import conservation_gap
from captum_adapters.metrics.insertion_deletion import (
    InsertionDeletion,
    insertion_deletion,
)
from captum_adapters.metrics.localization import (
    MaskDistance,
    MaskPointing,
    mask_distance,
    mask_pointing,
)
from captum_adapters.metrics.pixel_accuracy import PixelAccuracy, pixel_accuracy

try:
    from torchmetrics import Metric
    from torchmetrics.utilities import dim_zero_cat
except ModuleNotFoundError as error:
    raise ImportError(
        "captum_adapters.metrics.torchmetrics needs torchmetrics, which is optional:"
        ' pip install "zennit-resnet[metrics]"'
    ) from error

Result = TypeVar("Result")
SampleIds = Union[Tensor, Sequence[int]]
TensorOrTuple = Union[Tensor, tuple[Tensor, ...]]

# Fields that have no row for each example
SHARED = ("counts", "percents")


class Accumulated(Generic[Result]):
    """Results of all examples, in the order of their identities.

    Attributes:
        sample_ids (Tensor): Identities of the examples in ascending order, each once,
            of shape (examples,).
        scores (NamedTuple or Tensor): What the metric's function returns, with a row
            for each of these examples.
    """

    # torchmetrics would turn rows of a single example into numbers in a named tuple, or in
    # a dataclass
    def __init__(self, sample_ids: Tensor, scores: Result) -> None:
        self.sample_ids = sample_ids
        self.scores = scores

    def __repr__(self) -> str:
        return f"Accumulated(sample_ids={self.sample_ids}, scores={self.scores})"


def _gather(tensor: Tensor, group: Optional[Any] = None) -> list[Tensor]:
    """Tensors of all processes with examples, which others lack the type and shape of."""
    gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(gathered, tensor.detach().cpu(), group)
    tensors = [other.to(tensor.device) for other in gathered if other.numel()]
    _check_points(tensors)
    return tensors or [tensor]


def _check_points(tensors: Sequence[Tensor]) -> None:
    """Refuse rows of different lengths, which only curves can have."""
    # shorter ones are not padded, since points are equally far apart in protocols
    lengths = sorted({tensor.shape[1] for tensor in tensors if tensor.ndim > 1})
    if len(lengths) > 1:
        raise ValueError(
            f"Curves have {' and '.join(map(str, lengths))} points, as images differ in"
            " size: resize images to one size, or use one metric for each size."
        )


def _check_numbers(options: dict[str, Any]) -> None:
    """Refuse numbers that fit no image, before there is any."""
    for name in ("n_steps", "step", "n_orders", "max_examples_per_batch"):
        if options.get(name) is not None:
            positive_integer(name, options[name])
    if "percents" in options:
        options["percents"] = tuple(percent_list(options["percents"]))
        top_counts(options["percents"], 100)


class _PerExample(Metric, Generic[Result]):
    """A function of batches, with all its results."""

    full_state_update = False
    is_differentiable = False

    # set by subclasses
    function: ClassVar[Callable[..., Any]]
    result_type: ClassVar[type]

    sample_ids: Union[Tensor, list[Tensor]]

    def __init__(self, **options: Any) -> None:
        known = set(inspect.signature(type(self).function).parameters)
        known -= set(inspect.signature(self.update).parameters)
        chosen = {key: options.pop(key) for key in sorted(known & options.keys())}
        options.setdefault("dist_sync_fn", _gather)
        super().__init__(**options)
        _check_numbers(chosen)
        self.options = chosen
        self.fields = getattr(self.result_type, "_fields", ("values",))
        # MetricCollection takes metrics with equal states for the same metric. The text of
        # a large tensor leaves most of it out.
        given = [(key, as_argument(value, key)) for key, value in chosen.items()]
        given = [(key, v.tolist() if isinstance(v, Tensor) else v) for key, v in given]
        settings = torch.tensor(zlib.crc32(repr(given).encode()))
        self.add_state("settings", settings, dist_reduce_fx="max")
        for name in ("sample_ids", *self.fields):
            self.add_state(name, [], dist_reduce_fx="cat")

    def _append(self, sample_ids: SampleIds, /, *args: Any, **kwargs: Any) -> None:
        """Compute the function for a batch, and keep its result."""
        ids = torch.as_tensor(as_argument(sample_ids, "sample_ids"))
        if ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                "sample_ids must be integers of shape (batch,), but are of shape"
                f" {tuple(ids.shape)} and {ids.dtype}."
            )
        result = type(self).function(*args, **kwargs, **self.options)
        rows = (result,) if isinstance(result, Tensor) else result
        batch = len(check_ids(ids, len(rows[0])) or ())
        values = dict(zip(self.fields, rows))
        for name, value in values.items():
            if name in SHARED:
                values[name] = value.expand(batch, -1)
            _check_points([*getattr(self, name)[-1:], values[name]])
        for name, value in {**values, "sample_ids": ids.long()}.items():
            getattr(self, name).append(value.to(self.device))

    def compute(self) -> Accumulated[Result]:
        """The results of all batches and processes, with each identity once."""
        if len(self.sample_ids) == 0:
            raise ValueError("There are no results: call update before compute.")
        ids, order = dim_zero_cat(self.sample_ids).sort(stable=True)
        first = torch.ones_like(ids, dtype=torch.bool)
        first[1:] = ids[1:] != ids[:-1]
        order = order[first]
        values = []
        for name in self.fields:
            states = getattr(self, name)
            # those of forward and merge_state are not checked before
            _check_points(states if isinstance(states, list) else [states])
            value = dim_zero_cat(states)[order]
            # numbers of pixels depend on the size of images, which may differ
            if name in SHARED and bool((value == value[0]).all()):
                value = value[0]
            values.append(value)
        is_tensor = self.result_type is Tensor
        scores: Any = values[0] if is_tensor else self.result_type(*values)
        return Accumulated(sample_ids=ids[first], scores=scores)


class _OfNetwork(_PerExample[Result]):
    """Metrics that evaluate a network."""

    def update(
        self, sample_ids: SampleIds, forward_func: Callable[..., Any],
        inputs: TensorOrTuple, attributions: TensorOrTuple, target: TargetType = None,
        additional_forward_args: object = None,
    ) -> None:
        """Add a batch, as the function takes it, with an identity for each example.

        The identities are integers of shape (batch,), such as indices in the data set,
        on which random orders of ties depend. A ValueError is raised as by the
        function, or if curves have another number of points than those before.
        """
        # random orders of ties depend on the identities, too
        self._append(
            sample_ids, forward_func, inputs, attributions, sample_ids=sample_ids,
            target=target, additional_forward_args=additional_forward_args,
        )


class _OfMasks(_PerExample[Result]):
    """Metrics that compare maps with masks."""

    def update(
        self, sample_ids: SampleIds, attributions: TensorOrTuple, masks: Tensor
    ) -> None:
        """Add a batch: identities of shape (batch,), and arguments of the function."""
        self._append(sample_ids, attributions, masks)


class InsertionDeletionMetric(_OfNetwork[InsertionDeletion]):
    """:func:`captum_adapters.metrics.insertion_deletion` over a data set.

    All curves must have the same number of points, which depends on the number of
    pixels: by default, there are 101 for an even number, and 102 for an odd one. Resize
    images to one size, or use one metric for each size.

    Args:
        **options (Any): Keyword arguments of the function, such as `n_steps` and
            `baselines`, and of :class:`torchmetrics.Metric`.

    Examples:
        >>> import torch
        >>> from captum_adapters.metrics.torchmetrics import InsertionDeletionMetric
        >>> metric = InsertionDeletionMetric(n_steps=4)
        >>> for sample_ids in torch.arange(6).split(2):
        ...     images = torch.rand(2, 1, 4, 4)
        ...     metric.update(sample_ids, lambda x: x.mean((1, 2, 3)), images, images)
        >>> result = metric.compute()
        >>> result.sample_ids, result.scores.insertion.shape
        (tensor([0, 1, 2, 3, 4, 5]), torch.Size([6]))
    """

    function, result_type = insertion_deletion, InsertionDeletion


class PixelAccuracyMetric(_OfNetwork[PixelAccuracy]):
    """:func:`captum_adapters.metrics.pixel_accuracy` over a data set, as above."""

    function, result_type = pixel_accuracy, PixelAccuracy


class MaskPointingMetric(_OfMasks[MaskPointing]):
    """:func:`captum_adapters.metrics.mask_pointing` over a data set, as above."""

    function, result_type = mask_pointing, MaskPointing


class MaskDistanceMetric(_OfMasks[MaskDistance]):
    """:func:`captum_adapters.metrics.mask_distance` over a data set, as above."""

    function, result_type = mask_distance, MaskDistance


class ConservationGapMetric(_PerExample[Tensor]):
    """:func:`captum_adapters.metrics.conservation_gap` over a data set, as above."""

    function, result_type = conservation_gap, Tensor

    def update(
        self, sample_ids: SampleIds, attributions: TensorOrTuple,
        initial: Union[int, float, Tensor], sinks: Any = None,
    ) -> None:
        """Add a batch: identities of shape (batch,), and arguments of the function."""
        self._append(sample_ids, attributions, initial, sinks)
