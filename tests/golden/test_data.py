"""Decoding and the ADM centre crop against stored outputs of the public code."""

import hashlib
import io
import re

import numpy as np
import pytest
from PIL import Image

from diffjax.data import transforms
from diffjax.data.transforms import adm_center_crop, adm_offset, adm_sizes
from tests.golden.cases import Case, cases

pytestmark = pytest.mark.golden
RESIZE = [each for each in cases("data") if each.values[0] is None or "mode_files" in each.values[0].info]
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


def adm_outputs(entry: dict) -> list[tuple[int, str]]:
    """(size, SHA-256) of each stored output of the crop for one input."""
    return [
        (int(key.removeprefix("adm_")), out["sha256"]) for key, out in entry["out"].items() if key.startswith("adm_")
    ]


def adm_hashes(entry: dict) -> list[tuple[int, str]]:
    """The same where the hashes stand beside each other as `adm_<size>_sha256`."""
    found = [(re.fullmatch(r"adm_(\d+)_sha256", key), value) for key, value in entry.items()]
    return [(int(match[1]), value) for match, value in found if match]


@pytest.mark.parametrize("case", CASES)
def test_adm_center_crop(case: Case):
    assert case is not None, "no stored cases"
    for entry in case.info["cases"]:
        image = recipe(entry)
        outputs = adm_outputs(entry)
        assert outputs, f"case {entry['case']} stores no output of the crop"
        for size, expected in outputs:
            found = adm_center_crop(Image.fromarray(image), size)
            stored = case.arrays.get(f"c{entry['case']}/adm_{size}")
            if stored is not None:
                np.testing.assert_array_equal(found, stored)
            corners = case.arrays.get(f"c{entry['case']}/adm_{size}_crop")
            if corners is not None:
                n = corners.shape[1]
                np.testing.assert_array_equal(np.stack([found[:n, :n], found[-n:, -n:]]), corners)
            assert sha256(found) == expected, f"case {entry['case']} at {size}"


@pytest.mark.parametrize("case", CASES)
def test_adm_sizes_and_offsets(case: Case):
    assert case is not None, "no stored cases"
    for entry in case.info["cases"]:
        for size, _ in adm_outputs(entry):
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
