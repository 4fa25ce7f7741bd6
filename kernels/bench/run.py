"""Run every benchmark of this folder on one GPU: rows to a CSV file, and a bar chart of time over limit for each op.

    PYTHONPATH=.:kernels python kernels/bench/run.py FOLDER [peers]

With `peers`, other implementations are timed as well where they are installed. A script `bench_NAME.py` takes part by a function
`rows(peers) -> Iterator[str]` of lines as `common.row` makes them.
"""

from __future__ import annotations

import csv
import importlib
import sys
from collections import defaultdict
from pathlib import Path

import torch

from bench.checks import failures
from bench.common import HEADER, installed, limits


def collect(names: list[str], peers: bool, file: Path) -> list[str]:
    """Write the rows of the scripts to `file` as they come; the names of scripts that failed."""
    with file.open("w", encoding="utf-8") as out:
        print(HEADER, file=out, flush=True)

        def run(name: str) -> None:
            for line in importlib.import_module(f"bench.{name}").rows(peers):
                print(line, file=out, flush=True)
                print(line, flush=True)
            torch.cuda.empty_cache()

        return failures({name: lambda name=name: run(name) for name in names})


def plot(file: Path) -> None:
    """One PNG beside `file` for each op: bars of time over limit, grouped by case; the line at 1 is the card."""
    if not (pyplot := installed("matplotlib.pyplot")):
        return
    pyplot.switch_backend("Agg")
    by_op = defaultdict(list)
    with file.open(encoding="utf-8") as rows:
        for line in csv.DictReader(rows):
            by_op[line["op"]].append((f"{line['case']}  {line['impl']}", float(line["ratio"])))
    for op, bars in by_op.items():
        figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.26 * len(bars)), layout="constrained")
        axes.barh([label for label, _ in reversed(bars)], [ratio for _, ratio in reversed(bars)])
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_xlabel("time / limit of the card")
        axes.set_title(op)
        figure.savefig(file.with_name(f"{op}.png"), dpi=120)
        pyplot.close(figure)


def main() -> int:
    """Exit code 1 if a script failed."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    print(torch.__version__, torch.cuda.get_device_name(), limits(), flush=True)
    failed = collect(names, "peers" in sys.argv[2:], folder / "kernels.csv")
    plot(folder / "kernels.csv")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
