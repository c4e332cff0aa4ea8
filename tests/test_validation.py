"""The images that train.py validates on: folders, a held-out share, a benchmark's validation set."""

import os
import re

import pytest
import torch
from conftest import arguments_of, failure, read_log, train_arguments, validation

import eval as evaluation
import test as script
import train
from evaluation import benchmarks
from tools import check_dataset
from unext import pairing
from unext.pairing import File

YAML = """
train: {folder: train}
val: {held: {folder: test}}
test: {all: {folder: train}}
"""


@pytest.fixture
def benchmark(toy, tmp_path) -> str:
    (tmp_path / "toys.yaml").write_text(YAML)
    return f"--benchmark {tmp_path}/toys.yaml {toy}"


def names(pairs) -> set[str]:
    return {image.name for image, _ in pairs}


def test_a_held_out_share_depends_on_each_name_alone(toy):
    pairs = [(File(toy, f"photo_{i}", ".jpg"), File(toy, f"photo_{i}", ".png")) for i in range(2000)]
    training, held_out = pairing.hold_out(pairs, 0.1)
    assert 160 < len(held_out) < 240 and sorted(training + held_out) == sorted(pairs)
    pairs.append((File(toy, os.fsdecode(b"caf\xe9"), ".jpg"), pairs[0][1]))  # no UTF-8
    assert pairs[-1] in sum(pairing.hold_out(pairs, 0.1), [])
    assert [image.stem for image, _ in held_out[:3]] == ["photo_25", "photo_26", "photo_32"]  # in every version
    assert names(pairing.hold_out(pairs[::2], 0.1)[1]) == names(held_out) & names(pairs[::2])
    assert names(held_out) < names(pairing.hold_out(pairs, 0.2)[1])
    with pytest.raises(ValueError, match="--val_share 0.01: leaves 5 pairs to train on, 0 to validate on"):
        pairing.hold_out(pairs[:5], 0.01)


@pytest.mark.parametrize("share", ["--val_share 0.5", ""])
def test_a_run_validates_on_what_it_does_not_train_on_now_and_then(share, toy, benchmark, tmp_path, capsys):
    folders = pairing.pair([toy / "train/Image"], [toy / "train/Mask"])
    training, held_out = pairing.hold_out(folders, 0.5) if share else (folders, "4 of the test images")
    options = f"--epoch 3 --batch_size 3 --val_every 2 {share}"
    args = train_arguments(options, toy, tmp_path / "run")
    if not share:
        args.benchmark, args.train_image_path, args.train_mask_path = benchmark.split()[1:], [], []
    train.main(args)
    output = capsys.readouterr().out
    assert f"{len(training)} pairs; " in output
    assert ("held out by --val_share 0.5: 2 of 6 pairs" if share else "held: 4 pairs in ") in output
    scored = [line["epoch"] for line in read_log(tmp_path / "run") if "Smeasure" in line]
    assert scored == [2, 3] and (tmp_path / "run/best.pth").exists()
    recipe = torch.load(tmp_path / "run/last.pth")["recipe"]
    assert recipe["the data"].startswith(f"{len(training)} pairs") and recipe["--val_share"] == (0.5 if share else 0)


def test_given_folders_come_before_the_benchmarks_validation_set(toy, benchmark, tmp_path):
    args = train_arguments(validation(toy).replace("test/", "train/"), toy, tmp_path)
    args.benchmark, args.train_image_path, args.train_mask_path = benchmark.split()[1:], [], []
    assert len(train.find_pairs(args)[1]) == 6


def test_sets_name_a_validation_set(toy, benchmark, micro_checkpoint, tmp_path, capsys):
    predict = f"--checkpoint {micro_checkpoint} {benchmark} --sets held --save_path {tmp_path}/maps --precision fp32"
    script.main(arguments_of(script, *predict.split()))
    score = f"{benchmark} --sets HELD --pred_path {tmp_path}/maps --save_path {tmp_path}/results --workers 1"
    evaluation.main(arguments_of(evaluation, *score.split()))
    assert "held: 4 pairs" in capsys.readouterr().out
    found = benchmarks.find_test(benchmarks.load(f"{tmp_path}/toys.yaml"), toy)
    assert [*found] == ["all"]


def test_two_sources_of_validation_images_are_refused(toy, tmp_path, capsys):
    status, line = failure(train.main, train_arguments(f"--val_share 0.5 {validation(toy)}", toy, tmp_path), capsys)
    assert status == 2 and "--val_share holds out training images: leave it out, or --val_image_path" in line


def test_images_in_two_of_training_validation_and_test_are_found(toy, tmp_path, capsys):
    split = "{folder: train}"
    (tmp_path / "leaks.yaml").write_text(f"train: {split}\nval: {{held: {split}}}\ntest: {{all: {split}}}\n")
    check_dataset.main(arguments_of(check_dataset, tmp_path / "leaks.yaml", toy, "--workers", 1))
    printed = capsys.readouterr().out
    for kind, split in (("validation image in training", "held validation"), ("test image in validation", "all")):
        assert re.search(rf"warning: {kind}: .*\n  {split}: 6 files: ", printed), printed
    assert re.search("warning: test image in training: .*\n  all: 6 files: ", printed)
