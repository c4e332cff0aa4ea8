"""The shell scripts, run as a user runs them."""

import argparse
import json
import os
import subprocess
import sys

import pytest
from conftest import NETWORK, ROOT

import cli


def bash(command, cwd, **environment):
    environment = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_train_test_eval_in_three_commands(toy, tmp_path):
    (tmp_path / "a folder").mkdir()
    for command in (
        f"bash {ROOT}/train.sh {toy}/train/Image/ {toy}/train/Mask/ {NETWORK} --epoch 1 --batch_size 3 --workers 1",
        f"bash {ROOT}/test.sh {toy}/test/Image/ --test_gt_path {toy}/test/Mask/ --batch_size 2",
        f"bash {ROOT}/eval.sh {toy}/test/Mask/ --json scores.json",
    ):
        result = bash(command, tmp_path, RUN="a folder/run")
        assert result.returncode == 0, result.stderr
    run = tmp_path / "a folder" / "run"
    assert (run / "SAM2-UNeXT-1.pth").is_file()
    assert sorted(path.name for path in (run / "predictions").iterdir()) == [f"toy_{i:04}.png" for i in range(4)]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["run"]["images"] == 4
    assert "Smeasure" in result.stdout and f"{scores['run']['Smeasure']:.3f}" in result.stdout


@pytest.mark.parametrize("script, usage", [("train.sh", "IMAGES MASKS"), ("test.sh", "IMAGES"), ("eval.sh", "MASKS")])
def test_without_arguments_a_recipe_says_how_it_is_used(script, usage, tmp_path):
    result = bash(f"bash {ROOT}/{script}", tmp_path)
    assert result.returncode == 2 and f"bash {script} {usage} [options]" in result.stderr


def test_without_a_checkpoint_test_sh_says_what_to_do(tmp_path):
    result = bash(f"bash {ROOT}/test.sh .", tmp_path)
    assert result.returncode == 2 and "train first" in result.stderr and not result.stdout


def test_ending_with_an_error_shows_no_traceback(tmp_path):
    result = bash(f"bash {ROOT}/eval.sh {tmp_path}", tmp_path)
    assert result.returncode == 2
    assert result.stderr == "eval.py: runs/sam2unext/predictions: there is no such folder\n"


def fake_python(path, body):
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "body, message",
    [
        (f'[[ $2 == *ensurepip* ]] && exit 1; exec {sys.executable} "$@"', "apt install python3-venv"),
        ('[[ $1 == --version ]] && echo Python 3.8.1; [[ $2 == *version_info* ]] && exit 1', "Python 3.8.1 is too old"),
    ],
)  # fmt: skip
def test_set_up_names_what_python_lacks(body, message, tmp_path):
    python = fake_python(tmp_path / "python", body)
    result = bash(f"source {ROOT}/tools/setup.sh; setup requirements.txt", tmp_path, PYTHON=python)
    assert result.returncode == 2 and message in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_recipe_names_a_missing_python(tmp_path):
    result = bash(f"bash {ROOT}/eval.sh masks", tmp_path, PYTHON="python4")
    assert result.returncode == 2 and result.stderr == "PYTHON=python4: there is no such program\n"


def test_set_up_names_a_missing_python(tmp_path):
    result = bash(f"source {ROOT}/tools/setup.sh; setup requirements.txt", tmp_path, PYTHON="python4")
    assert result.returncode == 2 and "python4 is missing" in result.stderr


def test_set_up_installs_each_requirements_file_once_and_again_when_it_changes(tmp_path):
    body = '[[ "$1 $2" == "-m venv" ]] && { mkdir -p ${@: -1}/bin; cp $0 ${@: -1}/bin/python; }; '
    body += '[[ "$1 $2 $3" == "-m pip install" ]] && echo pip "$@"; exit 0'
    python = fake_python(tmp_path / "python", body)
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "two.txt").write_text("b")
    command = f"source {ROOT}/tools/setup.sh; setup one.txt; setup one.txt two.txt; echo more >> one.txt; setup one.txt"
    result = bash(command, tmp_path, PYTHON=python)
    installs = [line.split("-check ")[1] for line in result.stdout.splitlines() if line.startswith("pip")]
    assert installs == ["-r one.txt", "-r two.txt", "-r one.txt"], result.stderr


def test_numbers_are_checked():
    assert cli.number(multiple=32, least=32)("96") == 96
    for text in ("100", "0", "x", "3.5"):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            cli.number(multiple=32, least=32)(text)
    assert cli.number(float, least=0)("1e-3") == 1e-3


def test_the_tree_is_clean():
    for command in ("check", "format --check"):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command.split(), "."], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout
