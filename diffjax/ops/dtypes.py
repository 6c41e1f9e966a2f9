"""The dtypes that the networks compute in."""

from typing import Annotated

import jax.numpy as jnp

from diffjax.options import Leaf, one_of

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
Dtype = Annotated[str, Leaf("compute dtype; parameters are always float32", "compute", one_of(DTYPES))]
