"""Measures seconds and memory of the network against a plain run of it.

    python tools/benchmark.py infer                 a batch through the network: plain, fp32, bf16
    python tools/benchmark.py infer --device cuda --batch_size 8 --compile
    python tools/benchmark.py train                 an optimiser step, with gradient checkpointing too
    python tools/benchmark.py predict --images 50   test.py on images of 2200 x 3000: share of the network
    python tools/benchmark.py predict --save cutout the same with cutouts

"plain" is the network in fp32, in NCHW, with the system's memory allocator; "NCHW" is the variant before it in that
layout. TF32 is off but in "fp32 as train.py runs it" (and test.py), where torch's default lets cuDNN's convolutions use
it. Weights are random. Each measurement is a process; on a CPU the variants alternate, and the peak memory is that of
the process after loading, on a GPU that which torch allocated. Prints medians and ratios; `--json FILE` writes them.
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

Figures = dict[str, dict[str, float]]  # variant -> figure -> value

LARGE = (2200, 3000)  # height, width of the images for test.py
AS_TRAINED = "fp32 as train.py runs it"


class Measurement(NamedTuple):
    """The figures of one process."""

    seconds: list[float]
    peak_mb: float  # NaN where the system does not tell
    result: Tensor  # logits (B, 1, S, S) or loss (1)


def write_checkpoint(folder: str, args: argparse.Namespace) -> Path:
    """A checkpoint of the network with random weights, for all variants."""
    path = Path(folder, "random.pth")
    model = SAM2UNeXT(sam2=args.sam2, aux=args.aux, aux_size=args.aux_size, size=args.size)
    checkpoint.save_network(path, model, epoch=1)
    return path


def prepare(command: str, variant: str, path: Path, args: argparse.Namespace) -> Callable[[], Tensor]:
    """A function that runs `infer` or `train` once, in a variant such as "bf16 compiled"; it returns logits or loss."""
    precision, *more = variant.split()
    if precision != "plain":
        device.keep_freed_memory(args.device)
    torch.backends.cudnn.allow_tf32 = variant == AS_TRAINED  # off for matrix products by default
    dtype = device.precision("fp32" if precision == "plain" else precision, args.device)
    model = SAM2UNeXT.from_checkpoint(path, precision=dtype)
    if precision == "plain" or "NCHW" in more:
        model.to(memory_format=torch.contiguous_format)
    model.to(args.device).sam.grad_checkpointing = "checkpointed" in more
    if "compiled" in more:
        # With CUDA graphs, a result is valid until the next call only.
        model.compile(mode="reduce-overhead" if "graphs" in more else None)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.size, args.size, generator=generator).to(args.device)
    masks = (images[:, :1] > 0).float()

    if command == "infer":
        return torch.inference_mode()(lambda: model(images))
    optimizer, _ = train.make_optimizer(model, lr=2e-4, weight_decay=5e-4, epochs=1)
    scaler = GradScaler(torch.device(args.device).type, enabled=dtype == torch.float16)

    def train_step() -> Tensor:
        [step] = train.train_one_epoch(model, [(images, masks, ["random"])], optimizer, scaler)
        return torch.tensor([sum(step.terms.values())])

    return train_step


def soft_disc(side: int) -> np.ndarray:
    """The probability of a disc with a soft edge, float32 (S, S); random weights predict no object to cut out."""
    y, x = np.mgrid[-1 : 1 : 1j * side, -1 : 1 : 1j * side]
    return (1 / (1 + np.exp(100 * (np.hypot(y, x) - 0.8)))).astype(np.float32)


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds that a function takes, with the work that it leaves to a GPU."""
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(command: str, variant: str, path: Path, args: argparse.Namespace, repeats: int) -> Measurement:
    """Runs in a new process: `repeats` timed runs after a first that does not count."""
    run = prepare(command, variant, path, args)
    with suppress(OSError):  # on Linux, forgets the peak of loading, when the pages of the mapped file count too
        Path("/proc/self/clear_refs").write_text("5")
    result = run().cpu()
    seconds = [timed(run, args.device) for _ in range(repeats)]
    if args.device.startswith("cuda"):
        return Measurement(seconds, torch.cuda.max_memory_allocated(args.device) / 2**20, result)
    status = Path("/proc/self/status")  # getrusage's maximum would start with the parent's
    peak_mb = int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.exists() else math.nan
    return Measurement(seconds, peak_mb, result)


def benchmark_network(args: argparse.Namespace) -> Figures:
    """Seconds, memory and differences from the plain result of inference or a training step, for each variant."""
    gpu = args.device.startswith("cuda")
    variants = dict.fromkeys(["plain", *([] if gpu else ["fp32"]), args.precision, f"{args.precision} NCHW"])
    if args.command == "infer" and gpu:
        variants[AS_TRAINED] = None
    if args.command == "train":
        variants[f"{args.precision} checkpointed"] = None
    if args.compile:
        variants[f"{args.precision if gpu else 'fp32'} compiled"] = None
    if args.compile and args.command == "infer" and gpu:
        variants[f"{args.precision} compiled graphs"] = None
    rounds, repeats = (1, args.repeats) if gpu else (args.repeats, 1)  # only a CPU's speed drifts
    measured: dict[str, list[Measurement]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(folder, args)
        for variant in [*variants] * rounds:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                measured[variant].append(process.submit(measure, args.command, variant, path, args, repeats).result())
    results: Figures = {}
    for variant, runs in measured.items():
        seconds, peak = statistics.median(s for run in runs for s in run.seconds), max(run.peak_mb for run in runs)
        plain = results.get("plain", {"s": seconds, "peak MB": peak})
        expected = measured["plain"][0].result
        results[variant] = {
            "s": seconds,
            "times as fast": plain["s"] / seconds,
            "peak MB": peak,
            "of the plain peak": peak / plain["peak MB"],
            "largest difference": ((runs[0].result - expected).abs().max() / expected.abs().max()).item(),
        }
    return results


def benchmark_predict(args: argparse.Namespace) -> Figures:
    """test.py on large JPEG files: images a second, and the share of the time that the network itself takes.

    Its time is measured after the first batch and after the last.
    """
    if args.images <= args.batch_size:
        raise InputError(f"--images {args.images}: give more than one batch, the first does not count")
    ends: list[float] = []  # when each call ended
    last: deque[tuple] = deque(maxlen=1)  # its arguments
    alone: list[float] = []  # seconds of the network by itself
    predict_batch = test.predict_batch

    def predict(*batch: object) -> Tensor:
        logits = predict_batch(*batch) * 0 + disc
        last.append(batch)
        if not ends:  # the first call compiled and chose kernels
            measure_alone()
        ends.append(time.perf_counter())
        return logits

    def measure_alone() -> None:
        alone.extend([timed(lambda: predict_batch(*last[0]), args.device) for _ in range(args.repeats + 1)][1:])

    disc = torch.from_numpy(soft_disc(args.size)).logit(1e-6).to(args.device)
    with tempfile.TemporaryDirectory() as folder:
        (images := Path(folder, "images")).mkdir()
        noise = np.random.default_rng(0).integers(0, 256, (LARGE[0] // 8, LARGE[1] // 8, 3), np.uint8)
        cv2.imwrite(str(images / "0.jpg"), cv2.resize(noise, LARGE[::-1]))
        for i in range(1, args.images):
            os.link(images / "0.jpg", images / f"{i}.jpg")
        options = ["--checkpoint", write_checkpoint(folder, args), "--test_image_path", images]
        options += ["--save_path", f"{folder}/maps", "--save", args.save, "--batch_size", args.batch_size]
        options += ["--precision", args.precision, "--device", args.device, *(["--compile"] if args.compile else [])]
        with mock.patch.object(test, "predict_batch", predict):
            test.main(test.get_args_parser().parse_args([str(option) for option in options]))
        seconds = time.perf_counter() - ends[0]
        measure_alone()
        network = (len(ends) - 1) * statistics.median(alone)
    return {"test.py": {"images a second": (args.images - args.batch_size) / seconds, "share": network / seconds}}


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
        command.add_argument("--repeats", type=cli.number(), default=5, help="timed runs, whose median is reported")
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
