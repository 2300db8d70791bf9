#!/usr/bin/env bash
# Everything that needs a GPU, in steps of under ten minutes each, on a bare machine: this repository, Python 3.11 or
# 3.12, torch 2.11 or newer with CUDA, diffusers 0.42.1, safetensors, numpy, psutil, filelock; for the engines-* steps
# also typer, rich and transformers 5.23.0. What the machine lacks goes into $WHEELS as wheels, which are installed
# first, without an index. DEVICE=cpu SCALE=tiny rehearses first, second and check without a GPU.
#
#   scripts/gpu_bench.sh list                 the steps, and the cases of the first two
#   scripts/gpu_bench.sh first                eight minutes, the most valuable: ceilings, SDXL's decoder and denoiser as
#                                             they are, channels_last, cudnn.benchmark, compiled, small decoder, 2+2 in
#                                             one call, where AOTInductor dies
#   scripts/gpu_bench.sh second               eight more: engines as served, FP8, PixArt, SD3.5, Wan
#   scripts/gpu_bench.sh check                the tiny rehearsal of every family's speed-up on this GPU
#   scripts/gpu_bench.sh sdxl|pixart|sd3      one full-size backbone with random weights, eager, batches 1 to 16
#   scripts/gpu_bench.sh compiled-sdxl        (or -pixart, -sd3) through torch.compile, batches 1 and 4
#   scripts/gpu_bench.sh wan-14b|wan-1.3b    the film models (720p takes minutes a schedule: steps are measured)
#   scripts/gpu_bench.sh tensorrt-sdxl        the same through TensorRT engines, where torch-tensorrt is installed
#   scripts/gpu_bench.sh engines-build        build and check every engine of the embedded checkpoint on this GPU;
#                                             ends at its time limit, and goes on where it stopped when run again
#   scripts/gpu_bench.sh engines-bench        time those engines
#
# Reports go to $OUT (default benchmarks/gpu); first and second write theirs after every row, and what a case said into
# $OUT/logs. A failed step does not stop the ones after it. CASES=a,b runs named cases of first and second.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/gpu}
MINUTES=${MINUTES:-8}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
DEVICE=${DEVICE:-cuda}
SCALE=${SCALE:-full}

cases() { # a part of the list, each case in a process with its own deadline
  "$PYTHON" -m bench.gpu.harness --part "$1" ${CASES:+--cases "$CASES"} --device "$DEVICE" --scale "$SCALE" \
    --minutes "$MINUTES" --patience "${PATIENCE:-1}" --out "$OUT"
}

bench() { # a report of one backbone; the log is named after the step, further arguments go to the bench
  local log=$1 backbone=$2
  shift 2
  timeout -k 20 $((MINUTES * 60 + 60)) "$PYTHON" -m bench.speedup.run \
    --device cuda --backbone "$backbone" --minutes "$MINUTES" --out "$OUT" "$@" 2>&1 | tee "$OUT/$log.log"
}

step() {
  local failed=0
  case $1 in
    list)
      sed -n '2,25s/^# \{0,1\}//p' "$0"
      "$PYTHON" -m bench.gpu.harness --list
      ;;
    first) cases 1 ;;
    second) cases 2 ;;
    check)
      for backbone in sdxl pixart sd3 wan-14b; do
        timeout -k 20 120 "$PYTHON" -m bench.speedup.run --device "$DEVICE" --backbone "$backbone" --scale tiny \
          --batches 1,2 --repeats 3 --variants eager,eager+graphs --out "$OUT/rehearsal" \
          || { failed=$?; echo "rehearsal of $backbone failed"; }
      done
      return $failed
      ;;
    sdxl | pixart | sd3) bench "$1" "$1" --batches 1,2,4,8,16 --repeats 5 --whole-limit 6 --variants eager,eager+graphs ;;
    compiled-*)
      bench "$1" "${1#compiled-}" --batches 1,4 --repeats 5 --whole-limit 6 --no-stock \
        --variants eager,compiled,compiled+graphs --out "$OUT/compiled"
      ;;
    wan-14b) bench "$1" wan-14b --batches 1 --repeats 3 --whole-limit 1 --variants eager,compiled --no-stock ;;
    wan-1.3b) bench "$1" wan-1.3b --batches 1,2 --repeats 3 --whole-limit 10 --no-stock ;;
    tensorrt-*)
      bench "$1" "${1#tensorrt-}" --batches 1,4 --repeats 5 --whole-limit 6 \
        --variants eager,tensorrt+graphs --no-stock --out "$OUT/tensorrt"
      ;;
    engines-build)
      timeout -k 15 580 "$PYTHON" -m cli.main build --checkpoint models/embedded --device cuda --engines engines-cache-gpu
      ;;
    engines-bench)
      timeout -k 15 580 "$PYTHON" -m cli.main bench engines --checkpoint models/embedded --device cuda \
        --engines engines-cache-gpu --out "$OUT"
      ;;
    *)
      echo "unknown step '$1'; see: $0 list" >&2
      return 2
      ;;
  esac
}

[ $# -gt 0 ] || set -- list
if [ "$*" != list ]; then
  mkdir -p "$OUT"
  if [ -n "${WHEELS:-}" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile "$WHEELS"/*.whl || exit
  fi
fi
status=0
for name in "$@"; do
  step "$name" || status=$?
done
exit $status
