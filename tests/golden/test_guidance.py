"""Signal-to-noise ratios and min-SNR weights against public code; guidance itself and trajectories are other files'."""

import re

import numpy as np
import pytest

from diffjax.diffusion.gaussian import gaussian_diffusion
from tests.golden.cases import cases

pytestmark = pytest.mark.golden

PREDICTIONS = {"eps": "epsilon", "x0": "x0", "v": "v"}


def min_snr_keys() -> list:
    found = []
    for parameter in cases("guidance"):
        case = parameter.values[0]
        for key in [] if case is None else case.arrays:
            if match := re.fullmatch(r"minsnr_(eps|x0|v)_g([\d.]+)", key):
                found.append(pytest.param(case, match, id=f"{parameter.id}-{key}"))
    return found or [pytest.param(None, None, id="guidance-minsnr-no-cases")]


@pytest.mark.parametrize("case", cases("guidance", having="snr_linear"))
def test_signal_to_noise_ratio(case):
    assert case is not None, "no stored cases"
    process = gaussian_diffusion(prediction="x0", weighting="snr")
    np.testing.assert_allclose(process.mse_weights, case.arrays["snr_linear"], rtol=1e-10)


@pytest.mark.parametrize("case, match", min_snr_keys())
def test_min_snr(case, match):
    assert case is not None, "no stored cases"
    process = gaussian_diffusion(prediction=PREDICTIONS[match[1]], weighting="min_snr", gamma=float(match[2]))
    np.testing.assert_allclose(process.mse_weights, case.arrays[match[0]], rtol=1e-10)
