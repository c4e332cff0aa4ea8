"""unext/log.py: what a training run logs; its validation, what it keeps, and where it starts from."""

import json
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import MICRO, NETWORK, failure, read_log, same_checkpoint, same_tensors, validation
from conftest import train_arguments as arguments
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from dataset import image_tensor
from evaluation import metrics
from SAM2UNeXT import SAM2UNeXT, probability_map, stretch
from unext import checkpoint, log, pairing, run
from unext.images import read_image
from unext.masks import read_mask

FIGURES = ("loss", "bce", "wiou", "lr", "grad_norm", "images_per_second", "seconds_left")
RECIPE = "--epoch 3 --batch_size 2 --log_every 2 --lr 1e-3"


@pytest.fixture(scope="module")
def logged(toy, from_files, tmp_path_factory):
    """The folder of a run of 3 epochs with validation."""
    folder = tmp_path_factory.mktemp("logged") / "new" / "folder"
    train.main(arguments(f"{RECIPE} {validation(toy)}", toy, folder, from_files))
    return folder


def test_the_log_has_a_line_every_few_steps_of_the_run_and_at_the_end_of_each_epoch(logged):
    lines = read_log(logged)
    places = [(1, 2), (1, 3), (1, None), (2, 1), (2, 3), (2, None), (3, 2), (3, 3), (3, None)]
    assert [(line["epoch"], line.get("step")) for line in lines] == places
    steps = [line for line in lines if "step" in line]
    for line in steps:
        assert line.keys() == {"epoch", "step", *FIGURES}
        assert line["loss"] == pytest.approx(line["bce"] + line["wiou"])
        assert min(line["grad_norm"], line["images_per_second"]) > 0 <= line["seconds_left"]
    assert [line["lr"] for line in steps] == sorted((line["lr"] for line in steps), reverse=True)
    for line in (line for line in lines if "step" not in line):
        assert line.keys() == {"epoch", "loss", "bce", "wiou", "Smeasure", "wFmeasure", "MAE"}


def test_norms_of_steps_that_fp16_skipped_are_left_out(micro_model, tmp_path):
    training = SimpleNamespace(folder=tmp_path, model=micro_model, progress=run.Progress())
    args = SimpleNamespace(batch_size=1, accumulate=1, log_every=2, epoch=1, device="cpu")
    with log.Log(args, training, pairs=8, steps_per_epoch=8) as opened:
        for norm in (math.inf, 3.0, math.inf, math.nan):
            step = run.Step(1, {"bce": 1.0}, norm, 1e-3)
            training.progress.count(step)
            opened.step(step)
    assert [line.get("grad_norm") for line in read_log(tmp_path)] == [3.0, None]


def test_tensorboard_shows_the_same_with_panels_of_the_images_shape(logged, toy):
    board = EventAccumulator(str(logged / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    steps = [line for line in read_log(logged) if "step" in line]
    for name in FIGURES:
        shown = [event.value for event in board.Scalars(f"step/{name}")]
        assert shown == pytest.approx([line[name] for line in steps])
    assert [event.step for event in board.Scalars("step/loss")] == [2, 3, 4, 6, 8, 9]  # of all steps
    assert len(board.Scalars("epoch/Smeasure")) == 3
    panels = board.Tags()["images"]
    assert panels == ["toy_0000", "toy_0001", "toy_0002"]
    width, height = Image.open(toy / "test/Image/toy_0000.jpg").size
    for event in board.Images(panels[0]):
        assert max(event.width / 3, event.height) == 256
        assert event.width / 3 / event.height == pytest.approx(width / height, rel=0.01)


def test_panels_show_image_mask_and_prediction(toy):
    model = SAM2UNeXT(**MICRO)
    torch.nn.init.constant_(model.head.bias, 50)
    pair = (toy / "test/Image/toy_0000.jpg", toy / "test/Mask/toy_0000.png")
    [(name, panel)] = log.panels(model, [pair])
    image, mask, prediction = panel.chunk(3, dim=2)
    assert name == "toy_0000" and max(image.shape) == 256
    expected = np.array(read_image(pair[0]).resize(image.shape[:0:-1], Image.Resampling.BOX)) / 255
    assert np.abs(image.permute(1, 2, 0).numpy() - expected).mean() < 0.1
    assert abs(mask.mean().item() - np.array(read_mask(pair[1])).mean() / 255) < 0.01
    assert prediction.min() > 0.9


def test_a_resumed_log_has_no_duplicate_step_and_no_truncated_line(tmp_path):
    places = [(1, 1), (1, 2), (1, None), (2, 1), (2, 2), (2, None)]
    lines = [json.dumps({"epoch": epoch} | ({"step": step} if step else {})) for epoch, step in places]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"epoch": 3, "st')
    args = SimpleNamespace(batch_size=1, accumulate=1)
    model = SimpleNamespace(precision=torch.float32)
    for place, kept in (((3, 0), 6), ((2, 1), 4), ((2, 0), 3), ((1, 0), 0)):
        resumed = log.Log(args, SimpleNamespace(folder=tmp_path, model=model, progress=run.Progress(*place)), 2, 2)
        resumed.open()
        resumed.__exit__(None)
        assert (tmp_path / "log.jsonl").read_text().splitlines() == lines[:kept]


def test_a_run_writes_its_files_alone_with_arguments_versions_and_revision(logged, toy):
    content = json.loads((logged / "args.json").read_text())
    assert content["arguments"]["lr"] == 1e-3 and content["arguments"]["train_image_path"] == [f"{toy}/train/Image"]
    assert content["versions"]["torch"] == torch.__version__ and "python" in content["versions"]
    assert content["effective_batch"] == 2 and content["git"] == log.git_revision()
    names = {path.name for path in logged.iterdir()} - {".lock"}
    assert names == {"SAM2-UNeXT-3.pth", "best.pth", "last.pth", "args.json", "log.jsonl", "tensorboard"}


def test_scores_are_those_of_the_maps_that_the_commands_write(logged, toy):
    model = SAM2UNeXT.from_checkpoint(logged / "last.pth")
    scores = []
    for image, path in pairing.pair([toy / "test/Image"], [toy / "test/Mask"]):
        mask = np.array(read_mask(path))
        with torch.no_grad():
            logits = model(image_tensor(read_image(image), 64)[None])[0]
        scores.append(metrics.score(stretch(probability_map(logits, mask.shape)).numpy(), mask))
    expected = metrics.mean(scores).figures()
    for name in ("Smeasure", "wFmeasure", "MAE"):
        assert read_log(logged)[-1][name] == pytest.approx(expected[name], abs=1e-6)


def test_checkpoints_are_the_best_each_fifth_and_the_last_epoch(tmp_path, monkeypatch, capsys):
    saved, model = [], SimpleNamespace(config={}, precision=torch.float32)
    monkeypatch.setattr(checkpoint, "save_network", lambda path, model, epoch: saved.append((path.name, epoch)))
    monkeypatch.setattr(run.Run, "save", lambda self: None)
    training = run.Run(tmp_path, model, None, None, None, {"--epoch": 6})
    for score in (0.5, 0.7, 0.6, 0.65, 0.8, 0.1):
        training.end_epoch({"Smeasure": score})
    kept = [("SAM2-UNeXT-5.pth", 5), ("SAM2-UNeXT-6.pth", 6)]
    assert saved == [("best.pth", 1), ("best.pth", 2), ("best.pth", 5), *kept]
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "epoch 3: Smeasure 0.6000; best.pth stays, with 0.7000"
    assert [line for line in lines if line.startswith("saved")] == [f"saved {tmp_path}/{name}" for name, _ in kept]


def test_a_run_stopped_in_its_validation_repeats_only_that(logged, toy, from_files, tmp_path, monkeypatch, capsys):
    args = arguments(f"{RECIPE} {validation(toy)}", toy, tmp_path, from_files)
    in_order = train.in_order

    def signal_and_read(*options, **more):
        signal.raise_signal(signal.SIGTERM)
        return in_order(*options, **more)

    with monkeypatch.context() as patch:
        patch.setattr(train, "in_order", signal_and_read)
        status, line = failure(train.main, args, capsys)
    assert status == 143 and "SIGTERM after epoch 1, step 3" in line and not (tmp_path / "best.pth").exists()
    args.resume = True
    train.main(args)
    assert same_checkpoint(tmp_path / "SAM2-UNeXT-3.pth", logged / "SAM2-UNeXT-3.pth")
    assert [line.get("Smeasure") for line in read_log(tmp_path)] == [line.get("Smeasure") for line in read_log(logged)]


@pytest.fixture(scope="module")
def whole(logged, tmp_path_factory):
    """The trained network of that run, with its encoders in the file."""
    path = tmp_path_factory.mktemp("whole") / "whole.pth"
    model = SAM2UNeXT.from_checkpoint(logged / "SAM2-UNeXT-3.pth")
    checkpoint.save(path, checkpoint.network_content(model, whole=True))
    return path


@pytest.mark.parametrize("kind", ["small", "whole", "whole with random encoders"])
def test_init_starts_from_trained_weights(kind, logged, whole, toy, from_files, tmp_path):
    source = logged / "SAM2-UNeXT-3.pth" if kind == "small" else whole
    network = NETWORK if "random" in kind else from_files
    args = arguments(f"--epoch 1 --lr 0 --batch_size 6 --resume --init {source}", toy, tmp_path, network)
    train.main(args)
    args.init = tmp_path / "moved.pth"
    train.main(args)  # what is resumed needs it no more
    models = [SAM2UNeXT.from_checkpoint(path) for path in (whole, tmp_path / "SAM2-UNeXT-1.pth")]
    assert same_tensors(*(dict(model.named_parameters()) for model in models))  # BatchNorm's statistics have moved
