"""Start-up of several hosts, and operations that one host does for all."""

import contextlib
import os
import re
from collections.abc import Iterator
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
    # Of the step that this process is a task of; SLURM_NTASKS is also set in a script or shell that is no such task.
    "SLURM_STEP_NUM_TASKS": lambda value: _several(value) and "SLURM_PROCID" in os.environ,
    "OMPI_COMM_WORLD_SIZE": lambda value: _several(value),
}


def start(mode: str = "auto") -> None:
    """Join the other processes of this job, before any device is touched; then see that there is a device.

    Args:
        mode: "auto" joins when the environment names a launcher with several processes (JAX_COORDINATOR_ADDRESS with
            JAX_NUM_PROCESSES and JAX_PROCESS_ID, a GKE or Cloud TPU slice, a Slurm step, Open MPI); "on" always, with
            jax's own detection (a Cloud TPU VM slice needs nothing else); "off" never: what needs no other process.

    Raises:
        UserError: the others cannot be joined, or the platform that the environment asks for is not there.
    """
    give_threads_to_simulated_devices()
    found = [name for name, several in _LAUNCHERS.items() if (value := os.environ.get(name)) and several(value)]
    if mode == "on" or (mode == "auto" and found):
        _join(", ".join(f"{name}={os.environ[name]}" for name in found) or "no launcher found")
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax's ways to say that a platform cannot be used
        asked = f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}: " if os.environ.get("JAX_PLATFORMS") else ""
        reason = str(error).partition("\n")[0].partition(" (")[0].rstrip(".") or "jax finds no plugin for it"
        raise UserError(f"{asked}{reason}; install jax for that platform, or set JAX_PLATFORMS=cpu") from error


def _join(found: str) -> None:
    own, count = _integer("JAX_PROCESS_ID"), _integer("JAX_NUM_PROCESSES")
    print(f"joining the other processes of this job ({found}), which have five minutes to start", flush=True)
    try:
        jax.distributed.initialize(num_processes=count, process_id=own)
    except (ValueError, RuntimeError) as error:  # a variable is missing, or a process did not start
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot join the other processes ({found}): {reason}; --distributed=off runs alone") from error


def joined() -> bool:
    """Whether this process is one of several; touches no device."""
    return jax.distributed.is_initialized()


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


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that all processes leave together, however long one of them takes; a UserError of one is one of all."""
    error = None
    try:
        yield
    except UserError as own:
        error = own
    said = texts(str(error or ""))
    if error is not None:
        raise error
    if any(said):
        first = next(number for number, text in enumerate(said) if text)
        raise UserError(f"process {first}: {said[first]}")


def texts(own: str) -> list[str]:
    """What every process gives, by process; all of them call it."""
    if jax.process_count() == 1:
        return [own]
    data = np.frombuffer(own.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(data.size))
    padded = np.pad(data, (0, lengths.max() - data.size))
    return [bytes(row[:n]).decode() for row, n in zip(multihost_utils.process_allgather(padded), lengths)]


def leads(values: np.ndarray) -> np.ndarray:
    """An array as the lead has it, on every process; all of them call it, with the same shape and dtype."""
    return np.asarray(multihost_utils.broadcast_one_to_all(values)) if jax.process_count() > 1 else values


def wait(reason: str) -> None:
    """Wait for all processes of this job; reason: the same on all of them, and used once."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(reason)


def say(line: str) -> None:
    """Print a line, on the one process that speaks for all."""
    if is_lead():
        print(line, flush=True)


def _several(value: str) -> bool:
    return value.isdecimal() and int(value) > 1


def _integer(name: str) -> int | None:
    value = os.environ.get(name)
    if value and not value.isdecimal():
        raise UserError(f"{name}={value}: valid: a whole number")
    return int(value) if value else None
