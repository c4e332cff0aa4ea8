"""Runs a script of this project as a user would, with the trunk "micro" added.

    python tests/program.py train.py ARGUMENTS

In the environment, PRETENDED_CPU_FLAGS replaces what the CPU can do, for example avx512_bf16 or nothing, and
KILLED_IN_STEP makes the second process of a training run kill itself in that step, unless torchrun restarted it.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from unext import device

if "PRETENDED_CPU_FLAGS" in os.environ:
    device.cpu_flags = lambda: set(os.environ["PRETENDED_CPU_FLAGS"].split())
if os.environ.get("KILLED_IN_STEP") and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
    import torch

    original, steps = torch.optim.AdamW.step, []

    def step(self, *args, **options):
        steps.append(1)
        if len(steps) == int(os.environ["KILLED_IN_STEP"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *args, **options)

    torch.optim.AdamW.step = step
if Path(sys.argv[1]).name in ("train.py", "test.py", "app.py"):  # eval.py does without torch
    import micro  # noqa: F401

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
