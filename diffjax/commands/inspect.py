"""Print what a run folder holds as one json object: complete steps, snapshots, sizes and sha256 of one of the steps.

python -m diffjax inspect --workdir=runs/a [--step=300]

The sha256 of params, ema, opt_state and, where there are any, `tracks` (the power-function EMAs) goes over (path,
dtype, shape, bytes) of every leaf in the order of the paths: equal runs give equal hashes on any machine and mesh.
"""

import json
from pathlib import Path
from typing import Any

import jax
from absl import flags

from diffjax.commands import define_path
from diffjax.errors import UserError
from diffjax.parallel import hosts
from diffjax.training.checkpoint import POWER_EMAS, Checkpoints, Snapshots
from diffjax.weights.store import tree_sha256

REQUIRED = ("workdir",)


def define_flags(values: flags.FlagValues) -> None:
    define_path("workdir", None, "run folder", values)
    flags.DEFINE_integer("step", None, "which checkpoint; the latest by default", flag_values=values)


def run(values: flags.FlagValues, overrides: list[str]) -> None:
    hosts.start("off")
    print(json.dumps(inspect(values.workdir, values.step), indent=2))


def inspect(workdir: Path, step: int | None = None) -> dict[str, Any]:
    """See the module docstring."""
    if not (workdir / "config.json").is_file():
        raise UserError(f"--workdir={workdir} is not a run folder: it has no config.json")
    checkpoints = Checkpoints(workdir, read_only=True)
    steps = checkpoints.steps()
    report: dict[str, Any] = {"workdir": str(workdir), "steps": steps, "latest": max(steps, default=None)}
    report["snapshots"] = Snapshots(workdir, read_only=True).steps()
    step = report["latest"] if step is None else step
    if step is None:
        return report
    if step not in steps:
        raise UserError(f"--step={step}: no such checkpoint in {workdir}; complete: {steps}")
    state = checkpoints.restore_arrays("state", step)
    trees = {"params": state["params"], "ema": checkpoints.restore_arrays("ema", step), "opt_state": state["opt_state"]}
    if checkpoints.has(POWER_EMAS, step):
        trees[POWER_EMAS] = checkpoints.restore_arrays(POWER_EMAS, step)
    report["step"] = step
    report["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(trees["params"]))
    report["bytes"] = {name: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for name, tree in trees.items()}
    report["sha256"] = {name: tree_sha256(tree) for name, tree in trees.items()}
    report["meta"] = checkpoints.meta(step)
    return report
