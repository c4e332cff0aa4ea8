"""All commands on other systems, which elsewhere/sitecustomize.py pretends: modules, functions and signals are missing,
open or mapped files cannot be replaced, and worker processes are spawned."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_log, read_maps

from tools import export

NEEDED = [name for name in export.PACKAGES if not importlib.util.find_spec(name)]
COMMANDS = """
import gc, importlib, json, sys
sys.path[:0] = sys.argv[1:3]
import micro
for name, words in json.loads(sys.argv[3]):
    module, status = importlib.import_module(name), 0
    try:
        module.main(module.get_args_parser().parse_args(words.split()))
    except SystemExit as stop:
        status = stop.code
    print(f"{name}: {status}")
    gc.collect()
"""


def run(system, folder, *commands):
    """Runs commands, pairs of a module and its words, in one process to save time; what they print."""
    environment = os.environ | {"ELSEWHERE": system, "PYTHONPATH": f"{ROOT}/tests/elsewhere"}
    environment |= {"ELSEWHERE_ROOT": str(ROOT), "ELSEWHERE_DATA": str(folder)}
    words = [sys.executable, "-c", COMMANDS, str(ROOT), f"{ROOT}/tests", json.dumps(commands)]
    result = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    statuses = [line for line in result.stdout.splitlines() if line.partition(": ")[0] in dict(commands)]
    assert statuses == [f"{name}: 0" for name, _ in commands], result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("system", ["windows", "macos"])
def test_every_command_ends_with_status_0(system, toy, from_files, tmp_path):
    train = f"{from_files} --epoch 1 --batch_size 3 --precision fp32 --save_path run --workers 1 --save_every 1 "
    train += " ".join(
        f"--{name}_{kind.lower()}_path {toy}/{half}/{kind}"
        for name, half in (("train", "train"), ("val", "test")) for kind in ("Image", "Mask")
    )  # fmt: skip
    predict = f"--checkpoint run/SAM2-UNeXT-1.pth --test_image_path {toy}/test/Image --save_path maps --precision fp32"
    printed = run(
        system, tmp_path,
        ("train", train),
        ("train", f"{train} --resume"),
        ("train", train),
        ("test", f"{predict} --save map,mask,overlay,cutout --workers 2"),
        ("test", f"{predict} --overwrite"),
        ("eval", f"--dataset_name toy --pred_path maps --gt_path {toy}/test/Mask --save_path results --workers 1"),
        ("tools.check_dataset", f"{toy}/test/Image {toy}/test/Mask --json found.json --workers 1"),
        ("tools.convert_checkpoint", "run/SAM2-UNeXT-1.pth whole.pth --to whole"),
        ("tools.convert_checkpoint", "whole.pth hub --to hub"),
        *([] if NEEDED or torch.__version__ < export.MIN_TORCH else [("tools.export", "whole.pth graph.onnx")] * 2),
    )  # fmt: skip
    assert "the run is finished" in printed and "replacing the finished run there" in printed
    assert len(read_maps(tmp_path / "maps")) == 4 and (tmp_path / "results/report.html").exists()
    assert [line.get("step") for line in read_log(tmp_path / "run")] == [2, None]


@pytest.mark.slow
@pytest.mark.parametrize("system", ["windows", "macos"])
def test_an_interrupted_run_is_resumed(system, toy, from_files, tmp_path):
    folders = f"--train_image_path {toy}/train/Image --train_mask_path {toy}/train/Mask --save_path run"
    words = f"{from_files} --epoch 2 --batch_size 3 --precision fp32 --workers 0 --save_every 1 --resume {folders}"
    run(system, tmp_path, ("train", words.replace("--epoch 2", "--epoch 1")))
    for name in ("last.pth", "last.previous.pth"):  # as if it had been killed in the first of two epochs
        content = torch.load(tmp_path / "run" / name)
        content["recipe"]["--epoch"] = 2
        torch.save(content, tmp_path / "run" / name)
    (tmp_path / "run/last.pth").write_bytes(b"damaged")
    printed = run(system, tmp_path, ("train", words))
    assert "last.pth is damaged: continuing from" in printed and "continuing after epoch 1, step 2" in printed
    assert (tmp_path / "run/SAM2-UNeXT-2.pth").exists()
