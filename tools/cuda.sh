#!/usr/bin/env bash
# On a machine with a GPU: tests, then benchmarks.
#
#     bash tools/cuda.sh FOLDER                    everything
#     bash tools/cuda.sh FOLDER tests infer        some of: tests infer train predict
#     bash tools/cuda.sh FOLDER predict-8-compile  one step of one of them
#
# The figures of each step go to FOLDER/STEP.json, what all of them print to FOLDER/log.txt, a table of all figures in
# FOLDER to FOLDER/summary.md. A step that fails does not stop the others; the exit status is 1 then. $PYTHON names the
# interpreter (.venv/bin/python, else python3).
set -uo pipefail
if [ $# -lt 1 ] || [[ $1 == -* ]]; then
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
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
    [infer-1]="infer --batch_size 1 --compile --repeats 20"
    [infer-8]="infer --batch_size 8 --compile --repeats 20"
    [train-1]="train --batch_size 1 --compile"
    [train-4]="train --batch_size 4 --compile"
    [predict-1]="predict --batch_size 1"
    [predict-1-compile]="predict --batch_size 1 --compile"
    [predict-8]="predict --batch_size 8"
    [predict-8-compile]="predict --batch_size 8 --compile"
)
steps=(tests infer-1 infer-8 train-1 train-4 predict-1 predict-1-compile predict-8 predict-8-compile)
for word in "$@"; do
    if [[ " ${steps[*]} " != *" $word"[\ -]* ]]; then
        echo "cuda.sh: there is no step $word; there are ${steps[*]}" >&2
        exit 2
    fi
done

say() {
    echo "$*" | tee -a "$out/log.txt"
}

failed=()
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
    say "== $step: python ${arguments[*]}"
    SECONDS=0
    "$python" "${arguments[@]}" 2>&1 | tee -a "$out/log.txt" || failed+=("$step")
    say "== $step: $SECONDS s"
done

"$python" - "$out" <<'END' | tee "$out/summary.md"
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
if [ ${#failed[@]} -gt 0 ]; then
    say "cuda.sh: failed: ${failed[*]}" >&2
    exit 1
fi
