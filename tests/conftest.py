"""What the tests share: golden files, small networks, small data sets."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
SHARED = ROOT.parent / "shared"  # not part of the repository
SUIM8 = SHARED / "data" / "suim8"  # eight real pictures
sys.path.insert(0, str(GOLDEN))

import recipe  # noqa: E402

import cli  # noqa: E402, F401  (fails at once where the repository is not on the path)
from SAM2UNeXT import SAM2UNeXT  # noqa: E402
from tools import toy_dataset  # noqa: E402

SMALL = {"sam2": "tiny", "aux": "vit_small_patch14_dinov2", "aux_size": 56, "size": 64}
# For tests of the commands, which build and save many networks: quicker still.
TINY = {"sam2": "tiny", "aux": "vit_tiny_patch16_224", "aux_size": 64, "size": 64}
NETWORK = "--hiera_path random --dinov2_path random " + " ".join(f"--{name} {value}" for name, value in TINY.items())


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


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory, small_model) -> Path:
    """The small network as train.py saves it."""
    import checkpoint

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
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line and "img/s" not in line]
    assert len(lines) == 1, lines
    return stop.value.code, lines[0]
