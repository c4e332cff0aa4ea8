"""Curves and examples as PNG and PDF, and the small images that they and the page show."""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from evaluation.results import Evaluation, ImageScores
from unext.images import decoded, opened
from unext.masks import OBJECT, mask_of
from unext.workers import cores

if TYPE_CHECKING:  # not at the top: worker processes import this too and do without
    from matplotlib.figure import Figure

PLOTS = {  # x and y
    "precision_recall": ("recall", "precision"),
    "f_measure": ("threshold", "Fm"),
    "e_measure": ("threshold", "Em"),
}
LABELS = {"threshold": "threshold, grey levels", "Fm": "F-measure", "Em": "E-measure"}
CURVES = ("precision", "recall", "Fm", "Em")  # in curves.npz
EXAMPLES = 6  # in examples.png unless they are named
PANEL = 1.3  # width of an image in examples.png, inches
THUMBNAIL = 320  # pixels, at most
ACROSS = 4  # panels side by side, at most
# For scripts that DejaVu Sans lacks, on Linux, Windows and macOS; if none is installed, boxes are drawn.
FONTS = ("Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei", "Arial Unicode MS", "DejaVu Sans")


@contextmanager
def drawing() -> Iterator[None]:
    """In the block, matplotlib draws names in any script, without warnings, and PDFs whose text stays text."""
    import matplotlib

    settings = {"font.family": ["DejaVu Sans", "sans-serif"], "font.sans-serif": FONTS}  # the first that is installed
    settings |= {"text.parse_math": False, "pdf.fonttype": 42}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def saved(figure: "Figure", name: str, dpi: int) -> dict[str, bytes]:
    """The PNG and the PDF of a figure, by file name."""
    contents = {}
    options = {"png": {"pil_kwargs": {"compress_level": 2}}, "pdf": {"metadata": {"CreationDate": None}}}
    for kind, settings in options.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=dpi, **settings)
        contents[f"{name}.{kind}"] = buffer.getvalue()
    return contents


def curves(evaluation: Evaluation, name: str) -> dict[str, bytes]:
    """The files of a plot of PLOTS: a panel for each row of the tables with a line for each method."""
    from matplotlib.figure import Figure

    (x, y), rows = PLOTS[name], evaluation.rows
    down = math.ceil(len(rows) / ACROSS)
    across = math.ceil(len(rows) / down)
    with drawing():
        figure = Figure(figsize=(3.6 * across, 3.1 * down + 0.5), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).ravel()
        lines = {}
        for axes, row in zip(panels, rows, strict=False):
            for i, method in reversed(list(enumerate(evaluation.methods))):  # the first is drawn last, on top
                if row in evaluation.means[method]:
                    scores = evaluation.means[method][row]
                    points = getattr(scores, x, np.arange(256)), getattr(scores, y)
                    # At threshold 0 everything is object, whatever the method: that point would only stretch the axes.
                    [lines[method]] = axes.plot(*(values[1:] for values in points), **line_style(i))
            axes.set(title=row, xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y))
            axes.margins(0.03)
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in panels[len(rows) :]:
            axes.set_visible(False)
        methods = [method for method in evaluation.methods if method in lines]
        handles = [lines[method] for method in methods]
        figure.legend(handles, methods, loc="outside lower center", ncols=2 * across, frameon=False)
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")  # the layout is computed, once for PNG and PDF
        return saved(figure, name, dpi=150)


def line_style(number: int) -> dict[str, Any]:
    """How the curve of the method of this number is drawn; the first in bold."""
    if number == 0:
        return {"color": "#d1001f", "linewidth": 2.6}
    styles = ("-", "--", "-.", ":")  # to be told apart without colours, too
    colours = ("#1f5fb4", "#2e8b57", "#e08214", "#7b3294", "#0097a7", "#7f5539", "#5b6270")
    return {"color": colours[(number - 1) % 7], "linestyle": styles[(number - 1) % 4], "linewidth": 1.3}


def values_of_curves(evaluation: Evaluation) -> bytes:
    """An .npz: `methods`, `datasets`, and each of CURVES as float64 (datasets, methods, 256), NaN where not scored."""
    missing = np.full(256, np.nan)
    means = [[evaluation.means[method].get(row) for method in evaluation.methods] for row in evaluation.rows]
    arrays = {
        curve: np.array([[getattr(scores, curve, missing) for scores in of_row] for of_row in means])
        for curve in CURVES
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, methods=evaluation.methods, datasets=list(evaluation.rows), **arrays)
    return buffer.getvalue()


def differing(images: Sequence[ImageScores]) -> list[ImageScores]:
    """The images in whose S-measure the methods differ most."""

    def spread(image: ImageScores) -> float:
        scores = [figures["Smeasure"] for figures in image.figures.values()]
        return max(scores) - min(scores)

    return sorted(images, key=lambda image: (-spread(image), image.dataset, image.name))[:EXAMPLES]


def examples(images: Sequence[ImageScores], methods: Sequence[str]) -> dict[str, bytes]:
    """The files of the examples: rows of image, ground truth and the maps of the methods."""
    from matplotlib.figure import Figure

    def read(image: ImageScores) -> list[Image.Image | None]:
        maps = [read_map(image.maps[method]) if method in image.maps else None for method in methods]
        return [read_image(image.image), thumbnail(image.mask, "L"), *maps]

    with ThreadPoolExecutor(cores()) as pool:  # Pillow decodes without Python's lock
        rows = list(pool.map(read, images))
    heights = [mask.height / mask.width for _, mask, *_ in rows]
    with drawing():
        figure = Figure(figsize=(PANEL * len(rows[0]), PANEL * sum(heights) + 0.3))
        panels = figure.subplots(
            len(rows), len(rows[0]), squeeze=False,
            gridspec_kw={"height_ratios": heights, "wspace": 0.03, "hspace": 0.03 * len(heights) / sum(heights)},
        )  # fmt: skip
        figure.subplots_adjust(left=0.005, right=0.995, bottom=0.005, top=1 - 0.3 / figure.get_figheight())
        for axes, pixels in zip(panels.ravel(), (pixels for row in rows for pixels in row), strict=True):
            axes.set_axis_off()
            if pixels:
                axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, aspect="auto", interpolation="none")
        for axes, title in zip(panels[0], ("image", "ground truth", *methods), strict=True):
            axes.set_title(title, fontsize=9, pad=3)
        return saved(figure, "examples", dpi=THUMBNAIL / PANEL)


def error_image(prediction: Image.Image, mask: Image.Image) -> Image.Image:
    """The errors of a map, greyscale and of the mask's size: the object is light grey on white, false positives are
    red, false negatives blue, the deeper the larger the error."""
    error = np.asarray(prediction, np.float32)[..., None] / 255
    is_object = np.asarray(mask)[..., None] > OBJECT
    deep = np.where(is_object, np.float32([20, 80, 220]), np.float32([225, 30, 40]))
    ground = np.where(is_object, np.float32(205), np.float32(255))
    error = np.where(is_object, 1 - error, error)
    return Image.fromarray((ground * (1 - error) + deep * error).round().astype(np.uint8))


def thumbnail(path: Path, mode: str) -> Image.Image:
    """The image ("RGB") or mask ("L", as it is scored) in a file, reduced. Raises OSError that names the file."""
    with opened(path) as image:
        small = mask_of(image) if mode == "L" else decoded(image)
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        return small.convert(mode)


def read_image(path: Path | None) -> Image.Image | None:
    """A small version of an image; None without an image, or if it cannot be read."""
    if path:
        with suppress(OSError):
            return thumbnail(path, "RGB")
    return None


def read_map(path: Path) -> Image.Image:
    """A small version of a map, stretched, as it is scored. Raises OSError that names the file."""
    return ImageOps.autocontrast(thumbnail(path, "L"))
