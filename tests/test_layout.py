"""Who may import whom (docs/CONTRIBUTING.md)."""

import ast
from collections.abc import Iterator
from pathlib import Path

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


def imports(path: Path, in_functions: bool = True) -> Iterator[str]:
    """What a file imports, such as "unext.files", without what only annotations name."""
    nodes = [ast.parse(path.read_text("utf-8"))]
    for node in nodes:  # grows meanwhile
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if in_functions or not isinstance(node, ast.FunctionDef):
            nodes += ast.iter_child_nodes(node)


def imported_with(path: Path, in_functions: bool = False) -> set[str]:
    """The packages that are imported with a file, through the project's files too."""
    paths, packages = [path], set()
    for path in paths:  # grows meanwhile
        for module in imports(path, in_functions):
            packages.add(module.partition(".")[0])
            parents = (module, module.rpartition(".")[0])
            files = [ROOT / f"{name.replace('.', '/')}.py" for name in parents if name]
            paths += [file for file in files if file.exists() and file not in paths]
    return packages


def test_a_place_imports_only_what_it_may():
    for place, allowed in ALLOWED.items():
        for path in [ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"):
            assert PROJECT & {name.partition(".")[0] for name in imports(path)} <= allowed, path


def test_a_file_of_unext_imports_only_those_before_it():
    assert {*UNEXT} == {path.stem for path in (ROOT / "unext").glob("[!_]*.py")}
    for i, name in enumerate(UNEXT):
        modules = {module.split(".")[1] for module in imports(ROOT / f"unext/{name}.py") if module.startswith("unext.")}
        assert modules <= {*UNEXT[:i]}, name


def test_what_is_not_needed_is_not_imported():
    for path, absent in {
        "SAM2UNeXT.py": {"cv2", "huggingface_hub"},
        "eval.py": {"torch", "torchvision", "scipy", "py_sod_metrics"},
        "sam2/__init__.py": {"torch", "hydra"},
    }.items():
        assert not imported_with(ROOT / path) & absent, path


def test_the_table_of_rooms_is_that_of_the_files():
    text = (ROOT / "docs/CONTRIBUTING.md").read_text("utf-8")
    paths = [path for folder in (".", "evaluation", "unext", "tools") for path in (ROOT / folder).glob("[!_]*.py")]
    assert [path for path in paths if f"`{path.name}`" not in text] == []
