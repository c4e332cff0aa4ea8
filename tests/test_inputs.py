"""The commands on what users have: each kind of image gets its right files, and what cannot be done is named."""

import shutil

import cv2
import numpy as np
import pytest
from conftest import ADOBE_RGB_PROFILE, DISC, PHOTO, close, eval_arguments, failure, predict, read_maps, save_image
from conftest import train_arguments as arguments
from PIL import ExifTags, Image

import eval as evaluation
import test as script
import train
from dataset import check_files
from evaluation import benchmarks, results, scoring
from tools import check_dataset
from unext import output, pairing
from unext.images import in_srgb, read_photo


def lines_of(capsys):
    return capsys.readouterr().out.splitlines()


def check(*options):
    check_dataset.main(check_dataset.get_args_parser().parse_args([str(option) for option in options]))


def test_what_is_transparent_stays_so_in_the_cutout(micro_model, micro_checkpoint, tmp_path):
    alpha = cv2.GaussianBlur(DISC, (9, 9), 0)
    path = save_image(tmp_path / "in" / "x.png", np.dstack([PHOTO, alpha]))
    grey = predict(micro_checkpoint, path, tmp_path / "out", "--save", "map,overlay,cutout")["x.png"]
    white = np.rint(PHOTO * (alpha[..., None] / 255) + 255 - alpha[..., None]).astype(np.uint8)
    of_array, of_image = (script.torch.from_numpy(micro_model.predict(image)) for image in (white, Image.open(path)))
    assert close(grey, script.stretch(of_array).numpy()) and np.array_equal(grey, script.stretch(of_image).numpy())
    cutout = np.array(Image.open(tmp_path / "out/cutout/x.png"))
    assert np.array_equal(cutout, np.array(micro_model.cutout(Image.open(path))))
    assert (cutout[..., 3] <= alpha).all() and not cutout[alpha == 0].any()
    assert np.array_equal(np.array(read_photo(path)), np.dstack([PHOTO, alpha]))
    visible = (alpha < 255) & (cutout[..., 3] > 0)
    assert np.array_equal(cutout[visible, :3], PHOTO[visible])
    overlay = np.array(Image.open(tmp_path / "out/overlay/x.jpg")).astype(int)
    outside = cv2.dilate(np.maximum(alpha, np.where(grey > 120, 255, 0).astype(np.uint8)), np.ones((19, 19))) == 0
    assert np.abs(overlay[outside] - 255).max(initial=0) < 30


@pytest.mark.parametrize("form", ["png", "webp"])
def test_what_shows_the_image_keeps_profile_and_resolution_but_no_exif(form, micro_checkpoint, tmp_path):
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 51.0, 30.0)
    for name in ("x.png", "y.jpg", "z.tif"):
        Image.fromarray(PHOTO).save(tmp_path / "in" / name, icc_profile=ADOBE_RGB_PROFILE, dpi=(300, 300), exif=exif)
    more = ("--save", "overlay,cutout,composite", "--background", "white", "--format", form)
    predict(micro_checkpoint, tmp_path / "in", tmp_path / "out", *more)
    written = [path for path in sorted((tmp_path / "out").glob("*/*")) if path.suffix != ".json"]
    assert len(written) == 9
    for path in written:
        with Image.open(path) as image:
            assert image.info["icc_profile"] == ADOBE_RGB_PROFILE and not image.getexif()
            assert path.suffix == ".webp" or image.info["dpi"] == pytest.approx((300, 300), abs=0.01)


def test_the_background_has_the_colours_of_the_image(micro_checkpoint, tmp_path):
    hidden = Image.fromarray(np.dstack([PHOTO, np.zeros((40, 60), np.uint8)]))
    hidden.save(tmp_path / "x.png", icc_profile=ADOBE_RGB_PROFILE)
    predict(micro_checkpoint, tmp_path / "x.png", tmp_path / "out", "--save", "composite", "--background", "#e04030")
    composite = np.array(in_srgb(read_photo(tmp_path / "out/composite/x.jpg")), int)
    assert np.abs(composite - (0xE0, 0x40, 0x30)).max() <= 4


@pytest.mark.parametrize(
    "options, width, function, error, told",
    [
        ("--save map,overlay", 65501, None, None, "the sides of a JPEG file are at most 65,500 px"),
        ("--save map,cutout --format webp", 16384, None, None, "the sides of a WebP file are at most 16,383 px"),
        ("", 60, (output, "files_of"), cv2.error("odd"), "odd"),
        ("", 60, (output, "files_of"), MemoryError(), "out of memory"),
        ("", 60, (script, "make_prediction"), RuntimeError("bad_alloc"), "out of memory"),
    ],
)
def test_what_fails_in_one_image_fails_for_it_alone(
    options, width, function, error, told, micro_checkpoint, tmp_path, monkeypatch, capsys
):
    if function:
        original = getattr(*function)

        def fail(prediction, sample, *args):  # of `files_of`, the task
            if "stem='a'" in repr(sample):
                raise error
            return original(prediction, sample, *args)

        monkeypatch.setattr(*function, fail)
    save_image(tmp_path / "in/a.png", np.zeros((2, width, 3), np.uint8))
    for name in "bc":
        save_image(tmp_path / f"in/{name}.png", PHOTO)
    with pytest.raises(SystemExit) as stop:
        predict(micro_checkpoint, tmp_path / "in", tmp_path / "out", *options.split(), "--workers", 1)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and lines[-1].endswith("1 of 3 images failed; all others are done")
    assert f"a.png: its files cannot be made: {told}" in lines[-2]
    assert {path.stem for path in (tmp_path / "out").rglob("[abc].*")} == {"b", "c"}


def test_the_first_image_far_from_white_is_named(micro_checkpoint, tmp_path, monkeypatch, capsys):
    photos, masks = tmp_path / "in", tmp_path / "gt"
    for name in "abc":
        save_image(photos / f"{name}.png", np.where(DISC > 0, 3900, 0).astype(np.uint16))
        save_image(masks / f"{name}.png", DISC)
    line = f"warning: {photos}/a.png: its values reach 3900, and 65535 is white; --white N says another value"
    for more, number in (((), 1), (("--white", 4095), 0)):
        predict(micro_checkpoint, photos, tmp_path / f"maps{number}", *more)
        check_files(pairing.pair([photos], [masks]), workers=2)
        assert lines_of(capsys).count(line) == 2 * number
        check(photos, masks, "--workers", 1, *more)
        assert ("far from white" in capsys.readouterr().out) == bool(number)


def test_sub_folders_keep_their_structure(micro_checkpoint, tmp_path, capsys):
    photos, out = tmp_path / "in", tmp_path / "in" / "maps"
    for name in ("a.png", "sub/a.png", "sub/deep/b.png"):
        save_image(photos / name, PHOTO)
    more = ("--save", "map,mask")
    (photos / "sub/x.mp4").write_bytes(b"x")
    predict(micro_checkpoint, photos, out, *more)
    assert "left out: 2 images in sub-folders (--recursive reads them)" in lines_of(capsys)
    for _ in range(2):  # the second time, there are maps in a sub-folder
        predict(micro_checkpoint, photos, out, *more, "--recursive")
        assert "left out: 1 .mp4" in lines_of(capsys)
    made = {str(path.relative_to(out)) for path in out.rglob("*.png")}
    names = {"a.png", "sub/a.png", "sub/deep/b.png"}
    assert made == names | {f"mask/{name}" for name in names}
    assert (out / "mask/sub/deep" / output.SETTINGS).exists()


def test_ground_truth_in_sub_folders_is_used(micro_checkpoint, tmp_path):
    for name, width in (("one/a", 9), ("two/a", 11)):
        save_image(tmp_path / "in" / f"{name}.png", PHOTO)
        save_image(tmp_path / "gt" / f"{name}_mask.png", np.zeros((7, width), np.uint8))
    more = ("--recursive", "--test_gt_path", tmp_path / "gt", "--mask_suffix", "_mask")
    predict(micro_checkpoint, tmp_path / "in", tmp_path / "out", *more)
    assert [read_maps(tmp_path / "out" / name)["a.png"].shape for name in ("one", "two")] == [(7, 9), (7, 11)]


def test_each_command_says_in_one_line_what_is_left_out(toy, micro_checkpoint, tmp_path, without_figures, capsys):
    for split in ("train", "test"):
        shutil.copytree(toy / split, tmp_path / split)
    for name in ("test/Image/film.mp4", "train/Mask/list.txt", "test/Mask/notes.md"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "test/Image/gone.jpg").symlink_to("nowhere")
    predict(micro_checkpoint, tmp_path / "test/Image", tmp_path / "maps")
    assert "left out: 1 .mp4, 1 broken link(s)" in lines_of(capsys)
    train.find_pairs(arguments("", tmp_path, tmp_path / "run"))
    assert "left out: 1 .txt" in lines_of(capsys)
    options = ["--pred_path", tmp_path / "maps", "--gt_path", tmp_path / "test/Mask", "--dataset_name", "set"]
    args = eval_arguments(*options, "--save_path", tmp_path / "results", "--workers", 1)
    evaluation.main(args)
    assert "left out: 1 .md" in lines_of(capsys)
    (tmp_path / "maps/gone.png").symlink_to("nowhere")
    status, line = failure(evaluation.main, args, capsys)
    assert status == 2 and "maps: broken links; fetch the files, or remove the links: gone.png" in line


def test_masks_beside_the_images_serve_every_command(toy, micro_checkpoint, tmp_path, without_figures, capsys):
    """With the option, and with a benchmark that says so."""
    data, maps, results, path = (str(tmp_path / name) for name in ("data", "maps", "results", "mine.yaml"))
    for image in sorted((toy / "train/Image").iterdir()):
        save_image(tmp_path / "data" / image.name, np.array(Image.open(image)))
        shutil.copy(toy / f"train/Mask/{image.stem}.png", tmp_path / "data" / f"{image.stem}_mask.png")
    place = "{images: data, masks: data, mask_suffix: _mask}"
    (tmp_path / "mine.yaml").write_text(f"train: {place}\ntest: {{mine: {place}}}\n")
    suffix, benchmark = ["--mask_suffix", "_mask"], ["--benchmark", path, str(tmp_path)]

    args = arguments("--epoch 1 --batch_size 6 --mask_suffix _mask", tmp_path, tmp_path / "run")
    args.train_image_path = args.train_mask_path = [data]
    assert [len(pairs) for pairs in train.find_pairs(args)] == [6, 0]
    assert len(predict(micro_checkpoint, data, tmp_path / "maps", "--test_gt_path", data, *suffix)) == 6
    scoring = ["--pred_path", maps, "--save_path", results, "--workers", 1]
    folders = ["--gt_path", data, "--image_path", data, "--dataset_name", "mine"]
    evaluation.main(eval_arguments(*scoring, *folders, *suffix))
    check(data, data, *suffix)
    assert "6 pairs, 0 errors" in lines_of(capsys)[-1]

    assert [len(split.pairs) for split in benchmarks.find_train(benchmarks.load(path), tmp_path)] == [6]
    script.main(
        script.get_args_parser().parse_args([*benchmark, "--checkpoint", str(micro_checkpoint), "--save_path", maps])
    )
    evaluation.main(eval_arguments(*scoring, *benchmark))
    check(path, tmp_path)
    assert "12 pairs, 0 errors" in lines_of(capsys)[-1]
    status, line = failure(evaluation.main, eval_arguments(*scoring, *benchmark, *suffix), capsys)
    assert status == 2 and "for a benchmark, put mask_prefix or mask_suffix in its YAML file" in line


def test_a_folder_of_maps_is_not_scored_against_itself(toy, tmp_path, capsys):
    options = f"--pred_path {toy}/test/Mask --gt_path {toy}/test/Mask --dataset_name x --save_path {tmp_path}/results"
    status, line = failure(evaluation.main, evaluation.get_args_parser().parse_args(options.split()), capsys)
    assert status == 2 and "test/Mask: is given as the folder of both images and masks" in line
    assert not (tmp_path / "results").exists()


def test_maps_in_the_alpha_channel_are_scored_as_such(tmp_path):
    for name in "ab":
        save_image(tmp_path / "gt" / f"{name}.png", DISC)
    save_image(tmp_path / "maps" / "a.png", np.dstack([255 | DISC] * 3 + [DISC]))
    save_image(tmp_path / "maps" / "b.png", DISC)
    first, second = (
        scoring.score_files(results.ImageFiles("set", mask.stem, None, mask, {"": path}), "fast", False, ())[0]
        for path, mask in pairing.pair([tmp_path / "maps"], [tmp_path / "gt"])
    )
    assert [scored.scores.figures() for scored in first] == [scored.scores.figures() for scored in second]


def test_larger_images_are_read_with_max_pixels(micro_checkpoint, tmp_path, capsys):
    image = save_image(tmp_path / "x.png", DISC)
    with pytest.raises(SystemExit):
        predict(micro_checkpoint, image, tmp_path / "maps", "--max_pixels", 2399)
    assert "2,400 pixels exceed the limit of 2,399: " in capsys.readouterr().err
    assert predict(micro_checkpoint, image, tmp_path / "maps", "--max_pixels", 2400)["x.png"].shape == (40, 60)
