"""A model as a reward: the score of whole chats, by a sequence classifier, or by the first word of a causal model's verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from rayft.config.schema import Model, RewardModel
from rayft.errors import ConfigError, DataError
from rayft.models.hub import model_folder
from rayft.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from rayft.models.tokenizer import Tokenizer

Chat: TypeAlias = Sequence[Mapping[str, Any]]


class ChatScorer:
    """The model with its tokenizer, on one device.

    Args:
        wanted: the model.
        device: to put it on.

    Raises:
        ConfigError: there is no such model, it has no such output, or token is not one token.
        DataError: there is no tokenizer with a chat template.
    """

    def __init__(self, wanted: RewardModel, device: str) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        model = Model(path=wanted.path, revision=wanted.revision, trust_remote_code=wanted.trust_remote_code)
        self._wanted, self._device, self._tokenizer = wanted, device, load_tokenizer(model)
        self._token = _one_token(self._tokenizer, wanted.token) if wanted.token is not None else None
        if self._tokenizer.chat_template is None:
            raise DataError("model.path", wanted.path, "its tokenizer has no chat template", "Add chat_template.jinja to its folder")
        kind = AutoModelForSequenceClassification if wanted.token is None else AutoModelForCausalLM
        dtype = wanted.dtype if wanted.dtype != "auto" else "float32" if device == "cpu" else "bfloat16"
        folder, options = model_folder(model), {"dtype": getattr(torch, dtype), "trust_remote_code": wanted.trust_remote_code}
        try:
            found, report = kind.from_pretrained(folder, output_loading_info=True, **options)
        except (OSError, ValueError, KeyError) as problem:
            reason = str(problem).strip().split("\n")[0]
            raise ConfigError("model.path", wanted.path, f"holds no reward model that can be read ({reason})", "Name another") from problem
        if report["missing_keys"]:
            rule = f"lacks weights of a {kind.__name__.removeprefix('AutoModelFor')} model: {', '.join(sorted(report['missing_keys'])[:3])}"
            raise ConfigError("model.path", wanted.path, rule, "Name a sequence classifier, or set token for a causal model")
        if wanted.token is None and wanted.label >= found.config.num_labels:
            rule = f"is not one of the model's {found.config.num_labels} outputs, which are counted from 0"
            raise ConfigError("model.label", wanted.label, rule, "Use a smaller number")
        self._model = found.to(device).eval()
        self._config = found.config.get_text_config()

    def score(self, chats: Sequence[Chat]) -> list[float]:
        """One number for each chat: a classifier's output at its last token, or the probability of the token as the next one.

        Raises:
            DataError: a chat is longer than max_tokens, or the template refuses it.
        """
        rows = [self._tokens(chat) for chat in chats]
        order = sorted(range(len(rows)), key=lambda number: len(rows[number]))
        scores: dict[int, float] = {}
        for first in range(0, len(order), self._wanted.batch):
            part = order[first : first + self._wanted.batch]
            scores |= zip(part, self._forward([rows[number] for number in part]).tolist(), strict=True)
        return [scores[number] for number in range(len(rows))]

    def _tokens(self, chat: Chat) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=self._token is not None)
        except Exception as problem:  # a template may raise anything
            rule = f"the chat template of the reward model refuses it ({problem})"
            raise DataError("chat", repr(chat)[:200], rule, "Correct the row, or the template") from problem
        tokens = list(self._tokenizer.encode(text, add_special_tokens=False))
        if len(tokens) > self._wanted.max_tokens:
            rule = f"is shorter than a chat of {len(tokens)} tokens"
            raise DataError("model.max_tokens", self._wanted.max_tokens, rule, "Raise it, or allow shorter prompts and answers")
        return tokens

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """float32 [n] of n rows of token ids."""
        lengths = torch.tensor([len(row) for row in rows])
        # A classifier reads its output at the last token that is not this one.
        pad, ends = self._config.pad_token_id, {row[-1] for row in rows}
        if pad is None:
            pad = next(token for token in range(len(ends) + 1) if token not in ends)
        ids = torch.full((len(rows), int(lengths.max())), pad)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        inputs = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
        inputs = {name: value.to(self._device) for name, value in inputs.items()}
        if self._token is None:
            kept, self._config.pad_token_id = self._config.pad_token_id, pad
            logits = self._model(**inputs, use_cache=False).logits
            self._config.pad_token_id = kept
            return logits[:, self._wanted.label].float().cpu()  # type: ignore[no-any-return]
        places, where = (lengths - 1).unique(return_inverse=True)
        logits = self._model(**inputs, use_cache=False, logits_to_keep=places.to(self._device)).logits
        last = logits[torch.arange(len(rows)), where.to(logits.device)]
        return last.float().softmax(-1)[:, self._token].cpu()  # type: ignore[no-any-return]


def _one_token(tokenizer: Tokenizer, text: str) -> int:
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1:
        raise ConfigError(
            "model.token", text, f"must be one token, but encodes to {len(ids)}", "Choose another word, mind its leading space"
        )
    return int(ids[0])
