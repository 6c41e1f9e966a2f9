"""Float64 for the stored float64 cases, without it leaking into other tests.

with float64():
    x = jnp.asarray(stored)  # keeps its float64
"""

from contextlib import AbstractContextManager

import jax


def float64() -> AbstractContextManager:
    """Within it jax arrays may be float64; compiled functions are kept apart from those of outside."""
    return jax.enable_x64(True)
