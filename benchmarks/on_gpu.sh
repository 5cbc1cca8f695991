#!/usr/bin/env bash
# What to run first on a machine with a GPU: installs, tests each kernel, tunes, and times three variants of the step.
# Usage: bash benchmarks/on_gpu.sh [MINUTES [OUT]]     (9 minutes, folder on_gpu)
# It needs no network, but torch and Triton must be installed. Each stage has a time limit. A failed stage does not stop
# the others. After every stage, OUT has all outputs and rows so far, the tuned file and summary.md.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
minutes=${1:-9} out=${2:-on_gpu} python=${PYTHON:-python3}
[[ $minutes =~ ^[0-9]+$ && $minutes -ge 1 ]] || { echo "error: expected whole minutes, at least 1, got $minutes" >&2; exit 2; }
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
end=$((SECONDS + 60 * minutes)) failed=0
export GOLF_CACHE="$out/cache"
printf '| stage | how it ended | s | output |\n|---|---|---|---|\n' > "$out/summary.md"

# stage NAME SHARE COMMAND…: at most SHARE percent of all minutes and no more than what is left
stage() {
  local name=$1 limit=$((minutes * 60 * $2 / 100)) began=$SECONDS code verdict=ok
  shift 2
  [ "$limit" -le $((end - SECONDS)) ] || limit=$((end - SECONDS))
  if [ "$limit" -lt 5 ]; then
    verdict="not reached"
  else
    echo "[$((SECONDS)) s] $name, at most $limit s"
    timeout --kill-after=5 "$limit" "$@" > "$out/$name.txt" 2>&1
    code=$?
    # pytest ends with 5 if a file has no GPU test
    [ "$code" -ne 5 ] || { code=0; verdict="no test"; }
    [ "$code" -eq 0 ] || { verdict="exit code $code"; failed=1; }
    [ "$code" -ne 124 ] || verdict="stopped after $limit s"
    [ "$code" -eq 0 ] || tail -n 3 "$out/$name.txt"
  fi
  echo "| $name | $verdict | $((SECONDS - began)) | \`$name.txt\` |" >> "$out/summary.md"
  cp -r benchmarks/results "$out/" 2> /dev/null || true
}

stage gpu 5 nvidia-smi
stage install 20 "$python" -m pip install --no-build-isolation --no-deps -e .
stage doctor 25 "$python" -m golf_kernels
for file in tests/kernels/test_*_triton.py tests/kernels/test_gptq_block.py tests/kernels/test_int6.py tests/test_loop_gpu.py; do
  stage "$(basename "$file" .py)" 10 "$python" -m pytest -x -q -p no:cacheprovider -m gpu "$file"
done
stage tune 50 "$python" -m golf_kernels tune --minutes "$(((end - SECONDS) * 2 / 3 / 60 + 1))"
stage step 40 "$python" -m benchmarks.bench_step --phase before --rounds 15 --variants torch,golf,published
stage show 5 "$python" -m golf_kernels tune --show
cat "$out/summary.md"
exit "$failed"
