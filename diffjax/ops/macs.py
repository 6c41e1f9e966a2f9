"""Counted multiply-accumulates of a traced function: matrix products and convolutions only.

The "GFLOPs" of the DiT family of papers are these multiply-accumulates; floating point operations are twice as many.
The compiler's own cost analysis counts the body of a scanned model once, so it cannot be used for this.
"""

import math
from collections.abc import Callable
from typing import Any

import jax


def count_macs(function: Callable, *args: Any) -> int:
    """Multiply-accumulates of `function(*args)`; arguments may be `jax.ShapeDtypeStruct`s, nothing is computed."""
    return _jaxpr_macs(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr_macs(jaxpr: Any) -> int:
    return sum(_equation_macs(equation) for equation in jaxpr.eqns)


def _equation_macs(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs, out = equation.invars[0].aval, equation.outvars[0].aval
        return math.prod(out.shape) * math.prod(lhs.shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        rhs, out = equation.invars[1].aval, equation.outvars[0].aval
        out_features = rhs.shape[params["dimension_numbers"].rhs_spec[0]]
        return math.prod(out.shape) * math.prod(rhs.shape) // out_features
    if name == "while":
        raise ValueError("a while loop has no static trip count; count its body alone")
    inner = [_jaxpr_macs(j) for value in params.values() for j in _jaxprs_in(value)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _jaxprs_in(value: Any) -> list[Any]:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return [getattr(v, "jaxpr", v) for v in values if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
