"""Checks of packed attention on any device: against float64 document by document, against itself in other surroundings, isolation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.checks import assert_as_exact_as, assert_equal, poisoned_memory, randn, results
from rayft_kernels.attention.op import document_bounds, packed_attention


@dataclass(frozen=True)
class Case:
    """Documents and heads."""

    lengths: tuple[int, ...]
    dim: int
    heads: int = 4
    kv_heads: int = 2
    window: int | None = None
    softcap: float | None = None
    scale: float | None = None

    @property
    def name(self) -> str:
        """Of a check."""
        return f"D{self.dim} {self.heads}/{self.kv_heads} {len(self.lengths)}x{max(self.lengths)} w{self.window} c{self.softcap}"

    @property
    def tokens(self) -> int:
        """Of all documents."""
        return sum(self.lengths)

    def tensors(self, device: str, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        """q, k and v as views of one projection."""
        heads = self.heads + 2 * self.kv_heads
        packed = randn(self.tokens, heads, self.dim, device=device, dtype=dtype, seed=seed)
        return list(packed.split((self.heads, self.kv_heads, self.kv_heads), 1))

    def grad(self, device: str, dtype: torch.dtype) -> Tensor:
        """Of the output."""
        return randn(self.tokens, self.heads, self.dim, device=device, dtype=dtype, seed=9)

    def bounds(self, device: str) -> tuple[Tensor, Tensor]:
        """Of each token's document, from padded boundaries."""
        padded = [*accumulate(self.lengths, initial=0), self.tokens, self.tokens]
        return document_bounds(torch.tensor(padded, dtype=torch.int32, device=device), self.tokens)

    def ours(self, device: str) -> Callable[..., tuple[Tensor, Tensor]]:
        """The op as a function of q, k and v."""
        longest = max(self.lengths) if len(self.lengths) > 1 else None
        numbers = {"window": self.window, "softcap": self.softcap, "scale": self.scale, "longest": longest}
        return partial(packed_attention, bounds=self.bounds(device), **numbers)


ODD = (1, 15, 16, 17, 31, 33, 1, 1, 64, 130, 128, 127, 300, 5)
LONG = (1030, 3, 700, 315)


def cases(dim: int, long: bool = True) -> tuple[Case, ...]:
    """Short and uneven documents, windows beside their lengths, groups, caps, one document."""
    found = (
        Case(ODD, dim),
        Case(ODD, dim, window=2),
        Case(ODD, dim, window=128, heads=3, kv_heads=3),
        Case(ODD, dim, window=129, softcap=3.0, scale=0.2),
        Case((257,), dim, heads=8, kv_heads=1),
    )
    return (*found, Case(LONG, dim, window=301), Case((2048,), dim, softcap=20.0), Case(LONG, dim, heads=8)) if long else found


def written_out(q: Tensor, k: Tensor, v: Tensor, *, case: Case) -> tuple[Tensor, Tensor]:
    """The op in plain torch, document by document."""
    groups, outs, lses = case.heads // case.kv_heads, [], []
    for a, b, c in zip(*(x.transpose(0, 1).split(case.lengths, 1) for x in (q, k, v)), strict=True):
        b, c = (x.repeat_interleave(groups, 0) for x in (b, c))
        scores = a @ b.transpose(-1, -2) * (case.dim**-0.5 if case.scale is None else case.scale)
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril()
        seen = seen if case.window is None else seen.triu(1 - case.window)
        scores = scores.masked_fill(~seen, float("-inf"))
        lses.append(torch.logsumexp(scores.to(torch.promote_types(q.dtype, torch.float32)), -1))
        outs.append(torch.softmax(scores, -1) @ c)
    return torch.cat(outs, 1).transpose(0, 1), torch.cat(lses, 1)


def check_error(case: Case, dtype: torch.dtype, device: str) -> None:
    """At most twice the error of torch in the same type, with a gradient of lse and without.

    Six times in float32, where autograd of a softmax loses less than `sums` do: its two terms come from one product.
    """
    times = 6.0 if dtype == torch.float32 else 2.0
    tensors, grad = case.tensors(device, dtype), case.grad(device, dtype)
    lse_grad = randn(case.heads, case.tokens, device=device, dtype=torch.float32, seed=5)
    reference = partial(written_out, case=case)
    wide = [t.double() for t in tensors]
    ours = results(case.ours(device), tensors, [grad, lse_grad])
    assert_as_exact_as(ours, results(reference, tensors, [grad, lse_grad]), results(reference, wide, [grad, lse_grad]), times)
    ours, torchs, exact = (
        results(lambda *qkv, fn=fn: fn(*qkv)[0], given, [grad])
        for fn, given in ((case.ours(device), tensors), (reference, tensors), (reference, wide))
    )
    assert_as_exact_as(ours, torchs, exact, times)


def check_twice(case: Case, dtype: torch.dtype, device: str) -> None:
    """Equal to the bit on memory full of NaN, on copies, on other strides, and with an expanded gradient written out."""
    tensors, lse_grad = case.tensors(device, dtype), torch.ones((), device=device).expand(case.heads, case.tokens)
    grad = torch.ones((), device=device, dtype=dtype).expand(case.tokens, case.heads, case.dim)
    first = results(case.ours(device), tensors, [grad, lse_grad])
    with poisoned_memory():
        assert_equal(results(case.ours(device), tensors, [grad, lse_grad]), first)
    assert_equal(results(case.ours(device), [t.contiguous() for t in tensors], [grad.contiguous(), lse_grad.contiguous()]), first)
    heads_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in tensors]
    columns_apart = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in tensors]
    for strided in (heads_first, columns_apart):
        assert_equal(results(case.ours(device), strided, [grad, lse_grad]), first)


def check_isolation(case: Case, dtype: torch.dtype, device: str) -> None:
    """Other numbers in one document change nothing in the others, to the bit."""
    changed = max(range(len(case.lengths)), key=lambda index: case.lengths[index])
    begin = sum(case.lengths[:changed])
    kept = [*range(begin), *range(begin + case.lengths[changed], case.tokens)]
    tensors, grad = case.tensors(device, dtype), case.grad(device, dtype)
    others = case.tensors(device, dtype, seed=1)
    for t, other in zip(others, tensors, strict=True):
        t[kept] = other[kept]
    for a, b in zip(*(results(lambda *qkv: case.ours(device)(*qkv)[0], x, [grad]) for x in (tensors, others)), strict=True):
        assert_equal([a[kept]], [b[kept]])
        assert not torch.equal(a, b)


def check_operator(case: Case, device: str) -> None:
    """torch's own checks of schema, fake tensors and autograd of the operators."""
    q, k, v = (t.detach().requires_grad_() for t in case.tensors(device, torch.float32))
    ops, numbers = torch.ops.rayft_kernels, (0.3, case.window, case.softcap, 20)
    torch.library.opcheck(ops.packed_attention.default, (q, k, v, *case.bounds(device), *numbers))
    out, lse = ops.packed_attention(q, k, v, *case.bounds(device), *numbers)
    tensors = (case.grad(device, torch.float32), None, *(t.detach() for t in (q, k, v, out, lse)))
    torch.library.opcheck(ops.packed_attention_backward.default, (*tensors, *case.bounds(device), *numbers))


def check_surroundings(case: Case, device: str, backend: str) -> None:
    """Compiled without a graph break or checkpointed: the same numbers."""
    tensors, grad, bounds = case.tensors(device, torch.float32), case.grad(device, torch.float32), case.bounds(device)

    def fn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, bounds, window=case.window, softcap=case.softcap, scale=case.scale)[0]

    plain = results(fn, tensors, [grad])
    assert_equal(results(torch.compile(fn, fullgraph=True, backend=backend), tensors, [grad]), plain)
    assert_equal(results(partial(checkpoint, fn, use_reentrant=False), tensors, [grad]), plain)


def check_large(device: str) -> None:
    """More than 2^31 elements of q: the last documents are those of a small call."""
    for dim, heads in ((256, 32), (512, 16)):
        tokens = 2**18 + 1024
        case, small = (Case((128,) * (count // 128), dim, heads, 1) for count in (tokens, 1024))
        generator = torch.Generator(device).manual_seed(0)
        q, k, v = (torch.randn(tokens, n, dim, generator=generator, device=device, dtype=torch.bfloat16) for n in (heads, 1, 1))
        whole = results(lambda *qkv, case=case: case.ours(device)(*qkv)[0], [q, k, v], [q])
        last = [t[-1024:] for t in (q, k, v)]
        assert_equal([t[-1024:] for t in whole], results(lambda *qkv, case=small: case.ours(device)(*qkv)[0], last, last[:1]))
        del whole, q


def checks(
    device: str, dtypes: tuple[torch.dtype, ...], dims: tuple[int, ...], backend: str = "inductor", long: bool = True
) -> dict[str, Callable[[], None]]:
    """Every check by name; that of memory beyond 2^31 elements is left to the caller."""
    found: dict[str, Callable[[], None]] = {}
    for dtype in dtypes:
        kind = str(dtype).removeprefix("torch.")
        for dim in dims:
            for case in cases(dim, long):
                found[f"attention error {kind} {case.name}"] = partial(check_error, case, dtype, device)
            for case in (Case(ODD, dim), Case(ODD, dim, window=40, heads=2)):
                found[f"attention twice {kind} {case.name}"] = partial(check_twice, case, dtype, device)
                found[f"attention isolation {kind} {case.name}"] = partial(check_isolation, case, dtype, device)
    small = Case((5, 1, 20), 32, window=8)
    found["attention operator"] = partial(check_operator, small, device)
    found["attention compile, checkpoint"] = partial(check_surroundings, small, device, backend)
    return found
