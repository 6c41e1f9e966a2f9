"""Diffusion processes, samplers and guidance.

`paths` holds the mathematics that all share: how data and noise mix, and what networks predict of them. `gaussian`,
`edm` and `flow` make processes of it, `weighting` the weights of their losses.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from diffjax.diffusion import edm, flow, gaussian
from diffjax.diffusion.gaussian import GaussianDiffusion
from diffjax.diffusion.process import Process
from diffjax.errors import UserError
from diffjax.options import Value, check, options

# The keyword parameters of each are its options, the leaves of the config's section of that name.
PROCESSES: dict[str, Callable[..., Any]] = {
    "gaussian": gaussian.gaussian_diffusion,
    "edm": edm.edm,
    "edm_vp": partial(edm.edm, "vp"),
    "edm_ve": partial(edm.edm, "ve"),
    "edm_iddpm": partial(edm.edm, "iddpm"),
    "flow_linear": flow.flow,
    "flow_gvp": partial(flow.flow, "gvp"),
    "flow_vp": partial(flow.flow, "vp"),
}


def create_process(name: str, **given: Value) -> GaussianDiffusion | Process:
    """The process `name`, one of PROCESSES, from plain values; see its function there for the options.

    UserError on an unknown name or option, a value of another type or that is not valid, a number that nothing reads,
    and on a combination without meaning.
    """
    if name not in PROCESSES:
        raise UserError(f"process {name!r} is unknown; valid: {', '.join(PROCESSES)}")
    known = options(PROCESSES[name])
    for option in given:
        if option not in known:
            raise UserError(f"process {name!r} has no option {option!r}; valid: {', '.join(known)}")
    checked = {option: check(f"process {name!r}: {option}", known[option], value) for option, value in given.items()}
    return PROCESSES[name](**checked)
