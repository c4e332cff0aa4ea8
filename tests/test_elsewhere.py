"""All commands on other systems, which elsewhere/sitecustomize.py pretends: modules, functions and signals are missing,
open or mapped files cannot be replaced, and worker processes are spawned."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, read_log, read_maps, train_options, validation

COMMANDS = """
import gc, importlib, json, sys
sys.path[:0] = sys.argv[1:3]
import micro, torch
for name, options in json.loads(sys.argv[3]):
    if name == "rewind":
        content = torch.load(options)
        content["progress"] |= {"epoch": 1, "step": 0}
        torch.save(content, options)
        continue
    module = importlib.import_module(name)
    module.main(module.get_args_parser().parse_args(options.split()))
    print(f"{name} is done")
    gc.collect()
"""


@pytest.mark.slow
@pytest.mark.parametrize("system", ["windows", "macos"])
def test_every_command_ends_with_status_0(system, toy, from_files, tmp_path):
    """All in one process, to save time."""
    recipe = f"--epoch 1 --batch_size 3 --save_every 1 {validation(toy)}"
    train = " ".join(train_options(recipe, toy, "run", from_files))
    predict = f"--checkpoint run/SAM2-UNeXT-1.pth --test_image_path {toy}/test/Image --save_path maps --precision fp32"
    commands = [
        ("train", f"{train} --workers {int(system == 'windows')}"),
        ("rewind", "run/last.pth"),  # as if the run was interrupted
        ("train", f"{train} --resume"),
        ("test", f"{predict} --save map,overlay,cutout --workers 1"),
        ("test", f"{predict} --overwrite --workers 1"),
        ("eval", f"--dataset_name toy --pred_path maps --gt_path {toy}/test/Mask --save_path results --workers 1"),
        ("tools.check_dataset", f"{toy}/test/Image {toy}/test/Mask --json found.json --workers 1"),
        ("tools.convert_checkpoint", "run/SAM2-UNeXT-1.pth whole.pth --to whole"),
        ("tools.convert_checkpoint", "whole.pth hub --to hub"),
    ]
    environment = os.environ | {"ELSEWHERE": system, "PYTHONPATH": f"{ROOT}/tests/elsewhere"}
    environment |= {"ELSEWHERE_ROOT": str(ROOT), "ELSEWHERE_DATA": str(tmp_path)}
    command = [sys.executable, "-c", COMMANDS, str(ROOT), f"{ROOT}/tests", json.dumps(commands)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count(" is done\n") == len(commands) - 1
    assert "last.pth: continuing after epoch 1, step 0" in result.stdout
    assert len(read_maps(tmp_path / "maps")) == 4 and (tmp_path / "results/report.html").exists()
    assert [line.get("step") for line in read_log(tmp_path / "run")] == [2, None]
