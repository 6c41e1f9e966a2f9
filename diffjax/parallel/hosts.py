"""Start-up of several hosts, and what one of them does for all."""

import os
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffjax.errors import UserError

# What a launcher sets for every process of a job with more than one process.
_LAUNCHERS = {
    "JAX_COORDINATOR_ADDRESS": lambda value: True,
    "MEGASCALE_COORDINATOR_ADDRESS": lambda value: True,
    "TPU_WORKER_HOSTNAMES": lambda value: "," in value,
    "TPU_PROCESS_ADDRESSES": lambda value: "," in value,
    "SLURM_NTASKS": lambda value: int(value) > 1 and "SLURM_PROCID" in os.environ,
    "OMPI_COMM_WORLD_SIZE": lambda value: int(value) > 1,
}


def start(mode: str = "auto") -> None:
    """Join the other processes of this job, before any device is touched.

    Args:
        mode: "auto" joins when the environment names a launcher with several processes (JAX_COORDINATOR_ADDRESS with
            JAX_NUM_PROCESSES and JAX_PROCESS_ID, a GKE or Cloud TPU slice, Slurm, Open MPI); "on" always, with jax's
            own detection (a Cloud TPU VM slice needs nothing else); "off" never.
    """
    if mode not in ("auto", "on", "off"):
        raise UserError(f"--distributed={mode} is unknown; valid: auto, on, off")
    give_threads_to_simulated_devices()
    found = [name for name, several in _LAUNCHERS.items() if (value := os.environ.get(name)) and several(value)]
    if mode == "off" or (mode == "auto" and not found):
        return
    try:
        jax.distributed.initialize(
            num_processes=_integer("JAX_NUM_PROCESSES"),
            process_id=_integer("JAX_PROCESS_ID"),
        )
    except ValueError as error:
        raise UserError(f"cannot join the other processes ({found or 'no launcher found'}): {error}") from error


def give_threads_to_simulated_devices() -> None:
    """Enlarge XLA's CPU thread pool for simulated devices; must run before any device is touched.

    Each of them blocks a thread in every collective it waits at. In a pool as small as the number of cores they wait
    for each other until XLA aborts the program.
    """
    forced = re.search(r"xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    config: Any = jax.config
    devices = max(int(forced.group(1)) if forced else 1, config.jax_num_cpu_devices)
    if devices > 1:
        os.environ.setdefault("NPROC", str(8 * devices))  # read by XLA


def is_lead() -> bool:
    """True on the one process that prints and writes files for all."""
    return jax.process_index() == 0


def fetch_whole(array: jax.Array) -> np.ndarray:
    """The values of an array on every process; all of them call it where the array lies on several."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(jax.device_get(array))


def _integer(name: str) -> int | None:
    value = os.environ.get(name)
    return int(value) if value else None
