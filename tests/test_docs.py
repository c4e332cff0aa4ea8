"""The README and docs/: links lead somewhere, options exist, examples are accepted."""

import re

import pytest
import yaml
from conftest import ROOT

import eval as evaluation_script
import test as prediction_script
import train
from evaluation import benchmarks
from tools import app, check_dataset, convert_checkpoint, export, toy_dataset

DOCUMENTS = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = {"--standalone", "--nproc_per_node", "--nnodes", "--node_rank", "--master_addr", "--master_port"}
OTHERS |= {"--max_restarts", "--gres", "--cpus-per-task", "--time", "--requeue", "--open-mode", "--signal"}  # SLURM
OTHERS |= {"--shm-size", "--logdir", "--onnx", "--help"}
OWN_PROGRAMS = ("your_program.py", "cutout.py")  # of the reader


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document):
    text = document.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), target
        assert not anchor or anchor in headings(linked.read_text()), target


def test_every_option_in_the_documents_exists():
    parsers = [module.get_args_parser() for module in (train, prediction_script, evaluation_script)]
    parsers += [module.get_args_parser() for module in (app, check_dataset, convert_checkpoint, export, toy_dataset)]
    known = OTHERS | {option for parser in parsers for option in parser._option_string_actions}
    for name in ("tools/benchmark.py", "tests/benchmark_eval.py", "tests/fuzz.py"):
        known |= set(re.findall(r'"(--\w+)"', (ROOT / name).read_text()))
    for document in DOCUMENTS:
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", document.read_text()):
            assert option in known, f"{document.name}: {option}"


def test_files_named_in_commands_exist():
    for document in DOCUMENTS:
        for name in re.findall(r"(?:bash|python) ((?:tools/|tests/)?\w+\.(?:sh|py))\b", document.read_text()):
            assert (ROOT / name).exists() or name in OWN_PROGRAMS, f"{document.name}: {name}"


def test_the_yaml_example_describes_a_benchmark():
    [example] = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/benchmarks.md").read_text(), flags=re.DOTALL)
    described = benchmarks.parse("leaves", yaml.safe_load(example))
    assert list(described.test) == ["easy", "hard"] and described.together == {"all": ("easy", "hard")}
