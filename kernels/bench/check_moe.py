"""Checks of the experts with adapters on any device: options and routings against plain torch in float64, themselves, compile and
checkpointing, and tensors of more than 2^31 elements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.check_glu import ACTIVATIONS
from bench.checks import assert_as_exact_as, assert_equal, poisoned_memory, randn
from rayft_kernels.moe_lora import steps
from rayft_kernels.moe_lora.op import ExpertAdapter, moe_lora
from rayft_kernels.moe_lora.routing import route


class Case(NamedTuple):
    """Sizes and options; `routing` is spread (some experts empty), one (a single expert for every first choice) or all."""

    tokens: int = 75
    top_k: int = 2
    experts: int = 5
    hidden: int = 48
    inter: int = 40
    rank: int = 5
    adapters: str = "both"
    trained: bool = False
    transposed: bool = False
    routing: str = "spread"
    activation: str = "silu"


CASES = {
    "adapters": Case(),
    "one expert takes most": Case(tokens=300, routing="one", activation="gelu_tanh"),
    "square, transposed": Case(hidden=32, inter=16, transposed=True, rank=16),
    "gate and up only": Case(adapters="up", activation="gelu"),
    "down only": Case(adapters="down", rank=17),
    "base trained": Case(adapters="none", trained=True, routing="all"),
    "base trained, transposed, adapters": Case(trained=True, transposed=True),
    "one token": Case(tokens=1),
    "many experts, top 8": Case(tokens=200, experts=64, top_k=8, hidden=136, inter=72, rank=8),
}


class Inputs(NamedTuple):
    """Tensors of a case; adapters are pairs of A and B, or None."""

    x: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    up_a: Tensor | None
    up_b: Tensor | None
    down_a: Tensor | None
    down_b: Tensor | None


def choices(case: Case, device: str) -> Tensor:
    """Different experts for the choices of a token; the last two experts get nothing where the routing is not `all`."""
    open_experts = case.experts if case.routing == "all" else max(case.top_k, case.experts - 2)
    score = torch.rand(case.tokens, open_experts, generator=torch.Generator().manual_seed(3))
    if case.routing == "one":
        score[:, 1] = 2.0
    return score.topk(case.top_k, dim=1).indices.to(device)


def made(case: Case, device: str) -> Inputs:
    """Float64 tensors whose values bfloat16 has."""

    def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
        return (randn(*shape, device=device, dtype=torch.float64, seed=seed) * scale).bfloat16().double()

    e, h, i, r = case.experts, case.hidden, case.inter, case.rank
    gate_up, down = draw(e, 2 * i, h, seed=2, scale=h**-0.5), draw(e, h, i, seed=3, scale=i**-0.5)
    if case.transposed:
        gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
    up = (draw(e * r, h, seed=4, scale=h**-0.5), draw(2 * i, r * e, seed=5, scale=0.5)) if case.adapters in ("both", "up") else (None, None)
    low = (draw(e * r, i, seed=6, scale=i**-0.5), draw(h, r * e, seed=7, scale=0.5)) if case.adapters in ("both", "down") else (None, None)
    return Inputs(draw(case.tokens, h, seed=0), draw(case.tokens, case.top_k, seed=1).abs(), gate_up, down, *up, *low)


def ours(case: Case, index: Tensor, given: Inputs) -> Tensor:
    """`moe_lora`."""
    up = None if given.up_a is None or given.up_b is None else ExpertAdapter(given.up_a, given.up_b, 0.75)
    down = None if given.down_a is None or given.down_b is None else ExpertAdapter(given.down_a, given.down_b, 1.5)
    return moe_lora(
        given.x, index, given.weights, given.gate_up, given.down, case.activation,
        gate_up_adapter=up, down_adapter=down, transposed=case.transposed,
    )  # fmt: skip


def written_out(case: Case, index: Tensor, given: Inputs) -> Tensor:
    """The same in plain torch, expert by expert, the low-rank product apart."""
    out = torch.zeros_like(given.x)
    experts = case.experts

    def linear(x: Tensor, stack: Tensor, a: Tensor | None, b: Tensor | None, scale: float, expert: int) -> Tensor:
        y = x @ (stack[expert] if case.transposed else stack[expert].t())
        if a is None or b is None:
            return y
        return y + scale * (x @ a.view(experts, -1, a.shape[1])[expert].t() @ b.view(b.shape[0], -1, experts)[:, :, expert].t())

    for expert in range(experts):
        token, choice = torch.where(index == expert)
        gate, up = linear(given.x[token], given.gate_up, given.up_a, given.up_b, 0.75, expert).chunk(2, dim=1)
        h = ACTIVATIONS[case.activation](gate) * up
        y = linear(h, given.down, given.down_a, given.down_b, 1.5, expert) * given.weights[token, choice, None]
        out = out.index_add(0, token, y)
    return out


Fn = Callable[[Case, Tensor, Inputs], Tensor]


def values(fn: Fn, case: Case, index: Tensor, given: Inputs) -> list[Tensor]:
    """Output and the gradients of everything that the case trains."""
    frozen = () if case.trained else ("gate_up", "down")
    leaves = {name: value.detach().requires_grad_(name not in frozen) for name, value in given._asdict().items() if value is not None}
    out = fn(case, index, Inputs(**{name: leaves.get(name) for name in Inputs._fields}))  # type: ignore[arg-type]
    grad = randn(*out.shape, device=str(out.device), dtype=out.dtype, seed=9)
    return [out.detach(), *torch.autograd.grad(out, [leaf for leaf in leaves.values() if leaf.requires_grad], grad)]


def cast(given: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs in another type."""
    return Inputs(*(None if value is None else value.to(dtype) for value in given))  # type: ignore[arg-type]


def check_against(case: Case, dtype: torch.dtype, device: str, times: float = 2.0) -> None:
    """At most `times` the error of torch in the same type; float64 to rounding."""
    given, index = made(case, device), choices(case, device)
    exact = values(written_out, case, index, given)
    if dtype == torch.float64:
        for a, b in zip(values(ours, case, index, given), exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        return
    low = cast(given, dtype)
    assert_as_exact_as(values(ours, case, index, low), values(written_out, case, index, low), exact, times)


def check_twice(dtype: torch.dtype, device: str) -> None:
    """Equal to the bit when run again on memory full of NaN."""
    case = Case(tokens=300, trained=True)
    given, index = cast(made(case, device), dtype), choices(case, device)
    first = values(ours, case, index, given)
    with poisoned_memory():
        assert_equal(values(ours, case, index, given), first)


def check_strides(dtype: torch.dtype, device: str) -> None:
    """Inputs whose values do not lie side by side give the same bits."""
    case = Case(trained=True)
    given, index = cast(made(case, device), dtype), choices(case, device)
    strided = Inputs(*(None if value is None else value.mT.contiguous().mT for value in given))  # type: ignore[arg-type]
    assert not strided.weights.is_contiguous()
    with torch.no_grad():
        assert_equal([ours(case, index, strided)], [ours(case, index, given)])


def check_surroundings(device: str, dtype: torch.dtype, backend: str) -> None:
    """Compiled in one graph, or checkpointed: the same numbers."""
    for case in (Case(), Case(adapters="none", trained=True)):
        given, index = cast(made(case, device), dtype), choices(case, device)
        plain = values(ours, case, index, given)
        compiled = torch.compile(ours, fullgraph=True, backend=backend)
        saved = partial(checkpoint, ours, use_reentrant=False)
        for other in (compiled, saved):
            for a, b in zip(values(other, case, index, given), plain, strict=True):  # type: ignore[arg-type]
                torch.testing.assert_close(a, b, rtol=64 * torch.finfo(dtype).eps, atol=64 * torch.finfo(dtype).eps)


def check_large(device: str) -> None:
    """The last rows of products and activations whose tensors have more than 2^31 elements."""
    tokens, width, experts = 1_150_000, 1024, 2
    index = torch.arange(tokens, device=device)[:, None] % experts
    way = route(index, experts)
    x = torch.randn(tokens, 16, device=device, dtype=torch.bfloat16)
    weight = torch.randn(experts, 2 * width, 16, device=device, dtype=torch.bfloat16)
    packed = steps.product(x, weight, None, None, way.order, way.ends, way.tiles, 1)
    last = way.order[-64:].long()
    torch.testing.assert_close(packed[-64:].float(), x[last].float() @ weight[1].float().t(), rtol=0.02, atol=0.1)
    h, _ = steps.activate(packed, None, way.ends, way.tiles, 1.0, "silu")
    gate, up = packed[-64:].float().chunk(2, 1)
    torch.testing.assert_close(h[-64:].float(), ACTIVATIONS["silu"](gate) * up, rtol=0.02, atol=0.1)
    ones = torch.ones(tokens, device=device)
    grads, *_ = steps.activate_backward(h, packed, ones, None, way.ends, way.tiles, 1.0, "silu", False)
    s = torch.sigmoid(gate)
    torch.testing.assert_close(grads[-64:, width:].float(), h[-64:].float() * gate * s, rtol=0.02, atol=0.1)


def checks(device: str, dtypes: Sequence[torch.dtype], backend: str = "inductor") -> dict[str, Callable[[], None]]:
    """Every check by name."""
    found: dict[str, Callable[[], None]] = {}
    for dtype in dtypes:
        kind = str(dtype).removeprefix("torch.")
        found |= {f"moe {kind}: {name}": partial(check_against, case, dtype, device) for name, case in CASES.items()}
        found[f"moe twice {kind}"] = partial(check_twice, dtype, device)
        found[f"moe strides {kind}"] = partial(check_strides, dtype, device)
    found["moe compile, checkpoint"] = partial(check_surroundings, device, torch.float32, backend)
    if device != "cpu":
        found["moe over 2^31 elements"] = partial(check_large, device)
    return found
