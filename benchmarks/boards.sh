#!/usr/bin/env bash
# The boards of docs/results in one call, on a GPU that several processes share: the main board,
# the rivals at four ratios of the image tokens, the neurons at four ratios. The main board and the
# rivals run at once, the neurons when the main board is done.
#
#   benchmarks/boards.sh
#   QUESTIONS=24 MAIN=24 JOBS=1 DTYPE=float32 benchmarks/boards.sh    a trial on a CPU
#
# Running it again goes on where it stopped. After BUDGET seconds what still runs is stopped, and
# `corematching eval` has kept every answer.
#
# Environment: PYTHON (python3), OUT (runs), MAIN (questions of the main board, all), QUESTIONS (of
# the others, 500), JOBS (processes of each board, 8), BATCH (32), DTYPE (bfloat16), ENGINE (torch:
# nothing is compiled first), BUDGET (600), WHEELS (a folder of wheels, on a machine without a
# network).
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs}
QUESTIONS=${QUESTIONS:-500}
JOBS=${JOBS:-8}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$OUT"

if [[ -n ${WHEELS:-} ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
  export PYTHONPATH="$PYTHONPATH:$site"
fi

OURS=corematching:neurons=none
RIVALS=(
  "$OURS" "$OURS,layer=[0.28125,0.53125,0.78125]" random:neuron_ratio=1.0 stride fastv pyramiddrop sparsevlm
  visionzip prumerge divprune cdpruner projection "$OURS,layer=0.3" stride:layer=0.4
  stride:layer=0.4,proportional=true oracle:neuron_ratio=1.0,layer=0.4,proportional=true
)
NEURONS=(
  corematching:score=none,neurons=top "corematching:score=none,neurons=gate(0.7,among=top)"
  coreinfer griffin random:keep_ratio=1.0 teal cats
)

measure() { # NAME OPTION...: a board in $OUT/NAME, its output in $OUT/NAME.log
  local name=$1
  shift
  timeout --signal TERM "${BUDGET:-600}" "$PYTHON" -m corematching.cli eval \
    --dtype "${DTYPE:-bfloat16}" --batch "${BATCH:-32}" --engine "${ENGINE:-torch}" --jobs "$JOBS" \
    --share --out "$OUT/$name" "$@" >"$OUT/$name.log" 2>&1 || echo "$name stopped: see $OUT/$name.log" >&2
  echo "$name: ${SECONDS} s"
}

# NAME VALUE...: an option for each value, a word a line
options() {
  local option=$1
  shift
  printf -- "--$option\n%s\n" "$@"
}
mapfile -t rivals < <(options method "${RIVALS[@]}")
mapfile -t neurons < <(options method "${NEURONS[@]}")

measure rivals --limit "$QUESTIONS" --budget 0.05 --budget 0.1 --budget 0.2 --budget 0.3 \
  "${rivals[@]}" &
measure main ${MAIN:+--limit "$MAIN"} --method corematching \
  --method "corematching:keep_ratio=0.2,neurons=gate(0.5)" --method "$OURS,keep_ratio=0.2" \
  --method "$OURS,keep_ratio=0.2,proportional=false" --method paper \
  --method oracle:neuron_ratio=1.0,keep_ratio=0.2,layer=0.4,proportional=true
measure neurons --limit "$QUESTIONS" --budget 0.2 --budget 0.4 --budget 0.6 --budget 0.8 \
  "${neurons[@]}"
wait
