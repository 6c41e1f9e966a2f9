"""The Optax chain and learning-rate schedule of a config."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from diffjax.errors import UserError


def schedule(optim: ConfigDict, total_steps: int) -> optax.Schedule:
    """Linear warm-up from `warmup_from` to `lr`, then constant, half a cosine that ends at zero or lr / 100 at
    `total_steps`, or constant until `decay_after_steps` and falling as 1 / sqrt(step) from there (EDM2, 2312.02696).

    The schedule that fairseq calls inverse_sqrt is the last with `decay_after_steps` = `warmup_steps`.
    """
    rest = max(total_steps - optim.warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(optim.lr),
        "cosine": lambda: optax.cosine_decay_schedule(optim.lr, rest),
        "cosine_to_hundredth": lambda: optax.cosine_decay_schedule(optim.lr, rest, alpha=0.01),
        "inverse_sqrt": lambda: _inverse_sqrt(optim.lr, optim.decay_after_steps, optim.warmup_steps),
    }
    if optim.schedule not in after:
        raise UserError(f"optim.schedule = {optim.schedule!r} is unknown; valid: {', '.join(after)}")
    if optim.schedule == "inverse_sqrt" and optim.decay_after_steps < max(optim.warmup_steps, 1):
        raise UserError(f"optim.decay_after_steps = {optim.decay_after_steps}: valid: 1 or more, not in the warm-up")
    if optim.schedule != "inverse_sqrt" and optim.decay_after_steps:
        raise UserError(f"optim.decay_after_steps has no effect with optim.schedule = {optim.schedule!r}")
    if optim.warmup_from and not optim.warmup_steps:
        raise UserError(f"optim.warmup_from = {optim.warmup_from} has no effect without optim.warmup_steps")
    if not optim.warmup_steps:
        return after[optim.schedule]()
    warmup = optax.linear_schedule(optim.warmup_from, optim.lr, optim.warmup_steps)
    return optax.join_schedules([warmup, after[optim.schedule]()], [optim.warmup_steps])


def _inverse_sqrt(lr: float, decay_after: int, warmup: int) -> optax.Schedule:
    """lr / sqrt(max(step / decay_after, 1)), of a count that begins after the warm-up."""

    def rate(count: jax.Array) -> jax.Array:
        return lr / jnp.sqrt(jnp.maximum((count + warmup) / decay_after, 1.0))

    return rate


def optimizer(optim: ConfigDict, total_steps: int) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101), after clipping by the global norm when `clip` is positive; or both as fairseq does."""
    if optim.lr < 0 or optim.clip < 0 or optim.warmup_steps < 0 or optim.warmup_from < 0:
        raise UserError("optim: lr, clip, warmup_steps and warmup_from must not be negative")
    if not (0 <= optim.b1 < 1 and 0 <= optim.b2 < 1):
        raise UserError(f"optim.b1 = {optim.b1}, optim.b2 = {optim.b2}: valid: 0 to below 1")
    rules = {
        "adamw": (optax.scale_by_adam, optax.clip_by_global_norm),
        "fairseq_adam": (_scale_by_fairseq_adam, _clip_like_fairseq),
    }
    if optim.name not in rules:
        raise UserError(f"optim.name = {optim.name!r} is unknown; valid: {', '.join(rules)}")
    scale_by_adam, clip = rules[optim.name]
    adamw = optax.chain(
        scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps),
        optax.add_decayed_weights(optim.weight_decay),
        optax.scale_by_learning_rate(schedule(optim, total_steps)),
    )
    # The same tree of states with and without clipping, so that a run can go on with another `clip`.
    return optax.chain(clip(optim.clip) if optim.clip else optax.identity(), adamw)


def _scale_by_fairseq_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """m / (1 - b1^t) over (sqrt(v) + eps) / sqrt(1 - b2^t): `eps` too is divided, unlike in Adam's algorithm 1."""

    def init(params: Any) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.nu, gradients)
        count = optax.safe_increment(state.count)
        size = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        updates = jax.tree.map(lambda m, v: size * m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _clip_like_fairseq(limit: float) -> optax.GradientTransformation:
    """Gradients times min(1, limit / (norm + 1e-6))."""

    def update(gradients: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factor = jnp.minimum(1.0, limit / (optax.tree.norm(gradients) + 1e-6))
        return jax.tree.map(lambda g: factor * g, gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
