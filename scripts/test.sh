#!/usr/bin/env bash
# The whole test suite, from a fresh clone. Arguments go to pytest: bash scripts/test.sh tests/model -k ring
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/bootstrap.sh --dev
exec .venv/bin/python -m pytest "$@"
