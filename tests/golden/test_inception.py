"""The 2015 Inception-v3 against stored outputs of torch-fidelity's and pytorch-fid's, and TensorFlow's resizing."""

import functools
import json
import os
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.frozen.inception import SIDE
from diffjax.frozen.inception import pooled as pool
from diffjax.ops.resize import legacy_bilinear
from diffjax.weights import from_reference, to_reference
from tests import slow
from tests.golden.cases import ORACLES
from tests.programs import ROOT

pytestmark = pytest.mark.golden
FOLDER = ORACLES / "evaluation"
TOLERANCES = {"pool64": 1e-5, "pool192": 1e-5, "pool768": 1e-5, "tap_mixed_7b": 1e-4, "tap_mixed_7c": 1e-4}
TOLERANCE = 5e-5  # of all others; of the largest entry


@functools.cache
def arrays(name):
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


def prefixes(name, ending):
    """What stands before `ending` in the keys of a file; a name that fails where there is no such file."""
    if not (FOLDER / f"{name}.npz").is_file():
        return ["no-such-file"]
    return sorted({key.removesuffix(ending) for key in arrays(name) if key.endswith(ending)})


SIZES = prefixes("inception", "__pool3")


@functools.cache
def state_dict():
    """Every weight drawn from a generator that its own name seeds, checked against the stored sums."""
    info = json.loads((FOLDER / "inception.json").read_text())
    weights = {name: drawn(info["tag"], name, shape) for name, shape in info["parameter_shapes"].items()}
    for name, check in info["checks_of_generated_parameters"].items():
        found = weights[name].astype(np.float64)
        np.testing.assert_allclose(found.sum(), check["sum_float64"], rtol=1e-6, atol=1e-3)
        np.testing.assert_allclose(found.ravel()[:3], check["first3"], rtol=1e-6)
    return weights


def drawn(tag, name, shape):
    g = np.random.default_rng(zlib.crc32(f"{tag}/{name}".encode()))
    if name.endswith("conv.weight"):
        array = g.standard_normal(shape) * (1.65 / np.sqrt(np.prod(shape[1:])))
        array = array - 0.6 * array.mean(axis=(1, 2, 3), keepdims=True)
    elif name == "fc.weight":
        array = g.standard_normal(shape) / np.sqrt(2048)
    elif name.endswith("bn.weight"):
        array = 0.8 + 0.4 * g.random(shape)
    elif name.endswith("running_var"):
        array = 0.5 + g.random(shape)
    else:
        array = 0.1 * g.standard_normal(shape)
    return array.astype(np.float32)


@functools.cache
def found(size, inputs="tensorflow"):
    """Everything that is stored of the images of a size, by its name."""
    module, params = from_reference("inception", state_dict())
    module = module.clone(inputs=inputs)

    @jax.jit
    def run(params, images):
        out, captured = module.apply({"params": params}, images, capture_intermediates=True)
        state = {name: value["__call__"][0] for name, value in captured["intermediates"].items() if name != "__call__"}
        maps = {
            "maxpool_1": pool(state["Conv2d_2b_3x3"], "halved"),
            "maxpool_2": pool(state["Conv2d_4a_3x3"], "halved"),
            **{name.lower(): value for name, value in state.items() if name.startswith("Mixed")},
        }
        means = {"pool64": "maxpool_1", "pool192": "maxpool_2", "pool768": "mixed_6e"}
        return (
            out._asdict()
            | {n: maps[m].mean((1, 2)) for n, m in means.items()}
            | {
                **{f"tap_{name}": value[:, :6, :6, :16] for name, value in maps.items()},
                **{f"shape_{name}": jnp.array(value.shape) for name, value in maps.items()},
            }
        )

    return jax.device_get(run(params, arrays("inception")[f"images{size}"]))


NAMES = (
    *("pool64", "pool192", "pool768", "pool3", "spatial", "logits_unbiased", "logits"),
    *(f"tap_{name}" for name in ("maxpool_1", "mixed_5d", "mixed_6e", "mixed_7b", "mixed_7c")),
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", slow.but(SIZES[:1], SIZES))
def test_inception_outputs_and_taps(size, name):
    stored = arrays("inception")[f"{size}__{name}"]
    np.testing.assert_allclose(
        found(size)[name], stored, rtol=0, atol=TOLERANCES.get(name, TOLERANCE) * np.abs(stored).max()
    )
    if name.startswith("tap_"):
        shape = name.replace("tap", "shape")
        np.testing.assert_array_equal(found(size)[shape], arrays("inception")[f"{size}__{shape}"])


@pytest.mark.parametrize("name", ["pool3", "spatial", "logits_unbiased"])
@pytest.mark.parametrize("size", slow.but(SIZES[:1], SIZES))
def test_inception_against_float64(size, name):
    stored = arrays("inception")[f"{size}__{name}_f64"]
    np.testing.assert_allclose(found(size)[name], stored, rtol=0, atol=TOLERANCE * np.abs(stored).max())


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_inception_fed_as_pytorch_fid_does(size):
    stored = arrays("inception")[f"{size}__pool3_pytorch_fid"]
    other = found(size, "pytorch-fid")["pool3"]
    np.testing.assert_allclose(other, stored, rtol=0, atol=TOLERANCE * np.abs(stored).max())
    assert np.abs(found(size)["pool3"] - stored).max() > 100 * TOLERANCE * np.abs(stored).max()


def test_inception_weights_come_back():
    module, params = from_reference(
        "inception", state_dict() | {"Mixed_5b.branch1x1.bn.num_batches_tracked": np.array(3)}
    )
    back = to_reference("inception", module, params)
    assert back.keys() == state_dict().keys()
    assert len(back) == 472
    for key, value in back.items():
        np.testing.assert_array_equal(value, state_dict()[key], err_msg=key)


@pytest.mark.parametrize("size", prefixes("resize_tf1", "__input"))
def test_resize_as_tensorflow_1_bit_for_bit(size):
    stored = {k.removeprefix(f"{size}__"): v for k, v in arrays("resize_tf1").items() if k.startswith(f"{size}__")}
    out = np.asarray(jax.jit(lambda x: legacy_bilinear(x, SIDE, SIDE))(stored["input"]))
    parts = {
        "out_topleft": out[:, :20, :20],
        "out_bottomright": out[:, -20:, -20:],
        "out_row151": out[:, 151],
        "out_col7": out[:, :, 7],
    }
    for name, part in parts.items():
        np.testing.assert_array_equal(part, stored[name], err_msg=name)
    np.testing.assert_allclose(out.mean((1, 2), dtype=np.float64), stored["out_mean"], rtol=1e-12)


@pytest.mark.slow
def test_resize_as_compilers_make_it_for_users():
    """Without the flags of the tests, under which nothing is fused."""
    code = f"""
import jax, numpy as np
from diffjax.ops.resize import legacy_bilinear
arrays = np.load({str(FOLDER / "resize_tf1.npz")!r})
for size in ("64x64", "320x320"):
    out = np.asarray(jax.jit(lambda x: legacy_bilinear(x, {SIDE}, {SIDE}))(arrays[size + "__input"]))
    np.testing.assert_array_equal(out[:, 151], arrays[size + "__out_row151"])
    np.testing.assert_array_equal(out[:, :, 7], arrays[size + "__out_col7"])
"""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_resize_of_the_network_s_own_images():
    stored = arrays("inception")
    out = np.asarray(legacy_bilinear(jnp.asarray(stored["images64"]), SIDE, SIDE))
    np.testing.assert_array_equal(out[:, :12, :12], stored["64__resized_crop_topleft"])
    np.testing.assert_array_equal(out[:, -12:, -12:], stored["64__resized_crop_bottomright"])
    np.testing.assert_array_equal(out[:, 150], stored["64__resized_row150"])
    whole = jnp.asarray(stored["images299"])
    np.testing.assert_array_equal(legacy_bilinear(whole, SIDE, SIDE), whole)
