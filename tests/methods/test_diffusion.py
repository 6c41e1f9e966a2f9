"""What sections `diffusion` and `sampling` of a config become: losses, schedules, guidance, and invalid options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax import models, rng
from diffjax.config import resolve
from diffjax.config.earlier import modern, pairs
from diffjax.contracts import Batch, bind
from diffjax.diffusion import PROCESSES, create_process, samplers, weighting
from diffjax.errors import UserError
from diffjax.experiment import build
from diffjax.methods.diffusion import sampler_schedule
from diffjax.ops import augment
from tests.programs import method_of, tiny_config

SIZES = {"name": "U-DiT", "width": 8, "heads": 2, "depth": (1, 1, 1, 1, 1)}
LEAVES = {
    **{f"model.{name}": value for name, value in SIZES.items()},
    **{"data.name": "digits", "data.num_classes": 5, "data.size": 8, "data.channels": 4, "diffusion.label_drop": 0.4},
}

DEFAULTS = {"diffusion.process": "gaussian", "sampling.sampler": "ddpm"}


def config(**changes):
    """A config with other leaves; "__" stands for "."."""
    return of({name.replace("__", "."): value for name, value in changes.items()})


def of(changes):
    """In earlier spellings, too."""
    return resolve(modern({**LEAVES, **changes}, DEFAULTS))


def process_of(c):
    return create_process(c.settings.process, **c.settings.options)


def sampler_of(make, *arguments):
    """The sampler of the config that `make` makes, so that one statement can fail."""
    c = make(*arguments)
    return method_of(c).sampler(c.sampling)


def loss_of(c, apply, params, batch, key):
    return method_of(c).loss(apply, params, {}, batch, key)


def fresh_shapes(c):
    """Shapes of the parameters that a run starts with."""
    method = method_of(c)

    def init(key):
        return {**method.model.init(key, *method.inputs)["params"], **method.extra(key)}

    return jax.eval_shape(init, jax.random.key(0))


@pytest.mark.parametrize("per_level", [True, False])
def test_labels_are_dropped_by_the_loss_or_by_the_model(per_level):
    c, seen = config(model__label_drop_per_level=per_level), []

    def apply(params, x, t, y, train=False, keys=None):
        seen.append(y)
        return jnp.zeros((*x.shape[:-1], 2 * x.shape[-1]))

    batch = Batch(jnp.zeros((500, 8, 8, 4)), jnp.full(500, 3), jnp.arange(500))
    loss_of(c, apply, None, batch, jax.random.key(0))
    dropped = np.mean(seen[0] == 5)
    assert dropped == 0 if per_level else dropped == pytest.approx(0.4, abs=0.06)
    model = method_of(c).model
    assert model.label_drop_per_level == per_level
    assert not per_level or model.label_drop == 0.4


def test_the_published_default_is_per_level():
    assert method_of(config()).model.label_drop_per_level


# Processes


def test_what_is_left_open_belongs_to_the_process():
    process = process_of(config())
    assert (process.prediction, process.variance, process.loss, process.num_steps) == (
        "epsilon",
        "learned_range",
        "mse",
        1000,
    )
    for name in PROCESSES:
        assert method_of(config(diffusion__process=name)).model.learn_sigma == (name == "gaussian")
    assert not method_of(config(diffusion__gaussian__variance="fixed_small")).model.learn_sigma


def test_options_reach_the_process():
    given = {"p_mean": -0.4, "p_std": 0, "sigma_data": 2, "weighting": "min_snr"}
    c = of({"diffusion.process": "edm"} | {f"diffusion.edm.{name}": value for name, value in given.items()})
    earlier = {"diffusion.options": "p_mean=-0.4,p_std=0,sigma_data=2", "diffusion.weighting": "min_snr"}
    assert of({"diffusion.process": "edm"} | earlier) == c
    expected = create_process("edm", p_mean=-0.4, p_std=0.0, sigma_data=2.0, weighting="min_snr")
    keys, t = rng.per_example(jax.random.key(0), jnp.arange(3)), jnp.array([0.1, 3.0])
    np.testing.assert_allclose(process_of(c).sample_times(keys), np.exp(-0.4), rtol=1e-6)
    np.testing.assert_array_equal(process_of(c).weight(t), expected.weight(t))
    np.testing.assert_array_equal(process_of(c).c_in(t), expected.c_in(t))


@pytest.mark.parametrize("name", ["edm", "flow_linear"])
def test_the_network_is_called_as_the_process_says(name):
    c, seen = config(diffusion__process=name, diffusion__label_drop=0.0), {}
    process = process_of(c)

    def apply(params, x, t, y, train=False, keys=None):
        seen.update(x=x, t=t)
        return jnp.zeros_like(x)

    x0, index = jax.random.normal(jax.random.key(3), (6, 8, 8, 4)), jnp.arange(6)
    key = jax.random.key(0)
    loss, terms = loss_of(c, apply, None, Batch(x0, jnp.zeros(6, jnp.int32), index), key)
    t = process.sample_times(rng.per_example(rng.fold_name(key, "time"), index))
    eps = rng.normal(rng.per_example(rng.fold_name(key, "noise"), index), (8, 8, 4))
    xt = process.q_sample(x0, t, eps)
    np.testing.assert_allclose(seen["x"], process.c_in(t)[:, None, None, None] * xt, rtol=1e-6)
    np.testing.assert_array_equal(seen["t"], process.c_noise(t))
    expected = process.losses(jnp.zeros_like(x0), x0, xt, t, eps)["loss"].mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert set(terms) == {"mse"}


@pytest.mark.slow
def test_uncertainty_is_learned_beside_the_network():
    options = (
        "diffusion.process=edm",
        "diffusion.edm.weighting=uncertainty",
        "sampling.sampler=edm",
        "optim.warmup_steps=0",
    )
    layout = ("parallel.mesh.data=2", "parallel.mesh.fsdp=4", "parallel.strategy=fsdp", "parallel.replicate_below=0")
    made = build(tiny_config(*options, *layout))
    batches = made.stream()
    with jax.set_mesh(made.mesh):
        state, metrics = made.step(made.init(), made.frozen, made.put(next(batches)), made.key)
        first = {name: float(metrics[name]) for name in ("loss", "mse", "log_variance")}
        state, metrics = made.step(state, made.frozen, made.put(next(batches)), made.key)
    batches.close()
    assert first["log_variance"] == 0  # at first the loss is that without it
    assert first["loss"] == pytest.approx(first["mse"], rel=1e-6)
    assert float(metrics["log_variance"]) != 0
    assert np.isfinite(float(metrics["loss"]))
    for params in (state.params, state.ema):
        kernel = params["uncertainty"]["kernel"]
        assert kernel.shape == weighting.init_uncertainty()["kernel"].shape
        assert float(jnp.abs(kernel).max()) > 0


# Augmentation


UNET = {"widths": (8,), "depth": (1,), "window": 4, "head_width": 4, "groups": 4, "time_width": 8}
PIXELS = {"data.name": "digits", "data.size": 8, "data.channels": 3, "data.num_classes": 0, "data.augment": 0.5}


def pixels(model=None, data=None, **sizes):
    """A backbone that is given the augmentation of its images."""
    model = model or {"name": "DiffiT-UNet", **UNET, **sizes}
    changes = {f"model.{name}": value for name, value in model.items()}
    changes |= {f"data.{name}": value for name, value in (data or {}).items()}
    return resolve(PIXELS | {"diffusion.process": "edm", "diffusion.label_drop": 0.0} | changes)


def image_batch(n=12):
    image = jax.random.uniform(jax.random.key(3), (n, 8, 8, 3), minval=-1)
    return Batch(image, jnp.zeros(n, jnp.int32), jnp.arange(n))


def seen_by_the_network(c, batch):
    method = method_of(c)

    def see(batch, key):
        seen = {}

        def apply(params, x, t, y, train=False, keys=None, **told):
            seen.update(x=x, t=t, **told)
            return jnp.zeros_like(x)

        method.loss(apply, None, {}, batch, key)
        return seen

    return jax.jit(see)(batch, jax.random.key(0))


def test_the_network_sees_augmented_images_and_is_told_how():
    c, batch = pixels(), image_batch()
    process, seen = process_of(c), seen_by_the_network(c, batch)
    keys = lambda stream: rng.per_example(rng.fold_name(jax.random.key(0), stream), batch.index)  # noqa: E731
    images, labels = jax.jit(augment.augment)(batch.x, keys("augment"), 0.5)
    assert labels.any(axis=0).all()  # of each kind, some
    np.testing.assert_allclose(seen["augment"], labels, atol=1e-6)
    xt = process.q_sample(images, process.sample_times(keys("time")), rng.normal(keys("noise"), (8, 8, 3)))
    scale = process.c_in(process.sample_times(keys("time")))[:, None, None, None]
    np.testing.assert_allclose(seen["x"], scale * xt, atol=1e-5)

    order = np.random.default_rng(0).permutation(12)
    shuffled = seen_by_the_network(c, jax.tree.map(lambda array: array[order], batch))
    np.testing.assert_array_equal(shuffled["augment"], seen["augment"][order])
    np.testing.assert_allclose(shuffled["x"], seen["x"][order], atol=1e-5)


def test_without_augmentation_nothing_is_told():
    assert set(seen_by_the_network(pixels(data={"augment": 0.0}), image_batch())) == {"x", "t"}


@pytest.mark.slow
def test_what_the_network_is_told_is_learned_from_and_dropout_gets_its_keys():
    """The parameters are drawn, since the last layer of a fresh model lets no gradient through."""
    c, batch = pixels(dropout=0.5), image_batch(4)
    shapes = fresh_shapes(c)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = tree.unflatten([0.3 * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves)])

    def loss(c):
        method = method_of(c)
        return lambda params: method.loss(bind(method.model), params, {}, batch, jax.random.key(0))[0]

    value, gradient = jax.jit(jax.value_and_grad(loss(c)))(params)
    kernel, labels = gradient["augment_embed"]["kernel"], seen_by_the_network(c, batch)["augment"]
    assert jnp.isfinite(kernel).all()
    np.testing.assert_array_equal(kernel.any(axis=1), labels.any(axis=0))
    assert labels.any()
    assert not np.isclose(jax.jit(loss(pixels(dropout=0.0)))(params), value, rtol=1e-4)


@pytest.mark.parametrize("name", ["DiffiT-CIFAR10", "DiffiT-FFHQ64"])
def test_a_fresh_model_has_the_parameters_for_it_all_of_the_published_count(name):
    shapes = fresh_shapes(pixels({"name": name}, {"size": 64 if "64" in name else 32}))
    assert shapes["augment_embed"]["kernel"].shape == (augment.LABELS, 128)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == models.MODELS[name].params


NOT_AUGMENTED = {
    "range": ({"augment": 1.5}, {}, "data.augment = 1.5: valid: 0 (none) to 1"),
    "negative": ({"augment": -0.1}, {}, "data.augment = -0.1: valid"),
    "nan": ({"augment": float("nan")}, {}, "data.augment = nan: valid"),
    "latents": ({"name": "latents"}, {}, "is for pixels, and data.name = 'latents' has none"),
    "flip": (
        {"flip": True},
        {},
        "mirrors half of the images by itself, and conditions the model on it; valid: data.flip=false",
    ),
    "untold": ({}, {"name": "DiT-S/8"}, "which DiT as configured is not; valid: 0, or a DiffiT-UNet with"),
    "other-labels": ({}, {"name": "DiffiT-CIFAR10", "augment_labels": 3}, "with augment_labels = 9"),
}


@pytest.mark.parametrize("data, model, reason", NOT_AUGMENTED.values(), ids=NOT_AUGMENTED)
def test_what_cannot_be_augmented_is_refused(data, model, reason):
    with pytest.raises(UserError) as raised:
        method_of(pixels(model, data))
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


# Samplers

SIDE = 8
SPANS = {
    "gaussian": ("ddpm", "ddim", "edm", "dpmpp_2m"),
    "edm": ("ddim", "edm", "dpmpp_2m", "euler", "heun", "dopri5"),
    "flow_linear": ("ddim", "edm", "dpmpp_2m", "euler", "heun", "euler_maruyama", "sde_heun", "dopri5"),
}


def small(process: str, sampler: str, **sampling):
    """`sampling`: its leaves; of guidance "guidance", the scale, and "guidance__schedule" and others."""
    given = {"data.size": SIDE, "diffusion.process": process, "sampling.sampler": sampler}
    given["sampling.steps"] = 0 if sampler == "dopri5" else 4
    return of(given | {f"sampling.{name.replace('__', '.')}": value for name, value in sampling.items()})


def network(params, x, t, y):
    """Different for each label and time; twice the channels, of which only a learned variance uses the second half."""
    phase = (0.1 * y + 0.3 * t / (1 + jnp.abs(t)))[:, None, None, None]
    return params * jnp.concatenate([jnp.tanh(x) + phase, jnp.tanh(x)], axis=-1)


LABELS, KEYS = jnp.array([0, 3]), rng.per_example(jax.random.key(5), jnp.arange(2))


def drawn(c, guide=None, apply=network, **given):
    sampler = method_of(c).sampler(c.sampling, autoguided=guide is not None)
    sample = jax.jit(lambda keys, schedule: sampler.sample(apply, 0.5, schedule, LABELS, keys, guide))
    return np.asarray(sample(KEYS, given.get("schedule", sampler.schedule)))


@pytest.mark.parametrize("process, sampler", [(p, s) for p in SPANS for s in SPANS[p]])
def test_every_sampler_gives_finite_images_of_every_process(process, sampler):
    images = drawn(small(process, sampler, guidance=1.5))
    assert (images.shape, images.dtype) == ((2, SIDE, SIDE, 4), np.float32)
    assert np.isfinite(images).all()
    assert images.std() > 1e-3


def test_every_sampler_is_named_above():
    assert set().union(*SPANS.values()) == set(samplers.SAMPLERS)


def test_options_reach_the_sampler():
    for sampler, given in (("ddim", "eta=1"), ("edm", "churn=40,churn_min=0.05"), ("sde_heun", "last_step=tweedie")):
        leaves = {f"{sampler}__{name}": value for name, value in pairs("", given).items()}
        configs = [small("flow_linear", sampler, **each) for each in (leaves, {"options": given}, {})]
        assert configs[0] == configs[1]
        with_, _, without = (method_of(c).sampler(c.sampling).schedule for c in configs)
        both = zip(jax.tree.leaves(with_), jax.tree.leaves(without))
        assert any(a.shape != b.shape or (a != b).any() for a, b in both), sampler


def test_pairs():
    found = pairs("leaf", "a=1,b=-2.5e-3,c=tweedie,d=inf")
    assert found == {"a": 1, "b": -2.5e-3, "c": "tweedie", "d": float("inf")}
    assert isinstance(found["a"], int)
    assert pairs("leaf", "") == {}


def test_guidance_of_one_is_a_plain_call_and_an_interval_is_skipped():
    def sizes(**sampling):
        found = []

        def counting(params, x, t, y):
            jax.debug.callback(lambda _: found.append(len(x)), t[0])
            return network(params, x, t, y)

        drawn(small("edm", "edm", steps=8, **sampling), apply=counting)
        jax.effects_barrier()
        return found

    assert sizes(guidance=1.0) == [2] * 15
    assert sizes(guidance=1.5) == [4] * 15
    assert sizes(guidance=1.5, guidance__calls="two") == [2] * 30
    interval = {"guidance__interval__low": 0.28, "guidance__interval__high": 2.9}
    skipped = sizes(guidance=1.5, guidance__schedule="interval", **interval)
    assert set(skipped) == {2, 4}
    assert len(skipped) == 15


def test_another_schedule_is_the_same_as_another_config():
    few, many = (small("flow_linear", "heun", steps=steps, guidance=2.0) for steps in (3, 6))
    schedule = sampler_schedule(process_of(few), few.sampling, max_steps=6)
    np.testing.assert_allclose(drawn(many, schedule=schedule), drawn(few), atol=1e-5)


def test_autoguidance():
    """Away from a worse network with the same labels, by the weight of the config, also without a null class."""
    c = resolve({**small("flow_linear", "euler", steps=1, guidance=3.0).values, "diffusion.label_drop": 0.0})
    worse = lambda x, t, y: 0.25 * network(1.0, x, t, y)  # noqa: E731
    better_alone, worse_alone = (
        drawn(small("flow_linear", "euler", steps=1), apply=a) for a in (network, lambda p, *rest: worse(*rest))
    )
    np.testing.assert_allclose(drawn(c, worse), worse_alone + 3.0 * (better_alone - worse_alone), atol=1e-5)
    with pytest.raises(UserError, match="needs a null condition"):
        method_of(c).sampler(c.sampling)


# What has no meaning

REFUSED = {
    "process": ({"process": "ddpm"}, {}, "diffusion.process = 'ddpm': valid: gaussian, edm"),
    "variance-edm": (
        {"process": "edm", "variance": "fixed_small"},
        {},
        "did you mean diffusion.edm.times, diffusion.edm.gamma, diffusion.gaussian.var",
    ),
    "loss-flow": ({"process": "flow_vp", "loss": "mse"}, {}, "no leaf 'diffusion.flow_vp.loss'"),
    "steps-edm": ({"process": "edm", "steps": 1000}, {}, "no leaf 'diffusion.edm.steps'; did you mean"),
    "times-gaussian": ({"times": "lognormal"}, {}, "no leaf 'diffusion.gaussian.times'"),
    "uncertainty-gaussian": (
        {"weighting": "uncertainty"},
        {},
        "diffusion.gaussian.weighting = 'uncertainty': valid: uniform, snr, min_snr, edm",
    ),
    "infinite-weight": ({"process": "flow_linear", "weighting": "likelihood"}, {}, "'likelihood' is inf at t = 1"),
    "option": ({"process": "edm", "options": "shift=3"}, {}, "no leaf 'diffusion.edm.shift'"),
    "option-word": ({"process": "edm", "options": "p_mean=low"}, {}, "p_mean = 'low': valid: a number"),
    "option-text": ({"options": "p_mean"}, {}, "diffusion.options: 'p_mean' is not understood"),
    "option-twice": ({"options": "gamma=5,gamma=4"}, {}, "each name once"),
    "option-gone": ({"options": "respacing=10"}, {}, "the config has no leaf 'diffusion.gaussian.respacing'"),
    "option-unread": (
        {"edm.p_mean": 1.0},
        {},
        "p_mean = 1.0 is not read with diffusion.process = gaussian",
    ),
    "sampler-unread": ({}, {"ddim.eta": 1.0}, "sampling.ddim.eta = 1.0 is not read with sampling.sampler = ddpm, only"),
    "schedule-unread": ({}, {"guidance.interval.low": 0.1}, "is not read with sampling.guidance.schedule = constant"),
    "sampler": ({}, {"sampler": "heun3"}, "sampling.sampler = 'heun3': valid: ddpm"),
    "heun-gaussian": ({}, {"sampler": "heun"}, "sampler 'heun' moves in continuous time"),
    "ddpm-flow": ({"process": "flow_linear"}, {"sampler": "ddpm"}, "valid in continuous time: ddim with eta 1"),
    "sbdm": (
        {"process": "flow_linear"},
        {"sampler": "euler_maruyama", "options": "diffusion=sbdm"},
        "'sbdm' divides by zero at t = 0",
    ),
    "sde-edm": ({"process": "edm"}, {"sampler": "sde_heun"}, "counts time from noise at 0 to data at 1"),
    "clip-dopri5": (
        {"process": "edm"},
        {"sampler": "dopri5", "steps": 0, "clip": True},
        "sampling.clip limits x0, which the adaptive sampler 'dopri5'",
    ),
    "eta-ddpm": ({}, {"options": "eta=1"}, "no leaf 'sampling.ddpm.eta'; did you mean sampling.ddim.eta"),
    "sampler-word": (
        {"process": "edm"},
        {"sampler": "edm", "options": "churn=much"},
        "churn = 'much': valid: a number",
    ),
    "sampler-leaf": ({}, {"options": "steps=3"}, "no leaf 'sampling.ddpm.steps'; did you mean sampling.steps"),
    "sampler-weight": ({}, {"options": "weight=3"}, "no leaf 'sampling.ddpm.weight'"),
    "no-steps": ({}, {"steps": 0}, "0 sampling steps"),
    "dopri5-steps": ({"process": "edm"}, {"sampler": "dopri5", "steps": 9}, "chooses its steps as it goes; valid: 0"),
    "rho-stride": ({}, {"sampler": "ddim", "options": "rho=5"}, "rho have no meaning with spacing 'stride'"),
    "churn-less": ({"process": "edm"}, {"sampler": "edm", "options": "churn_min=1"}, "no meaning without churn"),
    "churn-range": (
        {"process": "edm"},
        {"sampler": "edm", "options": "churn=40,churn_min=9,churn_max=1"},
        "churn_min = 9.0 is above churn_max = 1.0",
    ),
    "ahead-rounded": (
        {"process": "edm_iddpm"},
        {"sampler": "edm", "options": "ahead=0.5"},
        "looks between the steps",
    ),
    "shift-edm": ({"process": "edm"}, {"sampler": "heun", "options": "shift=3"}, "where time is the noise level"),
    "no-last-step": (
        {"process": "flow_linear"},
        {"sampler": "sde_heun", "options": "last_step=none,last_step_size=0.1"},
        "last_step_size = 0.1 has no meaning",
    ),
    "nan": (
        {"process": "edm"},
        {"sampler": "edm", "options": "rho=nan"},
        "sampling.edm.rho = nan: valid: a finite number",
    ),
    "guidance-nan": ({}, {"guidance": float("nan")}, "sampling.guidance.scale = nan: valid: a finite number"),
    "power": (
        {},
        {"guidance": 2.0, "guidance_weights": "power_cosine,power=-1"},
        "sampling.guidance.power_cosine.power = -1: valid: above 0",
    ),
    "power-cosine-edm": (
        {"process": "edm"},
        {"sampler": "edm", "guidance": 2.0, "guidance_weights": "power_cosine,power=4"},
        "depends on t/T, which this process has not",
    ),
    "weights-unguided": ({}, {"guidance_weights": "power_cosine,power=4"}, "needs a sampling.guidance.scale beside 1"),
    "weights-kind": (
        {},
        {"guidance": 2.0, "guidance_weights": "linear"},
        "sampling.guidance.schedule = 'linear': valid: constant, power_cosine, interval",
    ),
    "weights-names": (
        {},
        {"guidance": 2.0, "guidance_weights": "interval,lo=1"},
        "no leaf 'sampling.guidance.interval.lo'; did you mean sampling.guidance.interval.low",
    ),
    "weights-text": ({}, {"guidance": 2.0, "guidance_weights": "interval,low"}, "guidance_weights: 'low' is not under"),
    "guidance": (
        {"label_drop": 0.0},
        {"guidance": 2.0},
        "sampling.guidance.scale needs a null condition: data.num_classes",
    ),
    "guidance-calls": ({}, {"guidance_calls": "three"}, "sampling.guidance.calls = 'three': valid: '', one, two"),
    "guidance-channels": ({}, {"guidance_channels": 5}, "valid: 0 (all) to 4"),
}


@pytest.mark.parametrize("diffusion, sampling, reason", REFUSED.values(), ids=REFUSED)
def test_what_has_no_meaning_is_refused_before_anything_is_compiled(diffusion, sampling, reason):
    given = {f"diffusion.{name}": value for name, value in diffusion.items()}
    given |= {f"sampling.{name}": value for name, value in sampling.items()}
    with pytest.raises(UserError) as raised:
        sampler_of(of, given)
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_loss_that_asks_for_more_parameters_has_them():
    assert method_of(config()).extra(jax.random.key(0)) == {}
    c = of({"diffusion.process": "flow_linear", "diffusion.flow_linear.weighting": "uncertainty"})
    shapes = fresh_shapes(c)
    assert shapes["uncertainty"]["kernel"].shape == (2 * weighting.FEATURES + 1,)
    fused = jax.eval_shape(lambda params: models.fused(method_of(c).model, params)[1], shapes)
    assert fused["uncertainty"] == shapes["uncertainty"]
