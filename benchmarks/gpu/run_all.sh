#!/usr/bin/env bash
# Everything that wants a GPU, in one call of under nine minutes: build, tests, sanitizer, benchmarks.
#
#   bash benchmarks/gpu/run_all.sh                        # all sections, results to $OUT or benchmarks/results/gpu
#   bash benchmarks/gpu/run_all.sh --only build networks  # a second call with more time for one question
#   bash benchmarks/gpu/run_all.sh --device cpu --quick   # the same code without a GPU, in about a minute
set -u
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 MPLBACKEND=Agg
for cuda in "${CUDA_HOME:-}" /usr/local/cuda; do
  [ -n "$cuda" ] && [ -d "$cuda/bin" ] && export PATH="$cuda/bin:$PATH"
done
exec "${PYTHON:-python3}" -m benchmarks.gpu.run_all "$@"
