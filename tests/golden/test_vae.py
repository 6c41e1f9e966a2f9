"""The autoencoders against stored outputs of the public classes."""

import functools

import jax
import numpy as np
import pytest

from diffjax.frozen import vae
from diffjax.weights import from_reference
from tests.golden.cases import cases, to_nchw, to_nhwc

pytestmark = pytest.mark.golden
ATOL = 5e-5

KL = pytest.mark.parametrize("case", cases("vae", "moments_nchw"))
TINY = pytest.mark.parametrize("case", cases("vae", "decoded_of_encoded_nchw"))
ANY = pytest.mark.parametrize("case", cases("vae", "image_nchw"))


def family(case):
    return "vae" if "moments_nchw" in case.arrays else "tiny_vae"


@functools.cache
def load(case):
    assert case is not None, "no stored cases"
    return from_reference(family(case), case.state_dict, **case.info["config"])


def run(case, key, method=None):
    """What the network makes of a stored array, NCHW."""
    module, params = load(case)
    with jax.default_matmul_precision("highest"):
        out = jax.jit(functools.partial(module.apply, method=method))({"params": params}, to_nhwc(case.arrays[key]))
    return jax.tree.map(to_nchw, out)


def close(case, found, key):
    np.testing.assert_allclose(found, case.arrays[key], rtol=0, atol=ATOL, err_msg=key)


@ANY
def test_the_number_of_parameters(case):
    _, params = load(case)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == case.info["num_params"]


@KL
def test_moments(case):
    mean, log_variance = run(case, "image_nchw", "encode")
    close(case, mean, "mean_nchw")
    close(case, log_variance, "logvar_nchw")
    close(case, np.exp(log_variance / 2), "std_nchw")


@KL
def test_latents(case):
    z, (module, _) = case.arrays["sample_nchw"], load(case)
    scale = case.info["config"]["scaling_factor"]
    np.testing.assert_allclose(module.from_latent(z * scale), z, rtol=0, atol=ATOL)


@KL
def test_decoded(case):
    close(case, run(case, "latent_nchw", "decode"), "decoded_nchw")
    close(case, run(case, "image_nchw"), "reconstruction_of_mean_nchw")


@TINY
def test_tiny(case):
    latents, log_variance = run(case, "image_nchw", "encode")
    close(case, latents, "latents_nchw")
    assert (log_variance == vae.LOWEST).all()
    close(case, run(case, "latent_nchw", "decode"), "decoded_nchw")
    close(case, run(case, "image_nchw"), "decoded_of_encoded_nchw")
