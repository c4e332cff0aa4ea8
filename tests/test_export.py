"""tools/export.py: the graph computes the maps of test.py, for any batch and without torch, or no file is written.
With --rembg it takes images as rembg prepares them."""

import importlib.util
import json
import os
import re
import runpy
import shutil
import signal
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import recipe
import torch
from conftest import ROOT, arguments_of, failure, predict_arguments, read_maps
from PIL import Image
from torch.torch_version import TorchVersion

import test as script
from dataset import MEAN, STD
from tools import export
from unext.checkpoint import trained_fingerprint

NEEDED = [name for name in export.PACKAGES if not importlib.util.find_spec(name)]
LACKS = bool(NEEDED) or torch.__version__ < export.MIN_TORCH
pytestmark = pytest.mark.skipif(LACKS, reason="requirements-export.txt is not installed")


def session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path)


@pytest.fixture(scope="module")
def exported(micro_checkpoint, tmp_path_factory):
    """The network MICRO, exported to a file, and what torch made of it; not to be changed."""
    path = tmp_path_factory.mktemp("graph") / "micro.onnx"
    function, programs = torch.onnx.export, []

    def keep(*args, **options):
        programs.append(function(*args, **options))
        return programs[-1]

    with mock.patch.object(torch.onnx, "export", keep):
        export.main(arguments_of(export, micro_checkpoint, path))
    return path, programs[0]


@pytest.fixture
def graph(exported):
    return exported[0]


@pytest.mark.slow
def test_a_graph_computes_logits_and_probability_of_any_batch(graph, micro_model):
    assert [path.name for path in graph.parent.iterdir()] == [graph.name]  # small weights are in it
    for batch in (1, 3):
        images = recipe.image(f"onnx{batch}", (batch, 3, 64, 64))
        probability, logits = session(graph).run(None, {"images": images.numpy()})
        with torch.no_grad():
            expected = micro_model(images)
        assert logits.shape == (batch, 1, 64, 64) and logits.dtype == np.float32
        assert np.abs(logits - expected.numpy()).max() < 1e-4 * expected.abs().max()
        assert np.abs(probability - expected.sigmoid().numpy()).max() < 1e-5

    metadata = session(graph).get_modelmeta().custom_metadata_map  # how to prepare images, and what was exported
    assert json.loads(metadata["mean"]) == list(MEAN) and json.loads(metadata["std"]) == list(STD)
    assert metadata["size"] == "64" and metadata["checkpoint"] == trained_fingerprint(micro_model)


@pytest.mark.slow
def test_given_images_are_compared_in_half_precision_too(graph, micro_checkpoint, toy, tmp_path, capsys):
    options = "--check", toy / "test/Image", "--size", 96, "--half"
    export.main(arguments_of(export, micro_checkpoint, tmp_path / "new/half.onnx", *options))
    assert re.search(r"maps differ by at most [0-3] grey levels?, 0\.\d{4} on average", capsys.readouterr().out)
    half = session(tmp_path / "new/half.onnx")
    assert half.get_inputs()[0].shape[1:] == [3, 96, 96]
    assert {tensor.type for tensor in (*half.get_inputs(), *half.get_outputs())} == {"tensor(float)"}
    assert (tmp_path / "new/half.onnx").stat().st_size < 0.6 * graph.stat().st_size


@pytest.mark.slow
def test_large_weights_have_another_file_which_goes_with_the_graph(exported, micro_checkpoint, tmp_path, monkeypatch):
    graph, program = exported
    large = SimpleNamespace(model=program.model, save=lambda path: program.save(path, external_data=True))
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: large)
    path = tmp_path / "large.onnx"
    export.main(arguments_of(export, micro_checkpoint, path))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
    assert path.stat().st_size < (tmp_path / "large.onnx.data").stat().st_size
    session(path)
    monkeypatch.setattr(export, "export", lambda model, path, half: shutil.copy(graph, path))
    export.main(arguments_of(export, micro_checkpoint, path))
    assert [file.name for file in tmp_path.iterdir()] == ["large.onnx"]
    session(path)


def spoil(path, value):
    """Changes one constant in the graph: half of the weights of the head."""
    import onnx

    model = onnx.load(path)
    [weight] = [tensor for tensor in model.graph.initializer if tensor.name.endswith("head.weight")]
    array = onnx.numpy_helper.to_array(weight).copy()
    array[:, ::2] = value
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, path)


@pytest.mark.slow
def test_the_graph_is_checked_with_single_images_and_two_at_once(graph, micro_model, toy):
    function, sizes = export.load_graph(graph), []
    for images in (1, 3):
        tasks = script.tasks_of_images(sorted((toy / "test/Image").iterdir())[:images])
        assert export.compare(micro_model, lambda batch: sizes.append(len(batch)) or function(batch), tasks) <= 1
    assert sizes == [1, 2, 1, 1, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "weight, message",
    [
        (0, "x.onnx: not written, since maps may differ by at most 1 grey level"),
        (np.nan, "0.png have NaN or infinity; a half-precision graph may overflow"),
    ],
)
def test_a_wrong_graph_is_not_written(weight, message, graph, micro_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "export", lambda model, path, half: spoil(shutil.copy(graph, path), weight))
    (tmp_path / "x.onnx").write_text("from before")
    status, line = failure(export.main, arguments_of(export, micro_checkpoint, tmp_path / "x.onnx"), capsys)
    assert status == 1 and message in line
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x.onnx", "from before")]


ALLOCATION = Exception("Failed to allocate memory for requested buffer of size 9")  # onnxruntime's


def test_an_export_that_fails_leaves_nothing_and_lack_of_memory_is_one_line(
    micro_checkpoint, tmp_path, monkeypatch, capsys
):
    for cause, raised in ((ALLOCATION, SystemExit), (None, torch.onnx.OnnxExporterError)):
        error = torch.onnx.OnnxExporterError("failed\nand more")
        error.__cause__ = cause
        monkeypatch.setattr(torch.onnx, "export", mock.Mock(side_effect=error))
        with pytest.raises(raised):
            export.main(arguments_of(export, micro_checkpoint, tmp_path / "x.onnx"))
        assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err.endswith("out of memory: a smaller --size needs less\n")


def test_no_input_is_replaced(small, encoders, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "export", lambda *options: pytest.fail("exported"))
    images = toy / "test/Image"
    (tmp_path / "link").symlink_to(small)
    for output in (small, tmp_path / "link", images / "toy_0001.jpg", encoders["hiera_path"]):
        status, line = failure(export.main, arguments_of(export, small, output, "--check", images), capsys)
        assert status == 2 and f"{output}: is one of the inputs and would be replaced; name another place" in line


@pytest.mark.posix
def test_a_signal_leaves_nothing_behind(micro_checkpoint, tmp_path, monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    monkeypatch.setattr(export, "export", lambda *options: os.kill(os.getpid(), signal.SIGTERM))
    try:
        with pytest.raises(SystemExit) as stop:
            export.main(arguments_of(export, micro_checkpoint, tmp_path / "x.onnx"))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert stop.value.code == 128 + signal.SIGTERM and not list(tmp_path.iterdir())


def test_an_image_that_cannot_be_read_is_named_before_the_export(micro_checkpoint, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("text")
    args = arguments_of(export, micro_checkpoint, tmp_path / "out/x.onnx", "--check", tmp_path / "text.jpg")
    status, line = failure(export.main, args, capsys)
    assert status == 2 and f"{tmp_path}/text.jpg: cannot be read as an image" in line
    assert not (tmp_path / "out").exists()


def test_an_old_torch_is_named(micro_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1+cu128"))
    status, line = failure(export.main, arguments_of(export, micro_checkpoint, tmp_path / "x.onnx"), capsys)
    assert status == 2 and "torch 2.9.1+cu128 is too old: bash tools/setup.sh requirements-export.txt" in line


@pytest.mark.slow
def test_the_documented_example_writes_the_map_of_test_py_without_torch(
    graph, micro_checkpoint, toy, tmp_path, monkeypatch
):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/deploy.md").read_text(), flags=re.DOTALL)
    [example] = [block for block in blocks if "import onnxruntime" in block]
    assert len(example.splitlines()) <= 30
    (tmp_path / "cutout.py").write_text(example)
    image = toy / "test/Image/toy_0001.jpg"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cutout.py", str(graph), str(image), "cutout.png"])
    with mock.patch.dict(sys.modules, torch=None, torchvision=None):
        runpy.run_path("cutout.py", run_name="__main__")
    script.main(predict_arguments(micro_checkpoint, image, tmp_path / "maps"))
    [expected] = read_maps(tmp_path / "maps").values()
    cutout = np.array(Image.open(tmp_path / "cutout.png"))
    assert np.abs(cutout[..., 3].astype(int) - expected).max() <= 1
    assert np.array_equal(cutout[..., :3], np.array(Image.open(image)))


@pytest.fixture(scope="module")
def rembg_graph(micro_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("rembg") / "micro.onnx"
    export.main(arguments_of(export, micro_checkpoint, path, "--rembg"))
    return path


@pytest.mark.slow
def test_for_rembg_images_of_1024_px_minus_a_half_give_the_probability_first(rembg_graph, micro_model):
    pixels = np.array(Image.open(ROOT / "docs/demo.jpg").convert("RGB").resize((1024, 1024)))
    shown = torch.from_numpy(pixels / 255).float().permute(2, 0, 1)[None]  # (1, 3, 1024, 1024) in [0, 1]
    rembg = session(rembg_graph)
    first, _ = rembg.run(None, {rembg.get_inputs()[0].name: (shown - 0.5).numpy()})
    small = torch.nn.functional.interpolate(shown, (64, 64), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = micro_model((small - export.CHANNEL_MEAN) / export.CHANNEL_STD)
    assert np.abs(first - expected.sigmoid().numpy()).max() < 1e-4
    metadata = rembg.get_modelmeta().custom_metadata_map
    assert [json.loads(metadata[name]) for name in ("mean", "std", "size")] == [[0.5] * 3, [1] * 3, 1024]
