"""What rayft says to bad input: one sentence with what is at fault and the remedy, the class's exit code, and nothing half-written.

Every case starts from the same folder: a tiny model with weights, rows, and a run of 4 steps that was stopped after 2. It spoils
something there and runs one command in this process, without Ray.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayft.actors import placement
from rayft.checkpoint import resume
from rayft.cli import main
from rayft.data import store
from rayft.data.zoo import write_rows, zoo_rows
from rayft.models.tiny import write_tiny_model

CONFIG, DATA, RESOURCES, TRAINING, INFRASTRUCTURE = 2, 3, 4, 5, 6
TRAIN = ("train", "run.yaml", "--local")
FRESH = (*TRAIN, "run.name=fresh")
PACK = ("preprocess", "run.yaml", "--local")
VALIDATE = ("validate", "run.yaml")
EVALUATE = ("evaluate", "run.yaml", "--local", "data.eval.zoo.path=train.jsonl")
EVAL_PROMPTS = "data.eval.zoo.path=train.jsonl"
ONLINE = ("validate", "grpo.yaml")
ONLINE_PLAN = ("plan", "grpo.yaml")
CACHE = ("rollout.engine=vllm", "rollout.kv_cache_gib=100000")
CHAT = [{"role": "user", "content": "Who lives here?"}, {"role": "assistant", "content": "A bear."}]
HOOKS = """
def fails(event, state):
    if event == "step_end":
        raise KeyError("nothing of that name")
"""
UNFINISHED = re.compile(r"\.(tmp|new|part)$|^lease\.json$|\.lock$|^\.lease\.json\.[0-9a-f]{16}$|^export")


@dataclass(frozen=True)
class Place:
    """The folder of a case, which is the current one.

    Attributes:
        folder: holds model, train.jsonl, run.yaml, grpo.yaml and runs/half.
        patch: undone after the case.
        held: closed after the case.
    """

    folder: Path
    patch: pytest.MonkeyPatch
    held: ExitStack

    @property
    def shards(self) -> Path:
        """The packed training rows of the run."""
        (found,) = (self.folder / "runs" / ".shards").glob("train-*/")
        return found

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint of the run."""
        newest = resume.newest(self.folder / "runs" / "half")
        assert newest is not None
        return Path(newest.directory)

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    def rows(self, *rows: object) -> None:
        """Replace the training rows."""
        self.write("train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def change(self, name: str, **fields: Any) -> None:
        """Set keys of a JSON file; None removes one."""
        file = self.folder / name
        merged = json.loads(file.read_text()) | fields
        file.write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))


@dataclass(frozen=True)
class Case:
    """One kind of bad input.

    Attributes:
        name: of the case.
        command: the words of the command line.
        code: its exit code.
        says: what the error must contain: the field or file, the flaw, the remedy.
        prepare: spoils the folder.
    """

    name: str
    command: Sequence[str]
    code: int
    says: Sequence[str]
    prepare: Callable[[Place], object] = lambda place: None


def no_end_token(place: Place) -> None:
    place.change("model/tokenizer_config.json", eos_token=None, pad_token=None)
    (place.folder / "model" / "special_tokens_map.json").unlink(missing_ok=True)


def flip_byte(file: Path, share: float = 0.5) -> None:
    content = bytearray(file.read_bytes())
    content[int(len(content) * share)] ^= 0xFF
    file.write_bytes(content)


def flip_shard(place: Place) -> None:
    flip_byte(next(place.shards.glob("*.parquet")))


def truncate_checkpoint(place: Place) -> None:
    file = max(place.checkpoint.glob("*.distcp"), key=lambda one: one.stat().st_size)
    file.write_bytes(file.read_bytes()[:1000])


def change_weights(place: Place) -> None:
    flip_byte(place.folder / "model" / "model.safetensors", 0.9)


def store_in_8_bits(file: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    save_file({name: t.to(torch.float8_e4m3fn) if name.endswith("q_proj.weight") else t for name, t in tensors.items()}, file)


def hold_run(place: Place) -> None:
    place.held.enter_context(resume.lease(place.folder / "runs" / "half", "somebody else"))


def damage_gzip(place: Place) -> None:
    import gzip

    content = gzip.compress((place.folder / "train.jsonl").read_bytes())
    place.write("rows.jsonl.gz", content[: len(content) // 2])


def refuse_store(place: Place) -> None:
    place.patch.setattr(store, "RETRY_S", 0.5)
    place.patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    place.patch.setenv("AWS_ACCESS_KEY_ID", "tests")
    place.patch.setenv("AWS_SECRET_ACCESS_KEY", "tests")


def make_read_only(place: Place) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (place.folder / "read-only" / "fresh").mkdir(parents=True)
    (place.folder / "read-only" / "fresh").chmod(0o555)


def two_gpus(place: Place) -> None:
    place.patch.setattr(placement, "resources_in_reach", lambda: {"CPU": 8.0, "GPU": 2.0, "memory": 1e12})


def no_vllm(place: Place) -> None:
    found = importlib.util.find_spec
    place.patch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else found(name, *rest))


def old_vllm(place: Place) -> None:
    found = importlib.util.find_spec
    place.patch.setattr(importlib.util, "find_spec", lambda name, *rest: object() if name == "vllm" else found(name, *rest))
    place.patch.setattr(importlib.metadata, "version", lambda name: "0.11.2")


def hide_tracker(place: Place) -> None:
    found = importlib.util.find_spec
    place.patch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else found(name, *rest))


CONFIGURATION = (
    Case("unknown-key", (*VALIDATE, "optim.learning_rate=1"), CONFIG, ("optim.learning_rate", "unknown key", "lr")),
    Case("wrong-type", (*VALIDATE, "batch.rows=many"), CONFIG, ("batch.rows = 'many'", "must be", "config-schema --field batch.rows")),
    Case("out-of-range", (*VALIDATE, "optim.lr=-1"), CONFIG, ("optim.lr = -1", "must be", "config-schema --field optim.lr")),
    Case("two-at-once", (*VALIDATE, "optim.lr=-1", "batch.rows=0"), CONFIG, ("2 settings", "optim.lr = -1", "batch.rows = 0", "Run")),
    Case("bool-for-number", (*VALIDATE, "batch.rows=true"), CONFIG, ("batch.rows = True", "must be", "config-schema")),
    Case("no-config-file", ("validate", "none.yaml"), CONFIG, ("none.yaml", "cannot be read", "Give the path of a YAML file")),
    Case("config-is-folder", ("validate", "model"), CONFIG, ("model", "cannot be read", "Give the path of a YAML file")),
    Case("bad-yaml", VALIDATE, CONFIG, ("run.yaml, line 2", "not valid YAML", "Correct it"), lambda p: p.write("run.yaml", "run:\n [a: b")),
    Case("binary-yaml", VALIDATE, CONFIG, ("run.yaml", "not valid YAML", "Correct it"), lambda p: p.write("run.yaml", b"\xff\xfe\x00")),
    Case("empty-yaml", VALIDATE, CONFIG, ("run.yaml", "nothing", "method: sft"), lambda p: p.write("run.yaml", "")),
    Case(
        "duplicate-key", ("validate", "run.yaml", "more.yaml"), CONFIG, ("more.yaml", "lr", "twice", "Correct it"),
        lambda p: p.write("more.yaml", "optim:\n  lr: 1.0\n  lr: 2.0\n"),
    ),
    Case("unknown-method", (*VALIDATE, "method=dpo"), CONFIG, ("method = 'dpo'", "sft, grpo", "Name a method that exists")),
    Case("unknown-optimizer", (*VALIDATE, "optim.type=lion"), CONFIG, ("optim.type = 'lion'", "adamw", "config-schema --field optim.type")),
    Case("bitsandbytes", (*VALIDATE, "optim.type=paged_adamw_8bit"), CONFIG, ("optim.type", "bitsandbytes", "Use adamw8bit")),
    Case("replicas", (*VALIDATE, "parallel.workers=4", "parallel.replicas=3"), CONFIG, ("parallel.replicas = 3", "Use one of 1, 2, 4")),
    Case("no-source", (*VALIDATE, "data.train=null"), CONFIG, ("data.train", "is null", "must be")),
    Case("tracker-missing", (*FRESH, "trackers.names=[wandb]"), CONFIG, ("trackers.names = 'wandb'", "pip install wandb"), hide_tracker),
    Case("unset-variable", (*FRESH, "env.forward=[NO_SUCH]"), CONFIG, ("env.forward = 'NO_SUCH'", "is not set", "Set it, or take it out")),
    Case("callback-module", (*FRESH, "run.callbacks=[no_such_module:f]"), CONFIG, ("no_such_module:f", "there is no module", "./file.py")),
    Case("callback-file", (*FRESH, "run.callbacks=['./none.py:f']"), CONFIG, ("./none.py:f", "there is no file", "Give its path")),
    Case(
        "callback-import", (*FRESH, "run.callbacks=['./broken.py:f']"), CONFIG, ("./broken.py:f", "ZeroDivisionError", "Make it import"),
        lambda p: p.write("broken.py", "1 / 0\n"),
    ),
    Case(
        "callback-name", (*FRESH, "run.callbacks=['./hooks.py:g']"), CONFIG, ("./hooks.py:g", "Give the name of a function"),
        lambda p: p.write("hooks.py", HOOKS),
    ),
    Case(
        "callback-raises", (*FRESH, "run.callbacks=['./hooks.py:fails']"), TRAINING,
        ("run.callbacks = './hooks.py:fails'", "KeyError at step_end of step 1", "nothing of that name"),
        lambda p: p.write("hooks.py", HOOKS),
    ),
)  # fmt: skip

ROWS = (
    Case("no-data", (*PACK, "data.train.zoo.path=none.jsonl"), DATA, ("data.train.zoo.path", "none.jsonl", "Name an existing file")),
    Case("empty-file", PACK, DATA, ("data.train.zoo.path", "is empty", "Remove the file, or write it again"), lambda p: p.rows()),
    Case("blank-file", PACK, DATA, ("data.train", "none of the 0 rows", "Correct the rows"), lambda p: p.write("train.jsonl", "\n\n")),
    Case("unknown-kind", (*PACK, "data.train.zoo.path=run.yaml"), DATA, ("data.train.zoo.path", "jsonl", "Convert the file")),
    Case(
        "no-such-column", (*PACK, "data.train.zoo.messages=talk"), DATA, ("train.jsonl", "byte 0", "'talk'", "Name the column"),
    ),
    Case(
        "messages-are-text", PACK, DATA, ("train.jsonl", "byte 108", "messages", "Correct the row"),
        lambda p: p.rows({"messages": CHAT}, {"messages": "hello"}),
    ),
    Case(
        "message-is-text", PACK, DATA, ("train.jsonl", "must be an object", "Correct the row"), lambda p: p.rows({"messages": ["hello"]}),
    ),
    Case(
        "unknown-role", PACK, DATA, ("train.jsonl", "wizard", "Map it to one of them"),
        lambda p: p.rows({"messages": [{"role": "wizard", "content": "hello"}]}),
    ),
    Case("all-masked", PACK, DATA, ("data.train", "none of the 1 rows", "roles"), lambda p: p.rows({"messages": CHAT[:1]})),
    Case("too-long", (*PACK, "data.seq_len=8", "data.too_long=raise"), DATA, ("train.jsonl", "byte 0", "Raise data.seq_len")),
    Case(
        "all-too-long", (*PACK, "data.seq_len=8"), DATA, ("data.train", "none of the", "data.seq_len"), lambda p: p.rows({"messages": CHAT})
    ),
    Case(
        "broken-line", PACK, DATA, ("train.jsonl", "line 3", "is not JSON", "Correct the line"),
        lambda p: p.write("train.jsonl", f"{json.dumps({'messages': CHAT})}\n\n{{'messages': 1\n"),
    ),
    Case("line-of-number", PACK, DATA, ("train.jsonl", "line 1", "JSON object", "Correct the line"), lambda p: p.rows(7)),
    Case(
        "not-utf8", PACK, DATA, ("train.jsonl", "byte", "Convert the file to UTF-8"),
        lambda p: p.write("train.jsonl", b'{"messages": "\xe9\xe8"}\n'),
    ),
    Case("damaged-gzip", (*PACK, "data.train.zoo.path=rows.jsonl.gz"), DATA, ("rows.jsonl.gz", "damaged", "Fetch or write"), damage_gzip),
    Case(
        "template-fails", (*PACK, "model.chat_template=\"{{ raise_exception('not this') }}\""), DATA,
        ("train.jsonl", "not this", "model.chat_template"),
    ),
    Case("template-syntax", (*PACK, "model.chat_template='{% if %}'"), DATA, ("train.jsonl", "template", "model.chat_template")),
    Case("template-file", (*PACK, "model.chat_template=none.jinja"), DATA, ("model.chat_template", "none.jinja", "Correct the path")),
    Case(
        "no-template", PACK, DATA, ("model.chat_template", "Set it to Jinja text"),
        lambda p: (p.folder / "model" / "chat_template.jinja").unlink(),
    ),
    Case("no-end-token", PACK, DATA, ("model.pad_token", "neither", "Set model.pad_token or model.eos_token"), no_end_token),
    Case("pad-token", (*PACK, "model.pad_token=<none>"), DATA, ("model.pad_token", "<none>", "Name a token that the tokenizer has")),
    Case(
        "store-refuses", (*PACK, "data.train.zoo.path=s3://bucket/rows.jsonl"), INFRASTRUCTURE,
        ("s3://bucket/rows.jsonl", "Run the same command again"), refuse_store,
    ),
)  # fmt: skip

MODELS = (
    Case("no-model", (*FRESH, "model.path=./none"), CONFIG, ("model.path", "none", "Give the path of a folder")),
    Case(
        "no-weights", FRESH, DATA, ("model.path", "holds no safetensors file", "model.init=random"),
        lambda p: (p.folder / "model" / "model.safetensors").unlink(),
    ),
    Case(
        "broken-model-config", FRESH, DATA, ("model.path", "config.json", "Name a folder"), lambda p: p.write("model/config.json", "{"),
    ),
    Case(
        "other-shape", FRESH, DATA, ("model", "the configuration asks for the shape"),
        lambda p: p.change("model/config.json", intermediate_size=64),
    ),
    Case(
        "cut-weights", FRESH, DATA, ("model.safetensors", "bytes instead of", "Fetch or save the file again"),
        lambda p: p.write("model/model.safetensors", (p.folder / "model" / "model.safetensors").read_bytes()[:-1000]),
    ),
    Case(
        "lfs-pointer", FRESH, DATA, ("model.safetensors", "no safetensors file", "Fetch or save the file again"),
        lambda p: p.write("model/model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
    ),
    Case(
        "other-quantisation", FRESH, CONFIG, ("model", "is quantised by gptq", "Name the folder of the model's dense weights"),
        lambda p: p.change("model/config.json", quantization_config={"quant_method": "gptq", "bits": 4}),
    ),
    Case(
        "codes-without-config", FRESH, DATA, ("q_proj.weight = 'F8_E4M3'", "a type that is not read", "dense weights"),
        lambda p: store_in_8_bits(p.folder / "model" / "model.safetensors"),
    ),
    Case(
        "adapter-targets", (*FRESH, "adapter.type=lora", "adapter.targets=[no_such_proj]"), CONFIG,
        ("adapter.targets = 'no_such_proj'", "matches no module", "q_proj"),
    ),
    Case(
        "unfrozen", (*FRESH, "model.unfrozen=[no_such_weight]"), CONFIG,
        ("model.unfrozen = 'no_such_weight'", "matches none", "must match from the start"),
    ),
    Case(
        "workers", ("plan", "run.yaml", "parallel.workers=500", "parallel.device=cpu"), RESOURCES,
        ("parallel.workers = 500", "the cluster has", "Lower parallel.workers"),
    ),
    Case(
        "memory", ("plan", "run.yaml", "data.seq_len=4000000", "batch.rows=64", "batch.micro_rows=64", "parallel.device=cpu"), RESOURCES,
        ("parallel.workers = 1", "GiB together, there are", "Set batch.micro_rows=1"),
    ),
)  # fmt: skip

RUNS = (
    Case("read-only", (*FRESH, "run.dir=read-only"), RESOURCES, ("read-only", "Make it writable", "run.dir"), make_read_only),
    Case("no-such-place", (*FRESH, "run.dir=/proc/none"), RESOURCES, ("/proc/none", "cannot be made", "run.dir")),
    Case("dir-is-file", (*FRESH, "run.dir=train.jsonl"), RESOURCES, ("train.jsonl", "cannot be made", "run.dir")),
    Case(
        "run-is-file", FRESH, RESOURCES, ("runs/fresh", "cannot be made", "run.dir"), lambda p: p.write("runs/fresh", "a file"),
    ),
    Case("cache-is-file", (*PACK, "data.cache_dir=run.yaml"), RESOURCES, ("run.yaml", "cannot be made", "data.cache_dir")),
    Case("shard-damaged", TRAIN, DATA, (".parquet", ".shards/train-", "Delete"), flip_shard),
    Case(
        "shard-missing", TRAIN, DATA, (".parquet", "the file is missing", "Delete"), lambda p: next(p.shards.glob("*.parquet")).unlink(),
    ),
    Case(
        "manifest-damaged", TRAIN, DATA, ("manifest.json", "cannot be read", "Delete"),
        lambda p: (p.shards / "manifest.json").write_text('{"version": '),
    ),
    Case("checkpoint-damaged", TRAIN, DATA, ("checkpoint", "cannot be read", "Delete that folder"), truncate_checkpoint),
    Case(
        "progress-damaged", TRAIN, DATA, ("progress.json", "cannot be read", "Delete that folder"),
        lambda p: (p.checkpoint / "progress.json").write_text("{"),
    ),
    Case(
        "metrics-damaged", TRAIN, DATA, ("metrics.jsonl = 'nonsense'", "is not a record", "Delete that line"),
        lambda p: p.write("runs/half/metrics.jsonl", "nonsense\n" + (p.folder / "runs/half/metrics.jsonl").read_text()),
    ),
    Case(
        "config-damaged", TRAIN, CONFIG, ("config.yaml", "not valid YAML", "Correct it"),
        lambda p: p.write("runs/half/config.yaml", "[a: b"),
    ),
    Case("data-changed", TRAIN, DATA, ("training rows", "differ", "Restore the files"), lambda p: p.rows(*[{"messages": CHAT}] * 20)),
    Case("weights-changed", TRAIN, DATA, ("base weights", "differ", "Restore the files"), change_weights),
    Case("config-changed", (*TRAIN, "optim.lr=1.0"), CONFIG, ("run.name", "optim.lr", "Restore these values")),
    Case("two-drivers", TRAIN, INFRASTRUCTURE, ("run directory", "in use by somebody else", "Wait for it to end"), hold_run),
    Case("no-such-step", ("export", "run.yaml", "--step", "7"), DATA, ("--step = 7", "steps: 2", "Name one of these steps")),
    Case("no-best", ("export", "run.yaml", "--best"), CONFIG, ("--best", "checkpoint.keep_best=true")),
    Case("export-damaged", ("export", "run.yaml"), DATA, ("checkpoint", "cannot be read", "Delete that folder"), truncate_checkpoint),
    Case("export-nowhere", ("export", "run.yaml", "--out", "/proc/none/export"), RESOURCES, ("/proc/none", "cannot be made", "Make it")),
    Case("export-below-file", ("export", "run.yaml", "--out", "run.yaml/export"), RESOURCES, ("run.yaml", "cannot be made", "Make it")),
    Case("export-on-file", ("export", "run.yaml", "--out", "train.jsonl"), CONFIG, ("--out", "train.jsonl", "replaced", "Name a folder")),
    Case("export-on-model", ("export", "run.yaml", "--out", "model"), CONFIG, ("--out", "here/model", "be replaced", "Name a folder")),
    Case("no-adapter", ("export", "run.yaml", "--merge"), CONFIG, ("--merge", "needs a run with an adapter", "Leave it out")),
    Case("no-run", ("export", "run.yaml", "run.name=none"), DATA, ("run.name", "no such checkpoint", "train first")),
    Case(
        "no-export", ("generate", "run.yaml", "run.name=none", "--prompt", "x"), CONFIG,
        ("run.name = 'none'", "has no export", "Train it to the end"),
    ),
    Case("no-such-recipe", (*FRESH, "--recipe", "none.py"), CONFIG, ("none.py:main", "there is no file", "Give its path")),
    Case("no-such-field", ("config-schema", "--field", "optim.none"), CONFIG, ("--field = 'optim.none'", "unknown key", "lr")),
    Case("no-model-to-check", ("check", "./none"), CONFIG, ("model.path", "none", "Give the path of a folder")),
    Case(
        "no-model-to-ask", ("generate", "run.yaml", "--prompt", "x", "--model", "none"), CONFIG,
        ("model.path = 'none'", "id of the hub", "Give the"),
    ),
    Case("no-model-to-evaluate", (*EVALUATE, "--model", "./none"), CONFIG, ("model.path", "none", "Give the path of a folder")),
    Case("not-a-model", ("generate", "run.yaml", "--prompt", "x", "--model", "runs"), CONFIG, ("runs", "config.json", "Name a")),
    Case(
        "no-weights-to-ask", ("generate", "run.yaml", "--prompt", "x", "--model", "model"), DATA,
        ("model = ", "transformers cannot load it", "Name a folder with config.json and weights"),
        lambda p: (p.folder / "model" / "model.safetensors").unlink(),
    ),
    Case("no-eval", ("evaluate", "run.yaml", "--local"), CONFIG, ("data.eval", "Add one")),
    Case("no-such-start", (*FRESH, "model.path=run:none"), CONFIG, ("model.path = 'run:none'", "was started", "Write run:NAME")),
    Case("push-without-export", ("push", "run.yaml", "run.name=none", "--repo", "a/b"), CONFIG, ("run.name", "has no export", "Train it")),
)  # fmt: skip

GRPO = (
    Case("group-of-one", (*ONLINE, "rollout.group_size=1"), CONFIG, ("rollout.group_size = 1", "Use 2 or more")),
    Case("updates", (*ONLINE, "algorithm.updates=3"), CONFIG, ("algorithm.updates = 3", "does not divide", "Use one of 1, 2, 4")),
    Case("short-context", (*ONLINE, "batch.micro_tokens=20"), CONFIG, ("batch.micro_tokens = 20", "Use 24 or more")),
    Case("no-prompts", (*ONLINE, "data.train=null"), CONFIG, ("data.train", "is null", "must be")),
    Case("no-such-reward", (*ONLINE, "reward.functions.a.function=./none.py:f"), CONFIG, ("./none.py:f", "there is no file", "its path")),
    Case(
        "reward-import", (*ONLINE, "reward.functions.a.function=./broken_reward.py:f"), CONFIG,
        ("./broken_reward.py:f", "ImportError", "Make it import"),
        lambda p: p.write("broken_reward.py", "from math import no_such_thing\n"),
    ),
    Case("no-ready-reward", (*ONLINE, "reward.functions.a.function=none"), CONFIG, ("reward.functions.a.function = 'none'", "Use one of")),
    Case(
        "engines-over-gpus", (*ONLINE_PLAN, "parallel.device=cuda", "rollout.engines=2"), RESOURCES,
        ("rollout.engines = 2", "need 2 GPUs beside 1 of the trainer, the cluster has 2", "colocate"), two_gpus,
    ),
    Case("engines-over-cpus", (*ONLINE_PLAN, "rollout.engines=500"), RESOURCES, ("rollout.engines = 500", "the cluster has", "Use fewer")),
    Case(
        "beyond-positions", (*ONLINE_PLAN, "rollout.max_tokens=1000000"), CONFIG,
        ("rollout.max_tokens = 1000000", "the model ends at", "Allow shorter prompts or answers"),
    ),
    Case(
        "online-memory", (*ONLINE_PLAN, "batch.micro_tokens=90000000"), RESOURCES,
        ("parallel.workers = 1", "too few", "Set batch.micro_tokens=24, with the same result"),
    ),
    Case("cache-memory", (*ONLINE_PLAN, *CACHE), RESOURCES, ("rollout.engines = 1", "too few", "Set rollout.kv_cache_gib=")),
    Case(
        "no-vllm", ("train", "grpo.yaml", "rollout.engine=vllm"), CONFIG,
        ("rollout.engine = 'vllm'", "is not installed here", "pip install"), no_vllm,
    ),
    Case(
        "old-vllm", (*ONLINE, "rollout.engine=vllm"), CONFIG,
        ("rollout.engine = 'vllm'", "is version 0.11.2 here", "0.25 is the oldest that works"), old_vllm,
    ),
    Case("keep-best", (*ONLINE, "checkpoint.keep_best=true"), CONFIG, ("checkpoint.keep_best", "needs evaluations", "Add a source")),
    Case("online-locally", ("train", "grpo.yaml", "--local"), CONFIG, ("--local", "needs Ray", "Leave it out")),
    Case("no-eval-prompts", ("evaluate", "grpo.yaml"), CONFIG, ("data.eval", "names no source", "Add one")),
    Case("nothing-to-evaluate", ("evaluate", "grpo.yaml", EVAL_PROMPTS), DATA, ("run.name", "no such checkpoint", "or train first")),
    Case("online-rows", ("preprocess", "grpo.yaml", "--local"), CONFIG, ("method = 'grpo'", "no packed rows", "Use rayft train")),
)  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder beside `here` to copy from: its run was made in `here`, whose path it remembers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("bad") / "here"
    rows = zoo_rows("train", 40)
    write_tiny_model(
        folder / "model", (message["content"] for row in rows for message in row["messages"]), vocab_size=300, hidden_size=32, layers=1
    )
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "model")).save_pretrained(folder / "model")
    write_rows(folder / "train.jsonl", rows)
    (folder / "rewards.py").write_text("def ones(prompt, completion, row):\n    return 1.0\n")
    run: dict[str, Any] = {
        "method": "sft",
        "run": {"name": "half", "dir": str(folder / "runs"), "max_steps": 4},
        "model": {"path": str(folder / "model")},
        "data": {"train": {"zoo": {"path": str(folder / "train.jsonl")}}, "seq_len": 128},
        "batch": {"rows": 2},
        "parallel": {"device": "cpu"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    online = {
        "method": "grpo",
        "rollout": {"engine": "local", "prompts_per_step": 4, "group_size": 2, "max_prompt_tokens": 16, "max_tokens": 8},
        "reward": {"functions": {"a": {"function": f"{folder}/rewards.py:ones"}}},
        "data": {"train": {"zoo": {"path": str(folder / "train.jsonl")}}},
        "run": run["run"] | {"name": "online"},
    }
    (folder / "grpo.yaml").write_text(yaml.safe_dump(online | {key: run[key] for key in ("model", "parallel")}))
    assert main([str(folder / "run.yaml") if word == "run.yaml" else word for word in (*TRAIN, "run.stop_at=2")]) == 0
    folder.rename(folder.with_name("kept"))
    return folder.with_name("kept")


@pytest.fixture
def place(kept: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A fresh copy, under the path that the run was made at."""
    here = kept.with_name("here")
    shutil.copytree(kept, here)
    monkeypatch.chdir(here)
    try:
        with ExitStack() as held:
            yield Place(here, monkeypatch, held)
    finally:
        shutil.rmtree(here)


@pytest.mark.parametrize("case", (*CONFIGURATION, *ROWS, *MODELS, *RUNS, *GRPO), ids=lambda case: case.name)
def test_bad_input_is_explained_and_leaves_nothing_half_written(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    case.prepare(place)
    before = files(place.folder)
    capfd.readouterr()
    code = main(list(case.command))
    err = capfd.readouterr().err
    errors = re.findall(r"^error \(\w+\): .*(?:\n  .*)*$", err, re.MULTILINE)  # several settings are listed below one another
    assert len(errors) == 1 and err.rstrip().endswith(errors[0]) and "Traceback" not in err, err
    assert code == case.code and all(word in errors[0] for word in case.says) and errors[0].endswith("."), errors[0]
    assert half_written(place.folder, before) == []


def files(folder: Path) -> set[str]:
    """Names of all files below a folder."""
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def half_written(folder: Path, before: set[str]) -> list[str]:
    """What a command left that is no whole: temporary files, shards without manifest, checkpoints without commit mark, exports."""
    after = files(folder)
    found = [
        name
        for name in after - before
        if any(UNFINISHED.search(part) for part in name.split("/")) and not name.endswith("/.lease.json.lock")
    ]
    for kind, mark in (("runs/.shards/*/", "manifest.json"), ("runs/*/checkpoints/*/", resume.COMMITTED)):
        found += [str(one) for one in folder.glob(kind) if one.is_dir() and one.name != "users" and not (one / mark).exists()]
    return sorted({*found, *(f"lost: {name}" for name in before - after)})
