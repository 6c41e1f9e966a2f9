#!/usr/bin/env bash
# The whole test suite, with the linter, the formatter and the type checker, on a fresh machine.
#
# usage: bash launch/test.sh [pytest arguments]      for instance: bash launch/test.sh -m "not slow"
# DIFFJAX_VENV names an environment to reuse. DIFFJAX_COMPILE=1 also installs compilers for TPUs and GPUs (0.9 GB) and so
# runs the tests that compile for them without having one; otherwise those are skipped.
set -euo pipefail
. "$(dirname "$0")/environment.sh" "dev${DIFFJAX_COMPILE:+,compile}"

export JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=1
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest -n 2 --dist loadfile "$@"
