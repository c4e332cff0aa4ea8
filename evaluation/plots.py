"""Figures of results, PNG and PDF: curves, examples; and the small images that they and the page show."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from evaluation.metrics import PairScores
from evaluation.results import Evaluation, ImageScores
from unext.images import decoded, opened
from unext.masks import OBJECT, mask_of
from unext.workers import cores

if TYPE_CHECKING:  # not at the top: worker processes import this too and do without
    from matplotlib.figure import Figure

CURVES = ("precision", "recall", "Fm", "Em")  # in curves.npz
EXAMPLES = 6  # in examples.png unless they are named
THUMBNAIL = 320  # pixels, at most
ACROSS = 4  # panels side by side, at most
# For names in scripts that DejaVu Sans lacks: fonts of Linux, Windows and macOS. Without one of them, boxes are drawn.
FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Microsoft YaHei", "Yu Gothic",
    "Malgun Gothic", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS",
)  # fmt: skip


@contextmanager
def drawing() -> Iterator[None]:
    """In the block, matplotlib draws names in any script, without warnings, and PDFs whose text stays text."""
    import warnings

    import matplotlib
    from matplotlib import font_manager

    known = {font.name for font in font_manager.fontManager.ttflist}
    settings = {"font.family": [font for font in FONTS if font in known], "text.parse_math": False, "pdf.fonttype": 42}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def saved(figure: "Figure", kind: str, dpi: int = 150) -> bytes:
    buffer = io.BytesIO()
    options = {"png": {"pil_kwargs": {"compress_level": 2}}, "pdf": {"metadata": {"CreationDate": None}}}
    figure.savefig(buffer, format=kind, dpi=dpi, **options[kind])
    return buffer.getvalue()


def curves(means: Mapping[str, PairScores]) -> bytes:
    """A PNG with a line for each data set: precision against recall, and the F-measure against the threshold."""
    from matplotlib.figure import Figure

    with drawing():
        figure = Figure(figsize=(10.4, 4.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, scores in means.items():
            left.plot(scores.recall, scores.precision, label=name, linewidth=1.6)
            right.plot(scores.Fm, label=name, linewidth=1.6)
        left.set(xlabel="recall", ylabel="precision", title="Precision and recall", xlim=(0, 1))
        right.set(xlabel="threshold, grey levels", ylabel="F-measure", title="F-measure at each threshold")
        right.set_xlim(0, 255)
        for axes in (left, right):
            axes.set_ylim(0, 1.01)
            clean(axes)
            if means:
                axes.legend(loc="best", frameon=False, fontsize=9)
        return saved(figure, "png", dpi=130)


def clean(axes: Any) -> None:
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


class Plot(NamedTuple):
    """A figure of curves with a panel for each data set."""

    x: str | None  # of CURVES; None: the threshold
    y: str
    x_label: str
    y_label: str


PLOTS = {
    "precision_recall": Plot("recall", "precision", "recall", "precision"),
    "f_measure": Plot(None, "Fm", "threshold, grey levels", "F-measure"),
    "e_measure": Plot(None, "Em", "threshold, grey levels", "E-measure"),
}


def curves_of_methods(scored: Evaluation, plot: Plot) -> dict[str, bytes]:
    """A PNG and a PDF, by extension: a panel for each row of the tables with a line for each method."""
    from matplotlib.figure import Figure

    down = math.ceil(len(scored.rows) / ACROSS)
    across = math.ceil(len(scored.rows) / down)
    with drawing():
        figure = Figure(figsize=(3.6 * across, 3.1 * down + 0.5), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).ravel()
        lines = {}
        for axes, row in zip(panels, scored.rows, strict=False):
            for i, method in reversed(list(enumerate(scored.methods))):  # the first is drawn last, on top
                if row in scored.means[method]:
                    scores = scored.means[method][row]
                    x = getattr(scores, plot.x) if plot.x else np.arange(256)
                    # At threshold 0 everything is object, whatever the method: that point would only stretch the axes.
                    [lines[method]] = axes.plot(x[1:], getattr(scores, plot.y)[1:], **line(i))
            axes.set(title=row, xlabel=plot.x_label, ylabel=plot.y_label)
            axes.margins(0.03)
            clean(axes)
        for axes in panels[len(scored.rows) :]:
            axes.set_visible(False)
        shown = [method for method in scored.methods if method in lines]
        figure.legend(
            [lines[method] for method in shown], shown, loc="outside lower center", ncols=2 * across, frameon=False
        )
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")  # it is laid out, once for both
        return {kind: saved(figure, kind) for kind in ("png", "pdf")}


def line(number: int) -> dict[str, Any]:
    """How the curve of the method of this number is drawn; the first in bold."""
    if number == 0:
        return {"color": "#d1001f", "linewidth": 2.6}
    styles = ("-", "--", "-.", ":")  # to be told apart without colours, too
    colours = ("#1f5fb4", "#2e8b57", "#e08214", "#7b3294", "#0097a7", "#7f5539", "#5b6270")
    return {"color": colours[(number - 1) % 7], "linestyle": styles[(number - 1) % 4], "linewidth": 1.3}


def values_of_curves(scored: Evaluation) -> bytes:
    """An .npz: `methods`, `datasets`, and each of CURVES as float64 (datasets, methods, 256), NaN where not scored."""
    missing = np.full(256, np.nan)
    arrays = {
        curve: np.array(
            [
                [getattr(scored.means[method].get(row), curve, missing) for method in scored.methods]
                for row in scored.rows
            ]
        )
        for curve in CURVES
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, methods=scored.methods, datasets=list(scored.rows), **arrays)
    return buffer.getvalue()


def differing(images: Sequence[ImageScores], number: int = EXAMPLES) -> list[ImageScores]:
    """The images in whose S-measure the methods differ most."""

    def spread(one: ImageScores) -> float:
        scores = [figures["Smeasure"] for figures in one.figures.values()]
        return max(scores) - min(scores)

    return sorted(images, key=lambda one: (-spread(one), one.dataset, one.name))[:number]


def examples(chosen: Sequence[ImageScores], methods: Sequence[str]) -> dict[str, bytes]:
    """A PNG and a PDF, by extension: rows of image, ground truth and the maps of the methods."""
    from matplotlib.figure import Figure

    width, dpi = 1.3, 250  # of a panel, inches
    side = round(width * dpi)

    def read(one: ImageScores) -> list[np.ndarray | None]:
        image = None
        if one.image:
            with suppress(OSError):
                image = np.asarray(thumbnail(one.image, "RGB", side))
        maps = [np.asarray(read_map(one.maps[method], side)) if method in one.maps else None for method in methods]
        return [image, np.asarray(thumbnail(one.ground_truth, "L", side)), *maps]

    with ThreadPoolExecutor(cores()) as pool:  # Pillow decodes without Python's lock
        table = list(pool.map(read, chosen))
    heights = [row[1].shape[0] / row[1].shape[1] for row in table]
    with drawing():
        figure = Figure(figsize=(width * len(table[0]), width * sum(heights) + 0.3))
        panels = figure.subplots(
            len(table), len(table[0]), squeeze=False,
            gridspec_kw={"height_ratios": heights, "wspace": 0.03, "hspace": 0.03 * len(heights) / sum(heights)},
        )  # fmt: skip
        figure.subplots_adjust(left=0.005, right=0.995, bottom=0.005, top=1 - 0.3 / figure.get_figheight())
        for axes, pixels in zip(panels.ravel(), (panel for row in table for panel in row), strict=True):
            axes.set_axis_off()
            if pixels is not None:
                axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, aspect="auto", interpolation="none")
        for axes, title in zip(panels[0], ("image", "ground truth", *methods), strict=True):
            axes.set_title(title, fontsize=9, pad=3)
        return {kind: saved(figure, kind, dpi) for kind in ("png", "pdf")}


def error_image(prediction: Image.Image, ground_truth: Image.Image) -> Image.Image:
    """The errors of a map, both greyscale of one size: the object is light grey on white, false positives are red,
    false negatives blue, the deeper the larger the error."""
    error = np.asarray(prediction, np.float32)[..., None] / 255
    is_object = np.asarray(ground_truth)[..., None] > OBJECT
    deep = np.where(is_object, np.float32([20, 80, 220]), np.float32([225, 30, 40]))
    ground = np.where(is_object, np.float32(205), np.float32(255))
    error = np.where(is_object, 1 - error, error)
    return Image.fromarray((ground * (1 - error) + deep * error).round().astype(np.uint8))


def thumbnail(path: Path, mode: str, side: int = THUMBNAIL) -> Image.Image:
    """The image ("RGB") or mask ("L", as it is scored) in a file, reduced. Raises OSError that names the file."""
    with opened(path) as image:
        small = mask_of(image) if mode == "L" else decoded(image)
        small.thumbnail((side, side))
        return small.convert(mode)


def read_map(path: Path, side: int = THUMBNAIL) -> Image.Image:
    """A small version of a map, stretched, as it is scored. Raises OSError that names the file."""
    return ImageOps.autocontrast(thumbnail(path, "L", side))
