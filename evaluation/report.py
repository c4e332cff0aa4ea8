"""Writes results: tables and figures as files, and an HTML page with examples."""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from evaluation import compare, plots, tables
from evaluation.compare import Group
from evaluation.metrics import METRICS
from evaluation.results import Difference, Evaluation, ImageScores
from evaluation.tables import Table
from unext import files
from unext.workers import cores

WORST, BEST = 12, 6  # images on the page
LOSSES = 4  # images on the page in which the first method loses most against another
FOLDED = 12  # tables with more groups are collapsed
SHOWN = ("Smeasure", "wFmeasure", "MAE")  # below an image
TEMPLATE = Path(__file__).with_name("report_template.html")


def panels(images: Iterable[tuple[str, Image.Image]]) -> list[dict[str, str]]:
    """Images with their titles, as JPEG to be embedded in a page."""
    urls = []
    for title, image in images:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "jpeg", quality=85)
        urls.append({"title": title, "url": f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"})
    return urls


def card(scores: ImageScores) -> dict[str, Any]:
    """What the page shows for an image."""
    mask = plots.thumbnail(scores.mask, "L")
    images = [("image", plots.thumbnail(scores.image, "RGB"))] if scores.image else []
    methods = []
    for method, path in scores.maps.items():
        prediction = plots.read_map(path).resize(mask.size, Image.Resampling.BILINEAR)
        maps = panels([("map", prediction), ("error", plots.error_image(prediction, mask))])
        figures = {name: f"{scores.figures[method][name]:.3f}" for name in SHOWN}
        methods.append({"name": method, "scores": figures, "panels": maps})
    images = panels([*images, ("ground truth", mask)])
    return {"name": scores.name, "dataset": scores.dataset, "panels": images, "methods": methods}


def sections(evaluation: Evaluation) -> list[tuple[str, list[ImageScores]]]:
    """The images on the page, by title: worst and best of the first method, and where it loses most against others."""
    first, *others = evaluation.methods
    scored = [image for image in evaluation.images if first in image.maps]

    def loss(image: ImageScores, method: str) -> float:
        return image.figures[method]["Smeasure"] - image.figures[first]["Smeasure"]

    order = sorted(scored, key=lambda image: (image.figures[first]["Smeasure"], image.dataset, image.name))
    worst, best = order[:WORST], order[WORST:][-BEST:][::-1]
    of = f"of {len(order):,} by S-measure" + (f" of {first}" if others else "")
    chosen = [(f"Worst {len(worst)} {of}", worst), (f"Best {len(best)} {of}", best)]
    for method in others:
        lost = [image for image in scored if method in image.maps and loss(image, method) > 0]
        lost.sort(key=lambda image, method=method: -loss(image, method))
        chosen.append((f"Where {first} loses most against {method}", lost[:LOSSES]))
    return [(title, images) for title, images in chosen if images]


def group_tables(evaluation: Evaluation, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A table for each kind of group: the columns of a single method, or the S-measure of several."""
    metrics = ["Smeasure"] if evaluation.has_several() else evaluation.columns
    content = []
    for kind in dict.fromkeys(group.kind for group in groups):
        body = []
        for group in (group for group in groups if group.kind == kind):
            rows = [tables.Row("", method, None, group.figures(method, metrics)) for method in evaluation.methods]
            cells = [row.cell(name).text for row in rows for name in metrics]
            body.append([group.dataset, group.name, f"{len(group.images):,}", *cells])
        content.append({"kind": kind, "body": body, "folded": len(body) > FOLDED})
    return content


def page(
    evaluation: Evaluation, table: Table, groups: Sequence[Group], curves: Sequence[bytes], notes: Sequence[str],
    lost: Sequence[ImageScores] = (),
) -> bytes:  # fmt: skip
    """A self-contained HTML page: tables, `curves` (PNG files), examples but those whose files are lost."""
    chosen = [(title, [image for image in images if image not in lost]) for title, images in sections(evaluation)]
    images = {(image.dataset, image.name): image for _, images in chosen for image in images}  # some in two sections
    with ThreadPoolExecutor(cores()) as pool:  # Pillow decodes without Python's lock
        cards = dict(zip(images, pool.map(card, images.values()), strict=True))
    by_dataset = groupby(evaluation.differences, key=lambda line: line.dataset)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    content = environment.from_string(TEMPLATE.read_text("utf-8")).render(
        title=evaluation.benchmark.name,
        notes=notes,
        origins=evaluation.origins,
        table=table,
        methods=evaluation.methods,
        metrics=METRICS,
        differences=[
            (name, sorted(lines, key=lambda line: evaluation.columns.index(line.metric))) for name, lines in by_dataset
        ],
        p_text=tables.p_text,
        groups=group_tables(evaluation, groups),
        curves=[base64.b64encode(png).decode() for png in curves],
        examples=[(title, [cards[image.dataset, image.name] for image in images]) for title, images in chosen],
        several_sets=len({image.dataset for image in evaluation.images}) > 1,
    )
    return content.encode()


def write(
    folder: Path, evaluation: Evaluation, table: Table, examples: Sequence[ImageScores], style: plots.Style,
    json_path: Path | None = None,
) -> None:  # fmt: skip
    """Writes all files of docs/benchmarks.md, the tables first, and results.json to `json_path` too."""
    groups = compare.groups(evaluation.images, evaluation.benchmark.groups)
    notes = [*tables.legend(evaluation, "bold", "underlined"), *evaluation.lines()]
    if evaluation.has_several():
        examples = examples or plots.most_differing(evaluation.images)
    with style.applied([*evaluation.methods, *evaluation.rows]) as lacking:
        if lacking:
            notes.append(f"figures: no font of this system has {lacking}; install one, such as Noto Sans CJK")
            print(notes[-1])
    shown = [*examples, *chain.from_iterable(images for _, images in sections(evaluation))]
    if lost := [image for image in shown if not image.has_files()]:
        names = dict.fromkeys(f"{image.dataset}/{image.name}" for image in lost)
        notes.append(f"not shown, since their image, ground truth or maps are gone: {files.listing(names)}")
        print(notes[-1])
        examples = [image for image in examples if image not in lost]
    origins = [f"{training}: {line}" for training, line in evaluation.origins.items()]
    contents = table_files(evaluation, table, groups, [*notes, *origins])
    for name in ("comparison.csv", "examples.png", "examples.pdf"):  # of an earlier run, which may have had others
        (folder / name).unlink(missing_ok=True)
    save(folder, contents)
    if json_path:
        save(json_path.parent, {json_path.name: contents["results.json"]})
    contents = {"curves.npz": plots.values_of_curves(evaluation)}
    for name in plots.PLOTS:
        contents |= plots.curves(evaluation, name, style)
    curves = [contents[f"{name}.png"] for name in plots.PLOTS]
    contents |= plots.examples(examples, evaluation.methods, style) if examples else {}
    save(folder, contents | {"report.html": page(evaluation, table, groups, curves, notes, lost)})


def save(folder: Path, contents: Mapping[str, bytes]) -> None:
    for name, content in contents.items():
        with files.replacing(folder / name) as file:
            file.write(content)


def table_files(
    evaluation: Evaluation, table: Table, groups: Sequence[Group], notes: Sequence[str]
) -> dict[str, bytes]:
    """The contents of results.*, per_image.csv, groups.csv and, of several methods, comparison.csv."""
    several, names, results = evaluation.has_several(), evaluation.metrics, evaluation.results()
    figures = ([*row[:3], *(row.figures.get(name, "") for name in names)] for row in table.rows())
    per_image = (
        [image.dataset, *([method] if several else []), image.name, *map(image.figures[method].get, names)]
        for method in evaluation.methods for image in evaluation.images if method in image.figures
    )  # fmt: skip
    per_group = (
        [*group[:3], method, len(group.images), *group.figures(method, names).values()]
        for group in groups for method in group.images[0].figures
    )  # fmt: skip
    contents = {
        "results.json": (json.dumps(results if several else results[evaluation.methods[0]], indent=1) + "\n").encode(),
        "results.csv": tables.to_csv(["dataset", "method", "images", *names], figures),
        "results.md": tables.markdown(table, notes).encode(),
        "results.tex": tables.latex(table, notes).encode(),
        "per_image.csv": tables.to_csv(["dataset", *(["method"] if several else []), "image", *names], per_image),
        "groups.csv": tables.to_csv(["dataset", "kind", "group", "method", "images", *names], per_group),
    }
    if several:
        contents["comparison.csv"] = tables.to_csv(Difference._fields, evaluation.differences)
    return contents
