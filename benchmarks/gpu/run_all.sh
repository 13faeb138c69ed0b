#!/usr/bin/env bash
# Everything that wants a GPU, in one call of under nine minutes: build, tests, sanitizer, benchmarks.
#
#   bash benchmarks/gpu/run_all.sh                        # all sections, results to $OUT or benchmarks/results/gpu
#   bash benchmarks/gpu/run_all.sh --only build networks  # a second call with more time for one question
#   bash benchmarks/gpu/run_all.sh --device cpu --quick   # the same code without a GPU, in about a minute
set -u
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 MPLBACKEND=Agg
# What CUDA_HOME names first, then what is on PATH, then other toolkits, the newest of them first.
[ -n "${CUDA_HOME:-}" ] && PATH="$CUDA_HOME/bin:$CUDA_HOME/compute-sanitizer:$PATH"
for cuda in /usr/local/cuda $(printf '%s\n' /usr/local/cuda-* | sort -rV); do
  for folder in "$cuda/bin" "$cuda/compute-sanitizer"; do
    [ -d "$folder" ] && PATH="$PATH:$folder"
  done
done
export PATH
exec "${PYTHON:-python3}" -m benchmarks.gpu.run_all "$@"
