"""Exports a trained SAM2-UNeXT to ONNX and checks that onnxruntime computes the maps of torch.

    python tools/export.py runs/mine/SAM2-UNeXT-20.pth sam2unext.onnx
    python tools/export.py runs/mine/SAM2-UNeXT-20.pth sam2unext.onnx --check images/ --check_gt masks/
    python tools/export.py runs/mine/SAM2-UNeXT-20.pth half.onnx --half

The graph maps `images`, normalised float32 (B, 3, S, S) with any B, to `probability` and `logits`, float32
(B, 1, S, S); S is --size. With --half it computes in float16. The metadata has mean, std, size and the checkpoint's
fingerprint. Weights of more than 1.5 GiB are in a second file, OUT.onnx.data.

The maps of the --check images, or of synthetic ones, are made with torch and with onnxruntime, in batches of one and
two images. If they differ by more than one grey level (three with --half), no file is written and the exit status is 1.
--check_gt prints the metrics of both. docs/deploy.md tells how to use the file.
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
import test
from dataset import MEAN, STD
from evaluation import metrics
from SAM2UNeXT import SAM2UNeXT
from unext import checkpoint, cli, files, weights
from unext.output import Task

MIN_TORCH = (2, 10)  # the first version whose exporter can do this
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
LARGE = 1536 * 2**20  # bytes of weights above which torch gives them a file of their own: protobuf cannot hold 2 GiB
TOLERANCE, HALF_TOLERANCE = 1, 3  # grey levels by which maps may differ
BATCH = 2  # images at a time when checking, after a first one by itself
LESS_MEMORY = "a smaller --size needs less"
MAX_IMAGES = 2**15  # in a batch; torch wants a bound
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
    """Writes the network's graph to `path` and large weights to a file beside it.

    Raises ValueError, OSError, and RuntimeError or MemoryError if memory runs out.
    """
    network = copy.deepcopy(model).half() if half else model
    batch = torch.export.Dim("batch", max=MAX_IMAGES)
    images = torch.zeros(2, 3, model.size, model.size)  # one image would be exported as a fixed batch
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about its own code
        try:
            program = torch.onnx.export(
                Exported(network).eval(), (images,), input_names=["images"], output_names=["probability", "logits"],
                dynamic_shapes=({0: batch},), opset_version=OPSET, dynamo=True, verbose=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            cause = error.__cause__ or error
            if isinstance(cause, RuntimeError | MemoryError) and is_lack_of_memory(cause):
                raise cause from error
            raise ValueError(f"torch cannot export this network: {weights.reason(cause)}") from error
    metadata = {"mean": str(list(MEAN)), "std": str(list(STD)), "size": str(model.size)}
    program.model.metadata_props.update(metadata | {"checkpoint": checkpoint.trained_fingerprint(model)})
    program.save(path, external_data=sum(tensor.nbytes for tensor in network.state_dict().values()) > LARGE)


def is_lack_of_memory(error: Exception) -> bool:
    return cli.diagnosis(error, LESS_MEMORY).startswith("out of memory")


def write_synthetic(folder: Path) -> list[Task]:
    """Writes images of smooth colours and noise, always the same. Raises OSError."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (height, width) in enumerate(SYNTHETIC):
        colours = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8)).resize((width, height))
        noise = rng.integers(-20, 20, (height, width, 3))
        pixels = (np.array(colours) + noise).clip(0, 255).astype(np.uint8)
        files.save_image(Image.fromarray(pixels), folder / f"{i}.png")
    return test.find_own_tasks([str(folder)], None, folder)


def load_graph(path: Path, device: str = "cpu") -> tuple[Callable[[np.ndarray], Tensor], int]:
    """A function that runs the graph, and its S: images, float32 (B, 3, S, S), to logits, float32 (B, 1, S, S).

    `device` is cpu, cuda or cuda:n. Raises OSError if there is no file, ValueError if onnxruntime cannot load it for
    the device and MemoryError if memory runs out; the function raises the latter two.
    """
    import onnxruntime

    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")

    def run(images: np.ndarray) -> Tensor:
        with errors_of_onnxruntime():
            return torch.from_numpy(session.run(["logits"], {"images": images})[0])

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.enable_mem_pattern = False  # it reserves memory anew for each size of a batch, and is no faster
    provider: tuple[str, dict[str, int]] = ("CPUExecutionProvider", {})
    if device.startswith("cuda"):
        provider = ("CUDAExecutionProvider", {"device_id": torch.device(device).index or 0})
    session = None
    with errors_of_onnxruntime():
        if provider[0] in onnxruntime.get_available_providers():
            session = onnxruntime.InferenceSession(path, options, providers=[provider])
    if session is None or session.get_providers()[0] != provider[0]:  # it falls back to the CPU without an error
        raise ValueError(f"onnxruntime cannot compute on {device}: pip install onnxruntime-gpu, or give --device cpu")
    return run, session.get_inputs()[0].shape[2]


@contextmanager
def errors_of_onnxruntime() -> Iterator[None]:
    """Turns an error in the block into ValueError on one line, or into MemoryError."""
    try:
        yield
    except Exception as error:  # its errors have no common class
        if is_lack_of_memory(error):
            raise MemoryError(str(error)) from error
        raise ValueError(f"onnxruntime cannot run the graph: {' '.join(str(error).split())}") from error


def compare(model: SAM2UNeXT, graph: Callable[[np.ndarray], Tensor], tasks: Sequence[Task]) -> Difference:
    """Makes the maps of the images as test.py does, with the network's logits and with the graph's.

    `graph` is a function of `load_graph`. Raises OSError for unreadable images, ValueError for logits that are not
    finite, and what `graph` raises.
    """
    largest: list[int] = []  # difference of each map
    means: list[float] = []
    scores: dict[str, list[metrics.PairScores]] = {"torch": [], "onnxruntime": []}
    for group, images in tqdm(groups(tasks), unit="batch", desc="checking"):
        batch = [test.read(task, model.size) for task in group]
        if unreadable := [sample for sample in batch if isinstance(sample, OSError)]:
            raise unreadable[0]
        tensors = [sample.tensor.numpy() for sample in batch]
        theirs = graph(np.stack(tensors + tensors[:1] * (images - len(batch))))[: len(batch), None]  # (B, 1, 1, S, S)
        ours = test.predict_batch(model, batch, flip=False)
        for name, logits in (("torch", ours), ("onnxruntime", theirs)):
            if not logits.isfinite().all():
                names = files.listing(task.image for task in group)
                raise ValueError(f"{name} computes NaN or infinity for {names}; a half-precision graph may overflow")
        for sample, *both in zip(batch, ours, theirs, strict=True):
            maps = [test.grey_map(logits, sample.size) for logits in both]
            difference = np.abs(np.subtract(*maps, dtype=int))
            largest.append(int(difference.max()))
            means.append(difference.mean())
            if sample.task.ground_truth:
                mask = np.array(files.read_mask(sample.task.ground_truth))
                for found, grey in zip(scores.values(), maps, strict=True):
                    found.append(metrics.score(grey, mask))
    kept = {name: metrics.mean(found) for name, found in scores.items() if found}
    return Difference(max(largest), float(np.mean(means)), kept)


def groups(tasks: Sequence[Task]) -> list[tuple[Sequence[Task], int]]:
    """Tasks to check together, and how many images the graph gets: one, then BATCH, padded with a repeated image."""
    rest = tasks[1:] or tasks
    return [(tasks[:1], 1), *((rest[start : start + BATCH], BATCH) for start in range(0, len(rest), BATCH))]


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
    for name, values in figures.items():
        rows.append((name, *(f"{round(values[key], 5) + 0.0:.5f}" for key in metrics.METRICS)))  # no "-0.00000"
    table = [f"{row[0]:<11}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows]
    return "\n".join([*table, line])


def find_images(args: argparse.Namespace) -> list[Task]:
    """The given images. Raises ValueError or OSError if one cannot be used."""
    if not args.check:
        if args.check_gt:
            raise ValueError("--check_gt needs the images in --check")
        return []
    tasks = test.find_own_tasks(args.check, args.check_gt, args.output.parent)
    for path in inputs(tasks):
        files.read_size(path)
    return tasks


def inputs(tasks: Sequence[Task]) -> list[Path]:
    return [path for task in tasks for path in (task.image, task.ground_truth) if path]


def data_file(path: Path) -> Path:
    """Where the large weights of a graph are."""
    return Path(f"{path}.data")


def check_output(path: Path, used: Sequence[Path]) -> None:
    """Raises ValueError if the graph or its weights would replace an input or what is not a file."""
    for output in (path, data_file(path)):
        if output.exists() and not output.is_file():
            raise ValueError(f"{output}: is not a file; name one to write")
        files.require_apart(output, used)


def replace(path: Path, target: Path) -> None:
    """Moves the graph and its weights. A graph never lies beside the weights of another one."""
    large, existed = data_file(path).exists(), target.exists()
    if large:
        target.unlink(missing_ok=True)  # it would find the new weights
        os.replace(data_file(path), data_file(target))
    os.replace(path, target)
    if existed and not large:
        data_file(target).unlink(missing_ok=True)


def main(args: argparse.Namespace) -> None:
    cli.end_on_signals()
    with cli.one_line_errors(LESS_MEMORY) as command, ExitStack() as stack:
        cli.require(PACKAGES, "requirements-export.txt")
        if torch.__version__ < MIN_TORCH:
            raise ValueError(f"torch {torch.__version__} is too old: bash tools/setup.sh requirements-export.txt")
        tasks = find_images(args)
        paths = args.checkpoint, args.hiera_path, args.dinov2_path
        model = SAM2UNeXT.from_checkpoint(*paths, download=args.download)
        model.size = args.size or model.size
        check_output(args.output, [*checkpoint.sources(args.checkpoint, model), *inputs(tasks)])
        parent = files.output_folder(args.output.parent)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=".export-")))

        command.started()
        tasks = tasks or write_synthetic(folder / "synthetic")
        path = folder / "graph" / args.output.name
        path.parent.mkdir()
        print(f"exporting {args.checkpoint} at {model.size} px, which takes minutes for the full network")
        with files.writing(args.output):
            export(model, path, args.half)
        graph, _ = load_graph(path)
        difference = compare(model, graph, tasks)
        del graph  # Windows moves no file that is in use
        print(describe(difference))
        allowed = HALF_TOLERANCE if args.half else TOLERANCE
        if difference.largest > allowed:
            levels = files.count(allowed, "grey level")
            raise ValueError(f"{args.output}: not written, since maps may differ by at most {levels}")
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        with files.writing(args.output):
            replace(path, args.output)
        print(f"{args.output}: {size / 2**20:,.1f} MB, checked on {files.count(len(tasks), 'image')}")


def get_args_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="SAM2-UNeXT-<epoch>.pth, of this program or the original")
    parser.add_argument("output", type=cli.path, metavar="OUT.onnx", help="the file to write")
    parser.add_argument("--half", action="store_true", help="float16: half the size, for GPUs")
    side = cli.number(multiple=32, minimum=32)
    parser.add_argument("--size", type=side, help="side of the input, px; default: that of the training")
    parser.add_argument("--check", nargs="+", metavar="PATH", help="folders of images, or single images, to compare")
    parser.add_argument("--check_gt", metavar="DIR", help="their ground truth, to compare the scores")
    cli.add_encoders(parser)
    return parser


if __name__ == "__main__":
    main(get_args_parser().parse_args())
