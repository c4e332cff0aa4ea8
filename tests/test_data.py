"""docs/data.md: its snippets make the known masks, from annotations written here."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pycocotools.mask
import pytest
import rasterio
import recipe
from conftest import NETWORK, ROOT, arguments_of, save_image
from PIL import Image, ImageOps
from rasterio.warp import transform_geom

import eval as evaluation
import test as script
import train
from tools import check_dataset
from unext import images
from unext.masks import read_mask

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning:pycocotools"),
    pytest.mark.filterwarnings("ignore:Use `@`:PendingDeprecationWarning:rasterio"),
]
HEIGHT, WIDTH = 40, 60
EMPTY = np.zeros((HEIGHT, WIDTH), np.uint8)
OUTER, HOLE, OTHER = np.s_[5:31, 8:41], np.s_[12:21, 15:31], np.s_[33:38, 45:56]  # of an object, and another object
OBJECT, SECOND = EMPTY.copy(), EMPTY.copy()
OBJECT[OUTER], OBJECT[HOLE], SECOND[OTHER] = 255, 0, 255
KNOWN = {"two.png": OBJECT | SECOND, "a.b.png": SECOND, "nothing.png": EMPTY}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder, with an image for each of the known masks."""
    for name in KNOWN:
        save_image(tmp_path / "images" / Path(name).with_suffix(".jpg"), recipe.photo(name, HEIGHT, WIDTH))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snippets(title: str = "") -> list[str]:
    """The Python blocks of the document, or of a section."""
    text = (ROOT / "docs/data.md").read_text("utf-8")
    if title:
        text = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run(code: str) -> None:
    exec(compile(code, "docs/data.md", "exec"), {})


def assert_masks(expected: dict[str, np.ndarray]) -> None:
    """The folder of masks has these, and check_dataset.py finds no error in it and the folder of images."""
    made = {path.name: np.array(read_mask(path)) for path in Path("masks").iterdir()}
    assert made.keys() == expected.keys()
    for name, mask in expected.items():
        assert np.array_equal(made[name], mask), name
    check_dataset.main(arguments_of(check_dataset, "images", "masks", "--workers", 1))


def corners(box: tuple[slice, slice], last: int = 1) -> list[tuple[int, int]]:
    """The corners (x, y) of a box of pixels; with `last` 1 the outline goes along its outermost pixels."""
    rows, columns = box
    left, top, right, bottom = columns.start, rows.start, columns.stop - last, rows.stop - last
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def around(box: tuple[slice, slice]) -> list[tuple[int, int]]:
    """The corners of the pixels around a hole: an outline counts as part of its object."""
    return corners(tuple(slice(side.start - 1, side.stop + 1) for side in box))


def test_the_snippets_are_short():
    assert len(snippets()) == 11
    for code in snippets():
        assert sum(line.strip() != "" for line in code.splitlines()) <= 15, code


def in_runs(mask: np.ndarray, compressed: bool) -> dict:
    """COCO's encoding of a mask: runs in columns, of 0 first, as text or as numbers."""
    if compressed:
        encoded = pycocotools.mask.encode(np.asfortranarray(mask // 255))
        return {"size": encoded["size"], "counts": encoded["counts"].decode()}
    values = mask.T.ravel() // 255
    ends = np.flatnonzero(np.diff(values, prepend=0)).tolist() + [values.size]
    return {"size": list(mask.shape), "counts": np.diff(ends, prepend=0).tolist()}


@pytest.mark.parametrize("kind", ["fish", "fish and divers", "all"])
def test_coco(kind):
    polygon = [float(value) for corner in corners(OTHER, last=0) for value in corner]
    content = {
        "images": [
            {"id": i, "file_name": f"deep/{Path(name).with_suffix('.jpg')}", "height": HEIGHT, "width": WIDTH}
            for i, name in enumerate(KNOWN)
        ],
        "categories": [{"id": 1, "name": "fish"}, {"id": 7, "name": "diver"}],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 1, "iscrowd": 0, "segmentation": in_runs(OBJECT, True)},
            {"id": 2, "image_id": 0, "category_id": 7, "iscrowd": 0, "segmentation": [polygon]},
            {"id": 3, "image_id": 1, "category_id": 7, "iscrowd": 1, "segmentation": in_runs(SECOND, False)},
        ],
    }
    Path("annotations.json").write_text(json.dumps(content))
    [code] = snippets("COCO")
    names = {"fish": '["fish"]', "fish and divers": '["fish", "diver"]', "all": ""}[kind]
    run(code.replace("getCatIds()", f"getCatIds({names})"))
    assert_masks(KNOWN if kind != "fish" else KNOWN | {"two.png": OBJECT, "a.b.png": EMPTY})


def write_labelme(path: str, *shapes: tuple[str, list[tuple[int, int]]], kind: str = "polygon") -> None:
    records = [{"label": label, "points": points, "shape_type": kind} for label, points in shapes]
    Path(path).write_text(json.dumps({"version": "5.5.0", "shapes": records, "imagePath": Path(path).name}))


def test_labelme():
    hole, outer, other = ("hole", around(HOLE)), ("fish", corners(OUTER)), ("diver", corners(OTHER))
    [code] = snippets("LabelMe")
    write_labelme("images/two.json", ("hole", corners(HOLE)), outer, other)  # in any order
    write_labelme("images/a.b.json", other)
    run(code)
    assert_masks(KNOWN)
    write_labelme("images/two.json", hole, kind="circle")
    with pytest.raises(SystemExit, match="two.json: has a circle, not a polygon"):
        run(code)


def yolo_line(points: list[tuple[int, int]]) -> str:
    return " ".join(["3", *(f"{x / WIDTH} {y / HEIGHT}" for x, y in points)])


def test_yolo():
    outer, hole = corners(OUTER), around(HOLE)
    detour = [*outer, outer[0], hole[0], *hole[:0:-1], hole[0]]  # to the hole, around it, and back
    Path("labels").mkdir()
    Path("labels/two.txt").write_text(f"{yolo_line(detour)}\n{yolo_line(corners(OTHER))}\n")
    Path("labels/a.b.txt").write_text(yolo_line(corners(OTHER)))
    [code] = snippets("YOLO")
    run(code)
    assert_masks(KNOWN)
    Path("labels/two.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    with pytest.raises(SystemExit, match="two.txt: has a box, not a polygon"):
        run(code)


@pytest.mark.parametrize("mode", ["L", "P", "RGB"])
def test_label_images(mode):
    """Objects of two classes, one of another class, and a border."""
    Path("labels").mkdir()
    palette = [0] * 768
    palette[24:27], palette[36:39] = (64, 0, 0), (64, 0, 128)  # PASCAL VOC's of 8 and 12
    for name, mask in KNOWN.items():
        classes = np.where(mask, 8, 0).astype(np.uint8)
        classes[OTHER] = np.where(mask[OTHER], 12, 0)
        classes[0, :9], classes[0, 9:20] = 255, 3
        labels = Image.fromarray(classes)
        labels.putpalette(palette)
        (labels.convert("RGB") if mode == "RGB" else labels if mode == "P" else Image.fromarray(classes)).save(
            f"labels/{name}"
        )
    code, colours = snippets("Label images")
    if mode == "RGB":
        code = re.sub(r"mask = .*", colours.strip(), code, count=1)
    run(code)
    assert_masks(KNOWN)


def test_turned_photographs_fit_their_annotations_once_they_are_upright(folder):
    shown, exif = Image.open("images/two.jpg"), Image.Exif()
    shown.load()
    exif[images.ORIENTATION] = 6  # a quarter turn to the right makes it upright
    shown.transpose(Image.Transpose.ROTATE_90).save("images/two.jpg", exif=exif, quality=95)
    write_labelme("images/two.json", ("fish", corners(OUTER)), ("hole", corners(HOLE)), ("diver", corners(OTHER)))
    write_labelme("images/a.b.json", ("diver", corners(OTHER)))
    [turn], [code] = snippets("Turned photographs"), snippets("LabelMe")
    run(turn)
    for path in Path("images").glob("*.json"):
        shutil.copy(path, "upright")
    assert Path("upright/a.b.jpg").read_bytes() == Path("images/a.b.jpg").read_bytes()
    Path("images").rename("stored")
    Path("upright").rename("images")
    run(code)
    assert_masks(KNOWN)
    turned = Image.open("images/two.jpg")
    assert ImageOps.exif_transpose(turned).size == turned.size == (WIDTH, HEIGHT)
    assert np.abs(np.subtract(turned, shown, dtype=float)).mean() < 8


def test_thermal_images():
    Path("thermal").mkdir()
    celsius = np.array([[-40, -10, 20, 50, 80]], float)
    Image.fromarray(((celsius + 273.15) * 100).round().astype(np.uint16)).save("thermal/warm.tif")
    run(snippets("Deep and thermal images")[0])
    assert np.array_equal(Image.open("images/warm.png"), [[0, 0, 128, 255, 255]])


@pytest.mark.parametrize("dtype, white", [("uint8", 255), ("uint16", 3000)])
def test_a_scene_becomes_tiles_with_masks_and_its_maps_get_its_place(dtype, white, monkeypatch):
    height, width = 70, 100
    monkeypatch.setenv(images.WHITE, str(white))
    rng = np.random.default_rng(0)
    bands = rng.integers(0, white, (4, height, width), dtype=dtype, endpoint=True)
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_800_000)}
    with rasterio.open("scene.tif", "w", "GTiff", width, height, 4, dtype=dtype, interleave="band", **place) as scene:
        scene.write(bands)
    known = np.zeros((height, width), np.uint8)
    outer, hole, other = np.s_[10:62, 20:71], np.s_[25:40, 28:45], np.s_[0:9, 90:100]
    known[outer], known[hole], known[other] = 255, 0, 255
    rings = [[place["transform"] @ xy for xy in corners(box, last=0)] for box in (outer, hole, other)]
    features = [
        {
            "type": "Feature",
            "geometry": transform_geom(place["crs"], "EPSG:4326", {"type": "Polygon", "coordinates": c}),
        }
        for c in (rings[:2], rings[2:])
    ]
    Path("objects.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    cut, draw, put_back = (code.replace("1024", "32") for code in snippets("Scenes of GeoTIFF"))

    run(cut)
    shutil.rmtree("images")
    Path("tiles").rename("images")
    tiles = {path.stem: np.array(images.read_image(path)) for path in Path("images").iterdir()}
    assert sorted(tiles) == sorted(f"{x}_{y}" for x in (0, 32, 64, 68) for y in (0, 32, 38))
    expected = np.rint(bands[:3] / white * 255).transpose(1, 2, 0)
    masks = {}
    for name, tile in tiles.items():
        x, y = map(int, name.split("_"))
        assert np.array_equal(tile, expected[y : y + 32, x : x + 32])
        masks[f"{name}.png"] = known[y : y + 32, x : x + 32]

    run(draw.replace("tiles", "images"))
    assert_masks(masks)
    Path("masks").rename("maps")
    run(put_back)
    with rasterio.open("map.tif") as target:
        assert np.array_equal(target.read(1), known) and target.count == 1
        assert target.crs == place["crs"] and target.transform == place["transform"]


def test_a_scene_lower_than_a_tile_is_padded_and_its_maps_are_not():
    bands = np.random.default_rng(0).integers(1, 255, (3, 20, 50), np.uint8)
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_800_000)}
    with rasterio.open("scene.tif", "w", "GTiff", 50, 20, 3, dtype="uint8", **place) as scene:
        scene.write(bands)
    cut, _, put_back = (code.replace("1024", "32") for code in snippets("Scenes of GeoTIFF"))
    run(cut)
    for x in (0, 18):
        tile = images.read_image(f"tiles/{x}_0.tif")
        assert np.array_equal(tile, np.pad(bands[:, :, x : x + 32], [(0, 0), (0, 12), (0, 0)]).transpose(1, 2, 0))
        save_image(Path(f"maps/{x}_0.png"), np.array(tile)[..., 0])
    run(put_back)
    with rasterio.open("map.tif") as target:
        assert np.array_equal(target.read(1), bands[0]) and target.transform == place["transform"]


def test_a_fifth_is_held_out():
    for i in range(10):
        save_image(Path(f"images/{i}.jpg"), recipe.photo(f"{i}", 8, 8))
    for path in Path("images").iterdir():
        save_image(Path("masks", path.stem + ".png"), EMPTY)
    run(snippets("From masks to a network")[0])
    split = {
        side: {kind: {path.stem for path in Path("data", side, kind).iterdir()} for kind in ("images", "masks")}
        for side in ("train", "test")
    }
    assert all(names["images"] == names["masks"] for names in split.values())
    assert (len(split["train"]["images"]), len(split["test"]["images"])) == (10, 3)
    assert not split["train"]["images"] & split["test"]["images"]
    with pytest.raises(SystemExit, match="data: exists"):  # another draw would mix them
        run(snippets("From masks to a network")[0])


def test_from_annotations_to_scores(tmp_path):
    """COCO's file -> masks -> check -> train with a held-out share -> best.pth -> maps -> scores."""
    shutil.rmtree("images")
    names = [f"reef_{i}" for i in range(10)]
    corner = [float(value) for corner in corners(OTHER, last=0) for value in corner]
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "fish"}]}
    for i, name in enumerate(names):
        save_image(Path(f"images/{name}.jpg"), np.dstack([SECOND] * 3) // 2 + recipe.photo(name, HEIGHT, WIDTH) // 2)
        content["images"].append({"id": i, "file_name": f"{name}.jpg", "height": HEIGHT, "width": WIDTH})
        annotation = {"id": i + 1, "image_id": i, "category_id": 1, "iscrowd": 0, "segmentation": [corner]}
        content["annotations"].append(annotation)
    Path("annotations.json").write_text(json.dumps(content))
    for title in ("COCO", "From masks to a network"):
        [code] = snippets(title)
        run(code)
    check_dataset.main(arguments_of(check_dataset, "data/train/images", "data/train/masks", "--workers", 1))
    folders = "--train_image_path data/train/images --train_mask_path data/train/masks --save_path run --workers 0"
    train.main(arguments_of(train, *f"{NETWORK} {folders} --epoch 2 --batch_size 3 --val_share 0.4".split()))
    predict = (
        "--checkpoint run/best.pth --test_image_path data/test/images --test_gt_path data/test/masks --save_path maps"
    )
    script.main(arguments_of(script, *predict.split()))
    score = "--dataset_name reef --pred_path maps --gt_path data/test/masks --save_path results --workers 1"
    evaluation.main(arguments_of(evaluation, *score.split()))
    assert json.loads(Path("results/results.json").read_text())["reef"]["images"] == 2
