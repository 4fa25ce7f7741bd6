"""Next-token logits of several growing token lists at once, by plain transformers with a key-value cache.

For the in-process rollout engine and its tests. Lists may join and leave at every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def load_for_decoding(folder: Path, dtype: torch.dtype, *, random_weights: bool, trust_remote_code: bool = False) -> Any:
    """The causal model of a Hugging Face folder in evaluation mode, on the CPU.

    Args:
        folder: its configuration and weights.
        dtype: of its weights.
        random_weights: read the configuration only.
        trust_remote_code: run model code that comes with the weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa", "trust_remote_code": trust_remote_code}
    if random_weights:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code), **options)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.requires_grad_(False).eval()


class Decoder:
    """A model with the cache of the lists that it saw last.

    Cached keys lie right-aligned: a shorter list has unused columns on its left, which its mask hides. A list is first run alone
    or with others of its length, so no query is ever padding.

    Args:
        model: a transformers causal model with full attention.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: list[str] = []
        self._lengths: list[int] = []
        self._layers: list[tuple[Tensor, Tensor]] = []

    def forget(self) -> None:
        """Drop the cache, because the weights changed; the next step computes every list anew."""
        self._names, self._lengths, self._layers = [], [], []

    @torch.no_grad()
    def logits(self, lists: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Name -> float32 [V], the logits of the token that follows each list.

        Args:
            lists: token ids by name. A name seen in the last step must have grown by one token; other names are new, and names
                that are missing have left.
        """
        self._keep([name for name in self._names if name in lists])
        found = self._step([lists[name][-1] for name in self._names]) if self._names else {}
        fresh: dict[int, list[str]] = {}
        for name, tokens in lists.items():
            if name not in found:
                fresh.setdefault(len(tokens), []).append(name)
        for names in fresh.values():
            found |= self._start(names, [lists[name] for name in names])
        return found

    def _keep(self, names: list[str]) -> None:
        if names == self._names:
            return
        rows = torch.tensor([self._names.index(name) for name in names], dtype=torch.long)
        self._names, self._lengths = names, [self._lengths[row] for row in rows]
        longest = max(self._lengths, default=0)
        self._layers = [(k[rows, :, k.shape[2] - longest :], v[rows, :, v.shape[2] - longest :]) for k, v in self._layers] if names else []

    def _step(self, tokens: list[int]) -> dict[str, Tensor]:
        positions = torch.tensor(self._lengths)
        width = self._layers[0][0].shape[2]
        mask = torch.arange(width + 1) >= (width - positions)[:, None]
        found, self._layers = self._run(torch.tensor(tokens)[:, None], positions[:, None], mask.long())
        self._lengths = [length + 1 for length in self._lengths]
        return dict(zip(self._names, found, strict=True))

    def _start(self, names: list[str], lists: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        tokens = torch.tensor([list(each) for each in lists])
        layers, self._layers = self._layers, []
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        found, fresh = self._run(tokens, positions, torch.ones_like(tokens))
        self._layers = [tuple(map(_stack, old, new)) for old, new in zip(layers, fresh, strict=True)] if layers else fresh  # type: ignore[misc]
        self._names, self._lengths = self._names + names, self._lengths + [tokens.shape[1]] * len(names)
        return dict(zip(names, found, strict=True))

    def _run(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (keys, values) in enumerate(self._layers):
            cache.update(keys, values, index)
        answer = self._model(
            input_ids=tokens, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return answer.logits[:, -1].float(), [(layer.keys, layer.values) for layer in cache.layers]


def _stack(old: Tensor, new: Tensor) -> Tensor:
    """Caches [B, heads, T, d] of two sets of lists as one, the shorter padded on its left."""
    width = max(old.shape[2], new.shape[2])
    return torch.cat([nn.functional.pad(each, (0, 0, width - each.shape[2], 0)) for each in (old, new)])
