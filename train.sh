#!/usr/bin/env bash
# Trains with the recipe of the paper; whatever follows the two folders goes to train.py.
#
#     bash train.sh IMAGES MASKS [options]
#
# Checkpoints go to $RUN (runs/sam2unext). $PYTHON names the interpreter (.venv/bin/python, else python3). The
# encoders' weights are taken from weights/ or, where they are not there, downloaded once and cached.
set -euo pipefail
here=$(dirname "$0")
if [ $# -lt 2 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
images=$1 masks=$2
shift 2

source "$here/tools/setup.sh"
find_python "$here"
hiera=$here/weights/sam2_hiera_large.pt
[ -e "$hiera" ] || hiera=https://dl.fbaipublicfiles.com/segment_anything_2/072824/sam2_hiera_large.pt
dinov2=$here/weights/vit_large_patch14_dinov2.safetensors
[ -e "$dinov2" ] || dinov2=https://huggingface.co/timm/vit_large_patch14_dinov2.lvd142m/resolve/main/model.safetensors

exec "$python" "$here/train.py" \
    --hiera_path "$hiera" \
    --dinov2_path "$dinov2" \
    --train_image_path "$images" \
    --train_mask_path "$masks" \
    --save_path "${RUN:-runs/sam2unext}" \
    --epoch 20 \
    --lr 2e-4 \
    --batch_size 1 \
    "$@"
