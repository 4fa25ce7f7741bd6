"""Only what is trained travels: an engine merges adapters into the frozen weights of its own model folder.

Merging starts from the files each time, with the trainer's own formula, so the engine's weights are bit for bit those that a push
of all weights would bring, for a hundredth of the bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rayft.errors import DataError
from rayft.weight_sync.source import merge


def merged_weights(
    folder: Path, received: Mapping[str, Tensor], facts: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """The whole model, name by name: frozen weights as in the files, adapted ones merged, others that were trained as received.

    Args:
        folder: of the base model's safetensors files.
        received: Hugging Face name -> tensor, adapters among them.
        facts: `source.adapter_facts` of the trainer.
        dtype: of the engine.
        device: where to merge.

    Raises:
        DataError: the folder lacks a weight that an adapter belongs to.
    """
    from safetensors import safe_open

    base_dtype = getattr(torch, facts["base_dtype"])
    waiting, kept = dict(facts["scaling"]), set(facts["float32"])
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            for name in sorted(tensors.keys()):
                if name in received:
                    yield name, received[name].to(dtype)
                    continue
                weight = tensors.get_tensor(name)
                if name in waiting:
                    stem = name.removesuffix("weight")
                    a, b = received[f"{stem}lora_A.weight"], received[f"{stem}lora_B.weight"]
                    weight = merge(weight.to(base_dtype), a, b, waiting.pop(name))
                kind = torch.float32 if name in kept else dtype
                yield name, weight.to(kind) if weight.dtype.is_floating_point else weight
    if waiting:
        rule = f"holds no weight named {next(iter(waiting))}, which an adapter belongs to"
        raise DataError(str(folder), None, rule, "Start the engines from the folder that the trainer was started from")
