"""tools/export.py --rembg: the graph takes images as rembg prepares them, and rembg's mask is the map of `predict`."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, arguments_of
from PIL import Image

from SAM2UNeXT import stretch
from tools import export

NEEDED = [name for name in export.PACKAGES if not importlib.util.find_spec(name)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(NEEDED) or torch.__version__ < export.MIN_TORCH, reason="requirements-export.txt is not installed"
    ),
]


@pytest.fixture(scope="module")
def graph(micro_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("rembg") / "micro.onnx"
    export.main(arguments_of(export, micro_checkpoint, path, "--rembg"))
    return path


def test_images_of_1024_px_minus_a_half_give_the_probability_first(graph, micro_model):
    import onnxruntime

    pixels = np.array(Image.open(ROOT / "docs/demo.jpg").convert("RGB").resize((1024, 1024)))
    shown = torch.from_numpy(pixels / 255).float().permute(2, 0, 1)[None]  # (1, 3, 1024, 1024) in [0, 1]
    session = onnxruntime.InferenceSession(graph)
    first, _ = session.run(None, {session.get_inputs()[0].name: (shown - 0.5).numpy()})
    with torch.no_grad():
        small = torch.nn.functional.interpolate(shown, (64, 64), mode="bilinear", antialias=True)
        expected = micro_model(
            (small - torch.tensor(export.MEAN)[:, None, None]) / torch.tensor(export.STD)[:, None, None]
        )
    assert np.abs(first - expected.sigmoid().numpy()).max() < 1e-4
    metadata = session.get_modelmeta().custom_metadata_map
    prepared = [json.loads(metadata[name]) for name in ("mean", "std", "size")]
    assert prepared == [[0.5, 0.5, 0.5], [1, 1, 1], 1024]


def test_rembg_gives_the_map_of_the_network(graph, micro_model, toy, monkeypatch):
    """It filters with Lanczos where `predict` is bilinear; it takes the brightest pixel for white, so there is one."""
    rembg = pytest.importorskip("rembg")
    monkeypatch.setenv("U2NET_HOME", str(graph.parent))
    session = rembg.new_session("dis_custom", model_path=str(graph))
    for path in sorted((toy / "test/Image").iterdir()):
        pixels = np.array(Image.open(path))
        pixels[:16, :16] = 255
        image = Image.fromarray(pixels)
        mask = np.array(rembg.remove(image, session=session, only_mask=True))
        expected = stretch(torch.from_numpy(micro_model.predict(image))).numpy()
        assert (
            mask.shape == expected.shape and np.abs(np.subtract(mask, expected, dtype=float)).mean() < 4
        )  # grey levels
