"""Tables of results: for the terminal, Markdown, LaTeX, CSV and JSON."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from evaluation.benchmarks import OURS
from evaluation.metrics import METRICS
from evaluation.results import LEVEL, Difference, Evaluation

THIS_RUN, DIFFERENCE = "this run", "difference"
BEST, SECOND, UNCLEAR = "best", "second", "unclear"  # marks of a figure; the last: its difference may be chance
LATEX_SPECIAL = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
)


Marked = tuple[str, frozenset[str]]  # a figure and its marks


class Row(NamedTuple):
    """A line of a table."""

    dataset: str
    method: str
    images: int | None  # None for published figures
    figures: Mapping[str, float]  # by metric; a paper does not have all
    marks: Mapping[str, frozenset[str]] = {}  # by metric

    def cell(self, column: str) -> str:
        """The figure, usually to three decimals; empty if there is none."""
        if column not in self.figures:
            return ""
        return f"{self.figures[column]:{'+' if self.method == DIFFERENCE else ''}.{METRICS[column].digits}f}"

    def marked(self, column: str) -> Marked:
        """The figure as `cell` returns it, and its marks."""
        return self.cell(column), self.marks.get(column, frozenset())


def plain(cell: str, marks: frozenset[str]) -> str:
    return cell + ("*" if BEST in marks else "+" if SECOND in marks else " ") + ("~" if UNCLEAR in marks else " ")


def markdown(cell: str, marks: frozenset[str]) -> str:
    cell = f"**{cell}**" if BEST in marks else f"<u>{cell}</u>" if SECOND in marks else cell
    return cell + (" ~" if UNCLEAR in marks else "")


def latex(cell: str, marks: frozenset[str]) -> str:
    cell = f"\\textbf{{{cell}}}" if BEST in marks else f"\\underline{{{cell}}}" if SECOND in marks else cell
    return cell + ("\\rlap{$^{\\sim}$}" if UNCLEAR in marks else "")


def legend(first: str, best: str, second: str) -> str:
    """What the marks mean."""
    return (
        f"{best}: best, {second}: second; ~: the difference to {first} is not beyond chance "
        f"(paired bootstrap over images, Holm's correction, {LEVEL:.0%})"
    )


def rows(
    results: Mapping[str, Mapping[str, float]],
    published: Mapping[str, Mapping[str, Mapping[str, float]]],
    method: str = THIS_RUN,
) -> list[Row]:
    """For each data set this run and, if there are published figures, those, the difference, the strongest peer."""
    lines = []
    for dataset, figures in results.items():
        lines.append(Row(dataset, method, figures["images"], figures))
        methods = published[dataset]
        if OURS in methods:
            difference = {metric: figures[metric] - value for metric, value in methods[OURS].items()}
            lines += [Row(dataset, f"{OURS}, paper", None, methods[OURS]), Row(dataset, DIFFERENCE, None, difference)]
        peers = [name for name in methods if name != OURS]
        strongest = max(peers, key=lambda name: (methods[name]["Smeasure"], -methods[name]["MAE"]), default=None)
        if strongest:
            lines.append(Row(dataset, f"{strongest}, paper", None, methods[strongest]))
    return lines


def lines(scored: Evaluation, compared: Sequence[Difference]) -> list[Row]:
    """The table of one method, or of several."""
    if scored.several():
        return rows_of_methods(scored, compared)
    [(method, results)] = scored.results().items()
    return rows(results, scored.published, method)


def rows_of_methods(scored: Evaluation, compared: Sequence[Difference]) -> list[Row]:
    """For each data set all methods, with the best and the second marked, and the published ones."""
    results = scored.results()
    unclear = {one[:3] for one in compared if not one.is_beyond_chance()}
    lines = []
    for dataset in scored.rows:
        scores = {method: of_rows[dataset] for method, of_rows in results.items() if dataset in of_rows}
        best = {column: ranks([figures[column] for figures in scores.values()], column) for column in scored.columns}
        for method, figures in scores.items():
            marks = {
                column: frozenset(best[column].get(figures[column], ()))
                | ({UNCLEAR} if (dataset, method, column) in unclear else frozenset())
                for column in scored.columns
            }
            lines.append(Row(dataset, method, figures["images"], figures, marks))
        published = scored.published[dataset].items()
        lines += [Row(dataset, f"{method}, paper", None, figures) for method, figures in published]
    return lines


def ranks(figures: Iterable[float], column: str) -> dict[float, tuple[str]]:
    """The best and the second of unrounded figures; equal ones share the mark."""
    ordered = sorted(set(figures), reverse=not METRICS[column].lower_is_better)
    return {figure: (mark,) for figure, mark in zip(ordered, (BEST, SECOND), strict=False)}


def cells(lines: Sequence[Row], columns: Sequence[str]) -> list[list[str]]:
    """The table as text, heading first; the name of a data set is in its first line only."""
    compared = len({row.method for row in lines}) > 1
    marked = any(row.marks for row in lines)
    table = [["dataset", *(["method"] if compared else []), "images", *columns]]
    for i, row in enumerate(lines):
        name = row.dataset if i == 0 or row.dataset != lines[i - 1].dataset else ""
        images = "" if row.images is None else f"{row.images:,}"
        figures = [plain(*row.marked(column)) if marked else row.cell(column) for column in columns]
        table.append([name, *([row.method] if compared else []), images, *figures])
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


class Wide(NamedTuple):
    """A table as papers print it: methods in rows, data sets side by side."""

    datasets: dict[str, int]  # and their numbers of images
    methods: dict[str, list[Marked]]  # and their figures, for each data set all columns
    published: dict[str, list[Marked]]  # likewise


def wide(lines: Sequence[Row], columns: Sequence[str]) -> Wide:
    by_place = {(row.method, row.dataset): row for row in lines}
    datasets = {row.dataset: row.images for row in lines if row.images is not None}
    table = {}
    for method in dict.fromkeys(row.method for row in lines):
        found = [by_place.get((method, dataset), Row(dataset, method, None, {})) for dataset in datasets]
        table[method] = [row.marked(column) for row in found for column in columns]
    scored = {row.method for row in lines if row.images is not None}
    methods, published = ({m: cells for m, cells in table.items() if (m in scored) == own} for own in (True, False))
    return Wide(datasets, methods, published)


def to_markdown(lines: Sequence[Row], columns: Sequence[str], notes: Sequence[str] = (), across: bool = False) -> str:
    """A table of the lines or, if `across`, with the data sets side by side."""
    if across:
        found = wide(lines, columns)
        heading = ["method", *(f"{dataset}<br>{name} {arrow(name)}" for dataset in found.datasets for name in columns)]
        methods = (found.methods | found.published).items()
        table = [heading, *([method, *(markdown(*figure) for figure in figures)] for method, figures in methods)]
        words = 1
    else:
        table = cells(lines, columns)
        words = len(table[0]) - len(columns) - 1
    rule = ["---"] * words + ["---:"] * (len(table[0]) - words)
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in table]
    body = "\n".join(f"| {' | '.join(row)} |" for row in [escaped[0], rule, *escaped[1:]])
    return body + "\n" + "".join(f"\n{note}\n" for note in notes)


def arrow(name: str) -> str:
    return "↓" if METRICS[name].lower_is_better else "↑"


def latex_heading(columns: Sequence[str]) -> list[str]:
    """The metrics with the direction that is better."""
    return [f"{METRICS[name].latex} $\\{'down' if METRICS[name].lower_is_better else 'up'}arrow$" for name in columns]


def to_latex(rows: Sequence[Row], columns: Sequence[str], notes: Sequence[str] = ()) -> str:
    """A tabular to \\input in a document that uses booktabs, with rules between the data sets."""
    table = cells(rows, columns)
    words = len(table[0]) - len(columns) - 1
    heading = [*table[0][: words + 1], *latex_heading(columns)]
    body = []
    for row in table[1:]:
        if row[0] and words > 1 and body:
            body.append("\\midrule")
        escaped = [cell.translate(LATEX_SPECIAL) for cell in row[: words + 1]]
        body.append(" & ".join([*escaped, *(f"${cell}$" if cell else "" for cell in row[words + 1 :])]) + " \\\\")
    lines = [" & ".join(heading) + " \\\\", "\\midrule", *body]
    return tabular("l" * words + "r" * (len(columns) + 1), lines, notes)


def to_latex_across(lines: Sequence[Row], columns: Sequence[str], notes: Sequence[str] = ()) -> str:
    """The same with the methods in rows and the data sets side by side; published methods below a rule."""
    found = wide(lines, columns)
    width = len(columns)
    names = [
        f"\\multicolumn{{{width}}}{{c}}{{{name.translate(LATEX_SPECIAL)} ({images:,})}}"
        for name, images in found.datasets.items()
    ]
    rules = [f"\\cmidrule(lr){{{2 + i * width}-{1 + (i + 1) * width}}}" for i in range(len(names))]
    body = [" & ".join(["", *names]) + " \\\\", " ".join(rules)]
    body += [" & ".join(["method", *latex_heading(columns) * len(names)]) + " \\\\"]
    for part in (found.methods, found.published):
        body += ["\\midrule"] if part else []
        body += [
            " & ".join([method.translate(LATEX_SPECIAL), *(latex(*figure) for figure in figures)]) + " \\\\"
            for method, figures in part.items()
        ]
    return tabular("l" + "c" * width * len(names), body, notes)


def tabular(columns: str, lines: Sequence[str], notes: Sequence[str]) -> str:
    heading = ["% needs \\usepackage{booktabs}", *(f"% {note}" for note in notes)]
    heading += [f"\\begin{{tabular}}{{{columns}}}", "\\toprule"]
    return "\n".join([*heading, *lines, "\\bottomrule", "\\end{tabular}\n"])


def to_json(results: Mapping[str, Mapping[str, object]]) -> bytes:
    """`{data set: {"images": n, metric: value, ...}}`, or by method such a table each; unrounded."""
    return (json.dumps(results, indent=1) + "\n").encode()


def to_csv(heading: Sequence[str], table: Iterable[Sequence[object]]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([heading, *table])
    return buffer.getvalue().encode()
