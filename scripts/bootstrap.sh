#!/usr/bin/env bash
# Makes .venv and installs the pinned packages. Does nothing if they are already installed.
#
#   bash scripts/bootstrap.sh          packages for training and evaluation
#   bash scripts/bootstrap.sh --dev    also packages for tests and linters
#
# PYTHON=/path/to/python3.12 chooses the interpreter. Exit codes: 0 done; 2 Python, venv or a package is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  printf 'error: %s\n' "$@" >&2
  exit 2
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done
  fail "no Python 3.11 or newer found (looked for: ${PYTHON:-python3, python3.13, python3.12, python3.11, python})" \
    "install one, or name it: PYTHON=/path/to/python3.12 bash scripts/bootstrap.sh"
}

make_venv() {
  .venv/bin/python -c 'import pip' 2>/dev/null && return
  local python
  python=$(find_python)
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv module; install it (Debian, Ubuntu: apt-get install python3-venv)"
  echo "making .venv with $("$python" --version)"
  "$python" -m venv --clear .venv
}

# Prints a hash of a requirements file and the version of Python. It is saved after an installation; while it stays the
# same there is nothing to install.
fingerprint() {
  .venv/bin/python -c 'import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest(), sys.version)' "$1"
}

is_installed() { [ "$(cat ".venv/installed-$1" 2>/dev/null)" = "$(fingerprint "$1")" ]; }

# install FILE...: installs the packages of the last file, which includes the others.
install() {
  local file outdated=
  for file in "$@"; do is_installed "$file" || outdated=yes; done
  [ -z "$outdated" ] && return
  echo "installing $file into .venv (one to a few minutes)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --retries 2 -r "$file" ||
    fail "the packages of $file could not be installed; pip's reason is above" \
      "a package index must be reachable: check the network, or point pip at a mirror with PIP_INDEX_URL or pip.conf"
  for file in "$@"; do fingerprint "$file" >".venv/installed-$file"; done
}

make_venv
case "${1:-}" in
  "") install requirements.txt ;;
  --dev) install requirements.txt requirements-dev.txt ;;
  *) fail "unknown argument '$1'; the only one is --dev" ;;
esac
