"""Pickles of arrays are read as numpy wrote them, whatever the protocol; nothing else is named."""

import os
import pickle

import numpy as np
import pytest

from diffjax import numpy_pickle
from diffjax.errors import UserError

VALUE = {
    "count": 3,
    "number": np.int64(7),
    "nested": {
        "mu": np.arange(6.0).reshape(2, 3),
        "sigma": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(3, 2)),
    },
    "list": [np.zeros(0, np.float32), ("text", None, 1.5, b"bytes", np.arange(4, dtype=np.uint8))],
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(protocol):
    np.testing.assert_equal(numpy_pickle.load(pickle.dumps(VALUE, protocol), "a.pkl"), VALUE)


@pytest.mark.parametrize("old, new", [(b"numpy._core", b"numpy.core"), (b"numpy.core", b"numpy._core")])
def test_names_before_and_since_numpy_2(old, new):
    data = pickle.dumps(VALUE, 2).replace(old, new)
    np.testing.assert_equal(numpy_pickle.load(data, "a.pkl"), VALUE)


class Call:
    def __reduce__(self):
        return os.getcwd, ()


LOOP: list = []
LOOP.append(LOOP)
WRONG = {
    "call": (pickle.dumps({"a": Call()}), r"a\.pkl: refused to load posix\.getcwd"),
    "cut": (pickle.dumps(VALUE)[:-40], r"a\.pkl: a damaged pickle"),
    "text": (b"nothing", "a damaged pickle"),
    "empty": (b"", "a damaged pickle"),
    "dtype": (pickle.dumps(np.zeros(2, np.complex64)), "a damaged pickle .*dtype 'c8'"),
    "loop": (pickle.dumps(LOOP), "a damaged pickle .*RecursionError"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_pickles(case):
    data, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        numpy_pickle.load(data, "a.pkl")
