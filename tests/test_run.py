"""run.py: what a training run logs, validates and keeps, and where it starts from."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import MICRO, NETWORK, failure, read_log
from conftest import train_arguments as arguments
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from dataset import image_tensor
from evaluation import metrics
from SAM2UNeXT import SAM2UNeXT, probability_map, stretch
from unext import checkpoint, files, run

FIGURES = ("loss", "bce", "wiou", "lr", "grad_norm", "pictures_per_second", "memory_mb", "seconds_left")


@pytest.fixture(scope="module")
def told(toy, from_files, tmp_path_factory):
    """The folder of a run of 3 epochs with validation."""
    folder = tmp_path_factory.mktemp("told")
    validation = f"--val_image_path {toy}/test/Image --val_mask_path {toy}/test/Mask"
    train.main(arguments(f"--epoch 3 --batch_size 2 --log_every 2 --lr 1e-3 {validation}", toy, folder, from_files))
    return folder


def test_the_log_has_a_line_every_few_steps_and_every_epoch(told):
    lines = read_log(told)
    assert [(line["epoch"], line.get("step")) for line in lines] == [(e, s) for e in (1, 2, 3) for s in (2, None)]
    steps = [line for line in lines if "step" in line]
    for line in steps:
        assert line.keys() == {"epoch", "step", *FIGURES}
        assert line["loss"] == pytest.approx(line["bce"] + line["wiou"])
        assert min(line["grad_norm"], line["pictures_per_second"], line["seconds_left"]) > 0
        assert 50 < line["memory_mb"] < 100_000
    assert [line["lr"] for line in steps] == sorted((line["lr"] for line in steps), reverse=True)
    for line in (line for line in lines if "step" not in line):
        assert line.keys() == {"epoch", "loss", "bce", "wiou", "Smeasure", "wFmeasure", "MAE"}


def test_tensorboard_shows_the_same_with_panels(told):
    board = EventAccumulator(str(told / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    steps = [line for line in read_log(told) if "step" in line]
    for name in FIGURES:
        shown = [event.value for event in board.Scalars(f"step/{name}")]
        assert shown == pytest.approx([line[name] for line in steps])
    assert [event.step for event in board.Scalars("step/loss")] == [2, 5, 8]  # of all steps
    assert len(board.Scalars("epoch/Smeasure")) == 3
    panels = board.Tags()["images"]
    assert panels == ["toy_0000", "toy_0001", "toy_0002"]
    assert [(event.width, event.height) for event in board.Images(panels[0])] == [(768, 256)] * 3


def test_panels_show_image_mask_and_prediction(toy):
    model = SAM2UNeXT(**MICRO)
    torch.nn.init.constant_(model.head.bias, 50)
    pair = (toy / "test/Image/toy_0000.jpg", toy / "test/Mask/toy_0000.png")
    [(name, panel)] = run.panels(model, [pair])
    assert name == "toy_0000" and panel.shape == (3, 256, 768)
    picture, mask, prediction = panel.split(256, dim=2)
    expected = np.array(files.read_image(pair[0]).resize((256, 256), Image.Resampling.BOX)) / 255
    assert np.abs(picture.permute(1, 2, 0).numpy() - expected).mean() < 0.1
    assert abs(mask.mean().item() - np.array(files.read_mask(pair[1])).mean() / 255) < 0.01
    assert prediction.min() > 0.9


def test_a_resumed_log_has_no_duplicate_step_and_no_truncated_line(tmp_path):
    places = [(1, 1), (1, 2), (1, None), (2, 1), (2, 2), (2, None)]
    lines = [json.dumps({"epoch": epoch} | ({"step": step} if step else {})) for epoch, step in places]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"epoch": 3, "st')
    for progress, kept in (
        (run.Progress(3, 0), 6),
        (run.Progress(2, 1), 4),
        (run.Progress(2, 0), 3),
        (run.Progress(), 0),
    ):
        run.Log(tmp_path, progress, 1, 2, 3).close()
        assert (tmp_path / "log.jsonl").read_text().splitlines() == lines[:kept]


def test_args_json_records_arguments_versions_and_revision(told, toy):
    content = json.loads((told / "args.json").read_text())
    assert content["arguments"]["lr"] == 1e-3 and content["arguments"]["train_image_path"] == [f"{toy}/train/Image"]
    assert content["versions"]["torch"] == torch.__version__ and "python" in content["versions"]
    assert content["effective_batch"] == 2 and content["git"] == run.git_revision()


def test_scores_are_those_of_the_maps_that_the_commands_write(told, toy):
    model = SAM2UNeXT.from_checkpoint(told / "SAM2-UNeXT-3.pth")
    scores = []
    for image, mask in files.pair([toy / "test/Image"], [toy / "test/Mask"]):
        truth = np.array(files.read_mask(mask))
        with torch.no_grad():
            logits = model(image_tensor(files.read_image(image), 64)[None])[0]
        scores.append(metrics.score(stretch(probability_map(logits, truth.shape)).numpy(), truth))
    expected = metrics.mean(scores).figures()
    for name in ("Smeasure", "wFmeasure", "MAE"):
        assert read_log(told)[-1][name] == pytest.approx(expected[name], abs=1e-6)


def test_best_pth_is_the_epoch_of_the_best_s_measure(toy, from_files, tmp_path, monkeypatch):
    scores = iter([0.5, 0.7, 0.6, 0.65])
    monkeypatch.setattr(run, "validate", lambda *args: {"Smeasure": next(scores)})
    options = f"--val_image_path {toy}/test/Image --val_mask_path {toy}/test/Mask --epoch 4 --batch_size 6 --resume"
    args = arguments(options, toy, tmp_path, from_files)
    save_last = run.save_last

    def stop_after_epoch_2(state):
        save_last(state)
        if state.progress.epoch == 3:
            raise SystemExit(9)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run, "save_last", stop_after_epoch_2)
        train.main(args)
    train.main(args)  # 0.6 is better than nothing, and not than what there was
    assert torch.load(tmp_path / "best.pth")["epoch"] == 2
    assert [line["Smeasure"] for line in read_log(tmp_path)] == [0.5, 0.7, 0.6, 0.65]


def test_validation_stops_when_the_run_is_asked_to(toy):
    pairs = files.pair([toy / "test/Image"], [toy / "test/Mask"])
    model = SAM2UNeXT(**MICRO)
    assert run.validate(model, pairs, 1, [15]) is None
    assert run.validate(model, pairs[:1], 1, []).keys() == {"Smeasure", "wFmeasure", "MAE"}


def test_mismatched_validation_folders_are_one_line(toy, tmp_path, capsys):
    args = arguments(f"--val_image_path {toy}/test/Image", toy, tmp_path)
    status, line = failure(train.main, args, capsys)
    assert status == 2 and "1 folder(s) of images but 0 of masks" in line


@pytest.mark.parametrize("kind", ["small", "whole"])
def test_init_starts_from_trained_weights(kind, told, toy, from_files, tmp_path):
    source = told / "SAM2-UNeXT-3.pth"
    trained = SAM2UNeXT.from_checkpoint(source)
    if kind == "whole":
        source = tmp_path / "whole.pth"
        checkpoint.save(source, checkpoint.network_content(trained, whole=True))
    train.main(arguments(f"--epoch 1 --lr 0 --batch_size 6 --init {source}", toy, tmp_path / "run", from_files))
    state = SAM2UNeXT.from_checkpoint(tmp_path / "run/SAM2-UNeXT-1.pth").state_dict()
    same = {key for key, value in trained.state_dict().items() if torch.equal(value, state[key])}
    assert all("running_" in key or "tracked" in key for key in state.keys() - same)


def test_init_from_a_whole_file_restores_its_random_encoders(told, toy, tmp_path):
    trained = SAM2UNeXT.from_checkpoint(told / "SAM2-UNeXT-3.pth")
    checkpoint.save(tmp_path / "whole.pth", checkpoint.network_content(trained, whole=True))
    train.main(
        arguments(f"--epoch 1 --lr 0 --batch_size 6 --init {tmp_path}/whole.pth", toy, tmp_path / "run", NETWORK)
    )
    again = SAM2UNeXT.from_checkpoint(tmp_path / "run/SAM2-UNeXT-1.pth")
    for option in ("hiera_path", "dinov2_path"):
        ours, theirs = (checkpoint.encoder_state(one, one.state_dict(), option) for one in (again, trained))
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_init_with_other_encoders_is_refused(told, toy, tmp_path, capsys):
    args = arguments(f"--init {told}/SAM2-UNeXT-3.pth", toy, tmp_path, NETWORK)
    status, line = failure(train.main, args, capsys)
    assert status == 2 and "was not trained with a random encoder; give sam2_hiera_micro.pt" in line


def test_last_pth_can_be_used_to_predict(told):
    assert SAM2UNeXT.from_checkpoint(told / "last.pth").network == MICRO
    assert math.isfinite(torch.load(told / "last.pth")["progress"]["best"])
