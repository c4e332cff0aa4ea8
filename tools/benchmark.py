"""Measures seconds and memory of the network against a plain run of it.

    python tools/benchmark.py infer                 a batch through the network: plain, fp32, bf16
    python tools/benchmark.py infer --device cuda --batch_size 8 --compile
    python tools/benchmark.py train                 an optimiser step, with gradient checkpointing too
    python tools/benchmark.py train --device cuda --compile --only bf16 "bf16 compiled" --profile
    python tools/benchmark.py predict --images 50   test.py on images of 2200 x 3000: share of the network
    python tools/benchmark.py load --workers 8      how fast train.py's workers load pairs of that size

"plain" is the network in fp32, in NCHW, with the system's memory allocator; "bf16 NCHW" is bf16 in that layout. TF32 is
off except in "fp32 as train.py runs it". "compiled" is as --compile of train.py and test.py: on a GPU, as a CUDA graph;
it "pays after" so many runs or steps. Weights are random. Each measurement is a process; on a CPU the variants
alternate, and a line has the median so far. The peak memory is that of the process after loading or, on a GPU, what
torch allocated. A line is printed, and written to --json, as soon as it is measured.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import chain, repeat
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
from dataset import SegmentationDataset, epoch_batches, load
from sam2.build_sam import CONFIGS
from SAM2UNeXT import SAM2UNeXT
from unext import checkpoint, cli, device, files
from unext.errors import InputError
from unext.workers import cores

Row = tuple[str, dict[str, float]]  # what was measured, and its figures by name

LARGE = (2200, 3000)  # height, width of the images for test.py and train.py
AS_TRAINED = "fp32 as train.py runs it"
PROFILED = 5  # runs


class Measurement(NamedTuple):
    """A variant's runs in a process."""

    first: float  # seconds of the runs to warm up, which compile, choose kernels and record CUDA graphs
    seconds: list[float]  # of each further run
    peak: float  # MB, or NaN
    result: Tensor  # logits (B, 1, S, S), or loss (1)


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
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.size, args.size, generator=generator).to(args.device)
    masks = (images[:, :1] > 0).float()

    objective = train.Objective(model)
    if "compiled" in more:
        device.compile_module(model if args.command == "infer" else objective)
    if args.command == "infer":
        return torch.inference_mode()(lambda: model(images))
    optimizer, _ = train.make_optimizer(model, lr=2e-4, weight_decay=5e-4, epochs=1)
    scaler = GradScaler(torch.device(args.device).type, enabled=dtype == torch.float16)
    steps = train.train_one_epoch(objective, repeat((images, masks, ["random"])), optimizer, scaler)
    return lambda: torch.tensor([sum(next(steps).terms.values())])


def timed(function: Callable[[], object], device: str) -> float:
    """Seconds that a function takes, with the work that it leaves to a GPU."""
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(variant: str, path: Path, args: argparse.Namespace, repeats: int) -> Measurement:
    """Runs in a new process: untimed runs to warm up, then `repeats` timed ones."""
    run = prepare(variant, path, args)
    with suppress(OSError):  # on Linux, forgets the peak of loading, when the pages of the mapped file count too
        Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    result = run().cpu()
    if args.device.startswith("cuda"):  # the second run of a CUDA graph records it
        run()
        run().cpu()
    first = time.perf_counter() - start
    seconds = [timed(run, args.device) for _ in range(repeats)]
    status = Path("/proc/self/status")  # getrusage's maximum would start with the parent's
    peak = math.nan
    if args.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(args.device) / 2**20
    elif status.exists():
        peak = int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    if args.profile and variant != "plain":
        print_profile(variant, run, args.device)
    return Measurement(first, seconds, peak, result)


def print_profile(variant: str, run: Callable[[], object], device: str) -> None:
    """Prints the operations and kernels that take most of the time."""
    with torch.profiler.profile() as profile:
        for _ in range(PROFILED):
            timed(run, device)
    key = "self_cuda_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    table = profile.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=80)
    print(f"{variant}, {PROFILED} runs:\n{table}", flush=True)


def variants_of(args: argparse.Namespace) -> list[str]:
    """The variants that a command compares, plain first."""
    gpu, fast = args.device.startswith("cuda"), args.precision
    variants = ["plain", *([] if gpu else ["fp32"]), fast]
    if args.compile:
        variants += [f"{fast} compiled" if gpu else "fp32 compiled"]
    if args.command == "train":
        variants += [f"{fast} checkpointed"]
    if args.command == "train" and args.compile and gpu:
        variants += [f"{fast} compiled checkpointed"]
    variants += [f"{fast} NCHW"]
    if args.command == "infer" and gpu:
        variants += [AS_TRAINED]
    variants = [*dict.fromkeys(variants)]
    if unknown := {*args.only} - {*variants}:
        raise InputError(f"--only {min(unknown)!r}: there are {', '.join(variants)}")
    return [variant for variant in variants if variant == "plain" or not args.only or variant in args.only]


def benchmark_network(args: argparse.Namespace) -> Iterator[Row]:
    """The figures of inference or of a training step, for each variant."""
    gpu = args.device.startswith("cuda")
    rounds, repeats = (1, args.repeats) if gpu else (args.repeats, 1)  # only a CPU's speed drifts
    measured: dict[str, list[Measurement]] = {variant: [] for variant in variants_of(args)}
    with tempfile.TemporaryDirectory() as folder:
        path = write_checkpoint(folder, args)
        for variant in [*measured] * rounds:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                measured[variant].append(process.submit(measure, variant, path, args, repeats).result())
            yield variant, figures_of(variant, measured)


def figures_of(variant: str, measured: dict[str, list[Measurement]]) -> dict[str, float]:
    """The figures of a variant's runs so far, against those of "plain" and, if compiled, of the same uncompiled."""

    def seconds(variant: str) -> float:
        return statistics.median(chain.from_iterable(run.seconds for run in measured[variant]))

    runs, plain, eager = measured[variant], measured["plain"], variant.replace(" compiled", "")
    figures = {"s": seconds(variant), "times as fast": seconds("plain") / seconds(variant)}
    figures |= {"first s": runs[0].first, "peak MB": max(run.peak for run in runs)}
    figures["of the plain peak"] = figures["peak MB"] / max(run.peak for run in plain)
    difference = (runs[0].result - plain[0].result).abs().max()
    figures["largest difference"] = (difference / plain[0].result.abs().max()).item()
    if measured.get(eager) and (gain := seconds(eager) - seconds(variant)) > 0 and eager != variant:
        figures["pays after"] = max(0, math.ceil((runs[0].first - measured[eager][0].first) / gain))
    return figures


def large_files(folder: str, name: str, extension: str, pixels: np.ndarray, count: int) -> list[Path]:
    """Links to one image of LARGE size, in a folder of that name."""
    paths = [Path(folder, name, f"{i}{extension}") for i in range(count)]
    paths[0].parent.mkdir()
    cv2.imwrite(str(paths[0]), cv2.resize(pixels, LARGE[::-1]))
    for path in paths[1:]:
        os.link(paths[0], path)
    return paths


def noise() -> np.ndarray:
    """Pixels (H, W, 3) that become coarse colours at LARGE size."""
    return np.random.default_rng(0).integers(0, 256, (LARGE[0] // 8, LARGE[1] // 8, 3), np.uint8)


def benchmark_predict(args: argparse.Namespace) -> Iterator[Row]:
    """test.py on large JPEG files: images a second, and the network's share. It is timed at the start and the end.

    "read s" and "write s" are what an image takes one thread, alone; --workers threads read, and as many write.
    """
    if args.images <= args.batch_size:
        raise InputError(f"--images {args.images}: give more than the first batch, which does not count")
    ends: list[float] = []  # when each batch ended
    alone: list[float] = []  # seconds that the network takes for the first batch
    first: list = []  # its arguments
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
        images = large_files(folder, "images", ".jpg", noise(), args.images)[0].parent
        options = ["--checkpoint", write_checkpoint(folder, args), "--test_image_path", images]
        options += ["--save_path", f"{folder}/maps", "--save", args.save, "--batch_size", args.batch_size]
        options += ["--precision", args.precision, "--device", args.device, *(["--compile"] if args.compile else [])]
        test_args = test.get_args_parser().parse_args([str(option) for option in options])
        with mock.patch.object(test, "predict_batch", predict):
            test.main(test_args)
        seconds = time.perf_counter() - ends[0]
        time_network()
        model, [sample, *_] = first[:2]

        def time_of(function: Callable[[], object]) -> float:
            return statistics.median(timed(function, args.device) for _ in range(args.repeats))

        read = time_of(lambda: test.read(sample.task, model.size, sample.image is not None))
        write = time_of(lambda: test.finish(disc[None, None], sample, test_args))
    network = statistics.median(alone)
    figures = {"images a second": (args.images - args.batch_size) / seconds}
    figures |= {"share": (len(ends) - 1) * network / seconds, "network s": network / args.batch_size}
    yield "test.py", figures | {"read s": read, "write s": write}


def benchmark_load(args: argparse.Namespace) -> Iterator[Row]:
    """train.py's loading of large JPEG files and their masks: pairs a second.

    The first batches do not count: the workers load two each before the first is taken.
    """
    ahead = 2 * args.workers + 1
    if args.images <= ahead * args.batch_size:
        raise InputError(f"--images {args.images}: give more than {ahead * args.batch_size}, which do not count")
    disc = cv2.circle(np.zeros(LARGE, np.uint8), (LARGE[1] // 2, LARGE[0] // 2), LARGE[0] // 3, 255, -1)
    with tempfile.TemporaryDirectory() as folder:
        images = large_files(folder, "images", ".jpg", noise(), args.images)
        masks = large_files(folder, "masks", ".png", disc, args.images)
        dataset = SegmentationDataset([*zip(images, masks, strict=True)], args.size, seed=0)
        keys = epoch_batches(len(images), args.batch_size, 0, [1])
        batches = load(dataset, keys, args.workers, per_step=1, pin=args.device.startswith("cuda"))
        for _ in range(ahead):
            next(batches)
        start = time.perf_counter()
        count = sum(len(images) for images, *_ in batches)
        yield files.count(args.workers, "worker"), {"pairs a second": count / (time.perf_counter() - start)}


COMMANDS = {
    "infer": benchmark_network, "train": benchmark_network, "predict": benchmark_predict, "load": benchmark_load,
}  # fmt: skip


def main(args: argparse.Namespace) -> None:
    cli.end_on_signals()
    with cli.one_line_errors("a smaller --batch_size or --size needs less") as command:
        args.device = device.resolve(args.device)
        files.check_output_file("--json", args.json)
        results = {}
        for name, figures in COMMANDS[args.command](args):
            command.started()
            results[name] = figures
            print(name + ": " + ", ".join(f"{label} {value:.4g}" for label, value in figures.items()), flush=True)
            if args.json:
                files.write_json(args.json, results)


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in COMMANDS:
        command = commands.add_parser(name, formatter_class=parser.formatter_class)
        command.add_argument("--json", type=cli.path, metavar="FILE", help="write the figures there")
        cli.add_network(command, CONFIGS)
        command.add_argument("--batch_size", type=cli.number(), default=1, help="images at a time")
        command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... or auto")
        if name in ("predict", "load"):
            command.add_argument("--images", type=cli.number(), default=200, help="the first ones do not count")
        if name == "load":
            workers = "processes that read images"
            command.add_argument("--workers", type=cli.number(minimum=0), default=min(8, cores()), help=workers)
            continue
        command.add_argument("--repeats", type=cli.number(), default=5, help="timed runs, whose median is reported")
        command.add_argument("--precision", default="bf16", choices=cli.PRECISIONS[1:], help="of the fast network")
        command.add_argument("--compile", action="store_true", help="compiled by torch as well")
        if name == "predict":
            command.add_argument("--save", default="map", metavar="KINDS", help="what test.py writes")
        else:
            command.add_argument("--only", nargs="+", default=[], metavar="LINE", help="these lines, and plain")
            command.add_argument("--profile", action="store_true", help="print what takes most of the time")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
