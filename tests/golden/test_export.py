"""What is exported again equals the stored weights of every reference, key by key, to the bit."""

import numpy as np
import pytest

from diffjax.weights import from_reference, to_reference
from diffjax.weights.digit import PASSED_OVER, VERSION
from tests.golden.cases import cases

pytestmark = pytest.mark.golden
ROUNDED = {("diffit", "pos_embed"): 1e-6}  # computed in float32 there


def family_of(folder: str, case) -> str | None:
    """The family of a case's weights, by what the case holds; None where it has no whole model."""
    arrays, config = case.arrays, case.info.get("config", {})
    if folder == "vae":
        return "vae" if "moments_nchw" in arrays else "tiny_vae"
    if folder == "diffit":
        return "diffit" if "out_f32" in arrays else None
    if folder != "digit":
        return folder if config else None
    networks = {"sem_tokens": "digit_stage1", "decode_init": "digit_stage2_nar", "logits_all": "digit_stage2_ar"}
    found = next((family for array, family in networks.items() if any(name.startswith(array) for name in arrays)), None)
    weights = case.path.with_suffix(".safetensors").exists()
    return found or ("vqgan" if "ddconfig" in config else "dinov2" if weights else None)


WHOLE = [
    pytest.param(folder, each.values[0], id=each.id, marks=each.marks)
    for folder in ("dit", "dis", "udit", "diffit", "digit", "vae")
    for each in cases(folder)
    if each.values[0] is None or family_of(folder, each.values[0])
]


@pytest.mark.parametrize("folder, case", WHOLE)
def test_the_weights_come_back(folder, case):
    assert case is not None, "no stored cases"
    family = family_of(folder, case)
    config = case.info["config"]
    config = config.get("dino", config) if family == "dinov2" else config
    module, params = from_reference(family, case.state_dict, **config)
    own = {key: value for key, value in case.state_dict.items() if not key.startswith(PASSED_OVER)}
    positions = own.get("pos_embed")
    size = module.patch * int(len(positions[0]) ** 0.5) if positions is not None else 1  # of the others none matters
    written = to_reference(family, module, params, size)
    if family.startswith("digit"):
        np.testing.assert_array_equal(written.pop("decoder.version"), case.state_dict.get("decoder.version", VERSION))
    assert written.keys() >= own.keys()
    assert all(key.endswith("relative_position_index") for key in written.keys() - own.keys())
    for key, stored in own.items():
        atol = ROUNDED.get((folder, key), 0)
        np.testing.assert_allclose(written[key], np.asarray(stored, np.float32), rtol=0, atol=atol, err_msg=key)
