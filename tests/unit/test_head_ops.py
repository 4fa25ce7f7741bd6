"""The head operations: the torch body against float64 and itself, and sizes of chunks. The CUDA body: numerics/test_head_kernels.py."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import check_linear_ce
from bench.check_linear_ce import MEASURED, SMALL, Case, arguments, check_error, check_terms
from families import make_batch
from rayft.models import heads
from rayft_kernels import token_logprobs, weighted_nll_sum
from rayft_kernels.linear_cross_entropy import chunks

CPU_CHECKS = check_linear_ce.checks("cpu", (torch.float32, torch.bfloat16), SMALL, "aot_eager")


@pytest.mark.parametrize("name", CPU_CHECKS)
def test_check(name: str) -> None:
    CPU_CHECKS[name]()


@pytest.mark.parametrize("case", [case for case in SMALL if case.rows > 1 and not case.lean], ids=lambda case: case.name)
def test_many_chunks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4 * case.vocab * 5)
    for dtype in (torch.float32, torch.bfloat16):
        check_error(case, dtype, "cpu")
        check_terms(replace(case, smoothing=0.0, z_loss=0.0), dtype, "cpu")


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_derivative_in_float64(softcap: float | None) -> None:
    inputs, targets, loss_weights = arguments(Case(rows=6, hidden=5, vocab=11, bias=True), "cpu", torch.float64)
    hidden, weight, bias = inputs

    def loss(*tensors: torch.Tensor) -> torch.Tensor:
        h, w, b = tensors
        options = {"softcap": softcap, "logit_scale": 0.7, "label_smoothing": 0.1, "z_loss": 1e-2}
        return weighted_nll_sum(h, w, targets, loss_weights.double(), bias=b, **options)

    leaves = [x.clone().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(loss(*leaves), leaves)
    steps = [1e-5 * torch.randn_like(x) for x in inputs]
    ahead, behind = (loss(*(x + sign * step for x, step in zip(inputs, steps, strict=True))) for sign in (1, -1))
    slope = sum((grad * step).sum() for grad, step in zip(grads, steps, strict=True))
    torch.testing.assert_close((ahead - behind) / 2, slope, rtol=1e-7, atol=0)

    terms = partial(token_logprobs, softcap=softcap, logit_scale=1.3)
    assert torch.autograd.gradcheck(lambda h, w, b: terms(h, w, targets, bias=b), [x.requires_grad_() for x in (hidden, weight, bias)])


@pytest.mark.parametrize("lean", [False, True])
def test_the_model_passes_on_how_its_loss_is_made(lean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(torch.nn.Module):
        """Hidden states that are given, and a head."""

        config = SimpleNamespace(get_text_config=SimpleNamespace)

        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(4, 257, bias=False)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

        def base_model(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
            return SimpleNamespace(last_hidden_state=torch.ones(*input_ids.shape, 4))

    found: list[bool] = []
    monkeypatch.setattr(heads, "weighted_nll_rows", lambda *args, **options: found.append(options["lean"]) or args)
    model: Any = Model()
    heads.attach_score(model, lambda _: None, 0, lean=lean)
    model.score(make_batch([[64]]), "weighted_nll")
    assert found == [lean]


def test_zero_rows_give_a_zero_gradient() -> None:
    weight = torch.ones(4, 3, requires_grad=True)
    weighted_nll_sum(torch.ones(0, 3), weight, torch.ones(0, dtype=torch.long), torch.ones(0)).backward()
    assert weight.grad is not None and weight.grad.eq(0).all()


@given(st.integers(0, 300_000), st.integers(64, 8192), st.integers(8, 300_000), st.sampled_from([chunks.FAST_BYTES, chunks.LEAN_BYTES]))
@settings(max_examples=200, deadline=None)
def test_chunks_fit_and_are_even(rows: int, hidden: int, vocab: int, budget: int) -> None:
    step = chunks.row_chunk(rows, hidden, vocab, budget, torch.bfloat16)
    assert step == 128 or step * chunks.row_bytes(hidden, vocab, torch.bfloat16) <= budget
    pieces = max(1, -(-rows // step))
    assert pieces * step - rows < 128 * pieces + 128
    columns = chunks.column_chunk(rows, hidden, vocab, budget, 2)
    assert columns <= 512 or rows * (2 * columns + 4 * hidden) <= budget


def test_planned_bytes_of_the_benchmarks() -> None:
    plan = partial(chunks.weighted_nll_bytes, dtype=torch.bfloat16)
    for tokens, hidden, vocab in MEASURED:
        sum_of_head = 4 * hidden * vocab
        assert plan(tokens, hidden, vocab, head_trained=True) <= sum_of_head + 0.6 * 2**30
        assert plan(tokens, hidden, vocab, head_trained=False) <= 0.6 * 2**30
        assert plan(tokens, hidden, vocab, head_trained=True, lean=True) <= 0.35 * 2**30
