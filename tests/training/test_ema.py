"""Averages: their rates in float32, what a config may ask for, the power-function EMAs of a run, reconstruction."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.experiment import build
from diffjax.options import options
from diffjax.training import ema
from tests.programs import tiny_config
from tests.training.test_devices import LAYOUTS, OWN_SHAPES, SHAPES

NUMBERS = np.array([1, 2, 3, 10, 99, 1000, 12_345, 10**6, 16_000_000])


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.25])
def test_rates_of_the_power_function_are_accurate_in_float32(sigma_rel):
    rates = jax.jit(jax.vmap(ema.power(sigma_rel)))(jnp.asarray(NUMBERS, jnp.int32))
    assert rates.dtype == jnp.float32
    n = NUMBERS[1:].astype(np.longdouble)
    exact = -np.expm1((ema.gamma_of(sigma_rel) + 1) * np.log1p(-1 / n))
    assert rates[0] == 1  # the first update forgets the start
    np.testing.assert_allclose(rates[1:], exact.astype(np.float64), rtol=5e-7)


def test_rates_of_a_halflife_ramp_up():
    images, batch = 1e5, 64
    rates = jax.jit(jax.vmap(ema.halflife(images, 0.05, batch)))(jnp.asarray(NUMBERS, jnp.int32))
    exact = 1 - 0.5 ** (batch / np.minimum(images, 0.05 * batch * NUMBERS.astype(np.float64)))
    np.testing.assert_allclose(rates, exact, rtol=5e-7)
    full = ema.halflife(images, 0.0, batch)(jnp.arange(3))
    np.testing.assert_allclose(full, exact[-1], rtol=5e-7)


@pytest.mark.parametrize("decay, rampup", [(0.9999, 0.1), (0.99, 0.05), (0.9999, 0.0)])
def test_rates_of_a_constant_average_ramp_up(decay, rampup):
    rates = jax.jit(jax.vmap(ema.constant(decay, rampup)))(jnp.asarray(NUMBERS, jnp.int32))
    exact = np.maximum(1 - decay, 1 / (1 + rampup * NUMBERS)) if rampup else np.full(len(NUMBERS), 1 - decay)
    np.testing.assert_allclose(rates, exact, rtol=5e-7)


def test_what_is_left_of_the_initial_parameters_is_computed_and_said():
    """Of 15,000 updates with β = 0.9999, e^-1.5 of them; with a ramp-up less than a thousandth."""
    plain, ramped = ema.constant(0.9999), ema.constant(0.9999, 0.1)
    assert ema.initial_share(plain, 15_000) == pytest.approx(0.9999**15_000)
    assert "still holds 22% of the initial parameters" in ema.initial_share_caveat(plain, 15_000)
    assert ema.initial_share(ramped, 1_000) < 1e-3
    assert not ema.initial_share_caveat(ramped, 1_000)
    moved = ema.initial_share(ema.halflife(1e5, 0.05, 64), 1_000)
    average = 1.0
    for number in range(1, 1_001):
        average = ema.update(average, 0.0, float(ema.halflife(1e5, 0.05, 64)(number)))
    assert moved == pytest.approx(average, abs=1e-7)


def test_lengths_without_an_exponent_are_refused():
    for gamma in (0.0, 0.5, 7.0, 200.0):
        assert ema.gamma_of(ema.sigma_rel_of(gamma)) == pytest.approx(gamma, abs=1e-10)
    for sigma_rel in (0.0, -0.1, 0.29, float("nan")):
        with pytest.raises(UserError, match="above 0 to 0.2887"):
            ema.gamma_of(sigma_rel)


STORED = [ema.Profile(t, length) for t in (4.0, 8.0, 12.0) for length in (0.05, 0.1)]


def profile(p: ema.Profile, times: np.ndarray) -> np.ndarray:
    gamma = ema.gamma_of(p.sigma_rel)
    return np.where(times <= p.t, (gamma + 1) * times**gamma / p.t ** (gamma + 1), 0)


def test_the_error_of_a_profile_is_its_distance_in_the_square_mean():
    wanted = ema.Profile(12.0, 0.2)
    coefficients = ema.solve_weights(STORED, wanted)
    assert coefficients.sum() == pytest.approx(1)
    times = (np.arange(10**6) + 0.5) * 12e-6
    combined = sum(x * profile(p, times) for x, p in zip(coefficients, STORED))
    distance = np.sqrt(np.mean((combined - profile(wanted, times)) ** 2) / np.mean(profile(wanted, times) ** 2))
    assert ema.profile_error(STORED, wanted, coefficients) == pytest.approx(distance, rel=1e-4)


def test_a_stored_average_is_its_own_reconstruction():
    coefficients = ema.solve_weights(STORED, STORED[3])
    np.testing.assert_allclose(coefficients, np.eye(len(STORED))[3], atol=1e-10)
    assert ema.profile_error(STORED, STORED[3], coefficients) < 1e-6
    with pytest.raises(UserError, match="the same"):
        ema.solve_weights([STORED[0], STORED[0]], STORED[3])


def test_more_snapshots_come_nearer_and_stay_well_conditioned():
    errors = []
    for count in (4, 16, 64, 256, 1024):
        stored = [ema.Profile(t, length) for t in range(1, count + 1) for length in (0.05, 0.1)]
        wanted = ema.Profile(count, 0.15)
        coefficients = ema.solve_weights(stored, wanted)
        assert np.abs(coefficients).sum() < 2  # what rounding of the power-function EMAs is multiplied by
        errors.append(ema.profile_error(stored, wanted, coefficients))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5


def test_combining_lets_go_of_every_tree():
    made = []

    def trees():
        for value in (1.0, 2.0, 4.0, 8.0):
            leaf = np.full(3, value, np.float32)
            made.append(weakref.ref(leaf))
            yield {"w": leaf}
            assert sum(leaf() is not None for leaf in made) == 1

    total = ema.combine(trees(), [0.5, 0.25, 1e-9, 0.0])
    assert total["w"].dtype == np.float64
    np.testing.assert_allclose(total["w"], 1.0 + 4e-9, rtol=1e-15)


REFUSED = {
    "kind": ({"kind": "edm"}, "ema.kind = 'edm': valid: constant, halflife"),
    "decay": ({"decay": 1.5}, "ema.decay = 1.5: valid: 0 to 1"),
    "no-halflife": ({"kind": "halflife"}, "needs a half-life above 0"),
    "rampup": ({"kind": "halflife", "halflife_images": 1e6, "rampup": -1.0}, r"ema.rampup = -1.0: valid: 0 \(none\)"),
    "no-snapshots": ({"sigma_rel": (0.05,)}, "power-function EMAs need snapshots"),
    "no-lengths": ({"snapshot_every_steps": 5}, "snapshots need power-function EMAs"),
    "backwards": ({"snapshot_every_steps": -5, "sigma_rel": (0.05,)}, "ema.snapshot_every_steps = -5: valid: 0"),
    "text": ({"snapshot_every_steps": 5, "sigma_rel": "0.05"}, "valid: numbers, such as 0.1,0.2"),
    "too-long": ({"snapshot_every_steps": 5, "sigma_rel": (0.5,)}, "different lengths above 0 to 0.2887"),
    "twice": ({"snapshot_every_steps": 5, "sigma_rel": (0.05, 0.05)}, "different lengths .* of up to three decimals"),
    "too-fine": ({"snapshot_every_steps": 5, "sigma_rel": (0.0505,)}, "different lengths .* of up to three decimals"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_contradicts_itself_is_refused(mistake):
    fields, message = REFUSED[mistake]
    with pytest.raises(UserError, match=message):
        ema.rates(ema.Ema(**fields), 64)


def test_a_section_s_averages():
    assert ema.rates(ema.Ema(decay=0.75), 64).ema(3) == 0.25
    section = ema.Ema(kind="halflife", halflife_images=1e5, sigma_rel=(0.05, 0.1), snapshot_every_steps=5)
    rates = ema.rates(section, 64)
    assert rates.ema(10) == ema.halflife(1e5, 0.05, 64)(10)
    assert {name: rate(10) for name, rate in rates.power_emas.items()} == {
        "0.050": ema.power(0.05)(10),
        "0.100": ema.power(0.1)(10),
    }
    assert ema.by_name(section.sigma_rel) == {"0.050": 0.05, "0.100": 0.1}


def test_kinds_read_fields_of_the_section():
    assert {name for kind in ema.AVERAGES.values() for name in kind.reads} <= options(ema.Ema).keys()
    assert set(ema.AVERAGES["constant"].reads).isdisjoint(ema.AVERAGES["halflife"].reads)


POWER_EMAS = ("ema.sigma_rel=0.05,0.1", "ema.snapshot_every_steps=5")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_power_emas_are_laid_out_as_the_parameters(layout):
    state = build(tiny_config(*SHAPES, *OWN_SHAPES["dit"], *LAYOUTS[layout], *POWER_EMAS)).abstract
    assert list(state.power_emas) == ["0.050", "0.100"]
    for average in state.power_emas.values():
        assert average == state.params  # shapes, dtypes and shardings
    whole = [leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.power_emas)]
    assert all(whole) == (layout == "dp8")


@pytest.mark.slow
def test_power_emas_of_a_sharded_run_are_the_averages_of_its_parameters():
    averages = (
        "ema.kind=halflife",
        "ema.decay=0.9999",
        "ema.decay_rampup=0",
        "ema.halflife_images=100",
        *POWER_EMAS,
        "optim.warmup_steps=0",
    )
    experiment = build(tiny_config(*SHAPES, *OWN_SHAPES["dit"], *LAYOUTS["2x2x2"], *averages))
    batches = experiment.stream()
    with jax.set_mesh(experiment.mesh):
        state = experiment.init()
        path = [jax.device_get(state.params)]
        for _ in range(10):
            state, _ = experiment.step(state, experiment.frozen, experiment.put(next(batches)), experiment.key)
            path.append(jax.device_get(state.params))
        assert experiment.step._cache_size() == 1
    batches.close()
    where = [jax.tree.map(lambda leaf: leaf.sharding, tree) for tree in (state.params, *state.power_emas.values())]
    assert where[0] == where[1] == where[2]
    assert not state.power_emas["0.050"]["blocks"]["mlp"]["fc1"]["kernel"].sharding.is_fully_replicated

    n = np.arange(11) / 10
    for name, length in (("0.050", 0.05), ("0.100", 0.1)):
        weights = np.diff(n ** (ema.gamma_of(length) + 1))  # the profile's integral over each step
        check_average(state.power_emas[name], path[1:], weights)
    decays = 0.5 ** (16 / np.minimum(100, 0.05 * 16 * np.arange(1, 11)))
    weights = [np.prod(decays[i:]) * (1 - decays[i - 1] if i else 1) for i in range(11)]
    check_average(state.ema, path, weights)


def check_average(average, path, weights):
    assert sum(weights) == pytest.approx(1)

    def check(average, *leaves):
        exact = sum(weight * np.float64(leaf) for weight, leaf in zip(weights, leaves))
        np.testing.assert_allclose(average, exact, rtol=1e-6, atol=1e-7)

    jax.tree.map(check, jax.device_get(average), *path)
