"""Writes results: the tables and figures as files, and an HTML page with examples."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation import compare, plots, tables
from evaluation.metrics import METRICS
from evaluation.results import Difference, Evaluation, ImageScores
from unext import files
from unext.workers import cores

MIN_IMAGES, MAX_IMAGES = 6, 18  # on the page; half of the images in between
LOSSES = 4  # images on the page in which the first method loses most against another one
FOLDED = 12  # groups of a kind, above which their table is folded
SHOWN = ("Smeasure", "wFmeasure", "MAE")  # below an image


def data_url(image: Image.Image) -> str:
    """An image as JPEG, to be embedded in a page."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "jpeg", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def panels(images: Iterable[tuple[str, Image.Image]]) -> list[dict[str, str]]:
    return [{"title": title, "url": data_url(image)} for title, image in images]


def card(scored: ImageScores) -> dict[str, Any]:
    """What the page shows of one image; without the image itself if it cannot be read."""
    ground_truth = plots.thumbnail(scored.ground_truth, "L")
    shared = [("ground truth", ground_truth)]
    if scored.image:
        with suppress(OSError):
            shared.insert(0, ("image", plots.thumbnail(scored.image, "RGB")))
    methods = []
    for method, path in scored.maps.items():
        prediction = plots.read_map(path)
        if prediction.size != ground_truth.size:
            prediction = prediction.resize(ground_truth.size, Image.Resampling.BILINEAR)
        own = [("map", prediction), ("error", plots.error_image(prediction, ground_truth))]
        scores = {name: f"{scored.figures[method][name]:.3f}" for name in SHOWN}
        methods.append({"name": method, "scores": scores, "panels": panels(own)})
    return {"name": scored.name, "dataset": scored.dataset, "panels": panels(shared), "methods": methods}


def chosen_images(scored: Evaluation) -> list[tuple[str, list[ImageScores]]]:
    """The images on the page, by title: worst and best of the first method, and where it loses most against others."""
    first = scored.methods[0]
    own = [one for one in scored.images if first in one.maps]
    order = sorted(own, key=lambda one: (one.figures[first]["Smeasure"], one.dataset, one.name))
    number = min(MAX_IMAGES, max(MIN_IMAGES, len(order) // 2), len(order))
    best = order[::-1][: number // 3]
    worst = order[: number - len(best)]
    whose = f" of {first}" if scored.several() else ""
    chosen = [
        (f"{title} {len(some)} of {len(order):,} by S-measure{whose}", some)
        for title, some in (("Worst", worst), ("Best", best))
    ]
    for method in scored.methods[1:]:

        def loss(one: ImageScores, method: str = method) -> float:
            return one.figures[method]["Smeasure"] - one.figures[first]["Smeasure"]

        lost = sorted((one for one in own if method in one.maps and loss(one) > 0), key=loss, reverse=True)
        chosen.append((f"Where {first} loses most against {method}", lost[:LOSSES]))
    return [(title, some) for title, some in chosen if some]


def group_tables(scored: Evaluation, found: Sequence[compare.Group]) -> list[dict[str, Any]]:
    """A table for each kind of group: the columns of one method, or the S-measure of several."""
    made = []
    for kind in dict.fromkeys(group.kind for group in found):
        columns = scored.methods if scored.several() else scored.columns
        body = []
        for group in (one for one in found if one.kind == kind):
            if scored.several():
                values = [
                    group.figures(method, ["Smeasure"])["Smeasure"] if method in group.images[0].maps else None
                    for method in scored.methods
                ]
                cells = ["" if value is None else f"{value:.3f}" for value in values]
            else:
                means = group.figures(scored.methods[0], columns)
                cells = [tables.Row("", "", None, means).cell(column) for column in columns]
            body.append([group.dataset, group.name, f"{len(group.images):,}", *cells])
        made.append({"kind": kind, "columns": columns, "body": body, "folded": len(body) > FOLDED})
    return made


def difference_table(scored: Evaluation, compared: Sequence[Difference]) -> list[dict[str, Any]]:
    """For each data set and other method, what the page shows of the difference in each column."""
    made: dict[tuple[str, str], dict[str, Any]] = {}
    for one in compared:
        row = made.setdefault(one[:2], {"dataset": one.dataset, "method": one.method, "cells": []})
        better = (one.difference < 0) == METRICS[one.metric].lower_is_better
        digits = METRICS[one.metric].digits
        row["cells"].append({
            "value": f"{one.difference:+.{digits}f}",
            "interval": f"{one.low:+.{digits}f} to {one.high:+.{digits}f}",
            "p": f"{one.p_holm:.3f}",
            "kind": ("good" if better else "bad") if one.is_beyond_chance() else "unclear",
        })  # fmt: skip
    return list(made.values())


def page(
    title: str, scored: Evaluation, lines: Sequence[tables.Row], compared: Sequence[Difference],
    found: Sequence[compare.Group], pictures: Sequence[tuple[str, bytes]], notes: Sequence[str],
) -> bytes:  # fmt: skip
    """A self-contained HTML page: tables, the PNG files `pictures` by what they show, examples."""
    import jinja2  # not at the top: worker processes import this too and do without

    with ThreadPoolExecutor(cores()) as pool:  # Pillow decodes without Python's lock
        chosen = chosen_images(scored)
        every = {(one.dataset, one.name): one for _, some in chosen for one in some}  # some are in several sections
        cards = dict(zip(every, pool.map(card, every.values()), strict=True))
        examples = [(words, [cards[one.dataset, one.name] for one in some]) for words, some in chosen]
    table = tables.cells(lines, scored.columns)
    content = {"title": title, "notes": notes, "columns": scored.columns, "methods": scored.methods}
    content |= {"heading": table[0], "body": table[1:], "words": table[0].index("images")}
    if scored.several():
        content["wide"] = tables.wide(lines, scored.columns)
    content |= {"difference": tables.DIFFERENCE, "compared": difference_table(scored, compared)}
    content |= {"groups": group_tables(scored, found), "examples": examples}
    content["pictures"] = [  # with their widths in pixels, which a PNG has in its header
        (what, base64.b64encode(png).decode(), int.from_bytes(png[16:20], "big")) for what, png in pictures
    ]
    content["several_sets"] = len({one.dataset for one in scored.images}) > 1
    content["lower_is_better"] = [name for name, metric in METRICS.items() if metric.lower_is_better]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = Path(__file__).with_name("report_template.html").read_text("utf-8")
    return environment.from_string(template).render(content).encode()


def write(
    folder: Path, title: str, scored: Evaluation, compared: Sequence[Difference], notes: Sequence[str],
    examples: Sequence[ImageScores], json_path: Path | None = None,
) -> None:  # fmt: skip
    """Writes the tables, then figures and report.html, see docs/benchmarks.md; results.json also to `json_path`.

    Raises OSError.
    """
    lines = tables.lines(scored, compared)
    found = compare.groups(scored.images, scored.groups)
    if scored.several():
        notes = [tables.legend(scored.methods[0], "bold", "underlined"), *notes]
    contents = table_files(scored, lines, compared, found, notes)
    save(folder, contents)
    if json_path:
        save(json_path.parent, {json_path.name: contents["results.json"]})
    try:  # Matplotlib needs a folder for its cache
        contents, pictures = figure_files(scored, examples)
        contents["report.html"] = page(title, scored, lines, compared, found, pictures, notes)
    except OSError as error:
        raise OSError(f"{folder} has the tables, but no figures and no report.html: {error}") from error
    save(folder, contents)


def save(folder: Path, contents: Mapping[str, bytes]) -> None:
    for name, content in contents.items():
        with files.replacing(folder / name) as file:
            file.write(content)


def table_files(
    scored: Evaluation, lines: Sequence[tables.Row], compared: Sequence[Difference], found: Sequence[compare.Group],
    notes: Sequence[str],
) -> dict[str, bytes]:  # fmt: skip
    """The contents of results.*, per_image.csv, groups.csv and, of several methods, comparison.csv."""
    several, names, results = scored.several(), scored.metrics, scored.results()
    to_latex = tables.to_latex_across if several else tables.to_latex
    all_figures = ([*row[:3], *(row.figures.get(name, "") for name in names)] for row in lines)
    per_image = (
        [one.dataset, *([method] if several else []), one.name, *one.figures[method].values()]
        for method in scored.methods for one in scored.images if method in one.figures
    )  # fmt: skip
    per_group = (
        [*group[:3], method, len(group.images), *group.figures(method, names).values()]
        for group in found for method in group.images[0].figures
    )  # fmt: skip
    contents = {
        "results.json": tables.to_json(results if several else results[scored.methods[0]]),
        "results.csv": tables.to_csv(["dataset", "method", "images", *names], all_figures),
        "results.md": tables.to_markdown(lines, scored.columns, notes, across=several).encode(),
        "results.tex": to_latex(lines, scored.columns, notes).encode(),
        "per_image.csv": tables.to_csv(["dataset", *(["method"] if several else []), "image", *names], per_image),
        "groups.csv": tables.to_csv(["dataset", "kind", "group", "method", "images", *names], per_group),
    }
    if several:
        contents["comparison.csv"] = tables.to_csv(Difference._fields, compared)
    return contents


def figure_files(
    scored: Evaluation, examples: Sequence[ImageScores]
) -> tuple[dict[str, bytes], list[tuple[str, bytes]]]:
    """The contents of the figures' files, and the PNG of those on the page by what they show."""
    contents, pictures = {}, []
    if scored.several():
        contents["curves.npz"] = plots.values_of_curves(scored)
        for name, plot in plots.PLOTS.items():
            drawn = plots.curves_of_methods(scored, plot)
            contents |= {f"{name}.{kind}": content for kind, content in drawn.items()}
            pictures.append((f"{plot.y_label.capitalize()} against {plot.x_label}", drawn["png"]))
        examples = examples or plots.differing(scored.images)
    else:
        contents["curves.png"] = plots.curves(scored.means[scored.methods[0]])
        pictures.append(("Precision against recall; F-measure at each threshold", contents["curves.png"]))
    if examples:
        drawn = plots.examples(examples, scored.methods)
        contents |= {f"examples.{kind}": content for kind, content in drawn.items()}
    return contents, pictures
