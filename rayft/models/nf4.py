"""QLoRA (arXiv 2305.14314): frozen linear layers of the decoder blocks held in 4 bits, made dense only inside of forward and backward.

Embeddings, norms and head stay as they are, so do routers and experts, which are no linear modules, and layers whose rows do not divide
into blocks of 64. Codes and scales are parameters of bytes, which FSDP2 shards by rows where it can (`parallel.fsdp`); scales of scales,
4 bytes for 16,384 weights, are a buffer that every rank has whole. A whole weight is read, quantised and let go before the next one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rayft.errors import ConfigError
from rayft_kernels import NF4, nf4_linear, quantise
from rayft_kernels.nf4.op import BLOCK, dequantise_rows, outer_size

ROUTER = re.compile(r"(^|\.)(router|\w*gate)(\.|$)")
"""Linear layers that choose experts or weigh them: tiny, and what they decide is not to be rounded."""


class NF4Linear(nn.Linear):
    """A frozen linear layer whose `weight` holds codes, uint8 [out, in / 2]; peft adapts it like any other.

    Args:
        dense: the layer that it stands for, whose bias it takes over.
    """

    weight_outer: Tensor

    def __init__(self, dense: nn.Linear) -> None:
        rows, columns = dense.out_features, dense.in_features
        super().__init__(columns, rows, bias=False, device="meta")
        self.bias = dense.bias
        self.weight = nn.Parameter(torch.empty(rows, columns // 2, dtype=torch.uint8, device="meta"), requires_grad=False)
        scales = torch.empty(rows, columns // BLOCK, dtype=torch.uint8, device="meta")
        self.weight_scales = nn.Parameter(scales, requires_grad=False)
        self.register_buffer("weight_outer", torch.empty(outer_size(rows, columns), dtype=torch.float32, device="meta"))

    @property
    def packed(self) -> NF4:
        """The weight as the operations take it; valid where parameters are gathered, inside of the owner's forward."""
        return NF4(self.weight, self.weight_scales, self.weight_outer)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in the input's type."""
        out = nf4_linear(x, self.packed)
        return out if self.bias is None else out + self.bias

    @torch.no_grad()
    def fill(self, weight: Tensor, copy_rows: Callable[[Tensor, Tensor], None]) -> None:
        """Take a dense weight [out, in]; `copy_rows` puts this rank's rows of a whole tensor into a parameter."""
        packed = quantise(weight)
        copy_rows(self.weight, packed.codes)
        copy_rows(self.weight_scales, packed.scales)
        self.weight_outer.copy_(packed.outer)

    @torch.no_grad()
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that it computes with, sharded as its codes are; outside of the forward, on any device."""
        codes, scales = self.weight.detach(), self.weight_scales.detach()
        if not isinstance(codes, DTensor) or not isinstance(scales, DTensor):
            return dequantise_rows(self.packed, dtype, 0)
        mesh, placements, shape = codes.device_mesh, codes.placements, (self.out_features, self.in_features)
        _, first = compute_local_shape_and_global_offset(codes.shape, mesh, placements)
        outer = self.weight_outer.to(codes.to_local().device)
        local = dequantise_rows(NF4(codes.to_local(), scales.to_local(), outer), dtype, first[0])
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1))


def choose(module: nn.Module, layers: nn.ModuleList, kept: Sequence[str]) -> list[str]:
    """Names of the linear layers that can be held in 4 bits, in model order.

    Args:
        module: the model, before adapters are put on it.
        layers: its decoder layers.
        kept: name endings of modules that are trained in full, which stay dense.
    """
    inside = {part for layer in layers for part in layer.modules()}
    return [name for name, part in module.named_modules() if part in inside and _can_be(part) and not _stays(name, kept)]


def replace(module: nn.Module, names: Sequence[str]) -> None:
    """Put layers that hold 4 bits in the place of linear layers, on the meta device.

    Raises:
        ConfigError: there is none to replace.
    """
    if not names:
        rule = f"no decoder layer has a linear layer with rows of a multiple of {BLOCK} values"
        raise ConfigError("model.quantize", "nf4", rule, "Use model.quantize=none")
    for name in names:
        owner, _, own = name.rpartition(".")
        setattr(module.get_submodule(owner), own, NF4Linear(cast(nn.Linear, module.get_submodule(name))))


def _can_be(part: nn.Module) -> bool:
    return type(part) is nn.Linear and part.in_features % BLOCK == 0


def _stays(name: str, kept: Sequence[str]) -> bool:
    return bool(ROUTER.search(name)) or any(name == ending or name.endswith("." + ending) for ending in kept)


def quantised(module: nn.Module) -> Iterator[tuple[str, NF4Linear]]:
    """(name, layer) of everything that is held in 4 bits."""
    for name, part in module.named_modules():
        if isinstance(part, NF4Linear):
            yield name, part


def parameters_of(module: nn.Module) -> set[Tensor]:
    """Their codes and scales, which are no weights of a checkpoint."""
    return {tensor for _, part in quantised(module) for tensor in (part.weight, part.weight_scales)}


def read(
    layers: Mapping[str, NF4Linear],
    files: Mapping[str, Path],
    device: str,
    dense: Callable[[str, Tensor], Tensor],
    copy_rows: Callable[[Tensor, Tensor], None],
) -> None:
    """Fill layers from safetensors files, one whole weight at a time.

    Args:
        layers: name of the weight in the files -> layer.
        files: that name -> its file.
        device: where to quantise.
        dense: the weight of a name as numbers, given what the file holds.
        copy_rows: see `NF4Linear.fill`.
    """
    from safetensors import safe_open

    by_file: dict[Path, list[str]] = {}
    for name in layers:
        by_file.setdefault(files[name], []).append(name)
    for file, names in by_file.items():
        with safe_open(file, framework="pt", device=device) as tensors:
            for name in names:
                layers[name].fill(dense(name, tensors.get_tensor(name)), copy_rows)


def summary(names: Sequence[str]) -> str:
    """One line on what is held in 4 bits."""
    endings: dict[str, int] = {}
    for name in names:
        ending = name.rsplit(".", 1)[-1]
        endings[ending] = endings.get(ending, 0) + 1
    parts = ", ".join(f"{count} {ending}" for ending, count in endings.items())
    return f"{len(names)} linear layers in 4 bits: {parts}; embeddings, norms, head, routers and experts stay as they are"
