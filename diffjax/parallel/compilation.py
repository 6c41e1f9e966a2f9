"""The compilation cache that all commands share: a program is compiled once on a machine, not once per command."""

import hashlib
import logging
import os
import platform
from pathlib import Path
from typing import Any

import jax

from diffjax.files import cache_folder

logger = logging.getLogger(__name__)
VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # jax's own: another folder; empty: no cache


def use_cache() -> None:
    """Keep compiled programs in the user's cache folder, unless the environment or a setting of jax says where.

    A folder that cannot be made is said, and then there is no cache.
    """
    config: Any = jax.config
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # of small models all programs are small
    if VARIABLE in os.environ or config.jax_compilation_cache_dir:
        return
    folder = default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if writable:
        config.update("jax_compilation_cache_dir", str(folder))
    else:
        logger.info(f"no compilation cache: {folder} cannot be written; {VARIABLE} names another")


def default_folder() -> Path:
    """`jax-<hash>` in the cache folder; the hash is that of the processor's features.

    A program compiled for one processor may not run on another one that shares the home folder.
    """
    return cache_folder() / f"jax-{hashlib.sha256(_processor().encode()).hexdigest()[:8]}"


def _processor() -> str:
    """The kind of the processor and what it can do, where the system says so."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {features}"
