"""The Optax chain and learning-rate schedule of a config."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from diffjax.errors import UserError


def schedule(optim: ConfigDict, total_steps: int) -> optax.Schedule:
    """Linear warm-up to `lr`, then constant, half a cosine that ends at zero or lr / 100 at `total_steps`, or constant
    until `decay_after_steps` and falling as 1 / sqrt(step) from there, as in EDM2 (2312.02696)."""
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
    if not optim.warmup_steps:
        return after[optim.schedule]()
    warmup = optax.linear_schedule(0.0, optim.lr, optim.warmup_steps)
    return optax.join_schedules([warmup, after[optim.schedule]()], [optim.warmup_steps])


def _inverse_sqrt(lr: float, decay_after: int, warmup: int) -> optax.Schedule:
    """lr / sqrt(max(step / decay_after, 1)), of a count that begins after the warm-up."""

    def rate(count: jax.Array) -> jax.Array:
        return lr / jnp.sqrt(jnp.maximum((count + warmup) / decay_after, 1.0))

    return rate


def optimizer(optim: ConfigDict, total_steps: int) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101), after clipping by the global norm when `clip` is positive."""
    if optim.lr < 0 or optim.clip < 0 or optim.warmup_steps < 0:
        raise UserError("optim: lr, clip and warmup_steps must not be negative")
    if not (0 <= optim.b1 < 1 and 0 <= optim.b2 < 1):
        raise UserError(f"optim.b1 = {optim.b1}, optim.b2 = {optim.b2}: valid: 0 to below 1")
    adamw = optax.adamw(
        schedule(optim, total_steps), b1=optim.b1, b2=optim.b2, eps=optim.eps, weight_decay=optim.weight_decay
    )
    # The same tree of states with and without clipping, so that a run can go on with another `clip`.
    return optax.chain(optax.clip_by_global_norm(optim.clip) if optim.clip else optax.identity(), adamw)
