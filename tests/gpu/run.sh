#!/bin/sh
# Everything that wants a real GPU, in one call: what driver and device can do, the tests, and the figures, which go to
# perf/results/gpu in the form of all benchmarks, with device and driver in them.
# It needs a GPU (driver 570 or later), PyTorch or CuPy, pytest, gcc, and the rights to dump. PYTHON=... chooses the
# interpreter that has them; arguments go to pytest.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
"$python" setup.py --quiet build_ext --inplace
nvidia-smi -L || echo 'no nvidia-smi here'
"$python" -m gpurestore check || true
status=0
"$python" -m pytest -v -rs tests/gpu "$@" || status=$?
if [ -e /dev/nvidiactl ]; then
	PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} "$python" perf/bench.py full --runs 3 --cases gpu \
		--results perf/results/gpu || status=$?
fi
exit $status
