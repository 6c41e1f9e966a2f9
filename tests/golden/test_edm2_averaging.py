"""Power-function and half-life averages, reconstruction and learning rates against EDM2's code, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.training import ema
from diffjax.training.optimizer import Optim, schedule
from tests.golden.cases import Case, cases

pytestmark = pytest.mark.golden

EXACT = {"rtol": 1e-10, "atol": 1e-13}


@pytest.fixture(params=cases("edm2"))
def case(request):
    assert request.param is not None, "no stored cases"
    with jax.enable_x64(True):
        yield request.param


def power_emas(case: Case, rates: list[ema.Rate]) -> np.ndarray:
    """[updates, rates, parameters]: the averages after every update of the stored parameters' path."""
    start = np.broadcast_to(case.arrays["theta_init"], (len(rates), *case.arrays["theta_init"].shape))

    def step(averages, update):
        number, theta = update
        averages = jnp.stack([ema.update(a, theta, rate(number)) for a, rate in zip(averages, rates)])
        return averages, averages

    numbers = jnp.arange(1, len(case.arrays["theta"]) + 1)
    _, found = jax.jit(lambda start, path: jax.lax.scan(step, start, path))(start, (numbers, case.arrays["theta"]))
    assert found.dtype == np.float64
    return np.asarray(found)


def posthoc(case: Case) -> tuple[list[ema.Profile], list[ema.Profile]]:
    """What the case stores, and what it wants of it at the end."""
    arrays = case.arrays
    stored = [ema.Profile(t, length) for t, length in zip(arrays["posthoc_in_nimg"], arrays["posthoc_in_std"])]
    return stored, [ema.Profile(case.info["phema"]["total_nimg"], length) for length in arrays["posthoc_out_std"]]


def reconstructed(case: Case, stored: list[ema.Profile], coefficients: np.ndarray) -> np.ndarray:
    """[wanted, parameters] out of our own power-function EMAs at the stored times."""
    lengths, batch = case.info["phema"]["stds"], case.info["phema"]["batch"]
    path = power_emas(case, [ema.power(length) for length in lengths])
    trees = [{"w": path[round(t / batch) - 1, lengths.index(length)]} for t, length in stored]
    return np.stack([ema.combine(trees, column)["w"] for column in coefficients.T])


def coefficients(stored: list[ema.Profile], wanted: list[ema.Profile]) -> np.ndarray:
    return np.stack([ema.solve_weights(stored, w) for w in wanted], axis=1)


def test_lengths_and_exponents(case):
    arrays = case.arrays
    np.testing.assert_allclose([ema.gamma_of(s) for s in arrays["std"]], arrays["exp_of_std"], **EXACT)
    np.testing.assert_allclose(ema.sigma_rel_of(arrays["exp_of_std"]), arrays["std_of_exp"], **EXACT)
    np.testing.assert_allclose(ema.sigma_rel_of(arrays["gamma"]), arrays["std_of_gamma"], **EXACT)


def test_rates_and_averages(case):
    arrays, info = case.arrays, case.info["phema"]
    powers = [ema.power(length) for length in info["stds"]]
    numbers = arrays["beta_nimg"] // info["batch"]
    np.testing.assert_allclose([1 - np.asarray(rate(numbers)) for rate in powers], arrays["beta"], **EXACT)
    np.testing.assert_allclose(power_emas(case, powers), arrays["power_ema_track"], **EXACT)

    old = info["traditional"]
    halflife = ema.halflife(old["halflife_Mimg"] * 1e6, old["rampup_ratio"], info["batch"])
    np.testing.assert_allclose(power_emas(case, [halflife])[:, 0], arrays["traditional_ema_track"], **EXACT)


def test_reconstruction(case):
    stored, wanted = posthoc(case)
    found = coefficients(stored, wanted)
    np.testing.assert_allclose(found, case.arrays["posthoc_coef"], **EXACT)
    np.testing.assert_allclose(reconstructed(case, stored, found), case.arrays["posthoc_reconstructed"], **EXACT)


def test_reconstruction_is_as_near_to_the_average_itself(case):
    """From the same snapshots as near as the reference's, and nearer from twice as many."""
    direct = power_emas(case, [ema.power(length) for length in case.arrays["posthoc_out_std"]])[-1]
    np.testing.assert_allclose(direct, case.arrays["posthoc_direct"], **EXACT)
    stored, wanted = posthoc(case)
    half = case.info["phema"]["snapshot_every_steps"] * case.info["phema"]["batch"] / 2
    more = stored + [ema.Profile(t - half, length) for t, length in stored]
    worst = [np.abs(reconstructed(case, some, coefficients(some, wanted)) - direct).max() for some in (stored, more)]
    reference = case.info["phema"]["max_diff_reconstruction_vs_direct"]
    assert worst[0] <= reference * (1 + 1e-9)
    assert worst[1] < 0.9 * reference


def test_response(case):
    """Samples of the profile at 0, 1, ..., and the end of the window, with sum 1."""
    [(key, stored)] = [(key, array) for key, array in case.arrays.items() if key.startswith("response_len")]
    times = np.arange(int(key.removeprefix("response_len")))
    for length, response in zip(case.info["phema"]["stds"], stored.T):
        profile = times ** ema.gamma_of(length)
        np.testing.assert_allclose(profile / profile.sum(), response, **EXACT)


PRESETS = {
    "img512_s": {"lr": 0.01, "schedule": "inverse_sqrt", "warmup_steps": 10e6 / 2048, "decay_after_steps": 70_000},
    "img64_s": {"lr": 0.01, "schedule": "inverse_sqrt", "warmup_steps": 10e6 / 2048, "decay_after_steps": 35_000},
    "no_decay": {"lr": 0.001, "schedule": "constant", "warmup_steps": 0, "decay_after_steps": 0},
}


@pytest.mark.parametrize("name", PRESETS)
def test_learning_rates(case, name):
    """Of the public code: batches of 2048, warm-up over ten million images or none."""
    learning_rate = schedule(Optim(**PRESETS[name]), 10)
    rates = [learning_rate(images / 2048) for images in case.arrays["lr_nimg"]]
    np.testing.assert_allclose(rates, case.arrays[f"lr_{name}"], rtol=1e-12)
