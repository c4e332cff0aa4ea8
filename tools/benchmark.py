"""Measures seconds and memory of the network against a plain run of it.

    python tools/benchmark.py infer                 a batch through the network: plain, fp32, bf16
    python tools/benchmark.py infer --device cuda --batch_size 8 --compile
    python tools/benchmark.py train                 an optimiser step, with gradient checkpointing too
    python tools/benchmark.py predict --images 50   test.py on images of 2200 x 3000: share of the network

"plain" is the network in fp32, in NCHW, with the system's memory allocator; "bf16 NCHW" is bf16 in that layout. TF32 is
off except in "fp32 as train.py runs it". Weights are random. Each measurement is a process; on a CPU the variants
alternate. The peak memory is that of the process after loading or, on a GPU, what torch allocated.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
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

Figures = dict[str, dict[str, float]]  # variant -> figure -> value

LARGE = (2200, 3000)  # height, width of the images for test.py
AS_TRAINED = "fp32 as train.py runs it"
Measurement = tuple[list[float], float, Tensor]  # seconds, peak in MB (or NaN), logits (B, 1, S, S) or loss (1)


def write_checkpoint(folder: str, args: argparse.Namespace) -> Path:
    """A checkpoint of the network with random weights, for all variants."""
    path = Path(folder, "random.pth")
    options = cli.options_of(SAM2UNeXT, args) | {"precision": torch.float32}
    checkpoint.save_network(path, SAM2UNeXT(**options), epoch=1)
    return path


def prepare(variant: str, path: Path, args: argparse.Namespace) -> Callable[[], Tensor]:
    """A function that runs the command once, in a variant such as "bf16 compiled", and returns logits or loss."""
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

    if args.command == "infer":
        return torch.inference_mode()(lambda: model(images))
    optimizer, _ = train.make_optimizer(model, lr=2e-4, weight_decay=5e-4, epochs=1)
    scaler = GradScaler(torch.device(args.device).type, enabled=dtype == torch.float16)

    def train_step() -> Tensor:
        [step] = train.train_one_epoch(model, [(images, masks, ["random"])], optimizer, scaler)
        return torch.tensor([sum(step.terms.values())])

    return train_step


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds that a function takes, with the work that it leaves to a GPU."""
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(variant: str, path: Path, args: argparse.Namespace, repeats: int) -> Measurement:
    """Runs in a new process: `repeats` timed runs after a warm-up run."""
    run = prepare(variant, path, args)
    with suppress(OSError):  # on Linux, forgets the peak of loading, when the pages of the mapped file count too
        Path("/proc/self/clear_refs").write_text("5")
    result = run().cpu()
    seconds = [timed(run, args.device) for _ in range(repeats)]
    if args.device.startswith("cuda"):
        return seconds, torch.cuda.max_memory_allocated(args.device) / 2**20, result
    status = Path("/proc/self/status")  # getrusage's maximum would start with the parent's
    peak_mb = int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.exists() else math.nan
    return seconds, peak_mb, result


def benchmark_network(args: argparse.Namespace) -> Figures:
    """The figures of inference or of a training step, for each variant."""
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
                measured[variant].append(process.submit(measure, variant, path, args, repeats).result())
    figures: Figures = {}
    for variant, runs in measured.items():
        seconds, peaks, results = zip(*runs, strict=True)
        figures[variant] = row = {"s": statistics.median(chain(*seconds))}
        row["times as fast"] = figures["plain"]["s"] / row["s"]
        row["peak MB"] = max(peaks)
        row["of the plain peak"] = row["peak MB"] / figures["plain"]["peak MB"]
        expected = measured["plain"][0][2]
        row["largest difference"] = ((results[0] - expected).abs().max() / expected.abs().max()).item()
    return figures


def benchmark_predict(args: argparse.Namespace) -> Figures:
    """test.py on large JPEG files: images a second, and the network's share. It is timed at the start and the end."""
    ends: list[float] = []  # when each batch ended
    alone: list[float] = []  # seconds that the network takes for the first batch
    first: list[object] = []  # its arguments
    predict_batch = test.predict_batch

    def time_network() -> None:
        alone.extend([timed(lambda: predict_batch(*first), args.device) for _ in range(args.repeats + 1)][1:])

    def predict(*batch: object) -> Tensor:
        logits = predict_batch(*batch) * 0 + disc
        if not ends:  # this call compiled and chose kernels
            first.extend(batch)
            time_network()
        ends.append(time.perf_counter())
        return logits

    # Random weights predict no object to cut out: these are the logits (S, S) of a disc with a soft edge.
    y, x = np.mgrid[-1 : 1 : 1j * args.size, -1 : 1 : 1j * args.size]
    disc = torch.from_numpy(100 * (0.8 - np.hypot(y, x))).float().clamp(-14, 14).to(args.device)
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
        time_network()
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
            files.write_json(args.json, results)


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("infer", "train", "predict"):
        command = commands.add_parser(name, formatter_class=parser.formatter_class)
        command.add_argument("--json", type=cli.path, metavar="FILE", help="write the figures there")
        command.add_argument("--repeats", type=cli.number(), default=5, help="timed runs, whose median is reported")
        cli.add_network(command, CONFIGS)
        command.add_argument("--batch_size", type=cli.number(), default=1, help="images at a time")
        command.add_argument("--precision", default="bf16", choices=cli.PRECISIONS[1:], help="of the fast network")
        command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... or auto")
        command.add_argument("--compile", action="store_true", help="compiled by torch as well")
        if name == "predict":
            command.add_argument("--images", type=cli.number(), default=200, help="the first batch does not count")
            command.add_argument("--save", default="map", metavar="KINDS", help="what test.py writes")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
