'''All examples in docstrings of captum_adapters run.'''
import doctest
import importlib
import pkgutil

import pytest

import captum_adapters
import captum_adapters.attr
import captum_adapters.metrics

MODULES = sorted(
    f'{package.__name__}.{info.name}'
    for package in (captum_adapters, captum_adapters.attr, captum_adapters.metrics)
    for info in pkgutil.iter_modules(package.__path__)
    if not info.ispkg and info.name not in ('__main__', 'cli')
)
# without any public name that could have an example, or with those of another module
WITHOUT = (
    '_compat', '_forward', '_light', '_perturbation', '_propagation', '_validation', 'curves', 'metrics.statistics'
)
OPTIONAL = {'score_cam': 'torchcam', 'torchmetrics': 'torchmetrics'}


@pytest.mark.parametrize('name', MODULES)
def test_examples(name):
    '''The examples in docstrings are right.'''
    last = name.rpartition('.')[2]
    if last in OPTIONAL:
        pytest.importorskip(OPTIONAL[last])
    result = doctest.testmod(importlib.import_module(name), globs={}, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0 and (result.attempted or name.endswith(WITHOUT))
