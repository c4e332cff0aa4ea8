"""What the tests share: golden files, small networks and data sets, and how to call the commands."""

import json
import os
import re
import signal
import sys
from pathlib import Path
from unittest import mock

import cv2
import hypothesis
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared"  # not part of the repository
SUIM8 = SHARED / "data" / "suim8"  # eight real images
sys.path[:0] = [str(GOLDEN), str(ROOT / "tests")]

import micro  # noqa: F401 (adds a size of the trunk)
import recipe

import eval as evaluation
import test
import train
from evaluation import plots
from sam2.build_sam import build_sam2_trunk
from SAM2UNeXT import SAM2UNeXT
from tools import check_dataset, toy_dataset
from unext import checkpoint, device, weights

PHOTO = recipe.photo("bad", 40, 60, 0)
DISC = cv2.circle(np.zeros((40, 60), np.uint8), (30, 20), 12, 255, -1)
SMALL = {"sam2": "tiny", "aux": "vit_small_patch14_dinov2", "aux_size": 56, "size": 64}  # with published encoders
MICRO = {"sam2": "micro", "aux": "test_vit", "aux_size": 64, "size": 64}  # for what builds and saves many networks
NETWORK = "--hiera_path random --dinov2_path random " + " ".join(f"--{name} {value}" for name, value in MICRO.items())
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])  # to XYZ
ADOBE_RGB_PROFILE = (ROOT / "tests/adobe_rgb.icc").read_bytes()  # these primaries (D50) and a gamma of 2.2
PRETENDED_CPU = "PRETENDED_CPU_FLAGS"  # in the environment: what the CPU can do for these tests, see program.py

# The same examples in every run, and no time limit: luck may fail no test. `--hypothesis-profile anew` draws others.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None, database=None, max_examples=60)
hypothesis.settings.register_profile("anew", deadline=None, database=None, max_examples=2000)
hypothesis.settings.load_profile("same")


def pytest_configure(config):
    if config.option.markexpr != "cuda":  # the figures of the other tests are a CPU's
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:  # convolutions use TF32 by default, whose ten bits would hide what these tests look for
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    # A shell starts background commands with Ctrl-C ignored, and what the tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    device.keep_freed_memory("cpu")
    os.fsync = lambda descriptor: None  # hundreds of megabytes of checkpoints need not survive a power cut
    # A data loader that an error left behind waits so long for each of its workers when it is collected: 5 s otherwise.
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1
    if PRETENDED_CPU in os.environ:
        device.cpu_flags = lambda: set(os.environ[PRETENDED_CPU].split())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Slow tests come first, so that no process ends long after the others; those of the full network share one."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    for item in items:
        if "_empty_full_model" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("gigabytes"))


@pytest.fixture(autouse=True)
def _environment():
    """Commands set variables for the processes that they start."""
    with mock.patch.dict(os.environ):
        yield


def close(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether two maps differ by a grey level at most; shapes must agree."""
    assert ours.shape == theirs.shape
    return np.abs(ours.astype(int) - theirs).max() <= 1


def close_maps(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> bool:
    return ours.keys() == theirs.keys() and all(close(pixels, theirs[name]) for name, pixels in ours.items())


def findings_of(path: Path, is_mask: bool = False) -> dict[str, str]:
    """What check_dataset.py finds in a file."""
    return check_dataset.inspect(path, is_mask).kinds


def golden(name: str):
    """A golden file: JSON as it is, npz as a dict of arrays."""
    path = GOLDEN / name
    return json.loads(path.read_text()) if path.suffix == ".json" else dict(np.load(path))


def relative_error(ours: torch.Tensor | np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference relative to the largest magnitude; shapes must agree."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def parameter(key: str, shape, seed: int = 0) -> torch.Tensor:
    """The recipe's float32 tensor called `key`."""
    return torch.from_numpy(recipe.parameter(key, tuple(shape), seed)).float()


@pytest.fixture(scope="session")
def small_model() -> SAM2UNeXT:
    """The network SMALL with the recipe's parameters; not to be changed."""
    return recipe.fill(SAM2UNeXT(**SMALL), 0).eval()


@pytest.fixture(scope="session")
def micro_model() -> SAM2UNeXT:
    """The network MICRO with the recipe's parameters; not to be changed."""
    return recipe.fill(SAM2UNeXT(**MICRO), 0).eval()


@pytest.fixture(scope="session")
def _empty_full_model() -> SAM2UNeXT:
    with torch.device("meta"):
        model = SAM2UNeXT()
    model.filled_with = None  # the seed of its parameters
    return model.to_empty(device="cpu")


@pytest.fixture
def full_model(_empty_full_model):
    """A function that returns the full network with the parameters of a seed, in float32; all tests share its 2 GB."""
    model = _empty_full_model
    yield lambda seed: fill_once(model, seed)
    if model.head.weight.grad is not None:  # it was trained
        model.filled_with = None
    model.float().zero_grad(set_to_none=True)


def fill_once(model: SAM2UNeXT, seed: int) -> SAM2UNeXT:
    """Gives the shared network the recipe's parameters, which takes many seconds, unless it has them."""
    if model.filled_with != seed:
        for name, buffer in model.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.zero_()
        recipe.fill(model, seed)
        model.filled_with = seed
    return model.eval()


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A toy data set of 6 training and 4 test images."""
    folder = tmp_path_factory.mktemp("toy")
    toy_dataset.main(arguments_of(toy_dataset, folder, "--train", 6, "--test", 4))
    return folder


def sam2_file(path, size="tiny", extra=None, prefix="", seed=0):
    """A SAM 2 checkpoint of random weights, with the published keys for the published sizes."""
    trunk = build_sam2_trunk(size, device="meta").state_dict()
    shapes = {weights.TRUNK + key: tensor.shape for key, tensor in trunk.items()}
    if size != "micro":
        shapes = golden(f"sam2_hiera_{size}.keys.json")
    state = {
        prefix + key: parameter(key, shape, seed)
        if size in ("micro", "tiny") and key.startswith(weights.TRUNK)
        else torch.zeros(()).expand(shape)  # one number on the disk
        for key, shape in (shapes | (extra or {})).items()
    }
    torch.save({"model": state}, path)
    return path


def aux_file(path, name="vit_small_patch14_dinov2", image_size=518):
    """A file as timm publishes its models; DINOv2 at its native 518 px with the last norm."""
    state = timm.create_model(name, num_classes=0, img_size=image_size).state_dict()
    state = {key: parameter(key, value.shape) for key, value in state.items()}
    safetensors.torch.save_file(state, path)
    return path


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> dict[str, Path]:
    """Files of the encoders of the network MICRO, by option."""
    folder = tmp_path_factory.mktemp("encoders")
    return {
        "hiera_path": sam2_file(folder / "sam2_hiera_micro.pt", "micro"),
        "dinov2_path": aux_file(folder / f"{MICRO['aux']}.safetensors", MICRO["aux"], MICRO["aux_size"]),
    }


@pytest.fixture(scope="session")
def from_files(encoders) -> str:
    """The network MICRO as options of train.py, its encoders from files: its checkpoints are small."""
    return " ".join(f"--{name} {value}" for name, value in (encoders | MICRO).items())


@pytest.fixture(scope="session")
def micro_checkpoint(tmp_path_factory, micro_model) -> Path:
    """The network MICRO as train.py saves it."""
    path = tmp_path_factory.mktemp("checkpoint") / "SAM2-UNeXT-1.pth"
    checkpoint.save_network(path, micro_model, epoch=1)
    return path


@pytest.fixture(scope="session")
def model(encoders) -> SAM2UNeXT:
    """The network MICRO with its encoders from files, after some training; not to be changed."""
    torch.manual_seed(3)
    model = SAM2UNeXT(*encoders.values(), **MICRO)
    model.up1.conv.double_conv[1].running_mean.fill_(0.5)
    return model.eval()


@pytest.fixture(scope="session")
def small(model, tmp_path_factory) -> Path:
    """That network as train.py saves it: without its encoders."""
    path = tmp_path_factory.mktemp("small") / "SAM2-UNeXT-7.pth"
    checkpoint.save_network(path, model, epoch=7)
    return path


def same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def same_network(ours: SAM2UNeXT, theirs: SAM2UNeXT) -> bool:
    return same_tensors(ours.state_dict(), theirs.state_dict())


def same_checkpoint(ours: Path, theirs: Path) -> bool:
    """Whether two files of train.py hold the same tensors."""
    return same_tensors(torch.load(ours)["state_dict"], torch.load(theirs)["state_dict"])


def train_options(text: str, toy: Path, save_path: Path, network: str = NETWORK) -> list[str]:
    """Options of train.py: `text`, and those that it needs; in fp32."""
    folders = ["--train_image_path", f"{toy}/train/Image", "--train_mask_path", f"{toy}/train/Mask"]
    more = f"--workers 0 --precision fp32 {text}"
    return [*network.split(), *folders, "--save_path", str(save_path), *more.split()]


def train_arguments(text: str, toy: Path, save_path: Path, network: str = NETWORK):
    """The arguments that train.py parses from `train_options`."""
    return arguments_of(train, *train_options(text, toy, save_path, network))


def validation(toy: Path) -> str:
    """Options of train.py to validate on the toy data's test images."""
    return f"--val_image_path {toy}/test/Image --val_mask_path {toy}/test/Mask"


def arguments_of(command, *options):
    """The arguments of a command, a module, with these options."""
    return command.get_args_parser().parse_args([str(option) for option in options])


def predict_arguments(checkpoint, images, save_path, *more):
    """Arguments of test.py; in fp32."""
    options = ["--checkpoint", checkpoint, "--test_image_path", images, "--save_path", save_path, "--precision", "fp32"]
    return arguments_of(test, *options, *more)


@pytest.fixture
def graphs(monkeypatch):
    """The backend of all that a test compiles, see graphs.py."""
    from graphs import Graphs  # imports torch's compiler

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", torch.compile)  # what `install` replaces comes back
    backend = Graphs()
    backend.install()
    yield backend
    torch._dynamo.reset()


@pytest.fixture
def without_figures(monkeypatch):
    """eval.py draws no curves, and examples only if they are named; fixtures of a wider scope are not affected."""
    monkeypatch.setattr(plots, "PLOTS", {})
    monkeypatch.setattr(plots, "most_differing", lambda images: [])


def eval_arguments(*options):
    """Arguments of eval.py."""
    return arguments_of(evaluation, *options)


def predict(checkpoint, images, save_path, *more) -> dict[str, np.ndarray]:
    """Runs test.py; returns the maps."""
    test.main(predict_arguments(checkpoint, images, save_path, *more))
    return read_maps(save_path)


def pretend_torchrun(monkeypatch, rank: int, processes: int) -> None:
    """Sets the environment of a process among several, which cannot meet."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
    for name, value in (ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}).items():
        monkeypatch.setenv(name, str(value))


def contents(folder: Path) -> dict[Path, bytes]:
    """All files below a folder, but its lock."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def program(script: str, *options: object) -> list[str]:
    """The command that runs a script of this project, see program.py."""
    return [sys.executable, str(ROOT / "tests/program.py"), str(ROOT / script), *map(str, options)]


def read_maps(folder: Path) -> dict[str, np.ndarray]:
    """The PNG files directly in a folder, by name."""
    return {path.name: np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def read_log(folder: Path) -> list[dict]:
    """The lines of a run's log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def save_image(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def failure(main, args, capsys) -> tuple[int, str]:
    """Runs a command that must fail: its exit status and its one line on standard error, without progress bars."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in lines if line and not re.search(r"\d+/\d+ \[", line)]  # a bar: 1/6 [00:01<00:07,
    assert len(lines) == 1, lines
    return stop.value.code, lines[0]
