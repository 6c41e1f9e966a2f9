"""Eight simulated CPU devices for every test, and a compilation cache that outlives the test run."""

import os
import tracemalloc  # noqa: F401  pytest wants it when a destructor fails, also amid tensorflow_datasets' lazy imports
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# Tiny models spend their time in the compiler. Level 0 halves it; the programs are fast enough at these sizes. Leaving
# out the emitters of fusions, which jaxlib 0.10 allows, halves it again.
os.environ["XLA_FLAGS"] = " ".join(
    ["--xla_backend_optimization_level=0"]
    + ["--xla_cpu_use_fusion_emitters=false"] * version("jaxlib").startswith("0.10.")
    + [os.environ.get("XLA_FLAGS", "")]
)

import jax
import pytest

from diffjax.parallel import hosts

CACHE = Path(__file__).parent.parent / ".cache" / "jax"

jax.config.update("jax_num_cpu_devices", 8)
hosts.give_threads_to_simulated_devices()
jax.config.update("jax_compilation_cache_dir", os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE)))
for option, value in (("min_compile_time_secs", 0), ("min_entry_size_bytes", -1)):
    jax.config.update(f"jax_persistent_cache_{option}", value)
    os.environ.setdefault(f"JAX_PERSISTENT_CACHE_{option.upper()}", str(value))  # for the programs that tests start


@pytest.fixture(autouse=True, scope="module")
def forget_compiled_programs():
    """Thousands of them take several gigabytes in the course of the suite; those of other modules are of no use."""
    yield
    jax.clear_caches()
