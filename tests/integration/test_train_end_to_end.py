"""The command line from rows to exports that plain transformers and peft load, with a kill on the way, and the same without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from faults.job import LOSS, Job, attempts, draw_numbers, exact, resumed_at, train, values, write_site
from rayft.actors.session import open_session
from rayft.checkpoint.resume import newest
from rayft.checkpoint.sharded import Checkpointer
from rayft.config.load import load
from rayft.data.reader import Reader, micro_batches
from rayft.parallel.mesh import build_mesh
from rayft.train.build import build_model
from rayft.types import Batch, Launch

pytestmark = pytest.mark.timeout(300)

STEPS = 20
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sections: dict[str, dict[str, Any]] = {
        "run": {"seed": 1, "max_steps": STEPS},
        "checkpoint": {"every": 5},
        "eval": {"every": 10, "at_start": True},
        "export": {"dtype": "float32", "merge": True},
        "parallel": {"workers": 2},
    }
    return write_site(tmp_path_factory.mktemp("site"), **sections)


@pytest.fixture(scope="module")
def full(site: Path) -> Path:
    """Directory of a run of two workers that trains every weight."""
    return train(site, "full", "export.merge=false")


@pytest.fixture(scope="module")
def lora_overrides(full: Path) -> list[str]:
    """What makes a LoRA run on that run's export of run.yaml."""
    base = [f"model.path={full / 'export'}", "model.init=pretrained", "adapter.type=lora", "adapter.r=4", "adapter.dropout=0.1"]
    return [*base, "run.max_steps=12", "parallel.workers=1"]


@pytest.fixture(scope="module")
def lora(site: Path, lora_overrides: list[str]) -> Path:
    """Directory of a LoRA run of one worker of Ray Train on the export of the full run."""
    return train(site, "lora", *lora_overrides)


@contextmanager
def restored(run_dir: Path) -> Iterator[Any]:
    """The run's model in this process, with the weights of its newest checkpoint, in evaluation mode."""
    cfg = load([run_dir / "config.yaml"], [])
    launch = Launch(cfg, run_dir, run_dir, None, identity={}, total_steps=STEPS, device_type="cpu", local=True)
    with open_session(launch) as session:
        model = build_model(cfg, session, build_mesh("cpu", 1))
        found = newest(run_dir)
        assert found is not None
        Checkpointer(session, 0, lambda step: None).restore(found.directory, [model], None)
        yield model.eval()


def held_out(site: Path) -> Batch:
    """All rows of the evaluation source in one micro-batch."""
    (shards,) = (site / "runs" / ".shards").glob("eval-*/")
    reader = Reader(shards, seed=0, shuffle=False, window=1)
    (batch,) = micro_batches(reader, 0, rows=reader.num_rows, micro_rows=reader.num_rows, rank=0, world=1)
    return batch


def scored(model: Any, batch: Batch) -> Tensor:
    """log p of the trained targets by rayft, packed."""
    with torch.no_grad():
        logprobs = model.score(batch, "logprobs").logprobs
    assert logprobs is not None
    return logprobs


def log_probabilities(model: Any, batch: Batch) -> Tensor:
    """The same by a plain model, one document at a time."""
    parts = []
    for tokens, targets in zip(batch.tokens.split(batch.document_lengths), batch.targets.split(batch.document_lengths), strict=True):
        with torch.no_grad():
            parts.append(model(tokens[None]).logits[0].float().log_softmax(-1).gather(1, targets[:, None])[:, 0])
    return torch.cat(parts)[batch.trained]


def plain(folder: Path) -> Any:
    """A model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_full_fine_tune_ends_in_an_export_of_the_trained_weights(site: Path, full: Path) -> None:
    assert list(values(full, LOSS)) == list(range(1, STEPS + 1))
    evaluated = values(full, "eval/loss")
    assert list(evaluated) == [0, 10, STEPS]
    assert evaluated[STEPS] < evaluated[10] < evaluated[0]

    batch, model = held_out(site), plain(full / "export")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    ours = log_probabilities(model, batch)
    with restored(full) as trained:
        torch.testing.assert_close(ours, scored(trained, batch), rtol=0, atol=TOLERANCE)
    assert -ours.mean().item() == pytest.approx(evaluated[STEPS], abs=TOLERANCE)


def test_lora_run_ends_in_an_adapter_and_a_merged_model(site: Path, full: Path, lora: Path) -> None:
    from peft import PeftModel

    evaluated = values(lora, "eval/loss")
    assert evaluated[0] == pytest.approx(values(full, "eval/loss")[STEPS], abs=TOLERANCE), "a fresh adapter changes nothing"
    assert evaluated[12] < evaluated[0]

    batch = held_out(site)
    adapted = log_probabilities(PeftModel.from_pretrained(plain(full / "export"), str(lora / "export")).eval(), batch)
    merged = log_probabilities(plain(lora / "export-merged"), batch)
    torch.testing.assert_close(merged, adapted, rtol=0, atol=TOLERANCE)
    assert -merged.mean().item() == pytest.approx(evaluated[12], abs=TOLERANCE)
    with restored(lora) as trained:
        torch.testing.assert_close(adapted, scored(trained, batch), rtol=0, atol=TOLERANCE)


def test_killed_worker_leaves_no_trace_in_the_losses(site: Path, full: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 of a worker at a random step; the run goes on from its newest checkpoint by itself."""
    draw = draw_numbers(capsys)
    step, rank = draw.randint(7, 15), draw.choice([0, 1])
    with Job(site, "killed", "export.merge=false", hooks=["note_process", "slow_steps"]) as job:
        job.wait_for_step(step)
        job.kill(job.worker(rank))
        assert job.end() == 0
        assert len(job.killed) == 1
    assert attempts(job.run_dir) == [2, 2]
    assert resumed_at(job.run_dir)[1] in (5, 10, 15)
    for name in (LOSS, "eval/loss"):
        assert exact(values(job.run_dir, name)) == exact(values(full, name))
    assert (job.run_dir / "export" / "model.safetensors").read_bytes() == (full / "export" / "model.safetensors").read_bytes()


def test_local_run_equals_one_worker_of_ray(site: Path, lora: Path, lora_overrides: list[str]) -> None:
    """Bit by bit, dropout and evaluations too."""
    local = train(site, "lora-local", *lora_overrides, local=True)
    for name in (LOSS, "eval/loss", "train/grad_norm"):
        assert exact(values(local, name)) == exact(values(lora, name))
    name = "export/adapter_model.safetensors"
    assert (local / name).read_bytes() == (lora / name).read_bytes()
