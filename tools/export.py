"""Exports a trained SAM2-UNeXT to ONNX and checks that onnxruntime reproduces the maps of torch.

    python tools/export.py runs/mine/SAM2-UNeXT-20.pth sam2unext.onnx
    python tools/export.py runs/mine/SAM2-UNeXT-20.pth sam2unext.onnx --check images/
    python tools/export.py runs/mine/SAM2-UNeXT-20.pth half.onnx --half
    python tools/export.py runs/mine/SAM2-UNeXT-20.pth rembg.onnx --rembg

The maps of the --check images, or of synthetic images, are made with torch and with onnxruntime, in batches of 1 and 2.
If they differ by more than 1 grey level (3 with --half), no file is written and the exit status is 1. See
docs/deploy.md. torch saves weights above 1.5 GiB in a second file, OUT.onnx.data.
"""

import argparse
import copy
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test
from dataset import MEAN, STD
from SAM2UNeXT import SAM2UNeXT
from tools import toy_dataset
from unext import checkpoint, cli, files
from unext.errors import InputError
from unext.images import configure_reading, read_size
from unext.output import Task
from unext.workers import progress_bar

MIN_TORCH = (2, 10)  # the first version whose exporter can do this
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE, HALF_TOLERANCE = 1, 3  # grey levels by which maps may differ
REMBG_SIZE, REMBG_MEAN = 1024, 0.5  # rembg resizes images to this square, px, and subtracts this from [0, 1]
CHANNEL_MEAN, CHANNEL_STD = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))  # (3, 1, 1)


class ForRembg(nn.Module):
    """The network for images as rembg prepares them, whatever the network's size."""

    size = REMBG_SIZE

    def __init__(self, model: SAM2UNeXT):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        x = (images.float() + REMBG_MEAN - CHANNEL_MEAN) / CHANNEL_STD
        if self.model.size != self.size:
            x = F.interpolate(x, size=(self.model.size, self.model.size), mode="bilinear", antialias=True)
        return self.model(x.to(images.dtype))


class Graph(nn.Module):
    """The exported module: float32 in and out, whatever the type of the network's weights."""

    def __init__(self, model: SAM2UNeXT | ForRembg):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(images.to(next(self.model.parameters()).dtype))
        return logits.sigmoid(), logits


def export(model: SAM2UNeXT | ForRembg, path: Path, half: bool) -> None:
    """Writes the graph, and large weights beside it. Raises OSError, and what torch's exporter raises."""
    network = copy.deepcopy(model).half() if half else model
    batch = torch.export.Dim("batch", max=2**15)  # torch needs an upper bound
    images = torch.zeros(2, 3, model.size, model.size)  # a batch of 1 would be exported as fixed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about torch
        try:
            program = torch.onnx.export(
                Graph(network).eval(), (images,), input_names=["images"], output_names=["probability", "logits"],
                dynamic_shapes=({0: batch},), opset_version=18, dynamo=True, verbose=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            raise error.__cause__ or error from None  # such as lack of memory
    mean, std = ([REMBG_MEAN] * 3, [1.0] * 3) if isinstance(model, ForRembg) else (list(MEAN), list(STD))
    metadata = {"mean": str(mean), "std": str(std), "size": str(model.size)}
    program.model.metadata_props.update(metadata | {"checkpoint": checkpoint.trained_fingerprint(model)})
    program.save(path)


def write_synthetic(folder: Path) -> list[Task]:
    """Writes images of the toy data set. Raises OSError."""
    folder.mkdir()
    for i in range(3):
        image, _ = toy_dataset.sample(np.random.default_rng(i))
        Image.fromarray(image).save(folder / f"{i}.png")
    return test.tasks_of_images([folder])


def load_graph(path: Path) -> Callable[[np.ndarray], Tensor]:
    """A function from images, float32 (B, 3, S, S), to logits (B, 1, S, S), computed by onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.enable_mem_pattern = False  # it reserves memory for each batch size, and is no faster
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images})[0])


def compare(model: SAM2UNeXT | ForRembg, graph: Callable[[np.ndarray], Tensor], tasks: Sequence[Task]) -> int:
    """Returns the largest difference in grey levels between maps of network and graph, in batches of 1 and 2."""
    differences: list[np.ndarray] = []
    for group in progress_bar([*([task] for task in tasks), [*tasks, *tasks][:2]], unit="batch", desc="checking"):
        batch = [test.read(task, model.size) for task in group]
        if unreadable := [sample for sample in batch if isinstance(sample, OSError)]:
            raise unreadable[0]
        if isinstance(model, ForRembg):
            as_shown = [sample.tensor * CHANNEL_STD + CHANNEL_MEAN for sample in batch]  # (3, S, S) in [0, 1]
            batch = [sample._replace(tensor=x - REMBG_MEAN) for sample, x in zip(batch, as_shown, strict=True)]
        expected = test.predict_batch(model, batch, flip=False)  # logits (B, 1, 1, S, S)
        computed = graph(np.stack([sample.tensor.numpy() for sample in batch]))[:, None]
        if not (expected.isfinite().all() and computed.isfinite().all()):
            names = files.listing(task.image for task in group)
            raise InputError(f"the logits of {names} have NaN or infinity; a half-precision graph may overflow")
        for sample, *pair in zip(batch, expected, computed, strict=True):
            maps = [test.make_prediction(logits, sample, stretched=True).grey for logits in pair]
            differences.append(np.abs(np.subtract(*maps, dtype=int)))
    largest, mean = max(int(levels.max()) for levels in differences), np.mean([levels.mean() for levels in differences])
    print(f"maps differ by at most {files.count(largest, 'grey level')}, {mean:.4f} on average")
    return largest


def main(args: argparse.Namespace) -> None:
    cli.end_on_signals()
    with cli.one_line_errors("a smaller --size needs less") as command, ExitStack() as stack:
        cli.require(PACKAGES, "requirements-export.txt")
        if torch.__version__ < MIN_TORCH:
            raise InputError(f"torch {torch.__version__} is too old: bash tools/setup.sh requirements-export.txt")
        configure_reading(args.max_pixels, args.white)
        tasks = test.tasks_of_images(args.check) if args.check else []
        for task in tasks:
            read_size(task.image)
        model = SAM2UNeXT.from_checkpoint(args.checkpoint, **cli.options_of(SAM2UNeXT.from_checkpoint, args))
        model.size = args.size or model.size
        network = ForRembg(model) if args.rembg else model
        inputs = [*checkpoint.sources(args.checkpoint, model), *(task.image for task in tasks)]
        for output in (args.output, Path(f"{args.output}.data")):
            files.require_not_input(output, inputs)
        files.check_output_file("OUT.onnx", args.output)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.output.parent, prefix=".export-")))

        command.started()
        tasks = tasks or write_synthetic(folder / "synthetic")
        path = folder / "graph" / args.output.name
        path.parent.mkdir()
        print(f"exporting {args.checkpoint} at {model.size} px, which takes minutes for the full network")
        with files.writing(args.output):
            export(network, path, args.half)
        graph = load_graph(path)
        difference = compare(network, graph, tasks)
        del graph  # Windows does not move open files
        allowed = HALF_TOLERANCE if args.half else TOLERANCE
        if difference > allowed:
            levels = files.count(allowed, "grey level")
            raise InputError(f"{args.output}: not written, since maps may differ by at most {levels}")
        with files.writing(args.output):
            for file in (args.output, Path(f"{args.output}.data")):  # so that graph and weights cannot be mixed up
                file.unlink(missing_ok=True)
            for file in path.parent.iterdir():
                os.replace(file, args.output.parent / file.name)
        print(f"{args.output}: written, checked on {files.count(len(tasks), 'image')}")


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="SAM2-UNeXT-<epoch>.pth, of this program or the original")
    parser.add_argument("output", type=cli.path, metavar="OUT.onnx", help="the file to write")
    parser.add_argument("--half", action="store_true", help="float16: half the size, for GPUs")
    parser.add_argument("--rembg", action="store_true", help="for rembg, as its model dis_custom")
    side = cli.number(multiple=32, minimum=32)
    parser.add_argument("--size", type=side, help="side of the network's input, px; default: that of the training")
    parser.add_argument("--check", nargs="+", metavar="PATH", help="folders of images, or single images, to compare")
    cli.add_pixels(parser)
    cli.add_encoders(parser)
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
