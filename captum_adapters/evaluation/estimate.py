"""How long an evaluation takes, without doing it.

Attributions are timed on one image, and so is a forward pass. The passes that metrics
and perturbation methods need are counted, and not done.
"""

import time
from collections.abc import Callable, Sequence
from typing import Optional

import torch
from torch import Tensor

from captum_adapters.evaluation.computation import Computation, failure
from captum_adapters.evaluation.methods import CONTROLS, OTHERS, Method
from captum_adapters.evaluation.metrics import Batch, measure

# images in the pass that is timed on a processor, where more are hardly faster by image
PASS = 2
# further maps of a method that metrics ask for
FURTHER = {"grid_pointing": 1, "class_sensitivity": 1, "randomization": 2}


class _Counter:
    """Stands for a network: counts images, and takes them for equal."""

    def __init__(self, output: Tensor) -> None:
        self.output, self.count = output, 0

    def __call__(self, images: Tensor) -> Tensor:
        self.count += len(images)
        return self.output.expand(len(images), -1)


class Estimate:
    """Times of methods and metrics, which are not compiled, for a batch of one image."""

    def __init__(self, computation: Computation, batch: Batch) -> None:
        self.computation, self.batch = computation, batch
        settings = computation.metric_settings
        self.images = settings.forward_batch
        if computation.device.type == "cpu":
            self.images = min(PASS, self.images)
        self.passes = self._time_pass(computation.forward, batch.images)
        # other networks give their own time for each pass
        self.others = {
            name: (adapt, self._time_pass(forward, adapt(batch.images)))
            for name, (forward, adapt) in settings.others.items()
        }

    def _seconds(self, function: Callable[[], object]) -> float:
        """Time of a call on the device."""
        self.computation.synchronize()
        begin = time.perf_counter()
        function()
        self.computation.synchronize()
        return time.perf_counter() - begin

    def _time_pass(self, forward: Callable[[Tensor], Tensor], image: Tensor) -> float:
        """Seconds of an image in a forward pass."""
        images = image.expand(self.images, -1, -1, -1).clone()
        with torch.no_grad():
            return self._seconds(lambda: forward(images)) / len(images)

    def method(self, method: Method) -> tuple[float, float]:
        """Seconds of a method's attribution of an image, and of its metrics."""
        computation, batch = self.computation, self.batch
        explainer = computation.explainers[method.text]
        count = OTHERS[method.name].passes if method.name in OTHERS else None
        # a map like any other, if it would take long
        maps = CONTROLS["random"](batch.images, batch.names, computation.classifier.std)
        sums: tuple[Optional[Tensor], ...] = (None, None)
        try:
            if count is not None:
                seconds = self.passes * count(computation.context, **method.options)
            else:
                found, seconds = computation.attribute(method, batch)
                maps, sums = found.maps, (found.total, found.initial)
            maps = explainer.process(maps)
        except Exception as error:
            raise failure(method, batch, error) from error
        names: Sequence[str] = computation.evaluation.metrics
        further = sum(FURTHER.get(name, 0) for name in names) * seconds
        names = [name for name in names if name not in FURTHER]
        network = _Counter(batch.output)
        counters = {name: _Counter(batch.output) for name in self.others}
        others = {name: (counters[name], adapt) for name, (adapt, _) in self.others.items()}
        settings = computation.metric_settings._replace(others=others)
        with torch.no_grad():
            rest = self._seconds(lambda: measure(names, network, batch, maps, settings, *sums))
        counted = network.count * self.passes
        counted += sum(counters[name].count * cost for name, (_, cost) in self.others.items())
        return seconds, further + rest + counted
