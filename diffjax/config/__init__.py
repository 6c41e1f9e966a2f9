"""Configs: the schema of all leaves, recipes and overrides, and the copy that a run folder keeps."""

from diffjax.config.load import base, check_same_run, differences, load, model_defaults, override, read, write
from diffjax.config.schema import Config, leaves, resolve

__all__ = [
    "Config",
    "base",
    "check_same_run",
    "differences",
    "leaves",
    "load",
    "model_defaults",
    "override",
    "read",
    "resolve",
    "write",
]
