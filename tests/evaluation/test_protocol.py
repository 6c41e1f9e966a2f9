"""Results: what they record, and which may be compared."""

import copy

import pytest

from diffjax.errors import UserError
from diffjax.evaluation import protocol
from diffjax.trees import leaves

SAMPLES = {
    "sampling": {"sampler": "ddim", "steps": 50, "guidance": 1.5},
    "labels": "interleaved",
    "rounding": "truncate",
    "precision": "float32",
    "seed": 0,
    "first": 0,
    "code_version": "0.1.0",
    "model": {"name": "DiT"},
    "origin": {"workdir": "runs/a", "step": 7, "weights": "ema", "sha256": "abc"},
}


def result(**changes):
    values = {"score": {"value": 1.5, "held_out_real": 1.0}}
    reference = {"name": "digits", "sha256": "ff", "count": 1500}
    arguments = {"features": "pixels", "features_sha256": "none", "resize": "none", "reference": reference, "num": 500}
    return protocol.result(values, **{**arguments, "samples": SAMPLES, **changes})


def test_round_trip(tmp_path):
    protocol.write(tmp_path / "new" / "a.json", result())
    assert protocol.read(tmp_path / "new" / "a.json") == result()


def test_parts():
    made = result()
    assert made["protocol"]["ema"] == "ema"
    assert made["subject"] == {"model": SAMPLES["model"], "origin": SAMPLES["origin"]}
    converted = result(samples=SAMPLES | {"origin": {"params": "params/x", "sha256": "abc"}})
    assert converted["protocol"]["ema"] == "as converted"
    entry = result(samples=SAMPLES | {"origin": {"checkpoint": "x.pt", "entry": "model", "sha256": "abc"}})
    assert entry["protocol"]["ema"] == "model"


def test_other_models_compare():
    other = result(samples=SAMPLES | {"model": {"name": "U-DiT"}, "origin": SAMPLES["origin"] | {"step": 8}})
    other["values"]["score"]["value"] = 2.5
    other["values"]["further"] = {"value": 0.0}
    assert protocol.compare(result(), other) == {"score": (1.5, 2.5)}


def test_every_field_counts():
    """Each leaf of the protocol, changed alone, is refused by name; the code's version is only recorded."""
    base = result()
    for path in leaves(base["protocol"]).keys() - {"code_version"}:
        other = copy.deepcopy(base)
        *parents, name = path.split(".")
        place = other["protocol"]
        for parent in parents:
            place = place[parent]
        place[name] = "changed"
        with pytest.raises(UserError, match=rf"protocols differ in {path} \(.* and changed\)$"):
            protocol.compare(base, other)
        del place[name]
        with pytest.raises(UserError, match=rf"protocols differ in {path} \(.* and None\)$"):
            protocol.compare(base, other)


def test_scores_of_other_rules_are_refused():
    one, other = result(), result()
    one["values"]["score"]["rule"], other["values"]["score"]["rule"] = "k = 3", "k = 5"
    with pytest.raises(UserError, match=r"the rules differ of score \(k = 3 and k = 5\)"):
        protocol.compare(one, other)
    assert protocol.compare(one, result()) == {"score": (1.5, 1.5)}  # earlier versions wrote none


def test_all_differences_are_named():
    other = result(num=50, samples=SAMPLES | {"seed": 1})
    with pytest.raises(UserError, match=r"num \(500 and 50\), seed \(0 and 1\)"):
        protocol.compare(result(), other)


def test_results_of_two_commits_are_compared():
    other = result(samples=SAMPLES | {"code_version": "0.1.0+0123456789ab"})
    assert other["protocol"]["code_version"] == "0.1.0+0123456789ab"
    assert protocol.compare(result(), other) == {"score": (1.5, 1.5)}


def test_what_is_not_recorded_cannot_be_compared():
    with pytest.raises(UserError, match="do not record ema, first, labels"):
        protocol.compare(result(samples={}), result(samples={}))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"values": {}}', '{"values": {"a": 1}, "protocol": {}}'])
def test_other_files(tmp_path, text):
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match="no such result file"):
        protocol.read(path)
    path.write_text(text)
    with pytest.raises(UserError, match="not a result file"):
        protocol.read(path)
