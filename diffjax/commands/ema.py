"""Make an average of any length from the snapshots of a run: OUT/params (Orbax) and OUT/model.json.

python -m diffjax ema --workdir=runs/a --sigma-rel=0.08 --out=params/ema-0.08 [--step=300000]
python -m diffjax sample --params=params/ema-0.08 --num=500 --out=samples.npz

A run keeps snapshots when its config has `ema.sigma_rel` and `ema.snapshot_every_steps`. The average ends at the
snapshot of --step, by default the last one. The profile error that is printed says how far the combined weighting over
time is from the power function asked for, relative to it, as root mean square: 0 is an exact average.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from diffjax.commands import define_distributed, define_path
from diffjax.errors import UserError
from diffjax.parallel import hosts
from diffjax.runs import open_experiment
from diffjax.training import ema
from diffjax.training.checkpoint import POWER_EMAS, Snapshots
from diffjax.weights import store

# Beyond this the combination is no average of the length asked for.
LARGEST_ERROR = 0.5


INTERRUPTED = "what --out holds is not complete; remove it before the same command"
REQUIRED = ("workdir", "sigma_rel", "out")


def define_flags(values: flags.FlagValues) -> None:
    define_path("workdir", None, "run folder with snapshots", values)
    flags.DEFINE_float(
        "sigma_rel", None, "length of the average relative to the training, as in EDM2", flag_values=values
    )
    define_path("out", None, "new folder for the parameters", values)
    flags.DEFINE_integer("step", None, "snapshot at which the average ends; the last by default", flag_values=values)
    define_distributed(values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    hosts.start(values.distributed)
    workdir, out = values.workdir, values.out
    model = reconstruct(workdir, values.sigma_rel, out, values.step)
    used, names = model["snapshots"], model["tracks"]
    print(
        f"wrote {out}: sigma_rel {model['sigma_rel']} at step {model['step']} of {workdir}, from {len(used)} snapshots "
        f"of {' and '.join(names)}, profile error {model['profile_error']:.2g}"
    )


def reconstruct(workdir: Path, sigma_rel: float, out: Path, step: int | None = None) -> dict[str, Any]:
    """Write the average (module docstring) and return the content of model.json. UserError where `out` is there."""
    store.refuse_full(out)
    experiment = open_experiment(workdir)
    params, origin = combined(workdir, sigma_rel, step)
    config = {"config": experiment.stored_config()}  # with which alone the parameters make sense
    return store.save(out, experiment.model, params, {**origin, **config})


def combined(workdir: Path, sigma_rel: float, step: int | None = None) -> tuple[Any, dict[str, Any]]:
    """The average float32, and how it was made; holds one snapshot at a time.

    Raises:
        UserError: no snapshots, or none of `step`; a length that they cannot give.
    """
    ema.gamma_of(sigma_rel)
    snapshots = Snapshots(workdir, read_only=True)
    steps = snapshots.steps()
    if not steps:
        raise UserError(f"{workdir} has no snapshots; a run with ema.sigma_rel and ema.snapshot_every_steps keeps them")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"--step={step}: no such snapshot in {workdir}; there are: {steps}")
    steps = [s for s in steps if s <= step]
    metas = [snapshots.meta(s) for s in steps]
    names = list(metas[-1]["sigma_rel"])
    stored = [ema.Profile(meta["images_seen"], meta["sigma_rel"][name]) for meta in metas for name in names]
    wanted = ema.Profile(metas[-1]["images_seen"], sigma_rel)
    coefficients = ema.solve_weights(stored, wanted)
    error = ema.profile_error(stored, wanted, coefficients)
    if error > LARGEST_ERROR:
        raise UserError(
            f"--sigma_rel={sigma_rel}: {len(steps)} snapshots of {', '.join(names)} up to step {step} cannot give it: "
            f"the profile would be off by {error:.0%}; valid: closer to these lengths, or a run with more snapshots"
        )
    params = jax.tree.map(np.float32, ema.combine(_trees(snapshots, steps, names), coefficients))
    origin = {"workdir": str(workdir), "step": step, "sigma_rel": sigma_rel, "snapshots": steps, "tracks": names}
    return params, {**origin, "profile_error": error}


def _trees(snapshots: Snapshots, steps: list[int], names: list[str]) -> Iterator[Any]:
    """The power-function EMAs of one snapshot after the other, in the order of the coefficients."""
    for step in steps:
        tree = snapshots.restore_arrays(POWER_EMAS, step)
        yield from (tree[name] for name in names)
