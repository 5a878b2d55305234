#!/usr/bin/env bash
# linear_scan and attention on a machine with an NVIDIA GPU: tests on the device, block sizes, times beside other
# libraries.
#
#   benchmarks/gpu.sh [--dry-run]
#
# Installs nothing: wants jax with CUDA in PYTHON (default: python3), takes along flash-linear-attention and
# jax-linear-attention where they are installed. Writes benchmarks/results/{linear_scan_gpu,linear_scan_gpu_tuning,
# attention_gpu}.json. --dry-run: tiny shapes, kernels interpreted on the CPU, nothing kept.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
results=benchmarks/results
dry=()
if [[ ${1:-} == --dry-run ]]; then
  export JAX_PLATFORMS=cpu DEVICE_TESTS=interpret
  results=$(mktemp -d)
  trap 'rm -rf "$results"' EXIT
  dry=(--dry_run)
else
  export JAX_PLATFORMS=cuda,cpu
  nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm --format=csv
fi
failed=0
for op in linear_scan attention; do
  "$python" -m pytest "tests/kernels_pallas/${op}/test_${op}_device.py" -p no:cacheprovider || failed=1
done
"$python" benchmarks/tune_linear_scan_gpu.py "${dry[@]}" --json="$results/linear_scan_gpu_tuning.json"
"$python" benchmarks/linear_scan_gpu.py "${dry[@]}" --json="$results/linear_scan_gpu.json"
"$python" benchmarks/attention_gpu.py "${dry[@]}" --json="$results/attention_gpu.json"
exit $failed
