#!/usr/bin/env bash
# Everything that is measured on a GPU, in one go, within ten minutes on one card.
#     [TRL_PYTHON=…/bin/python] benchmarks/gpu/run.sh CONFIGS OUT [--tiny]
# CONFIGS holds one folder per model with its config.json; OUT gets gpu-<date>.json. Weights are random, made on the card.
# TRL_PYTHON is the interpreter of an environment with TRL (benchmarks/peers/trl_sft.txt), with liger-kernel if that is
# to run beside it.
set -uo pipefail
configs=$1 out=$2
shift 2
python=${PYTHON:-.venv/bin/python}
result=$out/gpu-$(date +%F).json
mkdir -p "$out"
rm -f "$result"
for model in gemma-2b phi-3-mini deepseek-7b atom-7b-standin phi-4; do
    timeout 150 "$python" benchmarks/gpu/step.py --model "$model" --config "$configs/$model/config.json" \
        --out "$result" "$@" || echo "$model failed"
    if [ -n "${TRL_PYTHON:-}" ]; then
        for liger in "" $("$TRL_PYTHON" -c 'import liger_kernel; print("--liger")' 2>/dev/null); do
            timeout 150 "$TRL_PYTHON" benchmarks/gpu/trl_step.py --model "$model" \
                --config "$configs/$model/config.json" --out "$result" $liger "$@" || echo "$model failed with TRL $liger"
        done
    fi
done
if "$python" -c "import bitsandbytes" 2>/dev/null; then
    timeout 150 "$python" benchmarks/gpu/step.py --model phi-4 --config "$configs/phi-4/config.json" --out "$result" --nf4 "$@"
fi
echo "$result"
