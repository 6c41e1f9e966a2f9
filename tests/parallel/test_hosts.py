"""Who joins others, and on which platform: decided by the environment, before any device is touched."""

import jax
import pytest

from diffjax.errors import UserError
from diffjax.parallel import hosts

ALLOCATION = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.fixture
def joining(monkeypatch):
    """The environment of a process that no launcher started, and a list of the joins that were tried."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    for name in (*hosts._LAUNCHERS, *ALLOCATION, "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    "variables, joins",
    [
        ({}, 0),
        (ALLOCATION, 0),
        (ALLOCATION | {"SLURM_STEP_NUM_TASKS": "1"}, 0),
        (ALLOCATION | {"SLURM_STEP_NUM_TASKS": "4"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "x", "SLURM_PROCID": "0"}, 0),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, 0),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 1),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 0),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, 1),
    ],
    ids=["alone", "batch script", "shell in an allocation", "srun", "no number", "mpi of 1", "mpi", "one host", "jax"],
)
def test_only_a_process_that_is_one_of_several_joins(joining, monkeypatch, variables, joins):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hosts.start("off")
    assert not joining
    hosts.start()
    assert len(joining) == joins


def test_who_does_not_come_is_said(joining, monkeypatch):
    def fail(**arguments):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"OMPI_COMM_WORLD_SIZE=2\): DEADLINE_EXCEEDED.*--distributed=off runs alone$"):
        hosts.start()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="JAX_NUM_PROCESSES=two: valid: a whole number"):
        hosts.start()


@pytest.mark.parametrize(
    "error", [RuntimeError("Unable to initialize backend 'cuda': no plugin (set JAX_PLATFORMS='')"), AssertionError()]
)
def test_a_platform_that_is_not_there(joining, monkeypatch, error):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(UserError, match=r"^JAX_PLATFORMS=cuda: .*plugin.*; install jax for that platform") as raised:
        hosts.start("off")
    assert "set JAX_PLATFORMS=''" not in str(raised.value)
