"""Exports that others load: a Hugging Face folder of full weights, or an adapter as plain peft reads it.

Both are written to a temporary folder beside the target and renamed, so a killed export leaves the old one or none.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from rayft.config.schema import Adapter, Model, SftRun
from rayft.models.adapt import adapter_config
from rayft.models.load import hf_name, is_adapter, read_config
from rayft.models.tokenizer import load_tokenizer

FILE_BYTES = 5 << 30
"""Most bytes in one safetensors file of an export."""


def export(module: Any, cfg: SftRun, run_dir: Path) -> None:
    """Write what `cfg.export` asks for below the run's directory: export/, and export-merged/. Every rank calls it."""
    if not cfg.export.at_end:
        return
    if cfg.adapter.type == "none":
        export_full(module, cfg.model, getattr(torch, cfg.export.dtype), run_dir / "export")
        return
    export_adapter(module, cfg.model, cfg.adapter, run_dir / "export")
    if cfg.export.merge:
        export_full(module, cfg.model, getattr(torch, cfg.export.dtype), run_dir / "export-merged")


def export_adapter(module: Any, model: Model, adapter: Adapter, target: Path) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`. Every rank calls it; rank 0 writes.

    Args:
        module: the sharded, adapted model.
        model: its section; its path becomes the adapter's base.
        adapter: its section.
        target: the folder to make.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            full = _full(parameter.detach())
            if dist.get_rank() == 0:
                tensors["base_model.model." + hf_name(name)] = full.cpu().contiguous()
    if dist.get_rank() == 0:
        from safetensors.torch import save_file

        folder = _fresh(target)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        adapter_config(module, adapter, model.path).save_pretrained(str(folder))
        load_tokenizer(model).save_pretrained(folder)
        _publish(folder, target)
    dist.barrier()


def export_full(module: Any, model: Model, dtype: torch.dtype, target: Path) -> None:
    """Write all weights as safetensors with an index, configuration and tokenizer; adapters are added to their base weights.

    Every rank writes its rows; the folder must be on storage that all ranks see. Names are the checkpoint's.

    Args:
        module: the sharded model, adapted or not; it is not changed.
        model: its section.
        dtype: of the exported weights.
        target: the folder to make.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    state = {name: value.to(dtype) for name, value in _merged(module).items()}
    folder = _fresh(target) if dist.get_rank() == 0 else _temporary(target)
    dist.barrier()
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=_files(state), save_distributed=True, enable_consolidation=True)
    dcp.save(cast(Any, state), storage_writer=writer)
    if dist.get_rank() == 0:
        shutil.rmtree(folder / "sharded")
        _mark_format(folder)
        config = read_config(model)
        config.dtype = dtype
        config.architectures = [type(module).__mro__[1].__name__ if type(module).__name__.startswith("FSDP") else type(module).__name__]
        config.save_pretrained(folder)
        if module.generation_config is not None:
            module.generation_config.save_pretrained(folder)
        load_tokenizer(model).save_pretrained(folder)
        _publish(folder, target)
    dist.barrier()


def _merged(module: Any) -> dict[str, Tensor]:
    """Checkpoint name -> weight, with W + scaling B A in float32 where there is an adapter; the model keeps its own."""
    parameters = {
        hf_name(name): p.detach() for name, p in module.named_parameters() if not is_adapter(name) and ".original_module." not in name
    }
    for name, part in module.named_modules():
        if hasattr(part, "lora_A") and "default" in part.lora_A:
            key = f"{hf_name(name + '.')}weight"
            update = part.lora_B["default"].weight.detach().float() @ part.lora_A["default"].weight.detach().float()
            parameters[key] = parameters[key].float() + part.scaling["default"] * update
    return parameters


def _files(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Tensor name -> number of its file, from 1, filling files in order up to FILE_BYTES."""
    numbers: dict[str, int] = {}
    number, filled = 1, 0
    for name, value in state.items():
        size = value.numel() * value.element_size()
        if filled and filled + size > FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name], filled = number, filled + size
    return numbers


def _mark_format(folder: Path) -> None:
    """Give the only file of a small model its usual name and drop the index, which transformers then does not need."""
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
        for index in folder.glob("*.index.json"):
            index.unlink()


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp")


def _fresh(target: Path) -> Path:
    folder = _temporary(target)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _publish(folder: Path, target: Path) -> None:
    """Rename into place; an older export moves aside first and is deleted last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)
