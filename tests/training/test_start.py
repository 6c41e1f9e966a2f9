"""What a run says when it starts."""

from types import SimpleNamespace

from diffjax.experiment import build
from diffjax.training import loop
from tests.programs import tiny_config


def test_the_start_says_what_was_found():
    said: list[str] = []
    loop._announce(build(tiny_config()), SimpleNamespace(say=said.append), 0, {})
    assert said[-1].startswith("starting: DiT, ")
    assert said[-1].endswith("; 1,500 images of digits, 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9")


def test_states_are_compared_on_the_devices_that_are_here():
    """A run of sixteen devices: its own mesh cannot be made, and its arrays are the same."""
    assert loop._misfit(tiny_config("parallel.mesh.fsdp=16"), tiny_config("optim.lr=0.5")) == ""
    assert "blocks" in loop._misfit(tiny_config("parallel.mesh.fsdp=16"), tiny_config("model.depth=3"))


def test_a_warm_up_longer_than_the_run_is_said():
    assert (
        "optim.warmup_steps = 500 is not less" in build(tiny_config("total_steps=150", "optim.warmup_steps=500")).caveat
    )
    assert build(tiny_config("total_steps=150", "optim.warmup_steps=15")).caveat == ""
