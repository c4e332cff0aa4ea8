"""For maintainers: what a folder of very many files costs before the first image, in seconds and memory.

    python tests/benchmark_start.py --files 10000 100000 1000000

test.py on so many images, eval.py on so many maps and as much ground truth, train.py on so many images and masks: hard
links to a few small files. Prints what each takes beyond what it takes with eight files, per image too. Linux.
"""

import argparse
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
NETWORK = "--sam2 micro --aux none --hiera_path random --size 64"


def begun(*_: object, **__: object) -> None:
    """Ends the process where the first image would be computed, telling how much memory it took until then."""
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    print(json.dumps({"peak": peak, "time": time.time()}), flush=True)
    os._exit(0)


def run(program: str, words: list[str]) -> None:
    """In a process of its own: a program up to its first image."""
    if program == "eval":
        import eval as script

        with mock.patch.object(script.scoring, "ImageScores", begun):
            script.main(script.get_args_parser().parse_args(words))
    elif program == "test":
        import micro  # noqa: F401

        import test as script

        with mock.patch.object(script, "predict_batch", begun):
            script.main(script.get_args_parser().parse_args(words))
    else:
        import micro  # noqa: F401

        import train as script

        with mock.patch.object(script, "train_one_epoch", lambda _, batches, *__: begun(next(batches))):
            script.main(script.get_args_parser().parse_args(words))


def make_checkpoint(path: Path) -> None:
    import micro  # noqa: F401

    from SAM2UNeXT import SAM2UNeXT
    from unext import checkpoint

    checkpoint.save_network(path, SAM2UNeXT(sam2="micro", aux="none", size=64), epoch=1)


def make_folder(folder: Path, mode: str, count: int) -> None:
    folder.mkdir(parents=True)
    sources = [folder / f".source{i}.png" for i in range(min(SOURCES, count))]
    for i, source in enumerate(sources):
        pixels = np.random.default_rng(i).integers(0, 2, (32, 32, 3), np.uint8) * 255
        Image.fromarray(pixels).convert(mode).save(source)
    for i in range(count):
        os.link(sources[i % len(sources)], folder / f"photograph_{i:07}.png")


def measure(program: str, folder: Path, options: str = "") -> tuple[float, int]:
    """Seconds from the start of a program to its first image, and the bytes at its peak until then."""
    out = tempfile.mkdtemp(dir=folder)
    words = {
        "test": f"--test_image_path {folder}/images --save_path {out} --checkpoint {folder.parent}/micro.pth "
        "--device cpu",
        "eval": f"--dataset_name many --pred_path {folder}/maps --gt_path {folder}/masks --save_path {out} --workers 1",
        "train": f"--train_image_path {folder}/images --train_mask_path {folder}/masks --save_path {out} --device cpu "
        f"--workers 2 {NETWORK}",
    }[program]
    command = [sys.executable, __file__, "--program", program, f"{words} {options}"]
    start = time.time()
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(result.stderr)
    told = json.loads(result.stdout.splitlines()[-1])
    return told["time"] - start, told["peak"]


def main(args: argparse.Namespace) -> None:
    if args.program:
        run(args.program[0], args.program[1].split())
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make_checkpoint(Path(folder, "micro.pth"))
        few = {}
        for count in (FEW, *args.files):
            top = Path(folder, str(count))
            for name, mode in (("images", "RGB"), ("masks", "L"), ("maps", "L")):
                make_folder(top / name, mode, count)
            for program in args.programs:
                seconds, peak = measure(program, top)
                if count == FEW:
                    few[program] = seconds, peak
                else:
                    more, size = seconds - few[program][0], peak - few[program][1]
                    figures = f"{more:.1f} s, {size / 2**20:.0f} MB, {size / count:.0f} bytes an image"
                    print(f"{program}.py, {count:,}: {figures}", flush=True)


if __name__ == "__main__":
    parser = cli.parser(__doc__)
    parser.add_argument("--files", nargs="+", type=cli.number(), default=[10_000, 100_000], help="how many")
    parser.add_argument("--programs", nargs="+", default=["test", "eval", "train"], help="which")
    parser.add_argument("--folder", help="where the files are made; default: the system's for temporary files")
    parser.add_argument("--program", nargs=2, help=argparse.SUPPRESS)
    with cli.one_line_errors():
        main(parser.parse_args())
