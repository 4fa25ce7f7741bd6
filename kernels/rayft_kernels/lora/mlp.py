"""The gated MLP as one autograd node: saves x, gate and up before their low-rank parts, and tensors of the rank's size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rayft_kernels.lora.glu import Fold, glu_backward, glu_forward
from rayft_kernels.lora.linears import (
    SLOTS,
    Grads,
    Needs,
    Part,
    Saved,
    Static,
    backward,
    base,
    dense,
    inner,
    lows_of,
    needs_of,
    output,
    parts_of,
    side_gradients,
)
from rayft_kernels.lora.triton import MAX_RANK


def _folds(part: Part) -> bool:
    """Whether the activation's kernels add the low-rank part: not for DoRA, whose gain is applied to the sum, nor for large ranks."""
    return part.a is not None and part.magnitude is None and part.a.shape[0] <= MAX_RANK


def _first(x: Tensor, part: Part, low: Tensor | None) -> tuple[Tensor, Saved]:
    """Gate or up, without its low-rank part where that is folded."""
    return (base(x, part), Saved(low)) if _folds(part) else output(x, part, low)


def _fold_of(part: Part, saved: Saved) -> Fold | None:
    if not _folds(part) or saved.low is None or part.b is None:
        return None
    return Fold(saved.low, part.b, part.static.scale)


def _down_backward(
    dy: Tensor, h_of: tuple[Tensor, Tensor, list[Fold | None], str], down: Part, saved: Saved, needs: Needs
) -> tuple[Tensor, Fold | None, Grads]:
    """Gradient of h, the fold that completes it, and the gradients of down's tensors; that of a folded A comes later."""
    if _folds(down) and down.drop is None and down.a is not None:
        t = inner(dy, down)
        return dy @ down.weight, Fold(t, down.a.t(), 1.0), side_gradients(dy, dy, down, saved, needs)
    h = h_of[0] if down.a is None else glu_forward(*h_of)  # only an adapter's gradient reads it
    dh, (found,) = backward(h, [down], [saved], [dy], [needs], need_x=True)
    assert dh is not None
    return dh, None, found


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, statics: tuple[Static, ...], *tensors: Tensor | None) -> Tensor:
        gate, up, down = dense(parts_of(statics, tensors), x.dtype)
        low_gate, low_up = lows_of(x, [gate, up])
        (e, saved_gate), (u, saved_up) = _first(x, gate, low_gate), _first(x, up, low_up)
        h = glu_forward(e, u, [_fold_of(gate, saved_gate), _fold_of(up, saved_up)], activation)
        out, saved_down = output(h, down, lows_of(h, [down])[0])
        ctx.statics, ctx.activation = statics, activation
        ctx.save_for_backward(x, e, u, *tensors, *saved_gate, *saved_up, *saved_down)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, e, u, *rest = ctx.saved_tensors
        width = 3 * len(SLOTS)
        parts = gate, up, down = dense(parts_of(ctx.statics, rest[:width]), x.dtype)
        saved = [Saved(*rest[width + 3 * i : width + 3 * i + 3]) for i in range(3)]
        need_x, _, _, *flags = ctx.needs_input_grad
        needs = needs_of(flags)
        folds = [_fold_of(gate, saved[0]), _fold_of(up, saved[1])]
        dh, fold, of_down = _down_backward(dy, (e, u, folds, ctx.activation), down, saved[2], needs[2])
        de, du, sums = glu_backward(dh, e, u, [*folds, fold], ctx.activation)
        left = [need if one is None else _without_b(need) for need, one in zip(needs, folds, strict=False)]
        dx, found = backward(x, [gate, up], saved[:2], [de, du], left, need_x)
        of_gate, of_up = (_with_b(*item) for item in zip(found, parts, sums, needs, strict=False))
        if sums[2] is not None and down.a is not None and needs[2][2]:
            of_down = of_down._replace(a=sums[2].to(down.a.dtype))
        return dx, None, None, *of_gate, *of_up, *of_down


def _without_b(needs: Needs) -> Needs:
    return (*needs[:3], False, *needs[4:])


def _with_b(grads: Grads, part: Part, total: Tensor | None, needs: Needs) -> Grads:
    """Take in the gradient of b that the activation's backward summed, [r, I] without its scale."""
    if total is None or part.b is None or not needs[3]:
        return grads
    return grads._replace(b=(total * part.static.scale).t().to(part.b.dtype))


def mlp(x: Tensor, activation: str, statics: Sequence[Static], tensors: Sequence[Tensor | None]) -> Tensor:
    """down(act(gate(x)) * up(x)) for x [T, H]; `tensors` in the order of SLOTS for gate, up and down."""
    out: Tensor = _Mlp.apply(x, activation, tuple(statics), *tensors)
    return out
