"""The loss of a process, and the door to all of them."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import rng
from diffjax.diffusion import PROCESSES, create_process, weighting
from diffjax.diffusion.paths import Conversion, conversion
from diffjax.diffusion.process import Process, per_example
from diffjax.errors import UserError
from tests.golden.x64 import float64

X0, EPS, OUTPUT = np.random.default_rng(0).standard_normal((3, 5, 3, 3, 2))
KEYS = rng.per_example(jax.random.key(0), jnp.arange(5))
CONTINUOUS = [name for name in PROCESSES if name != "gaussian"]


def terms(process: Process, output: np.ndarray, log_variance: np.ndarray | None = None) -> dict[str, jax.Array]:
    """Losses at times of training, in float64."""
    with float64():
        t = jnp.asarray(process.sample_times(KEYS), jnp.float64)
        x0, eps = jnp.asarray(X0), jnp.asarray(EPS)
        u = None if log_variance is None else jnp.asarray(log_variance)
        return process.losses(jnp.asarray(output), x0, process.q_sample(x0, t, eps), t, eps, u)


def at(process: Process, t: jax.Array) -> Conversion:
    return per_example(conversion(process.path(t), process.prediction), X0)


@pytest.mark.parametrize("name", PROCESSES)
def test_training_by_the_same_calls(name):
    process = create_process(name)

    @jax.jit
    def loss(keys, x0, eps):
        t = process.sample_times(keys)
        xt = process.q_sample(x0, t, eps)
        x = process.c_in(t).reshape(-1, 1, 1, 1) * xt
        output = jnp.concatenate([x, jnp.zeros_like(x)], axis=-1) + process.c_noise(t).reshape(-1, 1, 1, 1)
        return process.losses(output, x0, xt, t, eps)

    found = loss(KEYS, jnp.asarray(X0, jnp.float32), jnp.asarray(EPS, jnp.float32))
    assert {"loss", "mse"} <= found.keys()
    for value in found.values():
        assert (value.dtype, value.shape) == (jnp.float32, (5,))
        assert jnp.isfinite(value).all()


@pytest.mark.parametrize("name", CONTINUOUS)
def test_sampled_times_are_where_the_process_is_defined(name):
    process = create_process(name)
    keys = rng.per_example(jax.random.key(1), jnp.arange(4000))
    t = jax.jit(process.sample_times)(keys)
    assert t.dtype == jnp.float32
    point = process.path(t)
    assert all(np.isfinite(value).all() for value in (*point, *process.prediction(point), process.weight(t)))
    np.testing.assert_allclose(process.sample_times(keys[7:9]), t[7:9], rtol=1e-6)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_the_target_has_no_loss_and_gives_the_data_back(name):
    process = create_process(name)
    with float64():
        t = jnp.asarray(process.sample_times(KEYS), jnp.float64)
        xt, target = process.q_sample(X0, t, EPS), process.target(X0, t, EPS)
        k = at(process, t)
        np.testing.assert_allclose(k.x0_x * xt + k.x0_f * target, X0, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(k.eps_x * xt + k.eps_f * target, EPS, rtol=1e-7, atol=1e-7)
    assert not terms(process, target)["loss"].any()


@pytest.mark.parametrize("path", ["flow_linear", "flow_gvp", "flow_vp"])
@pytest.mark.parametrize("prediction", ["epsilon", "score", "x0", "v", "velocity"])
def test_the_velocity_weight_makes_any_loss_that_of_the_velocity(path, prediction):
    process = create_process(path, prediction=prediction, weighting="velocity")
    with float64():
        t = jnp.asarray(process.sample_times(KEYS), jnp.float64)
        xt = process.q_sample(X0, t, EPS)
        k = at(process, t)
        velocity = k.velocity_x * xt + k.velocity_f * OUTPUT
        expected = create_process(path).losses(velocity, X0, xt, t, EPS)["loss"]
        np.testing.assert_allclose(process.losses(OUTPUT, X0, xt, t, EPS)["loss"], expected, rtol=1e-8)


@pytest.mark.parametrize("name", ["edm", "flow_gvp"])
@pytest.mark.parametrize("weight", ["snr", "min_snr", "edm", "velocity", "likelihood"])
def test_a_weight_is_of_the_data_and_not_of_the_prediction(name, weight):
    """Two networks that mean the same data have the same loss, whatever they predict."""
    first, second = (create_process(name, prediction=p, weighting=weight) for p in ("epsilon", "x0"))
    with float64():
        t = jnp.asarray(first.sample_times(KEYS), jnp.float64)
        xt = first.q_sample(X0, t, EPS)
        k = at(first, t)
        same = k.x0_x * xt + k.x0_f * OUTPUT
        one, other = (p.losses(f, X0, xt, t, EPS)["loss"] for p, f in ((first, OUTPUT), (second, same)))
        np.testing.assert_allclose(one, other, rtol=1e-8)


def test_uncertainty():
    process = create_process("edm", weighting="uncertainty")
    plain = terms(create_process("edm"), OUTPUT)["loss"]
    np.testing.assert_allclose(terms(process, OUTPUT, np.zeros(5))["loss"], plain, rtol=1e-12)
    best = np.log(plain)
    least = terms(process, OUTPUT, best)["loss"]
    np.testing.assert_allclose(least, 1 + best, rtol=1e-12)
    for step in (-0.1, 0.1):
        assert (terms(process, OUTPUT, best + step)["loss"] > least).all()
    with pytest.raises(UserError, match="needs a log variance"):
        terms(process, OUTPUT)
    with pytest.raises(UserError, match="takes no log variance"):
        terms(create_process("edm"), OUTPUT, np.zeros(5))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_noise_level_is_finite_to_the_ends(name):
    process = create_process(name)
    level = process.log_sigma(jnp.array([*process.span, *((0.0, 1.0) if name.startswith("flow") else (1e-9, 1e9))]))
    assert jnp.isfinite(level).all()
    assert level[0] > level[1]
    u = weighting.uncertainty(weighting.init_uncertainty(), level)
    assert (u.dtype, u.shape) == (jnp.float32, (4,))


def test_a_second_half_of_the_channels_is_ignored_and_other_numbers_refused():
    process = create_process("flow_linear")
    both = np.concatenate([OUTPUT, np.ones_like(OUTPUT)], axis=-1)
    np.testing.assert_array_equal(terms(process, both)["loss"], terms(process, OUTPUT)["loss"])
    with pytest.raises(UserError, match="2 output channels"):
        terms(process, OUTPUT[..., :1])


@pytest.mark.parametrize("name", CONTINUOUS)
def test_grid_is_float64_on_the_host(name):
    process = create_process(name)
    grid = process.grid(np.linspace(*process.span, 7))
    for table in (*grid[:5], *grid.conversion):
        assert isinstance(table, np.ndarray)
        assert (table.dtype, table.shape) == (np.float64, (7,))
        assert np.isfinite(table).all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "flow"}, "process 'flow' is unknown"),
        ({"name": "edm", "shift": 2.0}, "no option 'shift'"),
        ({"name": "gaussian", "times": "uniform"}, "no option 'times'"),
        (
            {"name": "edm", "prediction": "velocity"},
            r"prediction = 'velocity': valid: '', edm, epsilon, minus_epsilon, x0$",
        ),
        ({"name": "edm", "times": "uniform"}, r"times = 'uniform': valid: '', lognormal, vp, ve, iddpm$"),
        ({"name": "edm", "sigma_data": 0.0}, "sigma_data = 0"),
        ({"name": "flow_vp", "prediction": "edm"}, r"prediction = 'edm': valid: x0, epsilon, velocity, score, v$"),
        ({"name": "flow_vp", "times": "lognormal"}, r"times = 'lognormal': valid: uniform, logit_normal$"),
        ({"name": "flow_vp", "shift": 0.0}, "shift = 0"),
        (
            {"name": "flow_vp", "weighting": "p2"},
            r"weighting = 'p2': valid: uniform, snr, min_snr, edm, velocity, likelihood, uncertainty$",
        ),
        ({"name": "flow_linear", "weighting": "min_snr", "gamma": -1.0}, "gamma = -1"),
        ({"name": "flow_linear", "weighting": "likelihood"}, "'likelihood' is inf at t = 1"),
        ({"name": "gaussian", "weighting": "velocity"}, r"weighting = 'velocity': valid: uniform, snr, min_snr, edm$"),
        ({"name": "gaussian", "weighting": "p2"}, r"weighting = 'p2': valid: uniform, snr, min_snr, edm$"),
        ({"name": "gaussian", "prediction": ""}, r"prediction = '': valid: epsilon, x0, v$"),
        ({"name": "gaussian", "variance": "learned"}, r"variance = 'learned': valid: learned_range, fixed_small, "),
        ({"name": "gaussian", "steps": 20}, r"steps = 20: valid: 21 or more$"),
        ({"name": "edm", "p_mean": "low"}, r"p_mean = 'low': valid: a number or none$"),
        ({"name": "gaussian", "weighting": "min_snr", "gamma": 0.0}, "gamma = 0"),
        ({"name": "edm", "p_std": -1.0}, "p_std = -1"),
        ({"name": "gaussian", "weighting": "min_snr", "loss": "rescaled_kl"}, "squared error"),
        ({"name": "gaussian", "variance": "fixed_small", "loss": "rescaled_mse"}, "not 'fixed_small'"),
        ({"name": "gaussian", "gamma": 5.0}, "gamma = 5.0 is read by nothing in this process"),
        ({"name": "gaussian", "weighting": "snr", "sigma_data": 0.5}, "sigma_data = 0.5 is read by nothing"),
        ({"name": "gaussian", "steps": float("inf")}, "valid: a whole number"),
        ({"name": "edm", "weighting": "edm", "gamma": 2.0}, "gamma = 2.0 .* valid with weighting 'min_snr'"),
        ({"name": "edm", "times": "ve", "p_mean": 0.0}, "p_mean = 0.0 .* valid with times 'lognormal'"),
        ({"name": "edm_vp", "p_std": 1.0}, "p_std = 1.0 is read by nothing"),
        ({"name": "edm_ve", "sigma_data": 1.0}, "sigma_data = 1.0 is read by nothing"),
        ({"name": "edm", "sigma_data": float("nan")}, "sigma_data = nan: valid: a finite number"),
        ({"name": "edm", "p_mean": float("-inf")}, "p_mean = -inf: valid: a finite number"),
        ({"name": "flow_linear", "sigma_data": 0.5}, "sigma_data = 0.5 is read by nothing"),
        ({"name": "flow_linear", "logit_mean": 0.5}, "logit_mean = 0.5 .* valid with times 'logit_normal'"),
        ({"name": "flow_gvp", "logit_std": 1.0}, "logit_std = 1.0 is read by nothing"),
        ({"name": "flow_linear", "shift": float("inf")}, "shift = inf: valid: a finite number"),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(options, message):
    with pytest.raises(UserError, match=message) as raised:
        create_process(**options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "options",
    [{"prediction": "edm"}, {"weighting": "edm"}, {"times": "lognormal", "p_mean": -0.4, "weighting": "edm"}],
    ids=str,
)
def test_numbers_are_taken_where_they_are_read(options):
    assert create_process("edm_ve", sigma_data=0.7, **options).span == create_process("edm_ve").span


@pytest.mark.parametrize("name", [name for name in CONTINUOUS if name.startswith("edm")])
def test_empty_options_of_a_setting_are_those_that_belong_to_it(name):
    given, own = create_process(name, prediction="", times=""), create_process(name)
    keys = jax.random.split(jax.random.key(0), 4)
    np.testing.assert_array_equal(given.sample_times(keys), own.sample_times(keys))
    grids = [process.grid(np.array(own.span)).conversion for process in (given, own)]
    jax.tree.map(np.testing.assert_array_equal, *grids)


@pytest.mark.parametrize("name", PROCESSES)
def test_noise_fraction_rises_from_the_data_to_the_noise(name):
    process = create_process(name)
    if name == "gaussian":
        times = jnp.arange(process.num_steps)
    else:
        times = jnp.asarray(np.linspace(*process.span, 101)[::-1], jnp.float32)
    fractions = np.asarray(process.noise_fraction(times))
    assert (fractions[0], fractions[-1]) == (pytest.approx(0, abs=1e-6), pytest.approx(1, abs=1e-6))
    assert (np.diff(fractions) > 0).all()
    assert ((fractions >= 0) & (fractions <= 1)).all()


def test_noise_fraction_is_even_in_time_or_in_the_logarithm_of_the_noise_level():
    np.testing.assert_allclose(
        create_process("gaussian", steps=25).noise_fraction(jnp.arange(0, 25, 6)), np.arange(5) / 4
    )
    np.testing.assert_allclose(create_process("flow_linear").noise_fraction(jnp.array([0.0, 0.25, 1.0])), [1, 0.75, 0])
    known = create_process("edm")
    levels = jnp.array([0.002, np.sqrt(0.002 * 80), 80.0])
    np.testing.assert_allclose(known.noise_fraction(levels), [0, 0.5, 1], atol=1e-6)
    outside = jnp.array([1e-5, 1e4])  # lognormal times know no limits
    np.testing.assert_array_equal(known.noise_fraction(outside), [0, 1])


@pytest.mark.parametrize("name", PROCESSES)
def test_every_process_knows_the_common_options(name):
    assert {"prediction", "weighting", "gamma", "sigma_data"} <= inspect.signature(PROCESSES[name]).parameters.keys()
