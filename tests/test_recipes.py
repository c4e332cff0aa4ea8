"""The shell scripts, run as a user runs them."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import NETWORK, PRETENDED_CPU, ROOT, program, read_maps

pytestmark = pytest.mark.posix
ALL = "train.sh test.sh eval.sh"


def bash(command, cwd, **environment):
    """Runs a recipe with the trunk "micro", see program.py."""
    python = environment.pop("PYTHON", None) or fake_python(cwd / "program", f'exec {" ".join(program("")[:-1])} "$@"')
    environment = os.environ | {"PYTHON": python} | environment
    return subprocess.run(["bash", "-c", command], cwd=cwd, env=environment, capture_output=True, text=True)


def arguments_of(command, cwd, **environment):
    """The arguments of the Python program that a recipe starts."""
    python = fake_python(cwd / "python", 'printf "%s\\n" "${@}"')
    result = bash(f"bash {ROOT}/{command}", cwd, PYTHON=python, **environment)
    assert result.returncode == 0, result.stderr
    return [line for line in result.stdout.splitlines() if not line.startswith("test.sh: taking")]


@pytest.mark.slow
def test_a_benchmark_in_three_commands(toy, tmp_path, monkeypatch):
    """On a CPU without native bf16."""
    monkeypatch.setenv(PRETENDED_CPU, "fpu avx2")
    for command in (
        f"bash {ROOT}/train.sh mas3k {toy} {NETWORK} --epoch 1 --batch_size 3 --workers 1",
        f"bash {ROOT}/test.sh MAS3K {toy} --batch_size 2",
        f"bash {ROOT}/eval.sh MAS3K {toy}",
    ):
        result = bash(command, tmp_path)
        assert result.returncode == 0, result.stderr
        assert f"MAS3K{' training' if 'train.sh' in command else ''}: " in result.stdout
        assert "float32" in result.stdout or "eval.sh" in command
    run = tmp_path / "runs" / "MAS3K"
    assert (run / "SAM2-UNeXT-1.pth").is_file() and (run / "results/report.html").is_file()
    assert [*read_maps(run / "predictions/MAS3K")] == [f"toy_{i:04}.png" for i in range(4)]
    scores = json.loads((run / "results" / "results.json").read_text())["MAS3K"]
    assert scores["images"] == 4
    assert f"{scores['Smeasure']:.3f}" in result.stdout and "0.926" in result.stdout  # beside the published figure


def test_folders_are_trained_on_predicted_and_scored(tmp_path):
    run = tmp_path / "a folder"
    run.mkdir()
    (run / "best.pth").touch()
    train = arguments_of("train.sh . . --lr 1", tmp_path, RUN=run)
    assert train[0] == f"{ROOT}/train.py" and train[5:] == [
        "--train_image_path", ".", "--train_mask_path", ".", "--save_path", str(run),
        "--epoch", "20", "--lr", "2e-4", "--batch_size", "1", "--lr", "1",
    ]  # fmt: skip
    assert arguments_of("test.sh . --test_gt_path .", tmp_path, RUN=run) == [
        f"{ROOT}/test.py", "--checkpoint", f"{run}/best.pth", "--test_image_path", ".",
        "--save_path", f"{run}/predictions", "--test_gt_path", ".",
    ]  # fmt: skip
    assert arguments_of("eval.sh . --json x", tmp_path, RUN=run) == [
        f"{ROOT}/eval.py", "--dataset_name", "a folder", "--gt_path", ".", "--pred_path", f"{run}/predictions",
        "--save_path", f"{run}/results", "--json", "x",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "scripts, options, message",
    [
        ("train.sh", "", "bash train.sh IMAGES MASKS [options]"),
        ("test.sh", "", "bash test.sh IMAGES... [options]"),
        ("eval.sh", "", "bash eval.sh NAME ROOT [options]"),
        ("test.sh", ".", "train first"),
        ("test.sh", ". typo.jpg --flip", "test.sh: there is no folder or file typo.jpg\n"),  # before the checkpoint
        (ALL, "typo .", "no folder or file typo, and no benchmark of that name (DIS5K, COD,"),
        (ALL, "no/folder .", "no folder or file no/folder"),
        (ALL, "COD nowhere", "COD needs the folder of its archive after it; nowhere is no folder"),
        (ALL, "COD --flip", "--flip is no folder"),
    ],
)
def test_a_recipe_names_what_is_missing_or_how_it_is_used(scripts, options, message, tmp_path):
    for script in scripts.split():
        result = bash(f"bash {ROOT}/{script} {options}", tmp_path)
        assert result.returncode == 2 and message in result.stderr and not result.stdout
        assert not options or result.stderr.startswith(f"{script}: ")


def test_train_sh_uses_the_weights_of_the_chosen_encoders(tmp_path):
    for options, trunk, aux in (
        ("", "large", "vit_large_patch14_dinov2"),
        ("--aux vit_small_patch14_dinov2 --sam2=tiny", "tiny", "vit_small_patch14_dinov2"),
    ):
        expected = f"--hiera_path {ROOT}/weights/sam2_hiera_{trunk}.pt --dinov2_path {ROOT}/weights/{aux}.safetensors"
        assert arguments_of(f"train.sh . . {options}", tmp_path)[1:5] == expected.split()


def test_test_sh_uses_best_pth_or_the_last_checkpoint_and_all_images_before_the_options(tmp_path):
    run = tmp_path / "runs" / "sam2unext"
    run.mkdir(parents=True)
    for age, name in ((9, "SAM2-UNeXT-20.pth"), (5, "SAM2-UNeXT-5.pth"), (7, "SAM2-UNeXT-10.pth"), (99, "best.pth")):
        (run / name).touch()
        os.utime(run / name, (1e9 - age, 1e9 - age))
    (tmp_path / "b c.jpg").touch()
    for name in ("best.pth", "SAM2-UNeXT-20.pth"):
        assert arguments_of("test.sh runs 'b c.jpg' --flip", tmp_path)[1:] == [
            "--checkpoint", f"runs/sam2unext/{name}", "--test_image_path", "runs", "b c.jpg",
            "--save_path", "runs/sam2unext/predictions", "--flip",
        ]  # fmt: skip
        (run / "best.pth").unlink(missing_ok=True)
    named = arguments_of("test.sh runs --checkpoint=x.pth", tmp_path, RUN="nothing")
    assert named[1:] == ["--test_image_path", "runs", "--save_path", "nothing/predictions", "--checkpoint=x.pth"]


def test_gpus_starts_as_many_processes(tmp_path):
    (tmp_path / "best.pth").touch()
    for script, options in (("train.sh", ". ."), ("test.sh", ".")):
        launched = f"-m torch.distributed.run --standalone --nproc_per_node 4 {ROOT}/{script[:-3]}.py"
        assert arguments_of(f"{script} {options}", tmp_path, GPUS="4", RUN=".")[:6] == launched.split()


@pytest.mark.parametrize("command, status, requeued", [
    ("exit 2", 2, ""), ("trap 'kill $!; exit 143' TERM; sleep 60 & touch started; wait", 143, "requeue 7\n"),
])  # fmt: skip
def test_the_job_script_passes_on_sigterm_and_status(command, status, requeued, tmp_path):
    [script] = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", (ROOT / "docs/training.md").read_text(), re.DOTALL)
    for name, text in (("train.sbatch", script), ("train.sh", command), ("scontrol", 'echo "$@" >requeued')):
        (tmp_path / name).write_text(text)
    (tmp_path / "scontrol").chmod(0o755)
    environment = {**os.environ, "PATH": f".:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", "train.sbatch"], cwd=tmp_path, env=environment)
    while job.poll() is None and not (tmp_path / "started").exists():
        time.sleep(0.01)
    job.terminate()
    assert job.wait() == status
    assert not requeued or (tmp_path / "requeued").read_text() == requeued


@pytest.mark.parametrize("variable, value, message", [
    ("PYTHON", f'exec {sys.executable} -S "$@"', "; bash tools/setup.sh installs what is missing"),
    ("GPUS", "all", "GPUS=all: is not a number of GPUs"),
])  # fmt: skip
def test_an_environment_that_a_recipe_cannot_use_is_one_line(variable, value, message, tmp_path):
    if variable == "PYTHON":
        (tmp_path / "python").write_text(f"#!/bin/bash\n{value}\n")
        (tmp_path / "python").chmod(0o755)
        value = str(tmp_path / "python")
    result = bash(f"bash {ROOT}/train.sh . .", tmp_path, **{variable: value})
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1


def fake_python(path, body):
    answer = f'[[ $2 == *evaluation* ]] && exec {sys.executable} "$@"'  # about the names of benchmarks
    path.write_text(f"#!/bin/bash\n{answer}\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "body, message",
    [
        ("", "python is missing"),
        (f'[[ $2 == *ensurepip* ]] && exit 1; exec {sys.executable} "$@"', "apt install python3-venv"),
        ('[[ $1 == --version ]] && echo Python 3.8.1; [[ $2 == *version_info* ]] && exit 1', "Python 3.8.1 is too old"),
    ],
)  # fmt: skip
def test_setup_says_what_python_lacks(body, message, tmp_path):
    python = fake_python(tmp_path / "python", body) if body else str(tmp_path / "python")
    result = bash(f"source {ROOT}/tools/setup.sh; setup requirements.txt", tmp_path, PYTHON=python)
    assert result.returncode == 2 and message in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_threads_spin_shortly_unless_the_user_says_otherwise(tmp_path):
    command = f"source {ROOT}/tools/setup.sh; echo -n $GOMP_SPINCOUNT"
    for given, expected in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "")):
        assert bash(command, tmp_path, **{"GOMP_SPINCOUNT": "", "OMP_WAIT_POLICY": ""} | given).stdout == expected


def test_setup_installs_each_requirements_file_once_and_again_when_it_changes(tmp_path):
    body = '[[ "$1 $2" == "-m venv" ]] && { mkdir -p ${@: -1}/bin; cp $0 ${@: -1}/bin/python; }; '
    body += '[[ "$1 $2 $3" == "-m pip install" ]] && echo pip "$@"; exit 0'
    python = fake_python(tmp_path / "python", body)
    (tmp_path / "first.txt").write_text("a")
    (tmp_path / "second.txt").write_text("b")
    command = f"source {ROOT}/tools/setup.sh; setup first.txt; setup first.txt second.txt; "
    command += "echo more >> first.txt; setup first.txt"
    result = bash(command, tmp_path, PYTHON=python)
    installs = [line.split("-check ")[1] for line in result.stdout.splitlines() if line.startswith("pip")]
    assert installs == ["-r first.txt", "-r second.txt", "-r first.txt"], result.stderr


def test_setup_keeps_an_environment_without_pip(tmp_path):
    python = fake_python(tmp_path / "python", "exit 0")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    fake_python(
        tmp_path / ".venv/bin/python",
        "[[ $2 == pip && ! -e pip ]] && exit 1; [[ $2 == ensurepip ]] && touch pip; exit 0",
    )
    (tmp_path / "first.txt").touch()
    result = bash(f"source {ROOT}/tools/setup.sh; setup first.txt", tmp_path, PYTHON=python)
    assert result.returncode == 0 and (tmp_path / "pip").exists() and (tmp_path / ".venv/first.txt").exists()


def test_the_measurements_on_a_gpu_keep_what_was_measured_when_a_step_fails_or_the_time_is_over(tmp_path):
    body = f"""case "$1" in
        -) exec {sys.executable} "$@" ;;
        -m) exit 1 ;;
        tools/*) echo '{{"plain": {{"s": 0.25}}, "bf16": {{"s": 0.125, "peak MB": 7}}}}' >"${{@: -1}}" ;;
    esac"""
    python = fake_python(tmp_path / "python", body)
    result = bash(f"bash {ROOT}/tools/cuda.sh out tests load train", tmp_path, PYTHON=python)
    assert result.returncode == 1
    table = "| s | peak MB |\n|---|---|---|\n| plain | 0.25 |  |\n| bf16 | 0.125 | 7 |\n"
    summary = "".join(f"\n| {step} {table}" for step in ("load", "train-1", "train-4"))
    assert (tmp_path / "out/summary.md").read_text() == summary and not result.stderr
    assert result.stdout.endswith(f"{summary}cuda.sh: failed, or no time was left for: tests\n")
    assert (tmp_path / "out/log.txt").read_text() in result.stdout
    result = bash(f"bash {ROOT}/tools/cuda.sh out infer-1", tmp_path, PYTHON=python, MINUTES="0")
    assert result.returncode == 1 and result.stdout.endswith("no time was left for: infer-1\n")
    assert (tmp_path / "out/summary.md").read_text() == summary
    result = bash(f"bash {ROOT}/tools/cuda.sh out inferno", tmp_path, PYTHON=python)
    assert result.returncode == 2 and "there is no step inferno; there are tests train-1" in result.stderr


def test_the_tree_is_clean():
    for command in ("check .", "format --check ."):
        result = bash(f"$PYTHON -m ruff {command}", ROOT, PYTHON=sys.executable)
        assert result.returncode == 0, result.stdout
