"""The Inception in its other public forms, written by hand: equal to the bit; foreign and damaged files in one line."""

import pickle
import struct

import jax
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.weights import read
from diffjax.weights.inception import GRAPH, NESTED, TABLE
from tests.golden.test_inception import state_dict
from tests.weights.torch_writer import tensor, write_stream, write_zip

pytestmark = pytest.mark.golden


def varint(number):
    more = [number & 127]
    while number := number >> 7:
        more[-1] |= 128
        more.append(number & 127)
    return bytes(more)


def field(number, value):
    """A field of bytes or, of an int, of a varint."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def constant(name, array, *, packed=False):
    """A node of the graph; packed: its numbers in float_val in place of tensor_content."""
    shape = b"".join(field(2, field(1, size)) for size in array.shape)
    dtype = {"float32": 1, "int32": 3}[array.dtype.name]
    tensor = field(1, dtype) + field(2, shape) + field(5 if packed else 4, array.tobytes())
    attributes = {b"dtype": field(6, dtype), b"value": field(8, tensor)}
    entries = b"".join(field(5, field(1, key) + field(2, value)) for key, value in attributes.items())
    return field(1, field(1, name.encode()) + field(2, b"Const") + entries)


def graph(arrays):
    """Beside the weights, what else there is in a graph: other nodes, integers, numbers that stand alone, a version."""
    convolution = field(1, b"conv/Conv2D") + field(2, b"Conv2D") + field(3, b"Mul") + field(3, b"conv/conv2d_params")
    others = [
        field(1, convolution),
        constant("ResizeBilinear/size", np.array([299, 299], np.int32)),
        constant("Sub/y", np.array(128, np.float32)),
    ]
    nodes = [constant(name, array, packed=not i % 7) for i, (name, array) in enumerate(arrays.items())]
    return b"".join([*others, *nodes, field(4, field(1, 8) + varint(3 << 3 | 5) + struct.pack("<f", 1))])


def in_form(table):
    """The stored weights under the names and in the layout of a form."""
    ours = {path: (key, pattern) for key, path, pattern in TABLE}
    found = {}
    for key, path, _ in table:
        array = state_dict()[ours[path][0]]
        axes = {4: (2, 3, 1, 0), 2: (1, 0), 1: (0,)}[array.ndim]
        found[key] = np.ascontiguousarray(array.transpose(axes))
    return found


def nested(arrays):
    tree = {}
    for name, array in arrays.items():
        *path, last = name.split(".")
        inner = tree
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = array
    return tree


def of_jax(arrays):
    with jax.default_device(jax.devices("cpu")[0]):
        return jax.tree.map(jax.numpy.asarray, arrays)


def at_old_places(data):
    """The same pickle with the names of numpy before version 2."""
    return data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


FORMS = {
    "graph": lambda: graph(in_form(GRAPH)),
    "pickle": lambda: pickle.dumps(nested(in_form(NESTED)), protocol=5),
    "pickle-2": lambda: at_old_places(pickle.dumps(nested(in_form(NESTED)), protocol=2)),
    "jax": lambda: pickle.dumps(of_jax(nested(in_form(NESTED))), protocol=4),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_to_the_bit(tmp_path, form):
    path = tmp_path / "no-suffix"
    path.write_bytes(FORMS[form]())
    found = read("inception", path)
    assert found.entries == 472
    port = write_zip(tmp_path / "port.pth", {key: tensor(array, key) for key, array in state_dict().items()})
    jax.tree.map(np.testing.assert_array_equal, found.params, read("inception", port).params)


def test_the_stream_of_torch_is_no_pickle_of_arrays(tmp_path):
    weights = {key: tensor(array, key) for key, array in state_dict().items()}
    assert read("inception", write_stream(tmp_path / "port.pth", weights)).entries == 472


class Call:
    def __reduce__(self):
        return print, ("called",)


SMALL = {"conv/conv2d_params": np.zeros((3, 3, 3, 32), np.float32)}
TABLE_IN_ITSELF = {"a": {"b": np.zeros(2)}}
TABLE_IN_ITSELF["c"] = TABLE_IN_ITSELF["a"]
WRONG = {
    "a call": (pickle.dumps({"conv": Call()}), "refused to load builtins.print"),
    "a call instead of an array": (pickle.dumps([1, Call()]), "refused to load builtins.print"),
    "objects of JAX": (b"\x80\x02cjax._src.core\nShapedArray\n.", "refused to load jax._src.core.ShapedArray"),
    "dtypes of objects": (pickle.dumps({"a": np.array(["x"])}, 4), "a damaged pickle .*dtype 'U1'"),
    "a table twice": (pickle.dumps(TABLE_IN_ITSELF), "the table 'c' is in it twice"),
    "half a pickle": (pickle.dumps({"a": np.zeros(100)})[:-50], "a damaged pickle"),
    "a pickle of a list": (pickle.dumps([1]), "holds no weights but a list"),
    "another pickle": (
        pickle.dumps({"a": {"kernel": np.zeros(3)}}),
        "unexpected keys: a.kernel; missing keys: Conv2d_1a",
    ),
    "half a graph": (graph(SMALL)[:-60], "damaged or no TensorFlow graph"),
    "another graph": (
        graph({"conv9/w": np.zeros(3, np.float32)}),
        "unexpected keys: conv9/w; missing keys: conv/batch",
    ),
    "a graph of variables": (graph({}), "a TensorFlow graph without constants"),
    "another size": (constant("a", np.zeros(3, np.float32)).replace(b"\x08\x03", b"\x08\x04"), "cannot reshape"),
    "a kind that is none": (b"\x0a\x02\x0f\x00", "a field of kind 7"),
    "a number without end": (b"\x0a" + b"\xff" * 20, "a number without end"),
    "a number as a message": (field(1, field(2, b"Const") + field(5, field(1, 3) + field(2, 3))), "damaged or no"),
    "text": (b"\nconv and more text", "damaged or no TensorFlow graph"),
    "nothing": (b"", "not a weight file"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_files_in_one_line(tmp_path, case, capsys):
    data, message = WRONG[case]
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read("inception", tmp_path / "file")
    assert "\n" not in str(caught.value)
    assert not capsys.readouterr().out


def test_every_end_of_a_graph_that_is_cut(tmp_path):
    data = graph(SMALL)
    for end in range(1, len(data), 23):
        (tmp_path / "file").write_bytes(data[:end])
        with pytest.raises(UserError):
            read("inception", tmp_path / "file")
