"""What is trained: all weights, or LoRA adapters (arXiv 2106.09685) that peft injects into the model on the meta device.

Dropout on the adapters' input is a function of (seed, step, row, token, feature, module) instead of a random state, so that
a resumed run, another world size or another micro-batch split drops the same values.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rayft.config.schema import Adapter
from rayft.errors import ConfigError
from rayft.models.experts import is_wrapper
from rayft.models.load import is_adapter, seed_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("rayft")

_TOWERS = re.compile(
    r"(^|\.)(vision_tower|vision_model|vision_encoder|embed_vision|multi_modal_projector|visual|audio_tower|audio_model|embed_audio)(\.|$)"
)


def adapt(module: PreTrainedModel, adapter: Adapter, seed: int) -> list[str]:
    """Make exactly the configured parameters trainable.

    Args:
        module: on the meta device, before patching and sharding.
        adapter: the section.
        seed: run.seed, for the dropout.

    Returns:
        Names of the modules and stacks that got an adapter; empty when every weight is trained.

    Raises:
        ConfigError: a target or a module to save matches nothing, or cannot be trained that way.
    """
    if adapter.type == "none":
        module.requires_grad_(True)
        return []
    from peft import inject_adapter_in_model

    targets, stacks = match_targets(module, adapter.targets), match_parameters(module, adapter.target_parameters)
    _check_modules_to_save(module, adapter.modules_to_save)
    inject_adapter_in_model(lora_config(adapter, targets), module)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(is_adapter(name) or ".modules_to_save." in name)
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    if adapter.dropout > 0 and adapter.target_parameters:
        log.warning("adapter.dropout = %s holds for linear layers; adapters on stacks of experts cannot drop and use 0", adapter.dropout)
    if adapter.dropout > 0:
        _replace_dropout(module, adapter.dropout, seed)
    return targets + stacks


@contextmanager
def without_adapters(module: nn.Module) -> Iterator[None]:
    """The model as it was before it was adapted, while the block runs; for forwards without gradient.

    peft's own switch also turns requires_grad off and on again, which sharding must not see.
    """
    adapted: list[Any] = [part for part in module.modules() if hasattr(part, "_disable_adapters")]
    for part in adapted:
        part._disable_adapters = True
    try:
        yield
    finally:
        for part in adapted:
            part._disable_adapters = False


def lora_config(adapter: Adapter, targets: list[str], base: str | None = None) -> Any:
    """The peft configuration of the adapter on the modules `targets` of the model at `base`."""
    from peft import LoraConfig

    return LoraConfig(
        base_model_name_or_path=base,
        r=adapter.r,
        lora_alpha=adapter.alpha,
        lora_dropout=0.0 if adapter.target_parameters else adapter.dropout,  # peft takes none beside parameters; see _replace_dropout
        target_modules=targets,
        target_parameters=list(adapter.target_parameters) or None,
        use_rslora=adapter.rslora,
        modules_to_save=list(adapter.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )


def adapter_config(module: nn.Module, adapter: Adapter, base: str) -> Any:
    """The peft configuration of an adapted model, its targets as name endings where these say the same."""
    adapted = [name for name, part in module.named_modules() if hasattr(part, "lora_A") and not is_wrapper(part)]
    endings = sorted({name.rsplit(".", 1)[-1] for name in adapted})
    same = [name for name, part in module.named_modules() if name.rsplit(".", 1)[-1] in endings and not is_adapter(name + ".")]
    return lora_config(adapter, endings if len(same) == len(adapted) else adapted, base)


def match_targets(module: PreTrainedModel, targets: str | tuple[str, ...]) -> list[str]:
    """Names of the linear modules that `adapter.targets` selects, in model order.

    all-linear means the language model's linear layers, without its head, towers and projectors; a list matches name endings;
    any other string is a regular expression that must match a whole module name.

    Raises:
        ConfigError: nothing, or something that is not a linear layer, is matched.
    """
    head = module.get_output_embeddings()
    names = {name: part for name, part in module.named_modules() if name and part is not head}
    taken = _taken_for_experts(module)
    if targets == "all-linear":
        matched = [name for name, part in names.items() if isinstance(part, nn.Linear) and not _TOWERS.search(name)]
        if kept := [name for name in matched if name.rsplit(".", 1)[-1] in taken]:
            log.warning("adapter.targets = all-linear leaves out %s and the like, which peft would take for experts", kept[0])
        matched = [name for name in matched if name not in kept]
    else:
        wanted = [targets] if isinstance(targets, str) else list(targets)
        select = _full_match(targets) if isinstance(targets, str) else _ends_with
        for target in wanted:
            if not any(select(name, target) for name in names):
                raise ConfigError(
                    "adapter.targets",
                    target,
                    f"matches no module of the model ({_examples(names)})",
                    "Name endings such as q_proj, a full-match regular expression, or all-linear",
                )
        matched = [name for name in names if any(select(name, target) for target in wanted)]
    if hijacked := [name for name in matched if name.rsplit(".", 1)[-1] in taken]:
        rule = "cannot have an adapter, because peft would put it on the experts of this family instead"
        raise ConfigError("adapter.targets", hijacked[0], rule, "Leave it out, or adapt the experts by adapter.target_parameters")
    if wrong := [name for name in matched if not isinstance(names[name], nn.Linear)]:
        raise ConfigError(
            "adapter.targets",
            wrong[0],
            f"is a {type(names[wrong[0]]).__name__}, and adapters go on linear layers",
            "Match only linear layers",
        )
    if not matched:
        raise ConfigError(
            "adapter.targets",
            targets,
            "matches no linear layer of the model",
            "Name endings such as q_proj, or a full-match regular expression",
        )
    return matched


def _taken_for_experts(module: PreTrainedModel) -> set[str]:
    """Endings of linear layers that peft turns into targets of stacked experts, as it converts adapters of transformers 4.

    In families whose experts were linear layers once, it does not tell those from a dense or shared MLP of the same names.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    endings = {name.rsplit(".", 1)[-1] for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    probe = LoraConfig(target_modules=sorted(endings))
    convert_peft_config_for_transformers(probe, module, None)
    return endings - set(probe.target_modules)


def match_parameters(module: PreTrainedModel, endings: tuple[str, ...]) -> list[str]:
    """Names of the stacks of experts that `adapter.target_parameters` selects by name endings, in model order.

    Raises:
        ConfigError: an ending matches nothing, or something that is no stack of a class that states its orientation.
    """
    names = [name for name, _ in module.named_parameters()]
    for ending in endings:
        matched = [name for name in names if _ends_with(name, ending)]
        if not matched:
            stacks = sorted({name.rsplit(".", 2)[-2] + "." + name.rsplit(".", 1)[-1] for name in names if _is_stack(module, name)})
            rule = f"matches no parameter of the model (its stacks of experts end in {', '.join(stacks) or 'nothing: it has none'})"
            raise ConfigError("adapter.target_parameters", ending, rule, "Name endings such as experts.gate_up_proj, or leave it empty")
        if other := [name for name in matched if not _is_stack(module, name)]:
            rule = f"matches {other[0]}, which is no stack of experts whose class states its orientation"
            raise ConfigError(
                "adapter.target_parameters", ending, rule, "Match only stacks of experts; linear layers go to adapter.targets"
            )
    return [name for name in names if any(_ends_with(name, ending) for ending in endings)]


def _is_stack(module: nn.Module, name: str) -> bool:
    return module.get_parameter(name).ndim == 3 and hasattr(module.get_submodule(name.rpartition(".")[0]), "is_transposed")


def _full_match(pattern: str) -> Callable[[str, str], bool]:
    try:
        compiled = re.compile(pattern)
    except re.error as problem:
        raise ConfigError(
            "adapter.targets",
            pattern,
            f"is not a regular expression ({problem})",
            "Escape special characters, or give a list of name endings",
        ) from problem
    return lambda name, _: compiled.fullmatch(name) is not None


def _ends_with(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def _examples(names: dict[str, nn.Module]) -> str:
    endings = sorted({name.rsplit(".", 1)[-1] for name, part in names.items() if isinstance(part, nn.Linear)})
    return "its linear layers end in " + ", ".join(endings)


def _check_modules_to_save(module: PreTrainedModel, wanted: tuple[str, ...]) -> None:
    tied = getattr(module.config.get_text_config(), "tie_word_embeddings", False)
    embeddings = (module.get_input_embeddings(), module.get_output_embeddings())
    for ending in wanted:
        matched = [part for name, part in module.named_modules() if name and _ends_with(name, ending)]
        if not matched:
            raise ConfigError(
                "adapter.modules_to_save", ending, "matches no module of the model", "Name the ending of a module, such as lm_head"
            )
        if tied and any(part is embedding for part in matched for embedding in embeddings):
            raise ConfigError(
                "adapter.modules_to_save",
                ending,
                "is tied to the other embedding in this model, and training a copy of one would untie them silently",
                "Leave it out, or train every weight with adapter.type=none",
            )


class DropoutKeys:
    """The keys of the micro-batch in flight, shared by all dropout layers of one model; `heads` sets it before each forward."""

    def __init__(self) -> None:
        self.tokens: Tensor | None = None


class RowDropout(nn.Module):
    """Dropout whose mask is a hash of (token key, feature, module seed): the same wherever and whenever the token is run.

    The hash is the finaliser of MurmurHash3 on 32 bits, computed in int64 (public domain, A. Appleby).
    """

    def __init__(self, p: float, seed: int, keys: DropoutKeys) -> None:
        super().__init__()
        self.p, self.keys = p, keys
        # A tensor, for torch.compile would make a graph for each layer's int; on the CPU, where reading it waits for nothing.
        self.seed = torch.tensor(seed & 0x7FFFFFFF, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        """x: [1, T, H] -> the same shape; identity in evaluation."""
        if not self.training or self.p == 0:
            return x
        if self.keys.tokens is None or self.keys.tokens.shape[0] != x.shape[-2]:
            raise RuntimeError("dropout needs the keys of the packed batch: run the model through score()")
        features = torch.arange(x.shape[-1], device=x.device, dtype=torch.int64)
        hashed = _mix(self.keys.tokens[:, None] ^ _mix(features * 0x9E3779B1 + self.seed)[None, :])
        keep = hashed >= int(self.p * 2**32)
        return torch.where(keep, x / (1 - self.p), torch.zeros((), dtype=x.dtype, device=x.device)).to(x.dtype)


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser on int64 values; the result is uniform in [0, 2^32)."""
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & mask
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & mask
    return x ^ (x >> 16)


def dropout_token_keys(row_keys: Tensor, step: int, seed: int) -> Tensor:
    """int64 [T]: a 32-bit key of each token, from (seed, step, row id, offset)."""
    base = seed_of(seed, "dropout", step) & 0xFFFFFFFF
    return _mix(_mix(row_keys & 0xFFFFFFFF) ^ _mix((row_keys >> 32) + base))


def _replace_dropout(module: nn.Module, p: float, seed: int) -> None:
    keys = DropoutKeys()
    module.dropout_keys = keys  # type: ignore[assignment]
    for name, part in module.named_modules():
        if hasattr(part, "lora_dropout") and not is_wrapper(part):
            part.lora_dropout = nn.ModuleDict({"default": RowDropout(p, seed_of(seed, "dropout", name), keys)})
