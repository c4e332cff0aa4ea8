"""Turns scores into what people read."""

from collections.abc import Iterable, Mapping


def table(rows: Mapping[str, Mapping[str, float]], columns: Iterable[str], first: str = "dataset") -> str:
    """A plain text table: a line for each of `rows`, three decimals; `first` heads the column of names."""
    columns = list(columns)
    width = max(len(first), *(len(name) for name in rows))
    lines = [f"{first:<{width}}" + "".join(f"  {column:>9}" for column in columns)]
    lines.append("-" * len(lines[0]))
    for name, figures in rows.items():
        lines.append(f"{name:<{width}}" + "".join(f"  {figures[column]:>9.3f}" for column in columns))
    return "\n".join(lines)
