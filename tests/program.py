"""Runs a script of this project as a user would, with the trunk "micro" added.

    python tests/program.py train.py ARGUMENTS

PRETENDED_CPU_FLAGS in the environment replaces what the CPU can do, for example avx512_bf16 or nothing.
"""

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import cli

if "PRETENDED_CPU_FLAGS" in os.environ:
    cli.cpu_flags = lambda: set(os.environ["PRETENDED_CPU_FLAGS"].split())
if Path(sys.argv[1]).name in ("train.py", "test.py"):  # eval.py does without torch
    import micro  # noqa: F401

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
