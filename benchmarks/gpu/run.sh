#!/usr/bin/env bash
# Everything that needs a GPU, in one command and about ten minutes, for a machine that is lent for
# that long and may have no network: it needs Python, torch and triton, and installs nothing.
#
#   bash benchmarks/gpu/run.sh OUT [STEP ...]     steps: kernels hooks adapter tgap llama (default: all)
#   bash benchmarks/gpu/run.sh --dry-run OUT      on a CPU: tiny sizes, kernels in the interpreter
#
# `llama` runs where a model and questions came along: MODEL=folder DATA=folder bash ...
#
# Each step has its own time limit and writes its rows to OUT/*.jsonl as it goes, so a step that
# fails or is cut off costs only itself. Ends with a line per step; fails if any step did.
set -uo pipefail
cd "$(dirname "$0")/../.."
device=cuda
times=1
if [ "${1:-}" = --dry-run ]; then
    device=cpu
    times=4
    export TRITON_INTERPRET=1 OMP_NUM_THREADS=1
    shift
fi
out=${1:?"usage: bash benchmarks/gpu/run.sh [--dry-run] OUT [STEP ...]"}
shift
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(kernels hooks adapter tgap llama)
mkdir -p "$out"
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
summary=()
failed=0

step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$(($2 * times)) begin=$SECONDS code
    shift 2
    [[ " ${steps[*]} " = *" $name "* ]] || return 0
    echo "--- $name: at most $limit s"
    timeout -k 5 "$limit" "$@" 2>&1 | tee "$out/$name.log" | tail -n 40
    code=${PIPESTATUS[0]}
    [ "$code" = 0 ] || failed=1
    summary+=("$name: exit $code, $((SECONDS - begin)) s")
}

if [ "$device" = cuda ]; then
    step kernels 200 "$python" -m benchmarks.run kernels --out "$out" --workers 12
else
    step kernels 200 "$python" -m pytest -q tests/kernels/on_device/test_benchmark_cases.py
fi
step hooks 130 "$python" -m benchmarks.gpu.hooks --out "$out" --device "$device"
step adapter 40 "$python" -m benchmarks.gpu.adapter --out "$out" --device "$device"
step tgap 80 "$python" -m benchmarks.gpu.tgap --out "$out" --device "$device"
if [ -n "${MODEL:-}" ] && [ -n "${DATA:-}" ]; then
    # What the others leave of ten minutes; rows come as rounds end.
    left=$((600 - SECONDS))
    step llama $((left > 30 ? left : 30)) "$python" -m benchmarks.gpu.llama --out "$out" --model "$MODEL" --data "$DATA"
fi

printf '%s\n' "---" "${summary[@]}"
exit "$failed"
