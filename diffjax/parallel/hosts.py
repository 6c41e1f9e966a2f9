"""Start-up of several hosts, and what one of them does for all."""

import os

import jax

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


def is_lead() -> bool:
    """True on the one process that prints and writes files for all."""
    return jax.process_index() == 0


def _integer(name: str) -> int | None:
    value = os.environ.get(name)
    return int(value) if value else None
