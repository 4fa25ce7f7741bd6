"""`rayft check MODEL`: what would go wrong with a model, found in a minute on one device."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rayft.config.schema import Kernels, SftRun
from rayft.data.reader import Row, collate
from rayft.errors import TrainingError
from rayft.models import nf4
from rayft.models.adapt import match_targets
from rayft.models.load import compute_dtype, config_of, hf_name, layers_of, load_plain, seed_of
from rayft.models.spec import spec_of
from rayft.models.tokenizer import load_tokenizer
from rayft.parallel import attention, fsdp
from rayft.parallel.mesh import build_mesh
from rayft.train.build import build_model, planned_lines
from rayft.types import Batch, Session

TEXTS = (
    "The ferry leaves the harbour at six in the morning and reaches the island before noon, unless the wind turns.",
    "To boil an egg, bring water to a boil, lower the egg in with a spoon, and wait seven minutes. Then cool it in cold water.",
    "She closed the book and looked out of the window. It had begun to snow, and the street lamps were already lit.",
)
"""Plain sentences whose loss a pretrained model must find easy."""

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""Largest difference of a token's log-probability that the compute type explains."""

SHORT = 32
"""Tokens of a row's last document, which is not halved any more."""


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
    for line in planned_lines(_with_lora(cfg), "cuda"):
        say(f"on a GPU, with adapter.type=lora: {line}")

    documents = [list(tokenizer(text, add_special_tokens=True)["input_ids"]) for text in TEXTS]
    row = _row(documents, cfg.data.seq_len, config, say)
    what = f"a row of {cfg.data.seq_len} tokens in {len(row)} packed documents against the same alone"
    _compare(what, _scores(model, _batch(row).to(session.device)), _alone(model, row, session), cfg, session, say)
    packed = _scores(model, _batch(documents).to(session.device))
    if cfg.model.init == "pretrained":
        plain = load_plain(cfg.model, compute_dtype(cfg.model, session.device.split(":")[0])).to(session.device)
        _compare(
            "rayft against transformers", packed, torch.cat([_plain_scores(plain, document) for document in documents]), cfg, session, say
        )
    loss = -packed.mean().item()
    say(f"loss on plain English: {loss:.3f}")
    if loss > math.log(config.vocab_size) / 2:
        say("warning: that is near random: the weights were not loaded, or the tokenizer is not the model's")
    del model
    if session.device == "cpu":
        say("fused kernels against plain layers: not compared, because they do not run on a CPU")
    else:
        compare_fused(_with_lora(cfg), session, row, say)


def compare_fused(cfg: SftRun, session: Session, row: list[list[int]], say: Callable[[str], None]) -> None:
    """Compare the model whose kernels are as configured with one that has none, under the same adapter, which is not zero.

    Args:
        cfg: a run with an adapter.
        session: one rank with a process group.
        row: documents.
        say: takes the finding.

    Raises:
        TrainingError: they differ by more than the compute type explains.
    """
    off = dict.fromkeys((name for name, field in Kernels.model_fields.items() if "off" in get_args(field.annotation)), "off")
    plain, fused = (
        _scores(_adapted(cfg.model_copy(update={"kernels": kernels}), session), _batch(row).to(session.device))
        for kernels in (cfg.kernels.model_copy(update=off), cfg.kernels)
    )
    _compare("fused kernels against plain layers", fused, plain, cfg, session, say)


def _adapted(cfg: SftRun, session: Session) -> Any:
    """The run's model; its adapters change something, which those that training starts from do not."""
    model = build_model(cfg, session, build_mesh(session.device.split(":")[0], 1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                own.normal_(std=0.02, generator=torch.Generator(own.device).manual_seed(seed_of(0, "check", hf_name(name))))
    return model


def _with_lora(cfg: SftRun) -> SftRun:
    return cfg.model_copy(update={"adapter": cfg.adapter.model_copy(update={"type": "lora"})})


def _row(documents: list[list[int]], seq_len: int, config: Any, say: Callable[[str], None]) -> list[list[int]]:
    """A row of that many tokens out of the documents' own."""
    window = getattr(config, "sliding_window", None)
    lengths = document_lengths(seq_len, window, getattr(config, "max_position_embeddings", seq_len))
    if window and max(lengths) <= window:
        say(f"warning: no document is longer than the sliding window of {window} tokens, use --seq-len {2 * window + 1} or more")
    words = [token for document in documents for token in document]
    return [list(itertools.islice(itertools.cycle(words), length)) for length in lengths]


def document_lengths(seq_len: int, window: int | None, longest: int) -> list[int]:
    """Lengths of the documents of a row: one below and one above a sliding window where they fit, then halves of what is left.

    Args:
        seq_len: tokens of the row.
        window: of the attention layers that have one.
        longest: tokens that a document may have.
    """
    lengths, left = list[int](), seq_len
    for length in (window // 2, window + window // 2 + 1) if window and window > 1 else ():
        if length <= min(left, longest):
            lengths.append(length)
            left -= length
    while left:
        lengths.append(min(longest, left if left <= SHORT else -(-left // 2)))
        left -= lengths[-1]
    return lengths


def _alone(model: Any, documents: list[list[int]], session: Session) -> Tensor:
    return torch.cat([_scores(model, _batch([document]).to(session.device)) for document in documents if len(document) > 1])


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
