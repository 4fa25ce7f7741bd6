"""`model.score(batch, need)`: body and head in one FSDP forward, per-token terms out, never logits."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from rayft.errors import ConfigError
from rayft.models.adapt import DropoutKeys, dropout_token_keys
from rayft.models.load import config_of
from rayft.types import Batch, Need, Terms
from rayft_kernels import token_logprobs, weighted_nll_rows


@dataclass(frozen=True)
class HeadOptions:
    """How hidden states become logits, beyond the matrix product.

    Attributes:
        softcap: logits are softcap * tanh(logits / softcap), or None.
        logit_scale: logits are multiplied by it.
    """

    softcap: float | None = None
    logit_scale: float = 1.0


def head_options(config: Any) -> HeadOptions:
    """The family's head, from the configuration's own fields (Gemma 2, 3n, 4: final_logit_softcapping; Cohere; Granite)."""
    scale = getattr(config, "logit_scale", None)
    division = getattr(config, "logits_scaling", None)
    return HeadOptions(
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=float(scale) if scale is not None else 1.0 / float(division) if division is not None else 1.0,
    )


def attach_score(module: Any, make_layout: Callable[[Batch], object], seed: int, *, lean: bool = False) -> None:
    """Give a causal language model the method `score(batch, need) -> Terms`, and the temperature of need="logprobs", at first 1.

    Call before sharding; afterwards `register_fsdp_forward_method(module, "head_terms")` makes FSDP gather the root around it.

    Args:
        module: a transformers causal model, possibly adapted.
        make_layout: turns a batch into what the attention layers read; it passes through the model untouched.
        seed: run.seed, for the adapters' dropout.
        lean: of `weighted_nll_rows`: less memory for a trained head, for a fourth product.

    Raises:
        ConfigError: the head carries an adapter, so its weight is not one matrix.
    """
    if hasattr(module.get_output_embeddings(), "lora_A"):
        raise ConfigError(
            "adapter.targets",
            "the output head",
            "cannot carry an adapter: the loss reads its weight without making logits",
            "Use adapter.modules_to_save=[lm_head]",
        )
    options = head_options(config_of(module))

    def head_terms(self: Any, batch: Batch, need: Need) -> tuple[Tensor, ...]:
        body = self.base_model(
            input_ids=batch.tokens[None],
            position_ids=batch.positions[None],
            attention_mask=None,
            use_cache=False,
            layout=make_layout(batch),
            **batch.multimodal,
        )
        head = _trained_head(self.get_output_embeddings())
        hidden = body.last_hidden_state.squeeze(0).index_select(0, batch.trained)
        targets = batch.targets.index_select(0, batch.trained)
        bias = getattr(head, "bias", None)
        if need == "weighted_nll":
            weights = batch.loss_weights.index_select(0, batch.trained)
            cap, scale = options.softcap, options.logit_scale
            return weighted_nll_rows(hidden, head.weight, targets, weights, bias=bias, softcap=cap, logit_scale=scale, lean=lean)
        scale = options.logit_scale / self.temperature
        return token_logprobs(hidden, head.weight, targets, bias=bias, softcap=options.softcap, logit_scale=scale)

    def score(self: Any, batch: Batch, need: Need) -> Terms:
        keys: DropoutKeys | None = getattr(self, "dropout_keys", None)
        if keys is not None:
            keys.tokens = dropout_token_keys(batch.row_keys, batch.step, seed)
        terms = self.head_terms(batch, need)
        return Terms(nll_sum=terms[0], nll_parts=terms[1]) if need == "weighted_nll" else Terms(logprobs=terms[0], entropy=terms[1])

    module.temperature = 1.0
    module.head_terms = types.MethodType(head_terms, module)
    module.score = types.MethodType(score, module)


def _trained_head(head: nn.Module) -> Any:
    """The head whose weight is in use: peft keeps a trained copy beside the original under modules_to_save."""
    copies = getattr(head, "modules_to_save", None)
    if copies is None:
        return head
    return cast(Any, head).original_module if cast(Any, head).disable_adapters else copies["default"]
