"""Two hundred failures of an S3 store over shards, checkpoints and exports: the exact result or a clear stop, and nothing half visible.

Each draws an operation, a kind of failure, the request that it begins with, and whether it passes. After a stop the store must show the old
state or the complete new one, and the same operation must then work.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rayft.actors.export import local_launch
from rayft.actors.session import open_session
from rayft.checkpoint import resume
from rayft.checkpoint.huggingface import export_full, export_step
from rayft.checkpoint.sharded import Checkpointer
from rayft.config.load import load
from rayft.config.schema import Optim
from rayft.data import shards, store
from rayft.data.formats import Document
from rayft.errors import DataError, InfrastructureError
from rayft.models.hub import fetched_folder
from rayft.models.tiny import write_tiny_model
from rayft.optim.build import build_optimizer
from rayft.parallel.mesh import build_mesh
from rayft.train.build import build_model
from rayft.types import Session
from s3_server import KINDS, S3, Fault, reached, serve

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]

FAULTS = 200
RETRY_S, REQUEST_S = 0.8, 0.3
SEQ_LEN = 64


@dataclass(frozen=True)
class Operation:
    """One thing that a run does with a store.

    Attributes:
        write: does it below a URL.
        read: reads it back; a text that is equal when the content is; None when there is nothing that counts.
        expected: what `read` must give.
    """

    write: Callable[[str], None]
    read: Callable[[str], str | None]
    expected: str


def shard_operation() -> Operation:
    numbers = np.random.default_rng(0)
    rows = [[Document(numbers.integers(1, 500, SEQ_LEN).tolist(), [1.0] * SEQ_LEN)] for _ in range(40)]

    def write(url: str) -> None:
        written = tuple(
            shards.write_shard(f"{url}/000000-{n:05d}.parquet", rows[n::2], source_id=0, seq_len=SEQ_LEN, pad_id=0) for n in (0, 1)
        )
        shards.write_unit(url, shards.UnitSummary(0, "d", 40, {}, written))
        summary = shards.read_units(url, [0])[0]
        totals = {"rows": 40, "max_documents": 1}
        shards.write_manifest(url, shards.Manifest(shards.DATA_VERSION, "k", "train", SEQ_LEN, "t", None, {}, totals, {}, summary.shards))

    def read(url: str) -> str | None:
        if not shards.is_complete(url):
            return None
        manifest = shards.read_manifest(url)
        shards.verify(url, manifest.shards)
        return digest(*(shards.read_shard(url, shard, SEQ_LEN).tokens.tobytes() for shard in manifest.shards))

    tokens = [np.array([document.tokens for (document,) in rows[n::2]], np.int32).tobytes() for n in (0, 1)]
    return Operation(write, read, digest(*tokens))


def checkpoint_operation(session: Session) -> Operation:
    module, optimizer = trained(steps=2)

    checkpointer = Checkpointer(session, 1, lambda step: None)

    def write(url: str) -> None:
        checkpointer.session = replace(session, remote=url, report=lambda metrics, directory, finish: finish())
        checkpointer.in_flight = None  # a stopped save ends its process
        checkpointer.save(2, [module], optimizer, {}, {})

    def read(url: str) -> str | None:
        found = resume.newest(url)
        if found is None:
            return None
        other, states = trained(steps=0)
        checkpointer.restore(found.directory, [other], states)
        return content(other, states)

    return Operation(write, read, content(module, optimizer))


def trained(steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Linear(64, 8))
    optimizer = build_optimizer(module.named_parameters(), Optim(lr=0.1), fused=False)
    for _ in range(steps):
        module(torch.ones(4, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def content(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    states = [value for p in module.parameters() for _, value in sorted(optimizer.state[p].items())]
    return digest(*(tensor.detach().numpy().tobytes() for tensor in [*module.parameters(), *states]))


def export_operation(model: Any, cfg: Any, folder: Path) -> Operation:
    def write(url: str) -> None:
        export_full(model, cfg.model, torch.float32, url, 7)

    def read(url: str) -> str | None:
        if export_step(url) is None:
            return None
        return exported(Path(fetched_folder(url, folder)))

    export_full(model, cfg.model, torch.float32, str(folder / "local"), 7)
    return Operation(write, read, exported(folder / "local"))


def exported(folder: Path) -> str:
    """Of tensors, and of the bytes of all other files; torch's writer of a folder lays tensors out in another order."""
    tensors = [item for file in folder.glob("*.safetensors") for item in sorted(load_file(file).items())]
    parts = [name.encode() + tensor.numpy().tobytes() for name, tensor in tensors]
    others = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.suffix != ".safetensors" and file.name != "export.json"]
    return digest(*parts, *(file.read_bytes() for file in others))


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


@contextmanager
def operations(folder: Path) -> Iterator[dict[str, Operation]]:
    write_tiny_model(folder / "model", ["a lion and a bear"], hidden_size=32)
    settings = ["method=sft", "run.name=x", f"model.path={json.dumps(str(folder / 'model'))}", "model.init=random"]
    cfg = load([], [*settings, "data.train.d.path=none", "parallel.device=cpu"])
    with open_session(local_launch(cfg)) as session:
        model = build_model(cfg, session, build_mesh("cpu", 1))
        yield {
            "shards": shard_operation(),
            "checkpoint": checkpoint_operation(session),
            "export": export_operation(model, cfg, folder),
        }


def attempt(action: Callable[[], Any]) -> tuple[str, Any]:
    """("done", result), or ("stopped", sentence); any other error is a failure of the test."""
    try:
        return "done", action()
    except (DataError, InfrastructureError) as error:
        assert str(error).endswith(".") and len(str(error)) > 40, f"not a sentence: {error}"
        return "stopped", str(error)


def one_fault(s3: S3, operation: Operation, url: str, writing: bool, fault: Fault) -> str:
    """Let one operation meet one fault, and hold what comes of it against what must; the outcome."""
    if not writing:
        operation.write(url)
    s3.fault = fault
    outcome, result = attempt(lambda: operation.write(url) if writing else operation.read(url))
    s3.fault = None
    if writing:
        found = operation.read(url)
        assert found == operation.expected or (outcome == "stopped" and found is None), f"{outcome}, and the store shows {found}"
        if outcome == "stopped":
            operation.write(url)
            assert operation.read(url) == operation.expected
    else:
        assert outcome == "stopped" or result == operation.expected, f"read {result}"
        assert operation.read(url) == operation.expected
    return outcome


def test_two_hundred_faults(tmp_path: Path, draw: Random, capsys: pytest.CaptureFixture[str]) -> None:
    counts: Counter[tuple[str, str, str]] = Counter()
    kinds: Counter[tuple[str, str]] = Counter()
    with serve() as s3, reached(s3, retry_s=RETRY_S, request_s=REQUEST_S), operations(tmp_path) as every:
        requests = {}
        for name, operation in every.items():
            for writing in (True, False):
                before = s3.seen.total()
                if writing:
                    operation.write(f"s3://bucket/count/{name}")
                else:
                    assert operation.read(f"s3://bucket/count/{name}") == operation.expected
                requests[name, writing] = s3.seen.total() - before
        number = 0
        while sum(counts.values()) < FAULTS:
            number += 1
            name, writing, kind = draw.choice(list(every)), draw.random() < 0.6, draw.choice(KINDS)
            passes = draw.random() < 0.7
            fault = Fault(kind, skip=draw.randrange(requests[name, writing]), times=draw.choice((1, 2)) if passes else 10**6)
            what = f"fault {number}: {name}, {'write' if writing else 'read'}, {kind} at request {fault.skip}, {fault.times} times"
            try:
                outcome = one_fault(s3, every[name], f"s3://bucket/{number}", writing, fault)
            except BaseException:
                print(what)
                raise
            if fault.hits:  # one that a retry of another request pushed past the end did not happen
                counts[name, "write" if writing else "read", outcome] += 1
                kinds[kind, outcome] += 1
        left = store.sizes("s3://bucket")
    with capsys.disabled():
        print(f"\n{sum(counts.values())} faults in {number} trials; requests of an operation: {requests}")
        for table in (counts, kinds):
            print("\n".join(f"  {' '.join(row):32} {count}" for row, count in sorted(table.items())))
    assert left and {outcome for _, _, outcome in counts} == {"done", "stopped"}
    assert len({name for name, _, _ in counts}) == len(every)
