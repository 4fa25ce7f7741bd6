"""Checks of the fused LoRA operations on any device: options against plain torch in float64, themselves, compile and checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.check_glu import ACTIVATIONS
from bench.checks import assert_as_exact_as, assert_equal, poisoned_memory, randn
from rayft_kernels import Projection, TokenDropout, lora_linears, lora_mlp
from rayft_kernels.lora import glu as inside
from rayft_kernels.lora.dropout import token_dropout

NAMES = ("bias", "a", "b", "magnitude", "lora_bias")
"""What of a projection is trained."""

OPTIONS: dict[str, dict[str, object]] = {
    "no adapter": {"rank": 0},
    "no adapter, bias": {"rank": 0, "bias": True},
    "plain": {},
    "bias": {"bias": True, "rank": 5},
    "lora_bias": {"bias": True, "lora_bias": True},
    "only lora_bias": {"lora_bias": True, "rank": 16},
    "mask": {"dropout": "mask"},
    "hash": {"dropout": "hash", "bias": True},
    "dora": {"magnitude": True},
    "dora, bias": {"magnitude": True, "bias": True, "rank": 17},
    "dora, hash": {"magnitude": True, "bias": True, "dropout": "hash"},
    "large rank": {"rank": 72, "lora_bias": True, "bias": True},
}
"""Kinds of projections; `made` reads them."""


def made(
    number: int, out: int, width: int, tokens: int, device: str, *, rank: int = 8, bias: bool = False, magnitude: bool = False,
    lora_bias: bool = False, dropout: str | None = None,
) -> Projection:  # fmt: skip
    """A float64 projection whose values are those of a float32 one, trained in all that is not its weight."""

    def draw(*shape: int, seed: int) -> Tensor:
        return randn(*shape, device=device, dtype=torch.float64, seed=100 * number + seed).bfloat16().double()

    def trained(*shape: int, seed: int, wanted: bool) -> Tensor | None:
        return draw(*shape, seed=seed).mul_(0.25).requires_grad_() if wanted else None

    masked: Tensor | TokenDropout | None = None
    if dropout == "mask":
        masked = (draw(tokens, width, seed=7) > 0).double() * 2
    elif dropout == "hash":
        keys = torch.arange(tokens, device=device) * 2654435761 % 2**32
        masked = TokenDropout(keys, torch.tensor(1234 + number), 0.25)
    return Projection(
        draw(out, width, seed=0) * width**-0.5,
        trained(out, seed=1, wanted=bias),
        trained(rank, width, seed=2, wanted=rank > 0),
        trained(out, rank, seed=3, wanted=rank > 0),
        0.75 if rank else 1.0,
        trained(out, seed=4, wanted=magnitude),
        trained(out, seed=5, wanted=lora_bias),
        masked,
    )


def converted(one: Projection, dtype: torch.dtype) -> Projection:
    """The projection in another type, its trained parts leaves again."""

    def cast(value: object) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype).requires_grad_(value.requires_grad)

    return Projection(*(cast(value) for value in one))  # type: ignore[arg-type]


def written_out(x: Tensor, one: Projection) -> Tensor:
    """The projection in plain torch, as peft computes it."""
    assert isinstance(one.weight, Tensor)
    base = x @ one.weight.t() + (0 if one.bias is None else one.bias)
    if one.a is None or one.b is None:
        return base
    low = x
    if isinstance(one.dropout, TokenDropout):
        low = x * token_dropout(torch.ones_like(x), *one.dropout)
    elif one.dropout is not None:
        low = x * one.dropout
    update = one.scale * (low @ one.a.t() @ one.b.t() + (0 if one.lora_bias is None else one.lora_bias))
    if one.magnitude is None:
        return base + update
    norm = (one.weight + one.scale * one.b @ one.a).norm(dim=1).detach()
    gain = one.magnitude / norm
    return base + (gain - 1) * (low @ one.weight.t()) + gain * update


def values(fn: Callable[..., Sequence[Tensor]], x: Tensor, ones: Sequence[Projection]) -> list[Tensor]:
    """Outputs and the gradients of x and of everything trained, for fixed gradients of the outputs."""
    x = x.detach().requires_grad_()
    leaves = [x, *(value for one in ones for name in NAMES if (value := getattr(one, name)) is not None)]
    outputs = fn(x, ones)
    grads = [randn(*y.shape, device=str(x.device), dtype=y.dtype, seed=50 + i) for i, y in enumerate(outputs)]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(list(outputs), leaves, grads))


def linears(x: Tensor, ones: Sequence[Projection]) -> Sequence[Tensor]:
    """`lora_linears`."""
    return lora_linears(x, ones)


def linears_written_out(x: Tensor, ones: Sequence[Projection]) -> Sequence[Tensor]:
    """The same in plain torch."""
    return [written_out(x, one) for one in ones]


def mlp(activation: str, x: Tensor, ones: Sequence[Projection]) -> Sequence[Tensor]:
    """`lora_mlp`."""
    return [lora_mlp(x, *ones, activation)]


def mlp_written_out(activation: str, x: Tensor, ones: Sequence[Projection]) -> Sequence[Tensor]:
    """The same in plain torch."""
    gate, up, down = ones
    return [written_out(ACTIVATIONS[activation](written_out(x, gate)) * written_out(x, up), down)]


def cases(names: Sequence[str], shapes: Sequence[tuple[int, int]], tokens: int, device: str) -> list[Projection]:
    """One projection for each name and (out, in)."""
    return [
        made(number, out, width, tokens, device, **OPTIONS[name])  # type: ignore[arg-type]
        for number, (name, (out, width)) in enumerate(zip(names, shapes, strict=True))
    ]


def check_against(names: Sequence[str], activation: str | None, dtype: torch.dtype, device: str, times: float = 2.0) -> None:
    """At most `times` the error of torch in the same type; float64 to rounding. With an activation the MLP, else three projections."""
    tokens, hidden, wide = 37, 48, 80
    shapes = ((wide, hidden), (wide, hidden), (hidden, wide)) if activation else ((wide, hidden), (hidden, hidden), (24, hidden))
    ours: Callable[..., Sequence[Tensor]] = partial(mlp, activation) if activation else linears
    plain: Callable[..., Sequence[Tensor]] = partial(mlp_written_out, activation) if activation else linears_written_out
    ones, x = cases(names, shapes, tokens, device), randn(tokens, hidden, device=device, dtype=torch.float64).bfloat16().double()
    exact = values(plain, x, ones)
    if dtype == torch.float64:
        for a, b in zip(values(ours, x, ones), exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        return
    low = [converted(one, dtype) for one in ones]
    assert_as_exact_as(values(ours, x.to(dtype), low), values(plain, x.to(dtype), low), exact, times)


def check_twice(device: str, dtype: torch.dtype) -> None:
    """Equal to the bit when run again on memory full of NaN."""
    ones = [converted(one, dtype) for one in cases(("bias", "hash", "plain"), ((300, 64), (300, 64), (64, 300)), 70, device)]
    x = randn(70, 64, device=device, dtype=dtype)
    first = values(partial(mlp, "silu"), x, ones) + values(linears, x, ones[:2])
    with poisoned_memory():
        assert_equal(values(partial(mlp, "silu"), x, ones) + values(linears, x, ones[:2]), first)


def check_strides(device: str, dtype: torch.dtype) -> None:
    """Rows of a wider tensor, transposed weights, expanded and transposed gradients: the numbers of dense ones, within sums' rounding."""
    ones = [converted(one, dtype) for one in cases(("bias", "hash", "plain"), ((80, 64), (80, 64), (64, 80)), 33, device)]
    x = randn(33, 64, device=device, dtype=dtype)
    wide = torch.cat((x, x), -1)[:, :64]
    for fn, some in ((partial(mlp, "gelu"), ones), (linears, ones[:2])):
        turned = [one._replace(weight=one.weight.t().contiguous().t()) for one in some if isinstance(one.weight, Tensor)]
        run = partial(_differentiated, fn)
        pairs = [*zip(run(x, some, _drawn), run(wide, turned, lambda y: _drawn(y).t().contiguous().t()), strict=True)]
        pairs += zip(run(x, some, torch.ones_like), run(x, some, lambda y: torch.ones_like(y[:1, :1]).expand_as(y)), strict=True)
        for index, (a, b) in enumerate(pairs):
            error = ((a.double() - b.double()).norm() / a.double().norm()).item()
            assert error < 8 * torch.finfo(dtype).eps, f"tensor {index}: relative difference {error:.2e}"


def _differentiated(
    fn: Callable[..., Sequence[Tensor]], x: Tensor, ones: Sequence[Projection], grad: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Outputs and gradients, for gradients of the outputs that are made by `grad`."""
    x = x.detach().requires_grad_()
    leaves = [x, *(value for one in ones for name in NAMES if (value := getattr(one, name)) is not None)]
    outs = list(fn(x, ones))
    return outs + list(torch.autograd.grad(outs, leaves, [grad(y) for y in outs]))


def _drawn(y: Tensor) -> Tensor:
    return randn(*y.shape, device=str(y.device), dtype=y.dtype, seed=60)


def check_operators(device: str) -> None:
    """torch's own checks of schema and fake tensors of the operators, which have a body where Triton runs."""
    gate, up, dh = (randn(5, 32, device=device, dtype=torch.float32, seed=i) for i in range(3))
    low, wide = randn(5, 3, device=device, dtype=torch.float32), randn(32, 3, device=device, dtype=torch.float32)
    ops = torch.ops.rayft_kernels
    for fold in ((low, wide, 0.5), (None, None, 0.0)):
        torch.library.opcheck(ops.lora_glu_forward.default, (gate, up, *fold, low, wide, 2.0, "silu"))
        torch.library.opcheck(ops.lora_glu_backward.default, (dh.clone(), gate, up, *fold, low, wide, 2.0, low, wide, "gelu_tanh"))
    keys = torch.arange(5, device=device)
    torch.library.opcheck(ops.token_dropout.default, (gate, keys, torch.tensor(7), 0.25))


def check_large(device: str) -> None:
    """More than 2^31 elements of the MLP's width, and of the dropout's input: the last rows are those of a small call."""
    tokens, hidden, wide = 2**17 + 32, 64, 16416
    assert tokens * wide > 2**31

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.1

    gate, up, down = (
        Projection(draw(out, width), a=draw(8, width).requires_grad_(), b=draw(out, 8).requires_grad_())
        for out, width in ((wide, hidden), (wide, hidden), (hidden, wide))
    )
    x, grad = draw(tokens, hidden), draw(tokens, hidden)

    def call(rows: slice) -> list[Tensor]:
        leaf = x[rows].detach().requires_grad_()
        out = lora_mlp(leaf, gate, up, down, "silu")
        return [t[-32:].clone() for t in (out, *torch.autograd.grad(out, leaf, grad[rows]))]

    for a, b in zip(call(slice(None)), call(slice(tokens - 32, tokens)), strict=True):
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        assert error < 0.02, f"relative difference {error:.2e}"  # cuBLAS takes other tiles for another number of rows
    big, keys = torch.ones(tokens, wide, device=device, dtype=torch.bfloat16), torch.arange(tokens, device=device)
    seed = torch.tensor(3)
    assert_equal([token_dropout(big, keys, seed, 0.25)[-32:]], [token_dropout(big[-32:], keys[-32:], seed, 0.25)])


def check_surroundings(device: str, dtype: torch.dtype, backend: str) -> None:
    """Compiled in one graph, or checkpointed: the same numbers."""
    names = ("hash", "dora, bias", "mask")
    ones = [converted(one, dtype) for one in cases(names, ((40, 24), (40, 24), (24, 40)), 16, device)]
    x = randn(16, 24, device=device, dtype=dtype)
    for fn in (partial(mlp, "gelu_tanh"), linears):
        some = ones if isinstance(fn, partial) else ones[:2]
        plain = values(fn, x, some)
        for other in (torch.compile(fn, fullgraph=True, backend=backend), partial(checkpoint, fn, use_reentrant=False)):
            for a, b in zip(values(other, x, some), plain, strict=True):
                torch.testing.assert_close(a, b, rtol=64 * torch.finfo(dtype).eps, atol=64 * torch.finfo(dtype).eps)


def check_kernels(activation: str, dtype: torch.dtype, device: str) -> None:
    """The activation's kernels, with and without low-rank parts, on odd sizes, against their torch bodies in float64."""
    tokens, width = 1100, 150
    gate, up, dh = (randn(tokens, width, device=device, dtype=dtype, seed=i) for i in range(3))
    low = randn(tokens, 24, device=device, dtype=dtype, seed=4)
    every = [
        inside.Fold(low[:, :3], randn(width, 3, device=device, dtype=dtype, seed=5), 0.5),
        inside.Fold(low[:, 3:], randn(width, 21, device=device, dtype=dtype, seed=6) / 4, 2.0),
        inside.Fold(
            randn(tokens, 17, device=device, dtype=dtype, seed=7), randn(17, width, device=device, dtype=dtype, seed=8).t() / 4, 1.0
        ),
    ]
    for folds in (every, [None, every[1], None], [None, None, None]):
        exact = [None if fold is None else inside.Fold(fold.low.double(), fold.wide.double(), fold.scale) for fold in folds]
        h = inside.glu_forward(gate.double(), up.double(), exact[:2], activation)
        d_gate, d_up, sums = inside.glu_backward(dh.double(), gate.double(), up.double(), exact, activation)
        ours = [inside.glu_forward(gate, up, folds[:2], activation)]
        got_gate, got_up, got = inside.glu_backward(dh.clone(), gate, up, folds, activation)
        pairs = [*zip([*ours, got_gate, got_up], [h, d_gate, d_up], strict=True)]
        pairs += [(a, b) for a, b in zip(got, sums, strict=True) if a is not None and b is not None]
        for index, (a, b) in enumerate(pairs):
            error = ((a.double() - b).norm() / b.norm()).item()
            assert error < 8 * torch.finfo(dtype).eps, f"tensor {index}: relative error {error:.2e}"


def check_dropout(device: str, dtype: torch.dtype) -> None:
    """The hash's kernel drops what the torch body drops."""
    x, keys = randn(70, 300, device=device, dtype=dtype), torch.arange(70, device=device) * 2654435761 % 2**32
    for seed in map(torch.tensor, (0, 1, 2**31 - 1)):
        expected = token_dropout(x.double(), keys, seed, 0.3)
        torch.testing.assert_close(token_dropout(x, keys, seed, 0.3).double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


TRIPLES = (
    ("plain", "plain", "plain"),
    ("no adapter", "plain", "no adapter, bias"),
    ("bias", "only lora_bias", "lora_bias"),
    ("hash", "mask", "hash"),
    ("dora", "dora, hash", "dora, bias"),
    ("large rank", "hash", "large rank"),
    ("mask", "no adapter", "dora, hash"),
    ("no adapter", "no adapter", "mask"),
)
"""Kinds of three projections together."""


def checks(device: str, dtypes: tuple[torch.dtype, ...], backend: str = "inductor") -> dict[str, Callable[[], None]]:
    """Every check by name."""
    found: dict[str, Callable[[], None]] = {}
    for dtype in dtypes:
        kind = str(dtype).removeprefix("torch.")
        for number, names in enumerate(TRIPLES):
            found[f"lora linears {kind}: {'; '.join(names)}"] = partial(check_against, names, None, dtype, device)
            activation = tuple(ACTIVATIONS)[number % len(ACTIVATIONS)]
            found[f"lora mlp {activation} {kind}: {'; '.join(names)}"] = partial(check_against, names, activation, dtype, device)
        if dtype != torch.float64:
            found |= {f"lora kernels {act} {kind}": partial(check_kernels, act, dtype, device) for act in ACTIVATIONS}
            found[f"lora twice {kind}"] = partial(check_twice, device, dtype)
            found[f"lora strides {kind}"] = partial(check_strides, device, dtype)
            found[f"lora dropout {kind}"] = partial(check_dropout, device, dtype)
    if device == "cuda":
        found["lora operators"] = partial(check_operators, device)
    found["lora compile, checkpoint"] = partial(check_surroundings, device, torch.float32, backend)
    return found
