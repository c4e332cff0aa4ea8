"""The README, docs/ and .github: links lead somewhere, options exist, examples and commands run."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

import eval as evaluation_script
import test as prediction_script
import train
from evaluation import benchmarks
from tools import app, benchmark, check_dataset, convert_checkpoint, export, memory, toy_dataset

PROGRAMS = [train, prediction_script, evaluation_script]
PROGRAMS += [app, benchmark, check_dataset, convert_checkpoint, export, memory, toy_dataset]
DOCUMENTS = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = {"--standalone", "--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"}
OTHERS |= {"--max_restarts", "--gres", "--cpus-per-task", "--time", "--requeue", "--open-mode", "--signal"}  # SLURM
OTHERS |= {"--shm-size", "--logdir", "--onnx", "--help", "--hypothesis-profile"}
OWN_PROGRAMS = ("your_program.py", "cutout.py")  # of the reader
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
COMMANDS = [step["run"] for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_to_files_and_headings():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", document.read_text()):
            path, _, anchor = target.partition("#")
            linked = document.parent / path if path else document
            assert linked.exists(), f"{document.name}: {target}"
            assert not anchor or anchor in headings(linked.read_text()), f"{document.name}: {target}"


def test_every_option_in_the_documents_exists():
    known = OTHERS.copy()
    for program in PROGRAMS:
        parser = program.get_args_parser()
        known |= parser._option_string_actions.keys()
        assert "    python " in parser.format_help()  # the examples
    known |= set(re.findall(r'"(--\w+)"', (ROOT / "tools/benchmark.py").read_text()))  # which has sub-commands
    for document in DOCUMENTS:
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", document.read_text()):
            assert option in known, f"{document.name}: {option}"


def test_files_named_in_commands_exist():
    for document in DOCUMENTS:
        for name in re.findall(r"(?:bash|python) ((?:tools/|tests/)?\w+\.(?:sh|py))\b", document.read_text()):
            assert (ROOT / name).exists() or name in OWN_PROGRAMS, f"{document.name}: {name}"


def test_the_yaml_example_describes_a_benchmark():
    [_, example] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/benchmarks.md").read_text(), flags=re.DOTALL)
    described = benchmarks.parse("leaves", yaml.safe_load(example))
    assert list(described.test) == ["easy", "hard"] and described.together == {"all": ("easy", "hard")}


def copy_of_project(folder):
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "weights", "runs", "results", "demo")
    return shutil.copytree(ROOT, folder, ignore=ignored)


def test_the_notebook_is_stored_without_outputs():
    notebook = json.loads((ROOT / "docs/tutorial.ipynb").read_text("utf-8"))
    assert notebook["metadata"].keys() == {"kernelspec", "language_info"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None and cell["metadata"] == {}, cell["id"]


@pytest.mark.slow
def test_the_notebook_runs_whole_in_a_fresh_copy(tmp_path, monkeypatch):
    """It starts in docs/, as Jupyter starts it; with less data than RESULTS.md has scores of, in a single process."""
    import nbclient
    import nbformat

    copy = copy_of_project(tmp_path / "a copy")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    text = (copy / "docs/tutorial.ipynb").read_text("utf-8").replace('!\\"{sys.executable}\\"', "%run")
    for old, new in (("demo/data\\n", "demo/data --train 12 --test 4\\n"), ("--size 128 ", "--size 64 "),
                     ("--epoch 6 ", "--epoch 1 "), ("--aux_size 112 ", "--aux_size 56 ")):  # fmt: skip
        assert text.count(old) == 1
        text = text.replace(old, new)
    notebook = nbformat.reads(text, as_version=4)
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(copy / "docs")}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = {cell.id: [output.get("data", {}) for output in cell.outputs] for cell in cells}
    for ident in ("pairs", "loss", "overlays", "worst"):
        assert sum("image/png" in data for data in shown[ident]) == 1
    assert json.loads((copy / "runs/tutorial/results/results.json").read_text())["tutorial"]["images"] == 4


def test_the_commands_are_documented():
    texts = [(ROOT / name).read_text("utf-8") for name in ("README.md", "docs/CONTRIBUTING.md")]
    documented = re.sub(r"\s+", " ", " ".join(texts))
    assert [command for command in COMMANDS if command not in documented] == []


@pytest.mark.posix
def test_the_command_of_the_fast_tests_starts_pytest_in_a_clone_in_which_all_packages_are_installed(tmp_path):
    clone = copy_of_project(tmp_path / "clone")
    (clone / ".venv/bin").mkdir(parents=True)
    for file in clone.glob("requirements*.txt"):
        shutil.copy(file, clone / ".venv")
    python = clone / ".venv/bin/python"
    python.write_text(f'#!/bin/bash\n[[ $2 == pytest ]] && echo "$@" || exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    [command] = {command for command in COMMANDS if "run_tests.sh -m" in command}
    result = subprocess.run(["bash", "-ec", command], cwd=clone, capture_output=True, text=True)
    assert re.fullmatch(r"-m pytest -n [1-4] --dist loadgroup -m not slow.*\n", result.stdout), result.stderr
