"""Which tests `-m "not slow"` leaves out: those that take seconds, where fast ones test the like or the parts."""

from collections.abc import Iterable

import pytest


def but(fast: Iterable, values: Iterable) -> list:
    """pytest parameters of `values`, a tuple being the values of one test; all but the `fast` ones are slow."""
    fast, values = list(fast), list(values)
    if unknown := [value for value in fast if value not in values]:
        raise ValueError(f"fast: {unknown} are none of {values}")
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=() if value in fast else pytest.mark.slow
        )
        for value in values
    ]
