"""unext/log.py: what a training run logs; its validation, what it keeps, and where it starts from."""

import json
import math
import signal
from concurrent.futures import Future

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
from unext import checkpoint, log, pairing, run
from unext.images import read_image
from unext.masks import read_mask

FIGURES = ("loss", "bce", "wiou", "lr", "grad_norm", "images_per_second", "seconds_left")


@pytest.fixture(scope="module")
def told(toy, from_files, tmp_path_factory):
    """The folder of a run of 3 epochs with validation."""
    folder = tmp_path_factory.mktemp("told")
    validation = f"--val_image_path {toy}/test/Image --val_mask_path {toy}/test/Mask"
    train.main(arguments(f"--epoch 3 --batch_size 2 --log_every 2 --lr 1e-3 {validation}", toy, folder, from_files))
    return folder


def test_the_log_has_a_line_every_few_steps_of_the_run_and_at_the_end_of_each_epoch(told):
    lines = read_log(told)
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


def test_tensorboard_shows_the_same_with_panels_of_the_images_shape(told, toy):
    board = EventAccumulator(str(told / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    steps = [line for line in read_log(told) if "step" in line]
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
    for place, kept in (((3, 0), 6), ((2, 1), 4), ((2, 0), 3), ((1, 0), 0)):
        with log.Log(tmp_path, run.Progress(*place), {}, 1, 2, 3) as resumed:
            resumed.open()
            assert (tmp_path / "log.jsonl").read_text().splitlines() == lines[:kept]


def test_args_json_records_arguments_versions_and_revision(told, toy):
    content = json.loads((told / "args.json").read_text())
    assert content["arguments"]["lr"] == 1e-3 and content["arguments"]["train_image_path"] == [f"{toy}/train/Image"]
    assert content["versions"]["torch"] == torch.__version__ and "python" in content["versions"]
    assert content["effective_batch"] == 2 and content["git"] == log.git_revision()


def test_scores_are_those_of_the_maps_that_the_commands_write(told, toy):
    model = SAM2UNeXT.from_checkpoint(told / "SAM2-UNeXT-3.pth")
    scores = []
    for image, mask in pairing.pair([toy / "test/Image"], [toy / "test/Mask"]):
        truth = np.array(read_mask(mask))
        with torch.no_grad():
            logits = model(image_tensor(read_image(image), 64)[None])[0]
        scores.append(metrics.score(stretch(probability_map(logits, truth.shape)).numpy(), truth))
    expected = metrics.mean(scores).figures()
    for name in ("Smeasure", "wFmeasure", "MAE"):
        assert read_log(told)[-1][name] == pytest.approx(expected[name], abs=1e-6)


def test_best_pth_is_the_epoch_of_the_best_s_measure_and_each_epoch_says_so(
    toy, from_files, tmp_path, monkeypatch, capsys
):
    scores = iter([0.5, 0.7, 0.6, 0.65])
    monkeypatch.setattr(train, "validate", lambda *args: {"Smeasure": next(scores)})
    options = f"--val_image_path {toy}/test/Image --val_mask_path {toy}/test/Mask --epoch 4 --batch_size 6 --resume"
    args = arguments(options, toy, tmp_path, from_files)
    save = run.Run.save

    def stop_after_epoch_2(self):
        save(self)
        if self.progress.epoch == 3:
            raise SystemExit(9)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(run.Run, "save", stop_after_epoch_2)
        train.main(args)
    train.main(args)  # 0.6 is better than nothing, and not than what there was
    assert torch.load(tmp_path / "best.pth")["epoch"] == 2
    assert [line["Smeasure"] for line in read_log(tmp_path) if "Smeasure" in line] == [0.5, 0.7, 0.6, 0.65]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    kept = "best.pth is kept (Smeasure 0.7000)"
    assert said == [
        "epoch 1: Smeasure 0.5000; saved as best.pth", "epoch 2: Smeasure 0.7000; saved as best.pth",
        f"epoch 3: Smeasure 0.6000; {kept}", f"epoch 4: Smeasure 0.6500; {kept}",
    ]  # fmt: skip


def test_a_run_stopped_in_its_validation_repeats_only_that(told, toy, from_files, tmp_path, monkeypatch, capsys):
    validation = f"--val_image_path {toy}/test/Image --val_mask_path {toy}/test/Mask"
    args = arguments(f"--epoch 3 --batch_size 2 --log_every 2 --lr 1e-3 {validation}", toy, tmp_path, from_files)
    score = metrics.score

    def score_and_signal(*words):
        signal.raise_signal(signal.SIGTERM)
        return score(*words)

    with monkeypatch.context() as patch:
        patch.setattr("concurrent.futures.ThreadPoolExecutor.submit", submit_here)
        patch.setattr(metrics, "score", score_and_signal)
        status, line = failure(train.main, args, capsys)
    assert status == 143 and "SIGTERM after epoch 1, step 3" in line and not (tmp_path / "best.pth").exists()
    args.resume = True
    train.main(args)
    ours, theirs = (torch.load(folder / "SAM2-UNeXT-3.pth")["state_dict"] for folder in (tmp_path, told))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert [line.get("Smeasure") for line in read_log(tmp_path)] == [line.get("Smeasure") for line in read_log(told)]


def submit_here(pool, function, *words):
    """In place of a thread, so that a signal comes in between."""
    future = Future()
    future.set_result(function(*words))
    return future


@pytest.mark.parametrize("kind", ["small", "whole"])
def test_init_starts_from_trained_weights(kind, told, toy, from_files, tmp_path):
    source = told / "SAM2-UNeXT-3.pth"
    trained = SAM2UNeXT.from_checkpoint(source)
    if kind == "whole":
        source = tmp_path / "whole.pth"
        checkpoint.save(source, checkpoint.network_content(trained, whole=True))
    args = arguments(f"--epoch 1 --lr 0 --batch_size 6 --resume --init {source}", toy, tmp_path / "run", from_files)
    train.main(args)
    args.init = tmp_path / "moved.pth"
    train.main(args)  # what is resumed needs it no more
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
    assert SAM2UNeXT.from_checkpoint(told / "last.pth").config == MICRO
    assert math.isfinite(torch.load(told / "last.pth")["progress"]["best"])
