#!/bin/sh
# The tests on a real GPU. They need one (driver 570 or later), PyTorch or CuPy, pytest, and the rights to dump.
# PYTHON=... chooses the interpreter that has them; arguments go to pytest.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
"$python" setup.py --quiet build_ext --inplace
nvidia-smi -L || echo 'no nvidia-smi here'
"$python" -m gpurestore check || true
exec "$python" -m pytest -v -rs tests/gpu "$@"
