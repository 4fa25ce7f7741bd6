"""Rows to documents: token ids and the loss weight of predicting each of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rayft.config.schema import Data, Dataset
from rayft.data.chat import TEMPLATE_ERRORS, Conversation, FindMark, Span, mark_finder, renderer, token_weights, trained_spans
from rayft.data.formats import chat, instruction
from rayft.data.formats.columns import column, encodable, text_column
from rayft.errors import DataError
from rayft.models.tokenizer import exact_backend, leading_tokens, special_tokens, template_text

if TYPE_CHECKING:
    from rayft.models.tokenizer import Backend, Tokenizer

log = logging.getLogger("rayft")

EMPTY = "empty"
NOTHING_TO_TRAIN = "nothing to train on"
TOO_LONG = "longer than data.seq_len"
CONVERSATIONS = {"chat": chat.conversation, "instruction": instruction.conversation}
"""Format -> the function that makes a conversation of a row. The format text has none."""


@dataclass(frozen=True, eq=False)
class Document:
    """Tokens that are trained as one sequence.

    Attributes:
        tokens: int32 [n].
        loss_weights: float32 [n], the weight of *predicting* tokens[i]; loss_weights[0] is 0.
    """

    tokens: NDArray[np.int32]
    loss_weights: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Encoded:
    """What a row became: documents, or the reason why policy dropped it."""

    documents: tuple[Document, ...]
    dropped: str | None = None


@dataclass(frozen=True)
class Encoder:
    """Encodes rows for one `data` section and one tokenizer. Made by `make_encoder`, once in a process.

    Attributes:
        data: length policy and trained roles.
        tokenizer: holds the chat template.
        backend: the same tokenizer with exact offsets and without tokens of its own.
        find_mark: finds end-of-turn tokens.
        first: ids put before plain text.
        last: ids put after plain text.
        template: name of the chat template, for messages.
        dated: whether the template prints the date.
    """

    data: Data
    tokenizer: Tokenizer
    backend: Backend
    find_mark: FindMark
    first: tuple[int, ...]
    last: tuple[int, ...]
    template: str
    dated: bool

    def encode(self, row: Mapping[str, Any], dataset: Dataset, where: str) -> Encoded:
        """Encode one row, see `encode_many`."""
        return self.encode_many([row], dataset, [where])[0]

    def encode_many(self, rows: Sequence[Mapping[str, Any]], dataset: Dataset, wheres: Sequence[str]) -> list[Encoded]:
        """Encode rows of one dataset, with one call of the tokenizer.

        Args:
            rows: columns of each row.
            dataset: how to read them.
            wheres: place of each row (file and row), for messages.

        Returns:
            One result a row, in order. A chat or instruction row is one document, or dropped. A text is cut into
            consecutive pieces of at most seq_len tokens; a last piece of one token, which nothing predicts, is left out.

        Raises:
            DataError: a row lacks a column, has a wrong type or an unknown role, is refused by the template, or is too
                long while data.too_long is raise.
        """
        if dataset.format == "text":
            return self._cut([_text(row, dataset, where) for row, where in zip(rows, wheres, strict=True)])
        read = CONVERSATIONS[dataset.format]
        results = [Encoded((), NOTHING_TO_TRAIN)] * len(rows)
        found: list[tuple[int, str, list[Span]]] = []
        for index, (row, where) in enumerate(zip(rows, wheres, strict=True)):
            conversation = read(row, dataset, self.data, where)
            if not conversation.messages:
                results[index] = Encoded((), EMPTY)
            elif conversation.trains:
                found.append((index, *self._locate(conversation, where)))
        encodings = self.backend.encode_batch([text for _, text, _ in found], add_special_tokens=False)
        for (index, _, spans), encoding in zip(found, encodings, strict=True):
            weights = token_weights(encoding.offsets, spans)
            results[index] = self._fit(np.array(encoding.ids, np.int32), weights, wheres[index])
        return results

    def _locate(self, conversation: Conversation, where: str) -> tuple[str, list[Span]]:
        """The rendered conversation and its trained spans."""
        if conversation.tools is not None:
            _warn_of_hidden_tools(self.tokenizer.get_chat_template(tools=conversation.tools), self.template)
        render = renderer(self.tokenizer, conversation.tools)
        try:
            text, spans = trained_spans(conversation, render, self.find_mark, self.template, where)
        except DataError:
            if not self.dated:
                raise
            # Midnight may have passed between two renders.
            text, spans = trained_spans(conversation, render, self.find_mark, self.template, where)
        return encodable(text, where), spans

    def _fit(self, tokens: NDArray[np.int32], weights: NDArray[np.float32], where: str) -> Encoded:
        """The length policy: it counts, and cuts, the token ids of the rendered row."""
        if len(tokens) > self.data.seq_len:
            if self.data.too_long == "raise":
                rule = f"the row has {len(tokens)} tokens, more than data.seq_len = {self.data.seq_len}"
                raise DataError(where, None, rule, "Raise data.seq_len, or set data.too_long to drop or truncate")
            if self.data.too_long == "drop":
                return Encoded((), TOO_LONG)
            tokens, weights = tokens[: self.data.seq_len].copy(), weights[: self.data.seq_len].copy()
        return Encoded((Document(tokens, weights),)) if weights.any() else Encoded((), NOTHING_TO_TRAIN)

    def _cut(self, texts: Sequence[str]) -> list[Encoded]:
        """Plain texts in pieces of seq_len tokens, every token after the first of a piece trained."""
        results = []
        for text, encoding in zip(texts, self.backend.encode_batch_fast(list(texts), add_special_tokens=False), strict=True):
            if not text.strip():
                results.append(Encoded((), EMPTY))
                continue
            ids = np.array([*self.first, *encoding.ids, *self.last], np.int32)
            pieces = [ids[start : start + self.data.seq_len] for start in range(0, len(ids), self.data.seq_len)]
            documents = tuple(Document(piece, _all_but_first(len(piece))) for piece in pieces if len(piece) > 1)
            results.append(Encoded(documents) if documents else Encoded((), NOTHING_TO_TRAIN))
        return results


def make_encoder(data: Data, tokenizer: Tokenizer) -> Encoder:
    """The encoder of a `data` section.

    It warns when the chat template ends turns with another token than the tokenizer's end token, or prints the date.

    Raises:
        DataError: a chat or instruction dataset and no chat template, or a text dataset and no end token.
    """
    formats = {dataset.format for dataset in (*data.train.values(), *data.eval.values())}
    template = template_text(tokenizer)
    if template is None and formats & CONVERSATIONS.keys():
        rule = "the tokenizer has no chat template, which chat and instruction datasets need"
        raise DataError("model.chat_template", None, rule, "Set it to Jinja text, a .jinja file, or chatml")
    if tokenizer.eos_token_id is None and "text" in formats:
        raise DataError("model.eos_token", None, "the tokenizer has no end token to end texts with", "Set it to one of its tokens")
    encoder = Encoder(
        data=data,
        tokenizer=tokenizer,
        backend=exact_backend(tokenizer),
        find_mark=mark_finder(special_tokens(tokenizer)),
        first=leading_tokens(tokenizer),
        last=() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,),
        template=str(tokenizer.name_or_path),
        dated="strftime_now" in (template or ""),
    )
    if formats & CONVERSATIONS.keys():
        _warn_of_template(encoder)
    return encoder


def _warn_of_template(encoder: Encoder) -> None:
    if encoder.dated:
        log.warning("The chat template of %s prints the date: rows show the day on which they are tokenised.", encoder.template)
    try:
        text = renderer(encoder.tokenizer, None)([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], False)
    except TEMPLATE_ERRORS:
        return  # a template for other conversations than this one
    mark, end = encoder.find_mark(text), encoder.tokenizer.eos_token
    if not end or not mark.endswith(end):
        log.warning(
            "The chat template of %s ends assistant turns with %s, but the tokenizer's end token is %r. "
            "Generation stops at the end token only: set model.eos_token if that is not intended.",
            encoder.template, repr(mark) if mark else "no special token", end,
        )  # fmt: skip


@cache
def _warn_of_hidden_tools(chat_template: str, name: str) -> None:
    if "tools" not in chat_template:
        log.warning("Rows have tools, but the chat template of %s does not show them to the model.", name)


def _text(row: Mapping[str, Any], dataset: Dataset, where: str) -> str:
    """The text of a plain-text row; a null is an empty text."""
    if column(row, dataset.text, where) is None:
        return ""
    return encodable(text_column(row, dataset.text, where), where)


def _all_but_first(length: int) -> NDArray[np.float32]:
    weights = np.ones(length, np.float32)
    weights[0] = 0
    return weights
