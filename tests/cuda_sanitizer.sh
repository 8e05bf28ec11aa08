#!/usr/bin/env bash
# Runs a dozen conformance cells of our CUDA kernels under compute-sanitizer. Needs a GPU and a build
# with CUDA. Memory that torch caches would hide errors, so that it must not cache. Torch's own
# kernels, which are most, are left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PYTORCH_NO_CUDA_MEMORY_CACHING=1
cells="float64 and False and (plain or padded or argmax or tilts or pairs or capped)"
for tool in memcheck racecheck; do
  compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
    --kernel-regex kns=bgk \
    "${PYTHON:-python3}" -m pytest -q tests/backends/test_cuda_gpu.py -k "$cells"
done
