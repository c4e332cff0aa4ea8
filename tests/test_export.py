"""tools/export.py: the graph computes the maps of test.py, for any batch and without torch, or no file is written."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
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
pytestmark = pytest.mark.skipif(
    bool(NEEDED) or torch.__version__ < export.MIN_TORCH,
    reason="requirements-export.txt is not installed",
)


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


@pytest.mark.slow
def test_the_metadata_says_how_to_prepare_images_and_what_was_exported(graph, micro_model):
    metadata = session(graph).get_modelmeta().custom_metadata_map
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


def spoil(path, value=0):
    """Changes one constant in the graph: half of the weights of the head."""
    import onnx

    model = onnx.load(path)
    [weight] = [tensor for tensor in model.graph.initializer if tensor.name.endswith("head.weight")]
    array = onnx.numpy_helper.to_array(weight).copy()
    array[:, ::2] = value
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, path)


@pytest.mark.slow
@pytest.mark.parametrize("images, graph_gets", [(1, [1, 2]), (3, [1, 1, 1, 2])])
def test_the_graph_is_checked_with_single_images_and_two_at_once(images, graph_gets, graph, micro_model, toy):
    tasks = script.tasks_of_images(sorted((toy / "test/Image").iterdir())[:images])
    function = export.load_graph(graph)
    batches = []
    largest = export.compare(micro_model, lambda batch: batches.append(len(batch)) or function(batch), tasks)
    assert batches == graph_gets and largest <= 1


@pytest.mark.slow
def test_logits_that_are_not_finite_are_no_agreement(graph, micro_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "export", lambda model, path, half: spoil(shutil.copy(graph, path), np.nan))
    status, line = failure(export.main, arguments_of(export, micro_checkpoint, tmp_path / "x.onnx"), capsys)
    assert status == 1 and "onnxruntime computes NaN or infinity for " in line and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_wrong_graph_is_not_written_and_the_status_is_1(graph, micro_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "export", lambda model, path, half: spoil(shutil.copy(graph, path)))
    (tmp_path / "x.onnx").write_text("from before")
    status, line = failure(export.main, arguments_of(export, micro_checkpoint, tmp_path / "x.onnx"), capsys)
    assert status == 1 and "x.onnx: not written, since maps may differ by at most 1 grey level" in line
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("x.onnx", "from before")]


NO_MEMORY = [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
NO_MEMORY += [Exception("Failed to allocate memory for requested buffer of size 9")]  # onnxruntime's


@pytest.mark.parametrize("error", NO_MEMORY)
def test_lack_of_memory_is_one_line(error, micro_checkpoint, tmp_path, monkeypatch, capsys):
    def fail(*args, **options):
        raise torch.onnx.OnnxExporterError("failed\nand more") from error

    monkeypatch.setattr(torch.onnx, "export", fail)
    status, line = failure(export.main, arguments_of(export, micro_checkpoint, tmp_path / "x.onnx"), capsys)
    assert status == 1 and line.endswith("out of memory: a smaller --size needs less") and not list(tmp_path.iterdir())


def test_what_the_exporter_lacks_shows_its_traceback_and_leaves_nothing(micro_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", mock.Mock(side_effect=torch.onnx.OnnxExporterError("no function")))
    with pytest.raises(torch.onnx.OnnxExporterError, match="no function"):
        export.main(arguments_of(export, micro_checkpoint, tmp_path / "x.onnx"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["SAM2-UNeXT-7.pth", "link", "image", "encoder"])
def test_no_input_is_replaced(name, small, encoders, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "export", lambda *options: pytest.fail("exported"))
    checkpoint, images = Path(shutil.copy(small, tmp_path)), shutil.copytree(toy / "test/Image", tmp_path / "Image")
    (tmp_path / "link").symlink_to(checkpoint)
    outputs = {"image": images / "toy_0001.jpg", "encoder": encoders["hiera_path"]}
    output = outputs.get(name, tmp_path / name)
    status, line = failure(export.main, arguments_of(export, checkpoint, output, "--check", images), capsys)
    assert status == 2 and f"{output}: is one of the inputs and would be replaced; name another file" in line


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


@pytest.mark.parametrize("name, message", [("missing.jpg", ""), ("text.jpg", "cannot be read as an image")])
def test_an_image_that_cannot_be_read_is_named_before_the_export(name, message, micro_checkpoint, tmp_path, capsys):
    (tmp_path / "text.jpg").write_text("text")
    args = arguments_of(export, micro_checkpoint, tmp_path / "out/x.onnx", "--check", tmp_path / name)
    status, line = failure(export.main, args, capsys)
    assert status == 2 and f"{tmp_path / name}: {message}" in line and not (tmp_path / "out").exists()


def test_an_old_torch_is_named(micro_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.9.1+cu128"))
    status, line = failure(export.main, arguments_of(export, micro_checkpoint, tmp_path / "x.onnx"), capsys)
    assert status == 2 and "torch 2.9.1+cu128 is too old: bash tools/setup.sh requirements-export.txt" in line


@pytest.mark.slow
def test_the_documented_example_writes_the_map_of_test_py_without_torch(graph, micro_checkpoint, toy, tmp_path):
    example = re.findall(r"```python\n(.*?)```", (ROOT / "docs/deploy.md").read_text(), flags=re.DOTALL)[0]
    assert len(example.splitlines()) <= 30
    (tmp_path / "cutout.py").write_text(example)
    image = toy / "test/Image/toy_0001.jpg"
    without = "import runpy, sys; sys.modules.update(torch=None, torchvision=None); sys.argv.pop(0); "
    without += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = sys.executable, "-c", without, "cutout.py", graph, image, "cutout.png"
    subprocess.run([str(word) for word in command], check=True, cwd=tmp_path)
    script.main(predict_arguments(micro_checkpoint, image, tmp_path / "maps"))
    [expected] = read_maps(tmp_path / "maps").values()
    cutout = np.array(Image.open(tmp_path / "cutout.png"))
    assert np.abs(cutout[..., 3].astype(int) - expected).max() <= 1
    assert np.array_equal(cutout[..., :3], np.array(Image.open(image)))
