"""What the TPU compiler says of the scan: it takes the kernels, within its memory, and they need nothing besides."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from diffjax.ops.pallas import selective_scan_tpu as kernels
from diffjax.ops.recurrence import Inputs
from diffjax.ops.selective_scan import selective_scan
from tests import tpu

STATES = 16
pytestmark = pytest.mark.slow


def shapes(b, tokens, e, dtype=jnp.bfloat16, options=("D", "z", "bias")):
    """(inputs, starts, d_out, d_last) of the pair, as shapes."""
    of = jax.ShapeDtypeStruct
    wide, narrow, channels = of((b, tokens, e), dtype), of((b, tokens, STATES), dtype), of((e,), jnp.float32)
    optional = {"D": channels, "z": wide, "bias": channels}
    optional = {name: x if name in options else None for name, x in optional.items()}
    inputs = Inputs(u=wide, delta=wide, A=of((STATES, e), jnp.float32), B=narrow, C=narrow, **optional)
    chunk, _ = kernels.sizes(tokens, e, STATES)
    starts = of((b, -(-tokens // chunk), STATES, e), jnp.float32)
    return inputs, starts, wide, of((b, STATES, e), jnp.float32)


def compiled(generation, arguments, reverse=False):
    """The compiled forward and backward pass for one chip; each fails beyond the default limit of VMEM.

    At the border of a program XLA would lay out an array of 258 tokens with the batch inside, and turn it; inside a
    model it chooses what the kernel wants. So the big arrays come and go in the order of their axes here.
    """
    mesh = tpu.mesh(generation)
    programs = []
    for run, given in ((kernels.forward, arguments[:1]), (kernels.backward, arguments)):
        run = functools.partial(run, softplus=True, reverse=reverse)
        given = tpu.placed(mesh, given)
        results = tpu.in_order(tpu.placed(mesh, jax.eval_shape(run, *given)))
        jitted = jax.jit(run, out_shardings=jax.tree.map(lambda x: x.format, results))
        programs.append(jitted.lower(*tpu.in_order(given)).compile())
    return programs


@pytest.mark.parametrize("generation", ["v5e", "v6e"])
@pytest.mark.parametrize("shape", [(8, 264, 1536), (8, 1056, 3072), (8, 258, 1536), (8, 1026, 3072)], ids=str)
def test_passes_need_no_memory_besides_their_arguments_and_results(generation, shape):
    arguments = shapes(*shape)
    for program in compiled(generation, arguments):
        assert program.memory_analysis().temp_size_in_bytes == 0
        # Of the whole arrays only the narrow B and C may be laid out anew on the way in or out.
        b, tokens, e = shape
        assert not re.search(rf"bf16\[{b},{tokens},{e}\]\S* (copy|pad|reverse|slice)", program.as_text())


@pytest.mark.parametrize(
    "shape, dtype, options, reverse",
    [
        ((2, 1, 5), jnp.float32, (), False),
        ((2, 7, 130), jnp.bfloat16, ("z",), True),
        ((2, 1026, 640), jnp.bfloat16, ("D", "bias"), True),
        ((8, 1056, 3072), jnp.float32, ("D", "z", "bias"), True),
    ],
    ids=str,
)
def test_any_length_width_and_direction_compiles(shape, dtype, options, reverse):
    compiled("v5e", shapes(*shape, dtype, options), reverse)


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 2}, {"data": 4}], ids=str)
def test_chips_scan_their_own_part_and_only_sums_cross(sizes):
    mesh = tpu.mesh("v5e", **sizes)
    inputs, *_ = shapes(8, 264, 1536)
    names = {"delta_bias" if name == "bias" else name: x for name, x in inputs._asdict().items()}
    names["A"] = jax.ShapeDtypeStruct((1536, STATES), jnp.float32)
    wide, narrow, channels = P("data", None, "tensor"), P("data"), P("tensor")
    specs = {name: wide if name in ("u", "delta", "z") else narrow if name in "BC" else channels for name in names}
    with jax.set_mesh(mesh):
        gradients = jax.jit(jax.grad(lambda x: jnp.sum(selective_scan(**x).astype(jnp.float32)), allow_int=False))
        program = gradients.lower(tpu.placed(mesh, names, specs)).compile()
    collectives = re.findall(r"= (\S.*?) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", program.as_text())
    assert {kind for _, kind in collectives} == {"all-reduce"}, collectives
    summed = "".join(result for result, _ in collectives)
    assert ("[4,264,16]" in summed) == ("tensor" in sizes), "dB and dC are summed over the channels' chips alone"
    assert "264,768" not in summed
    assert "264,1536" not in summed
    assert program.as_text().count("tpu_custom_call") == 2
