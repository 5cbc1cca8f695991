#!/usr/bin/env bash
# From a bare rented node to a scored record: docs/8xh100.md explains each stage and what a failure means.
set -euo pipefail

usage() {
  cat <<'END'
usage: bash examples/rent_8xh100.sh [OPTION ...] [-- SETTING ...]

Sets up a rented node, downloads the data, trains one run per seed, and builds and checks the record. Type the same command
again after a failure or an interruption: finished stages are skipped, and an unfinished one resumes where it can.

  --gpus N               GPUs to train on: 8, 4, 2 or 1; 0 trains on the CPU [8]
  --recipe NAME          a file of train/recipes [sp8192_sdclip]
  --seeds N,...          one run per seed [42,314,999]
  --price-per-hour X     dollars per hour of the whole node [3 for each GPU, an assumption]
  --out DIR              folder in the checkout for runs, logs and the record [rented/RECIPE]
  --shards N             training shards to download [80]
  --minutes N            minutes of the stage tune; 0 leaves it out [9]
  --megabytes N          megabytes per second of the node's network, for the estimate [100]
  --author NAME, --github-id NAME    for submission.json
  --from STAGE           do STAGE and all later stages again
  --only STAGE           do STAGE alone, again
  --dry-run              print the plan with computed times and dollars, and end
  -- SETTING ...         settings for python -m train, such as --iterations 100

stages: driver venv attention data tune seedN (for each seed) build check
example: bash examples/rent_8xh100.sh --price-per-hour 24 --dry-run
END
}

fail() {
  echo "error: $*" >&2
  exit 2
}

# --- figures for the estimates: seconds with their sources; this project measured none of them on a GPU ---
COMPILE_S=323     # from the built model to the first warm-up step, cold (published log of the record of 2026-04-13)
QUANTIZE_S=77     # GPTQ 10.2 s and brotli 67.0 s (published log of the record of 2026-04-29)
EVALUATE_S=134    # 24.4 s flat and 109.1 s with a sliding window (published log of the record of 2026-04-08)
GENERATE_S=430    # calibration text that the model writes (#1392's own time; ours has a KV cache)
QUICKSTART_S=240  # make run on two cores: docs/recipes.md
DRIVER_S=10       # assumed, like the next four
INSTALL_S=120
ATTENTION_S=60
BUILD_S=180
CHECK_S=10
WHEELS_MB=3500    # torch for CUDA and its libraries, assumed
GPU_PRICE=3       # dollars per GPU and hour, assumed
SHARD_MB=200      # 10^8 tokens of two bytes
DISK_GB=20        # free space for .venv, compile caches and runs; the shards come on top
SHM_MB=1000       # NCCL's buffers between the GPUs of one node

gpus=8 recipe=sp8192_sdclip seeds=42,314,999 price='' out='' shards=80 minutes=9 megabytes=100
author='' github_id='' first='' only='' dry='' settings=()

value() { [ $# -ge 2 ] || fail "$1: expected a value (--help lists the options)"; }
while [ $# -gt 0 ]; do
  case $1 in
    --gpus) value "$@"; gpus=$2; shift 2 ;;
    --recipe) value "$@"; recipe=$2; shift 2 ;;
    --seeds) value "$@"; seeds=$2; shift 2 ;;
    --price-per-hour) value "$@"; price=$2; shift 2 ;;
    --out) value "$@"; out=$2; shift 2 ;;
    --shards) value "$@"; shards=$2; shift 2 ;;
    --minutes) value "$@"; minutes=$2; shift 2 ;;
    --megabytes) value "$@"; megabytes=$2; shift 2 ;;
    --author) value "$@"; author=$2; shift 2 ;;
    --github-id) value "$@"; github_id=$2; shift 2 ;;
    --from) value "$@"; first=$2; shift 2 ;;
    --only) value "$@"; only=$2; shift 2 ;;
    --dry-run) dry=yes; shift ;;
    -h | --help) usage; exit 0 ;;
    --) shift; settings=("$@"); break ;;
    *) fail "$1: no such option (--help lists the options; settings of python -m train come after --)" ;;
  esac
done

[[ $gpus =~ ^[01248]$ ]] || fail "--gpus: expected 0, 1, 2, 4 or 8, got $gpus"
[[ $seeds =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--seeds: expected numbers with commas between them, such as 42,314,999, got $seeds"
price=${price:-$((GPU_PRICE * gpus))}
[[ $price =~ ^([0-9]+)(\.([0-9][0-9]?))?$ ]] || fail "--price-per-hour: expected dollars, such as 24 or 23.92, got $price"
cents=${BASH_REMATCH[3]}0
price_cents=$((10#${BASH_REMATCH[1]} * 100 + 10#${cents:0:2}))
[[ $shards =~ ^[1-9][0-9]*$ ]] || fail "--shards: expected a number from 1, got $shards"
[[ $minutes =~ ^[0-9]+$ ]] || fail "--minutes: expected a number from 0, got $minutes"
[[ $megabytes =~ ^[1-9][0-9]*$ ]] || fail "--megabytes: expected a number from 1, got $megabytes"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
export PYTHON=${PYTHON:-python3}
out=${out:-rented/$recipe}
IFS=, read -ra seed_list <<<"$seeds"
[ "$(printf '%s\n' "${seed_list[@]}" | sort -u | wc -l)" = ${#seed_list[@]} ] || fail "--seeds: a seed is there twice: $seeds"
stages=(driver venv attention data tune "${seed_list[@]/#/seed}" build check)
for name in $first $only; do
  [[ " ${stages[*]} " == *" $name "* ]] || fail "$name: no such stage; there are: ${stages[*]}"
done
[ -z "$first" ] || [ -z "$only" ] || fail "--from and --only: give one of them"

# settings come from Python, which needs nothing installed for that
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "$PYTHON: expected Python 3.11 or newer: apt install python3, or set PYTHON=python3.12"
read_settings='
import argparse, sys
from train.common.values import ConfigError
from train.recipes import load_recipe
try:
    recipe = load_recipe(sys.argv[1]).config().to_dict()
except ConfigError as error:
    sys.exit(f"error: {error}")
parser = argparse.ArgumentParser(allow_abbrev=False)
names = "data_path", "corpus", "max_wallclock_seconds", "gptq_calib_source"
for name in names:
    parser.add_argument(f"--{name}", default=recipe[name])
given = parser.parse_known_args(sys.argv[2:])[0]
given.max_wallclock_seconds = int(float(given.max_wallclock_seconds))
print(*(getattr(given, name) for name in names), sep="\n")
'
facts=$("$PYTHON" -c "$read_settings" "$recipe" "${settings[@]}") || exit 2
{ read -r data_path; read -r corpus; read -r train_s; read -r calibration || true; } <<<"$facts"
vocabulary=''
[[ $data_path =~ ^data/datasets/fineweb10B_sp([0-9]+)/?$ ]] && vocabulary=${BASH_REMATCH[1]}

data_mb=0
[ -z "$vocabulary" ] || [ "$vocabulary" = 2048 ] || data_mb=$(((shards + 1) * SHARD_MB))

# these functions put their result in REPLY, because $(…) would start a subshell for each figure
estimate() { # seconds of a stage
  REPLY=0
  case $1 in
    driver) REPLY=$DRIVER_S ;;
    venv) REPLY=$((INSTALL_S + WHEELS_MB / megabytes)) ;;
    attention) REPLY=$((gpus > 0 ? ATTENTION_S : 0)) ;;
    data) REPLY=$((data_mb / megabytes)) ;;
    tune) REPLY=$((gpus > 0 ? 60 * minutes : 0)) ;;
    seed*)
      if [ -n "$corpus" ]; then
        REPLY=$QUICKSTART_S
      else
        REPLY=$((COMPILE_S + train_s + QUANTIZE_S + EVALUATE_S))
        [ "$calibration" != generated ] || REPLY=$((REPLY + GENERATE_S))
      fi
      ;;
    build) REPLY=$BUILD_S ;;
    check) REPLY=$CHECK_S ;;
  esac
}

took() { # seconds of all attempts at a stage
  local name seconds
  REPLY=0
  [ -e "$out/attempts.tsv" ] || return 0
  while read -r name seconds _; do
    [ "$name" != "$1" ] || REPLY=$((REPLY + seconds))
  done <"$out/attempts.tsv"
}

dollars() { # dollars of some seconds
  local cents=$((($1 * price_cents + 1800) / 3600))
  printf -v REPLY '%d.%02d' $((cents / 100)) $((cents % 100))
}

row() { # a name, seconds of the estimate, seconds taken, a note
  local expected spent
  dollars "$2"
  expected=$REPLY
  dollars "$3"
  spent=$REPLY
  printf '%-12s %10s %9s %10s %9s%s\n' "$1" "$2" "$expected" "$3" "$spent" "$4"
}

table() {
  local stage expected note all=0 all_spent=0
  echo "recipe $recipe, $gpus GPUs, \$$price per hour; estimates are computed, not measured on a GPU"
  printf '%-12s %10s %9s %10s %9s\n' stage 'estimate s' \$ 'took s' \$
  for stage in "${stages[@]}"; do
    estimate "$stage"
    expected=$REPLY
    took "$stage"
    note=''
    [ ! -e "$out/$stage.done" ] || note='  done'
    all=$((all + expected)) all_spent=$((all_spent + REPLY))
    row "$stage" "$expected" "$REPLY" "$note"
  done
  row total $all $all_spent ''
}

if [ -n "$dry" ]; then
  table
  exit 0
fi

# --- the stages; each runs in a shell of its own that ends at the first failed command ---

stage_driver() {
  local name free need=$DISK_GB shm
  for name in make gcc flock; do
    command -v "$name" >/dev/null || fail "$name: not found: apt install make gcc g++ util-linux python3-venv python3-dev"
  done
  if [ "$gpus" -gt 0 ]; then
    check_gpus
  else
    need=5
  fi
  [ -e "$out/data.done" ] || need=$((need + data_mb / 1000))
  free=$(df --output=avail -B 1000000000 . | tail -1)
  [ "$free" -ge "$need" ] || fail "$root: $((free)) GB are free, $need are needed: rent a larger disk, or lower --shards"
  if [ "$gpus" -gt 1 ]; then
    shm=$(df --output=avail -B 1000000 /dev/shm | tail -1)
    [ "$shm" -ge $SHM_MB ] || fail "/dev/shm: $((shm)) MB are free, $SHM_MB are needed: start the container with --shm-size=16g"
  fi
  echo "disk: $((free)) GB free, $need needed"
}

check_gpus() {
  local found count driver need torch_cuda
  command -v nvidia-smi >/dev/null || fail "nvidia-smi: not found: rent a node with NVIDIA's driver, or train on the CPU with --gpus 0"
  found=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader) ||
    fail "nvidia-smi: found no GPU: $found: restart the node or rent another"
  echo "$found"
  count=$(wc -l <<<"$found")
  [ "$count" -ge "$gpus" ] || fail "--gpus $gpus: the node has $count: give --gpus $count, or rent another node"
  if [ "$count" -gt "$gpus" ] || grep -qv H100 <<<"$found"; then
    echo "warning: a record is made on 8 H100: check will refuse the hardware"
  fi
  driver=$(head -1 <<<"$found" | cut -d, -f2)
  # make uses an installed torch; otherwise it installs one for CUDA 13
  torch_cuda=$("$PYTHON" -c '
import torch
assert tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])) >= (2, 11)
print(torch.version.cuda)' 2>/dev/null) || torch_cuda=13
  case $torch_cuda in
    12*) need=525 ;;
    *) need=580 ;;
  esac
  [ "${driver%%.*}" -ge $need ] ||
    fail "driver$driver: torch for CUDA $torch_cuda needs $need or newer: rent a node with a newer driver, or an image that brings its own torch"
}

stage_venv() {
  make doctor
  [ "$gpus" -eq 0 ] || python -c '
import sys, torch
count = torch.cuda.device_count()
if count < int(sys.argv[1]):
    sys.exit(f"error: torch {torch.__version__} sees {count} GPUs: the driver does not fit its CUDA {torch.version.cuda}")
for index in range(count):
    torch.ones(8, 8, device=f"cuda:{index}").sum().item()
' "$gpus"
}

has_flash_attention() {
  python -c '
import sys, torch
from train.model.attention_backends import BACKENDS
problem = BACKENDS["fa3"].problem(torch.device("cuda"), torch.bfloat16, 64)
print("FlashAttention 3:", problem or "found")
sys.exit(problem is not None)
'
}

stage_attention() {
  if [ "$gpus" -eq 0 ]; then
    echo "no GPU: PyTorch's attention is used"
  elif has_flash_attention || { python -m pip install --quiet kernels && has_flash_attention; }; then
    echo "training takes it where it is the fastest"
  else
    echo "warning: no FlashAttention 3: training takes the fastest of PyTorch's own backends, and steps are slower"
  fi
}

stage_data() {
  if [ -n "$corpus" ]; then
    echo "the first run makes $data_path, nothing is downloaded"
  elif [ "$data_mb" -gt 0 ]; then
    local source=(--repo kevclark/parameter-golf --skip-manifest)
    [ "$vocabulary" != 1024 ] || source=()
    python -m train.data fineweb --variant "sp$vocabulary" --train-shards "$shards" "${source[@]}"
  else
    compgen -G "$data_path/*_train_*.bin" >/dev/null || fail "$data_path: no shards: build them as docs/recipes.md shows, under \"On 8 GPUs\""
  fi
}

stage_tune() {
  if [ "$gpus" -eq 0 ] || [ "$minutes" -eq 0 ]; then
    echo "nothing is measured"
    return
  fi
  # training works without it: kernels that were not measured stay off
  python -m golf_kernels tune --minutes "$minutes" --recipe "$recipe" ||
    echo "warning: not every measurement ended well: python -m golf_kernels tune --show says why"
}

stage_seed() {
  local device=()
  if [ "$gpus" -eq 0 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    device=(--device cpu)
  fi
  # torchrun as a module, because the torch of the node's image puts no command into .venv
  python -m torch.distributed.run --standalone --nproc_per_node=$((gpus > 0 ? gpus : 1)) -m train --recipe "$recipe" \
    "${settings[@]}" --seed "$1" --run_id "seed$1" --runs_dir "$out/runs" --checkpoint_every 1000 --resume auto "${device[@]}"
}

stage_build() {
  local code=0 names=()
  [ -z "$author" ] || names+=(--author "$author")
  [ -z "$github_id" ] || names+=(--github-id "$github_id")
  set_aside "$out/record"
  # exit code 1: the record is written but breaks a rule; the stage check reports it again
  python -m train.submission build "${seed_list[@]/#/$out/runs/seed}" --out "$out/record" --single-file wrapped "${names[@]}" || code=$?
  [ $code -le 1 ] && [ -d "$out/record" ]
}

stage_check() {
  python -m train.submission check "$out/record" || fail "$out/record breaks a rule, see above"
}

set_aside() { [ ! -e "$1" ] || mv "$1" "$1.$(date +%Y%m%d-%H%M%S)"; }

# --- running the stages ---

mkdir -p "$out"
exec 9>"$out/.lock"
flock -n 9 || fail "$out: another process is at work there: wait until it ends, or stop it"
asked="gpus $gpus, recipe $recipe, seeds $seeds, shards $shards, settings ${settings[*]}"
[ ! -e "$out/asked" ] || [ "$(cat "$out/asked")" = "$asked" ] ||
  fail "$out was begun with other options ($(cat "$out/asked")): give those, or another --out"
echo "$asked" >"$out/asked"

export PATH="$root/.venv/bin:$PATH" PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# the Hub's cache is on the disk of data/, so that each shard is stored once; compiled code is kept for later processes
export HF_HOME=${HF_HOME:-$root/data/huggingface} TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$(realpath "$out")/compiled}

again=''
for name in "${stages[@]}"; do
  [ "$name" != "$first" ] || again=yes
  [ -z "$again" ] || rm -f "$out/$name.done"
done

ended() { # note the seconds of an attempt
  spent=$(($(date +%s) - begun))
  printf '%s\t%s\t%s\n' "$name" "$spent" "$1" >>"$out/attempts.tsv"
}

# each stage is a process group, so that all its processes can be ended with this script
set -m
child=''
stop() {
  trap '' INT TERM HUP
  if [ -n "$child" ]; then
    kill -TERM -- "-$child" 2>/dev/null || true
    wait "$child" || true
    ended stopped
  fi
  echo "stopped; type the same command to go on" >&2
  exit 130
}
trap stop INT TERM HUP

for name in "${stages[@]}"; do
  [ -z "$only" ] || [ "$name" = "$only" ] || continue
  if [ -z "$only" ] && [ -e "$out/$name.done" ]; then
    echo "== $name: done before"
    continue
  fi
  estimate "$name"
  expected=$REPLY
  dollars "$expected"
  echo "== $name: estimate $expected s, \$$REPLY"
  rm -f "$out/$name.done"
  begun=$(date +%s) code=0
  (
    set +m
    "stage_${name/%[0-9]*/}" "${name#seed}" 2>&1 | tee -a "$out/$name.log"
  ) &
  child=$!
  wait "$child" || code=$?
  child=''
  ended "$code"
  if [ "$code" -ne 0 ]; then
    table
    echo "error: stage $name ended with exit code $code, output in $out/$name.log: docs/8xh100.md says what to do; then type the same command" >&2
    exit 1
  fi
  touch "$out/$name.done"
  dollars "$spent"
  echo "== $name: took $spent s, \$$REPLY"
done
table
[ ! -d "$out/record" ] || echo "record: $out/record"
