"""Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.display import Markdown


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with the column names `heads`; a vertical bar in a cell is escaped.

    Raises ValueError if a row has more or fewer cells than `heads`.
    """
    # pandas writes such tables only with a further package, tabulate.
    lines = []
    for cells in (heads, ["---"] * len(heads), *rows):
        if len(cells) != len(heads):
            raise ValueError(f"a row has {len(cells)} cells, but there are {len(heads)} columns")
        escaped = [str(cell).replace("|", r"\|") for cell in cells]
        lines.append(f"| {' | '.join(escaped)} |")
    return "\n".join(lines)


def show_markdown(text: str) -> Markdown:
    """Markdown as a notebook shows it."""
    from IPython.display import Markdown  # not at the top: a machine may have no IPython

    return Markdown(text)
