"""Times and measures the network against the plain way of running it.

    python tools/benchmark.py infer                 a batch through the network: plain, fp32, bf16; seconds, memory
    python tools/benchmark.py infer --device cuda --batch_size 8 --compile
    python tools/benchmark.py train                 an optimiser step, with gradient checkpointing too
    python tools/benchmark.py predict --images 50   test.py on images of 2200 x 3000: share of the network
    python tools/benchmark.py predict --save cutout the same with cutouts

"plain" is the network in fp32, in NCHW, with the system's memory allocator as it comes; "NCHW" is the same code as the
way before it, in that layout. No way uses TF32 but "fp32 as train.py runs it" (and test.py), which leaves it to torch:
cuDNN's convolutions then do. Weights are random. On a CPU each turn of each way is a process, in alternation, whose
peak memory, once the weights are read, is reported; on a GPU each way is a process, with what torch allocated. Prints
medians and ratios; `--json FILE` writes them too.
"""

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.amp import GradScaler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test
import train
from sam2.build_sam import CONFIGS
from SAM2UNeXT import SAM2UNeXT
from unext import checkpoint, cli, device, files
from unext.errors import InputError

Figures = dict[str, dict[str, float]]  # by way, then by name

LARGE = (2200, 3000)  # height, width of the images for test.py
AS_TRAINED = "fp32 as train.py runs it"


class Turn(NamedTuple):
    """What one process measured."""

    seconds: list[float]
    peak_mb: float  # NaN where the system does not tell
    result: Tensor  # logits (B, 1, S, S) or loss (1)


def write_checkpoint(folder: str, args: argparse.Namespace) -> Path:
    """A checkpoint of the network with random weights, the same in all ways."""
    path = Path(folder, "random.pth")
    model = SAM2UNeXT(sam2=args.sam2, aux=args.aux, aux_size=args.aux_size, size=args.size)
    checkpoint.save_network(path, model, epoch=1)
    return path


def prepare(command: str, way: str, path: Path, args: argparse.Namespace) -> Callable[[], Tensor]:
    """Runs `infer` or `train` once, one way, such as "bf16 compiled", and returns logits or loss when called."""
    precision, *more = way.split()
    if precision != "plain":
        device.keep_freed_memory(args.device)
    torch.backends.cudnn.allow_tf32 = way == AS_TRAINED  # off for matrix products by default
    dtype = device.precision("fp32" if precision == "plain" else precision, args.device)
    model = SAM2UNeXT.from_checkpoint(path, precision=dtype)
    if precision == "plain" or "NCHW" in more:
        model.to(memory_format=torch.contiguous_format)
    model.to(args.device).sam.grad_checkpointing = "checkpointed" in more
    if "compiled" in more:
        # With CUDA graphs the result of a call is valid until the next call only.
        model.compile(mode="reduce-overhead" if "graphs" in more else None)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.size, args.size, generator=generator).to(args.device)
    masks = (images[:, :1] > 0).float()

    @torch.inference_mode()
    def infer() -> Tensor:
        logits = model(images)
        synchronize(args.device)
        return logits

    def step() -> Tensor:
        (one,) = train.train_one_epoch(model, [(images, masks, ["random"])], optimizer, scaler)
        synchronize(args.device)
        return torch.tensor([sum(one.terms.values())])

    if command == "infer":
        return infer
    optimizer, _ = train.make_optimizer(model, lr=2e-4, weight_decay=5e-4, epochs=1)
    scaler = GradScaler(torch.device(args.device).type, enabled=dtype == torch.float16)
    return step


def soft_disc(side: int) -> np.ndarray:
    """The probability of a disc with a soft edge, float32 (S, S): random weights find nothing sure to cut out."""
    y, x = np.mgrid[-1 : 1 : 1j * side, -1 : 1 : 1j * side]
    return (1 / (1 + np.exp(100 * (np.hypot(y, x) - 0.8)))).astype(np.float32)


def synchronize(device: str) -> None:
    """Waits until a GPU has done all its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(command: str, way: str, path: Path, args: argparse.Namespace, repeats: int) -> Turn:
    """In a process that does nothing else: so many timed runs after one that does not count."""
    work = prepare(command, way, path, args)
    forget_peak()
    result = work().cpu()
    seconds = [timed(work) for _ in range(repeats)]
    if args.device.startswith("cuda"):
        return Turn(seconds, torch.cuda.max_memory_allocated(args.device) / 2**20, result)
    return Turn(seconds, peak_mb(), result)


def forget_peak() -> None:
    """Has `peak_mb` start anew, on Linux: while weights are read, the pages of their mapped file count too."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb() -> float:
    """The most memory that this process had; NaN where the system does not tell."""
    status = Path("/proc/self/status")  # of Linux; getrusage's maximum starts with the parent's
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.exists() else math.nan


def benchmark_network(args: argparse.Namespace) -> Figures:
    """Inference or a training step, all ways: seconds, memory, and how far the results are from the plain ones."""
    gpu = args.device.startswith("cuda")
    ways = dict.fromkeys(["plain", *([] if gpu else ["fp32"]), args.precision, f"{args.precision} NCHW"])
    if args.command == "infer" and gpu:
        ways[AS_TRAINED] = None
    if args.command == "train":
        ways[f"{args.precision} checkpointed"] = None
    if args.compile:
        ways[f"{args.precision if gpu else 'fp32'} compiled"] = None
    if args.compile and args.command == "infer" and gpu:
        ways[f"{args.precision} compiled graphs"] = None
    rounds, repeats = (1, args.repeats) if gpu else (args.repeats, 1)  # only a CPU's speed drifts
    turns: dict[str, list[Turn]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(folder, args)
        for way in [*ways] * rounds:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                turns[way].append(process.submit(measure, args.command, way, path, args, repeats).result())
    seconds = {way: statistics.median(s for turn in found for s in turn.seconds) for way, found in turns.items()}
    peak = {way: max(turn.peak_mb for turn in found) for way, found in turns.items()}
    plain = turns["plain"][0].result
    results = {}
    for way in ways:
        results[way] = {"s": seconds[way], "times as fast": seconds["plain"] / seconds[way]}
        results[way] |= {"peak MB": peak[way], "of the plain peak": peak[way] / peak["plain"]}
        results[way]["largest difference"] = ((turns[way][0].result - plain).abs().max() / plain.abs().max()).item()
    return results


def large_photo() -> np.ndarray:
    """A smooth image, uint8 (2200, 3000, 3)."""
    small = np.random.default_rng(0).integers(0, 256, (LARGE[0] // 8, LARGE[1] // 8, 3), np.uint8)
    return cv2.resize(small, LARGE[::-1])


def benchmark_predict(args: argparse.Namespace) -> Figures:
    """test.py on large JPEG files: images a second, and the share of the time for which the network is needed.

    The rest of the time it waits. What it needs is measured by itself, after the first batch and after the last.
    """
    if args.images <= args.batch_size:
        raise InputError(f"--images {args.images}: give more than one batch, the first does not count")
    ended: list[float] = []  # when each call did
    last: deque[tuple] = deque(maxlen=1)  # its arguments
    alone: list[float] = []  # seconds of the network by itself
    predict_batch = test.predict_batch

    def predict(*words: object) -> Tensor:
        logits = predict_batch(*words) * 0 + found
        last.append(words)
        if not ended:  # the first call compiled and chose kernels
            measure_alone()
        ended.append(time.perf_counter())
        return logits

    def call() -> None:
        predict_batch(*last[0])
        synchronize(args.device)

    def measure_alone() -> None:
        call()
        alone.extend(timed(call) for _ in range(args.repeats))

    found = torch.from_numpy(soft_disc(args.size)).logit(1e-6).to(args.device)
    with tempfile.TemporaryDirectory() as folder:
        (images := Path(folder, "images")).mkdir()
        cv2.imwrite(str(images / "0.jpg"), large_photo())
        for i in range(1, args.images):
            os.link(images / "0.jpg", images / f"{i}.jpg")
        words = ["--checkpoint", write_checkpoint(folder, args), "--test_image_path", images]
        words += ["--save_path", f"{folder}/maps", "--save", args.save]
        words += ["--batch_size", args.batch_size, "--precision", args.precision, "--device", args.device]
        words += ["--compile"] if args.compile else []
        with mock.patch.object(test, "predict_batch", predict):
            test.main(test.get_args_parser().parse_args([str(word) for word in words]))
        seconds = time.perf_counter() - ended[0]
        measure_alone()
        needed = (len(ended) - 1) * statistics.median(alone)
    return {"test.py": {"images a second": (args.images - args.batch_size) / seconds, "share": needed / seconds}}


def main(args: argparse.Namespace) -> None:
    with cli.one_line_errors("a smaller --batch_size or --size needs less"):
        args.device = device.resolve(args.device)
        files.check_output_file("--json", args.json)
        results = benchmark_predict(args) if args.command == "predict" else benchmark_network(args)
        for name, figures in results.items():
            print(name + ": " + ", ".join(f"{label} {value:.4g}" for label, value in figures.items()))
        if args.json:
            with files.replacing(args.json) as file:
                file.write(json.dumps(results, indent=1).encode() + b"\n")


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("infer", "train", "predict"):
        command = commands.add_parser(name, formatter_class=parser.formatter_class)
        command.add_argument("--json", type=cli.path, metavar="FILE", help="write the figures there")
        command.add_argument("--repeats", type=cli.number(), default=5, help="timed turns, whose median is reported")
        command.add_argument("--sam2", default="large", choices=list(CONFIGS), help="the trunk")
        command.add_argument("--aux", default="vit_large_patch14_dinov2", help="a timm model, or none")
        command.add_argument("--aux_size", type=cli.number(), default=448, help="side of its input, px")
        command.add_argument("--size", type=cli.number(multiple=32, minimum=32), default=1024, help="of the input, px")
        command.add_argument("--batch_size", type=cli.number(), default=1, help="images at a time")
        command.add_argument("--precision", default="bf16", choices=cli.PRECISIONS[1:], help="of the fast network")
        command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... or auto")
        command.add_argument("--compile", action="store_true", help="compiled by torch as well")
        if name == "predict":
            command.add_argument("--images", type=cli.number(), default=200, help="how many")
            command.add_argument("--save", default="map", metavar="KINDS", help="what test.py writes")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
