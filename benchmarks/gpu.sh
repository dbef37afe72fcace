#!/usr/bin/env bash
# Measure a GPU that is at hand for some minutes: bash benchmarks/gpu.sh [--minutes N] [--help]
#
# Wheels of packages that the machine lacks, and cannot load from a network, may lie in the folder wheels/; they are
# installed into .venv-gpu, beside what the machine has.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
if [ -d wheels ]; then
    "$python" -m venv --system-site-packages .venv-gpu
    .venv-gpu/bin/python -m pip install --quiet --no-index --no-deps wheels/*.whl
    python=.venv-gpu/bin/python
fi
exec "$python" -m benchmarks.gpu "$@"
