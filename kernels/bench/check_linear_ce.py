"""Checks of the head operations on any device: against float64, against themselves in other surroundings, beyond 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from bench.checks import assert_as_exact_as, assert_equal, poisoned_memory, randn, results
from rayft_kernels import token_logprobs, weighted_nll_rows, weighted_nll_sum
from rayft_kernels.linear_cross_entropy.chunks import weighted_nll_bytes


@dataclass(frozen=True)
class Case:
    """A head call: M rows of H numbers, V entries, and the options."""

    rows: int = 33
    hidden: int = 40
    vocab: int = 203
    bias: bool = False
    softcap: float | None = None
    scale: float = 1.0
    smoothing: float = 0.0
    z_loss: float = 0.0
    lean: bool = False
    size: float = 1.0
    """Standard deviation of the logits."""

    @property
    def name(self) -> str:
        """Shape and the options that are on."""
        on = [key for key in ("bias", "softcap", "smoothing", "z_loss", "lean") if getattr(self, key)]
        return f"{self.rows}x{self.hidden}x{self.vocab} {' '.join(on)}".strip()


MEASURED = ((8192, 2048, 128256), (8192, 1024, 151936), (16384, 4096, 128256))
"""Rows, hidden size and vocabulary of the benchmarks."""
SMALL = (
    Case(),
    Case(rows=1, vocab=5),
    Case(rows=0),
    Case(bias=True, softcap=5.0, scale=0.7, size=4.0),
    Case(bias=True, smoothing=0.1, z_loss=1e-2),
    Case(bias=True, softcap=3.0, scale=1.3, smoothing=0.2, z_loss=1e-3, lean=True),
    Case(lean=True, size=4.0),
)
LARGE = (
    Case(199, 64, 32003),
    Case(760, 192, 1128, lean=True),
    Case(1128, 256, 50257, bias=True, softcap=30.0, size=8.0),
    Case(5 * 123, 760, 4096, smoothing=0.1, z_loss=1e-4),
    Case(4096, 512, 128256, size=3.0),
    Case(2048, 512, 151936, size=3.0, lean=True),
    Case(512, 256, 262144, softcap=30.0, size=5.0),
)


def arguments(case: Case, device: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Differentiable inputs (hidden, weight, perhaps bias), targets and loss weights, a quarter of which are 0."""
    make = partial(randn, device=device, dtype=dtype)
    inputs = [make(case.rows, case.hidden, seed=1), make(case.vocab, case.hidden, seed=2) * (case.size / case.hidden**0.5)]
    if case.bias:
        inputs.append(make(case.vocab, seed=3))
    generator = torch.Generator().manual_seed(4)
    targets = torch.randint(0, case.vocab, (case.rows,), generator=generator)
    loss_weights = torch.rand(case.rows, generator=generator) * (torch.arange(case.rows) % 4 != 3)
    return inputs, targets.to(device), loss_weights.to(device)


def logits(case: Case, hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """z written out: raw logits in the inputs' type as a Linear makes them, the rest at least float32."""
    u = functional.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))
    u = u if bias is None else u + bias
    u = u if case.softcap is None else case.softcap * torch.tanh(u / case.softcap)
    return case.scale * u


def written_out(case: Case, targets: Tensor, loss_weights: Tensor, *inputs: Tensor) -> Tensor:
    """Losses of the rows [M] in plain torch."""
    z = logits(case, *inputs)
    nll = functional.cross_entropy(z, targets, reduction="none", label_smoothing=case.smoothing)
    return loss_weights * (nll + case.z_loss * torch.logsumexp(z, -1) ** 2)


def ours(case: Case, targets: Tensor, loss_weights: Tensor, *inputs: Tensor) -> Tensor:
    """The operator, 2.5 times its sum."""
    options = {"softcap": case.softcap, "logit_scale": case.scale, "label_smoothing": case.smoothing, "z_loss": case.z_loss}
    hidden, weight, *bias = inputs
    return 2.5 * weighted_nll_sum(hidden, weight, targets, loss_weights, bias=bias[0] if bias else None, lean=case.lean, **options)


def rows_of(case: Case, targets: Tensor, loss_weights: Tensor, *inputs: Tensor) -> Tensor:
    """What each row adds to the operator's sum, which the gradients are made beside."""
    options = {"softcap": case.softcap, "logit_scale": case.scale, "label_smoothing": case.smoothing, "z_loss": case.z_loss}
    hidden, weight, *bias = (x.detach().requires_grad_() for x in inputs)
    total, rows = weighted_nll_rows(hidden, weight, targets, loss_weights, bias=bias[0] if bias else None, lean=case.lean, **options)
    assert not rows.requires_grad and total.requires_grad
    torch.testing.assert_close(rows.sum(), total.detach(), rtol=1e-5, atol=1e-5)
    return rows


def terms(case: Case, targets: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The other operator."""
    hidden, weight, *bias = inputs
    return token_logprobs(hidden, weight, targets, bias=bias[0] if bias else None, softcap=case.softcap, logit_scale=case.scale)


def terms_written_out(case: Case, targets: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies in plain torch."""
    logp = torch.log_softmax(logits(case, *inputs), -1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def check_error(case: Case, dtype: torch.dtype, device: str) -> None:
    """Gradients at most twice, the loss three times as far from float64 as torch in the same type."""
    inputs, targets, loss_weights = arguments(case, device, dtype)
    one, ones = torch.ones((), device=device), torch.full((case.rows,), 2.5, device=device)
    with poisoned_memory():
        got = results(partial(ours, case, targets, loss_weights), inputs, [one])
    torchs = results(partial(written_out, case, targets, loss_weights), inputs, [ones])
    exact = results(partial(written_out, case, targets, loss_weights.double()), [x.double() for x in inputs], [ones])
    # Errors of single rows, whose signs cancel in the sum by luck.
    allowed = 3 * 2.5 * (torchs[0] - exact[0]).norm().item() + 1e-6 * (1 + 2.5 * exact[0].sum().item())
    error = (got[0] - 2.5 * exact[0].sum()).abs().item()
    assert error <= allowed, f"loss: error {error:.3e}, allowed {allowed:.3e}"
    error = 2.5 * (rows_of(case, targets, loss_weights, *inputs) - exact[0]).norm().item()
    assert error <= allowed, f"losses of rows: error {error:.3e}, allowed {allowed:.3e}"
    assert_as_exact_as(got[1:], torchs[1:], exact[1:])


def check_terms(case: Case, dtype: torch.dtype, device: str) -> None:
    """As far from float64 as torch in the same type: twice, in float32 4 times, since log sum exp is kept as one float32 number."""
    inputs, targets, _ = arguments(case, device, dtype)
    grads = [randn(case.rows, device=device, dtype=torch.float32, seed=5), torch.ones((), device=device).expand(case.rows)]
    with poisoned_memory():
        got = results(partial(terms, case, targets), inputs, grads)
    reference = partial(terms_written_out, case, targets)
    exact = results(reference, [x.double() for x in inputs], grads)
    assert_as_exact_as(got, results(reference, inputs, grads), exact, times=4.0 if dtype == torch.float32 else 2.0)


def check_frozen(case: Case, device: str) -> None:
    """Every subset of inputs that want a gradient gives the gradients of the whole, within the rounding of other sums."""
    for lean in (False, True):
        case = replace(case, lean=lean)
        inputs, targets, loss_weights = arguments(case, device, torch.float32)
        whole = results(partial(ours, case, targets, loss_weights), inputs, [torch.ones((), device=device)])[1:]
        for subset in range(8):
            leaves = [x.clone().requires_grad_(bool(subset >> place & 1)) for place, x in enumerate(inputs)]
            total = ours(case, targets, loss_weights, *leaves)
            if subset:
                total.backward()
            for leaf, expected in zip(leaves, whole, strict=True):
                assert (leaf.grad is not None) == leaf.requires_grad
                if leaf.grad is not None:
                    torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-5)


def check_twice(dtype: torch.dtype, device: str) -> None:
    """Equal to the bit: run again, in memory full of NaN, and from strided inputs."""
    for case in (Case(), Case(lean=True), Case(bias=True, softcap=5.0, smoothing=0.1, z_loss=1e-3)):
        inputs, targets, loss_weights = arguments(case, device, dtype)
        run = partial(results, partial(ours, case, targets, loss_weights), grads=[torch.ones((), device=device)])
        first = run(inputs)
        with poisoned_memory():
            assert_equal(run(inputs), first)
        wide = [torch.cat((x, x), -1)[:, : x.shape[1]] if x.dim() == 2 else x for x in inputs]
        for a, b in zip(run(wide), first, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def check_rising(dtype: torch.dtype, device: str) -> None:
    """Logits that rise along the vocabulary by hundreds: what is written before a new maximum is scaled down."""
    case = Case(rows=4, hidden=16, vocab=1000)
    hidden = torch.ones(4, 16, device=device, dtype=dtype) * torch.tensor([[1.0], [4.0], [-4.0], [0.0]], device=device, dtype=dtype)
    weight = torch.linspace(-8, 8, 1000, device=device)[:, None].expand(-1, 16).to(dtype).contiguous()
    targets, loss_weights = torch.tensor([999, 0, 5, 500], device=device), torch.ones(4, device=device)
    got = results(partial(ours, case, targets, loss_weights), [hidden, weight], [torch.ones((), device=device)])
    ones = torch.full((4,), 2.5, device=device)
    exact = results(partial(written_out, case, targets, loss_weights.double()), [hidden.double(), weight.double()], [ones])
    exact[0] = 2.5 * exact[0].sum()
    for a, b in zip(got, exact, strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error < max(1e-4, 4 * torch.finfo(dtype).eps), f"relative error {error:.2e}"


def check_operator(device: str) -> None:
    """torch's own checks of schema, fake tensors and autograd of the operators."""
    inputs, targets, loss_weights = arguments(Case(rows=5, hidden=8, vocab=19, bias=True), device, torch.float32)
    hidden, weight, bias = (x.requires_grad_() for x in inputs)
    ops = torch.ops.rayft_kernels
    for needs, lean in (([True] * 3, False), ([True, False, False], False), ([True] * 3, True)):
        tensors = (hidden, weight.detach().requires_grad_(needs[1]), targets, loss_weights, bias.detach().requires_grad_(needs[2]))
        options = (None, 1.0, 0.1, 1e-3, needs, lean)
        torch.library.opcheck(ops.weighted_nll.default, (*tensors, *options), test_utils=SCHEMA_AND_FAKE)
    torch.library.opcheck(ops.scaled.default, (weight.detach(), loss_weights[0], torch.bfloat16))
    torch.library.opcheck(ops.scale_.default, (weight.detach().clone(), loss_weights[0]))
    torch.library.opcheck(ops.token_logprobs.default, (hidden, weight, targets, bias, 5.0, 0.7))
    row = loss_weights.detach()
    plain = [x.detach() for x in (hidden, weight, bias)]
    torch.library.opcheck(
        ops.token_logprobs_backward.default, (row, row, *plain[:2], targets, plain[2], row, row, None, 1.0, [True, False, True])
    )


SCHEMA_AND_FAKE = ("test_schema", "test_autograd_registration", "test_faketensor")
"""The fourth check differentiates every output; the gradients that weighted_nll returns are not differentiable."""


def check_surroundings(device: str, backend: str) -> None:
    """Compiled without a graph break, checkpointed, under autocast: the same numbers. A second backward is refused."""
    case = Case(bias=True, softcap=5.0)
    inputs, targets, loss_weights = arguments(case, device, torch.float32)
    one = torch.ones((), device=device)
    loss, pair = partial(ours, case, targets, loss_weights), partial(terms, case, targets)
    plain, plain_pair = results(loss, inputs, [one]), results(pair, inputs, [loss_weights, loss_weights])
    compiled = partial(torch.compile, fullgraph=True, backend=backend)
    assert_equal(results(compiled(lambda *x: loss(*x)), inputs, [one]), plain)
    assert_equal(results(compiled(lambda *x: pair(*x)), inputs, [loss_weights, loss_weights]), plain_pair)
    assert_equal(results(partial(checkpoint, loss, use_reentrant=False), inputs, [one]), plain)
    low = [x.bfloat16() for x in inputs]
    with torch.autocast(device, torch.bfloat16):
        cast = results(loss, inputs, [one])
    assert_equal([g.bfloat16() for g in cast[1:]], results(loss, low, [one])[1:])
    leaves = [x.clone().requires_grad_() for x in inputs]
    total = loss(*leaves)
    total.backward(retain_graph=True)
    try:
        total.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        raise AssertionError("a second backward went unnoticed")


def check_memory(case: Case, device: str, trained: bool) -> None:
    """Peak above inputs and gradients is at most what weighted_nll_bytes says, plus 1%; 0.61 GiB, or 0.35 if lean, beside the sum."""
    hidden, weight = (torch.randn(n, case.hidden, device=device, dtype=torch.bfloat16) for n in (case.rows, case.vocab))
    targets, loss_weights = torch.randint(0, case.vocab, (case.rows,), device=device), torch.ones(case.rows, device=device)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(trained)]
    ours(case, targets, loss_weights, *leaves).backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for leaf in leaves:
        leaf.grad = None
    torch.cuda.reset_peak_memory_stats()
    ours(case, targets, loss_weights, *leaves).backward()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    planned = weighted_nll_bytes(case.rows, case.hidden, case.vocab, torch.bfloat16, head_trained=trained, lean=case.lean)
    print(f"  {case.name} trained={trained}: peak {peak / 2**20:.0f} MiB, planned {planned / 2**20:.0f} MiB")
    head = 4 * case.hidden * case.vocab if trained and not case.lean else 0
    assert peak <= 1.01 * planned + 2**20
    assert peak <= head + (0.35 if case.lean and trained else 0.61) * 2**30


def check_large(device: str) -> None:
    """More than 2^31 elements of hidden states: the last rows are those of a small call."""
    case = Case(2**31 // 4096 + 8, 4096, 512)
    hidden = torch.empty(case.rows, 4096, device=device, dtype=torch.bfloat16).normal_()
    weight = torch.empty(case.vocab, 4096, device=device, dtype=torch.bfloat16).normal_(std=0.02)
    targets, loss_weights = torch.randint(0, case.vocab, (case.rows,), device=device), torch.ones(case.rows, device=device)
    for which in (case, replace(case, lean=True)):
        whole, tail = (
            results(partial(ours, which, targets[rows], loss_weights[rows]), [hidden[rows], weight], [loss_weights[0]])
            for rows in (slice(None), slice(-8, None))
        )
        torch.testing.assert_close(whole[1][-8:], tail[1], rtol=2e-2, atol=1e-3)
        assert all(torch.isfinite(x).all() for x in whole)


def checks(device: str, dtypes: tuple[torch.dtype, ...], cases: tuple[Case, ...], backend: str) -> dict[str, Callable[[], None]]:
    """Every check that needs little memory, by name."""
    found: dict[str, Callable[[], None]] = {}
    for dtype in dtypes:
        kind = str(dtype).removeprefix("torch.")
        for case in cases:
            found[f"linear_ce error {kind} {case.name}"] = partial(check_error, case, dtype, device)
            if not (case.lean or case.smoothing or case.z_loss):
                found[f"linear_ce terms {kind} {case.name}"] = partial(check_terms, case, dtype, device)
        found[f"linear_ce twice {kind}"] = partial(check_twice, dtype, device)
        found[f"linear_ce rising {kind}"] = partial(check_rising, dtype, device)
    found["linear_ce frozen"] = partial(check_frozen, Case(bias=True, softcap=4.0), device)
    found["linear_ce operators"] = partial(check_operator, device)
    found["linear_ce compile, checkpoint, autocast"] = partial(check_surroundings, device, backend)
    return found


def gpu_checks() -> dict[str, Callable[[], None]]:
    """All checks in two types, large shapes in bfloat16, some in float16, memory, and hidden states of more than 2^31 elements."""
    found = checks("cuda", (torch.bfloat16, torch.float32), SMALL, "inductor")
    for case in LARGE:
        found[f"linear_ce error {case.name}"] = partial(check_error, case, torch.bfloat16, "cuda")
    for case in (SMALL[0], SMALL[4], SMALL[6]):
        found[f"linear_ce error float16 {case.name}"] = partial(check_error, case, torch.float16, "cuda")
    found["linear_ce terms large"] = partial(check_terms, LARGE[4], torch.bfloat16, "cuda")
    for shape in MEASURED:
        for trained, lean in ((True, False), (True, True), (False, False)):
            name = f"linear_ce memory {shape} trained={trained} lean={lean}"
            found[name] = partial(check_memory, Case(*shape, lean=lean), "cuda", trained)
    found["linear_ce above 2^31 elements"] = partial(check_large, "cuda")
    return found
