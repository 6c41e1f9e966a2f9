# Sourced by the other scripts: sets PYTHON to an interpreter that has what requirements.txt asks for.
#
# DIFFJAX_VENV names an environment to make or reuse (default: .venv in the project). One that already satisfies the
# requirements is used as it is; pip runs only where something is missing.
# DIFFJAX_PYTHON is the interpreter that a new environment is made with (default: the newest one found).
#
# usage: . launch/environment.sh [EXTRA,EXTRA]      optional-dependency groups of pyproject.toml, such as dev

cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras="${1:-}"
venv="${DIFFJAX_VENV:-$PWD/.venv}"
PYTHON="$venv/bin/python"

if [ ! -x "$PYTHON" ]; then
  if ! base="${DIFFJAX_PYTHON:-$(bash launch/find_python.sh 3.13 3.12 3.11)}"; then
    echo "diffjax needs Python 3.11, 3.12 or 3.13: none is on PATH or among pyenv's versions" >&2
    exit 2
  fi
  echo "making the environment $venv with $("$base" --version)"
  "$base" -m venv "$venv"
fi

if ! "$PYTHON" launch/satisfied.py "$extras"; then
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
fi
