"""Tables as Markdown."""

from __future__ import annotations


def markdown(header: list[str], rows: list[list[str]], texts: int = 1) -> str:
    """A table whose first columns, so many as `texts`, are text and whose others are numbers."""
    rule = ["---"] * texts + ["---:"] * (len(header) - texts)
    return "".join("| " + " | ".join(cells) + " |\n" for cells in [header, rule, *rows])
