"""Reading weight files: values, views and types of good ones; one line of complaint about every bad one."""

import argparse
import contextlib
import os
import pickle
import struct
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffjax.errors import UserError
from diffjax.torch_file import STORAGES, read, release
from diffjax.weights import unwrap
from tests.weights.torch_writer import Named, Storage, Tensor, dumps, pretended, tensor, write_stream, write_zip

WRITERS = [write_zip, write_stream]
VALUES = np.arange(24, dtype=np.float32)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("dtype", STORAGES.values())
def test_element_types(tmp_path, write, dtype):
    array = (np.arange(6).reshape(2, 3) % 3).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    loaded = read(write(tmp_path / "a.pt", OrderedDict(weight=tensor(array, "0"))))["weight"]
    assert loaded.dtype == array.dtype
    np.testing.assert_array_equal(loaded, array)


@pytest.mark.parametrize("write", WRITERS)
def test_views_share_their_storage(tmp_path, write):
    storage = Storage(VALUES, "0")
    value = {
        "transposed": Tensor(storage, 2, (3, 4), (1, 5)),
        "scalar": Tensor(storage, 7, (), ()),
        "expanded": Tensor(storage, 3, (4, 2), (0, 1)),
        "empty": Tensor(storage, 24, (0, 5), (5, 1)),
        "last": Tensor(storage, 20, (2, 2), (2, 1)),
    }
    loaded = read(write(tmp_path / "a.pt", value))
    np.testing.assert_array_equal(loaded["transposed"], 2 + np.add.outer(np.arange(3), 5 * np.arange(4)))
    assert loaded["scalar"] == 7
    assert loaded["scalar"].shape == ()
    np.testing.assert_array_equal(loaded["expanded"], [[3, 4]] * 4)
    assert loaded["empty"].shape == (0, 5)
    np.testing.assert_array_equal(loaded["last"], [[20, 21], [22, 23]])
    assert np.shares_memory(loaded["transposed"], loaded["expanded"])
    assert not loaded["transposed"].flags.writeable


@pytest.mark.parametrize("write", WRITERS)
def test_training_checkpoint(tmp_path, write):
    """Nested plain values, a parameter, a size, an OrderedDict with attributes and the training script's arguments."""
    weights = OrderedDict(weight=tensor(VALUES.reshape(4, 6), "0"))
    weights._metadata = OrderedDict(version=1)
    with pretended():
        size = Named("torch", "Size", ((2, 3),))
        parameter = Named("torch._utils", "_rebuild_parameter", (tensor(VALUES, "1"), True, OrderedDict()))
        value = {"ema": weights, "opt": {"state": {0: {"step": 3}}, "groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]}}
        value |= {"args": argparse.Namespace(model="DiT-XL/2", epochs=7), "size": size, "parameter": parameter}
    loaded = read(write(tmp_path / "a.pt", value))
    np.testing.assert_array_equal(loaded["ema"]["weight"], VALUES.reshape(4, 6))
    np.testing.assert_array_equal(loaded["parameter"], VALUES)
    assert loaded["opt"] == value["opt"]
    assert loaded["args"] == {"model": "DiT-XL/2", "epochs": 7}
    assert loaded["size"] == (2, 3)


@pytest.mark.parametrize("write", WRITERS)
def test_what_training_programs_leave_beside_the_weights(tmp_path, write):
    """Settings, callbacks and numbers of Lightning, omegaconf, fairseq and numpy are passed over, unread."""
    names: dict[str, list[str]] = {
        "omegaconf": [],
        "pytorch_lightning": [],
        "omegaconf.dictconfig": ["DictConfig"],
        "pytorch_lightning.callbacks": ["Checkpoint"],
        "typing": ["Any"],
        "numpy.core.multiarray": ["scalar"],
    }
    with pretended(**names):
        settings = Named("omegaconf.dictconfig", "DictConfig", ({"width": 3},))
        callback = Named("pytorch_lightning.callbacks", "Checkpoint", ())
        best = Named("numpy.core.multiarray", "scalar", (Named("typing", "Any", ()), b"12345678"))
        value = {"state_dict": {"model.weight": tensor(VALUES, "0")}, "hyper_parameters": settings}
        value |= {
            "callbacks": [callback, {"best": best}],
            "epoch": 3,
            "paths": [Path("a"), defaultdict(list), int, {1}],
        }
        path = write(tmp_path / "last.ckpt", value)
    loaded = read(path)
    assert loaded["epoch"] == 3
    np.testing.assert_array_equal(unwrap(loaded)["weight"], VALUES)


def resident(path) -> int:
    """Bytes of a mapped file that are in memory."""
    text = Path("/proc/self/smaps").read_text().split(str(path))
    return sum(1024 * int(part.split("Rss:")[1].split()[0]) for part in text[1:])


@pytest.mark.parametrize("write", [write_zip, lambda path, tree: save_file({"a": VALUES.repeat(2**16)}, path) or path])
def test_pages_of_a_file_are_let_go(tmp_path, write):
    path = write(tmp_path / "a.weights", {"a": tensor(VALUES.repeat(2**16), "0")})
    loaded = read(path)["a"]
    assert loaded.sum() > 0
    assert resident(path) > 2**22
    release(loaded)
    assert resident(path) < 2**16
    np.testing.assert_array_equal(loaded[:3], 0)


def test_safetensors(tmp_path):
    arrays = {"a": VALUES.reshape(2, 12), "b": VALUES.astype(ml_dtypes.bfloat16)}
    save_file(arrays, tmp_path / "a.safetensors")
    loaded = read(tmp_path / "a.safetensors")
    for key, array in arrays.items():
        assert loaded[key].dtype == array.dtype
        np.testing.assert_array_equal(loaded[key], array)


class Attack:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


CRAFTED = {
    "REDUCE of os.system": pickle.dumps({"weight": Attack(os.system, "touch {mark}")}, 2),
    "REDUCE of eval": pickle.dumps(Attack(eval, "open('{mark}', 'w')"), 2),
    "STACK_GLOBAL": pickle.dumps(Attack(os.system, "touch {mark}"), 4),
    "INST": b"\x80\x02(S'touch {mark}'\nios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\nS'touch {mark}'\no.",
    "NEWOBJ": b"\x80\x02csubprocess\nPopen\n(S'touch {mark}'\nt\x81.",
    "dotted name": b"\x80\x04\x8c\x05torch\x8c\x12serialization.os.x\x93.",
    "BUILD": b"\x80\x02cbuiltins\nobject\n)\x81}S'__setstate__'\ncos\nsystem\nsbS'touch {mark}'\nb.",
    "getattr": b"\x80\x02c__builtin__\ngetattr\n.",
    "extension": b"\x80\x02\x82\x01.",
}


@pytest.mark.parametrize("data", CRAFTED.values(), ids=CRAFTED)
def test_no_code_runs(tmp_path, data):
    mark = tmp_path / "mark"
    path = write_zip(tmp_path / "a.pt", None, data=data.replace(b"{mark}", str(mark).encode()))
    with pytest.raises(UserError) as error:
        read(path)
    assert not mark.exists()
    assert "\n" not in str(error.value)


def test_refusal_names_the_class_and_the_way_out(tmp_path):
    path = write_zip(tmp_path / "a.pt", None, data=pickle.dumps(Attack(os.system, "true"), 2))
    with pytest.raises(UserError, match=r"a\.pt: refused to load posix\.system: .*save the state_dict alone"):
        read(path)


@pytest.mark.parametrize(
    "data", [b"\x80\x02ccollections\nOrderedDict\nN}S'update'\nK\x01s\x86b.", b"\x80\x02]r\xff\xff\xff\xff."]
)
def test_crafted_state_stays_in_its_file(tmp_path, data):
    """Neither setting attributes on an allowed class nor a giant memo index reaches beyond the one reading."""
    path = write_zip(tmp_path / "a.pt", None, data=data)
    with contextlib.suppress(UserError):
        read(path)
    good = write_zip(tmp_path / "b.pt", OrderedDict(weight=tensor(VALUES, "0")))
    np.testing.assert_array_equal(read(good)["weight"], VALUES)


OUTSIDE = {
    "too long": (0, (5, 5), (5, 1)),
    "offset": (1, (24,), (1,)),
    "stride": (0, (2,), (24,)),
    "negative offset": (-1, (2,), (1,)),
    "negative stride": (23, (2,), (-1,)),
    "negative size": (0, (-2, -2), (1, 1)),
    "overflow": (0, (2**40, 2**40), (2**40, 1)),
    "huge expanded": (0, (2**40, 2**40), (0, 0)),
    "expanded": (0, (1000, 1000), (0, 0)),
    "expanded rows": (0, (1000, 24), (0, 1)),
    "rank": (0, (2, 2), (1,)),
    "not integers": (0, (2.0,), (1,)),
}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("view", OUTSIDE.values(), ids=OUTSIDE)
def test_views_outside_their_storage(tmp_path, write, view):
    path = write(tmp_path / "a.pt", {"weight": Tensor(Storage(VALUES, "0"), *view)})
    with pytest.raises(UserError, match=r"a\.pt"):
        read(path)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("count", [25, -1, 2**62, 2**80])
def test_storage_of_another_size_than_claimed(tmp_path, write, count):
    path = write(tmp_path / "a.pt", {"weight": Tensor(Storage(VALUES, "0", count), 0, (2,), (1,))})
    with pytest.raises(UserError, match=r"a\.pt"):
        read(path)


PIDS = [0, "storage", ("storage",), ("module", "x", "0", "cpu", 3), ("storage", "O", "0", "cpu", 3), (1, 2, 3, 4, 5)]
PIDS += [("storage", "float32", 0, "cpu", 3), ("storage", "float32", "0", "cpu", 3, ("1", 0, 2))]


@pytest.mark.parametrize("pid", PIDS)
def test_odd_persistent_ids(tmp_path, pid):
    with pretended():
        data = dumps(tensor(VALUES, "0"), {}, lambda storage: pid)
    with pytest.raises(UserError, match="is not to a plain storage"):
        read(write_zip(tmp_path / "a.pt", None, data=data))


@pytest.mark.parametrize("write", WRITERS)
def test_truncated(tmp_path, write):
    path = write(tmp_path / "a.pt", {"weight": tensor(VALUES, "0"), "other": tensor(VALUES, "1")})
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"a\.pt") as error:
            read(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("write", WRITERS)
def test_flipped_bytes_never_break_the_reader(tmp_path, write):
    path = write(tmp_path / "a.pt", {"weight": tensor(VALUES, "0")})
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        with contextlib.suppress(UserError):
            read(path)


def test_damaged_storage_is_noticed(tmp_path):
    path = write_zip(tmp_path / "a.pt", {"weight": tensor(VALUES, "0")})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(VALUES.tobytes(), VALUES[::-1].tobytes()))
    with pytest.raises(UserError, match=r"checksum of member a/data/0 differs"):
        read(path)


def _missing_storage(path):
    with zipfile.ZipFile(path, "w") as archive, pretended():
        archive.writestr("x/data.pkl", dumps(tensor(VALUES, "0"), {}))


OTHERS = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<!DOCTYPE html><html>not found</html>"),
    "plain pickle": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "other zip": lambda path: zipfile.ZipFile(path, "w").writestr("readme", "hello"),
    "compressed": lambda path: write_zip(path, {"a": tensor(VALUES, "0")}, compression=zipfile.ZIP_DEFLATED),
    "missing storage": _missing_storage,
    "no safetensors": lambda path: path.write_bytes(struct.pack("<q", 100) + b"{}"),
    "folder": lambda path: path.mkdir(),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_files(tmp_path, make):
    path = tmp_path / "a.pt"
    make(path)
    with pytest.raises(UserError, match=r"a\.pt") as error:
        read(path)
    assert "\n" not in str(error.value)
