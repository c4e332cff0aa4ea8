"""Curves and examples as PNG and PDF, and the small images that they and the page show."""

import io
import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from evaluation.results import Evaluation, ImageScores
from unext.images import decoded, opened
from unext.masks import OBJECT, mask_of

PLOTS = {  # name: (x, y)
    "precision_recall": ("recall", "precision"),
    "f_measure": ("threshold", "Fm"),
    "e_measure": ("threshold", "Em"),
}
LABELS = {"threshold": "threshold, grey levels", "Fm": "F-measure", "Em": "E-measure"}
CURVES = ("precision", "recall", "Fm", "Em")  # in curves.npz
COLOURS = ("#d1001f", "#1f5fb4", "#2e8b57", "#e08214", "#7b3294", "#0097a7", "#7f5539", "#5b6270")  # of the methods
STYLES = ("-", "--", "-.", ":")  # to tell methods apart without colours, too
EXAMPLES = 6  # in examples.png unless they are named
PANEL = 1.3  # width of an image in examples.png, inches
THUMBNAIL = 320  # pixels, at most
ACROSS = 4  # panels side by side, at most
SETTINGS = {"text.parse_math": False, "pdf.fonttype": 42}  # "$" in names is plain; text in PDFs stays text


def render(figure: Figure, name: str, dpi: int) -> dict[str, bytes]:
    """The PNG and the PDF of a figure, by file name."""
    contents = {}
    options = {"png": {"pil_kwargs": {"compress_level": 2}}, "pdf": {"metadata": {"CreationDate": None}}}
    for kind, settings in options.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=dpi, **settings)
        contents[f"{name}.{kind}"] = buffer.getvalue()
    return contents


@matplotlib.rc_context(SETTINGS)
def curves(evaluation: Evaluation, name: str) -> dict[str, bytes]:
    """The files of a plot of PLOTS: a panel for each row of the tables with a line for each method."""
    (x, y), rows = PLOTS[name], evaluation.rows
    down = math.ceil(len(rows) / ACROSS)
    across = math.ceil(len(rows) / down)
    figure = Figure(figsize=(3.6 * across, 3.1 * down + 0.5), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    lines = {}
    for axes, row in zip(panels, rows, strict=False):
        for i, method in enumerate(evaluation.methods):
            if row in evaluation.means[method]:
                scores = evaluation.means[method][row]
                points = np.arange(256) if x == "threshold" else scores.curve(x), scores.curve(y)
                style = {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}
                style |= {"linewidth": 1.3 if i else 2.6, "zorder": 2 if i else 3}  # the first is bold and on top
                # At threshold 0 everything is object, for every method: that point would only stretch the axes.
                [lines[method]] = axes.plot(*(values[1:] for values in points), **style)
        axes.set(title=row, xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y))
        axes.margins(0.03)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(rows) :]:
        axes.set_visible(False)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=2 * across, frameon=False)
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")  # the layout is computed, once for PNG and PDF
    return render(figure, name, dpi=150)


def values_of_curves(evaluation: Evaluation) -> bytes:
    """An .npz: `methods`, `datasets`, and each of CURVES as float64 (datasets, methods, 256), NaN where not scored."""
    means = [[evaluation.means[method].get(row) for method in evaluation.methods] for row in evaluation.rows]
    arrays = {
        name: np.array([[mean.curve(name) if mean else np.full(256, np.nan) for mean in of_row] for of_row in means])
        for name in CURVES
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, methods=evaluation.methods, datasets=list(evaluation.rows), **arrays)
    return buffer.getvalue()


def most_differing(images: Sequence[ImageScores]) -> list[ImageScores]:
    """The images in whose S-measure the methods differ most."""

    def order(image: ImageScores) -> tuple[float, str, str]:
        return -np.ptp([figures["Smeasure"] for figures in image.figures.values()]), image.dataset, image.name

    return sorted(images, key=order)[:EXAMPLES]


@matplotlib.rc_context(SETTINGS)
def examples(images: Sequence[ImageScores], methods: Sequence[str]) -> dict[str, bytes]:
    """The files of the examples: rows of image, ground truth and the maps of the methods."""
    rows = []
    for image in images:
        maps = [read_map(image.maps[method]) if method in image.maps else None for method in methods]
        rows.append([image.image and thumbnail(image.image, "RGB"), thumbnail(image.mask, "L"), *maps])
    heights = [mask.height / mask.width for _, mask, *_ in rows]
    figure = Figure(figsize=(PANEL * len(rows[0]), PANEL * sum(heights) + 0.3))
    grid = {"height_ratios": heights, "wspace": 0.03, "hspace": 0.03 * len(heights) / sum(heights)}
    panels = figure.subplots(len(rows), len(rows[0]), squeeze=False, gridspec_kw=grid)
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.005, top=1 - 0.3 / figure.get_figheight())
    for axes, pixels in zip(panels.ravel(), chain(*rows), strict=True):
        axes.set_axis_off()
        if pixels:
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, aspect="auto", interpolation="none")
    for axes, title in zip(panels[0], ("image", "ground truth", *methods), strict=True):
        axes.set_title(title, fontsize=9, pad=3)
    return render(figure, "examples", dpi=THUMBNAIL / PANEL)


def error_image(prediction: Image.Image, mask: Image.Image) -> Image.Image:
    """The errors of a map, greyscale and of the mask's size: the object is light grey on white, false positives are
    red, false negatives blue, the deeper the larger the error."""
    is_object = np.asarray(mask)[..., None] > OBJECT
    deep = np.where(is_object, np.float32([20, 80, 220]), np.float32([225, 30, 40]))
    ground = np.where(is_object, np.float32(205), np.float32(255))
    value = np.asarray(prediction, np.float32)[..., None] / 255
    error = np.where(is_object, 1 - value, value)
    return Image.fromarray((ground * (1 - error) + deep * error).round().astype(np.uint8))


def thumbnail(path: Path, mode: str) -> Image.Image:
    """The image ("RGB") or mask ("L", read as for scoring) in a file, reduced."""
    with opened(path) as image:
        small = mask_of(image) if mode == "L" else decoded(image)
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        return small.convert(mode)


def read_map(path: Path) -> Image.Image:
    """A small version of a map, stretched as for scoring."""
    return ImageOps.autocontrast(thumbnail(path, "L"))
