"""The mapping of DiGIT's decoder: round trip, fairseq's files, what shapes tell, and one clear complaint."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffjax.errors import UserError
from diffjax.models import create
from diffjax.weights import from_reference, to_reference, unwrap

KWARGS = {"vocabulary": 9, "depth": 3, "width": 24, "heads": 4, "mlp_ratio": 2.5, "length": 20}
STAGE2 = {"source_vocabulary": 6, "norm": "pre"}
HEADS = {"decoder_attention_heads": 4}


def module_and_params(**kwargs):
    module = create("DiGIT", **{**KWARGS, **kwargs})
    tokens = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens[:, 0], tokens)["params"]
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return module, structure.unflatten([rng.standard_normal(leaf.shape, np.float32) for leaf in leaves])


@pytest.fixture(scope="module")
def state_dict():
    return to_reference("digit_stage1", *module_and_params())


@pytest.mark.parametrize(
    "family, kwargs, told",
    [
        ("digit_stage1", {}, {}),
        ("digit_stage1", {"norm": "pre"}, {"normalize_before": True}),
        ("digit_stage1", {"num_classes": 5}, {"class_conditional": True}),
        ("digit_stage1", {"num_classes": 5, "null_class": True}, {"num_classes": 5}),
        ("digit_stage1", {"heads": 2, "mlp_ratio": 4.0}, {"decoder_attention_heads": 2}),
        ("digit_stage2_ar", STAGE2, {"K": 6, "V": 9}),
        ("digit_stage2_ar", {"source_vocabulary": 6}, {}),
        ("digit_stage2_nar", {**STAGE2, "causal": False}, {"max_target_positions": 20}),
    ],
    ids=str,
)
def test_round_trip(family, kwargs, told):
    module, params = module_and_params(**kwargs)
    weights = to_reference(family, module, params)
    found, back = from_reference(family, weights, **{**HEADS, **told})
    assert found == module
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_keys_and_layout_of_the_reference():
    _, params = module_and_params(**STAGE2)
    weights = to_reference("digit_stage2_ar", *module_and_params(**STAGE2))
    assert len(weights) == 3 + 3 * 16 + 1 + 2
    attention = params["blocks"]["attention"]
    value = weights["decoder.layers.1.self_attn.v_proj.weight"]
    np.testing.assert_array_equal(value[13], attention["value"]["kernel"][1, :, 2, 1])  # head 2, its second channel
    out = weights["decoder.layers.2.self_attn.out_proj.weight"]
    np.testing.assert_array_equal(out[:, 13], attention["out"]["kernel"][2, 2, 1])
    np.testing.assert_array_equal(weights["decoder.output_projection.weight"], params["output"]["kernel"].T)
    assert weights["decoder.embed_tokens.weight"].shape == (5 + 9 + 5 + 6, 24)


def test_the_published_sizes_need_no_arguments_and_the_files_hold_other_models_too():
    module = create("DiGIT-B", vocabulary=8, length=4, mlp_ratio=1 / 64)
    tokens = jnp.zeros((1, 3), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)["params"]
    blank = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
    weights = to_reference("digit_stage1", module, blank)
    others = ("pretrained_encoder.norm.weight", "centroids", "centroid_norm", "vqgan.quantize.embedding.weight")
    file = {
        "model": {**weights, **dict.fromkeys((*others, "decoder.version"), np.zeros(3))},
        "cfg": {},
        "criterion": {},
    }
    found, _ = from_reference("digit_stage1", unwrap(file))
    assert found == module


@pytest.mark.parametrize(
    "config, message",
    [
        ({"K": 8}, "K = 8 contradicts the weights, whose shapes say 9"),
        ({"V": 9}, "digit_stage1 has no argument V"),
        ({"class_conditional": True}, "class_conditional = True contradicts .* False"),
        ({"normalize_before": True}, "normalize_before = True contradicts .* False"),
        ({"max_target_positions": 1024}, "max_target_positions = 1024 contradicts .* 20"),
        ({"decoder_layers": 2}, "decoder_layers = 2 contradicts .* 3"),
        ({"decoder_embed_dim": 23}, "decoder_embed_dim = 23 contradicts .* 24"),
        ({"decoder_ffn_embed_dim": 96}, "decoder_ffn_embed_dim = 96 contradicts .* 60"),
        ({"decoder_attention_heads": 5}, "width = 24 is not divisible by heads = 5"),
        ({"nspecial": 4}, "nspecial = 4 is not supported; valid: 5"),
        ({"activation": "relu"}, "activation = relu is not supported; valid: gelu.erf."),
        ({"layers": 2}, "digit_stage1 has no argument layers; valid: K, max_target"),
    ],
)
def test_arguments_that_cannot_be(state_dict, config, message):
    with pytest.raises(UserError, match=message):
        from_reference("digit_stage1", state_dict, **{**HEADS, **config})


def test_heads_of_a_width_that_is_not_published_must_be_given(state_dict):
    with pytest.raises(UserError, match="depth 3, width 24 is no published size; give decoder_attention_heads"):
        from_reference("digit_stage1", state_dict)


def test_one_error_names_every_wrong_key(state_dict):
    broken = dict(state_dict)
    del broken["decoder.layers.1.fc1.bias"]
    broken["decoder.layers.0.fc2.weight"] = broken["decoder.layers.0.fc2.weight"].T
    broken["encoder.weight"] = np.zeros(3)
    with pytest.raises(UserError) as error:
        from_reference("digit_stage1", broken, **HEADS)
    unexpected, missing, wrong = str(error.value).split("; ")
    assert unexpected == "these are not the weights of a digit_stage1 model: unexpected keys: encoder.weight"
    assert missing == "missing keys: decoder.layers.1.fc1.bias"
    assert wrong == "wrong shapes: decoder.layers.0.fc2.weight is (60, 24), expected (24, 60)"


def test_the_stages_are_not_taken_for_each_other(state_dict):
    second = to_reference("digit_stage2_ar", *module_and_params(**STAGE2))
    with pytest.raises(UserError, match="unexpected keys: decoder.embed_positions_1.weight"):
        from_reference("digit_stage1", second, **HEADS)
    with pytest.raises(UserError, match="missing keys: decoder.embed_positions_1.weight"):
        from_reference("digit_stage2_nar", state_dict, **HEADS)
    second["decoder.embed_tokens.weight"] = second["decoder.embed_tokens.weight"][:17]
    with pytest.raises(UserError, match="embed_tokens has 17 rows, output_projection 14: these do not fit"):
        from_reference("digit_stage2_ar", second, **HEADS)
