"""Tables of results: for the terminal, Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

from evaluation import fonts
from evaluation.benchmarks import OURS, published
from evaluation.metrics import METRICS
from evaluation.results import LEVEL, MIN_IMAGES, About, Evaluation, better_or_worse
from unext import files

DIFFERENCE = "difference"  # the row of this run minus the paper
BEST, SECOND, UNCLEAR = "best", "second", "unclear"  # marks of a figure; the last: its difference may be chance
LATEX_SPECIAL = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {character: f"{{{character}}}" for character in "[*"}  # after \\ they would be its arguments
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    | {"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"}
)


class Cell(NamedTuple):
    """A score as text, and its marks, such as "best unclear"."""

    text: str = ""
    marks: str = ""
    deviation: str = ""  # over several trainings

    def styled(self, best: str, second: str, unclear: str, deviation: str = "±{}", missing: str = "") -> str:
        """The text in the pattern of its mark, with what its deviation and `unclear` add."""
        if not self.text:
            return missing
        pattern = best if BEST in self.marks else second if SECOND in self.marks else "{}"
        more = deviation.format(self.deviation) if self.deviation else ""
        return pattern.format(self.text) + more + (unclear if UNCLEAR in self.marks else "")


class Row(NamedTuple):
    """The scores of a method on a data set."""

    dataset: str
    method: str
    images: int | None  # None for published figures
    figures: Mapping[str, float]  # by metric; published rows may lack some
    marks: Mapping[str, str] = {}  # by metric
    deviations: Mapping[str, float] = {}  # by metric, of several trainings

    def cell(self, column: str) -> Cell:
        if column not in self.figures:
            return Cell()
        sign = "+" if self.method == DIFFERENCE else ""
        deviation = printed(self.deviations[column], column) if column in self.deviations else ""
        return Cell(printed(self.figures[column], column, sign), self.marks.get(column, ""), deviation)


class Table(NamedTuple):
    """The scores of all methods on all data sets."""

    columns: Sequence[str]
    datasets: Mapping[str, int]  # name: number of images
    methods: Mapping[str, Mapping[str, Row]]  # by method and data set; published methods are last
    about: Mapping[str, About]  # by method, without published ones

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

    def in_paper(self) -> list[str]:
        """The methods in the order of a paper: of those scored, the compared one is last."""
        first, *scored = [method for method in self.methods if not self.is_published(method)]
        return [*scored, first, *(method for method in self.methods if self.is_published(method))]

    def details(self) -> dict[str, list[str]]:
        """The columns that say more of each method: "venue" and "year", if any method has them."""
        about = [self.about.get(method, About(method)) for method in self.in_paper()]
        columns = {name: [getattr(item, name) for item in about] for name in ("venue", "year")}
        return {name: values for name, values in columns.items() if any(values)}


def printed(value: float, column: str, sign: str = "") -> str:
    return f"{value:{sign}.{METRICS[column].digits}f}"


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
                column: best[column].get(printed(figures[column], column), "")
                + unclear.get((dataset, method, column), "")
                for column in marked
            }
            methods[method][dataset] = Row(dataset, method, figures["images"], figures, marks, figures.get("std", {}))
            datasets[dataset] = figures["images"]
        run = None if several else scores[evaluation.methods[0]]
        for row in paper_rows(dataset, published(evaluation.benchmark, dataset), run):
            methods.setdefault(row.method, {})[dataset] = row
    return Table(evaluation.columns, datasets, methods, evaluation.about)


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


def ranks(figures: Iterable[float], column: str) -> dict[str, str]:
    """The marks of the best and the second, by what is printed; equal ones share the mark."""
    ordered = sorted({printed(figure, column) for figure in figures}, key=float)
    if not METRICS[column].lower_is_better:
        ordered.reverse()
    return dict(zip(ordered, (BEST, SECOND), strict=False))


def text(table: Table) -> str:
    """A plain table with a line for each row and aligned columns; a data set's name is in its first line only."""
    named = len(table.methods) > 1
    marked = any(BEST in mark for row in table.rows() for mark in row.marks.values())
    more = 2 * marked + 6 * any(row.deviations for row in table.rows())  # for marks and "±0.001"
    lines = [["dataset", *(["method"] if named else []), "images", *table.columns]]
    for dataset, rows in groupby(table.rows(), key=lambda row: row.dataset):
        for i, row in enumerate(rows):
            images = "" if row.images is None else f"{row.images:,}"
            cells = [row.cell(column) for column in table.columns]
            figures = [cell.styled("{}*", "{}+", "~") for cell in cells]
            figures = [f"{figure:<{len(cell.text) + more}}" for figure, cell in zip(figures, cells, strict=True)]
            lines.append(["" if i else dataset, *([row.method] if named else []), images, *figures])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(f"{cell:{'<' if i < 1 + named else '>'}{widths[i]}}" for i, cell in enumerate(line)) for line in lines
    ]
    return "\n".join([aligned[0], "-" * len(aligned[0]), *aligned[1:]])


def markdown(table: Table, notes: Sequence[str] = ()) -> str:
    """The table with methods down and data sets across, and the notes below it."""
    details = table.details()
    heading = ["method", *details] + [
        f"{dataset} ({images:,})<br>{name} {'↓' if METRICS[name].lower_is_better else '↑'}"
        for dataset, images in table.datasets.items() for name in table.columns
    ]  # fmt: skip
    lines = [heading, ["---"] * (1 + len(details)) + ["---:"] * (len(heading) - 1 - len(details))]
    for method, *more in zip(table.in_paper(), *details.values(), strict=True):
        cells = (cell.styled("**{}**", "<u>{}</u>", " ~", " ± {}", "–") for cell in table.cells(method))
        lines.append([method, *more, *cells])
    body = [" | ".join(cell.replace("|", "\\|") for cell in line) for line in lines]
    return "\n".join(f"| {line} |" for line in body) + "\n" + "".join(f"\n{note}\n" for note in notes)


def latex(table: Table, notes: Sequence[str] = ()) -> str:
    """The same as a tabular to \\input in a document that uses booktabs, with a rule above published methods."""
    width, details = len(table.columns), table.details()
    names = [f"{latex_text(name)} ({images:,})" for name, images in table.datasets.items()]
    arrows = [
        f"{METRICS[name].latex} $\\{'down' if METRICS[name].lower_is_better else 'up'}arrow$" for name in table.columns
    ]
    start = 1 + len(details)
    rules = [f"\\cmidrule(lr){{{1 + start + i * width}-{start + (1 + i) * width}}}" for i in range(len(names))]
    blank = [""] * start
    body = [" & ".join([*blank, *(f"\\multicolumn{{{width}}}{{c}}{{{name}}}" for name in names)]) + " \\\\"]
    body += [" ".join(rules), " & ".join(["method", *details, *arrows * len(names)]) + " \\\\"]
    more = dict(zip(table.in_paper(), zip(*details.values(), strict=True), strict=True)) if details else {}
    for _, methods in groupby(table.in_paper(), key=table.is_published):
        body.append("\\midrule")
        for method in methods:
            texts = map(latex_text, more.get(method, ()))
            body.append(
                " & ".join([latex_name(table, method), *texts, *map(latex_cell, table.cells(method))]) + " \\\\"
            )
    columns = "l" * start + "c" * width * len(names)
    heading = ["% needs \\usepackage{booktabs}"]
    if others := [name for name in (*table.methods, *table.datasets) if fonts.letters([name], fonts.LATIN)]:
        heading.append(f"% needs XeLaTeX or LuaLaTeX and \\usepackage{{fontspec}}, for {', '.join(others)}")
    heading += [*(f"% {note}" for note in notes), f"\\begin{{tabular}}{{{columns}}}"]
    return "\n".join([*heading, "\\toprule", *body, "\\bottomrule", "\\end{tabular}\n"])


def latex_cell(cell: Cell) -> str:
    if cell.text.startswith("-"):
        cell = cell._replace(text=f"$-${cell.text[1:]}")
    deviation = "{{\\scriptsize$\\,\\pm\\,${}}}"
    marks = "\\textbf{{{}}}", "\\underline{{{}}}", "\\rlap{$^{\\sim}$}"
    return cell.styled(*marks, deviation, missing="--")


def latex_name(table: Table, method: str) -> str:
    """A method with its citation."""
    citation = table.about[method].citation if method in table.about else ""
    cite = f"~{citation if citation[0] == chr(92) else f'{chr(92)}cite{{{citation}}}'}" if citation else ""
    return latex_text(method) + cite


def latex_text(text: str) -> str:
    """A name with LaTeX's special characters escaped; one beyond Latin letters in a font that has them."""
    escaped = text.translate(LATEX_SPECIAL)
    family = fonts.family_for(letters) if (letters := fonts.letters([text], fonts.LATIN)) else None
    return f"{{\\fontspec{{{family}}}{escaped}}}" if family else escaped


def to_csv(heading: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([heading, *rows])
    return buffer.getvalue().encode()
