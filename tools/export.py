"""Exports a trained SAM2-UNeXT to ONNX and proves that onnxruntime computes the same maps as torch.

    python tools/export.py runs/mine/SAM2-UNeXT-20.pth sam2unext.onnx
    python tools/export.py runs/mine/SAM2-UNeXT-20.pth sam2unext.onnx --check images/ --check_gt masks/
    python tools/export.py runs/mine/SAM2-UNeXT-20.pth half.onnx --half

The graph maps `images`, normalised float32 (B, 3, S, S) with any B, to `probability` and `logits`, float32
(B, 1, S, S); S is --size. With --half it computes in float16. The metadata has mean, std, size and the checkpoint's
fingerprint. Weights of 2 GB and more are in a second file, OUT.onnx.data. Both replace files
of their names: OUT must not be one of the inputs.

The maps of the --check images, or of synthetic ones, are made with torch and with onnxruntime. If they differ by more
than one grey level (three with --half), no file is written and the exit status is 1. --check_gt prints the nine metrics
of both. docs/deploy.md tells how to use the file.
"""

import argparse
import copy
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cli
import files
import test
from dataset import MEAN, STD
from evaluation import metrics
from output import Settings, Task
from SAM2UNeXT import SAM2UNeXT

OLDEST = (2, 10)  # version of torch whose exporter can do this
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
LARGE = 2e9  # bytes of weights that get a file of their own; protobuf, the graph's format, cannot hold 2 GiB
TOLERANCE, HALF_TOLERANCE = 1, 3  # grey levels by which maps may differ
BATCH = 2  # images at a time when checking; an odd number leaves a batch of one
MOST_IMAGES = 2**15  # in a batch; torch wants a bound
SYNTHETIC = ((480, 640), (500, 300), (256, 256))  # height, width


class Exported(nn.Module):
    """What the graph computes: float32 in and out, whatever the type of the network's weights."""

    def __init__(self, model: SAM2UNeXT):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(images.to(self.model.head.weight.dtype))
        return logits.sigmoid(), logits


class Difference(NamedTuple):
    """How the maps of the graph differ from those of the network."""

    largest: int  # grey levels
    mean: float
    scores: dict[str, metrics.PairScores]  # of torch and onnxruntime, over the images that have a mask


def export(model: SAM2UNeXT, path: Path, half: bool) -> None:
    """Writes the network's graph to `path` and large weights to a file beside it. Raises ValueError or OSError."""
    network = copy.deepcopy(model).half() if half else model
    batch = torch.export.Dim("batch", max=MOST_IMAGES)
    images = torch.zeros(2, 3, model.size, model.size)  # one image would be exported as a fixed batch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about its own code
        try:
            program = torch.onnx.export(
                Exported(network).eval(), (images,), input_names=["images"], output_names=["probability", "logits"],
                dynamic_shapes=({0: batch},), opset_version=OPSET, dynamo=True, verbose=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            reason = files.shown(str(error.__cause__ or error).strip().splitlines()[0])
            raise ValueError(f"torch cannot export this network: {reason}") from error
    program.model.metadata_props.update({
        "mean": str(list(MEAN)), "std": str(list(STD)), "size": str(model.size), "checkpoint": test.fingerprint(model),
    })  # fmt: skip
    weights = sum(tensor.nbytes for tensor in network.state_dict().values())
    program.save(path, external_data=weights >= LARGE)


def write_synthetic(folder: Path) -> None:
    """Writes images of smooth colours and noise, always the same."""
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate(SYNTHETIC):
        colours = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height))
        noise = rng.integers(-20, 20, (height, width, 3))
        Image.fromarray((np.array(colours) + noise).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")


def load_graph(path: Path) -> Callable[[np.ndarray], Tensor]:
    """A function that runs the graph: images, float32 (B, 3, S, S), to logits, float32 (B, 1, S, S).

    Raises ValueError if onnxruntime cannot load the graph; so does the function if it cannot run it.
    """
    import onnxruntime

    def run(images: np.ndarray) -> Tensor:
        with errors_of_onnxruntime():
            return torch.from_numpy(session.run(["logits"], {"images": images})[0])

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    with errors_of_onnxruntime():
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return run


@contextmanager
def errors_of_onnxruntime() -> Iterator[None]:
    """Turns an error in the block into ValueError on one line."""
    try:
        yield
    except Exception as error:  # its errors have no common class
        raise ValueError(f"onnxruntime cannot run the graph: {' '.join(str(error).split())}") from error


def compare(model: SAM2UNeXT, graph: Callable[[np.ndarray], Tensor], tasks: Sequence[Task]) -> Difference:
    """Makes the maps of the images as test.py does, with the network's logits and with the graph's.

    `graph` is a function of `load_graph`. Raises OSError for unreadable images and what `graph` raises.
    """
    settings = Settings((), "", "float32", model.size, stretch=True, flip=False, threshold=0.5)
    largest, total = 0, 0.0
    scores: dict[str, list[metrics.PairScores]] = {"torch": [], "onnxruntime": []}
    for start in tqdm(range(0, len(tasks), BATCH), unit="batch", desc="checking"):
        batch = [test.read(task, settings) for task in tasks[start : start + BATCH]]
        if unreadable := [sample for sample in batch if isinstance(sample, OSError)]:
            raise unreadable[0]
        theirs = graph(np.stack([sample.tensor.numpy() for sample in batch]))
        for sample, own, other in zip(batch, test.predict_batch(model, batch, flip=False), theirs, strict=True):
            maps = [test.grey_map(logits, sample, settings) for logits in (own, other[None])]
            difference = np.abs(np.subtract(*maps, dtype=int))
            largest, total = max(largest, int(difference.max())), total + difference.mean()
            if sample.task.ground_truth:
                truth = np.array(files.read_mask(sample.task.ground_truth))
                for found, grey in zip(scores.values(), maps, strict=True):
                    found.append(metrics.score(grey, truth))
    return Difference(
        largest, total / len(tasks), {name: metrics.mean(found) for name, found in scores.items() if found}
    )


def describe(difference: Difference) -> str:
    """The difference in words and, with masks, the nine metrics of both and their drift."""
    largest = files.count(difference.largest, "grey level")
    line = f"maps differ by at most {largest}, {difference.mean:.4f} on average"
    if not difference.scores:
        return line
    figures = {name: scores.figures() for name, scores in difference.scores.items()}
    own, other = figures.values()
    figures["drift"] = {name: other[name] - own[name] for name in own}
    rows = [("", *metrics.METRICS)]
    rows += [(name, *(f"{values[key]:.5f}" for key in metrics.METRICS)) for name, values in figures.items()]
    table = [f"{row[0]:<11}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows]
    return "\n".join([*table, line])


def find_images(args: argparse.Namespace, folder: Path) -> list[Task]:
    """The images to check, synthetic ones in `folder` if none are given. Raises ValueError or OSError."""
    if not args.check:
        if args.check_gt:
            raise ValueError("--check_gt needs the images in --check")
        write_synthetic(folder)
    tasks = test.find_own_tasks(args.check or [str(folder)], args.check_gt, folder)
    for task in tasks:
        files.read_size(task.image)
    return tasks


def replace(path: Path, target: Path) -> None:
    """Moves the graph and its weights. A graph never lies beside the weights of another one."""
    weights, old = (file.with_name(f"{file.name}.data") for file in (path, target))
    target.unlink(missing_ok=True)
    old.unlink(missing_ok=True)
    if weights.exists():
        os.replace(weights, old)
    os.replace(path, target)


def run(args: argparse.Namespace, folder: Path, model: SAM2UNeXT, tasks: Sequence[Task]) -> None:
    """Exports into the temporary `folder`, checks, and moves the result. Raises ValueError or OSError."""
    shown, path = files.shown(args.output), folder / args.output.name
    print(f"exporting {files.shown(args.checkpoint)} at {model.size} px, which takes minutes for the full network")
    export(model, path, args.half)
    difference = compare(model, load_graph(path), tasks)
    print(describe(difference))
    most = HALF_TOLERANCE if args.half else TOLERANCE
    if difference.largest > most:
        allowed = files.count(most, "grey level")
        raise ValueError(f"{shown}: not written, since maps may differ by at most {allowed}")
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    replace(path, args.output)
    print(f"{shown}: {size / 2**20:,.1f} MB, checked on {files.count(len(tasks), 'image')}")


def main(args: argparse.Namespace) -> None:
    with ExitStack() as held:
        with cli.exit_on_error(cli.NOTHING_STARTED):
            cli.require(PACKAGES, "requirements-export.txt")
            if torch.__version__ < OLDEST:
                raise ValueError(f"torch {torch.__version__} is too old: bash tools/setup.sh requirements-export.txt")
            if args.output.is_dir():
                raise IsADirectoryError(f"{files.shown(args.output)}: is a folder; name a file")
            parent = files.output_folder(args.output.parent)
            folder = Path(held.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=".export-")))
            (folder / "synthetic").mkdir()
            tasks = find_images(args, folder / "synthetic")
            paths = args.checkpoint, args.hiera_path, args.dinov2_path
            model = SAM2UNeXT.from_checkpoint(*paths, download=args.download)
            model.size = args.size or model.size
        with cli.exit_on_error(cli.NOT_COMPLETED, "a smaller --size needs less"):
            run(args, folder, model, tasks)


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="SAM2-UNeXT-<epoch>.pth, of this program or the original")
    parser.add_argument("output", type=cli.path, metavar="OUT.onnx", help="the file to write")
    parser.add_argument("--half", action="store_true", help="float16: half the size, for GPUs")
    side = cli.number(multiple=32, least=32)
    parser.add_argument("--size", type=side, help="side of the input, px; default: that of the training")
    parser.add_argument("--check", nargs="+", metavar="PATH", help="folders of images, or single images, to compare")
    parser.add_argument("--check_gt", metavar="DIR", help="their ground truth, to compare the scores")
    cli.add_encoders(parser)
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
