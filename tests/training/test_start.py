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
