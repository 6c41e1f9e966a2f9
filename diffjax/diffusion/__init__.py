"""Diffusion processes, samplers and guidance.

`paths` holds the mathematics that all share: how data and noise mix, and what networks predict of them. `gaussian`,
`edm` and `flow` make processes of it, `weighting` the weights of their losses.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from diffjax.diffusion import edm, flow, gaussian
from diffjax.diffusion.gaussian import GaussianDiffusion
from diffjax.diffusion.process import Process
from diffjax.errors import UserError

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


WORDS = {str: "word", float | None: "number", int: "whole number"}


def create_process(name: str, **options: Any) -> GaussianDiffusion | Process:
    """The process `name`, one of PROCESSES, from plain values; see its function there for the options.

    All know prediction, weighting, gamma and sigma_data. Options of "gaussian": respacing, variance, loss, steps;
    of all others: times; of the "edm" ones: p_mean, p_std; of the "flow" ones: logit_mean, logit_std, shift. An
    option of "" counts as not given. UserError on an unknown name or option, a word for a number or the other way
    round, a number that is not finite or that nothing reads, and on a combination without meaning.
    """
    if name not in PROCESSES:
        raise UserError(f"process {name!r} is unknown; valid: {', '.join(PROCESSES)}")
    parameters = inspect.signature(PROCESSES[name]).parameters.values()
    valid = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY}
    given = {option: value for option, value in options.items() if value != ""}
    for option, value in given.items():
        if option not in valid:
            raise UserError(f"process {name!r} has no option {option!r}; valid: {', '.join(valid)}")
        fits = not isinstance(value, str) and (valid[option] is not int or isinstance(value, int))
        if not (isinstance(value, str) if valid[option] is str else fits):
            raise UserError(f"process {name!r} with {option} = {value!r}: valid: a {WORDS[valid[option]]}")
    return PROCESSES[name](**given)
