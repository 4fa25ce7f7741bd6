"""Texts of the model in training, the likeliest continuation of each prompt, made by all ranks in step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayft.config.schema import SftRun
from rayft.data.reader import Row, collate
from rayft.models.tokenizer import has_chats, load_tokenizer, question
from rayft.parallel import fsdp
from rayft.types import Batch


def encode(cfg: SftRun, tokenizer: Any) -> list[list[int]]:
    """The prompts of eval.samples as tokens: a user's turn where chats are trained and there is a template, else plain text."""
    turns = [[{"role": "user", "content": prompt}] for prompt in cfg.eval.samples.prompts]
    return [question(tokenizer, turn, chat=has_chats(cfg.data.train)) for turn in turns]


def continue_greedily(model: Any, prompts: Sequence[Sequence[int]], max_tokens: int, end: int, device: str) -> list[list[int]]:
    """The likeliest next tokens of each prompt, up to `max_tokens` or the end token, which is left out.

    Without a cache: each token takes a forward of all prompts at their full length, so this is for a few short samples. Every rank
    computes the same; FSDP gathers the layers as in training.

    Args:
        model: has `score`.
        prompts: token ids, none empty.
        max_tokens: most tokens of an answer.
        end: id of the end token.
        device: of the session.
    """
    model.eval()
    lengths = [len(prompt) + max_tokens for prompt in prompts]
    starts = np.cumsum([0, *lengths[:-1]])
    tokens = np.concatenate([[*prompt, *[end] * max_tokens] for prompt in prompts]).astype(np.int32)
    row = Row(0, tokens, np.zeros(len(tokens), np.float32), np.array(lengths, np.int32), np.zeros(len(lengths), np.int32), len(tokens))
    batch = collate([row], [0], capacity=len(lengths), step=0).to(device)
    ends = torch.tensor([start + len(prompt) - 1 for start, prompt in zip(starts, prompts, strict=True)], device=device)
    going, answers = [True] * len(prompts), [list[int]() for _ in prompts]
    for _ in range(max_tokens):
        following = _likeliest(model, batch, ends)
        for index, token in enumerate(following.tolist()):
            going[index] = going[index] and token != end
            if going[index]:
                answers[index].append(token)
        if not any(going):
            break
        ends = ends + 1
        batch.tokens[ends] = following
    fsdp.reshard_root(model)
    model.train()
    return answers


def _likeliest(model: Any, batch: Batch, ends: Tensor) -> Tensor:
    """The likeliest token after each position of `ends`. Softcaps and scales of the head change no order of logits."""
    hidden: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: hidden.append(output.last_hidden_state))
    with torch.no_grad():
        model.score(batch, "weighted_nll")  # nothing is trained in the batch: only the body is computed
        hook.remove()
        head = model.get_output_embeddings()
        head = getattr(head, "modules_to_save", {"default": head})["default"]
        # The root's parameters stay gathered after its forward, the head's among them.
        logits = hidden[0].squeeze(0).index_select(0, ends) @ head.weight.t().to(hidden[0].dtype)
        if getattr(head, "bias", None) is not None:
            logits = logits + head.bias
    following: Tensor = logits.argmax(-1)
    return following


class Sampler:
    """Makes the samples of one run.

    Args:
        cfg: the run; eval.samples has prompts.
        device: of the session.
    """

    def __init__(self, cfg: SftRun, device: str) -> None:
        self.section, self.device = cfg.eval.samples, device
        self.tokenizer: Any = load_tokenizer(cfg.model)
        self.prompts = encode(cfg, self.tokenizer)

    def texts(self, model: Any) -> list[str]:
        """The model's answer to each prompt; every rank calls it."""
        end = self.tokenizer.eos_token_id
        answers = continue_greedily(model, self.prompts, self.section.max_tokens, end, self.device)
        return [str(self.tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
