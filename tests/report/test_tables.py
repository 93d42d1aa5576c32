"""Markdown tables, read back."""

import re

import pytest

from mpqlib.report.tables import markdown_table, show_markdown


def test_cells_come_back_in_their_places():
    heads, rows = ("layer", "|w|"), [["conv1", "1 | 2"], ["fc", ""]]
    lines = markdown_table(heads, rows).splitlines()
    cells = [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in lines]
    read = [[cell.replace(r"\|", "|") for cell in line] for line in cells]
    assert read == [list(heads), ["---", "---"], *rows]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="a row has 1 cells, but there are 2 columns"):
        markdown_table(("a", "b"), [["x"]])


def test_a_notebook_shows_markdown():
    assert show_markdown("**bold**").data == "**bold**"
