# Prints the path of the first of the given Python versions that runs here, on PATH or among pyenv's; exit 1 without one.
#
# usage: bash launch/find_python.sh 3.13 3.12 3.11

for version in "$@"; do
  # pyenv's shim of a version that is not active fails, so the installed versions are tried as well
  for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
    if "$candidate" -c "import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
      command -v "$candidate"
      exit 0
    fi
  done
done
exit 1
