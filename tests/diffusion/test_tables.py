"""Order of convergence and equivalence of the tables, exactly: for Gaussian data every sampler is a linear map."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.diffusion import PROCESSES, guidance, paths, samplers, sigma_grids
from diffjax.diffusion.gaussian import gaussian_diffusion
from diffjax.diffusion.process import Process
from diffjax.errors import UserError
from diffjax.options import REQUIRED, convert, options
from tests import trajectories
from tests.golden.x64 import float64

MEAN, STD = 0.3, 0.5
PREDICTIONS = {
    "x0": paths.predicts_x0,
    "epsilon": paths.predicts_epsilon,
    "velocity": paths.predicts_velocity,
    "score": paths.predicts_score,
    "v": paths.predicts_v,
}
LINEAR = trajectories.make(paths.linear, paths.predicts_velocity, (0.0, 1.0))
EDM = trajectories.make(paths.sigma_as_time, paths.predicts_epsilon, (80.0, 0.002))


def final(process: Process, sampler: str, steps: int, x=None, **options) -> np.ndarray:
    """What a sampler makes of x in float64, on the exact network."""
    with float64():
        x = jnp.asarray(np.array([[-1.3], [0.2], [1.7]]) if x is None else x)
        schedule = samplers.schedule(process, sampler, steps, **options)
        denoise = trajectories.exact(process, MEAN, STD)
        return np.asarray(jax.jit(lambda schedule, x: samplers.sample(schedule, denoise, x, jnp.zeros))(schedule, x))


def at_the_last_level(x0: np.ndarray, sigma: float) -> np.ndarray:
    """The x whose expected data are x0, where the samplers in noise levels stop being exact in the limit."""
    return x0 + (x0 - MEAN) * sigma**2 / STD**2


def moments(process: Process, sampler: str, steps: int, **options) -> tuple[float, float]:
    """Mean and variance of what a random sampler makes of N(0, 1), exactly: the sampler is affine in the first x and in
    the noise of each step, so one batch of unit vectors tells all its coefficients."""
    with float64():
        schedule = samplers.schedule(process, sampler, steps, **options)
        unit = jnp.eye(steps + 2)[
            :, :, None
        ]  # first the response to nothing, then to x, then to the noise of each step
        unit = unit.at[0].set(0.0)
        denoise = trajectories.exact(process, MEAN, STD)
        run = jax.jit(lambda schedule: samplers.sample(schedule, denoise, unit[:, 1], lambda i: unit[:, i + 2]))
        out = np.asarray(run(schedule))[:, 0]
    return float(out[0]), float(np.square(out[1:] - out[0]).sum())


def orders(errors: list[float]) -> np.ndarray:
    return np.log2(np.array(errors[:-1]) / errors[1:])


@pytest.mark.parametrize("path", [paths.linear, paths.gvp])
@pytest.mark.parametrize("sampler, order", [("euler", 1), ("heun", 2)])
def test_order_of_the_flow_in_time(path, sampler, order):
    process = trajectories.make(path, paths.predicts_velocity, (0.0, 1.0))
    exact = MEAN + STD * np.array([[-1.3], [0.2], [1.7]])
    errors = [np.abs(final(process, sampler, n) - exact).max() for n in (128, 256, 512)]
    np.testing.assert_allclose(orders(errors), order, atol=0.1)


@pytest.mark.parametrize("ahead", [1.0, 0.5, 2 / 3], ids=["heun", "midpoint", "ralston"])
def test_order_of_the_second_order_family(ahead):
    """On the curved path: on a straight one the midpoint rule happens to be of third order for Gaussian data."""
    process = trajectories.make(paths.gvp, paths.predicts_velocity, (0.0, 1.0))
    exact = MEAN + STD * np.array([[-1.3], [0.2], [1.7]])
    errors = [np.abs(final(process, "heun", n, ahead=ahead) - exact).max() for n in (128, 256)]
    np.testing.assert_allclose(orders(errors), 2, atol=0.1)


@pytest.mark.parametrize(
    "sampler, options, order",
    [("edm", {"order": 1}, 1), ("ddim", {}, 1), ("edm", {}, 2), ("edm", {"ahead": 2 / 3}, 2), ("dpmpp_2m", {}, 2)],
)
@pytest.mark.parametrize("process", [EDM, LINEAR], ids=["edm", "linear"])
def test_order_in_noise_levels(process, sampler, options, order):
    """At the last level before the data: the closing step to 0 leaves an error that does not fall with the steps."""
    start, errors = np.array([[-1.3], [0.2], [1.7]]), []
    for n in (128, 256, 512):
        x = final(process, sampler, n, start, sigma_min=0.002, sigma_max=80.0, **options)
        flow = MEAN + (80.0 * start - MEAN) * np.sqrt((STD**2 + 0.002**2) / (STD**2 + 80.0**2))
        errors.append(np.abs(at_the_last_level(x, 0.002) - flow).max())
    np.testing.assert_allclose(orders(errors), order, atol=0.1)


@pytest.mark.parametrize("diffusion", ["sigma", "constant"])
@pytest.mark.parametrize("sampler", ["euler_maruyama", "sde_heun"])
def test_weak_order_of_the_stochastic_samplers(sampler, diffusion):
    """Of the variance at t = 0.9; the mean is exact on a straight path. The noise of a step has the size of its start,
    which leaves the stochastic Heun method at first order, with a smaller error."""
    process = trajectories.make(paths.linear, paths.predicts_velocity, (0.0, 0.9))
    options = {"last_step": "none", "diffusion": diffusion, "norm": 0.5}
    found = [moments(process, sampler, n, **options) for n in (128, 256, 512)]
    np.testing.assert_allclose([mean for mean, _ in found], 0.9 * MEAN, rtol=1e-12)
    errors = [abs(variance - (0.9**2 * STD**2 + 0.1**2)) for _, variance in found]
    np.testing.assert_allclose(orders(errors), 1, atol=0.1)


RANDOM = [
    ("euler_maruyama", LINEAR, {"diffusion": "sigma"}),
    ("euler_maruyama", LINEAR, {"diffusion": "linear"}),
    ("euler_maruyama", LINEAR, {"diffusion": "decreasing", "last_step": "tweedie"}),
    ("euler_maruyama", LINEAR, {"diffusion": "increasing_decreasing", "last_step": "euler"}),
    ("euler_maruyama", LINEAR, {"diffusion": "sbdm", "start": 0.02}),
    ("euler_maruyama", LINEAR, {"diffusion": "constant", "norm": 0.3, "last_step": "none"}),
    ("sde_heun", LINEAR, {"diffusion": "sigma"}),
    ("ddim", LINEAR, {"eta": 1.0}),
    ("ddim", EDM, {"eta": 0.5}),
    ("edm", EDM, {"churn": 40.0, "churn_min": 0.05, "churn_max": 50.0}),
    ("edm", LINEAR, {"churn": 40.0}),
]


@pytest.mark.parametrize("sampler, process, options", RANDOM)
def test_random_samplers_keep_the_moments(sampler, process, options):
    mean, variance = moments(process, sampler, 400, **options)
    assert abs(mean - MEAN) < 0.01
    assert abs(np.sqrt(variance) / STD - 1) < 0.03


@pytest.mark.parametrize("sampler", ["euler", "heun", "ddim", "edm", "dpmpp_2m"])
def test_every_prediction_on_a_path_gives_the_same_trajectory(sampler):
    for path in (paths.linear, paths.gvp, paths.vp):
        made = [final(trajectories.make(path, p, (0.02, 0.98)), sampler, 12) for p in PREDICTIONS.values()]
        np.testing.assert_allclose(made[1:], np.broadcast_to(made[0], np.shape(made[1:])), rtol=1e-9)


def test_one_flow_on_every_path():
    """Noise levels are what counts: the same levels give the same samples on the paths of EDM and of flow matching."""
    options = {"sigma_min": 0.01, "sigma_max": 20.0}
    for sampler in ("ddim", "edm", "dpmpp_2m"):
        flows = [
            final(trajectories.make(path, paths.predicts_x0, span), sampler, 10, **options)
            for path, span in (
                (paths.sigma_as_time, (80.0, 0.002)),
                (paths.linear, (0.0, 1.0)),
                (paths.gvp, (0.0, 1.0)),
            )
        ]
        # x starts as σ times noise in each variable, which is 20 times noise in all of them after division by α
        np.testing.assert_allclose(flows[1:], [flows[0]] * 2, rtol=1e-8, err_msg=sampler)


def test_deterministic_ddim_is_eulers_method_of_edm():
    for process in (EDM, LINEAR):
        np.testing.assert_allclose(final(process, "ddim", 9), final(process, "edm", 9, order=1), rtol=1e-10)


def test_levels_of_a_discrete_process_are_its_nearest_steps():
    process = gaussian_diffusion(variance="fixed_small")
    known = np.sqrt(1 - process.alphas_cumprod) / process.sqrt_alphas_cumprod
    schedule = samplers.schedule(process, "edm", 18)
    wanted = sigma_grids.sigma_grid(process, 18, None, None, 7.0)
    nearest = known[[np.abs(known - level).argmin() for level in wanted]]
    np.testing.assert_allclose(schedule.table.sigma[:35], np.repeat(nearest, [1] + [2] * 17), rtol=1e-12)
    assert schedule.table.c_noise[0] == 999
    assert schedule.table.c_noise[34] == 0


def test_times_of_a_path_at_noise_levels():
    levels = np.array([80.0, 3.0, 1.0, 0.002])
    np.testing.assert_allclose(sigma_grids.times_at(LINEAR, levels), 1 / (1 + levels), rtol=1e-13)
    np.testing.assert_allclose(sigma_grids.times_at(LINEAR, np.array([1e20, 0.0])), [0.0, 1.0], atol=1e-19)


def test_resolution_shift_spends_more_steps_on_noise():
    even, shifted = (samplers.schedule(LINEAR, "euler", 4, shift=shift).table.c_noise for shift in (1.0, 3.0))
    np.testing.assert_allclose(even, [0, 0.25, 0.5, 0.75])
    u = 1 - even
    np.testing.assert_allclose(1 - shifted, 3 * u / (1 + 2 * u))


GAUSSIAN = gaussian_diffusion()
NOISE = trajectories.make(paths.linear, paths.predicts_epsilon, (0.0, 1.0))
REFUSED = {
    "unknown": (LINEAR, "heunn", {}, "is unknown; valid: ddpm, ddim"),
    "option": (LINEAR, "euler", {"eta": 1.0}, "has no option 'eta'; valid: shift"),
    "ddpm": (LINEAR, "ddpm", {}, "needs a discrete process"),
    "euler": (GAUSSIAN, "euler", {}, "continuous time"),
    "dopri5": (GAUSSIAN, "dopri5", {}, "continuous time"),
    "sbdm": (LINEAR, "euler_maruyama", {"diffusion": "sbdm"}, "'sbdm' divides by zero at t = 0"),
    "sbdm-heun": (LINEAR, "sde_heun", {"diffusion": "sbdm"}, "'sbdm' divides by zero at t = 0"),
    "end": (LINEAR, "sde_heun", {"last_step": "none"}, "'sigma' divides by zero at t = 1"),
    "form": (LINEAR, "sde_heun", {"diffusion": "squared"}, "valid: constant, sbdm"),
    "negative": (LINEAR, "sde_heun", {"norm": -1.0}, "norm = -1.0: valid: 0 or more"),
    "last-step": (LINEAR, "sde_heun", {"last_step": "second"}, "valid: mean, euler, tweedie, none"),
    "sde-edm": (EDM, "euler_maruyama", {}, "counts time from noise at 0 to data at 1"),
    "noise-at-0": (NOISE, "euler", {}, "divides by zero in its step from t = 0"),
    "dopri5-at-0": (NOISE, "dopri5", {}, "divides by zero at t = 0"),
    "ahead": (GAUSSIAN, "edm", {"ahead": 0.5}, "between the steps"),
    "order": (LINEAR, "edm", {"order": 3}, "order = 3: valid: 1, 2"),
    "eta": (LINEAR, "ddim", {"eta": -1.0}, "valid: 0"),
    "too-much-eta": (LINEAR, "ddim", {"eta": 5.0}, "more noise than there is"),
    "spacing": (GAUSSIAN, "ddim", {"spacing": "odd"}, "valid: even, stride"),
    "spacing-flow": (LINEAR, "ddim", {"spacing": "even"}, "valid in continuous time: rho"),
    "ahead-alone": (LINEAR, "edm", {"order": 1, "ahead": 0.5}, "does not look ahead"),
    "sigma-limits": (GAUSSIAN, "ddim", {"sigma_max": 20.0}, "no meaning with spacing 'stride'"),
    "twice": (GAUSSIAN, "dpmpp_2m", {"spacing": "rho", "steps": 300}, "twice"),
    "steps": (GAUSSIAN, "dpmpp_2m", {"steps": 1001}, "valid: 1 to 1000"),
    "max-steps": (LINEAR, "euler", {"steps": 10, "max_steps": 9}, "valid: 1 to 9"),
    "levels": (LINEAR, "edm", {"sigma_min": 90.0}, "sigma_min = 90 is not below sigma_max = 80"),
    "weight": (EDM, "edm", {"weight": lambda level, time: time}, "which this process has not"),
    "dopri5-weight": (LINEAR, "dopri5", {"weight": lambda level, time: time}, "one number"),
}


@pytest.mark.parametrize("process, sampler, options, reason", REFUSED.values(), ids=REFUSED)
def test_what_has_no_meaning_is_refused(process, sampler, options, reason):
    with pytest.raises(UserError, match=reason):
        samplers.schedule(process, sampler, **({"steps": 8 * (sampler != "dopri5")} | options))


FUNCTIONS = {
    **{name: record.trajectory or record.adaptive for name, record in samplers.SAMPLERS.items()},
    **{f"guidance-{name}": function for name, function in guidance.SCHEDULES.items()},
    **{f"process-{name}": function for name, function in PROCESSES.items()},
}


def invalid_values():
    """One value that is not valid for each option of every sampler, guidance and process: (function, option, value)."""
    found = []
    for name, function in FUNCTIONS.items():
        for option in options(function).values():
            for value in (-1, -1.0, "nonsense", float("nan")):
                if convert(value, option.type) is REQUIRED or not option.leaf.valid:
                    continue
                if not option.leaf.valid.test(value):
                    found.append(pytest.param(function, option, value, id=f"{name}-{option.name}"))
                    break
    return found


@pytest.mark.parametrize("function, option, value", invalid_values())
def test_an_invalid_value_is_answered_by_what_is_valid_for_its_option(function, option, value):
    leading = inspect.signature(function).parameters.values()
    arguments = [LINEAR, 4, 1.0][: sum(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in leading)]
    with pytest.raises(UserError) as error:
        function(*arguments, **{option.name: value})
    assert f"{option.name} = {value!r}: valid: {option.leaf.valid.words}" in str(error.value)


def test_limits_in_the_wrong_order_are_named():
    with pytest.raises(UserError, match="churn_min = 2.0 is above churn_max = 1.0; valid: 0 to churn_max"):
        samplers.schedule(EDM, "edm", 4, churn=1.0, churn_min=2.0, churn_max=1.0)
    with pytest.raises(UserError, match="low = 2.0 is not below high = 1.0; valid: 0 to below high"):
        guidance.weights("interval", 2.0, low=2.0, high=1.0)
