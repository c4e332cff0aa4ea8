"""What the tests share: golden files, small networks, small data sets."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared"  # not part of the repository
SUIM8 = SHARED / "data" / "suim8"  # eight real pictures
sys.path.insert(0, str(GOLDEN))

import recipe  # noqa: E402

import checkpoint  # noqa: E402
import train  # noqa: E402
from SAM2UNeXT import SAM2UNeXT  # noqa: E402
from tools import toy_dataset  # noqa: E402

SMALL = {"sam2": "tiny", "aux": "vit_small_patch14_dinov2", "aux_size": 56, "size": 64}
# For tests of the commands, which build and save many networks: quicker still.
TINY = {"sam2": "tiny", "aux": "vit_tiny_patch16_224", "aux_size": 64, "size": 64}
NETWORK = "--hiera_path random --dinov2_path random " + " ".join(f"--{name} {value}" for name, value in TINY.items())


def pytest_configure(config):
    """The figures of all tests but those marked cuda are a CPU's, also where there is a GPU: it is hidden from them."""
    if config.option.markexpr != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk():
    """Tests write hundreds of megabytes of checkpoints; none has to outlast a power cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def golden(name: str):
    """A golden file: JSON as it is, npz as a dict of arrays."""
    path = GOLDEN / name
    return json.loads(path.read_text()) if path.suffix == ".json" else dict(np.load(path))


def relative_error(ours: torch.Tensor | np.ndarray, theirs: np.ndarray) -> float:
    """The greatest difference, relative to the greatest magnitude; shapes must agree."""
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def parameter(key: str, shape, seed: int = 0) -> torch.Tensor:
    """The recipe's float32 tensor called `key`."""
    return torch.from_numpy(recipe.parameter(key, tuple(shape), seed)).float()


@pytest.fixture(scope="session")
def small_model() -> SAM2UNeXT:
    """A small network whose parameters the recipe makes; not to be changed."""
    return recipe.fill(SAM2UNeXT(**SMALL), 0).eval()


@pytest.fixture(scope="session")
def _empty_full_model() -> SAM2UNeXT:
    with torch.device("meta"):
        model = SAM2UNeXT()
    return model.to_empty(device="cpu")


@pytest.fixture
def full_model(_empty_full_model):
    """Gives a function: the full network, filled with the parameters of a seed. One 2 GB network serves all tests."""

    def fill(seed: int) -> SAM2UNeXT:
        for name, buffer in _empty_full_model.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.zero_()
        return recipe.fill(_empty_full_model, seed).eval()

    yield fill
    _empty_full_model.zero_grad(set_to_none=True)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """A toy data set of 6 training and 4 test pictures."""
    folder = tmp_path_factory.mktemp("toy")
    toy_dataset.main(toy_dataset.get_args_parser().parse_args([str(folder), "--train", "6", "--test", "4"]))
    return folder


def sam2_file(path, size="tiny", extra=None, prefix=""):
    """A file with the keys of the published SAM 2 checkpoint; the trunk's tensors are the recipe's."""
    shapes = golden(f"sam2_hiera_{size}.keys.json") | (extra or {})
    state = {
        prefix + key: parameter(key, shape)
        if size == "tiny" and key.startswith(checkpoint.TRUNK)
        else torch.zeros(()).expand(shape)  # one number on the disk
        for key, shape in shapes.items()
    }
    torch.save({"model": state}, path)
    return path


def dinov2_file(path, name="vit_small_patch14_dinov2", image_size=518):
    """A file as timm publishes DINOv2: at its native 518 px, with the last norm."""
    state = timm.create_model(name, num_classes=0, img_size=image_size).state_dict()
    state = {key: parameter(key, value.shape) for key, value in state.items()}
    safetensors.torch.save_file(state, path)
    return path


@pytest.fixture(scope="session")
def encoders(tmp_path_factory) -> dict[str, Path]:
    """Files of the encoders of the network TINY, by option."""
    folder = tmp_path_factory.mktemp("encoders")
    return {
        "hiera_path": sam2_file(folder / "sam2_hiera_tiny.pt"),
        "dinov2_path": dinov2_file(folder / "aux.safetensors", TINY["aux"], TINY["aux_size"]),
    }


@pytest.fixture(scope="session")
def from_files(encoders) -> str:
    """The network TINY as options of train.py, its encoders from files: its checkpoints are small."""
    return " ".join(f"--{name} {value}" for name, value in (encoders | TINY).items())


def train_arguments(text: str, toy: Path, save_path: Path, network: str = NETWORK):
    """Arguments of train.py: `text` and what it cannot do without."""
    folders = ["--train_image_path", f"{toy}/train/Image", "--train_mask_path", f"{toy}/train/Mask"]
    words = [
        *network.split(),
        *folders,
        "--save_path",
        str(save_path),
        "--workers",
        "0",
        "--precision",
        "fp32",
        *text.split(),
    ]
    return train.get_args_parser().parse_args(words)


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory, small_model) -> Path:
    """The small network as train.py saves it."""
    path = tmp_path_factory.mktemp("checkpoint") / "SAM2-UNeXT-1.pth"
    checkpoint.save_network(path, small_model, epoch=1)
    return path


def save_picture(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def failure(main, args, capsys) -> tuple[int, str]:
    """Runs a command that must fail: its exit status and its one line on standard error, progress bars left out."""
    with pytest.raises(SystemExit) as stop:
        main(args)
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in lines if line and not re.search(r"\d+/\d+ \[", line)]  # a bar: 1/6 [00:01<00:07,
    assert len(lines) == 1, lines
    return stop.value.code, lines[0]
