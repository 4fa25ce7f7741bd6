"""What files hold beside plain weights: buffers that checkpoints keep, and weights in 8 bits with their factors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from families import write_in_8_bits, write_model
from rayft.config.schema import Adapter, Model
from rayft.errors import ConfigError, DataError
from rayft.models import adapt, fp8, load, nf4
from rayft.parallel import attention
from rayft.rollout.engine import EngineOptions, EngineThread
from rayft.weight_sync.protocol import EngineHandle, Sender
from rayft.weight_sync.source import full_weights

WITH_BUFFERS = {"gemma4": "layer_scalar", "glm4_moe": "e_score_correction_bias"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_model(family, tmp_path_factory.mktemp(family)) for family in (*WITH_BUFFERS, "qwen3_moe", "llama")}


@pytest.fixture
def garbage() -> Iterator[None]:
    """New memory holds NaN, so that what is never filled shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def loaded(folder: Path, dtype: torch.dtype = torch.float32, *, lora: bool = False, quantize: bool = False, **fields: Any) -> nn.Module:
    """A model as training loads it, in this process."""
    load.register_attention(attention.packed_attention)
    model = Model(path=str(folder), **fields)
    module = load.build(model, load.read_config(model), dtype)
    if quantize:
        nf4.replace(module, nf4.choose(module, load.layers_of(module, "model.layers"), ()))
    if lora:
        adapt.adapt(module, Adapter(type="lora", r=2, modules_to_save=("gate",)), 0)
    load.materialise(module, model, 0, "cpu")
    return module


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    return {load.hf_name(name): buffer for name, buffer in load.persistent_buffers(module)}


@pytest.mark.usefixtures("garbage")
@pytest.mark.parametrize("family", WITH_BUFFERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_are_those_that_transformers_loads_in_value_and_type(family: str, dtype: torch.dtype, folders: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folders[family], dtype=dtype)
    expected = {name: value for name, value in plain.named_buffers() if name.endswith(WITH_BUFFERS[family])}
    for module in (loaded(folders[family], dtype), loaded(folders[family], dtype, lora=family == "glm4_moe")):
        got = buffers_of(module)
        assert got.keys() == expected.keys() and len(got) > 1
        for name, value in expected.items():
            assert got[name].dtype == value.dtype and torch.equal(got[name], value), name
            assert value.abs().max() > 0


@pytest.mark.usefixtures("garbage")
@pytest.mark.parametrize(("family", "value"), [("gemma4", 1.0), ("glm4_moe", 0.0)])
def test_a_drawn_model_has_the_buffers_that_its_family_begins_with(family: str, value: float, folders: dict[str, Path]) -> None:
    for buffer in buffers_of(loaded(folders[family], init="random")).values():
        assert torch.equal(buffer, torch.full_like(buffer, value))


def test_a_missing_buffer_is_refused_as_a_missing_weight_is(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(folders["gemma4"] / "model.safetensors")
    tensors.pop("model.layers.3.layer_scalar")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folders["gemma4"] / "config.json").read_bytes())
    with pytest.raises(DataError, match=r"holds no weight named model\.layers\.3\.layer_scalar"):
        loaded(tmp_path)


@pytest.mark.parametrize("family", WITH_BUFFERS)
def test_a_full_push_brings_the_buffers_and_every_one_is_checked(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    module = loaded(folders[family])
    with torch.no_grad():
        for buffer in buffers_of(module).values():
            buffer.add_(0.25)
    sent = {weight.name for weight in full_weights(module, torch.bfloat16)}
    assert sent == load_file(folders[family] / "model.safetensors").keys()
    push_and_compare(module, folders[family], "full", tmp_path)


def test_an_engine_that_merges_adapters_keeps_the_buffers_of_its_base(folders: dict[str, Path], tmp_path: Path) -> None:
    push_and_compare(loaded(folders["glm4_moe"], lora=True), folders["glm4_moe"], "adapter", tmp_path)


def push_and_compare(module: nn.Module, folder: Path, payload: Any, tmp_path: Path) -> None:
    """To an engine in bfloat16, whose biases of routers are in float32 none the less."""
    thread = EngineThread(EngineOptions(folder, "local", "bfloat16", context=64))
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cpu", "deadline_s": 10, "folder": tmp_path / "weights"}
    try:
        report = Sender("disk", payload=payload, **options).push(module, "1.0", [EngineHandle("engine", thread.call)])
        assert report.verified and report.unchecked == ()
        held = buffers_of(thread.engine._model)
        for name, buffer in buffers_of(module).items():
            assert torch.equal(held[name], buffer.to(held[name].dtype)), name
    finally:
        thread.close()


def test_factors_of_blocks_are_applied_to_any_part_of_a_weight() -> None:
    torch.manual_seed(0)
    whole, factors = torch.randn(37, 23).to(torch.float8_e4m3fn).float(), torch.rand(4, 3)
    expected = whole * factors.repeat_interleave(10, 0)[:37].repeat_interleave(8, 1)[:, :23]
    for first, last in ((0, 37), (0, 5), (7, 23), (30, 37), (36, 37), (12, 12)):
        part = whole[first:last, 3:19].clone()
        fp8.apply_factors(part, factors, (10, 8), (first, 3))
        assert torch.equal(part, expected[first:last, 3:19])
    narrow = whole.bfloat16()
    fp8.apply_factors(narrow, factors, (10, 8))
    assert torch.equal(narrow, expected.bfloat16()), "rounded once"


@pytest.mark.parametrize("block", [(16, 16), (40, 48), None])
def test_weights_in_8_bits_are_read_as_what_they_stand_for(block: tuple[int, int] | None, folders: dict[str, Path], tmp_path: Path) -> None:
    """Plain weights, stacks of experts, and codes that are then held in 4 bits; and as transformers makes them dense."""
    write_in_8_bits(folders["qwen3_moe"], block, tmp_path)
    for options in ({}, {"dtype": torch.bfloat16}, {"quantize": True}):
        got, expected = (loaded(tmp_path / kind, **options).state_dict() for kind in ("fp8", "dense"))  # type: ignore[arg-type]
        for name, value in expected.items():
            assert torch.equal(got[name], value), name
    if block == (16, 16):  # the layout that transformers takes for these sizes
        plain = dict(load.load_plain(Model(path=str(tmp_path / "fp8")), torch.float32).named_parameters())
        for name, parameter in loaded(tmp_path / "fp8").named_parameters():
            torch.testing.assert_close(parameter, plain[name], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def test_codes_without_their_factors_or_their_configuration_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = write_in_8_bits(folders["llama"], (16, 16), tmp_path) / "fp8"
    config = json.loads((folder / "config.json").read_text())
    for settings, says in (
        (None, "stored in a type that is not read"),
        ({"quant_method": "fp8", "weight_block_size": [8, 16]}, "needs factors"),
        ({"quant_method": "fp8", "weight_block_size": None}, "needs factors"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        with pytest.raises(DataError, match=says):
            loaded(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "compressed-tensors"},
        {"load_in_4bit": True},
        {"quant_method": "fp8", "fmt": "e5m2"},
        {"quant_method": "fp8", "weight_block_size": [128]},
    ],
)
def test_other_quantised_checkpoints_are_refused_by_name_before_their_weights_are_read(
    settings: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    config = json.loads((folders["llama"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    for act in (lambda: load.read_config(Model(path=str(tmp_path))), lambda: load.weights_identity(str(tmp_path))):
        with pytest.raises(ConfigError, match=f"is quantised by {settings.get('quant_method')}"):
            act()
    load.read_config(Model(path=str(tmp_path), init="random"))
