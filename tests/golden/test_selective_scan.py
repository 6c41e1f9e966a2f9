"""Every implementation of the selective scan against the stored float64 run of the public reference function.

The reference's own float32 run is up to 1.1e-5 off where values reach 129, else 1.2e-6; its gradients are up to 1.3e-6
of the largest entry off.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.cases import Case, atol, cases, rtol_of_gradient
from tests.ops.scans import IMPLEMENTATIONS, KERNELS, scan

pytestmark = pytest.mark.golden
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
BUT_ONE = ("full_L1", "full_L7", "full_L64", "full_L257", "full_L1025", "nogate_L64", "plain_L64")  # of the cases


def inputs(case: Case) -> dict[str, np.ndarray]:
    assert case is not None, "no stored cases"
    return {name: case.arrays[name] for name in NAMES if name in case.arrays}


def run(case: Case, implementation: str):
    """arrays -> (out, last state), jitted."""
    softplus = "softplus" in case.info["options"]
    return jax.jit(lambda x: scan(implementation, **x, delta_softplus=softplus, return_last_state=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", cases("selective_scan"))
def test_values(case, implementation):
    out, last = run(case, implementation)(inputs(case))
    for value, stored in ((out, case.arrays["out"]), (last, case.arrays["last_state"])):
        np.testing.assert_allclose(value, stored, rtol=0, atol=atol(case, 2e-6 + 2e-7 * np.abs(stored).max()))


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("case", cases("selective_scan", slow=BUT_ONE))
def test_values_of_the_kernels(case, implementation):
    test_values(case, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", cases("selective_scan", "grad:"))
def test_gradients(case, implementation):
    forward = run(case, implementation)
    grads = jax.jit(jax.grad(lambda x: jnp.sum(forward(x)[0] * case.arrays["g"])))(inputs(case))
    stored = {key.removeprefix("grad:"): value for key, value in case.arrays.items() if key.startswith("grad:")}
    assert stored.keys() == grads.keys()
    for name, value in stored.items():
        np.testing.assert_allclose(
            grads[name], value, rtol=0, atol=rtol_of_gradient(case, name, 3e-6) * np.abs(value).max(), err_msg=name
        )


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("case", cases("selective_scan", "grad:", slow=BUT_ONE))
def test_gradients_of_the_kernels(case, implementation):
    test_gradients(case, implementation)
