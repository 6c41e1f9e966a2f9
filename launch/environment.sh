# Sourced by the other scripts: sets PYTHON to an interpreter that has what requirements.txt asks for.
#
# DIFFJAX_VENV names an environment to make or reuse (default: .venv in the project). One that already satisfies the
# requirements is used as it is; pip runs only where something is missing.
#
# usage: . launch/environment.sh [EXTRA,EXTRA]      optional-dependency groups of pyproject.toml, such as dev

cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-}"
venv="${DIFFJAX_VENV:-$PWD/.venv}"
PYTHON="$venv/bin/python"

if [ ! -x "$PYTHON" ]; then
  for candidate in python3.13 python3.12 python3.11 python3; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      base="$candidate"
      break
    fi
  done
  if [ -z "${base:-}" ]; then
    echo "diffjax needs Python 3.11 or newer on PATH" >&2
    exit 2
  fi
  echo "making the environment $venv with $("$base" --version)"
  "$base" -m venv "$venv"
fi

if ! "$PYTHON" launch/satisfied.py "$extras"; then
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
fi
