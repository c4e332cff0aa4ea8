#!/usr/bin/env bash
# On a machine with a GPU: tests, then benchmarks, the most important first, in ten minutes at most.
#
#     bash tools/cuda.sh FOLDER                    everything
#     bash tools/cuda.sh FOLDER tests infer        some of: tests train infer load predict
#     bash tools/cuda.sh FOLDER predict-8          one step of one of them
#     MINUTES=60 bash tools/cuda.sh FOLDER         with more time
#
# The figures of each step go to FOLDER/STEP.json as soon as they are measured, what all of them print to
# FOLDER/log.txt, a table of all figures in FOLDER to FOLDER/summary.md, each time that a step ends. A step that fails,
# or for which no time is left, does not stop the others; the exit status is 1 then. $PYTHON names the interpreter
# (.venv/bin/python, else python3).
set -uo pipefail
if [ $# -lt 1 ] || [[ $1 == -* ]]; then
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
caller=$PWD folder=$1
shift
cd "$(dirname "$0")/.." || exit 2
source tools/setup.sh
find_python "$PWD" || exit 2
if ! "$python" -c 'import torch; print("torch", torch.__version__, "on", torch.cuda.get_device_name())' 2>/dev/null; then
    echo "cuda.sh: torch sees no GPU here" >&2
    exit 2
fi

declare -A command=(
    [tests]="-m pytest -m cuda -v --durations=10"
    [train-1]="train --batch_size 1 --compile --profile"
    [train-4]="train --batch_size 4 --compile"
    [infer-1]="infer --batch_size 1 --compile --repeats 20"
    [infer-8]="infer --batch_size 8 --compile --repeats 20 --profile"
    [load]="load --images 400"
    [predict-1]="predict --batch_size 1 --compile"
    [predict-8]="predict --batch_size 8 --compile"
)
steps=(tests train-1 infer-8 load predict-8 train-4 infer-1 predict-1)
for word in "$@"; do
    if [[ " ${steps[*]} " != *" $word"[\ -]* ]]; then
        echo "cuda.sh: there is no step $word; there are ${steps[*]}" >&2
        exit 2
    fi
done

out=$(cd "$caller" && mkdir -p "$folder" && cd "$folder" && pwd) || exit 2
exec > >(tee -a "$out/log.txt") 2>&1
trap 'kill "$!" 2>/dev/null; exit 130' INT

summarise() {
    "$python" - "$out" <<'END' >"$out/summary.md"
import json
import sys
from pathlib import Path

for file in sorted(Path(sys.argv[1]).glob("*.json")):
    figures = json.loads(file.read_text())
    names = list(dict.fromkeys(name for row in figures.values() for name in row))
    print(f"\n| {file.stem} | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for variant, row in figures.items():
        print(f"| {variant} | {' | '.join(f'{row[name]:.4g}' if name in row else '' for name in names)} |")
END
}

failed=()
seconds=$((${MINUTES:-10} * 60))
for step in "${steps[@]}"; do
    wanted=$#
    for word in "$@"; do
        [[ $step == "$word" || $step == "$word"-* ]] && wanted=0
    done
    [ "$wanted" = 0 ] || continue
    read -ra arguments <<<"${command[$step]}"
    if [ "$step" != tests ]; then
        rm -f "$out/$step.json"
        arguments=(tools/benchmark.py "${arguments[@]}" --device cuda --json "$out/$step.json")
    fi
    echo "== $step: python ${arguments[*]}"
    start=$SECONDS left=$((seconds - SECONDS))
    if [ "$left" -gt 0 ]; then
        timeout -k 15 "$left" "$python" "${arguments[@]}" &
        wait "$!"
    else
        false
    fi || failed+=("$step")
    echo "== $step: $((SECONDS - start)) s"
    summarise
done
cat "$out/summary.md"
if [ ${#failed[@]} -gt 0 ]; then
    echo "cuda.sh: failed, or no time was left for: ${failed[*]}"
    exit 1
fi
