"""From a torch file to a folder of parameters, through the command line."""

import argparse
import json
from collections import OrderedDict

import jax
import numpy as np
import pytest

from diffjax.__main__ import main
from diffjax.files import file_sha256
from diffjax.weights import store, to_reference
from tests.weights.test_dit import module_and_params
from tests.weights.torch_writer import tensor, write_zip


@pytest.fixture
def checkpoint(tmp_path):
    module, params = module_and_params()
    averaged = to_reference("dit", module, params)
    weights = OrderedDict((key, tensor(value, str(i))) for i, (key, value) in enumerate(averaged.items()))
    last = OrderedDict((key, tensor(0 * value, f"m{i}")) for i, (key, value) in enumerate(averaged.items()))
    return write_zip(tmp_path / "a.pt", {"model": last, "ema": weights, "args": argparse.Namespace(epochs=3)})


def test_convert(tmp_path, checkpoint, capsys):
    out = tmp_path / "out"
    argv = ["convert", "--family=dit", f"--checkpoint={checkpoint}", f"--out={out}"]
    assert main(argv) == 2
    assert "give num_heads" in capsys.readouterr().err
    assert not out.exists()
    argv.append("--arguments=num_heads=2,learn_sigma=True")
    assert main(argv) == 0
    printed = capsys.readouterr().out
    module, params = module_and_params()
    loaded_module, loaded, model = store.load(out)
    assert loaded_module == module
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert model["sha256"] in printed
    assert json.loads((out / "model.json").read_text())["checkpoint_sha256"] == file_sha256(checkpoint)
    assert main(argv) == 2
    assert "is not an empty folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--family=vit"], "weights of family 'vit' are unknown; valid: dit"),
        (["--checkpoint=nothing.pt"], "nothing.pt: no such file"),
        (["--arguments=num_heads"], "'num_heads' is not name=value"),
        (["--arguments=heads=2"], "dit has no argument heads"),
    ],
)
def test_mistakes(tmp_path, checkpoint, capsys, flags, message):
    argv = ["convert", "--family=dit", f"--checkpoint={checkpoint}", f"--out={tmp_path / 'out'}", *flags]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
