"""The head operations against logits written out in float64."""

from __future__ import annotations

import pytest
import torch

from rayft_kernels import token_logprobs, weighted_nll_sum
from rayft_kernels.linear_cross_entropy import op

VOCAB, HIDDEN, ROWS = 37, 12, 23


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many chunks":
        monkeypatch.setattr(op, "CHUNK_BYTES", 4 * VOCAB * 5)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=g).to(dtype).requires_grad_()
    bias = torch.randn(VOCAB, generator=g).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (ROWS,), generator=g)
    loss_weights = torch.rand(ROWS, generator=g)
    loss_weights[::4] = 0
    return hidden, weight, bias, targets, loss_weights


def reference_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None, scale: float
) -> torch.Tensor:
    u = hidden.double() @ weight.double().t()
    if bias is not None:
        u = u + bias.double()
    if softcap is not None:
        u = softcap * torch.tanh(u / softcap)
    return scale * u


OPTIONS = [
    {},
    {"softcap": 5.0},
    {"logit_scale": 0.7},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"softcap": 3.0, "logit_scale": 1.3, "label_smoothing": 0.2, "z_loss": 1e-3},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("chunks")
def test_weighted_nll_sum_equals_written_out(options: dict[str, float], with_bias: bool) -> None:
    hidden, weight, bias, targets, loss_weights = inputs()
    used = bias if with_bias else None
    total = weighted_nll_sum(hidden, weight, targets, loss_weights, bias=used, **options)
    (2.5 * total).backward()
    got = [hidden.grad, weight.grad, bias.grad if with_bias else None]

    h, w, b = (x.detach().double().requires_grad_() for x in (hidden, weight, bias))
    z = reference_logits(h, w, b if with_bias else None, options.get("softcap"), options.get("logit_scale", 1.0))
    smoothing, zeta = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    lse = torch.logsumexp(z, -1)
    nll = torch.nn.functional.cross_entropy(z, targets, reduction="none", label_smoothing=smoothing)
    expected = (loss_weights.double() * (nll + zeta * lse**2)).sum()
    (2.5 * expected).backward()

    torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(got, [h.grad, w.grad, b.grad if with_bias else None], strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"softcap": 4.0}, {"logit_scale": 0.5}])
@pytest.mark.usefixtures("chunks")
def test_token_logprobs_equals_written_out(options: dict[str, float]) -> None:
    hidden, weight, bias, targets, _ = inputs()
    g = torch.Generator().manual_seed(1)
    dlogp, dentropy = torch.randn(ROWS, generator=g), torch.randn(ROWS, generator=g)
    logprobs, entropy = token_logprobs(hidden, weight, targets, bias=bias, **options)
    (logprobs @ dlogp + entropy @ dentropy).backward()

    h, w, b = (x.detach().double().requires_grad_() for x in (hidden, weight, bias))
    logp = torch.log_softmax(reference_logits(h, w, b, options.get("softcap"), options.get("logit_scale", 1.0)), -1)
    expected_logp = logp.gather(-1, targets[:, None])[:, 0]
    expected_entropy = -(logp.exp() * logp).sum(-1)
    (expected_logp @ dlogp.double() + expected_entropy @ dentropy.double()).backward()

    torch.testing.assert_close(logprobs.double(), expected_logp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip((hidden.grad, weight.grad, bias.grad), (h.grad, w.grad, b.grad), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-5, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_zero_rows_are_fine() -> None:
    hidden, weight, _, targets, loss_weights = inputs()
    weighted_nll_sum(hidden, weight.detach(), targets, loss_weights).backward()
    assert hidden.grad is not None and weight.grad is None
    nothing = weighted_nll_sum(hidden[:0], weight, targets[:0], loss_weights[:0])
    nothing.backward()
    assert nothing.item() == 0 and weight.grad is not None and weight.grad.abs().sum() == 0


def test_bfloat16_gradients_keep_their_type_and_stay_close() -> None:
    hidden, weight, _, targets, loss_weights = inputs(torch.bfloat16)
    weighted_nll_sum(hidden, weight, targets, loss_weights).backward()
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    (loss_weights.double() * torch.nn.functional.cross_entropy(h @ w.t(), targets, reduction="none")).sum().backward()
    for mine, theirs in ((hidden.grad, h.grad), (weight.grad, w.grad)):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - theirs).norm() / theirs.norm() < 1e-2
