"""NF4: against the format written out in numpy, against bitsandbytes where it is installed, and inside of linear and LoRA nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rayft.errors import ConfigError
from rayft.models.nf4 import NF4Linear, choose, replace
from rayft_kernels import NF4, Projection, dequantise, lora_linears, lora_mlp, nf4_linear, quantise
from rayft_kernels.nf4 import op
from rayft_kernels.nf4.op import LEVELS, bytes_of, dequantise_rows, scale_levels


def values_of(weight: np.ndarray) -> np.ndarray:
    """What 4 bits keep of a float32 weight [out, in], value by value as the format says."""
    levels, steps = np.array(LEVELS, np.float32), np.array(scale_levels(), np.float32)
    blocks = weight.reshape(-1, 64)
    scales = np.abs(blocks).max(1)
    codes = np.abs(blocks[:, :, None] / np.maximum(scales, 1e-38)[:, None, None] - levels).argmin(2)
    mean = torch.from_numpy(scales).mean().numpy()
    kept = np.empty_like(scales)
    for start in range(0, len(scales), 256):
        some = scales[start : start + 256] - mean
        outer = np.abs(some).max()
        kept[start : start + 256] = steps[np.abs(some[:, None] / max(outer, np.float32(1e-38)) - steps).argmin(1)] * outer + mean
    return (levels[codes] * kept[:, None]).reshape(weight.shape)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02).to(dtype)


@pytest.mark.parametrize("shape", [(64, 64), (40, 128), (300, 192), (5, 64)])
def test_values_are_those_of_the_format_written_out(shape: tuple[int, int]) -> None:
    weight = drawn(*shape)
    packed = quantise(weight)
    assert torch.equal(dequantise([packed], torch.float32)[0], torch.from_numpy(values_of(weight.numpy())))
    assert sum(part.numel() * part.element_size() for part in packed) == bytes_of(weight.numel())


def test_bytes_a_weight_are_those_of_the_paper() -> None:
    assert bytes_of(4096 * 4096) * 8 / 4096**2 == pytest.approx(4.127, abs=1e-3)


def test_levels_of_scales_are_256_and_reach_one() -> None:
    levels = np.array(scale_levels())
    assert len(levels) == 256 and np.all(np.diff(levels) > 0) and levels[-1] == 1 and 0.0 in levels
    assert np.count_nonzero(levels > 0) - 1 == np.count_nonzero(levels < 0) == 127, "signs mirror each other but for 1"
    np.testing.assert_array_equal(levels[:127], -levels[128:255][::-1])


def test_chunks_and_zeros_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(30, 128)
    weight[3] = 0
    whole = quantise(weight)
    monkeypatch.setattr(op, "CHUNK", 7)
    assert all(torch.equal(a, b) for a, b in zip(whole, quantise(weight), strict=True))
    assert torch.equal(dequantise([whole], torch.float32)[0][3], torch.zeros(128)), "a block of zeros stays one"
    with pytest.raises(ValueError, match="multiple of 64"):
        quantise(drawn(4, 100))


def test_rows_alone_are_those_of_the_whole() -> None:
    packed = quantise(drawn(400, 192))
    whole = dequantise([packed], torch.float32)[0]
    for first, last in ((0, 1), (37, 300), (399, 400), (400, 400)):
        part = NF4(packed.codes[first:last], packed.scales[first:last], packed.outer)
        assert torch.equal(dequantise_rows(part, torch.float32, first), whole[first:last])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bitsandbytes_agrees_bit_for_bit(dtype: torch.dtype) -> None:
    """Scales may be one level off: some CPU builds look levels up in a table of 65,536 steps instead of finding the nearest."""
    functional = pytest.importorskip("bitsandbytes.functional")
    for seed, shape in enumerate([(300, 128), (256, 1024), (1000, 704)]):
        weight = drawn(*shape, dtype=torch.float32 if dtype == torch.float32 else torch.bfloat16, seed=seed).to(dtype)
        codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        if state.state2.code[0] == -1:
            pytest.skip("this CPU build moves the lowest level of scales to -1, unlike its GPU build")
        ours = quantise(weight)
        assert torch.equal(ours.codes.view(-1), codes.view(-1))
        assert torch.equal(ours.outer, torch.cat([state.state2.absmax, state.offset.view(1)]))
        off = (ours.scales.view(-1).int() - state.absmax.int()).abs()
        assert off.max() <= 1 and off.count_nonzero() <= max(2, len(off) // 200)
        theirs = NF4(ours.codes, state.absmax.view(ours.scales.shape), ours.outer)
        assert torch.equal(dequantise([theirs], dtype)[0], functional.dequantize_4bit(codes, state))


def test_operator_is_one_that_compilers_take() -> None:
    weights = [quantise(drawn(8, 64)), quantise(drawn(5, 128))]
    torch.library.opcheck(op._dequantise, (*map(list, zip(*weights, strict=True)), torch.bfloat16))


def test_linear_gives_the_values_and_gradient_of_its_dense_weight() -> None:
    packed, x = quantise(drawn(96, 64)), drawn(3, 5, 64, seed=1).double().requires_grad_()
    dense = dequantise([packed], torch.float64)[0]
    out = nf4_linear(x, packed)
    torch.testing.assert_close(out, x @ dense.t())
    (got,) = torch.autograd.grad(out.square().sum(), x)
    (wanted,) = torch.autograd.grad((x @ dense.t()).square().sum(), x)
    torch.testing.assert_close(got, wanted)
    assert torch.autograd.gradcheck(lambda y: nf4_linear(y, packed), (x[:1, :1],))


def test_linear_keeps_nothing_dense() -> None:
    packed, kept = quantise(drawn(96, 64)), list[int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel() * t.element_size()), t)[1], lambda t: t):
        nf4_linear(drawn(4, 64, seed=1).requires_grad_(), packed)
    assert sum(kept) == bytes_of(96 * 64)


def adapted(dense: list[Tensor], rank: int = 4) -> list[Projection]:
    return [
        Projection(
            w, None, drawn(rank, w.shape[1], seed=i + 9).requires_grad_(), drawn(w.shape[0], rank, seed=i + 99).requires_grad_(), 2.0
        )
        for i, w in enumerate(dense)
    ]


@pytest.mark.parametrize("kind", ["linears", "mlp"])
def test_lora_nodes_make_all_weights_once_in_each_direction(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = [(128, 64), (128, 64), (64, 128)] if kind == "mlp" else [(128, 64), (64, 64), (64, 64)]
    packed = [quantise(drawn(*shape, seed=i)) for i, shape in enumerate(shapes)]
    ones = adapted(dequantise(packed, torch.float32))
    held = [one._replace(weight=weight) for one, weight in zip(ones, packed, strict=True)]
    mixed = [held[0], ones[1], held[2]]
    calls: list[int] = []
    monkeypatch.setattr("rayft_kernels.lora.linears.dequantise", lambda some, dtype: (calls.append(len(some)), dequantise(some, dtype))[1])
    x = drawn(7, 64, seed=5).requires_grad_()

    def run(projections: list[Projection]) -> list[Any]:
        outs = [lora_mlp(x, *projections, "silu")] if kind == "mlp" else list(lora_linears(x, projections))
        leaves = [x, *(t for one in projections for t in (one.a, one.b) if t is not None)]
        return [*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), leaves)]

    expected = run(ones)
    assert calls == []
    for projections, each in ((held, 3), (mixed, 2)):
        calls.clear()
        assert all(torch.equal(a, b) for a, b in zip(run(projections), expected, strict=True))
        assert calls == [each, each]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.gate, self.narrow = nn.Linear(64, 32), nn.Linear(64, 4), nn.Linear(32, 64)
        self.norm, self.kept = nn.LayerNorm(64), nn.Linear(64, 64)


def test_only_wide_linear_layers_of_blocks_are_replaced() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()]), "lm_head": nn.Linear(64, 100)})
    layers = model["layers"]
    assert isinstance(layers, nn.ModuleList)
    names = choose(model, layers, ["kept"])
    assert names == ["layers.0.q_proj", "layers.1.q_proj"]
    replace(model, names)
    part = model.get_submodule("layers.0.q_proj")
    assert isinstance(part, NF4Linear) and (part.in_features, part.out_features) == (64, 32) and part.bias is not None
    assert part.weight.dtype == torch.uint8 and not part.weight.requires_grad
    with pytest.raises(ConfigError, match="multiple of 64"):
        replace(model, [])
