"""Curves as text, for a terminal or a log file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MARKS = "*o+x"
"""The mark of each curve, in order; a later curve lies over an earlier one."""

Curve = Sequence[tuple[float, float]]


def text_plot(curves: Mapping[str, Curve], width: int = 72, height: int = 16) -> str:
    """Draw up to four curves over one pair of axes. Points that fall into the same column are averaged.

    Args:
        curves: name -> (x, y) points, finite; at least one point in all.
        width, height: size of the area inside the axes, in characters.

    Returns:
        Lines without a line end after the last.
    """
    xs, ys = zip(*(point for curve in curves.values() for point in curve), strict=True)
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    grid = [[" "] * width for _ in range(height)]
    for mark, curve in zip(MARKS, curves.values(), strict=False):
        for column, y in _column_means(curve, left, right, width):
            grid[height - 1 - _bin(y, low, high, height)][column] = mark
    labels = {0: high, height // 2: high - (high - low) * (height // 2) / max(1, height - 1), height - 1: low}
    lines = [f"{f'{labels[row]:.3g}' if row in labels else '':>8} |{''.join(cells).rstrip()}" for row, cells in enumerate(grid)]
    axis = f"{f'{left:g}':<{width // 2}}{f'{right:g}':>{width - width // 2}}"
    legend = "   ".join(f"{mark} {name}" for mark, name in zip(MARKS, curves, strict=False))
    return "\n".join([*lines, " " * 9 + "+" + "-" * width, " " * 10 + axis, " " * 10 + legend])


def _bin(value: float, low: float, high: float, bins: int) -> int:
    """Which of `bins` equal parts of low..high the value falls into."""
    return 0 if high == low else round((value - low) / (high - low) * (bins - 1))


def _column_means(curve: Curve, left: float, right: float, width: int) -> list[tuple[int, float]]:
    columns: dict[int, list[float]] = {}
    for x, y in curve:
        columns.setdefault(_bin(x, left, right, width), []).append(y)
    return [(column, sum(values) / len(values)) for column, values in columns.items()]
