"""What pictures show: read back from matplotlib."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from mpqlib.network.bits import BitConfig
from mpqlib.report import claims, plots


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


@pytest.fixture
def differences():
    """Two arms against plain in two groups, five seeds."""
    rows = [
        {"seed": s, "arm": a, "data": d, "top1": 50 + i * (1 + 0.1 * s) - 3 * j * i}
        for s in range(5)
        for i, a in enumerate(("plain", "one", "two"))
        for j, d in enumerate(("x", "y"))
    ]
    return claims.differences(pd.DataFrame(rows), "top1", "plain", "data")


def bars(axis):
    """(low, mean, high, row) of every error bar drawn on `axis`."""
    found = []
    for container in axis.containers:
        line, _, (segments,) = container
        for (x, y), ((low, _), (high, _)) in zip(
            line.get_xydata(), segments.get_segments(), strict=True
        ):
            found.append((low, x, high, y))
    return found


def test_every_difference_is_drawn_with_its_interval(differences):
    axis = plots.differences_plot(differences, "data", "points", colours="compared").axes[0]
    rows = [differences[differences["compared"] == arm] for arm in ("one", "two")]
    expected = pd.concat(rows)[["low", "difference", "high"]].values
    drawn = bars(axis)
    assert [bar[:3] for bar in drawn] == [pytest.approx(tuple(row)) for row in expected]
    assert [round(bar[3]) for bar in drawn] == [0, 1, 0, 1]  # "x" and "y" of either arm
    assert [label.get_text() for label in axis.get_yticklabels()] == ["x", "y"]
    assert axis.get_xlabel() == "points" and axis.get_ylabel() == "data"
    assert axis.yaxis_inverted()  # the first row is on top
    legend = [text.get_text() for text in axis.figure.legends[0].texts]
    assert legend == ["one", "two"]


def test_rows_without_colours_need_no_legend_and_go_where_told(differences):
    figure, axes = plt.subplots(1, 2)
    part = differences[differences["data"] == "x"].sort_values("difference", ascending=False)
    assert plots.differences_plot(part, "compared", "points", axis=axes[1]) is figure
    assert [label.get_text() for label in axes[1].get_yticklabels()] == ["two", "one"]
    assert figure.legends == [] and not axes[0].containers


def test_a_single_seed_is_drawn_without_an_interval():
    rows = pd.DataFrame({"seed": 0, "arm": ["a", "b"], "data": "x", "top1": [1.0, 3.0]})
    axis = plots.differences_plot(
        claims.differences(rows, "top1", "a", "data"), "data", "points"
    ).axes[0]
    assert axis.containers[0][0].get_xdata().tolist() == [2.0]
    axis.figure.canvas.draw()


def test_more_arms_than_colours_are_all_drawn():
    rows = [{"seed": 0, "arm": f"arm {i}", "data": "x", "top1": float(i)} for i in range(12)]
    found = claims.differences(pd.DataFrame(rows), "top1", "arm 0", "data")
    axis = plots.differences_plot(found, "data", "points", colours="compared").axes[0]
    assert len(axis.containers) == 11


def test_a_bit_width_has_its_own_colour_in_policies():
    widths = [2, 3, 4, 5, 6, 8, 16]
    config = BitConfig.of({f"layer {b}": (b, b) for b in widths})
    figure = plots.policies_plot({"one": config}, "budget")
    figure.canvas.draw()
    for axis in figure.axes:
        drawn = [tuple(colour[:3]) for colour in axis.collections[0].get_facecolors()]
        assert drawn == [pytest.approx(plots.COLOURS[b]) for b in widths]
        assert len(set(drawn)) == len(widths) - 1  # 8 and 16 bits share one
