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
    with pytest.raises(ValueError, match="columns"):
        markdown_table(("a", "b"), [["x"]])


def test_numbers_stay_as_they_are_written():
    lines = markdown_table(("a",), [["1.50"], ["3"], ["1e-3"], ["-0"]]).splitlines()
    assert lines[2:] == ["| 1.50 |", "| 3 |", "| 1e-3 |", "| -0 |"]


def test_other_lines_do_not_change_with_the_length_of_a_cell():
    short, long = (markdown_table(("a", "b"), [["x", "y"], [c, ""]]) for c in ("1", "1" * 40))
    assert short.splitlines()[:-1] == long.splitlines()[:-1]


def test_a_table_without_rows_has_its_head():
    assert markdown_table(("a", "b"), []).splitlines()[0] == "| a | b |"


def test_a_notebook_shows_markdown():
    assert show_markdown("**bold**").data == "**bold**"
