"""Text from an exported folder, by plain transformers: for samples and first looks, not for rollouts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayft.errors import ConfigError


def load_exported(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a full export, or of an adapter on its base, in evaluation mode.

    Raises:
        ConfigError: the folder holds neither.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    elif (folder / "config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(folder)
    else:
        raise ConfigError(
            "model", str(folder), "holds neither config.json nor adapter_config.json", "Name a Hugging Face folder or an export of a run"
        )
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def generate_text(
    folder: Path, prompts: Sequence[Sequence[dict[str, str]]], max_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[str]:
    """The model's answer to each conversation.

    Args:
        folder: an export.
        prompts: conversations of {role, content}.
        max_tokens: most tokens of an answer.
        temperature: 0 takes the likeliest token each time.
        seed: of the sampling.
    """
    import torch

    model, tokenizer = load_exported(folder)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    answers = []
    for prompt in prompts:
        encoded = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            tokens = model.generate(
                **encoded, max_new_tokens=max_tokens, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **sampling
            )
        answers.append(tokenizer.decode(tokens[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers
