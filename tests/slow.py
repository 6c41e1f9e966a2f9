"""Which tests `-m "not slow"` leaves out: those that take seconds where the fast tests hold another of their kind."""

from collections.abc import Iterable

import pytest


def but(fast: Iterable, values: Iterable) -> list:
    """pytest parameters of `values`, a tuple being the values of one test; all but the `fast` ones are slow."""
    fast = list(fast)
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)), marks=() if value in fast else pytest.mark.slow
        )
        for value in values
    ]
