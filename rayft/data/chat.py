"""Which tokens of a chat are trained: one render of the whole chat, character spans of its turns, tokens by their offsets.

A part of a chat is never tokenised alone: templates trim, and the first token of a part merges with what stands before it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from rayft.errors import DataError

if TYPE_CHECKING:
    from rayft.models.tokenizer import Tokenizer

Message: TypeAlias = dict[str, Any]
Span: TypeAlias = tuple[int, int]
"""First character, one past the last."""
Render: TypeAlias = Callable[[Sequence[Message], bool], str]
"""render(messages, add_generation_prompt) -> text. Raises one of TEMPLATE_ERRORS when the template refuses the messages."""

FindMark: TypeAlias = Callable[[str], str]
"""find_mark(text) -> the special tokens that the text ends with, white space after them aside; empty when there are none."""

TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError)


@dataclass(frozen=True)
class Conversation:
    """A chat ready for the template.

    Attributes:
        messages: role, content and whatever else the template reads; content is a string where there is one.
        train: for each message, whether its turn counts in the loss.
        everything: the template's own text, between the turns, counts too.
        tools: JSON schemas of the tools, or None.
    """

    messages: Sequence[Message]
    train: tuple[bool, ...]
    everything: bool = False
    tools: list[Any] | None = None

    @property
    def trains(self) -> bool:
        """Whether any character counts in the loss."""
        return self.everything or any(self.train)


def renderer(tokenizer: Tokenizer, tools: list[Any] | None) -> Render:
    """The tokenizer's chat template as a function of the messages."""

    def render(messages: Sequence[Message], add_generation_prompt: bool) -> str:
        return str(tokenizer.apply_chat_template([*messages], tools, tokenize=False, add_generation_prompt=add_generation_prompt))

    return render


def trained_spans(conversation: Conversation, render: Render, find_mark: FindMark, template: str, where: str) -> tuple[str, list[Span]]:
    """Render a conversation and find the characters that count in the loss.

    The span of an assistant turn starts where its generation prompt ends and includes its end-of-turn tokens, but not the
    white space after them: exactly what the model has to write. Other turns start at their content. A turn that ends in
    no special token ends where the template's text for it ends.

    Args:
        conversation: the chat.
        render: its template.
        find_mark: finds the end-of-turn tokens, see `mark_finder`.
        template: name of the template, for messages.
        where: place of the row, for messages.

    Returns:
        The rendered text, and its trained spans, ascending and disjoint.

    Raises:
        DataError: the template refuses the conversation, or a turn cannot be found in it for certain.
    """
    try:
        whole = render(conversation.messages, False)
    except TEMPLATE_ERRORS as problem:
        rule = f"the chat template of {template} refuses the row ({problem})"
        raise DataError(where, None, rule, "Correct the row, or choose another template with model.chat_template") from problem
    spans: list[Span] = []
    for index, train in enumerate(conversation.train):
        if train == conversation.everything:
            continue
        span = turn_span(conversation.messages, index, whole, render, find_mark)
        if span is None:
            turn = f"message {index} ({conversation.messages[index]['role']})"
            rule = f"the chat template of {template} renders {turn} in a way that hides which characters belong to it"
            raise DataError(where, None, rule, "Choose another template with model.chat_template, or leave the turn out of the loss")
        if spans and span[0] <= spans[-1][1]:  # adjacent turns: a token that covers both is trained
            span = (spans.pop()[0], span[1])
        spans.append(span)
    if conversation.everything:
        edges = [0, *(edge for span in spans for edge in span), len(whole)]
        spans = [(edges[i], edges[i + 1]) for i in range(0, len(edges), 2) if edges[i] < edges[i + 1]]
    return whole, spans


def turn_span(messages: Sequence[Message], index: int, whole: str, render: Render, find_mark: FindMark) -> Span | None:
    """Characters of one turn in the rendered conversation, or None when they cannot be told for certain.

    Start and end are known when the conversation cut before and after the turn renders to a prefix of the whole: this is
    what the model sees and has to continue. Where the template renders a turn otherwise once later ones follow (it drops
    earlier reasoning, say), the turn is found by what stays the same around it when its message is replaced.
    """
    message = messages[index]
    start = _prefix_length(messages[:index], True, whole, render) if message["role"] == "assistant" else None
    closed = whole if index == len(messages) - 1 else _render_or_none(messages[: index + 1], False, render)
    if closed is None and message["role"] == "assistant":
        return None  # its end-of-turn tokens are unknown
    mark = find_mark(closed or "")
    end = (len(closed.rstrip()) if mark else len(closed)) if closed and whole.startswith(closed) else None
    if start is None or end is None:
        frame = _frame(messages, index, whole, render)
        if frame is None:
            return None
        start = frame[0] if start is None else start
        if end is None or end < frame[1]:  # a message alone may render to nothing and be shown with the next one
            rest = whole[frame[1] :]
            space = len(rest) - len(rest.lstrip())
            end = frame[1] + (space + len(mark) if mark and rest.startswith(mark, space) else 0)
    return (start, end) if start <= end and _shows(message, whole[start:end].removesuffix(mark)) else None


def mark_finder(special: Collection[str]) -> FindMark:
    """Finds the end-of-turn tokens of a rendered text, among the special tokens of a tokenizer (thousands, for some)."""
    tokens = frozenset(special)
    lengths = sorted({len(token) for token in tokens}, reverse=True)

    def find_mark(text: str) -> str:
        text = text.rstrip()
        start = len(text)
        while length := next((n for n in lengths if n <= start and text[start - n : start] in tokens), 0):
            start -= length
        return text[start:]

    return find_mark


def token_weights(offsets: Sequence[Span], spans: Sequence[Span]) -> NDArray[np.float32]:
    """Loss weight of predicting each token: 1 when all its characters lie in one span, else 0.

    The first token is predicted from nothing and weighs 0. So does a token without characters at the border of a span.

    Args:
        offsets: characters of each token; starts and ends never fall.
        spans: trained characters, ascending and disjoint, adjacent ones merged.

    Returns:
        float32 [len(offsets)].
    """
    weights = np.zeros(len(offsets), np.float32)
    for start, end in spans:
        first = bisect_left(offsets, start, key=itemgetter(0))
        stop = bisect_right(offsets, end, lo=first, key=itemgetter(1))
        while first < stop and offsets[first][1] <= start:
            first += 1
        while first < stop and offsets[stop - 1][0] >= end:
            stop -= 1
        weights[first:stop] = 1
    weights[:1] = 0
    return weights


def _render_or_none(messages: Sequence[Message], add_generation_prompt: bool, render: Render) -> str | None:
    """The rendered messages; None when there are none or the template refuses them."""
    try:
        return render(messages, add_generation_prompt) if messages else None
    except TEMPLATE_ERRORS:
        return None


def _prefix_length(messages: Sequence[Message], add_generation_prompt: bool, whole: str, render: Render) -> int | None:
    """Length of the rendered messages when the whole starts with them, else None."""
    text = _render_or_none(messages, add_generation_prompt, render)
    return len(text) if text is not None and whole.startswith(text) else None


def _frame(messages: Sequence[Message], index: int, whole: str, render: Render) -> Span | None:
    """Characters that change when the message says something else; None when more than the message changes with it."""
    probe = "probe"
    while probe in whole:
        probe += "x"
    other: Message = {key: messages[index][key] for key in ("role", "name", "tool_call_id") if key in messages[index]}
    other["content"] = probe
    changed = _render_or_none([*messages[:index], other, *messages[index + 1 :]], False, render)
    before, found, after = (changed or "").partition(probe)
    if not found or not whole.startswith(before) or not whole.endswith(after):
        return None
    start, end = len(before), len(whole) - len(after)
    text = messages[index].get("content") or ""
    return (start, end) if start <= end and (messages[index].get("tool_calls") or whole[start:end] in text) else None


def _shows(message: Message, text: str) -> bool:
    """Whether the text of a turn can be the message's: the template left out neither its content nor its calls."""
    if (message.get("content") or "").strip() and not text.strip():
        return False
    return all(str(call.get("function", call).get("name")) in text for call in message.get("tool_calls") or ())
