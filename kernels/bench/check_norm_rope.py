"""Checks of norm + RoPE on any device: against float64, against itself in other surroundings, beyond 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.checks import assert_as_exact_as, assert_equal, poisoned_memory, randn, results
from rayft_kernels import qkv_norm_rope


@dataclass(frozen=True)
class Case:
    """Shapes of one call: heads of q, k and v (0: absent), columns, rotated columns (0: no rotation)."""

    batch: int = 2
    seq: int = 33
    heads: tuple[int, int, int] = (4, 2, 0)
    dim: int = 128
    rotated: int = 128
    shared_table: bool = True
    unit_offset: bool = False
    scale: bool = True

    @property
    def name(self) -> str:
        """The case in a few words."""
        flags = "".join(word for word, on in (("+unit", self.unit_offset), ("-scale", not self.scale)) if on)
        return f"B{self.batch}xS{self.seq} H{'/'.join(map(str, self.heads))} D{self.dim} n{self.rotated}{flags}"


CASES = (
    Case(),
    Case(dim=256, rotated=256, heads=(4, 2, 2), shared_table=False),
    Case(dim=512, rotated=512, heads=(2, 1, 1), seq=17),
    Case(dim=64, rotated=64, heads=(3, 1, 0), unit_offset=True, seq=130),
    Case(dim=96, rotated=96, heads=(5, 0, 0)),
    Case(dim=80, rotated=80, heads=(2, 2, 2), batch=1, seq=1),
    Case(dim=256, rotated=64, heads=(4, 1, 0), shared_table=False),
    Case(dim=128, rotated=64, heads=(2, 2, 1), unit_offset=True),
    Case(dim=128, rotated=0, heads=(2, 1, 1), scale=False),
    Case(dim=96, rotated=32, heads=(3, 3, 0), batch=3),
    Case(dim=128, rotated=128, heads=(16, 8, 8), seq=700),
)
LARGEST = CASES[-1]


def written_out(q: Tensor, k: Tensor | None, v: Tensor | None, *rest: Tensor | None, eps: float, unit: bool, casts: str) -> list[Tensor]:
    """The op in plain torch with autograd, rounding after each step of `casts` as transformers does; float64 stays exact."""
    q_weight, k_weight, cos, sin = rest
    wide = torch.promote_types(q.dtype, torch.float32)

    def norm(x: Tensor, weight: Tensor | None) -> Tensor:
        h = x.to(wide)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
        if weight is None:
            return h.to(x.dtype)
        if casts == "llama":
            return weight * h.to(x.dtype)
        return (h * (1 + weight.to(wide) if unit else weight.to(wide))).to(x.dtype)

    def rope(x: Tensor) -> Tensor:
        if cos is None or sin is None:
            return x
        n = cos.shape[-1]
        turned, passed = x[..., :n], x[..., n:]
        a, b = turned.chunk(2, -1)
        turned = turned * cos.unsqueeze(2) + torch.cat((-b, a), -1) * sin.unsqueeze(2)
        return torch.cat((turned, passed), -1)

    out = [rope(norm(q, q_weight))]
    out += [] if k is None else [rope(norm(k, k_weight))]
    return out + ([] if v is None else [norm(v, None)])


@dataclass(frozen=True)
class Inputs:
    """Differentiable tensors by name, tables, and gradients of the outputs."""

    named: dict[str, Tensor]
    cos: Tensor | None
    sin: Tensor | None
    grads: list[Tensor]
    case: Case

    @staticmethod
    def of(case: Case, device: str, dtype: torch.dtype) -> Inputs:
        """q, k and v are views of one packed projection, gradients those of a transposed attention output."""
        packed = randn(case.batch, case.seq, sum(case.heads), case.dim, device=device, dtype=dtype)
        views = zip(("q", "k", "v"), packed.split(case.heads, 2), strict=True)
        named = {name: x for name, x in views if x.shape[2]}
        grads = [
            randn(case.batch, x.shape[2], case.seq, case.dim, device=device, dtype=dtype, seed=9).transpose(1, 2) for x in named.values()
        ]
        if case.scale:
            weights = {f"{name}_weight": randn(case.dim, device=device, dtype=dtype, seed=i + 1) for i, name in enumerate("qk")}
            named |= {name: w for name, w in weights.items() if name[0] in named}
        table = (1 if case.shared_table else case.batch, case.seq, case.rotated)
        cos, sin = (randn(*table, device=device, dtype=dtype, seed=s) if case.rotated else None for s in (5, 6))
        return Inputs(named, cos, sin, grads, case)

    def in_float64(self) -> Inputs:
        """The same numbers, wider."""
        wide = {name: x.double() for name, x in self.named.items()}
        cos, sin = (None if t is None else t.double() for t in (self.cos, self.sin))
        return Inputs(wide, cos, sin, [g.double() for g in self.grads], self.case)

    def copied(self) -> Inputs:
        """The same numbers without views."""
        named = {name: x.contiguous() for name, x in self.named.items()}
        return Inputs(named, self.cos, self.sin, [g.contiguous() for g in self.grads], self.case)

    def run(self, fn: Callable[..., object], **options: object) -> list[Tensor]:
        """Outputs and gradients of fn, called as qkv_norm_rope is."""
        names = ("q", "k", "v", "q_weight", "k_weight")

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(self.named, tensors, strict=True))
            out = fn(*map(given.get, names), self.cos, self.sin, **options)
            return tuple(y for y in out if y is not None)  # type: ignore[attr-defined]

        return results(call, list(self.named.values()), self.grads)


def check_error(case: Case, dtype: torch.dtype, device: str) -> None:
    """At most twice the error of torch in the same type, outputs and gradients."""
    inputs, options = Inputs.of(case, device, dtype), {"eps": 1e-6, "unit": case.unit_offset, "casts": "gemma"}
    ours = inputs.run(qkv_norm_rope, unit_offset=case.unit_offset)
    assert_as_exact_as(ours, inputs.run(written_out, **options), inputs.in_float64().run(written_out, **options))


def check_casts(casts: str, dtype: torch.dtype, device: str, case: Case = LARGEST) -> None:
    """Rounded where transformers rounds: all but a few elements (whose float32 norms differ in the last bit) are equal."""
    inputs = Inputs.of(case, device, dtype)
    ours = inputs.run(qkv_norm_rope, unit_offset=case.unit_offset and casts == "gemma", casts=casts)
    theirs = inputs.run(written_out, eps=1e-6, unit=case.unit_offset and casts == "gemma", casts=casts)
    for a, b in list(zip(ours, theirs, strict=True))[: len(inputs.grads)]:
        share = (a != b).double().mean().item()
        assert share < 2e-3, f"{share:.2%} of the elements differ"
        assert (a.double() - b.double()).abs().max() <= 8 * torch.finfo(dtype).eps * b.double().abs().max()


def check_twice(case: Case, dtype: torch.dtype, device: str) -> None:
    """Two runs are equal to the bit, also on memory full of NaN, on copies instead of views, and with tables repeated for each row."""
    inputs = Inputs.of(case, device, dtype)
    first = inputs.run(qkv_norm_rope)
    with poisoned_memory():
        assert_equal(inputs.run(qkv_norm_rope), first)
    assert_equal(inputs.copied().run(qkv_norm_rope), first)
    cos, sin = (None if t is None else t.expand(case.batch, -1, -1).contiguous() for t in (inputs.cos, inputs.sin))
    assert_equal(Inputs(inputs.named, cos, sin, inputs.grads, case).run(qkv_norm_rope), first)


def check_gradients_kept(device: str) -> None:
    """An expanded gradient is read rightly, inputs and gradients are left as they were, a frozen weight costs nothing."""
    x, w = randn(2, 5, 3, 64, device=device, dtype=torch.float32), randn(64, device=device, dtype=torch.float32)
    grad = torch.ones((), device=device).expand(x.shape)
    before = x.clone()
    call = partial(qkv_norm_rope, k=None, v=None, k_weight=None, cos=None, sin=None)
    expanded = results(lambda x, w: call(x, q_weight=w)[0], [x, w], [grad])
    assert_equal(expanded, results(lambda x, w: call(x, q_weight=w)[0], [x, w], [grad.contiguous()]))
    frozen = results(lambda x: call(x, q_weight=w)[0], [x], [grad])
    assert_equal(frozen, expanded[:2])
    assert torch.equal(x, before)
    arguments = (grad.contiguous(), None, None, x, None, None, w, None, None, None, 1e-6, False)
    sizes = [torch.ops.rayft_kernels.norm_rope_backward(*arguments, need, False)[3].numel() for need in (True, False)]
    assert sizes == [64, 0]


def check_operator(device: str) -> None:
    """torch's own checks of schema, fake tensors and autograd of the operator."""
    inputs = Inputs.of(Case(batch=1, seq=3, heads=(2, 1, 1), dim=64, rotated=32), device, torch.float32)
    leaves = [x.contiguous().requires_grad_() for x in inputs.named.values()]
    torch.library.opcheck(torch.ops.rayft_kernels.norm_rope.default, (*leaves, inputs.cos, inputs.sin, 1e-6, False, "once"))
    backward = (*inputs.grads, *(x.detach() for x in leaves), inputs.cos, inputs.sin, 1e-6, False, True, False)
    torch.library.opcheck(torch.ops.rayft_kernels.norm_rope_backward.default, backward)


def check_surroundings(device: str, backend: str) -> None:
    """Compiled without a graph break, checkpointed, or under autocast: the same numbers."""
    inputs = Inputs.of(Case(heads=(4, 2, 2)), device, torch.float32)
    plain = inputs.run(qkv_norm_rope)
    assert_equal(inputs.run(torch.compile(qkv_norm_rope, fullgraph=True, backend=backend)), plain)
    assert_equal(inputs.run(partial(checkpoint, qkv_norm_rope, use_reentrant=False)), plain)
    low = Inputs.of(Case(heads=(4, 2, 2)), device, torch.bfloat16)
    wide_weights = {n: x.float() if n.endswith("weight") else x for n, x in low.named.items()}
    mixed = Inputs(wide_weights, low.cos, low.sin, low.grads, low.case)
    with torch.autocast(device, torch.bfloat16):
        cast = mixed.run(qkv_norm_rope)
    assert_equal(cast, mixed.run(qkv_norm_rope))
    assert [x.dtype for x in cast] == [torch.bfloat16] * 6 + [torch.float32] * 2


def check_large(device: str) -> None:
    """More than 2^31 elements in q and in the packed projection that k is a view of: the last rows are those of a small call."""
    seq, heads, dim = 2**19 + 64, 34, 128
    packed = torch.empty(1, seq, heads, dim, device=device, dtype=torch.bfloat16).normal_()
    q, k = packed[:, :, :33], packed[:, :, 33:]
    w = torch.ones(dim, device=device, dtype=torch.bfloat16)
    cos, sin = (torch.randn(1, seq, dim, device=device, dtype=torch.bfloat16) for _ in range(2))
    assert q.numel() > 2**31

    def call(rows: slice) -> list[Tensor]:
        leaves = [q[:, rows].detach().requires_grad_(), k[:, rows].detach().requires_grad_()]
        out = qkv_norm_rope(*leaves, None, w, w, cos[:, rows], sin[:, rows])
        y = [t for t in out if t is not None]
        grads = torch.autograd.grad(y, leaves, [q[:, rows].detach(), k[:, rows].detach()])
        return [t[:, -64:].clone() for t in (*y, *grads)]

    assert_equal(call(slice(None)), call(slice(seq - 64, seq)))


def checks(
    device: str, dtypes: tuple[torch.dtype, ...], cases: tuple[Case, ...] = CASES, casts_case: Case = LARGEST, backend: str = "inductor"
) -> dict[str, Callable[[], None]]:
    """Every check by name; those of memory beyond 2^31 elements are left to the caller."""
    found: dict[str, Callable[[], None]] = {}
    for dtype in dtypes:
        kind = str(dtype).removeprefix("torch.")
        found |= {f"norm_rope error {kind} {case.name}": partial(check_error, case, dtype, device) for case in cases}
        found |= {f"norm_rope casts {kind} {casts}": partial(check_casts, casts, dtype, device, casts_case) for casts in ("gemma", "llama")}
    found |= {f"norm_rope twice {case.name}": partial(check_twice, case, dtypes[0], device) for case in cases[:3]}
    found["norm_rope gradients kept"] = partial(check_gradients_kept, device)
    found["norm_rope operator"] = partial(check_operator, device)
    found["norm_rope compile, checkpoint, autocast"] = partial(check_surroundings, device, backend)
    return found
