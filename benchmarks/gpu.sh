#!/usr/bin/env bash
# One call that measures an accelerator: dense eager, dense compiled with CUDA graphs, and ours, at
# batch 1 and 8, beside what the device copies and multiplies at best. Random weights in the
# published shape, so nothing is downloaded. A few minutes.
#
#   benchmarks/gpu.sh                         LLaVA-1.5-7B's shape on the GPU
#   benchmarks/gpu.sh --shape tiny --device cpu --new-tokens 8 --rounds 2    a trial without one
#
# A machine without a network needs torch and triton and, in WHEELS, the other packages' wheels:
#   pip download --no-deps -d DIR transformers accelerate safetensors huggingface_hub tokenizers ...
#   WHEELS=DIR benchmarks/gpu.sh
#
# Environment: PYTHON (python3), WHEELS (a folder of wheels), OUT (runs/gpu), BATCHES ("1 8").
# Options are handed on to `corematching bench` and win over those below.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
BATCHES=${BATCHES:-1 8}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

if [[ -n ${WHEELS:-} ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
  export PYTHONPATH="$PYTHONPATH:$site"
fi

"$PYTHON" - <<'CHECK'
import importlib.util, sys
needed = "torch transformers accelerate safetensors huggingface_hub typer rich matplotlib psutil"
missing = [name for name in needed.split() if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"not installed: {', '.join(missing)}; put their wheels in a folder, set WHEELS to it")
import torch
print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
CHECK

for batch in $BATCHES; do
  echo
  "$PYTHON" -m corematching.cli bench --shape llava-1.5-7b --dtype bfloat16 --prompt-tokens 64 \
    --new-tokens 128 --keep-ratio 0.2 --neuron-ratio 0.4 --rounds 5 --peers transformers_eager \
    --peers transformers_compiled --batch "$batch" --out "$OUT/batch-$batch" "$@"
done
