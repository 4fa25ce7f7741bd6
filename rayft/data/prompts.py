"""Rows to prompts: rendered to tokens once, kept as one Parquet file, and asked for by ordinal, their place in the order of epochs."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayft.config.schema import Data, Dataset
from rayft.data import shards, store, tasks
from rayft.data.chat import TEMPLATE_ERRORS, Conversation, renderer
from rayft.data.formats import chat, instruction
from rayft.data.formats.columns import encodable, text_column
from rayft.data.hub import cache_dir, with_hub_files
from rayft.data.lock import exclusive
from rayft.data.reader import ROW_ORDER
from rayft.data.sources import resolve_files, row_place
from rayft.data.units import plan_units
from rayft.errors import DataError
from rayft.models.tokenizer import exact_backend, fingerprint, leading_tokens, load_tokenizer
from rayft.types import Prompt

if TYPE_CHECKING:
    from rayft.config.schema import GrpoRun
    from rayft.models.tokenizer import Backend, Tokenizer

log = logging.getLogger("rayft")

FILE = "prompts.parquet"
ASKED = "asked"
"""Column that the row of a chat or instruction has beside its own: the messages that the policy is asked with."""
SCHEMA = pa.schema([("tokens", pa.list_(pa.int32())), ("row", pa.string())])
AS_CHAT = Data.model_construct(train={}, roles_to_train=("assistant",), train_on_inputs=False)
"""What the readers of chats ask of a data section; nothing of it shows in a prompt."""


Tools = list[dict[str, Any]]
"""JSON schemas of functions that the policy may call."""


def prepare_prompts(cfg: GrpoRun, split: Literal["train", "eval"], tools: Tools | None = None) -> str:
    """The folder of a split's rendered prompts, by path or URL; written when it is not there yet.

    Args:
        cfg: the run.
        split: of the data.
        tools: of the run's environment, which prompts show whose rows have no tools of their own.

    Raises:
        DataError: files are missing or malformed, a prompt is too long while data.too_long is raise, or none can be used.
    """
    tokenizer = load_tokenizer(cfg.model)
    cfg = with_hub_files(cfg, split)
    folder = store.join(cache_dir(cfg), f"prompts-{split}-{_key(cfg, split, fingerprint(tokenizer), tools)[:16]}")
    file = store.join(folder, FILE)
    store.make_folder(cache_dir(cfg))
    with exclusive(f"{folder}.lock", cfg.run.deadline_s):
        if not store.exists(file):
            _write(cfg, split, tokenizer, file, tools)
    return folder


class PromptSet:
    """The prompts of a split, in memory.

    Args:
        folder: of `prepare_prompts`.
        seed: of the order.
        shuffle: permute them, anew in each epoch.
    """

    def __init__(self, folder: str, *, seed: int, shuffle: bool) -> None:
        with store.open_read(store.join(folder, FILE)) as stream:
            table = pq.read_table(stream)
        self._tokens, self._rows = table["tokens"], table["row"]
        self._seed, self._shuffle = seed, shuffle
        self._order: tuple[int, np.ndarray[Any, Any]] | None = None

    def __len__(self) -> int:
        return len(self._tokens)

    def prompt(self, ordinal: int) -> Prompt:
        """The prompt at a place in the order; places go on over epochs without end."""
        epoch, place = divmod(ordinal, len(self))
        row_id = int(self._permutation(epoch)[place]) if self._shuffle else place
        return Prompt(f"{epoch}-{row_id}", row_id, tuple(self._tokens[row_id].as_py()), json.loads(self._rows[row_id].as_py()))

    def _permutation(self, epoch: int) -> np.ndarray[Any, Any]:
        if self._order is None or self._order[0] != epoch:
            seeds = np.random.SeedSequence((self._seed, ROW_ORDER, epoch))
            self._order = epoch, np.random.Generator(np.random.PCG64(seeds)).permutation(len(self))
        return self._order[1]


def prompt_tokens(row: Mapping[str, Any], dataset: Dataset, tokenizer: Tokenizer, where: str, tools: Tools | None = None) -> list[int]:
    """The ids that a policy is asked with: a chat or instruction with the template's generation prompt, or a text as it is.

    Raises:
        DataError: the row lacks a column, has a wrong type, or the template refuses it.
    """
    backend = _backend(tokenizer)
    if dataset.format == "text":
        text = encodable(text_column(row, dataset.text, where), where)
        return [*leading_tokens(tokenizer), *backend.encode(text, add_special_tokens=False).ids]
    conversation = _conversation(row, dataset, where)
    try:
        text = renderer(tokenizer, conversation.tools or tools)(conversation.messages, True)
    except TEMPLATE_ERRORS as problem:
        rule = f"the chat template refuses the row ({problem})"
        raise DataError(where, None, rule, "Correct the row, or choose another template with model.chat_template") from problem
    return list(backend.encode(encodable(text, where), add_special_tokens=False).ids)


@functools.lru_cache(maxsize=1)
def _backend(tokenizer: Tokenizer) -> Backend:
    """Made once for all rows: it is read from the text of the whole tokenizer."""
    return exact_backend(tokenizer)


def _conversation(row: Mapping[str, Any], dataset: Dataset, where: str) -> Conversation:
    """The chat up to where the assistant is to speak."""
    if dataset.format == "instruction":
        found = instruction.conversation(
            {
                dataset.output: "",
                **row,
            },
            dataset,
            AS_CHAT,
            where,
        )
    else:
        found = chat.conversation(row, dataset, AS_CHAT, where)
    messages = list(found.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise DataError(where, None, "has nothing but assistant turns", "Give it a user's message")
    return Conversation(messages, (False,) * len(messages), tools=found.tools)


def _key(cfg: GrpoRun, split: str, tokenizer: str, tools: Tools | None) -> str:
    """Hex sha256 over everything that changes the rendered prompts."""
    datasets: dict[str, Dataset] = getattr(cfg.data, split)
    parts = {
        "version": shards.DATA_VERSION,
        "datasets": [
            [name, one.model_dump(mode="json", exclude={"path"}), _identities(name, one, split)] for name, one in datasets.items()
        ],
        "columns": [ASKED],
        "longest": [cfg.rollout.max_prompt_tokens, cfg.data.too_long],
        "tokenizer": tokenizer,
    }
    return hashlib.sha256(json.dumps(parts | ({"tools": tools} if tools else {}), sort_keys=True).encode()).hexdigest()


def _identities(name: str, dataset: Dataset, split: str) -> list[Any]:
    """What tells the rows of a source from others."""
    if dataset.path.startswith(tasks.SCHEME):
        return [dataset.path, tasks.version()]
    return [shards.identity(file) for file in resolve_files(name, dataset, split)]


def _write(cfg: GrpoRun, split: str, tokenizer: Tokenizer, file: str, tools: Tools | None) -> None:
    found: dict[str, list[Any]] = {"tokens": [], "row": []}
    dropped = 0
    for where, row, tokens in _rendered(cfg, split, tokenizer, tools):
        if len(tokens) > cfg.rollout.max_prompt_tokens:
            if cfg.data.too_long == "raise":
                rule = f"the prompt has {len(tokens)} tokens, rollout.max_prompt_tokens = {cfg.rollout.max_prompt_tokens}"
                raise DataError(where, None, rule, "Raise that, or set data.too_long to drop")
            dropped += 1
            continue
        found["tokens"].append(tokens)
        found["row"].append(json.dumps(row, default=str))
    if not found["tokens"]:
        rule = f"none of its rows gives a prompt; {dropped} are longer than rollout.max_prompt_tokens = {cfg.rollout.max_prompt_tokens}"
        raise DataError(f"data.{split}", None, rule, "Raise that, or correct the sources")
    store.make_folder(file.rpartition("/")[0])
    with store.committed_file(file) as temporary:
        pq.write_table(pa.table(found, SCHEMA), Path(temporary))
    log.info("%s: %d prompts, %d longer than rollout.max_prompt_tokens left out; in %s", split, len(found["tokens"]), dropped, file)


def _rendered(cfg: GrpoRun, split: str, tokenizer: Tokenizer, tools: Tools | None) -> Iterator[tuple[str, Mapping[str, Any], list[int]]]:
    """(place, row, tokens) of every row, in the order of the sources."""
    datasets: dict[str, Dataset] = getattr(cfg.data, split)
    for where, row, dataset in _rows(split, datasets):
        asked = {} if dataset.format == "text" else {ASKED: _conversation(row, dataset, where).messages}
        yield where, {**row, **asked}, prompt_tokens(row, dataset, tokenizer, where, tools)


def _rows(split: str, datasets: dict[str, Dataset]) -> Iterator[tuple[str, Mapping[str, Any], Dataset]]:
    """(place, row, source) of every row, in the order of the sources."""
    for name, dataset in datasets.items():
        if dataset.path.startswith(tasks.SCHEME):
            for number, row in islice(tasks.rows(f"data.{split}.{name}.path", dataset.path), dataset.limit):
                yield f"{dataset.path} row {number}", row, dataset
            continue
        for unit in plan_units(split, {name: dataset}, unit_mb=1e6):
            for place, row in unit.rows():
                yield row_place(unit.file, place), row, dataset
