"""What samples are conditioned on: classes by the flag --labels, and files that are bound to their json."""

import json

import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.files import write_protocol
from diffjax.sampling import conditions

NAMES = ("cat", "dog", "12", "a bird")


@pytest.mark.parametrize(
    "said, labels",
    [
        ("interleaved", [1, 2, 3, 0, 1]),
        ("2", [2, 2, 2, 2, 2]),
        ("3,1", [1, 3, 1, 3, 1]),
        ("dog, a bird", [3, 1, 3, 1, 3]),
        ("12", [2, 2, 2, 2, 2]),
    ],
)
def test_classes_by_number_or_name_in_turn(said, labels):
    asked = conditions.of_labels(said, seed=0, first=1, num=5, num_classes=4, names=NAMES)
    assert asked.given.tolist() == labels
    assert asked.given.dtype == np.int32
    assert asked.described == {"labels": said, "classes": {str(i): NAMES[i] for i in sorted(set(labels))}}
    assert asked.arrays["arr_1"] is asked.given
    assert asked.classes.names == NAMES


def test_a_model_without_names_or_classes():
    assert conditions.of_labels("3,0", 0, 0, 4, num_classes=4).described == {"labels": "3,0"}
    none = conditions.of_labels("interleaved", 0, 0, 4, num_classes=0)
    assert (none.described, none.given.tolist(), none.classes) == ({"labels": "none"}, [0, 0, 0, 0], None)
    with pytest.raises(UserError, match="--labels=2: this model has no classes; leave it out"):
        conditions.of_labels("2", 0, 0, 4, num_classes=0)


@pytest.mark.parametrize(
    "said, names, message",
    [
        ("4", (), "no class '4'; valid: interleaved, uniform, or numbers 0 to 3$"),
        ("-1", (), "no class '-1'; valid"),
        ("1,", NAMES, "no class ''; valid: interleaved, uniform, or numbers 0 to 3, or their names"),
        ("dogs", NAMES, "no class 'dogs'; valid: .* 0 to 3; did you mean dog"),
    ],
)
def test_classes_that_are_none(said, names, message):
    with pytest.raises(UserError, match=message):
        conditions.of_labels(said, 0, 0, 4, num_classes=4, names=names)


def test_raw_files_are_bound_to_their_json(tmp_path):
    path = tmp_path / "tokens.npz"
    np.savez(path, arr_0=np.zeros((2, 4), np.int32), arr_1=np.zeros(2, np.int32))
    write_protocol(path, {"origin": {"codes": {"features": "a"}}})
    origin = {"codes": {"features": "a"}}
    assert conditions._made_of(path, origin) == origin
    np.savez(path, arr_0=np.ones((2, 4), np.int32), arr_1=np.zeros(2, np.int32))
    with pytest.raises(UserError, match=r"tokens\.json does not describe tokens\.npz: the hash of the file differs"):
        conditions._made_of(path, origin)
    for text, message in (("[]", "does not describe"), ("{", "not json")):
        path.with_suffix(".json").write_text(text)
        with pytest.raises(UserError, match=message):
            conditions._made_of(path, origin)
    write_protocol(path, {"seed": 0})
    assert json.loads(path.with_suffix(".json").read_text())["seed"] == 0
    with pytest.raises(UserError, match="it says nothing of an origin"):
        conditions._made_of(path, origin)
