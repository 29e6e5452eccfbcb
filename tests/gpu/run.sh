#!/usr/bin/env bash
# usage: run.sh [pytest arguments]: the tests of the GPU with the torch and lightning that $PYTHON has; nothing is fetched.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
test -x .venv-gpu/bin/python || "${PYTHON:-python3}" -m venv --system-site-packages .venv-gpu
if [ -d tests/gpu/wheels ]; then # what is there already stays as it is
  .venv-gpu/bin/python -m pip install -q --no-index --find-links tests/gpu/wheels -r tests/gpu/packages.txt
fi
.venv-gpu/bin/python tests/gpu/machine.py
exec .venv-gpu/bin/python -m pytest -m gpu tests/gpu -rs -W ignore::DeprecationWarning -W ignore::FutureWarning \
  -W ignore::UserWarning "$@"
