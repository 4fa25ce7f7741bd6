"""The in-process engine: its log-probabilities, seeds, ends, and what a push in mid-generation does."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from families import write_model
from rayft.rollout.engine import EngineOptions
from rayft.rollout.local_engine import LocalEngine, sample
from rayft.types import Completion

CONTEXT = 96
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15], [5, 6, 7, 9], [200]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of one configuration."""
    root = tmp_path_factory.mktemp("models")
    return [write_model("llama_tied", root / name, seed) for seed, name in enumerate("ab")]


def engine(folder: Path, **options: Any) -> LocalEngine:
    return LocalEngine(EngineOptions(folder, "local", "float32", **({"context": CONTEXT} | options)))


def reference(folder: Path, prompt: list[int], tokens: tuple[int, ...], temperature: float = 1.0) -> torch.Tensor:
    """float32 [n, V]: logits / temperature at each generated position, without any cache."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float() / temperature


def draws(made: LocalEngine, prompts: list[list[int]], **sampling: Any) -> list[Completion]:
    """All prompts at once."""

    async def run() -> list[Completion]:
        options = {"max_tokens": 24, "temperature": 1.0, "top_p": 1.0} | sampling
        return await asyncio.gather(*[made.generate(f"r{i}", prompt, seed=i, **options) for i, prompt in enumerate(prompts)])

    return asyncio.run(run())


def test_logprobs_are_those_of_the_distribution_sampled_from(folders: list[Path]) -> None:
    for options in ({}, {"temperature": 0.6, "top_p": 0.7}, {"temperature": 0.0}):
        for prompt, drawn in zip(PROMPTS, draws(engine(folders[0]), PROMPTS, **options), strict=True):
            logprobs = reference(folders[0], prompt, drawn.tokens, options.get("temperature") or 1.0).log_softmax(-1)
            if "top_p" in options:
                ordered, order = logprobs.exp().sort(-1, descending=True)
                kept = torch.zeros_like(logprobs, dtype=torch.bool).scatter(-1, order, ordered.cumsum(-1) - ordered < 0.7)
                logprobs = logprobs.masked_fill(~kept, float("-inf")).log_softmax(-1)
            chosen = logprobs[torch.arange(24), torch.tensor(drawn.tokens)]
            torch.testing.assert_close(torch.tensor(drawn.logprobs), chosen, atol=2e-5, rtol=0)
            assert drawn.versions == (("0.0", 0, 24),) and drawn.finish_reason == "length"
            if options == {"temperature": 0.0}:
                assert drawn.tokens == tuple(logprobs.argmax(-1).tolist())


def test_a_draw_does_not_depend_on_its_neighbours(folders: list[Path]) -> None:
    together = draws(engine(folders[0]), PROMPTS)
    few_at_once = draws(engine(folders[0], concurrency=2), PROMPTS)
    assert [c.tokens for c in together] == [c.tokens for c in few_at_once]
    assert len({c.tokens for c in draws(engine(folders[0]), [PROMPTS[0]] * 3)}) == 3


def test_completions_end_with_a_stop_token(folders: list[Path]) -> None:
    free = draws(engine(folders[0]), PROMPTS)
    stop = free[0].tokens[7]
    stopped = draws(engine(folders[0], stop_tokens=(stop,)), PROMPTS)
    first = free[0].tokens.index(stop)
    assert stopped[0].tokens == free[0].tokens[: first + 1] and stopped[0].finish_reason == "stop"


def test_a_push_in_mid_generation_marks_its_place(folders: list[Path]) -> None:
    """Tokens before it are the old model's, tokens after it the new one's, on the whole text before them."""
    from safetensors.torch import load_file

    weights = folders[1] / "model.safetensors"
    table = [[name, "float32", list(tensor.shape), 0] for name, tensor in load_file(weights).items()]

    async def run() -> Completion:
        made = engine(folders[0])
        drawing = asyncio.create_task(made.generate("r", PROMPTS[1], max_tokens=60, temperature=1.0, top_p=1.0, seed=3))
        while "r" not in made._requests or len(made._requests["r"].tokens) < 20:
            await asyncio.sleep(0.001)
        await made.pause()
        standing = len(made._requests["r"].tokens)
        start = {"phase": "start", "transport": "disk", "place": {}, "verify": True, "adapter": None, "tensors": len(table)}
        await made.receive("1.1", start)
        await made.receive("1.1", {"phase": "chunk", "table": table, "file": str(weights)})
        await made.receive("1.1", {"phase": "finish"})
        assert len(made._requests["r"].tokens) == standing and await made.load() == {
            "running": 1,
            "waiting": 0,
            "kv_use": 0.0,
            "preemptions": 0,
        }
        await made.resume()
        return await drawing

    drawn = asyncio.run(run())
    (old, start, middle), (new, again, end) = drawn.versions
    assert (old, start, new, again, end) == ("0.0", 0, "1.1", middle, 60) and 0 < middle < 60
    for folder, span in zip(folders, (slice(0, middle), slice(middle, 60)), strict=True):
        logprobs = reference(folder, PROMPTS[1], drawn.tokens).log_softmax(-1)[torch.arange(60), torch.tensor(drawn.tokens)]
        torch.testing.assert_close(torch.tensor(drawn.logprobs)[span], logprobs[span], atol=2e-5, rtol=0)


def test_requests_can_be_refused_cancelled_and_cut_off(folders: list[Path]) -> None:
    async def run() -> None:
        made = engine(folders[0])
        options = {"temperature": 1.0, "top_p": 1.0, "seed": 0}
        with pytest.raises(ValueError, match="do not fit"):
            await made.generate("long", [1] * 90, max_tokens=7, **options)
        await made.pause()
        given_up, stays = (asyncio.create_task(made.generate(name, [1, 2], max_tokens=8, **options)) for name in ("a", "b"))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="in flight"):
            await made.generate("a", [1, 2], max_tokens=8, **options)
        given_up.cancel()
        await made.resume()
        assert len((await stays).tokens) == 8
        assert (await made.load())["running"] == 0
        await made.pause()
        cut = asyncio.create_task(made.generate("c", [1, 2], max_tokens=8, **options))
        await asyncio.sleep(0.01)
        await made.close()
        with pytest.raises(asyncio.CancelledError):
            await cut

    asyncio.run(run())


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    draws_ = [sample(logits, 0.5, 0.95, generator) for _ in range(4000)]
    probabilities = torch.softmax(logits / 0.5, -1)[:2]  # 0.865 + 0.117 are the first to reach 0.95
    probabilities /= probabilities.sum()
    counts = torch.bincount(torch.tensor([token for token, _ in draws_]), minlength=4)
    assert counts[2:].sum() == 0
    torch.testing.assert_close(counts[:2] / 4000, probabilities, atol=0.02, rtol=0)
    assert all(abs(logprob - probabilities[token].log().item()) < 1e-5 for token, logprob in draws_)
