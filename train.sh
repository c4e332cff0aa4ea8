#!/usr/bin/env bash
# Trains with the recipe of the paper; further arguments go to train.py.
#
#     bash train.sh NAME ROOT [options]       a benchmark of the paper, such as COD, or a YAML file
#     bash train.sh IMAGES MASKS [options]    a folder of images and one of masks
#
# Checkpoints go to $RUN (runs/NAME; runs/sam2unext for folders). The encoders' weights in weights/ are used, and
# downloaded if they are missing. GPUS=4 uses four GPUs; $PYTHON names the interpreter (.venv/bin/python, else python3).
set -euo pipefail
source "$(dirname "$(readlink -f "$0" 2>/dev/null || echo "$0")")/tools/setup.sh"
read_words 2 "$@"
if [ -n "$benchmark" ]; then
    data=(--benchmark "$1" "$2")
else
    data=(--train_image_path "$1" --train_mask_path "$2")
fi
shift 2
sam2=large aux=vit_large_patch14_dinov2 option=""
for word in "$@"; do
    case "$option $word" in
        "--sam2 "*) sam2=$word ;;
        "--aux "*) aux=$word ;;
        *" --sam2="*) sam2=${word#*=} ;;
        *" --aux="*) aux=${word#*=} ;;
    esac
    option=$word
done

# Processes that torchrun restarts must not read the addresses of the former ones:
# https://github.com/pytorch/pytorch/issues/135712
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${launch[@]}" "$here/train.py" \
    --hiera_path "$here/weights/sam2_hiera_$sam2.pt" \
    --dinov2_path "$here/weights/$aux.safetensors" \
    "${data[@]}" \
    --save_path "$run" \
    --epoch 20 \
    --lr 2e-4 \
    --batch_size 1 \
    "$@"
