"""Instruction rows: instruction, optional input and output columns, to a conversation of two or three messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayft.config.schema import Data, Dataset
from rayft.data.chat import Conversation, Message
from rayft.data.formats.columns import as_text, column, text_column


def conversation(row: Mapping[str, Any], dataset: Dataset, data: Data, where: str) -> Conversation:
    """The row as a chat, so that the chat template and its masks hold for it too.

    The input follows the instruction after a blank line. An input that is absent, null or blank is left out, and so is a
    system message that is null or blank.

    Raises:
        DataError: a column is missing or is not text.
    """
    question = text_column(row, dataset.instruction, where)
    if dataset.input is not None and row.get(dataset.input) is not None:
        further = text_column(row, dataset.input, where)
        question = f"{question}\n\n{further}" if further.strip() else question
    messages: list[Message] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": text_column(row, dataset.output, where)},
    ]
    if dataset.system is not None and (system := column(row, dataset.system, where)) is not None:
        text = as_text(system, f"column {dataset.system!r}", where)
        messages = [{"role": "system", "content": text}, *messages] if text.strip() else messages
    train = tuple(data.train_on_inputs or message["role"] in data.roles_to_train for message in messages)
    return Conversation(messages, train, data.train_on_inputs)
