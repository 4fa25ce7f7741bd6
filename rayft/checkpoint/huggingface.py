"""Exports that others load: a Hugging Face folder of full weights, or an adapter as plain peft reads it.

On a path both are written to a temporary folder beside the target and renamed, so a killed export leaves the old one or none. On an
object store files are made here and uploaded one by one; `export.json`, deleted first and written last, makes an export count.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from rayft.config.schema import Adapter, AnyRun, Model
from rayft.data import store
from rayft.data.store import Location
from rayft.errors import room_for
from rayft.models.adapt import adapter_config
from rayft.models.experts import is_wrapper, update_of
from rayft.models.hub import EXPORT
from rayft.models.load import hf_name, is_adapter, kept_in_float32, make_dense, persistent_buffers, read_config
from rayft.models.nf4 import parameters_of, quantised
from rayft.models.stacked import Stacks, by_stored_name, stacks_of, stored_names
from rayft.models.tokenizer import load_tokenizer

FILE_BYTES = 5 << 30
"""Most bytes in one safetensors file of an export."""


def export(module: Any, cfg: AnyRun, home: Location, step: int) -> None:
    """Write what `cfg.export` asks for below the run's directory: export/, and export-merged/. Every rank calls it."""
    if not cfg.export.at_end:
        return
    dtype = getattr(torch, cfg.export.dtype)
    if cfg.adapter.type == "none":
        export_full(module, cfg.model, dtype, store.join(home, "export"), step)
        return
    export_adapter(module, cfg.model, cfg.adapter, store.join(home, "export"), step)
    if cfg.export.merge:
        export_full(module, cfg.model, dtype, store.join(home, "export-merged"), step)


def export_step(target: Location) -> int | None:
    """The step of a finished export; None when there is none."""
    try:
        return int(json.loads(store.read(store.join(target, EXPORT)))["step"])
    except FileNotFoundError:
        return None


def export_adapter(module: Any, model: Model, adapter: Adapter, target: Location, step: int) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json`. Every rank calls it; rank 0 writes.

    Args:
        module: the sharded, adapted model.
        model: its section; its path becomes the adapter's base.
        adapter: its section.
        target: the folder to make, by path or URL.
        step: optimizer steps taken.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            full = _full(parameter.detach())
            if dist.get_rank() == 0:
                tensors["base_model.model." + hf_name(name)] = full.cpu().contiguous()
    if dist.get_rank() == 0:
        from safetensors.torch import save_file

        with _new_folder(target, step) as folder:
            save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            adapter_config(module, adapter, model.path).save_pretrained(str(folder))
            load_tokenizer(model).save_pretrained(folder)
    dist.barrier()


def export_full(module: Any, model: Model, dtype: torch.dtype, target: Location, step: int) -> None:
    """Write all weights as safetensors with an index, configuration and tokenizer; adapters are added to their base weights.

    On a path, which must be on storage that all ranks see, every rank writes its rows; for a store rank 0 gathers a file at a time.
    Names are the checkpoint's.

    Args:
        module: the sharded model, adapted or not; it is not changed.
        model: its section.
        dtype: of the exported weights.
        target: the folder to make, by path or URL.
        step: optimizer steps taken.
    """
    state = _merged(module, dtype)
    if store.is_url(target):
        _export_objects(module, model, state, dtype, str(target), step)
    else:
        _export_files(module, model, state, dtype, Path(target), step)
    dist.barrier()


def _export_files(module: Any, model: Model, state: dict[str, Tensor], dtype: torch.dtype, target: Path, step: int) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    with room_for(target):
        folder = _fresh(target) if dist.get_rank() == 0 else _temporary(target)
        dist.barrier()
        stacks, numbers = stacks_of(module), _files(state)
        files = {part: number for name, number in numbers.items() for part in _stored(name, state[name].shape[:1], stacks)}
        writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=files, save_distributed=True, enable_consolidation=True)
        dcp.save(cast(Any, dict(_unstacked(state, stacks))), storage_writer=writer)
        if dist.get_rank() == 0:
            shutil.rmtree(folder / "sharded")
            _mark_format(folder)
            _write_rest(module, model, dtype, folder)
            (folder / EXPORT).write_text(json.dumps({"step": step}))
            _publish(folder, target)


def _export_objects(module: Any, model: Model, state: dict[str, Tensor], dtype: torch.dtype, target: str, step: int) -> None:
    from safetensors.torch import save_file

    numbers = _files(state)
    count = max(numbers.values())
    names = {number: f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors" for number in numbers.values()}
    upload, stacks = _Upload(target) if dist.get_rank() == 0 else None, stacks_of(module)
    for number, file in names.items():
        full = {name: _full(value).cpu() for name, value in state.items() if numbers[name] == number}
        if upload is not None:
            with upload.file(file) as path:
                save_file({name: part.contiguous() for name, part in _unstacked(full, stacks)}, path, metadata={"format": "pt"})
    if upload is not None:
        with tempfile.TemporaryDirectory(prefix="rayft-export-") as folder, room_for(folder):
            _write_rest(module, model, dtype, Path(folder))
            if count > 1:
                files = {part: names[numbers[name]] for name in state for part in _stored(name, state[name].shape[:1], stacks)}
                index = {"metadata": {"total_size": _bytes(state)}, "weight_map": files}
                (Path(folder) / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
            upload.folder(Path(folder))
        upload.finish(step)


class _Upload:
    """An export on a store in the making: what was there stops counting at once, what comes counts when it is finished."""

    def __init__(self, target: str) -> None:
        store.delete_tree(target, mark=EXPORT)
        self._target = target
        self._files: dict[str, tuple[int, str]] = {}

    @contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """A local path to write a file to, which is then uploaded."""
        with store.committed_file(store.join(self._target, name)) as path:
            yield path
            self._files[name] = (path.stat().st_size, store.file_hash(path))

    def folder(self, folder: Path) -> None:
        """Upload every file of a local folder."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            with self.file(path.relative_to(folder).as_posix()) as copy:
                shutil.copyfile(path, copy)

    def finish(self, step: int) -> None:
        """Write the mark, which lists every file with its size and hash."""
        store.write(store.join(self._target, EXPORT), json.dumps({"step": step, "files": self._files}).encode())


@contextmanager
def _new_folder(target: Location, step: int) -> Iterator[Path]:
    """A local folder to write to, which becomes the export."""
    if store.is_url(target):
        with tempfile.TemporaryDirectory(prefix="rayft-export-") as folder, room_for(folder):
            yield Path(folder)
            upload = _Upload(str(target))
            upload.folder(Path(folder))
            upload.finish(step)
        return
    with room_for(target):
        fresh = _fresh(Path(target))
        yield fresh
        (fresh / EXPORT).write_text(json.dumps({"step": step}))
        _publish(fresh, Path(target))


def _write_rest(module: Any, model: Model, dtype: torch.dtype, folder: Path) -> None:
    """Configuration and tokenizer."""
    config = read_config(model)
    make_dense(config)
    config.dtype = dtype
    config.architectures = [next(kind.__name__ for kind in type(module).__mro__ if not kind.__name__.startswith("FSDP"))]
    config.save_pretrained(folder)
    if module.generation_config is not None:
        module.generation_config.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)


def _bytes(state: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())


def _merged(module: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Checkpoint name -> weight or persistent buffer, W + scaling B A in float32 before where there is an adapter; the model keeps its own.

    They are in `dtype`, but for integers and for buffers that transformers holds in float32.

    A W that is held in 4 bits is the one that training computed with.
    """
    packed = parameters_of(module)
    parameters = {
        hf_name(name): p.detach()
        for name, p in module.named_parameters()
        if not is_adapter(name) and ".original_module." not in name and p not in packed
    }
    held = {hf_name(f"{name}.weight"): part for name, part in quantised(module)}
    for name, part in module.named_modules():
        if is_wrapper(part):
            key = hf_name(f"{name}.{part.parameter_name}")
            parameters[key] = update_of(part, parameters[key]).to(dtype)
        elif hasattr(part, "lora_A") and "default" in part.lora_A:
            key = f"{hf_name(name + '.')}weight"
            update = part.lora_B["default"].weight.detach().float() @ part.lora_A["default"].weight.detach().float()
            base = held.pop(key).dense(torch.float32) if key in held else parameters[key].float()
            # A frozen weight that a rank has all of is not sharded, whatever its adapter is.
            merged = base + part.scaling["default"] * (update if isinstance(base, DTensor) else _full(update))
            parameters[key] = merged.to(dtype)  # here, so that there is one float32 weight at a time
    parameters |= {name: part.dense(dtype) for name, part in held.items()}
    buffers = {
        hf_name(name): buffer if kept_in_float32(module, name) or not buffer.is_floating_point() else buffer.to(dtype)
        for name, buffer in persistent_buffers(module)
        if ".original_module." not in name
    }
    return {name: value.to(dtype) for name, value in parameters.items()} | buffers


def _stored(name: str, experts: Sequence[int], stacks: Stacks) -> list[str]:
    """The names under which a weight is stored: those of its parts if it is a stack of `experts[0]`."""
    found = stored_names(name, experts[0], stacks) if experts else []
    return [part for of_expert in found for part in of_expert] or [name]


def _unstacked(state: Mapping[str, Tensor], stacks: Stacks) -> Iterator[tuple[str, Tensor]]:
    """(stored name, value), stacks in the parts that this rank has."""
    for name, value in state.items():
        yield from by_stored_name(name, value, stacks)


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
    store.make_folder(folder)
    return folder


def _publish(folder: Path, target: Path) -> None:
    """Rename into place; an older export moves aside first and is deleted last."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)
