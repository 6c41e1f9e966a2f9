"""EDM's augmentation with recorded draws against stored outputs of the public code.

That pads by what the strongest map of a batch needs, we by all there is: its padding, and the matrix of its sampling
grid, which holds that padding, have no counterpart here. Its larger image is the inner part of ours.
"""

import functools
from typing import Any

import jax
import numpy as np
import pytest

from diffjax.ops import augment
from tests.golden.cases import cases, to_nchw, to_nhwc

pytestmark = pytest.mark.golden
ATOL = 5e-5
TRANSFORMS = ("xflip", "yflip", "scale", "rotate_frac", "aniso", "translate_frac")
GATES = ("yflip.gate", "scale.gate", "rotate_frac.gate", "aniso.gate", "translate_frac.gate", "aniso.rgate")
COLUMNS = {"xflip": [0], "yflip": [1], "scale": [2], "rotate_frac": [3, 4], "aniso": [5, 6], "translate_frac": [7, 8]}


def recorded() -> list:
    """Parameters (entry of the json, its arrays by their own names), one per case that has no other transforms."""
    found = []
    for each in cases("data"):
        (case,) = each.values
        entries = case.info["cases"] if case else {}
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            if "multipliers" in entry and set(entry["multipliers"]) <= set(TRANSFORMS):
                found.append(pytest.param((case, name), id=f"{each.id}-{name}"))
    return found or [pytest.param(None, id="data-no-augmentation-cases")]


@functools.cache
def read(case: Any, name: str) -> tuple[dict, dict[str, np.ndarray]]:
    prefix = f"{name}/"
    arrays = {key.removeprefix(prefix): value for key, value in case.arrays.items() if key.startswith(prefix)}
    return case.info["cases"][name], arrays


def draws(arrays: dict[str, np.ndarray]) -> augment.Draws:
    """The recorded draws; of a transform that was not drawn the gate is closed."""
    n = len(arrays["x"])

    def value(name: str, absent: float = 0.0) -> np.ndarray:
        found = arrays.get(f"draw/{name}")
        return np.full(n, absent, np.float32) if found is None else found.reshape(-1, n)[-1].astype(np.float32)

    translation = arrays.get("draw/translate_frac.w", np.zeros((2, n), np.float32))
    return augment.Draws(
        xflip=value("xflip.w"),
        yflip=value("yflip.w"),
        scale=value("scale.w"),
        rotation=np.pi * (2 * value("rotate_frac.w") - 1),
        aniso=value("aniso.w"),
        axis=np.pi * (2 * value("aniso.r") - 1),
        translation=translation.T,
        gates=np.stack([value(gate, absent=1.0) for gate in GATES], axis=-1),
    )


CASES = recorded()
INTERMEDIATES = ("G_scale", "G_rotate", "G_aniso", "G_inv", "padded_input_up_image0", "sampled")
STORING_THEM = [each for each in CASES if each.values[0] and set(read(*each.values[0])[1]) & set(INTERMEDIATES)]


@pytest.mark.parametrize("case", CASES)
def test_images_and_labels(case: Any):
    assert case is not None, "no stored cases"
    entry, arrays = read(*case)
    drawn = augment.gated(draws(arrays), entry["p"])
    found = to_nchw(jax.jit(augment.transform)(to_nhwc(arrays["x"]), drawn))
    np.testing.assert_allclose(found, arrays["y"], atol=ATOL, rtol=0)
    if "y_static_padding" in arrays:
        np.testing.assert_allclose(found, arrays["y_static_padding"], atol=ATOL / 2, rtol=0)
    columns = [column for name in TRANSFORMS if name in entry["multipliers"] for column in COLUMNS[name]]
    told = np.asarray(augment.labels(drawn))
    np.testing.assert_allclose(told[:, columns], arrays["labels"], atol=1e-5, rtol=0)
    assert not np.delete(told, columns, axis=1).any()


@pytest.mark.parametrize("case", STORING_THEM or [pytest.param(None, id="data-no-augmentation-intermediates")])
def test_intermediates(case: Any):
    """The matrices after every factor, the enlarged image and what is read of it, but for the edges."""
    assert case is not None, "no stored cases"
    entry, arrays = read(*case)
    drawn = augment.gated(draws(arrays), entry["p"])
    height, width = arrays["x"].shape[2:]
    factors = {
        "G_scale": ("rotation", "aniso", "axis", "translation"),
        "G_rotate": ("aniso", "axis", "translation"),
        "G_aniso": ("translation",),
        "G_inv": (),
    }
    for name, later in factors.items():
        if name in arrays:
            without = drawn._replace(**{field: np.zeros_like(getattr(drawn, field)) for field in later})
            found = augment.affine(without, height, width)
            np.testing.assert_allclose(found, arrays[name][:, :2], atol=ATOL / 5, rtol=0, err_msg=name)
    images = augment.mirrored(to_nhwc(arrays["x"]), drawn)
    enlarged = augment.enlarged(images)
    if "padded_input_up_image0" in arrays:
        expected = arrays["padded_input_up_image0"][0]
        left, _, top, _ = arrays["pad_left_right_top_bottom"]
        y, x = 1 + 2 * (height - 1 - top), 1 + 2 * (width - 1 - left)
        inner = to_nchw(enlarged)[0, :, y : y + expected.shape[1], x : x + expected.shape[2]]
        edge = np.s_[:, 6:-6, 6:-6]  # where the filter reaches beyond the smaller padding
        np.testing.assert_allclose(inner[edge], expected[edge], atol=ATOL / 5, rtol=0)
    if "sampled" in arrays:
        matrices = augment.affine(drawn, height, width)
        found = jax.jit(augment.sample, static_argnums=(2, 3))(enlarged, matrices, height, width)
        inner = np.s_[:, :, 12:-12, 12:-12]  # the corners of the margin are read where the public padding ends
        np.testing.assert_allclose(to_nchw(found)[inner], arrays["sampled"][inner], atol=ATOL, rtol=0)
