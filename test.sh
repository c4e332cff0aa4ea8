#!/usr/bin/env bash
# Writes the maps of a run's best.pth, or else of its last SAM2-UNeXT-<epoch>.pth; whatever follows goes to test.py.
#
#     bash test.sh NAME ROOT [options]        the test sets of a benchmark of the paper or of a YAML file
#     bash test.sh IMAGES... [options]        folders of images, or single images
#
# The run is $RUN (runs/NAME; runs/sam2unext for images); its maps go to $RUN/predictions, those of a benchmark to one
# folder per test set in it. GPUS=4 uses four GPUs; $PYTHON names the interpreter.
set -euo pipefail
source "$(dirname "$(readlink -f "$0" 2>/dev/null || echo "$0")")/tools/setup.sh"
read_words 1 "$@"
if [ -n "$benchmark" ]; then
    data=(--benchmark "$1" "$2")
    shift 2
else
    data=(--test_image_path)
    while [ $# -gt 0 ] && [[ $1 != -* ]]; do
        if [ ! -e "$1" ]; then
            echo "test.sh: there is no folder or file $1" >&2
            exit 2
        fi
        data+=("$1")
        shift
    done
fi
checkpoint=(--checkpoint "$run/best.pth")
if [[ " $* " == *" --checkpoint"[\ =]* ]]; then
    checkpoint=()  # written as the old bash of macOS wants it below
elif [ ! -e "$run/best.pth" ]; then
    epoch=$(ls "$run" 2>/dev/null | sed -n 's/^SAM2-UNeXT-\([0-9]*\)\.pth$/\1/p' | sort -n | tail -n 1 || true)
    if [ -z "$epoch" ]; then
        echo "test.sh: neither best.pth nor SAM2-UNeXT-*.pth in $run; train first, or name the run with RUN=..." >&2
        exit 2
    fi
    checkpoint[1]=$run/SAM2-UNeXT-$epoch.pth
fi
echo "test.sh: taking ${checkpoint[1]:-the checkpoint of --checkpoint}"

exec "${launch[@]}" "$here/test.py" \
    ${checkpoint[@]+"${checkpoint[@]}"} \
    "${data[@]}" \
    --save_path "$run/predictions" \
    "$@"
