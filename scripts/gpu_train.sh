#!/usr/bin/env bash
# Trains the embedded teacher and its student on one GPU, on a bare machine without a network: this repository, torch
# 2.11 or newer with CUDA, transformers, accelerate; what else it lacks comes as wheels in $WHEELS. Each step leaves its
# result in $WORK (default runs/gpu), and a later one goes on from there.
#
#   PACKAGES=folder scripts/gpu_train.sh data      render the pictures of the npm tarballs in $PACKAGES
#   scripts/gpu_train.sh teacher MINUTES [flag...] `rmd train-teacher`; TEXT=folder of MiniLM, START=a teacher's folder
#   scripts/gpu_train.sh student MINUTES [flag...] `rmd distill` from that teacher
#   scripts/gpu_train.sh pack FILE... DIR          into parts of 15 MiB under DIR; `cat DIR/NAME.*` is the file again
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
WORK=${WORK:-runs/gpu}
DEVICE=${DEVICE:-cuda}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
mkdir -p "$WORK"
if [ -n "${WHEELS:-}" ]; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile "$WHEELS"/*.whl
fi

case ${1:-} in
  data)
    mkdir -p "$WORK/data/packages"
    cp "$PACKAGES"/*.tgz "$WORK/data/packages/"
    "$PYTHON" -m cli.main data --root "$WORK/data" --processes "$(nproc)"
    ;;
  teacher)
    "$PYTHON" -m cli.main train-teacher --device "$DEVICE" --data "$WORK/data" --run "$WORK/teacher" --models "$WORK/models" \
      --minutes "$2" ${TEXT:+--text-encoder "$TEXT"} ${START:+--initial "$START"} "${@:3}"
    ;;
  student)
    "$PYTHON" -m cli.main distill --device "$DEVICE" --data "$WORK/data" --run "$WORK/student" --teacher "$WORK/models/embedded-teacher" \
      --out "$WORK/models/embedded" --config training/configs/embedded-gpu.yaml --minutes "$2" "${@:3}"
    ;;
  pack)
    out=${*: -1}
    mkdir -p "$out"
    for file in "${@:2:$#-2}"; do
      split -b 15M -d -a 2 "$file" "$out/$(basename "$(dirname "$file")")-$(basename "$file")."
    done
    ;;
  *)
    sed -n '2,12s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
