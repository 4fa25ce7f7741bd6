"""Run every benchmark of this folder: rows to kernels.csv, the machine to machine.json, a bar chart for each op, a table for the docs.

    PYTHONPATH=.:kernels python kernels/bench/run.py FOLDER [peers] [--tiny] [NAME...]

With `peers`, other implementations are timed as well where they are installed; NAMEs run those scripts alone. A script `bench_NAME.py`
takes part by a function `rows(peers, tiny) -> Iterator[str]` of lines as `common.row` makes them; it may leave out either argument. `tiny`
asks for shapes that a machine without a GPU runs, which show that the script works; --tiny skips scripts that have none.
"""

from __future__ import annotations

import csv
import importlib
import inspect
import json
import math
import platform
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.checks import failures
from bench.common import DEVICE, HEADER, limits

LIBRARIES = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
Row = dict[str, str]


def scripts(names: list[str]) -> list[str]:
    """Modules of the benchmarks asked for; all where none is named."""
    found = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    return [name for name in found if not names or name.removeprefix("bench_") in names]


def collect(names: list[str], peers: bool, tiny: bool, file: Path) -> list[str]:
    """Write the rows of the scripts to `file` as they come; the names of scripts that failed."""
    with file.open("w", encoding="utf-8") as out:
        print(HEADER, file=out, flush=True)

        def run(name: str) -> None:
            rows: Callable[..., Iterator[str]] = importlib.import_module(f"bench.{name}").rows
            known = inspect.signature(rows).parameters
            if tiny and "tiny" not in known:
                print(f"# {name}: no shapes for --tiny", flush=True)
                return
            options = {"peers": peers, "tiny": tiny}
            for line in rows(**{key: value for key, value in options.items() if key in known}):
                print(line, file=out, flush=True)
                print(line, flush=True)
            if DEVICE == "cuda":
                torch.cuda.empty_cache()

        return failures({name: lambda name=name: run(name) for name in names})


def machine() -> dict[str, object]:
    """What the figures hold for: the card and its own rates, versions, the time."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor() or platform.machine()
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    when = datetime.now(UTC).isoformat(timespec="seconds")
    return {"device": name, "limits": asdict(limits()), "python": platform.python_version(), "versions": versions, "time": when}


def read(file: Path) -> dict[str, list[Row]]:
    """The rows of a CSV file by op."""
    by_op = defaultdict(list)
    with file.open(encoding="utf-8") as lines:
        for line in csv.DictReader(lines):
            by_op[line["op"]].append(line)
    return dict(by_op)


def chart(op: str, rows: list[Row]) -> str:
    """An SVG of horizontal bars, time over limit for each case and implementation; the line at 1 is the card."""
    longest = max(1.0, *(float(row["ratio"]) for row in rows))
    left, wide, step = 330, 420, 16
    bottom = 24 + step * len(rows)
    parts = [f'<text x="4" y="14" font-weight="bold">{escape(op)}: time / limit of the card</text>']
    for number, row in enumerate(rows):
        top, length = 24 + step * number, wide * float(row["ratio"]) / longest
        color = "#2b6cb0" if row["impl"].startswith("rayft") else "#a0aec0"
        parts.append(f'<text x="{left - 6}" y="{top + 11}" text-anchor="end">{escape(row["case"])}  {escape(row["impl"])}</text>')
        parts.append(f'<rect x="{left}" y="{top + 2}" width="{length:.1f}" height="{step - 4}" fill="{color}"/>')
        parts.append(f'<text x="{left + length + 4:.1f}" y="{top + 11}">{row["ratio"]}</text>')
    at = left + wide / longest
    parts.append(f'<line x1="{at:.1f}" y1="22" x2="{at:.1f}" y2="{bottom}" stroke="black"/>')
    size = f'width="{left + wide + 60}" height="{bottom + 8}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">' + "".join(parts) + "</svg>\n"


def table(by_op: dict[str, list[Row]]) -> str:
    """Markdown for docs/benchmarks.md: a line for each op, case and way, a column for each implementation, the fastest one bold.

    The first word of a row's `impl` is who, the rest which way: what is called in the same way stands in the same line.
    """
    whos = list(dict.fromkeys(row["impl"].split()[0] for rows in by_op.values() for row in rows))
    lines = ["| operation | way | limit, ms | " + " | ".join(whos) + " |", "|---" * (3 + len(whos)) + "|"]
    for op, rows in by_op.items():
        cells: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
        for row in rows:
            who, _, way = row["impl"].partition(" ")
            cells[row["case"], way][who] = row
        for (case, way), found in cells.items():
            fastest = min(found, key=lambda who: float(found[who]["ms"]))
            texts = [_cell(found[who], bold=who == fastest and len(found) > 1) if who in found else "" for who in whos]
            limit = float(next(iter(found.values()))["limit_ms"])
            lines.append(f"| {op}, {case} | {way} | {limit:.3g} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row, *, bold: bool) -> str:
    """Time, its multiple of the limit and, where it was measured, memory."""
    time, memory = f"{float(row['ms']):.3g}", float(row["extra_mib"])
    text = f"{f'**{time}**' if bold else time} ({row['ratio']}x)"
    return text if math.isnan(memory) or memory == 0 else f"{text}, {memory:.0f} MiB"


def main(arguments: list[str]) -> int:
    """Exit code 1 if a script failed."""
    folder, *words = arguments
    names = [word for word in words if word not in ("peers", "--tiny")]
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    facts = machine()
    (out / "machine.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts), flush=True)
    failed = collect(scripts(names), "peers" in words, "--tiny" in words, out / "kernels.csv")
    by_op = read(out / "kernels.csv")
    for op, rows in by_op.items():
        (out / f"{op}.svg").write_text(chart(op, rows), encoding="utf-8")
    (out / "table.md").write_text(table(by_op), encoding="utf-8")
    print(table(by_op))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
