"""Times what this project does against the plain way, interleaved in one run.

    python tools/benchmark.py infer                 a batch through the network: plain, fp32, bf16; seconds, memory
    python tools/benchmark.py infer --device cuda --batch_size 8 --compile
    python tools/benchmark.py train                 an optimiser step, with gradient checkpointing too
    python tools/benchmark.py largest --memory 24   the largest batch whose training step so many GB of a GPU hold
    python tools/benchmark.py start                 from files of weights to a network that is ready
    python tools/benchmark.py predict --pictures 50 test.py over pictures of 2200 x 3000: how long the network waits
    python tools/benchmark.py eval                  pysodmetrics against metrics.score, in memory, one thread each
    python tools/benchmark.py eval --files 60       also eval.py over that many files of 2200 x 3000: workers, memory

The plain way is the published program's arithmetic (tools/plain.py): fp32, eager, without TF32. Weights are random.
Prints medians and ratios; `--json FILE` writes them too. Peak memory is, on a CPU, all that a process held that did
nothing else; on a GPU, what torch had allocated for this way of doing it.
"""

import argparse
import gc
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402
import cli  # noqa: E402
import metrics  # noqa: E402
import test  # noqa: E402
import train  # noqa: E402
from sam2.build_sam import CONFIGS  # noqa: E402
from SAM2UNeXT import SAM2UNeXT  # noqa: E402
from tools.plain import PlainNetwork  # noqa: E402

Figures = dict[str, dict[str, float]]  # by what was done, then by name

SIZES = ((1024, 1024), (2200, 3000))  # height, width
TRAINED = "trained.pt"
DISTINCT = 6  # pairs that the files of one run repeat
BATCHES = range(1, 49)  # that `largest` tries


def interleaved(repeats: int, **ways: Callable[[], object]) -> dict[str, float]:
    """The median seconds of each way of doing a thing, taken in turns, after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def generate_pair(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A soft, noisy prediction map and its ground truth, an object with thin parts as in DIS5K: uint8 (H, W) each."""
    rng = np.random.default_rng(seed)
    truth = np.zeros((height, width), np.uint8)
    centre = (int(width * rng.uniform(0.4, 0.6)), int(height * rng.uniform(0.4, 0.6)))
    cv2.ellipse(truth, centre, (width // 4, height // 4), rng.uniform(0, 180), 0, 360, 255, -1)
    for _ in range(25):
        end = (int(rng.integers(width)), int(rng.integers(height)))
        cv2.line(truth, centre, end, int(rng.choice([0, 255])), int(rng.integers(3, 12)))
    soft = cv2.GaussianBlur(truth, (0, 0), 5).astype(np.int16)
    return np.clip(soft + rng.integers(-15, 16, truth.shape), 0, 255).astype(np.uint8), truth


def benchmark_scores(repeats: int) -> Figures:
    """The library against `metrics.score` on one pair of each size, one thread each."""
    cv2.setNumThreads(1)
    results = {}
    for height, width in SIZES:
        pair = generate_pair(height, width, seed=0)
        library, ours = metrics.score_with_pysodmetrics(*pair).figures(), metrics.score(*pair).figures()
        seconds = interleaved(
            repeats,
            pysodmetrics=lambda pair=pair: metrics.score_with_pysodmetrics(*pair),
            fast=lambda pair=pair: metrics.score(*pair),
        )
        results[f"{height} x {width}"] = {
            "pysodmetrics s": seconds["pysodmetrics"],
            "fast s": seconds["fast"],
            "ratio": seconds["pysodmetrics"] / seconds["fast"],
            "largest difference": max(abs(library[name] - ours[name]) for name in library),
        }
    return results


def peak_memory(command: list[str]) -> float:
    """Runs a command; the megabytes that the largest of its processes held at its peak."""
    watch = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    watch += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"  # kB on Linux
    # By way of a small process: a new one starts with its parent's size, which counts.
    output = subprocess.run([sys.executable, "-c", watch, *command], check=True, capture_output=True, text=True).stdout
    return int(output) / 1024


def benchmark_files(files: int, repeats: int) -> Figures:
    """eval.py, the whole command, over files of the largest size: one worker against two, and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("maps", "masks"):
            (root / name).mkdir()
        for i in range(files):
            pair = generate_pair(*SIZES[-1], i) if i < DISTINCT else (None, None)
            for name, array in zip(("maps", "masks"), pair, strict=True):
                if array is None:
                    os.link(root / name / f"{i % DISTINCT}.png", root / name / f"{i}.png")
                else:
                    cv2.imwrite(str(root / name / f"{i}.png"), array)

        def run(workers: int) -> float:
            options = f"--dataset_name set --pred_path {root}/maps --gt_path {root}/masks --workers {workers}"
            return peak_memory([sys.executable, str(ROOT / "eval.py"), *options.split()])

        peak = run(2)
        seconds = interleaved(repeats, one=lambda: run(1), two=lambda: run(2))
    return {
        f"eval.py, {files} files": {
            "1 worker s": seconds["one"],
            "2 workers s": seconds["two"],
            "ratio": seconds["one"] / seconds["two"],
            "peak MB a worker": peak,
        }
    }


@contextmanager
def weight_files(args: argparse.Namespace) -> Iterator[list[str]]:
    """Files of random weights while the context lasts: SAM 2's and the auxiliary encoder's in the shape of the
    published ones, and beside them trained.pt with all else.
    """
    model = SAM2UNeXT(**options(args))
    trunk = {
        checkpoint.TRUNK + re.sub(r"[.]block[.]", ".", key): value for key, value in model.sam.state_dict().items()
    }
    contents = {"sam2.pt": {"model": {key: value for key, value in trunk.items() if ".prompt_learn." not in key}}}
    if model.dino is not None:
        contents["aux.pt"] = model.dino.model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        for name, content in (contents | {TRAINED: model.trained_state()}).items():
            torch.save(content, Path(folder, name))
        yield [str(Path(folder, name)) for name in contents]


def options(args: argparse.Namespace) -> dict[str, str | int]:
    return {"sam2": args.sam2, "aux": args.aux, "aux_size": args.aux_size, "size": args.size}


def build(way: str, paths: list[str], args: argparse.Namespace) -> nn.Module:
    """The network of one way: "plain", or a precision, perhaps with "checkpointed", "compiled", "graphs" behind it."""
    precision, *more = way.split()
    model = plain_start(paths, args) if precision == "plain" else SAM2UNeXT(*paths, **options(args))
    model.load_state_dict(torch.load(Path(paths[0]).with_name(TRAINED), weights_only=True), strict=False)
    if precision == "plain":
        return PlainNetwork(model.to(args.device))
    model.set_precision(cli.precision(precision, args.device)).to(args.device)
    model.sam.grad_checkpointing = "checkpointed" in more
    if "compiled" in more:
        # With CUDA graphs a call's result lasts until the next call only.
        model.compile(mode="reduce-overhead" if "graphs" in more else None)
    return model


def plain_start(paths: list[str], args: argparse.Namespace) -> SAM2UNeXT:
    """A network made the simple way: all of it filled with random values, files read into memory and copied from."""
    model = SAM2UNeXT(**options(args))
    trunk = torch.load(paths[0], weights_only=True)["model"]
    for i, adapter in enumerate(model.sam.blocks):
        prefix = f"{checkpoint.TRUNK}blocks.{i}."
        adapter.block.load_state_dict(
            {key.removeprefix(prefix): trunk.pop(key) for key in [*trunk] if key.startswith(prefix)}
        )
    model.sam.load_state_dict({key.removeprefix(checkpoint.TRUNK): value for key, value in trunk.items()}, strict=False)
    for path in paths[1:]:
        model.dino.model.load_state_dict(torch.load(path, weights_only=True))
    return model


def prepare(command: str, way: str, paths: list[str], args: argparse.Namespace) -> Callable[[], Tensor]:
    """What does the work of `infer` or `train` once, in one way, and waits for it; it gives the logits (B, 1, S, S),
    where they were made, or the loss (1).
    """
    torch.backends.cudnn.allow_tf32 = False  # matrices have none unless asked
    network = build(way, paths, args)
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.size, args.size).to(args.device)
    masks = (images[:, :1] > 0).float()

    @torch.inference_mode()
    def infer() -> Tensor:
        logits = network(images)
        wait_for(args.device)
        return logits

    def step() -> Tensor:
        (figures,) = train.train_one_epoch(network, [(images, masks, ["random"])], optimizer, scaler)
        wait_for(args.device)
        return torch.tensor([figures["bce"] + figures["wiou"]])

    if command == "infer":
        network.eval()
        return infer
    optimizer, _ = train.make_optimizer(network, lr=2e-4, weight_decay=5e-4, epochs=1)
    scaler = GradScaler(torch.device(args.device).type, enabled=way.startswith("fp16"))
    return step


def wait_for(device: str) -> None:
    """Returns when a GPU is done with all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def measure_memory(command: str, way: str, paths: list[str], args: argparse.Namespace) -> float:
    """Megabytes that this process, which does nothing else, held at its peak after doing the work twice."""
    work = prepare(command, way, paths, args)
    for _ in range(2):
        work()
    status = Path("/proc/self/status").read_text()  # not getrusage's figure, which starts with the parent's
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def benchmark_network(args: argparse.Namespace) -> Figures:
    """Inference or a training step in all ways: seconds, memory, and how far results are from the plain ones."""
    gpu = args.device.startswith("cuda")
    ways = ["plain", "fp32"] + ([args.precision] if args.precision != "fp32" else [])
    if args.command == "train":
        ways.append(f"{args.precision} checkpointed")
    if args.compile:
        ways.append(f"{args.precision if gpu else 'fp32'} compiled")
    if args.compile and args.command == "infer" and gpu:
        ways.append(f"{args.precision} compiled graphs")
    works, results, memory = {}, {}, {}
    with weight_files(args) as paths:
        for way in ways:
            if gpu:
                before = torch.cuda.memory_allocated(args.device)
                torch.cuda.reset_peak_memory_stats(args.device)
            else:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    memory[way] = process.submit(measure_memory, args.command, way, paths, args).result()
            works[way] = prepare(args.command, way, paths, args)
            results[way] = works[way]().cpu()
            if gpu:
                works[way]()
                memory[way] = (torch.cuda.max_memory_allocated(args.device) - before) / 2**20
    seconds = interleaved(args.repeats, **works)
    greatest = results["plain"].abs().max()
    return {
        way: {
            "s": seconds[way],
            "times as fast": seconds["plain"] / seconds[way],
            "peak MB": memory[way],
            "of the plain peak": memory[way] / memory["plain"],
            "largest difference": ((results[way] - results["plain"]).abs().max() / greatest).item(),
        }
        for way in ways
    }


def largest_batch(way: str, paths: list[str], batches: Sequence[int], args: argparse.Namespace) -> dict[str, float]:
    """In a process of its own: the largest of these batches whose training step fits, its seconds and its memory."""
    total = torch.cuda.get_device_properties(args.device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory * 1e9 / total), args.device)
    found: dict[str, float] = {"batch": 0}

    def is_too_large(batch: int) -> bool:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(args.device)
        args.batch_size = batch
        try:
            seconds = interleaved(args.repeats, step=prepare("train", way, paths, args))["step"]
        except torch.OutOfMemoryError:
            return True
        peak = torch.cuda.max_memory_allocated(args.device) / 2**20
        found.update({"batch": batch, "s": seconds, "pictures a second": batch / seconds, "peak MB": peak})
        return False

    bisect_left(batches, True, key=is_too_large)
    return found


def benchmark_largest(args: argparse.Namespace) -> Figures:
    """The largest batch that so many GB hold, in all ways; the compiled one is tried with that of the eager one."""
    if not args.device.startswith("cuda"):
        raise ValueError(f"--device {args.device}: the memory of GPUs alone can be limited; give cuda")
    compiled = f"{args.precision} compiled"
    ways = dict.fromkeys(["fp32", args.precision, f"{args.precision} checkpointed"] + [compiled] * args.compile)
    results: Figures = {}
    with weight_files(args) as paths:
        for way in ways:
            batches = [results[args.precision]["batch"]] if way == compiled else BATCHES
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                results[way] = process.submit(largest_batch, way, paths, batches, args).result()
    return results


def benchmark_start(args: argparse.Namespace) -> Figures:
    """From local files of weights to a network that is ready, imports excluded."""
    with weight_files(args) as paths:
        plain, fast = plain_start(paths, args).state_dict(), SAM2UNeXT(*paths, **options(args)).state_dict()
        frozen = [key for key in fast if key.startswith(("sam.", "dino.")) and ".prompt_learn." not in key]
        difference = max((plain[key] - fast[key]).abs().max().item() for key in frozen)
        seconds = interleaved(
            args.repeats, plain=lambda: plain_start(paths, args), fast=lambda: SAM2UNeXT(*paths, **options(args))
        )
    ratio = {"times as fast": seconds["plain"] / seconds["fast"], "largest difference": difference}
    return {"plain": {"s": seconds["plain"]}, "fast": {"s": seconds["fast"]} | ratio}


class Clock:
    """A network that notes how long it computes, but for the first call, which compiles and chooses kernels."""

    def __init__(self, network: nn.Module):
        self.network = network
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.seconds = 0.0
        self.calls = 0
        self.start: float | None = None  # when the first call was done
        self.images: Tensor | None = None  # of the last call

    def __getattr__(self, name: str) -> object:
        return getattr(self.network, name)

    def __call__(self, images: Tensor) -> Tensor:
        if self.start is None:
            logits = self.network(images)
            wait_for(str(images.device))
            self.start = time.perf_counter()
            return logits
        self.calls, self.images = self.calls + 1, images
        if not images.is_cuda:
            start = time.perf_counter()
            logits = self.network(images)
            self.seconds += time.perf_counter() - start
            return logits
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        logits = self.network(images)
        events[1].record()
        self.events.append(events)
        return logits

    def busy(self) -> float:
        """Seconds of all calls together. On a GPU also those in which it waited for Python within a call."""
        for _, end in self.events:
            end.synchronize()
        return self.seconds + sum(start.elapsed_time(end) / 1000 for start, end in self.events)

    @torch.inference_mode()
    def undisturbed(self, repeats: int) -> float:
        """Seconds that the calls would take with nothing else going on."""

        def call() -> None:
            self.network(self.images)
            wait_for(str(self.images.device))

        return self.calls * interleaved(repeats, call=call)["call"]


def benchmark_predict(args: argparse.Namespace) -> Figures:
    """test.py over large JPEG files: pictures a second, and the share of the time in which the network computes.

    What it would need with nothing else going on is the share that counts: whatever is above it, it waits, be it for
    pictures or, within a call, for threads that hold Python back.
    """
    if args.pictures <= args.batch_size:
        raise ValueError(f"--pictures {args.pictures}: more than one batch is needed, the first does not count")
    with tempfile.TemporaryDirectory() as folder:
        (images := Path(folder, "images")).mkdir()
        rng = np.random.default_rng(0)
        for i in range(args.pictures):
            if i < DISTINCT:
                small = rng.integers(0, 256, (SIZES[-1][0] // 8, SIZES[-1][1] // 8, 3), np.uint8)
                cv2.imwrite(str(images / f"{i}.jpg"), cv2.resize(small, SIZES[-1][::-1]))
            else:
                os.link(images / f"{i % DISTINCT}.jpg", images / f"{i}.jpg")
        checkpoint.save_network(Path(folder, "random.pth"), SAM2UNeXT(**options(args)), epoch=1)
        clock = Clock(SAM2UNeXT.from_checkpoint(f"{folder}/random.pth"))
        words = ["--checkpoint", f"{folder}/random.pth", "--test_image_path", images, "--save_path", f"{folder}/maps"]
        words += ["--batch_size", args.batch_size, "--precision", args.precision, "--device", args.device]
        words += ["--compile"] if args.compile else []
        commands = test.get_args_parser().parse_args([str(word) for word in words])
        with mock.patch.object(test.SAM2UNeXT, "from_checkpoint", lambda *paths: clock):
            test.main(commands)
        seconds = time.perf_counter() - clock.start
    return {
        "test.py": {
            "pictures a second": (args.pictures - args.batch_size) / seconds,
            "share of the time in the network": clock.busy() / seconds,
            "share that it needs undisturbed": clock.undisturbed(args.repeats) / seconds,
        }
    }


def main(args: argparse.Namespace) -> None:
    with cli.exit_on_error(cli.NOTHING_STARTED, "a smaller --batch_size or --size needs less"):
        if args.command == "eval":
            results = benchmark_scores(args.repeats) | (benchmark_files(args.files, args.repeats) if args.files else {})
        else:
            args.device = cli.device(args.device)
            others = {"start": benchmark_start, "predict": benchmark_predict, "largest": benchmark_largest}
            results = others.get(args.command, benchmark_network)(args)
    for name, figures in results.items():
        print(name + ": " + ", ".join(f"{label} {value:.4g}" for label, value in figures.items()))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    helps = {
        "infer": "a batch through the network",
        "train": "an optimiser step",
        "largest": "the largest batch of an optimiser step that memory holds",
        "start": "from files of weights to a network",
        "predict": "test.py over large pictures",
        "eval": "the nine metrics",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text, formatter_class=parser.formatter_class)
        command.add_argument("--repeats", type=cli.number(), default=5, help="timed turns; the median counts")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
        if name == "eval":
            command.add_argument("--files", type=cli.number(least=0), default=0, help="for eval.py; 0: leave that out")
            continue
        command.add_argument("--sam2", default="large", choices=list(CONFIGS), help="the trunk")
        command.add_argument("--aux", default="vit_large_patch14_dinov2", help="a timm model, or none")
        command.add_argument("--aux_size", type=cli.number(), default=448, help="side of its input, px")
        command.add_argument(
            "--size", type=cli.number(multiple=32, least=32), default=1024, help="side of the input, px"
        )
        command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... or auto")
        if name == "predict":
            command.add_argument("--pictures", type=cli.number(), default=200, help="how many")
        if name == "largest":
            command.add_argument(
                "--memory", type=cli.number(float), default=24, help="GB of the GPU to use, of 1e9 bytes"
            )
        elif name != "start":
            command.add_argument("--batch_size", type=cli.number(), default=1, help="pictures at a time")
        if name != "start":
            command.add_argument("--precision", default="bf16", choices=cli.PRECISIONS[1:], help="of the fast network")
            command.add_argument("--compile", action="store_true", help="compiled by torch as well")
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
