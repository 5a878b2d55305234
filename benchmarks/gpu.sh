#!/usr/bin/env bash
# Measures the kernels on this machine's GPU in ten minutes: bash benchmarks/gpu.sh [SECONDS] [--stages=...] [--dry]
# Results go to $OUT (default: benchmarks/results), line by line. PYTHON names the interpreter. Exits 0 whatever
# happens: what failed is in the results. benchmarks/gpu/README.md says more.
set -u
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
budget=560
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
  budget=$1
  shift
fi
export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}
"${PYTHON:-python3}" -m benchmarks.gpu --budget="$budget" "$@"
exit 0
