"""The shell scripts, run as a user runs them."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import NETWORK, PRETENDED_CPU, ROOT, SUIM8, program

pytestmark = pytest.mark.posix


def bash(command, cwd, **environment):
    """Runs a recipe with the trunk "micro", see program.py."""
    python = fake_python(cwd / "program", f'exec {" ".join(program("")[:-1])} "$@"')
    environment = os.environ | {"PYTHON": python} | environment
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.fixture
def archive(toy, tmp_path):
    """A data set in MAS3K's layout: the real images, both for training and test, or else the toy data set."""
    if not SUIM8.is_dir():
        return toy
    for half in ("train", "test"):
        shutil.copytree(SUIM8 / "images", tmp_path / "archive" / half / "Image")
        shutil.copytree(SUIM8 / "masks", tmp_path / "archive" / half / "Mask")
    return tmp_path / "archive"


@pytest.mark.slow
def test_a_benchmark_in_three_commands_without_native_bf16(archive, tmp_path, monkeypatch):
    root = archive
    monkeypatch.setenv(PRETENDED_CPU, "fpu avx2")
    expected = sorted(path.stem for path in (root / "test" / "Mask").iterdir())
    for command in (
        f"bash {ROOT}/train.sh mas3k {root} {NETWORK} --epoch 1 --batch_size 3 --workers 1",
        f"bash {ROOT}/test.sh MAS3K {root} --batch_size 2",
        f"bash {ROOT}/eval.sh MAS3K {root}",
    ):
        result = bash(command, tmp_path)
        assert result.returncode == 0, result.stderr
        assert f"MAS3K{' training' if 'train.sh' in command else ''}: " in result.stdout
        assert "float32" in result.stdout or "eval.sh" in command
    run = tmp_path / "runs" / "MAS3K"
    assert (run / "SAM2-UNeXT-1.pth").is_file()
    assert sorted(path.stem for path in (run / "predictions" / "MAS3K").glob("*.png")) == expected
    assert {"precision_recall.pdf", "report.html", "results.tex"} <= {path.name for path in (run / "results").iterdir()}
    scores = json.loads((run / "results" / "results.json").read_text())["MAS3K"]
    assert scores["images"] == len(expected)
    lines = [line.split() for line in result.stdout.splitlines()]
    columns = ("mIoU", "Smeasure", "wFmeasure", "meanEm", "MAE")
    assert ["MAS3K", "this", "run", str(len(expected)), *(f"{scores[column]:.3f}" for column in columns)] in lines
    assert ["SAM2-UNeXT,", "paper", "0.853", "0.926", "0.900", "0.960", "0.014"] in lines
    assert ["SAM2-UNet,", "paper", "0.799", "0.903", "0.848", "0.943", "0.021"] in lines


@pytest.mark.slow
def test_folders_in_three_commands_with_native_bf16(toy, tmp_path, monkeypatch):
    monkeypatch.setenv(PRETENDED_CPU, "fpu avx512_bf16")
    (tmp_path / "a folder").mkdir()
    for command in (
        f"bash {ROOT}/train.sh {toy}/train/Image/ {toy}/train/Mask/ {NETWORK} --epoch 1 --batch_size 3 --workers 1",
        f"bash {ROOT}/test.sh {toy}/test/Image/ --test_gt_path {toy}/test/Mask/ --batch_size 2",
        f"bash {ROOT}/eval.sh {toy}/test/Mask/ --json scores.json",
    ):
        result = bash(command, tmp_path, RUN="a folder/run")
        assert result.returncode == 0, result.stderr
        assert "bfloat16" in result.stdout or "eval.sh" in command
    run = tmp_path / "a folder" / "run"
    assert (run / "SAM2-UNeXT-1.pth").is_file()
    assert sorted(path.name for path in run.glob("predictions/*.png")) == [f"toy_{i:04}.png" for i in range(4)]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["run"]["images"] == 4
    assert "Smeasure" in result.stdout and f"{scores['run']['Smeasure']:.3f}" in result.stdout
    assert (run / "results" / "report.html").is_file()


@pytest.mark.parametrize(
    "script, usage", [("train.sh", "IMAGES MASKS"), ("test.sh", "IMAGES..."), ("eval.sh", "NAME ROOT")]
)
def test_without_arguments_a_recipe_says_how_it_is_used(script, usage, tmp_path):
    result = bash(f"bash {ROOT}/{script}", tmp_path)
    assert result.returncode == 2 and f"bash {script} {usage} [options]" in result.stderr


def test_without_a_checkpoint_test_sh_says_what_to_do(tmp_path):
    result = bash(f"bash {ROOT}/test.sh .", tmp_path)
    assert result.returncode == 2 and "train first" in result.stderr and not result.stdout


@pytest.mark.parametrize("script", ["train.sh", "test.sh", "eval.sh"])
def test_arguments_that_are_neither_benchmark_nor_file_are_named(script, tmp_path):
    for words, message in (
        ("typo .", "no folder or file typo, and no benchmark of that name (DIS5K, COD,"),
        ("no/folder .", "no folder or file no/folder"),
        ("COD nowhere", "COD needs the folder of its archive after it; nowhere is no folder"),
        ("COD --flip", "--flip is no folder"),
    ):
        result = bash(f"bash {ROOT}/{script} {words}", tmp_path)
        assert result.returncode == 2 and result.stderr.startswith(f"{script}: ") and message in result.stderr


def test_test_sh_names_a_missing_image_before_it_looks_for_a_checkpoint(tmp_path):
    (tmp_path / "a.jpg").touch()
    result = bash(f"bash {ROOT}/test.sh a.jpg typo.jpg --flip", tmp_path)
    assert result.returncode == 2 and result.stderr == "test.sh: there is no folder or file typo.jpg\n"


def test_train_sh_uses_the_weights_of_the_chosen_encoders(tmp_path):
    python = fake_python(tmp_path / "python", 'printf "%s\\n" "$3" "$5"')
    for more, names in (
        ("", ["sam2_hiera_large.pt", "vit_large_patch14_dinov2.safetensors"]),
        ("--aux vit_small_patch14_dinov2 --sam2 tiny", ["sam2_hiera_tiny.pt", "vit_small_patch14_dinov2.safetensors"]),
        ("--aux=vit_small_patch14_dinov2 --sam2=tiny", ["sam2_hiera_tiny.pt", "vit_small_patch14_dinov2.safetensors"]),
    ):
        result = bash(f"bash {ROOT}/train.sh . . {more}", tmp_path, PYTHON=python)
        assert [line.split("weights/")[1] for line in result.stdout.splitlines()] == names


def test_test_sh_uses_best_pth_or_the_newest_checkpoint_and_all_images_before_the_options(tmp_path):
    run = tmp_path / "runs" / "sam2unext"
    run.mkdir(parents=True)
    for age, name in ((9, "SAM2-UNeXT-20.pth"), (5, "SAM2-UNeXT-5.pth"), (7, "SAM2-UNeXT-10.pth"), (99, "best.pth")):
        (run / name).touch()
        os.utime(run / name, (1e9 - age, 1e9 - age))
    for name in ("a.jpg", "b c.jpg"):
        (tmp_path / name).touch()
    python = fake_python(tmp_path / "python", 'printf "%s\\n" "${@:2}"')
    for checkpoint in ("runs/sam2unext/best.pth", "runs/sam2unext/SAM2-UNeXT-5.pth"):
        result = bash(f"bash {ROOT}/test.sh a.jpg 'b c.jpg' --flip", tmp_path, PYTHON=python)
        assert result.stdout.splitlines() == [
            f"test.sh: taking {checkpoint}", "--checkpoint", checkpoint, "--test_image_path", "a.jpg", "b c.jpg",
            "--save_path", "runs/sam2unext/predictions", "--flip",
        ]  # fmt: skip
        (run / "best.pth").unlink(missing_ok=True)


@pytest.mark.parametrize("script, words", [("train.sh", ". ."), ("test.sh", ".")])
def test_gpus_starts_as_many_processes(script, words, tmp_path):
    (tmp_path / "runs" / "sam2unext").mkdir(parents=True)
    (tmp_path / "runs" / "sam2unext" / "SAM2-UNeXT-1.pth").touch()
    python = fake_python(tmp_path / "python", 'echo "$@"')
    result = bash(f"bash {ROOT}/{script} {words}", tmp_path, PYTHON=python, GPUS="4")
    launched = f"-m torch.distributed.run --standalone --nproc_per_node 4 {ROOT}/{script[:-3]}.py --"
    assert result.stdout.splitlines()[-1].startswith(launched), result.stderr


def fake_python(path, body):
    answer = f'[[ $2 == *evaluation* ]] && exec {sys.executable} "$@"'  # about the names of benchmarks
    path.write_text(f"#!/bin/bash\n{answer}\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "body, message",
    [
        (f'[[ $2 == *ensurepip* ]] && exit 1; exec {sys.executable} "$@"', "apt install python3-venv"),
        ('[[ $1 == --version ]] && echo Python 3.8.1; [[ $2 == *version_info* ]] && exit 1', "Python 3.8.1 is too old"),
    ],
)  # fmt: skip
def test_setup_names_what_python_lacks(body, message, tmp_path):
    python = fake_python(tmp_path / "python", body)
    result = bash(f"source {ROOT}/tools/setup.sh; setup requirements.txt", tmp_path, PYTHON=python)
    assert result.returncode == 2 and message in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_setup_names_a_missing_python(tmp_path):
    result = bash(f"source {ROOT}/tools/setup.sh; setup requirements.txt", tmp_path, PYTHON="python4")
    assert result.returncode == 2 and "python4 is missing" in result.stderr


def test_setup_installs_each_requirements_file_once_and_again_when_it_changes(tmp_path):
    body = '[[ "$1 $2" == "-m venv" ]] && { mkdir -p ${@: -1}/bin; cp $0 ${@: -1}/bin/python; }; '
    body += '[[ "$1 $2 $3" == "-m pip install" ]] && echo pip "$@"; exit 0'
    python = fake_python(tmp_path / "python", body)
    (tmp_path / "one.txt").write_text("a")
    (tmp_path / "two.txt").write_text("b")
    command = f"source {ROOT}/tools/setup.sh; setup one.txt; setup one.txt two.txt; echo more >> one.txt; setup one.txt"
    result = bash(command, tmp_path, PYTHON=python)
    installs = [line.split("-check ")[1] for line in result.stdout.splitlines() if line.startswith("pip")]
    assert installs == ["-r one.txt", "-r two.txt", "-r one.txt"], result.stderr


def test_the_tree_is_clean():
    for command in ("check", "format --check"):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command.split(), "."], cwd=ROOT, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout
