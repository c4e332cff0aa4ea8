"""test.py: kinds of output, settings, and continuing an interrupted run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import recipe
import torch
from conftest import MICRO, ROOT, failure, pretend_torchrun, program, read_maps, save_image
from conftest import predict_arguments as arguments
from PIL import Image
from test_find_encoders import moved

import test as script
from SAM2UNeXT import SAM2UNeXT, stretch
from unext import checkpoint, output

FOUR = ("--save", "map,mask,overlay,cutout")


def content(folder):
    """The files in a folder, by name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_every_kind_is_written_to_its_folder(micro_checkpoint, toy, tmp_path):
    script.main(arguments(micro_checkpoint, toy / "test/Image/toy_0001.jpg", tmp_path, *FOUR, "--threshold", 0.4))
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


def test_overlay_and_cutout_have_the_size_of_the_image(micro_checkpoint, toy, tmp_path):
    save_image(tmp_path / "masks" / "toy_0001.png", np.zeros((33, 55), np.uint8))
    image = toy / "test/Image/toy_0001.jpg"
    more = ("--test_gt_path", tmp_path / "masks", *FOUR)
    script.main(arguments(micro_checkpoint, image, tmp_path / "out", *more))
    sizes = {
        kind: Image.open(next((tmp_path / "out" / kind).glob("toy*"))).size for kind in ("mask", "overlay", "cutout")
    }
    assert sizes == {"mask": (55, 33), "overlay": Image.open(image).size, "cutout": Image.open(image).size}


def test_without_the_stretch_a_map_is_the_probability(micro_model, micro_checkpoint, toy, tmp_path):
    image = toy / "test/Image/toy_0001.jpg"
    script.main(arguments(micro_checkpoint, image, tmp_path, "--no_stretch"))
    assert np.array_equal(
        read_maps(tmp_path)["toy_0001.png"], (micro_model.predict(Image.open(image)) * 255).astype("u1")
    )


def test_flip_averages_with_the_mirrored_image(micro_model, micro_checkpoint, tmp_path):
    half = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    save_image(tmp_path / "in" / "a.png", half)
    save_image(tmp_path / "in" / "mirrored.png", half[:, ::-1])
    script.main(arguments(micro_checkpoint, tmp_path / "in", tmp_path / "out", "--flip", "--no_stretch"))
    maps = read_maps(tmp_path / "out")
    expected = (micro_model.predict(half) + micro_model.predict(half[:, ::-1].copy())[:, ::-1]) / 2
    assert np.abs(maps["a.png"] - expected * 255).max() <= 1.01
    assert np.abs(maps["a.png"].astype(int) - maps["mirrored.png"][:, ::-1]).max() <= 1


def test_folders_and_single_files_can_be_mixed_and_images_of_one_name_keep_their_extension(
    micro_checkpoint, toy, tmp_path, capsys
):
    image, folder = toy / "train/Image/toy_0005.jpg", toy / "test/Image"
    save_image(tmp_path / "in/toy_0005.png", np.zeros((4, 6, 3), np.uint8))
    save_image(tmp_path / "in/toy_0005.BMP", np.zeros((5, 6, 3), np.uint8))
    more = ("--test_image_path", folder, image, tmp_path / "in", folder / "toy_0000.jpg")
    script.main(arguments(micro_checkpoint, folder, tmp_path / "maps", *more))
    names = [f"toy_0005.{extension}.png" for extension in ("BMP", "jpg", "png")]
    assert list(read_maps(tmp_path / "maps")) == [f"toy_{i:04}.png" for i in range(4)] + names
    assert read_maps(tmp_path / "maps")["toy_0005.BMP.png"].shape == (5, 6)
    more = ("--test_image_path", toy / "train/Image", image, shutil.copy(image, tmp_path))
    status, line = failure(script.main, arguments(micro_checkpoint, folder, tmp_path / "new", *more), capsys)
    assert status == 2 and f"{tmp_path}/toy_0005.jpg: have the same name; keep one of them" in line
    more = ("--test_gt_path", toy / "test/Mask")
    status, line = failure(script.main, arguments(micro_checkpoint, tmp_path / "in", tmp_path, *more), capsys)
    assert status == 2 and "in/toy_0005.BMP and " in line and "in/toy_0005.png: have the same name" in line


def test_exif_rotation_is_applied_unless_there_is_ground_truth(micro_model, micro_checkpoint, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "a.png", exif=exif)
    save_image(tmp_path / "gt" / "a.png", pixels[..., 0])
    for folder, more, shown in (
        ("free", (), np.rot90(pixels, -1)),
        ("gt", ("--test_gt_path", tmp_path / "gt"), pixels),
    ):
        script.main(arguments(micro_checkpoint, tmp_path / "in", tmp_path / "maps" / folder, *more))
        grey = read_maps(tmp_path / "maps" / folder)["a.png"]
        expected = script.stretch(torch.from_numpy(micro_model.predict(shown.copy()))).numpy()
        assert grey.shape == expected.shape and np.abs(grey.astype(int) - expected).max() <= 1


@pytest.mark.slow
@pytest.mark.posix
def test_an_interrupted_run_continues_and_ends_with_the_same_files(micro_checkpoint, toy, tmp_path):
    images = tmp_path / "in"
    images.mkdir()
    for i in range(60):
        shutil.copy(toy / f"test/Image/toy_{i % 4:04}.jpg", images / f"{i:02}.jpg")
    more = ("--save", "map,mask", "--workers", 2)
    script.main(arguments(micro_checkpoint, images, tmp_path / "whole", *more))
    words = ["--checkpoint", micro_checkpoint, "--test_image_path", images, "--save_path", tmp_path / "parts"]
    words += ["--precision", "fp32", *more]
    stopped = []
    for number in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(
            program("test.py", *words), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        enough = len(list(tmp_path.glob("parts/*.png"))) + 8
        while len(list(tmp_path.glob("parts/*.png"))) < enough and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        process.wait(timeout=30)
        stopped.append(len(list(tmp_path.glob("parts/*.png"))))
    assert 8 <= stopped[0] < stopped[1] < 60
    script.main(arguments(micro_checkpoint, images, tmp_path / "parts", *more))
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


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
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.glob("maps/cutout/*.webp") if path in times}
    args.overwrite = True
    script.main(args)
    assert not times.items() & {path: path.stat().st_mtime_ns for path in tmp_path.glob("maps/cutout/*.webp")}.items()


@pytest.fixture(scope="module")
def other_checkpoint(tmp_path_factory):
    """Another training of the same network."""
    path = tmp_path_factory.mktemp("other") / "SAM2-UNeXT-1.pth"
    checkpoint.save_network(path, recipe.fill(SAM2UNeXT(**MICRO), 1), epoch=1)
    return path


def test_files_of_other_settings_are_refused_with_the_names_that_differ(
    micro_checkpoint, other_checkpoint, toy, tmp_path, capsys
):
    first, second, maps = toy / "test/Image/toy_0000.jpg", toy / "test/Image/toy_0001.jpg", tmp_path / "maps"
    script.main(arguments(micro_checkpoint, first, maps, "--save", "map,mask"))
    before = content(maps)
    for args, folder, names in (
        (arguments(other_checkpoint, second, maps), maps, "checkpoint"),
        (arguments(micro_checkpoint, first, maps, "--flip"), maps, "flip"),
        (arguments(micro_checkpoint, first, maps, "--size", 96, "--no_stretch"), maps, "size and stretch"),
        (arguments(micro_checkpoint, first, maps, "--white", 255), maps, "white"),
        (arguments(micro_checkpoint, first, maps, "--save", "mask", "--threshold", 0.4), maps / "mask", "threshold"),
        (arguments(micro_checkpoint, first, maps, "--test_gt_path", toy / "test/Mask"), maps, "ground_truth"),
    ):
        status, line = failure(script.main, args, capsys)
        assert status == 2 and f"{folder}: was made with another {names}, see settings.json" in line
        assert "--overwrite" in line
    script.main(arguments(micro_checkpoint, first, maps, "--threshold", 0.4))  # no map depends on it
    assert content(maps) == before


def test_overwritten_files_are_never_mixed_with_those_of_other_settings(
    micro_checkpoint, other_checkpoint, toy, tmp_path, monkeypatch, capsys
):
    first, both = toy / "test/Image/toy_0000.jpg", ("--test_image_path", *sorted((toy / "test/Image").iterdir())[:2])
    again = arguments(other_checkpoint, first, tmp_path / "maps", *both, "--overwrite")
    script.main(arguments(micro_checkpoint, first, tmp_path / "maps", *both))
    before, write = content(tmp_path / "maps"), script.write
    args = arguments(other_checkpoint, first, tmp_path / "maps", "--overwrite")
    status, line = failure(script.main, args, capsys)
    assert status == 2 and "another checkpoint, see settings.json there; --overwrite leaves toy_0001.png: name" in line
    assert content(tmp_path / "maps") == before

    def interrupted(maps, sample, args):
        if sample.task.image.stem == "toy_0001":
            raise KeyboardInterrupt
        return write(maps, sample, args)

    monkeypatch.setattr(script, "write", interrupted)
    status, line = failure(script.main, again, capsys)
    assert status == 130 and line.endswith(": interrupted; the same command without --overwrite continues")
    monkeypatch.setattr(script, "write", write)
    again.overwrite = False
    script.main(again)
    assert "1 of 2 exist and are kept" in capsys.readouterr().out
    script.main(arguments(other_checkpoint, first, tmp_path / "fresh", *both))
    assert content(tmp_path / "maps") == content(tmp_path / "fresh")


@pytest.mark.parametrize("processes", [1, 2])  # of which the second takes toy_0001
def test_files_of_other_images_or_another_program_are_replaced_only_on_request(
    processes, micro_checkpoint, toy, tmp_path, capsys, monkeypatch
):
    save_image(tmp_path / "toy_0001.png", np.zeros((5, 5), np.uint8))
    args = arguments(micro_checkpoint, toy / "test/Image", tmp_path)
    pretend_torchrun(monkeypatch, 0, processes)
    status, line = failure(script.main, args, capsys)
    assert status == 2 and "other images or another program (toy_0001.png); replace its files with --overw" in line
    args = arguments(micro_checkpoint, toy / "test/Image/toy_0002.jpg", tmp_path, "--overwrite")
    status, line = failure(script.main, args, capsys)
    assert status == 2 and "another program (toy_0001.png); --overwrite leaves toy_0001.png: name another" in line
    pretend_torchrun(monkeypatch, 0, 1)
    script.main(arguments(micro_checkpoint, toy / "test/Image", tmp_path, "--overwrite"))
    status, line = failure(script.main, arguments(micro_checkpoint, toy / "train/Image", tmp_path), capsys)
    assert status == 2 and "has files of other images or another program (toy_0000.png, toy_0001" in line
    script.main(arguments(micro_checkpoint, toy / "train/Image/toy_0005.jpg", tmp_path))  # of another name


def test_settings_json_records_how_the_files_were_made(micro_model, micro_checkpoint, toy, tmp_path):
    script.main(arguments(micro_checkpoint, toy / "test/Image/toy_0001.jpg", tmp_path))
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings.pop("versions")["torch"] == torch.__version__
    assert settings == {
        "checkpoint": checkpoint.trained_fingerprint(micro_model), "path": str(micro_checkpoint), "size": 64,
        "white": "of the format", "precision": "float32", "stretch": True, "flip": False, "ground_truth": False,
        "images": [str(toy / "test/Image")],
    }  # fmt: skip
    script.main(arguments(micro_checkpoint, toy / "test/Image/toy_0001.jpg", tmp_path, *FOUR))
    assert json.loads((tmp_path / "mask/settings.json").read_text())["threshold"] == 0.5


def test_a_benchmark_has_a_folder_of_maps_per_set(micro_checkpoint, toy, tmp_path, capsys):
    root = tmp_path / "COD"
    for name in ("CAMO", "NC4K"):
        shutil.copytree(toy / "test/Image", root / "TestDataset" / name / "Imgs")
        shutil.copytree(toy / "test/Mask", root / "TestDataset" / name / "GT")
    words = ["--checkpoint", micro_checkpoint, "--benchmark", "COD", root, "--save_path", tmp_path / "maps"]
    parse = script.get_args_parser().parse_args
    status, line = failure(script.main, parse(list(map(str, words))), capsys)
    assert status == 2 and "CHAMELEON: not found" in line and "TestDataset/NC4K/Imgs" in line
    script.main(parse([*map(str, words), "--sets", "NC4K", "CAMO"]))
    found = content(tmp_path / "maps")
    names = ("settings.json", *(f"toy_{i:04}.png" for i in range(4)))
    assert sorted(found) == [f"{folder}/{name}" for folder in ("CAMO", "NC4K") for name in names]
    assert "CAMO: 4 of 250 pairs" in capsys.readouterr().out


@pytest.mark.slow
def test_processes_divide_the_images_and_write_the_maps_of_one_process(micro_checkpoint, toy, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += program("test.py")[1:]
    command += ["--checkpoint", micro_checkpoint, "--test_image_path", toy / "train/Image", "--precision", "fp32"]
    command += ["--save_path", tmp_path / "two", "--batch_size", "2", "--device", "cpu"]
    result = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "6 images, of which this process takes 4" in result.stdout
    script.main(arguments(micro_checkpoint, toy / "train/Image", tmp_path / "one", "--batch_size", 2))
    one, two = read_maps(tmp_path / "one"), read_maps(tmp_path / "two")  # a process of several computes with one thread
    assert one.keys() == two.keys() and all(np.abs(one[name].astype(int) - two[name]).max() <= 1 for name in one)


def test_a_small_checkpoint_uses_encoders_from_the_options(small, model, encoders, toy, tmp_path):
    image = toy / "test/Image/toy_0000.jpg"
    more = [f"--{option}={path}" for option, path in encoders.items()]
    script.main(arguments(moved(small, tmp_path), image, tmp_path / "maps", *more))
    expected = stretch(torch.from_numpy(model.predict(Image.open(image)))).numpy()
    assert np.abs(read_maps(tmp_path / "maps")["toy_0000.png"].astype(int) - expected).max() <= 1


def test_output_kinds_and_sources_are_checked(micro_checkpoint, toy, tmp_path, capsys):
    for more, message in (
        (("--save", "map,sketch"), "'sketch' is not one of"),
        (("--threshold", 2), "from 0 to 1"),
        (("--crop", "10%"), "argument --crop: '10%' is not a number; --help lists all options"),
    ):
        status, line = failure(lambda more: arguments(micro_checkpoint, toy, tmp_path, *more), more, capsys)
        assert status == 2 and message in line
    parse = script.get_args_parser().parse_args
    benchmark = ["--checkpoint", "x", "--save_path", "x", "--benchmark", "COD", "x"]
    for args, message in (
        (arguments(micro_checkpoint, toy, tmp_path, "--benchmark", "COD", toy), "either --test_image_path or"),
        (arguments(micro_checkpoint, toy, tmp_path, "--sets", "CAMO"), "--sets belongs to --benchmark"),
        (parse([*benchmark, "--test_gt_path", "x"]), "leave out --test_gt_path"),
    ):
        status, line = failure(script.main, args, capsys)
        assert status == 2 and message in line


def test_a_compiled_network_sees_whole_batches(micro_checkpoint, toy, tmp_path, monkeypatch):
    shapes = []
    monkeypatch.setattr(SAM2UNeXT, "compile", lambda self, **_: self.register_forward_pre_hook(
        lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    )  # fmt: skip
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        words = ("--batch_size", 3, *more)
        script.main(arguments(micro_checkpoint, toy / "test/Image", tmp_path / name, *words))
    assert shapes == [(3, 3, 64, 64)] * 2  # of four images
    ours, theirs = read_maps(tmp_path / "compiled"), read_maps(tmp_path / "plain")
    assert ours.keys() == theirs.keys() and len(ours) == 4
    assert all(np.abs(ours[name].astype(int) - theirs[name]).max() <= 1 for name in ours)
