"""Adapters on square stacks of experts: the version of peft that wrote them decides whether they may be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from families import FAMILIES, write_model
from rayft.errors import DataError
from rayft.models.foreign import check_orientation
from rayft.models.generate import load_exported
from rayft.models.tiny import fit_tokenizer


def base(transposed: bool, middle: int = 8) -> nn.Module:
    experts = nn.Module()
    experts.gate_up_proj = nn.Parameter(torch.zeros(4, middle, 8))
    experts.is_transposed = transposed  # type: ignore[assignment]
    model = nn.Module()
    model.experts = experts
    return model


@pytest.mark.parametrize(
    ("version", "transposed", "read"),
    [
        (None, False, False),
        (None, True, False),
        ("0.18.1", False, False),
        ("0.18.1", True, True),
        ("0.19.0", False, False),
        ("0.19.0", True, False),
        ("0.19.1", False, True),
        ("0.19.1", True, True),
        ("0.21.2.dev0@main", False, True),
        ("1.0.0", True, True),
        ("UNKNOWN", True, False),
    ],
)
def test_square_stacks_are_read_only_when_the_version_says_which_side_is_the_input(
    version: str | None, transposed: bool, read: bool
) -> None:
    config = {"target_parameters": ["experts.gate_up_proj"]} | ({"peft_version": version} if version else {})
    if read:
        check_orientation(base(transposed), config, Path("adapter"))
    else:
        with pytest.raises(DataError, match=r"adapter/adapter_config\.json.*experts\.gate_up_proj.*square.*Save it again with peft"):
            check_orientation(base(transposed), config, Path("adapter"))


def test_what_is_not_square_or_not_adapted_needs_no_version() -> None:
    check_orientation(base(False, middle=12), {"target_parameters": ["experts.gate_up_proj"]}, Path("adapter"))
    check_orientation(base(False), {"target_parameters": ["gate_up"], "target_modules": ["q_proj"]}, Path("adapter"))
    check_orientation(base(False), {}, Path("adapter"))


def test_an_adapter_folder_is_held_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    kind, options = FAMILIES["qwen3_moe"]
    square = {"moe_intermediate_size": 32, "num_hidden_layers": 1, "mlp_only_layers": []}
    monkeypatch.setitem(FAMILIES, "qwen3_moe", (kind, options | square))
    folder = write_model("qwen3_moe", tmp_path / "model")
    fit_tokenizer(["words"], 257).save_pretrained(folder)
    model: Any = load_exported(folder)[0]
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (4, 64, 64)
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"], lora_dropout=0.0, init_lora_weights=False)
    adapted: Any = get_peft_model(model, lora)
    adapted.peft_config["default"].base_model_name_or_path = str(folder)
    adapted.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        expected = adapted.eval()(tokens).logits
        loaded, tokenizer = load_exported(tmp_path / "adapter")
        torch.testing.assert_close(loaded(tokens).logits, expected)
        torch.testing.assert_close(loaded.merge_and_unload()(tokens).logits, expected, atol=1e-5, rtol=1e-4)
    assert tokenizer.name_or_path == str(folder), "the adapter has none"
    file = tmp_path / "adapter" / "adapter_config.json"
    said = json.loads(file.read_text())
    said.pop("peft_version")
    file.write_text(json.dumps(said))
    with pytest.raises(DataError, match="only peft_version could tell"):
        load_exported(tmp_path / "adapter")
