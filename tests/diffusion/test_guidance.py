import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.contracts import Condition
from diffjax.diffusion import guidance, samplers
from diffjax.diffusion.gaussian import gaussian_diffusion
from diffjax.errors import UserError
from tests import trajectories

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
    output = guidance.classifier_free(labelled, LABELS, NULL, channels=channels)(X, T, 1.5)
    expected = UNCONDITIONAL + 1.5 * (CONDITIONAL - UNCONDITIONAL)
    np.testing.assert_allclose(output[..., :guided], expected[..., :guided], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(output[..., guided:], CONDITIONAL[..., guided:])


@pytest.mark.parametrize("scale, expected", [(0.0, UNCONDITIONAL), (1.0, CONDITIONAL)])
def test_combine_runs_from_one_prediction_to_the_other(scale, expected):
    np.testing.assert_allclose(guidance.combine(CONDITIONAL, UNCONDITIONAL, scale), expected, atol=1e-6)


def test_scale_may_be_traced():
    guided = jax.jit(lambda scale: guidance.classifier_free(labelled, LABELS, NULL, channels=3)(X, T, scale))
    expected = guidance.classifier_free(labelled, LABELS, NULL, channels=3)(X, T, 2.5)
    np.testing.assert_allclose(guided(2.5), expected, atol=1e-6)


def test_a_guided_denoiser_drives_a_sampler():
    """Guidance on a model that ignores labels changes nothing."""
    blind = lambda x, t, y: labelled(x, t, jnp.zeros_like(y))  # noqa: E731
    denoise = guidance.classifier_free(blind, LABELS, NULL)
    schedules = [samplers.schedule(gaussian_diffusion(), "ddim", 5, weight=weight) for weight in (1.0, 4.0)]
    plain, guided = (samplers.sample(schedule, denoise, X, jnp.zeros_like) for schedule in schedules)
    np.testing.assert_allclose(guided, plain, atol=1e-5)


def test_two_calls_give_what_one_call_on_the_doubled_batch_gives():
    one, two = (guidance.classifier_free(labelled, LABELS, NULL, calls=calls)(X, T, 2.5) for calls in ("one", "two"))
    np.testing.assert_allclose(one, two, atol=1e-6)
    with pytest.raises(UserError, match="valid: one, two"):
        guidance.classifier_free(labelled, LABELS, NULL, calls="three")


def test_autoguidance_moves_away_from_the_worse_network():
    better, worse = (lambda x, t: labelled(x, t, LABELS)), (lambda x, t: 0.5 * labelled(x, t, LABELS))
    output = guidance.autoguidance(better, worse, channels=8)(X, T, 3.0)
    np.testing.assert_allclose(output, CONDITIONAL + 2.0 * 0.5 * CONDITIONAL, atol=1e-5)
    alone = guidance.autoguidance(better, worse, skip=True)(X, T, 1.0)
    np.testing.assert_allclose(alone, CONDITIONAL, atol=1e-6)


INTERVAL = guidance.weights("interval", 3.0, low=0.3, high=3.0)


def executed(skip: bool, calls: str, weight) -> tuple[np.ndarray, list[int], samplers.SamplerSchedule]:
    """A sample of EDM's Heun method, and the batch sizes with which the network really ran."""
    sizes = []

    def network(x, t, y):
        jax.debug.callback(lambda _: sizes.append(len(x)), t[0])
        return jnp.tanh(x) + 0.1 * jnp.sin(t + y)[:, None, None, None]

    denoise = guidance.classifier_free(network, LABELS, NULL, calls=calls, skip=skip)
    schedule = samplers.schedule(trajectories.edm(), "edm", 12, weight=weight)
    run = jax.jit(lambda schedule, x: samplers.sample(schedule, denoise, x, jnp.zeros_like))
    sample = np.asarray(run(schedule, X))
    jax.effects_barrier()
    return sample, sizes, schedule


@pytest.mark.parametrize("calls", ["one", "two"])
def test_outside_an_interval_the_unconditional_call_is_skipped(calls):
    """By the calls that a compiled loop makes, and without a change to the samples."""
    everywhere, all_sizes, schedule = executed(False, calls, INTERVAL)
    skipped, sizes, _ = executed(True, calls, INTERVAL)
    total, guided = int(schedule.nfe), int((schedule.table.weight[: schedule.nfe] != 1).sum())
    assert 0 < guided < total
    per_call = {"one": [4], "two": [2, 2]}[calls]
    assert sorted(all_sizes) == sorted(per_call * total)
    assert sorted(sizes) == sorted(per_call * guided + [2] * (total - guided))
    np.testing.assert_allclose(skipped, everywhere, rtol=1e-5, atol=1e-5)
    unguided, _, _ = executed(False, calls, 1.0)
    assert np.abs(unguided - skipped).max() > 1e-3


def test_the_weight_of_a_step_holds_for_both_of_its_calls():
    _, _, schedule = executed(True, "one", INTERVAL)
    weights = schedule.table.weight[: schedule.nfe]
    np.testing.assert_array_equal(weights[0:-1:2], weights[1::2])


def test_ends_of_an_interval_move_to_the_schedule():
    levels = np.array([10.0, 3.1, 1.0, 0.29, 0.1])
    np.testing.assert_array_equal(guidance.interval(levels, 2.0, 0.3, 3.0), [1, 2, 2, 1, 1])
    np.testing.assert_array_equal(guidance.interval(levels, 2.0, 0.3, np.inf), [2, 2, 2, 1, 1])
    np.testing.assert_array_equal(guidance.interval(np.append(np.inf, levels), 2.0, 0.3, 3.0), [1, 1, 2, 2, 1, 1])


def test_an_interval_without_an_end_has_none():
    levels = np.array([10.0, 3.1, 1.0, 0.29, 0.1])
    np.testing.assert_array_equal(guidance.weights("interval", 2.0)(levels, levels), [2, 2, 2, 2, 2])
    np.testing.assert_array_equal(guidance.weights("interval", 2.0, low=0.3)(levels, levels), [2, 2, 2, 1, 1])
    np.testing.assert_array_equal(guidance.weights("interval", 2.0, high=3.0)(levels, levels), [1, 2, 2, 2, 2])


def test_power_cosine_rises_from_noise_to_data():
    weights = guidance.power_cosine(np.array([1.0, 0.5, 0.0]), 4.0, 1.0)
    np.testing.assert_allclose(weights, [1.0, 2.5, 4.0])
    schedule = samplers.schedule(
        gaussian_diffusion(), "ddim", 10, weight=guidance.weights("power_cosine", 4.0, power=1.0)
    )
    assert (np.diff(schedule.table.weight) > 0).all()


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ({"kind": "linear"}, "valid: constant, power_cosine, interval"),
        ({"kind": "interval", "low": 3.0, "high": 1.0}, "low = 3.0 is not below high = 1.0; valid: 0 to below high"),
        ({"kind": "interval", "high": 0.0}, "high = 0.0: valid: above 0$"),
        ({"kind": "interval", "low": "all"}, "low = 'all': valid: a number$"),
        ({"kind": "interval", "power": 2.0}, r"'interval' with power: valid: numbers for \['low', 'high'\]"),
        ({"kind": "constant", "power": 2.0}, r"'constant' with power: valid: numbers for \[\]"),
        ({"kind": "power_cosine", "power": "high"}, "power = 'high': valid: a number$"),
    ],
)
def test_impossible_weights_are_refused(arguments, reason):
    with pytest.raises(UserError, match=reason):
        guidance.weights(arguments.pop("kind"), 2.0, **arguments)


CONDITIONS = {
    "labels": Condition("labels", 10),
    "tokens": Condition("tokens", 50, (3,)),
    "vectors": Condition("vectors", 0, (5,)),
}


@pytest.mark.parametrize("calls", ["one", "two"])
@pytest.mark.parametrize("kind", CONDITIONS)
def test_rows_of_conditions_of_every_kind(kind, calls):
    """With and without, the two rows of an example beside each other: the order that needs no exchange of devices."""
    condition = CONDITIONS[kind]
    given = jnp.asarray(np.random.default_rng(0).uniform(1, 9, (2, *condition.shape)).astype(condition.dtype))
    null = jnp.asarray(np.stack([condition.null()] * 2))
    seen = []

    def network(x, t, y):
        seen.append((x, t, y))
        return x + t[:, None, None, None] + jnp.sum(y.reshape(len(y), -1), axis=1)[:, None, None, None]

    output = guidance.classifier_free(network, given, condition.null(), calls=calls)(X, T, 2.0)
    base, better = network(X, T, null), network(X, T, given)
    np.testing.assert_allclose(output, base + 2.0 * (better - base), rtol=1e-5)
    assert seen[0][2].dtype == condition.dtype
    if calls == "two":
        np.testing.assert_array_equal(seen[0][2], given)
        np.testing.assert_array_equal(seen[1][2], null)
        return
    x, t, y = seen[0]
    assert len(seen) == 3
    for rows, first, second in ((x, X, X), (t, T, T), (y, given, null)):
        np.testing.assert_array_equal(rows[0::2], first)
        np.testing.assert_array_equal(rows[1::2], second)
