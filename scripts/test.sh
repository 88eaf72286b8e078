#!/usr/bin/env bash
# Installs the packages and runs the test suite. Arguments go to pytest: bash scripts/test.sh tests/model -k ring
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/bootstrap.sh --dev
exec .venv/bin/python -m pytest "$@"
