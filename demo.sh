#!/usr/bin/env bash
# Tries everything on a data set that it makes: environment, training, prediction maps, scores.
#
#     bash demo.sh
#
# A small network (Hiera-T, DINOv2-S, random weights, 128 px) learns to find camouflaged blobs, in some minutes on two
# CPU cores, or on a GPU if there is one. SEED=1 makes other images and other random weights. All files go to demo/; the
# run of an earlier demo, demo/run, is removed.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0" 2>/dev/null || echo "$0")")"
source tools/setup.sh
setup requirements.txt
seed=${SEED:-0} data=demo/data
export RUN=demo/run

echo "== 1/4 a toy data set"
"$PYTHON" tools/toy_dataset.py "$data" --seed "$seed"
echo "== 2/4 bash train.sh"
rm -rf demo/run
bash train.sh "$data/train/Image" "$data/train/Mask" \
    --hiera_path random --sam2 tiny --dinov2_path random --aux vit_small_patch14_dinov2 \
    --size 128 --aux_size 112 --epoch 6 --batch_size 8 --lr 1e-3 --workers 1 --seed "$seed"
echo "== 3/4 bash test.sh"
bash test.sh "$data/test/Image" --test_gt_path "$data/test/Mask"
echo "== 4/4 bash eval.sh"
bash eval.sh "$data/test/Mask" --dataset_name toy --image_path "$data/test/Image"
echo "For comparison, the best blob in the middle of each image:"
"$PYTHON" eval.py --dataset_name centred_blob --pred_path "$data/test/Blob" --gt_path "$data/test/Mask" \
    --save_path "$RUN/results_blob"
echo
echo "The maps are in $RUN/predictions, the scores in $RUN/results; open $RUN/results/report.html"
