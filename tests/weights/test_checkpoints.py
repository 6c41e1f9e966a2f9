"""Where weights lie: one file, several with an index, a folder of diffusers; damage is one line."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffjax.__main__ import main
from diffjax.errors import UserError
from diffjax.files import file_sha256
from diffjax.frozen import create
from diffjax.weights import checkpoints, store, to_reference
from tests.frozen.test_vae import SMALL, some_params

ARRAYS = {name: np.full((2, i + 1), i, np.float32) for i, name in enumerate("abc")}


def write_several(folder, arrays=ARRAYS, **changed):
    """Two files and their index, in the layout of sharded safetensors."""
    names = list(arrays)
    parts = {"m-1-of-2.safetensors": names[:1], "m-2-of-2.safetensors": names[1:]}
    for file, keys in parts.items():
        save_file({key: arrays[key] for key in keys}, folder / file)
    places = {key: file for file, keys in parts.items() for key in keys} | changed
    (folder / "m.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder / "m.safetensors.index.json"


def test_one_file(tmp_path):
    save_file(ARRAYS, tmp_path / "a.safetensors")
    found = checkpoints.read(tmp_path / "a.safetensors")
    assert (found.config, found.sha256()) == ({}, file_sha256(tmp_path / "a.safetensors"))
    assert found.content.keys() == ARRAYS.keys()


def test_several_files_with_an_index(tmp_path):
    found = checkpoints.read(write_several(tmp_path))
    assert found.content.keys() == ARRAYS.keys()
    for key, array in ARRAYS.items():
        np.testing.assert_array_equal(found.content[key], array)
    before = found.sha256()
    write_several(tmp_path, {**ARRAYS, "b": ARRAYS["b"] + 1})
    assert checkpoints.read(tmp_path / "m.safetensors.index.json").sha256() != before


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision(tmp_path, dtype):
    save_file({"a": np.arange(4).astype(dtype)}, tmp_path / "a.safetensors")
    found = checkpoints.read(tmp_path / "a.safetensors").content["a"]
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.arange(4, dtype=np.float32))


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_a_folder_of_diffusers_is_converted(tmp_path, several):
    """Its config.json says what shapes do not tell; what begins with _ is about the program that wrote it."""
    module = create("VAE", **SMALL["VAE"], scale=0.5)
    params = some_params(module)
    weights = to_reference("vae", module, params)
    folder = tmp_path / "vae"
    folder.mkdir()
    if several:
        index = write_several(folder, weights)
        index.rename(folder / f"{checkpoints.STEM}.safetensors.index.json")
    else:
        save_file(weights, folder / f"{checkpoints.STEM}.safetensors")
    arguments = {"_class_name": "AutoencoderKL", "norm_num_groups": 8, "scaling_factor": 0.5, "sample_size": 32}
    (folder / "config.json").write_text(json.dumps(arguments))
    assert main(["convert", "--family=vae", f"--checkpoint={folder}", f"--out={tmp_path / 'out'}"]) == 0
    found, _, made = store.load(tmp_path / "out")
    assert found == module
    assert made["sha256"] == store.tree_sha256(params)
    assert len(made["checkpoint_sha256"]) == 64
    weights = next(path for name in checkpoints.FOLDER if (path := folder / name).is_file())
    assert (
        checkpoints.read(weights).config
        == checkpoints.read(folder).config
        == {"norm_num_groups": 8, "scaling_factor": 0.5, "sample_size": 32}
    )


def crafted(header, size=8):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


HOSTILE = {
    "overlapping": {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    },
    "beyond the end": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
    "of another size": {"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}},
    "negative": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
    "with a gap": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE)
def test_offsets_that_cannot_be(tmp_path, header):
    (tmp_path / "a.safetensors").write_bytes(crafted(header))
    with pytest.raises(UserError, match=r"a.safetensors: damaged or not a weight file"):
        checkpoints.read(tmp_path / "a.safetensors")


def test_places_that_hold_none(tmp_path):
    with pytest.raises(UserError, match="is no folder of diffusers, which holds config.json and diffusion_pytorch"):
        checkpoints.read(tmp_path)
    with pytest.raises(UserError, match="gone.safetensors: no such file"):
        checkpoints.read(tmp_path / "gone.safetensors")
    index = write_several(tmp_path)
    for text, words in (("{", "not valid json"), ("[]", "not a table"), ("{}", "has no table weight_map")):
        index.write_text(text)
        with pytest.raises(UserError, match=words):
            checkpoints.read(index)
    for place, words in (
        ("../m-1-of-2.safetensors", "names the file '../m-1-of-2.safetensors'; valid: names of files beside it"),
        ("m-3-of-2.safetensors", "lacks m-3-of-2.safetensors, which m.safetensors.index.json names"),
        ("m-2-of-2.safetensors", "m-2-of-2.safetensors lacks a, which m.safetensors.index.json says is in it"),
    ):
        with pytest.raises(UserError, match=words):
            checkpoints.read(write_several(tmp_path, a=place))
