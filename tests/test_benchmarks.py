"""evaluation/benchmarks.py: the archives of the benchmarks are found in every layout."""

import itertools
import json
import os
import re

import numpy as np
import pytest
from conftest import ROOT, SHARED, save_image

from evaluation import benchmarks

PIXELS = np.zeros((4, 6), np.uint8)


def fill(folder, stems, extension="png"):
    for stem in stems:
        save_image(folder / f"{stem}.{extension}", PIXELS)


def archive(root, folders):
    """Three images and masks in each (images, masks) folder."""
    for images, masks in folders:
        fill(root / images, [f"{i}#x" for i in range(3)], "jpg")
        fill(root / masks, [f"{i}#x" for i in range(3)])


def halves(images, masks):
    """The folders of train and test, for which {} stands."""
    return [(images.format(half), masks.format(half)) for half in ("train", "test")]


COD_TESTS = [f"TestDataset/{name}" for name in ("CHAMELEON", "CAMO", "COD10K", "NC4K")]

LAYOUTS = {
    "DIS5K": [[(f"DIS-{part}/im", f"DIS-{part}/gt") for part in ("TR", "VD", "TE1", "TE2", "TE3", "TE4")]],
    "COD": [
        [(f"{folder}/{im}", f"{folder}/{gt}") for folder in (train, *COD_TESTS)]
        for train, (im, gt) in itertools.product(
            ("TrainDataset", "TrainValDataset"), (("Imgs", "GT"), ("Image", "Mask"), ("im", "gt"))
        )
    ],
    "MAS3K": [halves("{}/Image", "{}/Mask")],
    "RMAS": [halves("{}/img", "{}/label")],
    "EORSSD": [halves("{}-images", "{}-labels"), halves("{}/image", "{}/GT")],
    "ORSI-4199": [
        halves("{}set/images", "{}set/masks"),
        halves("{}/Image", "{}/GT"),
        halves("{}-images", "{}-labels"),
        halves("{}_Image", "{}_GT"),
    ],
}  # fmt: skip
PUBLISHED_PAIRS = {  # training images and those of each test set
    "DIS5K": (3000, {"DIS-VD": 470, "DIS-TE1": 500, "DIS-TE2": 500, "DIS-TE3": 500, "DIS-TE4": 500}),
    "COD": (4040, {"CHAMELEON": 76, "CAMO": 250, "COD10K": 2026, "NC4K": 4121}),
    "MAS3K": (1769, {"MAS3K": 1141}),
    "RMAS": (2514, {"RMAS": 500}),
    "EORSSD": (1400, {"EORSSD": 600}),
    "ORSI-4199": (2000, {"ORSI-4199": 2199}),
}


@pytest.mark.parametrize("above", ["", "a/b"])
@pytest.mark.parametrize("name, layout", [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts])
def test_every_layout_is_found_at_any_depth_and_in_any_case(name, layout, above, tmp_path):
    folders = layout
    if above:  # both folders of a pair lie in one, whose case is that of the images
        folders = [(im.upper(), os.path.join(os.path.dirname(im.upper()), os.path.basename(gt))) for im, gt in layout]
    archive(tmp_path / above, folders)
    benchmark = benchmarks.load(name.lower())
    [train], test = benchmarks.find_train(benchmark, tmp_path), benchmarks.find_test(benchmark, tmp_path)
    places = [train, *itertools.chain(*test.values())]
    assert [len(place.pairs) for place in places] == [3] * len(folders)
    assert {str(place.images.relative_to(tmp_path / above)) for place in places} == {images for images, _ in folders}
    assert (train.count, {name: place.count for name, [place] in test.items()}) == PUBLISHED_PAIRS[name]
    for image, mask in train.pairs:
        assert (image.name, mask.name) == (f"{mask.stem}.jpg", f"{image.stem}.png")


def test_the_raw_camouflage_archives_are_joined_without_what_does_not_count(tmp_path):
    camouflaged = ["COD10K-CAM-1-Aquatic-3-Crab-32", "COD10K-CAM-2-Terrestrial-23-Cat-1506"]
    others = ["COD10K-NonCAM-1-x", "COD10K-NonCAM-2-y", "COD10K-NonCAM-3-z"]
    for half in ("Train", "Test"):
        folder = tmp_path / "a/b/COD10K-v3" / half  # deeper than the other archive
        fill(folder / "Image", camouflaged + others)
        fill(folder / "GT_Object", camouflaged + others[:1])
        fill(folder / "GT_Edge", camouflaged)
    fill(tmp_path / "CAMO-V.1.0/Images/Train", ["camourflage_1", "camourflage_2"])
    fill(tmp_path / "CAMO-V.1.0/Images/Test", ["camourflage_3"])
    fill(tmp_path / "CAMO-V.1.0/GT", [f"camourflage_{i}" for i in range(1, 6)])
    benchmark = benchmarks.load("COD")
    first, second = benchmarks.find_train(benchmark, tmp_path)
    assert [image.stem for image, _ in first.pairs] == camouflaged
    assert [image.stem for image, _ in second.pairs] == ["camourflage_1", "camourflage_2"]
    assert "COD training: 2 of 3,040 pairs" in str(first) and "3 images named COD10K-[!C]*" in str(first)
    assert "2 of 1,000 pairs" in str(second) and "3 masks without an image" in str(second)
    test = benchmarks.find_test(benchmark, tmp_path, ["COD10K", "CAMO"])
    assert [(len(place.pairs), place.count) for [place] in test.values()] == [(1, 250), (2, 2026)]


def test_the_joined_training_set_leaves_out_the_same_files(tmp_path):
    stems = ["COD10K-CAM-1", "camourflage_1"]
    fill(tmp_path / "TrainDataset/Imgs", [*stems, "COD10K-NonCAM-1"])
    fill(tmp_path / "TrainDataset/GT", [*stems, "COD10K-NonCAM-1", "camourflage_9"])
    [place] = benchmarks.find_train(benchmarks.load("COD"), tmp_path)
    assert [image.stem for image, _ in place.pairs] == stems
    assert "left out: 1 image named" in str(place) and "1 mask without an image" in str(place)


def test_other_benchmarks_refuse_a_surplus_mask_and_warn_of_another_count_than_the_published_one(tmp_path):
    archive(tmp_path, LAYOUTS["RMAS"][0])
    [place] = benchmarks.find_train(benchmarks.load("RMAS"), tmp_path)
    assert str(place).startswith("RMAS training: 3 of 2,514 pairs in") and "WARNING" in str(place)
    assert "WARNING" not in str(place._replace(count=3)) and "3 of 3 pairs" in str(place._replace(count=3))
    fill(tmp_path / "train/label", ["surplus"])
    with pytest.raises(ValueError, match=r"train/label do not match; without their image: surplus\.png"):
        benchmarks.find_train(benchmarks.load("RMAS"), tmp_path)


def test_a_wrong_root_says_what_was_looked_for_and_what_is_there(tmp_path):
    archive(tmp_path, [("photos/train", "photos/masks_of_train")])
    with pytest.raises(ValueError) as error:
        benchmarks.find_train(benchmarks.load("MAS3K"), tmp_path)
    parts = ["MAS3K training: not found in", "train|trainset/{images} with train|trainset/{masks}; "]
    parts += ["{images} are im, ims, img", "There: photos, photos/masks_of_train, photos/train"]
    assert all(part in str(error.value) for part in parts)
    with pytest.raises(OSError, match="nowhere: there is no such folder"):
        benchmarks.find_test(benchmarks.load("MAS3K"), tmp_path / "nowhere")


def test_a_split_in_two_places_is_an_error_that_names_them_and_the_nearest_wins(tmp_path):
    for name in ("first", "__MACOSX", ".hidden"):  # as macOS writes archives
        archive(tmp_path / name, LAYOUTS["MAS3K"][0])
    assert benchmarks.find_train(benchmarks.load("MAS3K"), tmp_path)[0].images == tmp_path / "first/train/Image"
    archive(tmp_path / "second", LAYOUTS["MAS3K"][0])
    with pytest.raises(ValueError, match=r"could be in several places; .*first/train/Image.*, .*second/train/Image"):
        benchmarks.find_train(benchmarks.load("MAS3K"), tmp_path)
    archive(tmp_path, LAYOUTS["MAS3K"][0])
    assert benchmarks.find_train(benchmarks.load("MAS3K"), tmp_path)[0].images == tmp_path / "train/Image"


def test_the_sets_of_cod_may_lie_in_a_folder_each(tmp_path):
    folders = ["TrainValDataset/COD10K", "TrainValDataset/CAMO"]
    folders += ["CHAMELEON_TestingDataset", "CAMO", "COD10K", "NC4K"]
    archive(tmp_path, [(f"{name}/Imgs", f"{name}/GT") for name in folders])
    benchmark = benchmarks.load("COD")
    assert [place.count for place in benchmarks.find_train(benchmark, tmp_path)] == [3040, 1000]
    test = benchmarks.find_test(benchmark, tmp_path)
    assert {name: place.count for name, [place] in test.items()} == PUBLISHED_PAIRS["COD"][1]


def test_joined_folders_must_not_share_image_names(tmp_path):
    (tmp_path / "x.yaml").write_text("test: {hard: [{folder: a}, {folder: b}]}")
    archive(tmp_path, [("a/im", "a/gt"), ("b/im", "b/gt")])
    with pytest.raises(ValueError, match="hard: several of its folders have images named 0#x, 1#x"):
        benchmarks.find_test(benchmarks.load(str(tmp_path / "x.yaml")), tmp_path)


EXAMPLE = """
columns: [Smeasure, HCE]
train: [{folder: summer/train, images: photos, masks: drawings}, {folder: winter}]
test:
  CAMO: {folder: test/easy, images: photos|snaps, masks: drawings, count: 3}
together:
  all: [CAMO]
"""


def test_a_custom_benchmark_is_a_yaml_file_and_has_no_published_scores_whatever_its_names(tmp_path):
    (tmp_path / "Leaves.yaml").write_text(EXAMPLE)
    folders = [("summer/train/photos", "summer/train/drawings"), ("winter/im", "winter/gt")]
    archive(tmp_path, [*folders, ("test/easy/snaps", "test/easy/drawings")])
    benchmark = benchmarks.load(str(tmp_path / "Leaves.yaml"))
    assert benchmark.name == "Leaves" and benchmark.columns == ("Smeasure", "HCE")
    assert benchmark.together == {"all": ("CAMO",)}
    assert [len(place.pairs) for place in benchmarks.find_train(benchmark, tmp_path)] == [3, 3]
    assert "CAMO: 3 of 3 pairs" in str(benchmarks.find_test(benchmark, tmp_path)["CAMO"][0])
    assert benchmarks.published(benchmark, "CAMO") == {} != benchmarks.published(benchmarks.load("COD"), "CAMO")


def test_names_in_a_yaml_file_are_text(tmp_path):
    place = "{folder: 2024, images: no, masks: 007, count: 3, surplus_masks: true}"
    text = f"test: {{no: {place}, 0012: {{}}, 1.10: {{}}, 1.1: {{}}}}\ntogether: {{~: [1.1, no]}}"
    (tmp_path / "x.yaml").write_text(text)
    benchmark = benchmarks.load(str(tmp_path / "x.yaml"))
    assert list(benchmark.test) == ["no", "0012", "1.10", "1.1"] and benchmark.together == {"~": ("1.1", "no")}
    assert benchmark.test["no"] == ((benchmarks.Place("2024", "no", "007", count=3, surplus_masks=True),),)


@pytest.mark.parametrize(
    "text, message",
    [
        ("columns: [Fmeasure]", "columns: .*'Fmeasure'.* is not a list of some of mDice"),
        ("test: {a: []}", "a split is a place"),
        ("test: {a/b: {}}", "a/b cannot be the name of a folder"),
        ("test: {a: {}}\ntogether: {a: [a]}", "a needs a name of its own"),
        ("tests: {a: {}}", "tests is unknown"),
        ("- a list", "does not describe a benchmark"),
        ("test: {a: {folders: x}}", "folders"),
        ("test: {a: {folder: [x]}}", r"\['x'\] is not a text"),
        ("test: {a: {count: few}}", "'few'"),
        ("test: {a: {}, a: {folder: b}}", "a occurs twice"),
        ("test: {a: {}}\ntogether: {b: [c]}", "b needs a name of its own and a list of test sets"),
        ("test: {a: [", "does not describe a benchmark"),
        ("test: {a: {}}\ngroups: {kind: x-y}", "kind needs a regular expression with a group in parentheses"),
    ],
)
def test_a_yaml_file_that_describes_no_benchmark_is_refused_with_the_reason(text, message, tmp_path):
    (tmp_path / "x.yml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        benchmarks.load(str(tmp_path / "x.yml"))
    assert "\n" not in str(error.value)


def test_cod10ks_names_have_their_classes():
    patterns, name = benchmarks.load("COD").groups, "COD10K-CAM-3-Flying-65-Owl-4620"
    classes = {kind: re.search(pattern, name)[1] for kind, pattern in patterns.items()}
    assert classes == {"super-class": "Flying", "sub-class": "Owl"}


def test_names_of_sets_may_have_any_case_and_unknown_names_list_the_known_ones(tmp_path):
    archive(tmp_path, LAYOUTS["DIS5K"][0])
    assert list(benchmarks.find_test(benchmarks.load("DIS5K"), tmp_path, ["dis-te2"])) == ["DIS-TE2"]
    with pytest.raises(ValueError, match="called MAS3: give DIS5K, COD, MAS3K, RMAS, EORSSD, ORSI-4199 or a YAML"):
        benchmarks.load("MAS3")
    with pytest.raises(OSError, match=r"none\.yaml: cannot be read: No such file"):
        benchmarks.load("none.yaml")
    with pytest.raises(ValueError, match="DIS5K has no test set vd; it has DIS-VD"):
        benchmarks.find_test(benchmarks.load("DIS5K"), ".", ["VD"])


def test_published_figures_are_in_the_columns_of_their_benchmark():
    published = json.loads((ROOT / "evaluation/published.json").read_text())["results"]
    for benchmark in map(benchmarks.load, benchmarks.BUILT_IN):
        for row in published.keys() & {*benchmark.test, *benchmark.together}:
            assert benchmarks.OURS in published[row]
            for figures in benchmarks.published(benchmark, row).values():
                assert tuple(figures) == benchmark.columns, row
            del published[row]
    assert not published


@pytest.mark.skipif(not SHARED.is_dir(), reason="the paper's figures are not here")
def test_the_published_figures_are_those_of_the_paper():
    ours, paper = ROOT / "evaluation/published.json", SHARED / "paper/results.json"
    assert json.loads(ours.read_text()) == json.loads(paper.read_text())


def test_a_run_is_named_after_its_benchmark(monkeypatch):
    monkeypatch.setitem(benchmarks.BUILT_IN, "my_set 0.10", {})
    runs = {"orsi4199": "ORSI-4199", "my_set 0.10": "my_set 0.10", "own/x.yaml": "x", "a/folder": ""}
    assert {text: benchmarks.run_name(text) for text in runs} == runs
