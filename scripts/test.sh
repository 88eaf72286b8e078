#!/usr/bin/env bash
# Installs the packages and runs the test suite, with one process for each core, or with one in all where there is a GPU.
# Arguments go to pytest: bash scripts/test.sh tests/model -k ring. `-n 0` runs all tests in one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/bootstrap.sh --dev
exec .venv/bin/python -m pytest -n auto --dist worksteal "$@"
