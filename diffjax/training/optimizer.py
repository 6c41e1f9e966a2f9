"""The Optax chain and learning-rate schedule of a config."""

import optax
from ml_collections import ConfigDict

from diffjax.errors import UserError


def schedule(optim: ConfigDict, total_steps: int) -> optax.Schedule:
    """Linear warm-up to `lr`, then constant, or half a cosine that ends at zero or lr / 100 at `total_steps`."""
    rest = max(total_steps - optim.warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(optim.lr),
        "cosine": lambda: optax.cosine_decay_schedule(optim.lr, rest),
        "cosine_to_hundredth": lambda: optax.cosine_decay_schedule(optim.lr, rest, alpha=0.01),
    }
    if optim.schedule not in after:
        raise UserError(f"optim.schedule = {optim.schedule!r} is unknown; valid: {', '.join(after)}")
    if not optim.warmup_steps:
        return after[optim.schedule]()
    warmup = optax.linear_schedule(0.0, optim.lr, optim.warmup_steps)
    return optax.join_schedules([warmup, after[optim.schedule]()], [optim.warmup_steps])


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
