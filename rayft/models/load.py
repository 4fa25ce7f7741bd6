"""Build a model on the meta device, and later fill its (sharded) tensors from files. Owner of the one name map.

The order is build on meta, adapt, patch, parallelize, materialise: no rank ever holds a second full copy. Three traps of
`to_empty` are handled in `materialise`: it fills buffers with garbage, unties embeddings of unsharded modules, and leaves adapters
uninitialised. Buffers that checkpoints hold (scales of layers, biases of routers) are read like weights, and are never trained; the
others are computed anew.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rayft.config.schema import Model
from rayft.errors import ConfigError, DataError
from rayft.models import fp8, nf4
from rayft.models.hub import model_folder
from rayft.models.stacked import Stacks, not_understood, parts, stacks_of, stored_names

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ATTENTION = "rayft"
"""Name under which the packed attention is registered with transformers."""

READABLE = ("F32", "BF16", "F16", "F64")
"""Types of stored weights, as safetensors names them."""

_WRAPPERS = re.compile(
    r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|base_layer(?!(\.base_layer)*\.lora_)|original_module|modules_to_save\.default)(?=\.)"
)
"""Between an adapter and its module base_layer stays: of several adapters on one module each wraps the next."""
_ADAPTER_NAME = re.compile(r"(\.lora_[AB])\.default(?=\.)")


def hf_name(name: str) -> str:
    """The Hugging Face checkpoint name of a parameter: without what peft, compile and checkpointing put into it."""
    return _ADAPTER_NAME.sub(r"\1", _WRAPPERS.sub("", name).removeprefix("."))


def is_adapter(name: str) -> bool:
    """Whether a parameter was added by a low-rank adapter."""
    return ".lora_" in name


def register_attention(function: Callable[..., Any]) -> None:
    """Make a packed attention function known to transformers as ATTENTION. No mask is registered for it, so models build none."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, function)


def read_config(model: Model) -> PretrainedConfig:
    """The model's configuration.

    Raises:
        ConfigError: there is no such folder or cached id, it holds no readable configuration, or its weights are quantised in a way
            that is not understood.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_folder(model), trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError) as problem:
        reason = str(problem).strip().split("\n")[0]
        raise ConfigError(
            "model.path",
            model.path,
            f"must be a Hugging Face model folder or a cached id ({reason})",
            "Give the path of a folder that holds config.json",
        ) from problem
    if model.init != "random":
        fp8.refuse_others(model.path, quantisation_of(config))
    return config


def quantisation_of(config: PretrainedConfig) -> dict[str, Any] | None:
    """How the files of a model are quantised; None when they are not."""
    found = getattr(config, "quantization_config", None)
    return None if found is None else dict(found if isinstance(found, Mapping) else found.to_dict())


def make_dense(config: PretrainedConfig) -> None:
    """Let a configuration describe weights that are not quantised."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def base_dtype(model: Model, *, frozen: bool, device_type: str) -> torch.dtype:
    """Precision that the base weights are held in."""
    if model.dtype != "auto":
        return cast(torch.dtype, getattr(torch, model.dtype))
    return compute_dtype(model, device_type) if frozen else torch.float32


def compute_dtype(model: Model, device_type: str) -> torch.dtype:
    """Precision of forward and backward."""
    if model.compute_dtype != "auto":
        return cast(torch.dtype, getattr(torch, model.compute_dtype))
    return torch.bfloat16 if device_type == "cuda" else torch.float32


def build(model: Model, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of `config` on the meta device, its attention served by the registered function.

    Raises:
        ConfigError: transformers has no causal model for the configuration, or converts its weights while loading.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.use_cache = False
    make_dense(config)
    with torch.device("meta"):
        try:
            module = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=model.trust_remote_code
            )
        except ValueError as problem:
            raise ConfigError(
                "model.path", model.path, f"transformers cannot build a causal language model of it ({problem})", "Choose another model"
            ) from problem
    if converted := not_understood(module):
        raise ConfigError(
            "model.path",
            model.path,
            f"checkpoints of {config.model_type} are converted while loading ({converted}), which rayft does not do yet",
            "Choose a model whose checkpoint names are its parameter names",
        )
    for name, buffer in list(persistent_buffers(module)):
        if kept_in_float32(module, name):
            owner, _, own = name.rpartition(".")
            module.get_submodule(owner)._buffers[own] = buffer.float()
    return cast("PreTrainedModel", module)


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, buffer) of what checkpoints hold beside parameters: every rank has all of it, and nothing trains it."""
    for path, part in module.named_modules():
        if isinstance(part, nf4.NF4Linear):  # scales of scales, which no checkpoint holds
            continue
        for name, buffer in part.named_buffers(prefix=path, recurse=False):
            if name.rpartition(".")[2] not in part._non_persistent_buffers_set:
                yield name, buffer


def kept_in_float32(module: nn.Module, name: str) -> bool:
    """Whether transformers holds a buffer in float32 whatever the model's type, as the biases that choose experts."""
    endings = getattr(module, "_keep_in_fp32_modules_strict", None) or ()
    return any(re.search(rf"(^|\.){re.escape(ending)}(\.|$)", hf_name(name)) for ending in endings)


def layers_of(module: nn.Module, path: str) -> nn.ModuleList:
    """The decoder layers at a dotted path of the model.

    Raises:
        ConfigError: they are not there, as in models of text and images.
    """
    try:
        return cast(nn.ModuleList, module.get_submodule(path))
    except AttributeError as problem:
        rule = f"has no decoder layers at {path}, where models of text alone have them"
        remedy = "Choose a model of text alone, such as the language model saved from it"
        raise ConfigError("model.path", cast(Any, module).config.model_type, rule, remedy) from problem


def load_plain(model: Model, dtype: torch.dtype) -> Any:
    """The model as transformers itself loads and runs it, to compare with."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    dense = {"quantization_config": FineGrainedFP8Config(dequantize=True)} if quantisation_of(read_config(model)) else {}
    return AutoModelForCausalLM.from_pretrained(
        model_folder(model), dtype=dtype, attn_implementation="sdpa", trust_remote_code=model.trust_remote_code, **dense
    ).eval()


def materialise(module: PreTrainedModel, model: Model, seed: int, device: str, *, cpu_offload: bool = False) -> None:
    """Give every tensor its storage and value: base weights and persistent buffers from files (or drawn), adapters drawn, the rest of
    the buffers recomputed.

    Each rank reads and keeps only its own rows. Values depend on (seed, name) alone, so any world size starts equal.

    Args:
        module: on the meta device, already adapted, patched and sharded.
        seed: run.seed.
        device: where tensors live, "cpu" or "cuda:N".
        cpu_offload: parameters live on the CPU, whatever the device of buffers.

    Raises:
        ConfigError: see `read_config`.
        DataError: the files lack a weight, or hold one of another shape or of a type that is not read.
    """
    module.to_empty(device="cpu" if cpu_offload else device)
    module.tie_weights()
    _recompute_buffers(module)
    if cpu_offload:
        for part in module.modules():
            part._buffers = {name: None if buffer is None else buffer.to(device) for name, buffer in part._buffers.items()}
    packed = nf4.parameters_of(module)
    for tensor in packed:
        if not isinstance(tensor, DTensor):  # nobody brings it to where it is used
            tensor.data = tensor.data.to(device)
    base: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if not is_adapter(name) and p not in packed}
    base |= persistent_buffers(module)
    if model.init == "random":
        _draw(module, base, seed)
    else:
        files = _Files(Path(model_folder(model)), quantisation_of(read_config(model)))
        _read(files, base, stacks_of(module))
        _read_quantised(files, module, device)
    for name, parameter in module.named_parameters():
        if is_adapter(name):
            _copy_rows(parameter, _drawn_adapter(name, parameter, seed))


def weights_identity(folder: str) -> str:
    """A digest of the safetensors headers, sizes and samples of their bytes: what an adapter's checkpoint belongs to.

    Raises:
        ConfigError: the weights are quantised in a way that is not understood.
    """
    if (config := Path(folder, "config.json")).is_file():
        fp8.refuse_others(folder, json.loads(config.read_bytes()).get("quantization_config"))
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            for offset in sorted({0, max(0, size // 2 - (1 << 19)), max(0, size - (1 << 20))}):
                stream.seek(offset)
                digest.update(stream.read(1 << 20))
    return digest.hexdigest()


def _recompute_buffers(module: PreTrainedModel) -> None:
    """Fill non-persistent buffers (rotary frequencies, embedding scales) by the family's own initialisation."""
    with torch.no_grad():
        for part in module.modules():
            if part._non_persistent_buffers_set and not any(True for _ in part.parameters(recurse=False)):
                module._init_weights(part)
            elif part._non_persistent_buffers_set:
                _initialise_buffers_only(module, part)


def _initialise_buffers_only(module: PreTrainedModel, part: nn.Module) -> None:
    """`_init_weights` on a stand-in without the parameters, which may be sharded and huge; then take its buffers."""
    stand_in = copy.copy(part)
    stand_in._parameters = {
        name: None if p is None else nn.Parameter(torch.zeros(1, 1), requires_grad=False) for name, p in part._parameters.items()
    }
    if getattr(stand_in, "padding_idx", None) is not None:
        stand_in.padding_idx = None  # type: ignore[assignment]
    module._init_weights(stand_in)


@dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors file."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class _Files:
    """The safetensors files of a model.

    Args:
        folder: that holds them.
        quantisation: how their weights are quantised, in a way that is understood; None when they are not.

    Raises:
        DataError: there is none, or one is damaged.
    """

    def __init__(self, folder: Path, quantisation: Mapping[str, Any] | None) -> None:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            rule, remedy = "holds no safetensors file", "Save the model with save_pretrained, or use model.init=random"
            raise DataError("model.path", str(folder), rule, remedy)
        self.folder = folder
        self.stored = {
            name: _Stored(file, tuple(entry["shape"]), entry["dtype"]) for file in files for name, entry in _header(file).items()
        }
        self.in_8_bits, self.block = quantisation is not None, fp8.block_of(quantisation or {})

    def name_of(self, name: str) -> str:
        """The file's name of a parameter: its own, or for the input embedding of a tied model, the head's."""
        if name in self.stored:
            return name
        if name.endswith("embed_tokens.weight") and "lm_head.weight" in self.stored:
            return "lm_head.weight"
        remedy = "Check that the folder has every safetensors file of its index"
        raise DataError(str(self.folder), None, f"holds no weight named {name}", remedy)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a stored tensor that is not what the configuration asks for, or has a type or factors that are not read."""
        found, where = self.stored[name], f"{self.folder.name}: {name}"
        if found.shape != shape:
            rule = f"the configuration asks for the shape {shape}"
            raise DataError(where, found.shape, rule, "Take a configuration and weights of the same model")
        if found.dtype == fp8.CODES and self.in_8_bits and len(shape) == 2:
            factors = self.stored.get(name + fp8.ENDING)
            if factors is None or factors.dtype not in fp8.FACTORS or factors.shape not in fp8.factors_shapes(shape, self.block):
                rule = f"needs factors {name + fp8.ENDING} for blocks of {self.block or 'the whole weight'}, in one of {fp8.FACTORS}"
                have = factors and (factors.dtype, factors.shape)
                raise DataError(where, have, rule, "Take the configuration that belongs to these files")
        elif found.dtype not in READABLE:
            rule = f"is stored in a type that is not read as a weight; {', '.join(READABLE)} are"
            raise DataError(where, found.dtype, rule, "Name the folder of the model's dense weights")

    def factors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, factors of the whole weight) of those of the weights that are stored in 8 bits."""
        from safetensors import safe_open

        with ExitStack() as stack:
            opened: dict[Path, Any] = {}
            for name in names:
                if self.stored[name].dtype == fp8.CODES:
                    file = self.stored[name + fp8.ENDING].file
                    if file not in opened:
                        opened[file] = stack.enter_context(safe_open(file, framework="pt"))
                    yield name, opened[file].get_tensor(name + fp8.ENDING)


def _read(files: _Files, base: Mapping[str, Tensor], stacks: Stacks) -> None:
    """Read each tensor's local rows from the safetensors files, converting its type on the way."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    wanted: dict[str, list[Tensor]] = {}
    for name, tensor in base.items():
        own = hf_name(name)
        if own not in files.stored and stored_names(own, 1, stacks):
            wanted |= {files.name_of(part): [view] for part, view in parts(own, tensor, stacks)}
        else:
            wanted.setdefault(files.name_of(own), []).append(tensor)
    for name, tensors in wanted.items():
        files.check(name, tuple(tensors[0].shape))
    dcp.load(
        {name: tensors[0].detach() for name, tensors in wanted.items()},
        storage_reader=HuggingFaceStorageReader(str(files.folder)),
        no_dist=not torch.distributed.is_initialized(),
    )
    for name, factors in files.factors(wanted):
        tensor, first = wanted[name][0].detach(), (0, 0)
        if isinstance(tensor, DTensor):
            _, (row, column) = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            tensor, first = tensor.to_local(), (row, column)
        fp8.apply_factors(tensor, factors, files.block, first)
    with torch.no_grad():
        for tensors in wanted.values():
            for other in tensors[1:]:
                other.copy_(tensors[0])


def _read_quantised(files: _Files, module: nn.Module, device: str) -> None:
    """Read each weight that is held in 4 bits whole, quantise it on the device, and keep this rank's rows."""
    layers = _quantised_layers(module)
    for name, part in layers.items():
        files.check(files.name_of(name), (part.out_features, part.in_features))
    factors = dict(files.factors(layers))

    def dense(name: str, weight: Tensor) -> Tensor:
        if name in factors:
            weight = weight.float()
            fp8.apply_factors(weight, factors[name], files.block)
        return weight

    nf4.read(layers, {name: files.stored[name].file for name in layers}, device, dense, _copy_rows)


def _quantised_layers(module: nn.Module) -> dict[str, nf4.NF4Linear]:
    """Checkpoint name of the weight -> layer that holds it in 4 bits."""
    return {hf_name(f"{name}.weight"): part for name, part in nf4.quantised(module)}


def _header(file: Path) -> dict[str, Any]:
    """Name -> entry of every tensor in a safetensors file.

    Raises:
        DataError: it is none, or has another size than its header says, as after a broken download.
    """
    size, remedy = file.stat().st_size, "Fetch or save the file again"
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        content = stream.read(length) if length <= size else b""
    try:
        header: dict[str, Any] = json.loads(content)
    except ValueError as problem:
        raise DataError(str(file), None, "is no safetensors file, or a damaged one", remedy) from problem
    header.pop("__metadata__", None)
    wanted = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != wanted:
        raise DataError(str(file), None, f"has {size} bytes instead of {wanted}", remedy)
    return header


def _draw(module: PreTrainedModel, base: Mapping[str, Tensor], seed: int) -> None:
    """Initialise base weights and persistent buffers as the family does, each module's full tensors from (seed, module name)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(module.config, dtype=torch.float32)
    buffers = dict(persistent_buffers(fresh))
    targets: dict[str, list[Tensor]] = {}
    for name, parameter in base.items():
        targets.setdefault(hf_name(name), []).append(parameter)
    packed = _quantised_layers(module)
    for path, part in fresh.named_modules():
        own = {name for name, _ in part.named_buffers(prefix=path, recurse=False)}
        if not own & buffers.keys() and not any(True for _ in part.parameters(recurse=False)):
            continue
        part._apply(lambda t: torch.empty_like(t, device="cpu"), recurse=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "weights", path))
            fresh._init_weights(part)
        drawn = [*part.named_parameters(prefix=path, recurse=False), *part.named_buffers(prefix=path, recurse=False)]
        for name, value in drawn:
            for target in targets.get(name, ()):
                _copy_rows(target, value.detach())
            if name in packed:
                packed[name].fill(value.detach(), _copy_rows)
        part._apply(lambda t: torch.empty_like(t, device="meta"), recurse=False)


def _drawn_adapter(name: str, parameter: Tensor, seed: int) -> Tensor:
    """Initial adapter: A uniform in +-1/sqrt(in) (peft's kaiming_uniform with a = sqrt(5)), B zero. arXiv 2106.09685 sec. 4.1."""
    if ".lora_B" in name:
        return torch.zeros(parameter.shape)
    generator = torch.Generator().manual_seed(seed_of(seed, "adapter", hf_name(name)))
    bound = parameter.shape[1] ** -0.5
    return torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed from any parts: randomness is a function of (seed, purpose, name or step), never of a state."""
    return int.from_bytes(hashlib.sha256("\0".join(map(str, parts)).encode()).digest()[:8], "little") >> 1


def _copy_rows(target: Tensor, full: Tensor) -> None:
    """Copy this rank's rows of a full tensor into a (possibly sharded) parameter."""
    with torch.no_grad():
        if not isinstance(target, DTensor):
            target.copy_(full)
            return
        shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
        local = full[tuple(slice(o, o + s) for o, s in zip(offset, shape, strict=True))]
        target.to_local().copy_(local)


def named_trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(Hugging Face name, parameter) of everything that is trained, each parameter once."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield hf_name(name), parameter


def config_of(module: nn.Module) -> Any:
    """The text configuration of a (possibly multimodal) model."""
    return cast(Any, module).config.get_text_config()
