"""Attention backends against each other and against one softmax with a written-out mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from families import make_batch
from rayft.parallel import attention

HEADS, KV_HEADS, DIM = 4, 2, 16


def tensors(length: int) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, length, DIM, generator=g, requires_grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS))


def written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], window: int | None, softcap: float | None
) -> Any:
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    allowed = (document[:, None] == document[None]) & (place[:, None] >= place[None])
    if window is not None:
        allowed &= place[:, None] - place[None] < window
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * DIM**-0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.softmax(scores.masked_fill(~allowed, float("-inf")), -1) @ v


CASES = [
    ([[5, 1, 1, 20, 37]], None, None),
    ([[5, 1, 1, 20, 37]], 8, None),
    ([[5, 1, 1, 20, 37]], None, 2.0),
    ([[5, 1, 1, 20, 37]], 8, 2.0),
    ([[32], [32]], None, None),
    ([[64]], 8, None),
]


@pytest.mark.parametrize(("lengths", "window", "softcap"), CASES)
def test_cpu_backends_equal_the_written_out_mask(lengths: list[list[int]], window: int | None, softcap: float | None) -> None:
    layout = attention.Layout(make_batch(lengths), "auto")
    results = []
    for served in (True, False):
        q, k, v = tensors(64)
        if served:
            out, _ = attention.packed_attention(torch.nn.Identity(), q, k, v, None, layout=layout, sliding_window=window, softcap=softcap)
            out = out.transpose(1, 2)
        else:
            out = written_out(q, k, v, layout.lengths, window, softcap)
        out.square().sum().backward()
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("lengths", "window", "softcap"), CASES)
def test_flex_forward_equals_the_written_out_mask(
    lengths: list[list[int]], window: int | None, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mask comes from padded boundaries. Uncompiled and forward only: flex has no backward on CPU."""
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)
    monkeypatch.setattr(attention, "choose", lambda head_dim, device_type, wanted: ("flex", ""))
    layout = attention.Layout(make_batch(lengths), "flex", [(DIM, window)], capped=True)
    with torch.no_grad():
        q, k, v = (x.detach() for x in tensors(64))
        got = attention._flex(q, k, v, layout.masks.get(window), None, softcap)
        torch.testing.assert_close(got, written_out(q, k, v, layout.lengths, window, softcap), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("lengths", "window", "softcap"), CASES)
@pytest.mark.parametrize("compiled", [False, True])
def test_the_triton_operator_equals_the_written_out_mask(
    lengths: list[list[int]], window: int | None, softcap: float | None, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its torch body, which runs on CPUs, in a checkpointed layer; a head_dim of 16 leaves plain rows to SDPA."""
    monkeypatch.setattr(attention, "choose", lambda head_dim, device_type, wanted: ("triton", ""))
    batch = make_batch(lengths)
    layout = attention.Layout(batch, "auto", [(DIM, window)])
    assert layout.masks == {}

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, _ = attention.packed_attention(torch.nn.Identity(), q, k, v, None, layout=layout, sliding_window=window, softcap=softcap)
        return out.transpose(1, 2)

    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    results = []
    for fn in (lambda *qkv: checkpoint(run, *qkv, use_reentrant=False), lambda *qkv: written_out(*qkv, layout.lengths, window, softcap)):
        qkv = tensors(64)
        out = fn(*qkv)
        out.square().sum().backward()
        results.append([out.detach(), *(x.grad for x in qkv)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("head_dim", "device_type", "wanted", "backend"),
    [
        (512, "cuda", "auto", "triton"),
        (257, "cuda", "auto", "triton"),
        (256, "cuda", "auto", "flex"),
        (576, "cuda", "auto", "flex"),
        (576, "cuda", "triton", "flex"),
        (128, "cuda", "triton", "triton"),
        (512, "cuda", "flex", "flex"),
        (512, "cuda", "sdpa", "documents"),
        (512, "cpu", "auto", "documents"),
    ],
)
def test_a_layer_decides_by_its_own_head_dim(head_dim: int, device_type: str, wanted: str, backend: str) -> None:
    assert attention.choose(head_dim, device_type, wanted)[0] == backend


def test_the_summary_counts_layers_by_backend() -> None:
    layers = [torch.nn.Module() for _ in range(3)]
    for layer, head_dim in zip(layers, (256, 512, 256), strict=True):
        layer.head_dim, layer.o_proj = head_dim, torch.nn.Identity()
    lines = attention.summary(torch.nn.Sequential(*layers), "cuda", "auto")
    assert [line.split(":")[0] for line in lines] == ["flex on 2 layers", "triton on 1 layers"]


def test_a_layout_holds_what_its_layers_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4: windows of 256 columns take flex, whole documents of 512 the Triton kernels; neither needs the other's preparation."""
    choose = attention.choose
    monkeypatch.setattr(attention, "choose", lambda head_dim, _, wanted: choose(head_dim, "cuda", wanted))
    batch = make_batch([[20, 44]])
    layout = attention.Layout(batch, "auto", {(256, 8), (512, None)})
    assert list(layout.masks) == [8]
    assert [attention.Layout(make_batch([row]), "auto").longest for row in ([20, 44], [1, 64], [1, 1], [32, 33])] == [64, 64, 1, 64]
    assert [bound.tolist() for bound in layout.bounds] == [[0] * 20 + [20] * 44, [20] * 20 + [64] * 44]
    assert attention.Layout(batch, "auto", {(256, 8)}).bounds is None
    assert list(attention.Layout(make_batch([[64]]), "auto", {(256, None), (512, None)}).masks) == []


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300])
@pytest.mark.parametrize("lengths", [(1024,), (1, 127, 128, 256, 512), (129, 1, 1, 382, 300, 211), (700, 70), (5, 3), (128,) * 4])
def test_the_block_mask_is_the_one_that_trying_every_pair_gives(lengths: tuple[int, ...], window: int | None) -> None:
    tokens = sum(lengths)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist(), tokens], dtype=torch.int32)
    got = attention._document_mask(cu_seqlens, lengths, window)
    expected = create_block_mask(got.mask_mod, None, None, tokens, tokens, device="cpu")
    for side in ("kv", "full_kv", "q", "full_q"):
        for row in range(-(-tokens // 128)):
            chosen = [
                sorted(getattr(mask, f"{side}_indices")[0, 0, row, : getattr(mask, f"{side}_num_blocks")[0, 0, row]].tolist())
                for mask in (got, expected)
            ]
            assert chosen[0] == chosen[1], (side, row)


def test_a_mask_or_dropout_is_refused() -> None:
    q, k, v = tensors(64)
    layout = attention.Layout(make_batch([[64]]), "auto")
    with pytest.raises(RuntimeError, match="neither a mask nor"):
        attention.packed_attention(torch.nn.Identity(), q, k, v, torch.ones(1), layout=layout)
