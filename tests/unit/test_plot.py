"""Text plots, on curves small enough to check by eye."""

from __future__ import annotations

from rayft.observe.plot import text_plot


def test_a_plot_character_by_character() -> None:
    plot = text_plot({"loss": [(0, 4.0), (10, 2.0), (20, 0.0)], "eval": [(20, 4.0)]}, width=5, height=5)
    assert plot.splitlines() == [
        "       4 |*   o",
        "         |",
        "       2 |  *",
        "         |",
        "       0 |    *",
        "         +-----",
        "          0  20",
        "          * loss   o eval",
    ]


def test_points_of_one_column_are_averaged() -> None:
    lines = text_plot({"a": [(0, 0.0), (1, 4.0), (99, 2.0), (100, 2.0), (50, 4.0)]}, width=3, height=3).splitlines()
    assert [line[10:] for line in lines[:3]] == [" *", "* *", ""]


def test_flat_and_single_point_curves_are_drawn() -> None:
    assert text_plot({"a": [(7, 3.0)]}, width=4, height=2).splitlines()[1] == "       3 |*"
