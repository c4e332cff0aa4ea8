#!/usr/bin/env bash
# Scores the maps of a run against their ground truth; further options go to eval.py.
#
#     bash eval.sh NAME ROOT [options]        a benchmark's test sets, beside the published figures
#     bash eval.sh MASKS [options]            a folder of masks
#
# The run is $RUN (runs/NAME; runs/sam2unext for a folder); its maps are in $RUN/predictions, the results go to
# $RUN/results; open report.html there. $PYTHON names the interpreter.
set -euo pipefail
source "$(dirname "$(readlink -f "$0" 2>/dev/null || echo "$0")")/tools/setup.sh"
read_words 1 "$@"
data=(--dataset_name "$(basename "$run")" --gt_path "$1")
if [ -n "$benchmark" ]; then
    data=(--benchmark "$1" "$2")
    shift
fi
shift

exec "$python" "$here/eval.py" \
    "${data[@]}" \
    --pred_path "$run/predictions" \
    --save_path "$run/results" \
    "$@"
