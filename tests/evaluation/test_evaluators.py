"""The evaluator `fid`: the scores of `evaluate`, nothing left on the devices, and what it refuses."""

import json
import re

import jax
import numpy as np
import pytest

from diffjax.__main__ import main
from diffjax.data import sources
from diffjax.errors import UserError
from diffjax.evaluation import networks
from diffjax.evaluation.evaluators import EVALUATORS
from diffjax.experiment import build
from diffjax.sampling.samples import to_uint8, write_samples
from tests.evaluation import projection
from tests.programs import tiny_config

NUM = 30


@pytest.fixture(scope="module")
def subject():
    return build(tiny_config("sampling.steps=2"), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def params(subject):
    return subject.fresh()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    images, labels = sources.arrays(sources.digits(split="test"))
    write_samples(path, images[:50], labels[:50], {})
    return path


@pytest.fixture
def tiny(monkeypatch):
    """A network with weights, in the table under its name."""
    found = projection.network()
    monkeypatch.setitem(networks.NETWORKS, "tiny", lambda: found)
    return found


def fid(subject, **options):
    return EVALUATORS["fid"].build(subject, **{"network": "pixels", "num": NUM, **options})


def drawn(subject, params):
    """The samples that the evaluator scores, uint8 [NUM, 8, 8, 1], and their labels."""
    conditions = subject.conditions(0, NUM)
    return to_uint8(np.concatenate(list(subject.images(params, conditions)))), conditions


@pytest.mark.parametrize("given", ["the training images", "a file"])
def test_its_values_are_those_of_evaluate(subject, params, reference, tmp_path, given):
    images, labels = drawn(subject, params)
    write_samples(tmp_path / "samples.npz", images, labels, {})
    named = "" if given == "the training images" else str(reference)
    out = tmp_path / "scores.json"
    assert (
        main(["evaluate", f"--samples={tmp_path / 'samples.npz'}", f"--reference={named or 'digits'}", f"--out={out}"])
        == 0
    )
    expected = json.loads(out.read_text())
    found = fid(subject, reference=named)(params)
    assert list(found.values) == ["frechet_distance_pixels"]
    assert found.judge == "frechet_distance_pixels"
    for score, value in found.values.items():
        assert value == pytest.approx(expected["values"][score]["value"], rel=1e-6), score
    protocol = expected["protocol"]
    assert found.protocol.keys() == protocol.keys()
    for name in ("num", "features", "features_sha256", "resize"):
        assert found.protocol[name] == protocol[name], name
    assert found.protocol["reference"]["name"] == protocol["reference"]["name"]
    assert found.protocol["reference"]["count"] == (50 if named else 1500)
    assert found.picture is None


def test_another_network_and_chosen_scores(subject, params, tiny, reference):
    usual = fid(subject, network="tiny", reference=str(reference))(params)
    assert list(usual.values) == ["fd_tiny"]
    assert (usual.protocol["features"], usual.protocol["features_sha256"]) == (tiny.features, tiny.features_sha256)
    for scores in (("kd_tiny",), ("kd_tiny", "fd_tiny")):
        chosen = fid(subject, network="tiny", reference=str(reference), scores=scores)(params)
        assert list(chosen.values) == ["fd_tiny", "kd_tiny"]
        assert chosen.judge == usual.judge == "fd_tiny"
        assert chosen.values["fd_tiny"] == usual.values["fd_tiny"]


def test_the_frechet_distance_is_among_the_scores_whatever_is_asked_for(subject, params):
    found = fid(subject, scores=("label_agreement_pixels",))(params)
    assert list(found.values) == ["frechet_distance_pixels", "label_agreement_pixels"]


def test_another_sampler_draws_other_samples(subject, params, monkeypatch):
    own = fid(subject)(params).values
    with monkeypatch.context() as patch:
        asked = []
        make = type(subject).make_sampler
        patch.setattr(
            type(subject), "make_sampler", lambda self, **how: asked.append(self.sampling) or make(self, **how)
        )
        other = fid(subject, sampler="edm", steps=3)(params).values
        assert [(sampling.sampler, sampling.steps) for sampling in asked] == [("edm", 3)]
    assert other["frechet_distance_pixels"] != own["frechet_distance_pixels"]
    assert fid(subject, sampler="ddim", steps=2)(params).values == own  # that of section sampling
    assert subject.sampling.sampler == "ddim"


def live():
    return sum(array.nbytes for array in jax.live_arrays())


def test_nothing_stays_on_the_devices(subject, params, tiny, reference):
    """Neither the weights of the network nor anything else, however often it runs."""
    evaluate = fid(subject, network="tiny", reference=str(reference))
    before = live()
    first = evaluate(params)
    assert live() == before
    for _ in range(10):
        assert evaluate(params).values == first.values
    assert live() == before


def test_samples_that_are_not_finite_are_counted(subject, params, tiny, reference):
    spoiled = jax.tree.map(lambda leaf: leaf * np.nan, params)
    for network in ("pixels", "tiny"):
        evaluate = fid(subject, network=network, reference=str(reference))
        assert evaluate(spoiled).values == {"not_finite": NUM}
        assert "not_finite" not in evaluate(params).values


@pytest.mark.parametrize(
    "options, words",
    [
        ({"sampler": "ddmi"}, "ddmi"),
        ({"scores": ("fid",)}, "score 'fid' is none of pixels; valid: frechet_distance_pixels"),
        ({"reference": "digit"}, "--reference=digit: valid: digits, emoji32"),
        ({"network": "pixel"}, "--features=pixel is unknown; did you mean pixels?"),
    ],
)
def test_options_that_cannot_be(subject, options, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        fid(subject, **options)
    assert "\n" not in str(caught.value)


def test_a_reference_of_another_network_is_refused(subject, tmp_path):
    np.savez(tmp_path / "feats.npz", feats=np.zeros((2, 2048), np.float32))
    with pytest.raises(UserError, match="feats.npz has features of pool3 and no images; pixels needs pixels"):
        fid(subject, reference=str(tmp_path / "feats.npz"))


@pytest.mark.slow
def test_a_token_model_has_no_samplers_with_steps():
    subject = build(tiny_config(model="digit"), devices=jax.devices()[:1])
    with pytest.raises(UserError, match="evals.fid compares with the training images, and these data are none; give"):
        fid(subject)
    for options in ({"sampler": "ddim"}, {"steps": 4}):
        with pytest.raises(UserError, match="has no samplers with steps; leave out sampler and steps") as caught:
            fid(subject, reference="digits", **options)
        assert "\n" not in str(caught.value)
    found = fid(subject, reference="digits")(subject.fresh())
    assert found.values["frechet_distance_pixels"] > 0
