"""Text from an exported folder, by plain transformers: for samples and first looks, not for rollouts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayft.config.schema import Model
from rayft.errors import ConfigError, DataError
from rayft.models.foreign import check_orientation
from rayft.models.hub import model_folder
from rayft.models.tokenizer import load_tokenizer, question


def load_exported(folder: Path, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer) of a full export, or of an adapter on its base, in evaluation mode; on a GPU where there is one.

    Weights keep the precision that they are stored in. An adapter without tokenizer files has its base's.

    Raises:
        ConfigError: the folder holds neither.
        DataError: transformers or peft cannot load what it holds, or an adapter's layout cannot be told.
    """
    import torch

    base = str(folder)
    if adapted := (folder / "adapter_config.json").exists():
        said = json.loads((folder / "adapter_config.json").read_text())
        base = model_folder(Model(path=said["base_model_name_or_path"], revision=said.get("revision")))
    elif not (folder / "config.json").exists():
        raise ConfigError(
            "model", str(folder), "holds neither config.json nor adapter_config.json", "Name a Hugging Face folder or an export of a run"
        )
    model = _whole(base, trust_remote_code)
    if adapted:
        check_orientation(model, said, folder)
        model = _with_adapter(model, folder)
    words = folder if (folder / "tokenizer_config.json").exists() else base
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), load_tokenizer(Model(path=str(words), trust_remote_code=trust_remote_code))


def _whole(folder: str, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as problem:
        rule = f"transformers cannot load it ({str(problem).strip().splitlines()[0]})"
        remedy = "Name a folder with config.json and weights; model code that comes with it needs model.trust_remote_code=true"
        raise DataError("model", folder, rule, remedy) from problem


def _with_adapter(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (OSError, ValueError, KeyError, RuntimeError) as problem:
        rule = f"peft cannot put this adapter on its base ({str(problem).strip().splitlines()[0]})"
        raise DataError("adapter", str(folder), rule, "Name an adapter that was trained on that base") from problem


def generate_text(
    folder: Path,
    prompts: Sequence[Sequence[dict[str, str]]],
    max_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    *,
    chat: bool = True,
    trust_remote_code: bool = False,
) -> list[str]:
    """The model's answer to each conversation.

    Args:
        folder: an export.
        prompts: conversations of {role, content}.
        max_tokens: most tokens of an answer.
        temperature: 0 takes the likeliest token each time.
        seed: of the sampling.
        chat: ask by the chat template; without, or where there is none, the text is continued as it is.
        trust_remote_code: run model code that comes with the weights.
    """
    import torch

    model, tokenizer = load_exported(folder, trust_remote_code=trust_remote_code)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature}
        if temperature > 0
        else {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    )
    answers = []
    for prompt in prompts:
        asked = torch.tensor([question(tokenizer, prompt, chat=chat)], device=model.device)
        with torch.no_grad():
            tokens = model.generate(
                input_ids=asked,
                attention_mask=torch.ones_like(asked),
                max_new_tokens=max_tokens,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                **sampling,
            )
        answers.append(tokenizer.decode(tokens[0, asked.shape[1] :], skip_special_tokens=True).strip())
    return answers
