"""Tables of results: for the terminal, Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from evaluation.benchmarks import OURS, published
from evaluation.metrics import METRICS
from evaluation.results import LEVEL, MIN_IMAGES, Evaluation, better_or_worse
from unext import files

DIFFERENCE = "difference"  # the row of this run minus the paper
BEST, SECOND, UNCLEAR = "best", "second", "unclear"  # marks of a figure; the last: its difference may be chance
LATEX_SPECIAL = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
)


class Cell(NamedTuple):
    """A score as text, and its marks, such as "best unclear"."""

    text: str = ""
    marks: str = ""

    def styled(self, best: str, second: str, unclear: str) -> str:
        """The text in the pattern of its mark, with `unclear` appended if its difference may be chance."""
        pattern = best if BEST in self.marks else second if SECOND in self.marks else "{}"
        return pattern.format(self.text) + (unclear if UNCLEAR in self.marks else "")


class Row(NamedTuple):
    """The scores of a method on a data set."""

    dataset: str
    method: str
    images: int | None  # None for published figures
    figures: Mapping[str, float]  # by metric; published rows may lack some
    marks: Mapping[str, str] = {}  # by metric

    def cell(self, column: str) -> Cell:
        if column not in self.figures:
            return Cell()
        sign = "+" if self.method == DIFFERENCE else ""
        text = f"{self.figures[column]:{sign}.{METRICS[column].digits}f}"
        return Cell(text, self.marks.get(column, ""))


class Table(NamedTuple):
    """The scores of all methods on all data sets."""

    columns: Sequence[str]
    datasets: Mapping[str, int]  # name: number of images
    methods: Mapping[str, Mapping[str, Row]]  # by method and data set; published methods are last

    def rows(self) -> list[Row]:
        return [rows[dataset] for dataset in self.datasets for rows in self.methods.values() if dataset in rows]

    def cells(self, method: str) -> list[Cell]:
        """All columns of each data set."""
        rows = self.methods[method]
        return [
            rows[dataset].cell(name) if dataset in rows else Cell()
            for dataset in self.datasets
            for name in self.columns
        ]

    def is_published(self, method: str) -> bool:
        return not any(row.images for row in self.methods[method].values())


def legend(evaluation: Evaluation, best: str, second: str) -> list[str]:
    """What the marks of several methods mean, and where there are none."""
    if not evaluation.has_several():
        return []
    lines = [
        f"{best}: best, {second}: second; ~: the difference to {evaluation.methods[0]} is not beyond chance "
        f"(paired bootstrap over images, Holm's correction, {LEVEL:.0%})"
    ]
    few = {line.dataset: line.images for line in evaluation.differences if line.p is None}
    return lines + [
        f"{name}: no ~, since {files.count(images, 'image')} are too few to test differences (at least {MIN_IMAGES})"
        for name, images in few.items()
    ]


def p_text(p: float | None) -> str:
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001"


def table(evaluation: Evaluation) -> Table:
    """The methods and what is published. Of several methods the best, the second and what may be chance are marked."""
    results, several = evaluation.results(), evaluation.has_several()
    unclear = {line[:3]: f" {UNCLEAR}" for line in evaluation.differences if line.verdict() == UNCLEAR}
    marked = evaluation.columns if several else ()
    datasets, methods = {}, {method: {} for method in evaluation.methods}
    for dataset in evaluation.rows:
        scores = {method: of_rows[dataset] for method, of_rows in results.items() if dataset in of_rows}
        best = {column: ranks([figures[column] for figures in scores.values()], column) for column in marked}
        for method, figures in scores.items():
            marks = {
                column: best[column].get(figures[column], "") + unclear.get((dataset, method, column), "")
                for column in marked
            }
            methods[method][dataset] = Row(dataset, method, figures["images"], figures, marks)
            datasets[dataset] = figures["images"]
        run = None if several else scores[evaluation.methods[0]]
        for row in paper_rows(dataset, published(evaluation.benchmark, dataset), run):
            methods.setdefault(row.method, {})[dataset] = row
    return Table(evaluation.columns, datasets, methods)


def paper_rows(
    dataset: str, published: Mapping[str, Mapping[str, float]], run: Mapping[str, float] | None
) -> list[Row]:
    """All that is published or, for a single run, this network's figures, the difference, and the best peer's."""
    rows = {method: Row(dataset, f"{method}, paper", None, figures) for method, figures in published.items()}
    if run is None:
        return list(rows.values())
    peers = [row for method, row in rows.items() if method != OURS]
    strongest = sorted(peers, key=lambda row: (-row.figures["Smeasure"], row.figures["MAE"]))[:1]
    if OURS not in rows:
        return strongest
    difference = {metric: run[metric] - value for metric, value in published[OURS].items()}
    marks = {
        metric: better_or_worse(metric, value) for metric, value in difference.items()
        if float(f"{value:.{METRICS[metric].digits}f}")
    }  # fmt: skip
    return [rows[OURS], Row(dataset, DIFFERENCE, None, difference, marks), *strongest]


def ranks(figures: Iterable[float], column: str) -> dict[float, str]:
    """The marks of the best and the second of unrounded figures; equal ones share the mark."""
    ordered = sorted(set(figures), reverse=not METRICS[column].lower_is_better)
    return dict(zip(ordered, (BEST, SECOND), strict=False))


def text(table: Table) -> str:
    """A plain table with a line for each row and aligned columns; a data set's name is in its first line only."""
    named = len(table.methods) > 1
    marked = any(BEST in mark for row in table.rows() for mark in row.marks.values())
    lines = [["dataset", *(["method"] if named else []), "images", *table.columns]]
    for dataset, rows in groupby(table.rows(), key=lambda row: row.dataset):
        for i, row in enumerate(rows):
            images = "" if row.images is None else f"{row.images:,}"
            cells = [row.cell(column) for column in table.columns]
            figures = [cell.styled("{}*", "{}+", "~").ljust(len(cell.text) + 2 * marked) for cell in cells]
            lines.append(["" if i else dataset, *([row.method] if named else []), images, *figures])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(f"{cell:{'<' if i < 1 + named else '>'}{widths[i]}}" for i, cell in enumerate(line)) for line in lines
    ]
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def markdown(table: Table, notes: Sequence[str] = ()) -> str:
    """The table with methods down and data sets across, and the notes below it."""
    heading = ["method"] + [
        f"{dataset} ({images:,})<br>{name} {'↓' if METRICS[name].lower_is_better else '↑'}"
        for dataset, images in table.datasets.items() for name in table.columns
    ]  # fmt: skip
    lines = [heading, ["---"] + ["---:"] * (len(heading) - 1)]
    for method in table.methods:
        lines.append([method, *(cell.styled("**{}**", "<u>{}</u>", " ~") for cell in table.cells(method))])
    body = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines]
    return "\n".join(f"| {line} |" for line in body) + "\n" + "".join(f"\n{note}\n" for note in notes)


def latex(table: Table, notes: Sequence[str] = ()) -> str:
    """The same as a tabular to \\input in a document that uses booktabs, with a rule above published methods."""
    width = len(table.columns)
    names = [f"{name.translate(LATEX_SPECIAL)} ({images:,})" for name, images in table.datasets.items()]
    arrows = [
        f"{METRICS[name].latex} $\\{'down' if METRICS[name].lower_is_better else 'up'}arrow$" for name in table.columns
    ]
    rules = [f"\\cmidrule(lr){{{2 + i * width}-{1 + (i + 1) * width}}}" for i in range(len(names))]
    body = [" & ".join(["", *(f"\\multicolumn{{{width}}}{{c}}{{{name}}}" for name in names)]) + " \\\\"]
    body += [" ".join(rules), " & ".join(["method", *arrows * len(names)]) + " \\\\"]
    for _, methods in groupby(table.methods, key=table.is_published):
        body.append("\\midrule")
        for method in methods:
            cells = [
                cell.styled("\\textbf{{{}}}", "\\underline{{{}}}", "\\rlap{$^{\\sim}$}") for cell in table.cells(method)
            ]
            body.append(" & ".join([method.translate(LATEX_SPECIAL), *cells]).replace("& -", "& $-$") + " \\\\")
    columns = "l" + "c" * width * len(names)
    heading = ["% needs \\usepackage{booktabs}", *(f"% {note}" for note in notes), f"\\begin{{tabular}}{{{columns}}}"]
    return "\n".join([*heading, "\\toprule", *body, "\\bottomrule", "\\end{tabular}\n"])


def to_csv(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([heading, *rows])
    return buffer.getvalue().encode()
