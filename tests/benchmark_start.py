"""For maintainers: what a folder of very many files costs before the first image, in seconds and memory.

    python tests/benchmark_start.py --files 10000 100000 1000000

test.py on so many images, eval.py on so many maps and as much ground truth, train.py on so many images and masks: hard
links to a few small files. Prints what each takes beyond what it takes with eight files, per image too. Linux.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from unext import cli

SOURCES = 20  # an ext4 file has 65,000 links at most
FEW = 8
NETWORK = "--sam2 micro --aux none --hiera_path random --size 64 --device cpu"
PROGRAMS = {  # module -> its object that computes the first image, options
    "test": ("predict_batch", "--checkpoint {0}/../micro.pth --test_image_path {0}/images --device cpu"),
    "eval": ("scoring.ImageScores", "--dataset_name many --pred_path {0}/maps --gt_path {0}/masks --workers 1"),
    "train": ("train_one_epoch", "--train_image_path {0}/images --train_mask_path {0}/masks --workers 2 " + NETWORK),
}


def stop(*args: object, **options: object) -> None:
    """Ends the process where the first image would be computed; prints the peak of its memory until then."""
    if len(args) > 1 and hasattr(args[1], "__next__"):  # train.py's batches
        next(args[1])
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps({"peak": peak, "time": time.time()}), flush=True)
    os._exit(0)


def run(program: str, options: str) -> None:
    """In a process of its own: a program up to its first image."""
    if program != "eval":  # which does without torch
        import micro  # noqa: F401
    script = importlib.import_module(program)
    with mock.patch(f"{program}.{PROGRAMS[program][0]}", stop):
        script.main(script.get_args_parser().parse_args(options.split()))


def make_checkpoint(path: Path) -> None:
    import micro  # noqa: F401

    from SAM2UNeXT import SAM2UNeXT
    from unext import checkpoint

    checkpoint.save_network(path, SAM2UNeXT(sam2="micro", aux="none", size=64), epoch=1)


def make_folder(folder: Path, mode: str, count: int) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        path = folder / f"photograph_{i:07}.png"
        if i < SOURCES:
            pixels = np.random.default_rng(i).integers(0, 2, (32, 32, 3), np.uint8) * 255
            Image.fromarray(pixels).convert(mode).save(path)
        else:
            os.link(folder / f"photograph_{i % SOURCES:07}.png", path)


def measure(program: str, folder: Path) -> tuple[float, int]:
    """Seconds from the start of a program to its first image, and the bytes at its peak until then."""
    options = f"{PROGRAMS[program][1].format(folder)} --save_path {tempfile.mkdtemp(dir=folder)}"
    start = time.time()
    result = subprocess.run([sys.executable, __file__, "--run", program, options], capture_output=True, text=True)
    if result.returncode:
        raise ValueError(result.stderr)
    end = json.loads(result.stdout.splitlines()[-1])
    return end["time"] - start, end["peak"]


def main(args: argparse.Namespace) -> None:
    if args.run:
        run(*args.run)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make_checkpoint(Path(folder, "micro.pth"))
        few = {}
        for count in (FEW, *args.files):
            top = Path(folder, str(count))
            for name, mode in (("images", "RGB"), ("masks", "L"), ("maps", "L")):
                make_folder(top / name, mode, count)
            for program in PROGRAMS:
                seconds, peak = measure(program, top)
                if count == FEW:
                    few[program] = seconds, peak
                    continue
                more, size = seconds - few[program][0], peak - few[program][1]
                figures = f"{more:.1f} s, {size / 2**20:.0f} MB, {size / count:.0f} bytes an image"
                print(f"{program}.py, {count:,}: {figures}", flush=True)


if __name__ == "__main__":
    parser = cli.parser(__doc__)
    parser.add_argument("--files", nargs="+", type=cli.number(), default=[10_000, 100_000], help="how many")
    parser.add_argument("--folder", help="where the files are made; default: the system's for temporary files")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    with cli.one_line_errors():
        main(parser.parse_args())
