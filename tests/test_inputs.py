"""The commands on what users have: each kind of image gets its right files, and what cannot be done is named."""

import json
import shutil

import cv2
import numpy as np
import pytest
import recipe
from conftest import NETWORK, adobe_rgb, failure, read_maps, save_image, train_arguments
from conftest import predict_arguments as arguments
from PIL import ExifTags, Image

import eval as evaluation
import test as script
import train
from dataset import check_files
from evaluation import benchmarks, results, scoring
from tools import check_dataset
from unext import images, output, pairing
from unext.images import in_srgb, photo_of, read_photo

PHOTO = recipe.photo("bad", 40, 60, 0)
DISC = cv2.circle(np.zeros((40, 60), np.uint8), (30, 20), 12, 255, -1)


def lines_of(capsys):
    return capsys.readouterr().out.splitlines()


def test_what_is_transparent_stays_so_in_the_cutout(micro_model, micro_checkpoint, tmp_path):
    alpha = cv2.GaussianBlur(DISC, (9, 9), 0)
    save_image(tmp_path / "in" / "x.png", np.dstack([PHOTO, alpha]))
    script.main(arguments(micro_checkpoint, tmp_path / "in", tmp_path / "out", "--save", "map,overlay,cutout"))
    grey = read_maps(tmp_path / "out")["x.png"]
    white = np.rint(PHOTO * (alpha[..., None] / 255) + 255 - alpha[..., None]).astype(np.uint8)
    expected = script.stretch(script.torch.from_numpy(micro_model.predict(white))).numpy()
    assert np.abs(grey.astype(int) - expected).max() <= 1
    cutout = np.array(Image.open(tmp_path / "out/cutout/x.png"))
    assert np.array_equal(cutout, np.array(micro_model.cutout(Image.open(tmp_path / "in" / "x.png"))))
    assert (cutout[..., 3] <= alpha).all() and not cutout[alpha == 0].any()
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
        Image.fromarray(PHOTO).save(tmp_path / "in" / name, icc_profile=adobe_rgb(), dpi=(300, 300), exif=exif)
    more = ("--save", "overlay,cutout,composite", "--background", "white", "--format", form)
    script.main(arguments(micro_checkpoint, tmp_path / "in", tmp_path / "out", *more))
    written = [path for path in sorted((tmp_path / "out").glob("*/*")) if path.suffix != ".json"]
    assert len(written) == 9
    for path in written:
        with Image.open(path) as image:
            assert image.info["icc_profile"] == adobe_rgb() and not image.getexif()
            assert path.suffix == ".webp" or image.info["dpi"] == pytest.approx((300, 300), abs=0.01)


def test_a_damaged_resolution_is_left_out(tmp_path):
    for i, dpi in enumerate([(0, 0), (float("nan"), 72), (1e9, 1e9), ("x", "y"), 72, ()]):
        image = Image.fromarray(PHOTO)
        image.info = {"dpi": dpi}
        assert photo_of(image).info == {}, i


def test_the_background_has_the_colours_of_the_image(micro_checkpoint, tmp_path):
    (tmp_path / "in").mkdir()
    hidden = Image.fromarray(np.dstack([PHOTO, np.zeros((40, 60), np.uint8)]))
    hidden.save(tmp_path / "in" / "x.png", icc_profile=adobe_rgb())
    more = ("--save", "composite", "--background", "#e04030")
    script.main(arguments(micro_checkpoint, tmp_path / "in", tmp_path / "out", *more))
    composite = np.array(in_srgb(read_photo(tmp_path / "out/composite/x.jpg")), int)
    assert np.abs(composite - (0xE0, 0x40, 0x30)).max() <= 4


def test_the_model_sees_a_profile_and_transparency_as_test_py_does(micro_model, micro_checkpoint, tmp_path):
    (tmp_path / "in").mkdir()
    image = Image.fromarray(np.dstack([PHOTO, DISC]))
    image.save(tmp_path / "in" / "x.png", icc_profile=adobe_rgb())
    script.main(arguments(micro_checkpoint, tmp_path / "in", tmp_path / "out", "--no_stretch"))
    predicted = (micro_model.predict(Image.open(tmp_path / "in" / "x.png")) * 255).astype(np.uint8)
    assert np.array_equal(read_maps(tmp_path / "out")["x.png"], predicted)
    assert not np.array_equal(predicted, (micro_model.predict(PHOTO) * 255).astype(np.uint8))


@pytest.mark.parametrize("kind, form, limit", [("overlay", "JPEG", 65500), ("cutout", "WebP", 16383)])
def test_a_file_larger_than_its_format_allows_fails_for_its_image_alone(
    kind, form, limit, micro_checkpoint, tmp_path, capsys
):
    save_image(tmp_path / "in" / "a.png", np.zeros((2, limit + 1, 3), np.uint8))
    save_image(tmp_path / "in" / "b.png", PHOTO)
    more = ("--save", f"map,{kind}", *(("--format", "webp") if form == "WebP" else ()))
    with pytest.raises(SystemExit) as stop:
        script.main(arguments(micro_checkpoint, tmp_path / "in", tmp_path / "out", *more))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and lines[-1].endswith("1 of 2 images failed; all others are done")
    assert f"a.png: its {kind} cannot be made: the sides of a {form} file are at most {limit:,} px" in lines[-2]
    assert sorted(path.stem for path in (tmp_path / "out").rglob("[ab].*")) == ["b", "b"]


@pytest.mark.parametrize("error", [cv2.error("odd"), MemoryError(), ValueError("odd"), RuntimeError("bad_alloc")])
def test_what_fails_in_one_image_fails_for_it_alone(error, micro_checkpoint, tmp_path, monkeypatch, capsys):
    module, name = (script, "grey_maps") if isinstance(error, RuntimeError) else (output, "render")
    function = getattr(module, name)

    def fail(*words):
        if (40, 61) in [getattr(word, "shape", word) for word in words]:
            raise error
        return function(*words)

    monkeypatch.setattr(module, name, fail)
    save_image(tmp_path / "in" / "a.png", np.zeros((40, 61, 3), np.uint8))
    for name in "bcdefgh":
        save_image(tmp_path / "in" / f"{name}.png", PHOTO)
    with pytest.raises(SystemExit) as stop:
        script.main(arguments(micro_checkpoint, tmp_path / "in", tmp_path / "out", "--workers", 1))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and len(read_maps(tmp_path / "out")) == 7
    reason = "odd" if "odd" in str(error) else "out of memory"
    assert f"a.png: its map cannot be made: {reason}" in lines[-2]


def test_the_first_image_far_from_white_is_named_with_the_option_that_says_what_is_white(
    micro_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv(images.WHITE, "")
    images_folder, masks = tmp_path / "in", tmp_path / "gt"
    for name in "abc":
        save_image(images_folder / f"{name}.png", np.where(DISC > 0, 3900, 0).astype(np.uint16))
        save_image(masks / f"{name}.png", DISC)
    for more, number in (((), 1), (("--white", 4095), 0)):
        line = (
            f"warning: {images_folder}/a.png: its values reach 3900, and 65535 is white; --white N says another value"
        )
        script.main(arguments(micro_checkpoint, images_folder, tmp_path / f"maps{number}", *more))
        check_files(pairing.pair([images_folder], [masks]), workers=2)
        assert lines_of(capsys).count(line) == 2 * number
        words = [str(word) for word in (images_folder, masks, "--workers", 1, *more)]
        check_dataset.main(check_dataset.get_args_parser().parse_args(words))
        assert ("far from white" in capsys.readouterr().out) == bool(number)


def test_sub_folders_keep_their_structure(micro_checkpoint, tmp_path, capsys):
    photos, out = tmp_path / "in", tmp_path / "in" / "maps"
    for name in ("a.png", "one/a.png", "one/two/b.png"):
        save_image(photos / name, PHOTO)
    more = ("--save", "map,mask")
    (photos / "one/x.mp4").write_bytes(b"x")
    script.main(arguments(micro_checkpoint, photos, out, *more))
    assert "left out: 2 images in sub-folders (--recursive reads them)" in lines_of(capsys)
    for _ in range(2):  # the second time, there are maps in a sub-folder
        script.main(arguments(micro_checkpoint, photos, out, *more, "--recursive"))
        assert "left out: 1 .mp4" in lines_of(capsys)
    made = {str(path.relative_to(out)) for path in out.rglob("*.png")}
    names = {"a.png", "one/a.png", "one/two/b.png"}
    assert made == names | {f"mask/{name}" for name in names}
    assert (out / "mask/one/two" / output.SETTINGS).exists()


def test_ground_truth_in_sub_folders_is_found(micro_checkpoint, tmp_path):
    for name in ("one/a", "two/a"):
        save_image(tmp_path / "in" / f"{name}.png", PHOTO)
        save_image(tmp_path / "gt" / f"{name}_mask.png", np.zeros((7, 9 if "one" in name else 11), np.uint8))
    more = ("--recursive", "--test_gt_path", tmp_path / "gt", "--mask_suffix", "_mask")
    script.main(arguments(micro_checkpoint, tmp_path / "in", tmp_path / "out", *more))
    shapes = [read_maps(tmp_path / "out" / one)["a.png"].shape for one in ("one", "two")]
    assert shapes == [(7, 9), (7, 11)]


def test_what_is_left_out_is_said_in_one_line_by_each_command(toy, micro_checkpoint, tmp_path, capsys):
    for split in ("train", "test"):
        shutil.copytree(toy / split, tmp_path / split)
    (tmp_path / "test/Image/film.mp4").write_bytes(b"x")
    (tmp_path / "train/Mask/list.txt").write_bytes(b"x")
    (tmp_path / "test/Image/gone.jpg").symlink_to("nowhere")
    script.main(arguments(micro_checkpoint, tmp_path / "test/Image", tmp_path / "maps"))
    assert "left out: 1 .mp4, 1 broken link" in lines_of(capsys)
    train.main(train_arguments("--epoch 1 --batch_size 6", tmp_path, tmp_path / "run"))
    assert "left out: 1 .txt" in lines_of(capsys)
    (tmp_path / "test/Mask/notes.md").write_bytes(b"x")
    words = ["--pred_path", tmp_path / "maps", "--gt_path", tmp_path / "test/Mask", "--dataset_name", "set"]
    words = [str(word) for word in [*words, "--save_path", tmp_path / "results", "--workers", 1]]
    evaluation.main(evaluation.get_args_parser().parse_args(words))
    assert "left out: 1 .md" in lines_of(capsys)
    (tmp_path / "maps/gone.png").symlink_to("nowhere")
    status, line = failure(evaluation.main, evaluation.get_args_parser().parse_args(words), capsys)
    assert status == 2 and "maps: broken links; fetch the files, or remove the links: gone.png" in line


@pytest.mark.parametrize(
    "images, save_path, more, told",
    [
        ("in", "in", [], "in has images or ground truth; name another folder"),
        ("in/x.png", "in", [], "in has images or ground truth; name another folder"),
        ("in", "gt", ["--test_gt_path", "gt"], "gt has images or ground truth; name another folder"),
        ("both", "both/mask", ["--recursive"], "both/mask has images or ground truth; name another folder"),
        ("both", "new", ["--recursive", "--save", "map,mask"], "new/mask would get files of two kinds"),
        ("maps", "new", [], "maps: is a folder of maps, see settings.json there; name one of images"),
        ("in", "new", ["--test_gt_path", "in"], "in: is given as the folder of both images and masks"),
        ("in", "new", ["--mask_suffix", "_mask"], "--mask_suffix=_mask: no folder of masks is given"),
        ("top", "new", [], "top: has no images; 2 images in sub-folders, which --recursive reads"),
    ],
)
def test_folders_that_are_not_what_they_are_given_for_are_refused(
    images, save_path, more, told, micro_checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("in/x.png", "gt/x.png", "top/one/a.png", "top/two/b.png", "both/c.png", "both/mask/d.png"):
        save_image(tmp_path / name, PHOTO)
    script.main(arguments(micro_checkpoint, "in", "maps"))
    before = sorted(tmp_path.rglob("*"))
    status, line = failure(script.main, arguments(micro_checkpoint, images, save_path, *more), capsys)
    assert status == 2 and told in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def one_folder(toy, tmp_path):
    """Images and masks called NAME_mask in one folder, `data`, and a benchmark that says so."""
    (tmp_path / "data").mkdir()
    for image in sorted((toy / "train/Image").iterdir()):
        shutil.copy(image, tmp_path / "data")
        shutil.copy(toy / f"train/Mask/{image.stem}.png", tmp_path / "data" / f"{image.stem}_mask.png")
    place = "{images: data, masks: data, mask_suffix: _mask}"
    (tmp_path / "own.yaml").write_text(f"train: {place}\ntest: {{own: {place}}}\n")
    return tmp_path


def test_masks_with_a_suffix_in_one_folder_serve_every_command(one_folder, micro_checkpoint, capsys):
    data = str(one_folder / "data")
    args = train_arguments("--epoch 1 --batch_size 6 --mask_suffix _mask", one_folder, one_folder / "run")
    args.train_image_path = args.train_mask_path = args.val_image_path = args.val_mask_path = [data]
    train.main(args)
    assert json.loads((one_folder / "run/log.jsonl").read_text().splitlines()[-1])["Smeasure"] > 0
    more = ("--test_gt_path", data, "--mask_suffix", "_mask")
    script.main(arguments(micro_checkpoint, data, one_folder / "maps", *more))
    assert len(read_maps(one_folder / "maps")) == 6
    words = f"--pred_path {one_folder}/maps --gt_path {data} --image_path {data} --mask_suffix _mask --dataset_name own"
    words += f" --save_path {one_folder}/results --workers 1"
    evaluation.main(evaluation.get_args_parser().parse_args(words.split()))
    assert (one_folder / "results/report.html").read_text().count('alt="image') in (0, 6)
    capsys.readouterr()
    check_dataset.main(check_dataset.get_args_parser().parse_args([data, data, "--mask_suffix", "_mask"]))
    assert "6 pairs, 0 errors" in lines_of(capsys)[-1]


def test_a_benchmark_of_ones_own_may_name_the_suffix(one_folder, micro_checkpoint, capsys):
    own = str(one_folder / "own.yaml")
    splits = benchmarks.find_train(benchmarks.load(own), one_folder)
    assert [len(split.pairs) for split in splits] == [6]
    words = ["--checkpoint", micro_checkpoint, "--benchmark", own, one_folder, "--save_path", one_folder / "maps"]
    script.main(script.get_args_parser().parse_args([str(word) for word in words]))
    words = f"--benchmark {own} {one_folder} --pred_path {one_folder}/maps --save_path {one_folder}/results --workers 1"
    evaluation.main(evaluation.get_args_parser().parse_args(words.split()))
    check_dataset.main(check_dataset.get_args_parser().parse_args([own, str(one_folder)]))
    assert "12 pairs, 0 errors" in lines_of(capsys)[-1]
    for main, parser, words in (
        (train.main, train.get_args_parser(), [*NETWORK.split(), "--save_path", f"{one_folder}/run"]),
        (evaluation.main, evaluation.get_args_parser(), ["--pred_path", f"{one_folder}/maps"]),
    ):
        args = parser.parse_args([*words, "--benchmark", own, str(one_folder), "--mask_suffix", "_mask"])
        status, line = failure(main, args, capsys)
        assert status == 2 and "a benchmark's YAML file" in line


def test_a_folder_of_maps_is_not_scored_against_itself(toy, tmp_path, capsys):
    words = f"--pred_path {toy}/test/Mask --gt_path {toy}/test/Mask --dataset_name x --save_path {tmp_path}/results"
    status, line = failure(evaluation.main, evaluation.get_args_parser().parse_args(words.split()), capsys)
    assert status == 2 and "test/Mask: is given as the folder of both images and masks" in line
    assert not (tmp_path / "results").exists()


def test_masks_of_one_name_in_two_folders_are_told_apart_in_warnings(tmp_path, capsys):
    for folder, white in (("one", 1), ("two", 255)):
        for name in "abc":
            save_image(tmp_path / folder / "im" / f"{name}.png", PHOTO)
            save_image(tmp_path / folder / "gt" / f"{name}.png", np.where(DISC, white, 0).astype(np.uint8))
    both = [tmp_path / "one", tmp_path / "two"]
    check_files(pairing.pair([one / "im" for one in both], [one / "gt" for one in both]), workers=1)
    assert "warning: 3 of 6 masks: 0/1 mask" in capsys.readouterr().out


def test_maps_in_the_alpha_channel_are_scored_as_such(tmp_path):
    for name in "ab":
        save_image(tmp_path / "gt" / f"{name}.png", DISC)
    save_image(tmp_path / "maps" / "a.png", np.dstack([255 | DISC] * 3 + [DISC]))
    save_image(tmp_path / "maps" / "b.png", DISC)
    first, second = (
        scoring.score_files(results.ImageFiles("set", mask.stem, None, mask, {"": path}), "fast", False, ())[0]
        for path, mask in pairing.pair([tmp_path / "maps"], [tmp_path / "gt"])
    )
    assert [one.scores.figures() for one in first] == [one.scores.figures() for one in second]


def test_larger_images_are_read_with_max_pixels(micro_checkpoint, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.pgm").write_bytes(b"P5 60 40 255 " + DISC.tobytes())
    args = arguments(micro_checkpoint, tmp_path / "in", tmp_path / "maps", "--max_pixels", 2399)
    with pytest.raises(SystemExit):
        script.main(args)
    assert "2,400 pixels exceed the limit of 2,399: it could be a decompression bomb; --max_pixels allows more" in (
        capsys.readouterr().err
    )
    script.main(arguments(micro_checkpoint, tmp_path / "in", tmp_path / "maps", "--max_pixels", 2400))
    assert read_maps(tmp_path / "maps")["x.png"].shape == (40, 60)
