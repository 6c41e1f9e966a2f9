import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import guidance, samplers
from diffjax.diffusion.gaussian import gaussian_diffusion

NULL = 10
LABELS = jnp.array([3, 7])
X = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))
T = jnp.array([500.0, 20.0])


def labelled(x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
    """Twice the channels of x, different for each label and time."""
    phase = (0.1 * y + 0.001 * t)[:, None, None, None]
    return jnp.concatenate([jnp.sin(x + phase), jnp.cos(2.0 * x - phase)], axis=-1)


CONDITIONAL = labelled(X, T, LABELS)
UNCONDITIONAL = labelled(X, T, jnp.full_like(LABELS, NULL))


@pytest.mark.parametrize("channels, guided", [(None, 4), (3, 3), (8, 8)])
def test_only_the_chosen_channels_are_guided(channels, guided):
    output = guidance.classifier_free(labelled, LABELS, NULL, 1.5, channels)(X, T)
    expected = UNCONDITIONAL + 1.5 * (CONDITIONAL - UNCONDITIONAL)
    np.testing.assert_allclose(output[..., :guided], expected[..., :guided], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(output[..., guided:], CONDITIONAL[..., guided:])


def test_scale_one_is_the_conditional_output_without_a_doubled_batch():
    sizes = []

    def counting(x, t, y):
        sizes.append(len(x))
        return labelled(x, t, y)

    np.testing.assert_array_equal(guidance.classifier_free(counting, LABELS, NULL, 1.0, 3)(X, T), CONDITIONAL)
    guidance.classifier_free(counting, LABELS, NULL, 4.0)(X, T)
    assert sizes == [2, 4]


@pytest.mark.parametrize("scale, expected", [(0.0, UNCONDITIONAL), (1.0, CONDITIONAL)])
def test_combine_runs_from_one_prediction_to_the_other(scale, expected):
    np.testing.assert_allclose(guidance.combine(CONDITIONAL, UNCONDITIONAL, scale), expected, atol=1e-6)


def test_scale_may_be_traced():
    guided = jax.jit(lambda scale: guidance.classifier_free(labelled, LABELS, NULL, scale, 3)(X, T))
    expected = guidance.classifier_free(labelled, LABELS, NULL, 2.5, 3)(X, T)
    np.testing.assert_allclose(guided(2.5), expected, atol=1e-6)


def test_a_guided_denoiser_drives_a_sampler():
    """Guidance on a model that ignores labels changes nothing."""
    process = gaussian_diffusion(respacing="5")
    blind = lambda x, t, y: labelled(x, t, jnp.zeros_like(y))  # noqa: E731
    plain, guided = (
        samplers.ddim(process, guidance.classifier_free(blind, LABELS, NULL, scale), X) for scale in (1, 4.0)
    )
    np.testing.assert_allclose(guided, plain, atol=1e-5)
