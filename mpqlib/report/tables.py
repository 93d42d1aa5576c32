"""Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from IPython.display import Markdown


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with the column names `heads`; a vertical bar in a cell is escaped.

    Raises ValueError if a row has another number of cells than `heads`. Source: pandas.
    """
    cells = [[cell.replace("|", r"\|") for cell in line] for line in (heads, *rows)]
    frame = pd.DataFrame(cells[1:], columns=cells[0])
    # No alignment: with it, every line would change with the length of a measured number.
    style = dict(index=False, tablefmt="github", disable_numparse=True, stralign=None)
    head, rule, *body = frame.to_markdown(**style).splitlines()
    return "\n".join([head, re.sub("-+", "---", rule), *body])


def show_markdown(text: str) -> Markdown:
    """Markdown as a notebook shows it."""
    from IPython.display import Markdown  # not at the top: a machine may have no IPython

    return Markdown(text)
