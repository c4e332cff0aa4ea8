"""Curves and examples as PNG and PDF, and the small images that they and the page show."""

import io
import math
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.style import library
from PIL import Image, ImageOps

from evaluation import fonts
from evaluation.results import Evaluation, ImageScores
from unext.errors import InputError
from unext.images import decoded, opened
from unext.masks import OBJECT, mask_of

PLOTS = {  # name: (x, y)
    "precision_recall": ("recall", "precision"),
    "f_measure": ("threshold", "Fm"),
    "e_measure": ("threshold", "Em"),
}
LABELS = {"threshold": "threshold, grey levels", "Fm": "F-measure", "Em": "E-measure"}
CURVES = ("precision", "recall", "Fm", "Em")  # in curves.npz
# Of the methods: Okabe and Ito's colours, which the colour-blind tell apart, and line styles for print in grey. The
# numbers of both have no common divisor, so that 56 methods differ.
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#000000", "#cc79a7", "#56b4e9", "#e69f00")
LINES = ("-", "--", "-.", ":", (0, (6, 1.5, 1, 1.5, 1, 1.5)), (0, (3, 1)), (0, (1, 2.5)), (0, (8, 2)))
MARKERS = "osD^vP*X"  # of binary maps
SMALL = 0.01  # a curve that is shorter is a point: that of binary maps
WIDTH = 7.16  # of two columns of a paper, inches
PANEL = 1.7  # at least, of a panel of curves
EXAMPLES = 6  # in examples.png unless they are named
THUMBNAIL = 320  # pixels, at most
LETTER = 0.065  # width of a letter, inches
SETTINGS = {
    "text.parse_math": False,  # "$" in names is plain
    "pdf.fonttype": 42,  # text in PDFs stays text
    "font.size": 8, "axes.titlesize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "lines.linewidth": 1, "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.5,
    "axes.prop_cycle": cycler(color=COLOURS * len(LINES)) + cycler(linestyle=LINES * len(COLOURS)),
    "legend.frameon": False,
}  # fmt: skip


class Style(NamedTuple):
    """How figures are drawn."""

    width: float = WIDTH  # inches
    sheet: Mapping[str, Any] = MappingProxyType({})  # Matplotlib's settings that replace SETTINGS

    @contextmanager
    def applied(self, names: Iterable[str]) -> Iterator[str]:
        """Draws in this style in the block, in a font that has the names; the letters that no font has."""
        settings = {**SETTINGS, **self.sheet, "text.usetex": False}  # names are not escaped for LaTeX
        with matplotlib.rc_context(settings), warnings.catch_warnings():
            families, lacking = fonts.families(names)
            warnings.filterwarnings("ignore", "Glyph .* missing")  # the caller says so
            with matplotlib.rc_context({"font.family": families}):
                yield lacking


def read_sheet(name: str) -> dict[str, Any]:
    """A style sheet of Matplotlib: a file, or the name of one that comes with it. Raises InputError or OSError."""
    if name in library:
        return dict(library[name])
    if not Path(name).is_file():
        raise InputError(f"--style {name}: there is no such file, and no style of Matplotlib has this name")
    try:
        return dict(matplotlib.rc_params_from_file(name, use_default_template=False))
    except UnicodeDecodeError as error:
        raise InputError(f"--style {name}: is no style sheet of Matplotlib") from error


def render(figure: Figure, name: str, dpi: float) -> dict[str, bytes]:
    """The PNG and the PDF of a figure, by file name."""
    contents = {}
    options = {"png": {"pil_kwargs": {"compress_level": 2}}, "pdf": {"metadata": {"CreationDate": None}}}
    for kind, settings in options.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=dpi, **settings)
        contents[f"{name}.{kind}"] = buffer.getvalue()
    return contents


def draw(axes: Axes, points: tuple[np.ndarray, np.ndarray], number: int) -> Line2D:
    """Draws the curve of a method, or the point of binary maps; the first is wide, on top, and lets others through."""
    cycle = list(matplotlib.rcParams["axes.prop_cycle"])
    style, width = dict(cycle[number % len(cycle)]), matplotlib.rcParams["lines.linewidth"]
    if not number:
        style |= {"linewidth": 2 * width, "alpha": 0.75, "zorder": 3}
    if all(np.ptp(values) < SMALL for values in points):
        style |= {"linestyle": "none", "marker": MARKERS[number % len(MARKERS)], "markersize": 5}
        points = tuple(values[:1] for values in points)
    [line] = axes.plot(*points, **style)
    return line


def curves(evaluation: Evaluation, name: str, style: Style = Style()) -> dict[str, bytes]:  # noqa: B008
    """The files of a plot of PLOTS: a panel for each row of the tables with a line for each method."""
    (x, y), rows = PLOTS[name], evaluation.rows
    down = math.ceil(len(rows) / max(1, style.width // PANEL))
    across = math.ceil(len(rows) / down)
    legend_columns = max(1, int(style.width / (0.5 + LETTER * max(map(len, evaluation.methods)))))
    legend_rows = math.ceil(len(evaluation.methods) / legend_columns)
    panel = min(style.width / across, 3.4)
    with style.applied([*rows, *evaluation.methods]):
        size = style.width, 0.9 * panel * down + 0.16 * legend_rows + 0.1
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).ravel()
        lines = {}
        for axes, row in zip(panels, rows, strict=False):
            for i, method in enumerate(evaluation.methods):
                if row in evaluation.means[method]:
                    scores = evaluation.means[method][row]
                    points = np.arange(256) if x == "threshold" else scores.curve(x), scores.curve(y)
                    # At threshold 0 everything is object, for every method: that point would only stretch the axes.
                    lines[method] = draw(axes, tuple(values[1:] for values in points), i)
            axes.set(title=row, xlabel=LABELS.get(x, x), ylabel=LABELS.get(y, y))
            axes.margins(0.03)
        for axes in panels[len(rows) :]:
            axes.set_visible(False)
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=min(legend_columns, len(lines)))
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")  # the layout is computed, once for PNG and PDF
        return render(figure, name, dpi=200)


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


def examples(images: Sequence[ImageScores], methods: Sequence[str], style: Style) -> dict[str, bytes]:
    """The files of the examples: rows of image, ground truth and the maps of the methods."""
    rows = []
    for image in images:
        maps = [read_map(image.maps[method]) if method in image.maps else None for method in methods]
        rows.append([image.image and thumbnail(image.image, "RGB"), thumbnail(image.mask, "L"), *maps])
    heights = [mask.height / mask.width for _, mask, *_ in rows]
    panel = style.width / len(rows[0])
    titles = [textwrap.fill(title, max(4, int(panel / LETTER))) for title in ("image", "ground truth", *methods)]
    top = 0.08 + 0.13 * max(title.count("\n") + 1 for title in titles)  # inches
    with style.applied(titles):
        figure = Figure(figsize=(style.width, panel * sum(heights) + top))
        grid = {"height_ratios": heights, "wspace": 0.03, "hspace": 0.03 * len(heights) / sum(heights)}
        panels = figure.subplots(len(rows), len(rows[0]), squeeze=False, gridspec_kw=grid)
        figure.subplots_adjust(left=0.003, right=0.997, bottom=0.003, top=1 - top / figure.get_figheight())
        for axes, pixels in zip(panels.ravel(), chain(*rows), strict=True):
            axes.set_axis_off()
            if pixels:
                axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, aspect="auto", interpolation="none")
        for axes, title in zip(panels[0], titles, strict=True):
            axes.set_title(title, pad=3, linespacing=1)
        return render(figure, "examples", dpi=THUMBNAIL / panel)


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
