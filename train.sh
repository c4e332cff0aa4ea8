#!/usr/bin/env bash
# Trains with the recipe of the paper; whatever follows the first two words goes to train.py.
#
#     bash train.sh NAME ROOT [options]       a benchmark: DIS5K, COD, MAS3K, RMAS, EORSSD, ORSI-4199 or a YAML file
#     bash train.sh IMAGES MASKS [options]    a folder of images and one of masks
#
# Checkpoints go to $RUN (runs/NAME; runs/sam2unext for folders). The encoders' weights are those in weights/, which are
# downloaded if they are missing. GPUS=4 uses four GPUs; $PYTHON names the interpreter (.venv/bin/python, else python3).
set -euo pipefail
source "$(dirname "$0")/tools/setup.sh"
read_words 2 "$@"
if [ -z "$benchmark" ]; then
    data=(--train_image_path "$1" --train_mask_path "$2")
fi
shift 2
sam2=large aux=vit_large_patch14_dinov2
for ((i = 1; i <= $#; i++)); do
    next=$((i + 1))
    case "${!i}" in
        --sam2) sam2=${!next:-} ;;
        --sam2=*) sam2=${!i#*=} ;;
        --aux) aux=${!next:-} ;;
        --aux=*) aux=${!i#*=} ;;
    esac
done

exec "${launch[@]}" "$here/train.py" \
    --hiera_path "$here/weights/sam2_hiera_$sam2.pt" \
    --dinov2_path "$here/weights/$aux.safetensors" \
    "${data[@]}" \
    --save_path "$run" \
    --epoch 20 \
    --lr 2e-4 \
    --batch_size 1 \
    "$@"
