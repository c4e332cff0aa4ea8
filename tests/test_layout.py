"""Who may import whom (docs/CONTRIBUTING.md)."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

# Inside unext/, a file imports only those before it.
UNEXT = ["errors", "files", "cli", "images", "masks", "pairing", "workers", "device", "download", "weights",
         "checkpoint", "run", "hub", "log", "cutout", "output"]  # fmt: skip
ALLOWED = {
    "sam2": {"sam2"},
    "unext": {"unext"},
    "evaluation": {"evaluation", "unext"},
    "dataset.py": {"unext"},
    "SAM2UNeXT.py": {"sam2", "dataset", "unext"},
    "eval.py": {"evaluation", "unext"},
    "test.py": {"SAM2UNeXT", "dataset", "evaluation", "unext"},
    "train.py": {"SAM2UNeXT", "dataset", "evaluation", "sam2", "unext"},
}
PROJECT = {name.removesuffix(".py") for name in ALLOWED} | {"tools", "tests", "hubconf"}


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, such as "unext.files", without those that only annotations name."""
    names, nodes = set(), [ast.parse(path.read_text("utf-8"))]
    for node in nodes:  # grows meanwhile
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        nodes += ast.iter_child_nodes(node)
    return {name for name in names if name.partition(".")[0] in PROJECT}


@pytest.mark.parametrize("place", ALLOWED)
def test_a_place_imports_only_what_it_may(place):
    for path in [ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"):
        assert {name.partition(".")[0] for name in imports(path)} <= ALLOWED[place], path


def test_a_file_of_unext_imports_only_those_before_it():
    assert {*UNEXT} == {path.stem for path in (ROOT / "unext").glob("[!_]*.py")}
    for i, name in enumerate(UNEXT):
        modules = {module.split(".")[1] for module in imports(ROOT / f"unext/{name}.py")}
        assert modules <= {*UNEXT[:i]}, name
