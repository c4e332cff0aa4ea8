"""Turns scores into what people read: tables for the terminal, Markdown, LaTeX and CSV, curves, and an HTML page."""

import base64
import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from evaluation.benchmarks import OURS
from evaluation.metrics import METRICS, PairScores
from unext import files, imaging

THIS_RUN, DIFFERENCE = "this run", "difference"
LATEX_SPECIAL = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
)
MIN_IMAGES, MAX_IMAGES = 6, 18  # on the page; half of the images in between
THUMBNAIL = (320, 320)  # at most, pixels


class Row(NamedTuple):
    """A line of a table."""

    dataset: str
    method: str
    images: int | None
    figures: Mapping[str, float]  # by metric; a paper does not have all

    def cell(self, column: str) -> str:
        """The figure to three decimals; empty if there is none."""
        if column not in self.figures:
            return ""
        return f"{self.figures[column]:{'+' if self.method == DIFFERENCE else ''}.3f}"


class ImageScores(NamedTuple):
    """One image and its figures, see `metrics.PairScores.figures`."""

    dataset: str
    image: Path | None
    ground_truth: Path
    map: Path
    figures: dict[str, float]


def rows(
    results: Mapping[str, Mapping[str, float]], published: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> list[Row]:
    """For each data set this run and, if there are published figures, those, the difference, the strongest peer."""
    lines = []
    for dataset, figures in results.items():
        lines.append(Row(dataset, THIS_RUN, figures["images"], figures))
        methods = published[dataset]
        if OURS in methods:
            difference = {metric: figures[metric] - value for metric, value in methods[OURS].items()}
            lines += [Row(dataset, f"{OURS}, paper", None, methods[OURS]), Row(dataset, DIFFERENCE, None, difference)]
        peers = [name for name in methods if name != OURS]
        strongest = max(peers, key=lambda name: (methods[name]["Smeasure"], -methods[name]["MAE"]), default=None)
        if strongest:
            lines.append(Row(dataset, f"{strongest}, paper", None, methods[strongest]))
    return lines


def cells(lines: Sequence[Row], columns: Sequence[str]) -> list[list[str]]:
    """The table as text, heading first; the name of a data set is in its first line only."""
    compared = any(row.method != THIS_RUN for row in lines)
    table = [["dataset", *(["method"] if compared else []), "images", *columns]]
    for row in lines:
        name = row.dataset if row.method == THIS_RUN else ""
        images = "" if row.images is None else f"{row.images:,}"
        table.append([name, *([row.method] if compared else []), images, *(row.cell(column) for column in columns)])
    return table


def text(lines: Sequence[Row], columns: Sequence[str]) -> str:
    """A plain table with aligned columns."""
    table = cells(lines, columns)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    words = len(table[0]) - len(columns) - 1  # columns of words, left-aligned
    aligned = [
        "  ".join(f"{cell:{'<' if i < words else '>'}{widths[i]}}" for i, cell in enumerate(row)) for row in table
    ]
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def to_markdown(lines: Sequence[Row], columns: Sequence[str], notes: Sequence[str] = ()) -> str:
    table = cells(lines, columns)
    words = len(table[0]) - len(columns) - 1
    rule = ["---"] * words + ["---:"] * (len(columns) + 1)
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in table]
    body = "\n".join(f"| {' | '.join(row)} |" for row in [escaped[0], rule, *escaped[1:]])
    return body + "\n" + "".join(f"\n{note}\n" for note in notes)


def to_latex(rows: Sequence[Row], columns: Sequence[str], notes: Sequence[str] = ()) -> str:
    """A tabular to \\input in a document that uses booktabs, with rules between the data sets."""
    table = cells(rows, columns)
    words = len(table[0]) - len(columns) - 1
    arrows = [f"{METRICS[name].latex} $\\{'down' if METRICS[name].lower_is_better else 'up'}arrow$" for name in columns]
    heading = [*table[0][: words + 1], *arrows]
    body = []
    for row in table[1:]:
        if row[0] and words > 1 and body:
            body.append("\\midrule")
        escaped = [cell.translate(LATEX_SPECIAL) for cell in row[: words + 1]]
        body.append(" & ".join([*escaped, *(f"${cell}$" if cell else "" for cell in row[words + 1 :])]) + " \\\\")
    lines = ["% needs \\usepackage{booktabs}", *(f"% {note}" for note in notes)]
    lines += [f"\\begin{{tabular}}{{{'l' * words + 'r' * (len(columns) + 1)}}}", "\\toprule"]
    return "\n".join([*lines, " & ".join(heading) + " \\\\", "\\midrule", *body, "\\bottomrule", "\\end{tabular}\n"])


def to_json(results: Mapping[str, Mapping[str, float]]) -> bytes:
    """`{data set: {"images": n, metric: value, ...}}`, unrounded."""
    return (json.dumps(results, indent=1) + "\n").encode()


def to_csv(heading: Sequence[str], table: Iterable[Sequence[object]]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([heading, *table])
    return buffer.getvalue().encode()


def curves(means: Mapping[str, PairScores]) -> bytes:
    """A PNG with a line for each data set: precision against recall, and the F-measure against the threshold."""
    from matplotlib.figure import Figure  # not at the top: worker processes import this too and do without

    figure = Figure(figsize=(10.4, 4.4), layout="constrained", dpi=130)
    left, right = figure.subplots(1, 2)
    for name, scores in means.items():
        left.plot(scores.recall, scores.precision, label=name, linewidth=1.6)
        right.plot(scores.Fm, label=name, linewidth=1.6)
    left.set(xlabel="recall", ylabel="precision", title="Precision and recall", xlim=(0, 1))
    right.set(xlabel="threshold, grey levels", ylabel="F-measure", title="F-measure at each threshold", xlim=(0, 255))
    for axes in (left, right):
        axes.set_ylim(0, 1.01)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if means:
            axes.legend(loc="best", frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def error_image(prediction: Image.Image, ground_truth: Image.Image) -> Image.Image:
    """The errors of a map, both greyscale of one size: the object is light grey on white, false positives are red,
    false negatives blue, the deeper the larger the error."""
    error = np.asarray(prediction, np.float32)[..., None] / 255
    is_object = np.asarray(ground_truth)[..., None] > imaging.OBJECT
    deep = np.where(is_object, np.float32([20, 80, 220]), np.float32([225, 30, 40]))
    ground = np.where(is_object, np.float32(205), np.float32(255))
    error = np.where(is_object, 1 - error, error)
    return Image.fromarray((ground * (1 - error) + deep * error).round().astype(np.uint8))


def thumbnail(path: Path, mode: str) -> Image.Image:
    """The image in a file, reduced while it is decoded. Raises OSError that names the file."""
    with imaging.opened(path) as image:
        image = imaging.decoded(image)
        image.thumbnail(THUMBNAIL)
        return imaging.mask_of(image) if mode == "L" else image.convert("RGB")


def data_url(image: Image.Image) -> str:
    """An image as JPEG, to be embedded in a page."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "jpeg", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def card(scored: ImageScores) -> dict[str, object]:
    """What the page shows of one image; without the image itself if it cannot be read."""
    ground_truth = thumbnail(scored.ground_truth, "L")
    prediction = ImageOps.autocontrast(thumbnail(scored.map, "L"))  # stretched, as it is scored
    if prediction.size != ground_truth.size:
        prediction = prediction.resize(ground_truth.size, Image.Resampling.BILINEAR)
    panels = [("ground truth", ground_truth), ("map", prediction), ("error", error_image(prediction, ground_truth))]
    if scored.image:
        with suppress(OSError):
            panels.insert(0, ("image", thumbnail(scored.image, "RGB")))
    return {
        "name": files.printable(scored.ground_truth.stem),
        "dataset": scored.dataset,
        "figures": {name: f"{scored.figures[name]:.3f}" for name in ("Smeasure", "wFmeasure", "MAE")},
        "panels": [{"title": title, "url": data_url(image)} for title, image in panels],
    }


def page(
    title: str, table: list[list[str]], plotted: bytes, scored: Sequence[ImageScores], notes: Sequence[str]
) -> bytes:
    """A self-contained HTML page: the table, the PNG of `curves`, the worst and the best images by S-measure."""
    import jinja2  # not at the top, like matplotlib

    order = sorted(scored, key=lambda one: (one.figures["Smeasure"], one.dataset, one.ground_truth.name))
    number = min(MAX_IMAGES, max(MIN_IMAGES, len(order) // 2), len(order))
    best = order[::-1][: number // 3]
    worst = order[: number - len(best)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without Python's lock
        groups = [(words, list(pool.map(card, chosen))) for words, chosen in (("Worst", worst), ("Best", best))]
    content = {"title": title, "heading": table[0], "body": table[1:], "words": table[0].index("images")}
    content |= {"difference": DIFFERENCE, "notes": notes, "curves": base64.b64encode(plotted).decode()}
    content |= {"groups": groups, "images": len(scored), "several": len({one.dataset for one in scored}) > 1}
    content["lower_is_better"] = [name for name, metric in METRICS.items() if metric.lower_is_better]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = Path(__file__).with_name("report_template.html").read_text("utf-8")
    return environment.from_string(template).render(content).encode()


def write(
    folder: Path, title: str, columns: Sequence[str], lines: Sequence[Row], results: Mapping[str, Mapping[str, float]],
    means: Mapping[str, PairScores], scored: Sequence[ImageScores], notes: Sequence[str],
) -> None:  # fmt: skip
    """Writes results.{json,csv,md,tex}, per_image.csv, curves.png and report.html. Raises OSError."""
    all_figures = ([*row[:3], *(row.figures.get(metric, "") for metric in METRICS)] for row in lines)
    per_image = ([one.dataset, files.printable(one.ground_truth.stem), *one.figures.values()] for one in scored)
    plotted = curves(means)
    for name, content in {
        "results.json": to_json(results),
        "results.csv": to_csv(["dataset", "method", "images", *METRICS], all_figures),
        "results.md": to_markdown(lines, columns, notes).encode(),
        "results.tex": to_latex(lines, columns, notes).encode(),
        "per_image.csv": to_csv(["dataset", "image", *METRICS], per_image),
        "curves.png": plotted,
        "report.html": page(title, cells(lines, columns), plotted, scored, notes),
    }.items():
        with files.replacing(folder / name) as file:
            file.write(content)
