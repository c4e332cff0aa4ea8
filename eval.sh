#!/usr/bin/env bash
# Scores the maps of a run against their ground truth; whatever follows the folder goes to eval.py.
#
#     bash eval.sh MASKS [options]
#
# The run is $RUN (runs/sam2unext); its maps are in $RUN/predictions. $PYTHON names the interpreter.
set -euo pipefail
here=$(dirname "$0")
if [ $# -lt 1 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
masks=$1
shift

source "$here/tools/setup.sh"
find_python "$here"
run=${RUN:-runs/sam2unext}

exec "$python" "$here/eval.py" \
    --dataset_name "$(basename "$run")" \
    --pred_path "$run/predictions" \
    --gt_path "$masks" \
    "$@"
