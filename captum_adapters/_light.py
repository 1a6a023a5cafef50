"""What metrics share with reports, which start without PyTorch."""

import operator
from collections.abc import Collection
from typing import Any

# Percentages at which the curves of the R-LRP paper are drawn
PERCENTS = (1, 5, 10, 15, 20, 25, 40, 50, 60, 75, 80, 85, 90, 95, 99)


def positive_integer(name: str, value: Any, more: str = "") -> int:
    """Check a number of something, `more` being added to the message."""
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    # NumPy's booleans are no index
    if isinstance(value, bool) or number < 1:
        raise ValueError(f"{name}={value!r} is not a positive integer{more}.")
    return number


def check_choice(name: str, value: Any, choices: Collection[object]) -> None:
    """Raise an error which names the argument, its value and the choices."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}.")
