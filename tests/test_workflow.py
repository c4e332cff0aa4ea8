"""The files in .github: the workflow's commands are the documented ones, and they run."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"] if "run" in step]
COMMANDS = [(step["run"], "== 'Windows'" in step.get("if", "")) for step in STEPS]
LINUX = [command for command, windows in COMMANDS if not windows and " pip " not in command]


def test_every_system_and_the_oldest_and_newest_python_run_the_fast_tests():
    matrix = WORKFLOW["jobs"]["fast"]["strategy"]["matrix"]
    assert matrix["os"] == ["ubuntu-latest", "windows-latest", "macos-latest"] and matrix["python"] == ["3.10", "3.13"]
    assert LINUX[-1] == "bash run_tests.sh" and WORKFLOW["jobs"]["whole"]["if"] == "github.event_name == 'schedule'"


@pytest.mark.parametrize("command, windows", COMMANDS)
def test_the_commands_are_documented(command, windows):
    texts = [(ROOT / name).read_text("utf-8") for name in ("README.md", "docs/CONTRIBUTING.md")]
    assert command in re.sub(r"\s+", " ", " ".join(texts))


@pytest.fixture
def clone(tmp_path):
    """The repository's files with an environment in which all packages are already installed."""
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "weights", "runs", "results", "demo")
    folder = shutil.copytree(ROOT, tmp_path / "clone", ignore=ignored)
    (folder / ".venv/bin").mkdir(parents=True)
    for file in folder.glob("requirements*.txt"):
        shutil.copy(file, folder / ".venv")
    python = folder / ".venv/bin/python"
    python.write_text(f'#!/bin/bash\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    return folder


@pytest.mark.posix
@pytest.mark.slow
@pytest.mark.parametrize("command", LINUX)
def test_the_commands_run_as_far_as_they_need_no_network(command, clone):
    """Of all tests, those of one small file."""
    path = f"{clone}/.venv/bin:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTEST_ADDOPTS": "-p no:cacheprovider tests/test_files.py"}
    environment["PYTEST_DEBUG_TEMPROOT"] = str(clone.parent)  # one session of pytest removes another's files
    environment.pop("PYTHON", None)
    result = subprocess.run(["bash", "-ec", command], cwd=clone, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search("passed|already formatted|All checks passed", result.stdout)


def test_a_report_of_a_problem_has_the_records_of_a_run():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/problem.yml").read_text())
    fields = {field["attributes"]["label"]: field for field in form["body"]}
    assert {"args.json", "settings.json"} <= fields.keys()
    assert form.keys() == {"name", "description", "body"}
    assert all(field["type"] in ("textarea", "input") and field["id"] for field in form["body"])
