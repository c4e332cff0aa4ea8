#!/usr/bin/env bash
# Writes the maps of the newest checkpoint of a run; whatever follows the folder goes to test.py.
#
#     bash test.sh IMAGES [options]
#
# The run is $RUN (runs/sam2unext); the maps go to $RUN/predictions. $PYTHON names the interpreter.
set -euo pipefail
here=$(dirname "$0")
if [ $# -lt 1 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
images=$1
shift

source "$here/tools/setup.sh"
find_python "$here"
run=${RUN:-runs/sam2unext}
checkpoint=$(ls -t "$run"/SAM2-UNeXT-*.pth 2>/dev/null | head -n 1 || true)
if [ -z "$checkpoint" ]; then
    echo "test.sh: no SAM2-UNeXT-*.pth in $run; train first, or name the run with RUN=..." >&2
    exit 2
fi

exec "$python" "$here/test.py" \
    --checkpoint "$checkpoint" \
    --test_image_path "$images" \
    --save_path "$run/predictions" \
    "$@"
