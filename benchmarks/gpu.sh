#!/usr/bin/env bash
# Tests and measurements on one NVIDIA GPU, without network, within GPU_SECONDS (540). See docs/gpu.md.
#
#   bash benchmarks/gpu.sh                        # every part that is not finished yet
#   bash benchmarks/gpu.sh tests spectra          # some parts
#   bash benchmarks/gpu.sh receive                # store the model piece of this call, nothing else
#   GPU_REHEARSAL=1 bash benchmarks/gpu.sh        # tiny sizes on the CPU
#
# OUT (runs/gpu): results, one JSON file per part, written as the part goes on.
# GPU_STATE (/tmp/effopd-gpu): finished parts, model pieces and packages, for the next call.
# PYTHON (python3): an interpreter with PyTorch. `benchmarks/gpu_pack.py` prepares the packages and
# the model for a machine that lacks them.
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-runs/gpu}" GPU_STATE="${GPU_STATE:-${TMPDIR:-/tmp}/effopd-gpu}" PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT" "$GPU_STATE"
if [ -f .gpu/site.tar.gz ] && [ ! -d "$GPU_STATE/site" ]; then
  rm -rf "$GPU_STATE/site.part"
  mkdir "$GPU_STATE/site.part"
  tar -xzf .gpu/site.tar.gz -C "$GPU_STATE/site.part"
  mv "$GPU_STATE/site.part" "$GPU_STATE/site"
fi
export PYTHONPATH="$GPU_STATE/site:$PWD/src:$PWD/benchmarks:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
exec "$PYTHON" -m gpu_parts "$@"
