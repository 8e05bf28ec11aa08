#!/usr/bin/env bash
# Runs the conformance cells of the CUDA kernels under compute-sanitizer. Needs a GPU and a build
# with CUDA. Memory that torch caches would hide errors, so that it must not cache.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck initcheck synccheck; do
  compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
    .venv/bin/python -m pytest -q tests/backends/test_cuda_gpu.py -k "float64 or vocabularies"
done
