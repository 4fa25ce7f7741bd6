"""What environments say as tokens, to be put after those that are there already. No token is ever made anew.

The chat template renders a short conversation of its own, in which the policy's turn is a word that stands nowhere else; what follows that
word, but for the token that ended the policy's turn, is what the policy reads next. So the template may render earlier turns of a longer
conversation as it likes: the policy goes on from what it has seen and written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rayft.data.chat import TEMPLATE_ERRORS, Message, Render, renderer
from rayft.errors import DataError
from rayft.models.tokenizer import exact_backend, template_text

if TYPE_CHECKING:
    from rayft.models.tokenizer import Tokenizer
    from rayft.rollout.env import Reply

TURN = "rayft-turn-of-the-policy"
ASKED: tuple[Message, ...] = ({"role": "user", "content": "?"}, {"role": "assistant", "content": TURN})


class Dialogue:
    """Turns replies into tokens, and the policy's tokens into text.

    Args:
        tokenizer: of the run.
        environment: its name, for messages.
    """

    def __init__(self, tokenizer: Tokenizer, environment: str | None = None) -> None:
        self._tokenizer, self._backend, self._environment = tokenizer, exact_backend(tokenizer), environment
        self._render: Render | None = renderer(tokenizer, None) if template_text(tokenizer) else None
        self._generation = self._encode(self._added([{"role": "user", "content": TURN}], ())) if self._render else ()

    def without_generation(self, prompt: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A prompt in two: up to its last message, and the template's generation prompt; that is empty for a prompt without one."""
        length = len(self._generation)
        if length and tuple(prompt[-length:]) == self._generation:
            return tuple(prompt[:-length]), self._generation
        return tuple(prompt), ()

    def opening(self, reply: Reply, generation: tuple[int, ...]) -> tuple[int, ...]:
        """What the policy reads between the prompt, without its generation prompt, and its first turn.

        Raises:
            DataError: messages cannot follow the prompt, or it is no reply.
        """
        if isinstance(reply, str):
            return (*generation, *self._encode(reply))
        if not reply:
            return generation
        self._require_messages(reply)
        if generation != self._generation:
            rule = "opened with messages, and the prompt does not end with the chat template's generation prompt"
            raise DataError("environment", None, rule, "Use data of a chat format, or open with a text")
        return self._encode(self._added(ASKED, reply))

    def reply(self, reply: Reply, last: int) -> tuple[int, ...]:
        """What the policy reads after a turn of its own that ended with the token `last`.

        Raises:
            DataError: the chat template refuses the messages, there is none, or it is no reply.
        """
        if isinstance(reply, str):
            return self._encode(reply)
        self._require_messages(reply)
        following = self._rendered([*ASKED, *reply], True).partition(TURN)[2]
        space = len(following) - len(following.lstrip())
        ending = str(self._tokenizer.convert_ids_to_tokens(last))
        return self._encode(following[space + len(ending) :] if following.startswith(ending, space) else following)

    def text(self, tokens: Sequence[int]) -> str:
        """What the policy wrote in a turn, special tokens included but for the one that ended it."""
        ended = tokens[:-1] if tokens and tokens[-1] == self._tokenizer.eos_token_id else tokens
        return str(self._tokenizer.decode(list(ended)))

    def _require_messages(self, reply: object) -> None:
        if not isinstance(reply, Sequence) or not all(isinstance(message, Mapping) for message in reply):
            rule = f"must reply with a text or a list of messages, each a mapping, and gave {reply!r:.200}"
            raise DataError("environment.function", self._environment, rule, "See Reply in rayft/rollout/env.py")

    def _added(self, before: Sequence[Message], reply: Sequence[Message]) -> str:
        """What the template writes for messages after others whose last one has been ended, with the generation prompt."""
        ended = self._rendered(before, False).partition(TURN)[2]
        return self._rendered([*before, *reply], True).partition(TURN)[2].removeprefix(ended)

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        if self._render is None:
            rule = "answers with messages, and the tokenizer has no chat template to render them with"
            raise DataError("environment", None, rule, "Set model.chat_template, or answer with texts")
        try:
            return self._render(messages, add_generation_prompt)
        except TEMPLATE_ERRORS as problem:
            roles = ", ".join(str(message.get("role")) for message in messages)
            rule = f"the chat template refuses messages of the roles {roles} ({problem})"
            remedy = "Answer with other roles, or choose another template with model.chat_template"
            raise DataError("environment", None, rule, remedy) from problem

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)
