"""Exports a trained SAM2-UNeXT to ONNX and checks that onnxruntime computes the maps of torch.

    python tools/export.py runs/mine/SAM2-UNeXT-20.pth sam2unext.onnx
    python tools/export.py runs/mine/SAM2-UNeXT-20.pth sam2unext.onnx --check images/
    python tools/export.py runs/mine/SAM2-UNeXT-20.pth half.onnx --half
    python tools/export.py runs/mine/SAM2-UNeXT-20.pth rembg.onnx --rembg

The maps of the --check images, or of synthetic ones, are made with torch and with onnxruntime, one by one and two at
once. If they differ by more than one grey level (three with --half), no file is written and the exit status is 1.
docs/deploy.md describes the file, and rembg's. Weights of more than 1.5 GiB are in a second one, OUT.onnx.data.
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

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test
from dataset import MEAN, STD
from SAM2UNeXT import SAM2UNeXT
from unext import checkpoint, cli, files
from unext.errors import InputError, diagnosis, reason
from unext.images import configure_reading, read_size
from unext.output import Task
from unext.workers import progress_bar

MIN_TORCH = (2, 10)  # the first version whose exporter can do this
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
LARGE = 1536 * 2**20  # bytes of weights above which torch gives them a file of their own: protobuf cannot hold 2 GiB
TOLERANCE, HALF_TOLERANCE = 1, 3  # grey levels by which maps may differ
LESS_MEMORY = "a smaller --size needs less"
MAX_IMAGES = 2**15  # in a batch; torch wants a bound
REMBG_SIZE, REMBG_MEAN = 1024, 0.5  # rembg resizes images to this square, px, and subtracts this from [0, 1]
SYNTHETIC = ((640, 480), (300, 500), (256, 256))  # width, height


class ForRembg(nn.Module):
    """The network for images as rembg prepares them, whatever its own size."""

    size = REMBG_SIZE

    def __init__(self, model: SAM2UNeXT):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        x = (images.float() + REMBG_MEAN - mean) / std
        if self.model.size != self.size:
            x = F.interpolate(x, size=(self.model.size, self.model.size), mode="bilinear", antialias=True)
        return self.model(x.to(images.dtype))


def as_rembg(image: Tensor) -> Tensor:
    """A normalised image (3, S, S) as rembg prepares it."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return image * std + mean - REMBG_MEAN


class Graph(nn.Module):
    """What the graph computes: float32 in and out, whatever the type of the network's weights."""

    def __init__(self, model: SAM2UNeXT | ForRembg):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(images.to(next(self.model.parameters()).dtype))
        return logits.sigmoid(), logits


def export(model: SAM2UNeXT | ForRembg, path: Path, half: bool) -> None:
    """Writes the graph, and large weights beside it. Raises InputError, OSError, RuntimeError or MemoryError."""
    network = copy.deepcopy(model).half() if half else model
    batch = torch.export.Dim("batch", max=MAX_IMAGES)
    images = torch.zeros(2, 3, model.size, model.size)  # one image would be exported as a fixed batch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about its own code
        try:
            program = torch.onnx.export(
                Graph(network).eval(), (images,), input_names=["images"], output_names=["probability", "logits"],
                dynamic_shapes=({0: batch},), opset_version=OPSET, dynamo=True, verbose=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            cause = error.__cause__ or error
            if isinstance(cause, RuntimeError | MemoryError) and diagnosis(cause, LESS_MEMORY):
                raise cause from error
            raise InputError(f"torch cannot export this network: {reason(cause)}") from error
    mean, std = ([REMBG_MEAN] * 3, [1.0] * 3) if isinstance(model, ForRembg) else (list(MEAN), list(STD))
    metadata = {"mean": str(mean), "std": str(std), "size": str(model.size)}
    program.model.metadata_props.update(metadata | {"checkpoint": checkpoint.trained_fingerprint(model)})
    program.save(path, external_data=sum(tensor.nbytes for tensor in network.state_dict().values()) > LARGE)


def write_synthetic(folder: Path) -> list[Task]:
    """Writes images of smooth colours, always the same. Raises OSError."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate(SYNTHETIC):
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize(size).save(folder / f"{i}.png")
    return test.tasks_of_images([folder])


def load_graph(path: Path) -> Callable[[np.ndarray], Tensor]:
    """A function from images, float32 (B, 3, S, S), to logits (B, 1, S, S). Both raise InputError or MemoryError."""
    import onnxruntime

    def run(images: np.ndarray) -> Tensor:
        with errors_of_onnxruntime():
            return torch.from_numpy(session.run(["logits"], {"images": images})[0])

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.enable_mem_pattern = False  # it reserves memory anew for each size of a batch, and is no faster
    with errors_of_onnxruntime():
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return run


@contextmanager
def errors_of_onnxruntime() -> Iterator[None]:
    """Turns an error in the block into InputError on one line, or into MemoryError."""
    try:
        yield
    except Exception as error:  # its errors have no common class
        if diagnosis(error, LESS_MEMORY):
            raise MemoryError(str(error)) from error
        raise InputError(f"onnxruntime cannot run the graph: {' '.join(str(error).split())}") from error


def compare(model: SAM2UNeXT | ForRembg, graph: Callable[[np.ndarray], Tensor], tasks: Sequence[Task]) -> int:
    """Makes the maps of the images as test.py does, with the network and with the graph, one by one and two at once.

    Prints how they differ; returns the largest difference in grey levels. `graph` is a function of `load_graph`. Raises
    OSError for unreadable images, InputError for logits that are not finite, and what `graph` raises.
    """
    differences: list[np.ndarray] = []
    for group in progress_bar([*([task] for task in tasks), [*tasks, *tasks][:2]], unit="batch", desc="checking"):
        batch = [test.read(task, model.size) for task in group]
        if unreadable := [sample for sample in batch if isinstance(sample, OSError)]:
            raise unreadable[0]
        if isinstance(model, ForRembg):
            batch = [sample._replace(tensor=as_rembg(sample.tensor)) for sample in batch]
        ours = test.predict_batch(model, batch, flip=False)
        theirs = graph(np.stack([sample.tensor.numpy() for sample in batch]))[:, None]  # (B, 1, 1, S, S)
        for name, logits in (("torch", ours), ("onnxruntime", theirs)):
            if not logits.isfinite().all():
                names = files.listing(task.image for task in group)
                raise InputError(f"{name} computes NaN or infinity for {names}; a half-precision graph may overflow")
        for sample, *both in zip(batch, ours, theirs, strict=True):
            maps = [test.make_prediction(logits, sample, stretched=True).grey for logits in both]
            differences.append(np.abs(np.subtract(*maps, dtype=int)))
    largest, mean = max(int(one.max()) for one in differences), np.mean([one.mean() for one in differences])
    print(f"maps differ by at most {files.count(largest, 'grey level')}, {mean:.4f} on average")
    return largest


def data_file(path: Path) -> Path:
    """Where the large weights of a graph are."""
    return Path(f"{path}.data")


def check_output(path: Path, used: Sequence[Path]) -> None:
    """Raises InputError if the graph or its weights would replace an input or what is not a file."""
    for output in (path, data_file(path)):
        if output.exists() and not output.is_file():
            raise InputError(f"{output}: is not a file; name one to write")
        files.require_not_input(output, used)


def replace(path: Path, target: Path) -> None:
    """Moves the graph and its weights. A graph never lies beside the weights of another one."""
    if data_file(path).exists():
        target.unlink(missing_ok=True)  # it would find the new weights
        os.replace(data_file(path), data_file(target))
        os.replace(path, target)
    else:
        os.replace(path, target)
        data_file(target).unlink(missing_ok=True)


def main(args: argparse.Namespace) -> None:
    cli.end_on_signals()
    with cli.one_line_errors(LESS_MEMORY) as command, ExitStack() as stack:
        cli.require(PACKAGES, "requirements-export.txt")
        if torch.__version__ < MIN_TORCH:
            raise InputError(f"torch {torch.__version__} is too old: bash tools/setup.sh requirements-export.txt")
        configure_reading(cli.MAX_PIXELS)
        tasks = test.tasks_of_images(args.check) if args.check else []
        for task in tasks:
            read_size(task.image)
        paths = args.checkpoint, args.hiera_path, args.dinov2_path
        model = SAM2UNeXT.from_checkpoint(*paths, download=args.download)
        model.size = args.size or model.size
        network = ForRembg(model) if args.rembg else model
        check_output(args.output, [*checkpoint.sources(args.checkpoint, model), *(task.image for task in tasks)])
        parent = files.output_folder(args.output.parent)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=".export-")))

        command.started()
        tasks = tasks or write_synthetic(folder / "synthetic")
        path = folder / "graph" / args.output.name
        path.parent.mkdir()
        print(f"exporting {args.checkpoint} at {model.size} px, which takes minutes for the full network")
        with files.writing(args.output):
            export(network, path, args.half)
        graph = load_graph(path)
        difference = compare(network, graph, tasks)
        del graph  # Windows moves no file that is in use
        allowed = HALF_TOLERANCE if args.half else TOLERANCE
        if difference > allowed:
            levels = files.count(allowed, "grey level")
            raise InputError(f"{args.output}: not written, since maps may differ by at most {levels}")
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        with files.writing(args.output):
            replace(path, args.output)
        print(f"{args.output}: {size / 2**20:,.1f} MB, checked on {files.count(len(tasks), 'image')}")


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="SAM2-UNeXT-<epoch>.pth, of this program or the original")
    parser.add_argument("output", type=cli.path, metavar="OUT.onnx", help="the file to write")
    parser.add_argument("--half", action="store_true", help="float16: half the size, for GPUs")
    parser.add_argument("--rembg", action="store_true", help="for rembg, as its model dis_custom")
    side = cli.number(multiple=32, minimum=32)
    parser.add_argument("--size", type=side, help="side of the network's input, px; default: that of the training")
    parser.add_argument("--check", nargs="+", metavar="PATH", help="folders of images, or single images, to compare")
    cli.add_encoders(parser)
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
