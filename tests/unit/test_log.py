"""metrics.jsonl after kills and restarts, and what the driver shows of it."""

from __future__ import annotations

import io
import json
import math
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rayft.errors import ConfigError, DataError
from rayft.observe.log import MetricsLog, read, starts
from rayft.observe.progress import follow, summary


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def losses(path: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["train/loss"]) for record in read(path) if "train/loss" in record]


def test_opening_cuts_back_to_the_restored_step_and_keeps_its_evaluation(path: Path) -> None:
    with MetricsLog(path, 0) as log:
        log.start(1, 2)
        for step in range(1, 8):
            log.write(step, {"train/loss": 10.0 - step})
            if step in (4, 6):
                log.write(step, {"eval/loss": float(step)})
    with path.open("ab") as file:
        file.write(b'{"step": 8, "train/lo')
    with MetricsLog(path, 4) as log:
        assert log.reached == {"train/loss": 7, "eval/loss": 6}
        log.start(2, 1)
        log.write(5, {"train/loss": 0.5})
    assert losses(path) == [(1, 9.0), (2, 8.0), (3, 7.0), (4, 6.0), (5, 0.5)]
    assert [(record["step"], record["eval/loss"]) for record in read(path) if "eval/loss" in record] == [(4, 4.0)]
    assert [(event["attempt"], event["step"], event["workers"]) for event in starts(path)] == [(1, 0, 2), (2, 4, 1)]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_start_after_the_restored_step_is_history_and_stays(path: Path) -> None:
    with MetricsLog(path, 6) as log:
        log.start(1, 1)
    MetricsLog(path, 2).close()
    assert [event["step"] for event in starts(path)] == [6]
    assert read(path) == []


def test_a_dying_writer_cannot_add_to_the_next_one_s_file(path: Path) -> None:
    dying = MetricsLog(path, 0)
    dying.write(1, {"train/loss": 1.0})
    with MetricsLog(path, 0) as log:
        dying.write(2, {"train/loss": 2.0})
        log.write(1, {"train/loss": 3.0})
    dying.close()
    assert losses(path) == [(1, 3.0)]


@given(st.lists(st.floats(), min_size=1, max_size=20))
def test_values_come_back_bit_for_bit_from_valid_json(values: list[float]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "metrics.jsonl"
        with MetricsLog(path, 0) as log:
            for step, value in enumerate(values):
                log.write(step, {"train/loss": value})

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        for line in path.read_text().splitlines():
            json.loads(line, parse_constant=refuse)
        back = [value for _, value in losses(path)]
    assert all(math.isnan(a) if math.isnan(b) else a.hex() == b.hex() for a, b in zip(back, values, strict=True))


def test_a_record_is_on_disk_when_write_returns(path: Path) -> None:
    with MetricsLog(path, 0) as log:
        log.write(1, {"train/loss": 1.0})
        assert losses(path) == [(1, 1.0)]


def test_unknown_names_and_broken_lines_are_refused(path: Path) -> None:
    with MetricsLog(path, 0) as log:
        with pytest.raises(ConfigError):
            log.write(1, {"train/loss": 1.0, "loss": 1.0})
        log.write(1, {"train/loss": 1.0})
    assert losses(path) == [(1, 1.0)]
    for broken in (b"nonsense\n", b"7\n", b'{"train/loss": 1.0}\n'):
        path.write_bytes(b'{"step": 1}\n' + broken)
        with pytest.raises(DataError, match="line 2"):
            read(path)


def test_a_missing_log_is_empty(path: Path) -> None:
    assert read(path) == [] == starts(path)


def plain() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=60)


def output(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_a_line_shows_what_the_record_has() -> None:
    record = {
        "step": 12, "train/loss": 1.23456, "train/grad_norm": 0.98, "train/lr": 1e-5, "perf/tokens_per_s": 1234.4, "perf/mfu": 0.4561,
        "perf/peak_memory_gib": 3.21, "perf/data_wait_s": 0.001, "perf/step_s": 2.0,
    }  # fmt: skip
    expected = "step 12/100 | loss 1.2346 | grad norm 0.98 | lr 1.0e-05 | 1,234 tok/s | 45.6% mfu | 3.2 GiB | data wait 0.00 s"
    assert summary(record, 100) == expected
    assert summary({"step": 3, "train/loss": 2.0}, 9) == "step 3/9 | loss 2.0000"


def test_progress_shows_first_last_and_every_evaluation_but_not_every_step(path: Path) -> None:
    console = plain()
    with follow(path, 50, console=console, interval_s=60, poll_s=0.01), MetricsLog(path, 0) as log:
        log.start(1, 2)
        for step in range(1, 51):
            log.write(step, {"train/loss": 1.0, "train/lr": 1e-5})
            if step == 20:
                log.write(step, {"eval/loss": 2.0, "eval/perplexity": 7.389})
    lines = output(console)
    assert lines[0] == "start from step 0 | attempt 1 | workers 2"
    assert lines[1].startswith("step 1/50 | loss 1.0000")
    evaluation = lines.index("step 20/50 | eval loss 2.0000 | perplexity 7.39")
    assert lines[evaluation - 1].startswith("step 20/50 | loss")
    assert lines[-1].startswith("step 50/50 | loss")
    assert len(lines) == 5


def test_progress_shows_a_record_once_across_restarts_and_nothing_of_earlier_runs(path: Path) -> None:
    with MetricsLog(path, 0) as log:
        log.write(1, {"train/loss": 1.0})
    console = plain()
    with follow(path, 9, console=console, interval_s=0, poll_s=0.01):
        for attempt, resumed in enumerate((1, 3, 2), start=1):
            with MetricsLog(path, resumed) as log:
                log.start(attempt, 1)
                for step in range(resumed + 1, 5):
                    log.write(step, {"train/loss": attempt + step / 10})
                    time.sleep(0.03)
    assert [line.split(" | ")[:2] for line in output(console)] == [
        ["start from step 1", "attempt 1"], ["step 2/9", "loss 1.2000"], ["step 3/9", "loss 1.3000"], ["step 4/9", "loss 1.4000"],
        ["start from step 3", "attempt 2"], ["step 4/9", "loss 2.4000"],
        ["start from step 2", "attempt 3"], ["step 3/9", "loss 3.3000"], ["step 4/9", "loss 3.4000"],
    ]  # fmt: skip


def test_progress_waits_for_the_end_of_a_line_and_follows_a_cut_file(path: Path) -> None:
    path.parent.mkdir()
    console = plain()
    with follow(path, 9, console=console, interval_s=0, poll_s=0.01):
        path.write_bytes(b'{"step": 1, "train/loss": 1.0}\n{"step": 2, "tra')
        time.sleep(0.05)
        with path.open("ab") as file:
            file.write(b'in/loss": 2.0}\n')
        time.sleep(0.05)
        path.write_bytes(b'{"step": 3, "train/loss": 3.0}\n')
    assert output(console) == [f"step {n}/9 | loss {n}.0000" for n in (1, 2, 3)]


def test_progress_ends_its_thread_and_shows_the_last_step_when_the_job_fails(path: Path) -> None:
    console = plain()
    with (
        pytest.raises(RuntimeError, match="job"),
        follow(path, 9, console=console, interval_s=60, poll_s=60),
        MetricsLog(path, 0) as log,
    ):
        log.write(1, {"train/loss": 1.0})
        log.write(2, {"train/loss": 2.0})
        raise RuntimeError("job")
    assert output(console) == ["step 1/9 | loss 1.0000", "step 2/9 | loss 2.0000"]
    assert not any(thread.name == "rayft-progress" for thread in threading.enumerate())


def test_a_terminal_gets_a_progress_line(path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with follow(path, 9, console=console, poll_s=0.01), MetricsLog(path, 0) as log:
        log.start(1, 1)
        for step in (1, 9):
            log.write(step, {"train/loss": 1.0})
    text = "\n".join(output(console))
    assert "start from step 0" in text
    assert "step 9/9 | loss 1.0000" in text
