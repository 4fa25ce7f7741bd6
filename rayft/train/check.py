"""`rayft check MODEL`: what would go wrong with a model, found in a minute on one device."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayft.config.schema import SftRun
from rayft.data.reader import Row, collate
from rayft.errors import TrainingError
from rayft.models import nf4
from rayft.models.adapt import match_targets
from rayft.models.load import compute_dtype, config_of, layers_of, load_plain
from rayft.models.spec import spec_of
from rayft.models.tokenizer import load_tokenizer
from rayft.parallel import attention, fsdp
from rayft.parallel.mesh import build_mesh
from rayft.train.build import build_model
from rayft.types import Batch, Session

TEXTS = (
    "The ferry leaves the harbour at six in the morning and reaches the island before noon, unless the wind turns.",
    "To boil an egg, bring water to a boil, lower the egg in with a spoon, and wait seven minutes. Then cool it in cold water.",
    "She closed the book and looked out of the window. It had begun to snow, and the street lamps were already lit.",
)
"""Plain sentences whose loss a pretrained model must find easy."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Largest difference of a token's log-probability that the compute type explains."""


def check_model(cfg: SftRun, session: Session, say: Callable[[str], None]) -> None:
    """Load the model as training would and compare it with plain transformers; report line by line.

    Args:
        cfg: a run of the model; its model, adapter and parallel sections count.
        session: one rank with a process group.
        say: takes each finding.

    Raises:
        RayftError: the model cannot be trained, with the reason; TrainingError when packing changes its output.
    """
    tokenizer = load_tokenizer(cfg.model)
    template = "a chat template" if tokenizer.chat_template else "no chat template"
    say(f"tokenizer: {len(tokenizer)} tokens, end {tokenizer.eos_token!r}, pad {tokenizer.pad_token!r}, {template}")
    model = build_model(cfg, session, build_mesh(session.device.split(":")[0], 1))
    config = config_of(model)
    say(f"model: {config.model_type}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")
    meta = load_meta(cfg)
    targets = match_targets(meta, cfg.adapter.targets)
    endings = Counter(name.rsplit(".", 1)[-1] for name in targets)
    say(
        f"adapter.targets={cfg.adapter.targets}: {len(targets)} modules: " + ", ".join(f"{count} {name}" for name, count in endings.items())
    )
    say(f"model.quantize=nf4: {nf4.summary(nf4.choose(meta, layers_of(meta, spec_of(config).layers), ()))}")
    for line in attention.summary(model, session.device.split(":")[0], cfg.parallel.attention):
        say(f"attention: {line}")

    documents = [tokenizer(text, add_special_tokens=True)["input_ids"] for text in TEXTS]
    packed = _scores(model, _batch(documents).to(session.device))
    alone = torch.cat([_scores(model, _batch([document]).to(session.device)) for document in documents])
    _compare("packed documents against the same alone", packed, alone, cfg, session, say)
    if cfg.model.init == "pretrained":
        plain = load_plain(cfg.model, compute_dtype(cfg.model, session.device.split(":")[0])).to(session.device)
        _compare(
            "rayft against transformers", packed, torch.cat([_plain_scores(plain, document) for document in documents]), cfg, session, say
        )
    loss = -packed.mean().item()
    say(f"loss on plain English: {loss:.3f}")
    if loss > math.log(config.vocab_size) / 2:
        say("warning: that is near random: the weights were not loaded, or the tokenizer is not the model's")


def load_meta(cfg: SftRun) -> Any:
    """The plain model on the meta device, whose modules have the names that adapter targets select."""
    from rayft.models.load import build, read_config

    return build(cfg.model, read_config(cfg.model), torch.float32)


def _batch(documents: list[list[int]]) -> Batch:
    tokens = np.concatenate([np.array(document, np.int32) for document in documents])
    lengths = np.array([len(document) for document in documents], np.int32)
    row = Row(0, tokens, np.ones(len(tokens), np.float32), lengths, np.zeros(len(documents), np.int32), len(tokens))
    return collate([row], [0], capacity=len(documents), step=0)


def _scores(model: Any, batch: Batch) -> Tensor:
    model.eval()
    with torch.no_grad():
        logprobs = model.score(batch, "logprobs").logprobs
    fsdp.reshard_root(model)
    assert isinstance(logprobs, Tensor)
    return logprobs.float().cpu()


def _plain_scores(plain: Any, document: list[int]) -> Tensor:
    tokens = torch.tensor(document, device=plain.device)[None]
    with torch.no_grad():
        logits = plain(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    return torch.log_softmax(logits, -1).gather(-1, tokens[0, 1:, None])[:, 0].cpu()


def _compare(what: str, one: Tensor, other: Tensor, cfg: SftRun, session: Session, say: Callable[[str], None]) -> None:
    worst = (one - other).abs().max().item()
    limit = TOLERANCE[compute_dtype(cfg.model, session.device.split(":")[0])]
    say(f"{what}: log-probabilities differ by at most {worst:.1e} (limit {limit})")
    if not worst <= limit:
        raise TrainingError(
            "model.path",
            cfg.model.path,
            f"{what}: log-probabilities differ by {worst:.2e}",
            "Report it with the versions of transformers and torch; do not train this model packed",
        )
