"""test.py: kinds of files, settings, continuing an interrupted run, and options that need mending."""

import json
import os
import shutil
import signal
import subprocess
import sys

import conftest
import cv2
import numpy as np
import pytest
import recipe
import torch
from conftest import MICRO, ROOT, close, failure, predict, pretend_torchrun, program, read_maps, save_image
from conftest import predict_arguments as arguments
from PIL import Image
from test_find_encoders import moved

import test as script
from SAM2UNeXT import SAM2UNeXT, stretch
from unext import checkpoint, output

parse = script.get_args_parser().parse_args


def contents(folder):
    """The files below a folder, but its lock, by name."""
    return {str(path.relative_to(folder)): content for path, content in sorted(conftest.contents(folder).items())}


def refusal(capsys, checkpoint, images, save_path, *more) -> str:
    """The line with which test.py refuses these arguments."""
    status, line = failure(script.main, arguments(checkpoint, images, save_path, *more), capsys)
    assert status == 2
    return line


def test_every_kind_is_written_to_its_folder(micro_checkpoint, toy, tmp_path):
    more = ("--save", "map,mask,overlay,cutout", "--threshold", 0.4)
    predict(micro_checkpoint, toy / "test/Image/toy_0001.jpg", tmp_path, *more)
    image = np.array(Image.open(toy / "test/Image/toy_0001.jpg")).astype(int)
    grey, mask, overlay, cutout = (
        np.array(Image.open(tmp_path / name))
        for name in ("toy_0001.png", "mask/toy_0001.png", "overlay/toy_0001.jpg", "cutout/toy_0001.png")
    )
    assert np.array_equal(mask, np.where(grey >= 0.4 * 255, 255, 0))
    assert np.array_equal(cutout[cutout[..., 3] == 255, :3], image[cutout[..., 3] == 255])
    change = np.abs(overlay - image).mean(axis=-1)  # JPEG changes the rest a little
    assert change[mask == 0].mean() < 8 < 25 < change[mask == 255].mean()
    red, _, blue = (overlay - image)[mask == 255].mean(axis=0)
    assert red > 20 and red > blue  # towards pink
    inner = cv2.erode(mask, np.ones((5, 5)))
    edge, inside = (np.abs(overlay[part] - output.TINT).mean() for part in ((mask == 255) & (inner == 0), inner == 255))
    assert edge < inside  # the outline is nothing but tint


def test_folders_and_files_can_be_mixed_even_with_images_of_one_name(micro_checkpoint, toy, tmp_path, capsys):
    image, folder = toy / "train/Image/toy_0005.jpg", toy / "test/Image"
    save_image(tmp_path / "in/toy_0005.png", np.zeros((4, 6, 3), np.uint8))
    save_image(tmp_path / "in/toy_0005.BMP", np.zeros((5, 6, 3), np.uint8))
    more = ("--test_image_path", folder, image, tmp_path / "in")
    maps = predict(micro_checkpoint, folder, tmp_path / "maps", *more)
    names = [f"toy_0005.{extension}.png" for extension in ("BMP", "jpg", "png")]
    assert list(maps) == [f"toy_{i:04}.png" for i in range(4)] + names
    assert maps["toy_0005.BMP.png"].shape == (5, 6)
    more = ("--test_image_path", toy / "train/Image", image, shutil.copy(image, tmp_path))
    line = refusal(capsys, micro_checkpoint, folder, tmp_path / "new", *more)
    assert f"{tmp_path}/toy_0005.jpg: have the same name; keep one of them" in line
    line = refusal(capsys, micro_checkpoint, tmp_path / "in", tmp_path, "--test_gt_path", toy / "test/Mask")
    assert "in/toy_0005.BMP and " in line and "in/toy_0005.png: have the same name" in line


@pytest.mark.posix
def test_an_interrupted_run_ends_with_the_same_files(micro_checkpoint, toy, tmp_path, monkeypatch, capsys):
    more = ("--save", "map,mask", "--workers", 1)
    predict(micro_checkpoint, toy / "train/Image", tmp_path / "whole", *more)
    finish = script.finish

    def finish_and_interrupt(logits, sample, args):
        if sample.task.image.stem == "toy_0001":
            os.kill(os.getpid(), signal.SIGINT)
        return finish(logits, sample, args)

    args = arguments(micro_checkpoint, toy / "train/Image", tmp_path / "stopped", *more)
    with monkeypatch.context() as patch:
        patch.setattr(script, "finish", finish_and_interrupt)
        status, line = failure(script.main, args, capsys)
    assert status == 130 and line.endswith(": interrupted; the same command continues")
    assert 0 < len(read_maps(tmp_path / "stopped")) < 6
    script.main(args)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_existing_files_are_kept_whatever_their_times_unless_overwritten(micro_checkpoint, toy, tmp_path, capsys):
    shutil.copytree(toy / "test/Image", tmp_path / "in")
    args = arguments(micro_checkpoint, tmp_path / "in", tmp_path / "maps", "--save", "map,cutout", "--format", "webp")
    script.main(args)
    (tmp_path / "maps/cutout/toy_0002.webp").unlink()
    for path in (tmp_path / "in/toy_0001.jpg", tmp_path / "maps/settings.json"):
        os.utime(path, (2**32, 2**32))
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("maps/cutout/*.webp")}
    script.main(args)
    assert "; 3 of 4 exist and are kept, --overwrite makes them again" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in times}
    args.overwrite = True
    script.main(args)
    assert all(path.stat().st_mtime_ns != before for path, before in times.items())


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory):
    """Another training of the same network."""
    path = tmp_path_factory.mktemp("other") / "SAM2-UNeXT-1.pth"
    checkpoint.save_network(path, recipe.fill(SAM2UNeXT(**MICRO), 1), epoch=1)
    return path


def test_files_of_other_settings_are_refused(micro_checkpoint, other_checkpoint, toy, tmp_path, capsys):
    first, second, maps = toy / "test/Image/toy_0000.jpg", toy / "test/Image/toy_0001.jpg", tmp_path / "maps"
    predict(micro_checkpoint, first, maps, "--save", "map,mask")
    before = contents(maps)
    for more, problem in (
        (("--test_image_path", second, "--checkpoint", other_checkpoint), "maps: was made with another checkpoint"),
        (("--flip",), "maps: was made with another flip"),
        (("--size", 96, "--no_stretch"), "maps: was made with another size and stretch"),
        (("--white", 255), "maps: was made with another white"),
        (("--save", "mask", "--threshold", 0.4), "maps/mask: was made with another threshold"),
        (("--test_gt_path", toy / "test/Mask"), "maps: was made with another ground_truth"),
    ):
        told = f"{problem}, see settings.json there; replace its files with --overwrite or name another folder"
        assert told in refusal(capsys, micro_checkpoint, first, maps, *more)
    predict(micro_checkpoint, first, maps, "--threshold", 0.4)  # no map depends on it
    assert contents(maps) == before


def test_files_of_two_settings_are_never_mixed(micro_checkpoint, other_checkpoint, toy, tmp_path, monkeypatch, capsys):
    first, two = toy / "test/Image/toy_0000.jpg", ("--test_image_path", *sorted((toy / "test/Image").iterdir())[:2])
    again = arguments(other_checkpoint, first, tmp_path / "maps", *two, "--overwrite")
    predict(micro_checkpoint, first, tmp_path / "maps", *two)
    before, finish = contents(tmp_path / "maps"), script.finish
    told = "another checkpoint, see settings.json there; --overwrite leaves toy_0001.png: name another folder"
    assert told in refusal(capsys, other_checkpoint, first, tmp_path / "maps", "--overwrite")
    assert contents(tmp_path / "maps") == before

    def interrupt(logits, sample, args):
        if sample.task.image.stem == "toy_0001":
            raise KeyboardInterrupt
        return finish(logits, sample, args)

    monkeypatch.setattr(script, "finish", interrupt)
    status, line = failure(script.main, again, capsys)
    assert status == 130 and line.endswith(": interrupted; the same command without --overwrite continues")
    monkeypatch.setattr(script, "finish", finish)
    again.overwrite = False
    script.main(again)
    assert "1 of 2 exist and are kept" in capsys.readouterr().out
    predict(other_checkpoint, first, tmp_path / "fresh", *two)
    assert contents(tmp_path / "maps") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("processes", [1, 2])  # of which the second takes toy_0001
def test_files_of_others_are_replaced_only_on_request(processes, micro_checkpoint, toy, tmp_path, capsys, monkeypatch):
    save_image(tmp_path / "toy_0001.png", np.zeros((5, 5), np.uint8))
    pretend_torchrun(monkeypatch, 0, processes)
    for images, more, told in (
        ("test/Image", (), "other images or another program (toy_0001.png); replace its files with --overw"),
        ("test/Image/toy_0002.jpg", ("--overwrite",), "(toy_0001.png); --overwrite leaves toy_0001.png: name another"),
    ):
        assert told in refusal(capsys, micro_checkpoint, toy / images, tmp_path, *more)
    pretend_torchrun(monkeypatch, 0, 1)
    predict(micro_checkpoint, toy / "test/Image", tmp_path, "--overwrite")
    told = "has files of other images or another program (toy_0000.png, toy_0001"
    assert told in refusal(capsys, micro_checkpoint, toy / "train/Image", tmp_path)
    predict(micro_checkpoint, toy / "train/Image/toy_0005.jpg", tmp_path)  # of another name
    predict(micro_checkpoint, toy / "train/Image/toy_0005.jpg", tmp_path)
    told = "has files of other images or another program (toy_0001.png)"
    assert told in refusal(capsys, micro_checkpoint, toy / "train/Image/toy_0001.jpg", tmp_path)


def test_settings_json_records_how_the_files_were_made(micro_model, micro_checkpoint, toy, tmp_path):
    predict(micro_checkpoint, toy / "test/Image/toy_0001.jpg", tmp_path, "--save", "map,mask")
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings.pop("versions")["torch"] == torch.__version__
    assert settings == {
        "checkpoint": checkpoint.trained_fingerprint(micro_model), "path": str(micro_checkpoint), "size": 64,
        "white": "of the format", "precision": "float32", "stretch": True, "flip": False, "ground_truth": False,
        "images": [str(toy / "test/Image")],
    }  # fmt: skip
    assert json.loads((tmp_path / "mask/settings.json").read_text())["threshold"] == 0.5


def test_a_benchmark_has_a_folder_of_maps_per_set(micro_checkpoint, toy, tmp_path, capsys):
    root = tmp_path / "COD"
    for name in ("CAMO", "NC4K"):
        shutil.copytree(toy / "test/Image", root / "TestDataset" / name / "Imgs")
        shutil.copytree(toy / "test/Mask", root / "TestDataset" / name / "GT")
    options = f"--checkpoint {micro_checkpoint} --benchmark COD {root} --save_path {tmp_path}/maps"
    status, line = failure(script.main, parse(options.split()), capsys)
    assert status == 2 and "CHAMELEON: not found" in line and "TestDataset/NC4K" in line
    script.main(parse([*options.split(), "--sets", "NC4K", "CAMO"]))
    names = ("settings.json", *(f"toy_{i:04}.png" for i in range(4)))
    assert [*contents(tmp_path / "maps")] == [f"{folder}/{name}" for folder in ("CAMO", "NC4K") for name in names]
    assert "CAMO: 4 of 250 pairs" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_divide_the_images_and_write_the_maps_of_one_process(micro_checkpoint, toy, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = f"--checkpoint {micro_checkpoint} --test_image_path {toy}/train/Image --save_path {tmp_path}/two "
    options += "--precision fp32 --batch_size 2 --device cpu"
    command = [*torchrun, *program("test.py", *options.split())[1:]]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "6 images, of which this process takes 4" in result.stdout
    single = predict(micro_checkpoint, toy / "train/Image", tmp_path / "single", "--batch_size", 2)
    two = read_maps(tmp_path / "two")  # a process of several computes with one thread
    assert conftest.close_maps(single, two)


def test_a_small_checkpoint_uses_encoders_from_the_options(small, model, encoders, toy, tmp_path):
    image = toy / "test/Image/toy_0000.jpg"
    more = [f"--{option}={path}" for option, path in encoders.items()]
    maps = predict(moved(small, tmp_path), image, tmp_path / "maps", *more)
    assert close(maps["toy_0000.png"], stretch(torch.from_numpy(model.predict(Image.open(image)))).numpy())


COMPOSITE = ["--save", "composite"]
BENCHMARK = ["--benchmark", "COD", "x"]
TO_MEND = [  # options after --checkpoint and --save_path, what is said
    (["--test_image_path", "in", "--checkpoint", "none.pth"], "none.pth: there is no such file"),
    (["--test_image_path", "none"], "none: there is no such folder"),
    (["--test_image_path", "in", "--test_gt_path", "x"], "x: there is no such folder"),
    (["--test_image_path", "in", "--test_gt_path", "twice"], "twice/x.bmp and twice/x.png: have the same name; keep"),
    (["--test_image_path", "in", "--test_gt_path", "other"], "no ground truth in other has the name of an image in in"),
    (["--test_image_path", "in", "--save_path", "in/x.png"], "in/x.png: nothing can be written there"),
    (["--test_image_path", "in", *BENCHMARK], "argument --benchmark: not allowed with argument --test_image_path"),
    (["--test_image_path", "in", "--sets", "CAMO"], "--sets belongs to --benchmark"),
    (["--test_image_path", "in", "--save_path="], "argument --save_path: is empty"),
    ([*BENCHMARK, "--test_gt_path", "x"], "leave out --test_gt_path"),
    ([*BENCHMARK, "--save", "map,sketch"], "argument --save: 'sketch' is not one of map, mask, "),
    ([*BENCHMARK, "--threshold", "2"], "argument --threshold: 2 must be a number from 0 to 1"),
    ([*BENCHMARK, "--crop", "10"], "argument --crop: 10 must be a number from 0 to 1; --help lists all options"),
    ([*BENCHMARK, "--crop", "10%"], "argument --crop: '10%' is not a number; --help lists all options"),
    ([*BENCHMARK, *COMPOSITE], "--save composite needs --background: a colour, such as white or #ff8000, or an image"),
    ([*BENCHMARK, "--save", "cutout", "--background", "white"], "--background belongs to --save composite"),
    ([*BENCHMARK, "--crop"], "--crop belongs to --save cutout or composite"),
    ([*BENCHMARK, "--canvas", "9x9"], "--canvas belongs to --save cutout or composite"),
    ([*BENCHMARK, "--canvas", "9"], "argument --canvas: '9' is not WIDTHxHEIGHT in pixels, such as 2000x2000; --help"),
    ([*BENCHMARK, "--largest"], "--largest belongs to --save mask or overlay or cutout or composite"),
    ([*BENCHMARK, *COMPOSITE, "--background", "red", "--format", "webp"], "--format belongs to --save cutout"),
    ([*BENCHMARK, *COMPOSITE, "--background", "whit"], "--background whit: cannot be read as an image: No such file"),
    ([*BENCHMARK, *COMPOSITE, "--background", "#fff8"], "nor is it an opaque colour, such as white or #ff8000"),
    ([*BENCHMARK, *COMPOSITE, "--background", "text.jpg"], "text.jpg: cannot be read as an image: its format"),
    # Folders that are not what they are given for
    (["--test_image_path", "in", "--save_path", "in"], "in has images or ground truth; name another folder"),
    (["--test_image_path", "in", "--save_path", "link"], "link has images or ground truth; name another folder"),
    (["--test_image_path", "in/x.png", "--save_path", "in"], "in has images or ground truth; name another folder"),
    (["--test_image_path", "in", "--test_gt_path", "gt", "--save_path", "gt"], "gt has images or ground truth; name"),
    (["--test_image_path", "both", "--recursive", "--save_path", "both/mask"], "both/mask has images or ground truth;"),
    (["--test_image_path", "both", "--recursive", "--save", "map,mask"], "out/mask would get files of two kinds"),
    (["--test_image_path", "maps"], "maps: is a folder of maps (see settings.json there); name a folder of images"),
    (["--test_image_path", "in", "--test_gt_path", "in"], "in: is given as the folder of both images and masks"),
    (["--test_image_path", "in", "--mask_suffix", "_mask"], "--mask_suffix=_mask: no folder of masks is given"),
    (["--test_image_path", "top"], "top: has no images; 2 images in sub-folders: name these (test.py --recursive"),
]  # fmt: skip


@pytest.mark.parametrize("options, told", TO_MEND)
def test_input_to_mend_is_one_line_and_changes_nothing(options, told, micro_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("in/x", "gt/x", "twice/x", "other/y", "top/one/a", "top/two/b", "both/c", "both/mask/d", "maps/e"):
        save_image(tmp_path / f"{name}.png", np.zeros((4, 6, 3), np.uint8))
    save_image(tmp_path / "twice/x.bmp", np.zeros((4, 6, 3), np.uint8))
    (tmp_path / "maps/settings.json").write_text('{"checkpoint": ""}')
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "link").symlink_to("in")
    before = contents(tmp_path)
    options = ["--checkpoint", str(micro_checkpoint), "--save_path", "out", *options]
    status, line = failure(lambda options: script.main(parse(options)), options, capsys)
    assert status == 2 and told in line
    assert contents(tmp_path) == before
