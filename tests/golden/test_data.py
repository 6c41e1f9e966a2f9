"""Decoding, and the published resize and crop rules, against stored outputs of the public code."""

import hashlib
import io
import re

import numpy as np
import pytest
from PIL import Image

from diffjax.data import transforms
from diffjax.data.transforms import RULES, adm_center_crop, adm_offset, adm_sizes
from tests.golden.cases import Case, cases

pytestmark = pytest.mark.golden
RESIZE = [each for each in cases("data") if each.values[0] is None or "mode_files" in each.values[0].info]
METHODS = {  # the name of a rule in the stored cases -> in RULES
    "adm": "adm",
    "edm2_dhariwal": "adm",
    "edm_center_crop": "edm-crop",
    "edm_scale": "edm-scale",
    "lsun_box": "lsun",
    "tv_bilinear": "bilinear",
    "tv_bicubic": "bicubic",
}
CASES = RESIZE or [pytest.param(None, id="data-no-resize-cases")]


def recipe(case: dict) -> np.ndarray:
    """The input image uint8 [h, w, 3] by the stored recipe, integer arithmetic throughout."""
    w, h, s = case["width"], case["height"], case["seed"]
    y, x, k = np.meshgrid(np.arange(h), np.arange(w), np.arange(3), indexing="ij")
    chirp = ((x * x * (k + 1) + y * y * (3 - k) + (s + 1) * x * y) * 8 // (w + h)) % 256
    ramp = (x * 255 // max(w - 1, 1) + y * 255 // max(h - 1, 1)) // 2
    noise = (x * 73856093 + y * 19349663 + k * 83492791 + s * 265443577) % 2147483647
    for _ in range(2):
        noise = noise * 48271 % 2147483647
    image = ((2 * chirp + (noise // 128) % 256 + ramp) // 4).astype(np.uint8)
    assert sha256(image) == case["input_sha256"]
    return image


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def adm_hashes(entry: dict) -> list[tuple[int, str]]:
    """(size, SHA-256) of each stored output of the ADM crop, where they stand as `adm_<size>_sha256`."""
    found = [(re.fullmatch(r"adm_(\d+)_sha256", key), value) for key, value in entry.items()]
    return [(int(match[1]), value) for match, value in found if match]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_rules(case: Case, method: str):
    """SHA-256 of every output; full outputs and corners where they are stored."""
    assert case is not None, "no stored cases"
    for entry in case.info["cases"]:
        image = Image.fromarray(recipe(entry))
        named = ((*name.rpartition("_")[::2], out) for name, out in entry["out"].items())
        outputs = [(int(size), out) for stem, size, out in named if stem == method]
        assert outputs, f"case {entry['case']} stores no output of {method}"
        for size, out in outputs:
            found = RULES[METHODS[method]](image, size)
            stored = case.arrays.get(f"c{entry['case']}/{method}_{size}")
            if stored is not None:
                np.testing.assert_array_equal(found, stored)
            corners = case.arrays.get(f"c{entry['case']}/{method}_{size}_crop")
            if corners is not None:
                n = corners.shape[1]
                np.testing.assert_array_equal(np.stack([found[:n, :n], found[-n:, -n:]]), corners)
            assert found.dtype == np.uint8
            assert list(found.shape) == out["shape"]
            assert sha256(found) == out["sha256"], f"case {entry['case']} at {size}"


@pytest.mark.parametrize("case", CASES)
def test_every_stored_method_is_compared(case: Case):
    assert case is not None, "no stored cases"
    assert {name.rpartition("_")[0] for entry in case.info["cases"] for name in entry["out"]} == set(METHODS)


@pytest.mark.parametrize("case", CASES)
def test_celeba_rule(case: Case):
    assert case is not None, "no stored cases"
    entry = case.info["celeba"]
    found = RULES["celeba"](Image.fromarray(recipe(entry)), 64)
    assert sha256(found) == entry["sha256"]
    np.testing.assert_array_equal(found, case.arrays["celeba/uvit_crop_64"])


@pytest.mark.parametrize("case", CASES)
def test_adm_sizes_and_offsets(case: Case):
    assert case is not None, "no stored cases"
    for entry in case.info["cases"]:
        stored = [key for key in entry if key.startswith("adm_sizes_")]
        assert stored
        for size in (int(key.removeprefix("adm_sizes_")) for key in stored):
            sizes = adm_sizes(entry["width"], entry["height"], size)
            assert [list(each) for each in sizes] == entry[f"adm_sizes_{size}"]
            assert list(adm_offset(*sizes[-1], size)) == entry[f"adm_offset_{size}"]


@pytest.mark.parametrize("case", CASES)
def test_adm_center_crop_of_the_celeba_shape(case: Case):
    assert case is not None, "no stored cases"
    image = Image.fromarray(recipe(case.info["celeba"]))
    outputs = adm_hashes(case.info["celeba"])
    assert outputs, "no stored output of the crop"
    for size, expected in outputs:
        assert sha256(adm_center_crop(image, size)) == expected


@pytest.mark.parametrize("case", CASES)
def test_colour_modes(case: Case):
    """A JPEG may decode 2 levels apart with another libjpeg; a PNG, and the crop of given pixels, may not."""
    assert case is not None, "no stored cases"
    assert case.info["mode_files"], "no stored files"
    for entry in case.info["mode_files"]:
        prefix = f"mode/{entry['name']}"
        stored = case.arrays[f"{prefix}/rgb"]
        found = np.asarray(transforms.stored(io.BytesIO(case.arrays[f"{prefix}/file"].tobytes())))
        assert found.shape == stored.shape, entry["name"]
        worst = np.abs(found.astype(int) - stored).max()
        assert worst <= (2 if "jpeg" in entry["name"] else 0), entry["name"]
        assert adm_hashes(entry), entry["name"]
        for size, expected in adm_hashes(entry):
            cropped = adm_center_crop(Image.fromarray(stored), size)
            np.testing.assert_array_equal(cropped, case.arrays[f"{prefix}/adm_{size}"])
            assert sha256(cropped) == expected
        if entry["pil_mode"] == "RGB":  # of other modes EDM's own program makes other pictures, or none
            found = RULES["edm-crop"](Image.fromarray(stored), 64)
            assert sha256(found) == entry["edm_v1_center_crop_64_sha256"]
