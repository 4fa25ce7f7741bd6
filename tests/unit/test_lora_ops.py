"""Fused LoRA operations: gradients by finite differences, every option against plain torch and against peft's own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from bench import check_lora
from bench.check_lora import cases, converted, values, written_out
from rayft.models.adapt import DropoutKeys, RowDropout
from rayft.models.forwards import projection_of
from rayft_kernels import Projection, TokenDropout, lora_linear, lora_linears, lora_mlp
from rayft_kernels.lora.dropout import token_dropout

CHECKS = {
    name: check
    for name, check in check_lora.checks("cpu", (torch.float64, torch.bfloat16), backend="aot_eager").items()
    if "float64" in name or "large rank" in name or name.startswith(("lora twice", "lora strides", "lora compile"))
}
"""The float64 ones, and of those in a low precision a few; `gpu` runs all."""


@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str) -> None:
    CHECKS[name]()


@pytest.mark.gpu
@pytest.mark.parametrize("name", check_lora.checks("cuda", (torch.bfloat16, torch.float32)))
def test_check_on_gpu(name: str) -> None:
    check_lora.checks("cuda", (torch.bfloat16, torch.float32))[name]()


def tiny(*kinds: str, activation: bool = False) -> tuple[Tensor, list[Projection]]:
    shapes = ((5, 4), (5, 4), (4, 5)) if activation else ((5, 4), (4, 4), (3, 4))
    names = {"plain": {"rank": 2}, "bias": {"rank": 1, "bias": True, "lora_bias": True}, "dora": {"rank": 2, "magnitude": True}}
    ones = [
        check_lora.made(i, out, width, 3, "cpu", **names.get(kind, {"rank": 2, "dropout": kind}))
        for i, (kind, (out, width)) in enumerate(zip(kinds, shapes, strict=True))
    ]
    return torch.randn(3, 4, dtype=torch.float64, requires_grad=True), ones


@pytest.mark.parametrize("kinds", [("plain", "bias", "hash"), ("mask", "plain", "bias")])
def test_gradients_by_finite_differences(kinds: tuple[str, ...]) -> None:
    """DoRA is left out here: its norm is a constant for the gradient, so finite differences give something else."""
    torch.manual_seed(0)
    for call, activation in ((lambda x, ones: lora_linears(x, ones), False), (lambda x, ones: lora_mlp(x, *ones, "gelu"), True)):
        x, ones = tiny(*kinds, activation=activation)
        leaves = [(i, name) for i, one in enumerate(ones) for name in ("bias", "a", "b", "lora_bias") if getattr(one, name) is not None]

        def rebuilt(x: Tensor, *tensors: Tensor, call: Any = call, ones: Any = ones, leaves: Any = leaves) -> Any:
            changed = list(ones)
            for (i, name), tensor in zip(leaves, tensors, strict=True):
                changed[i] = changed[i]._replace(**{name: tensor})
            return call(x, changed)

        assert torch.autograd.gradcheck(rebuilt, (x, *(getattr(ones[i], name) for i, name in leaves)))


def test_keys_that_are_values_collect_both_gradients() -> None:
    """Queries and keys without a value projection: what uses the keys twice sends back the sum; queries alone work too."""
    ones, x = cases(("bias", "hash"), ((8, 6), (6, 6)), 5, "cpu"), torch.randn(5, 6, dtype=torch.float64)

    def used(project: Callable[..., Any]) -> Callable[..., list[Tensor]]:
        def fn(x: Tensor, ones: list[Projection]) -> list[Tensor]:
            query, key = project(x, ones)
            return [query, key.sin() + key.square(), key]

        return fn

    for a, b in zip(values(used(lora_linears), x, ones), values(used(check_lora.linears_written_out), x, ones), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(lora_linear(x, ones[0]), written_out(x, ones[0]))


def test_a_magnitude_of_zero_gives_finite_gradients() -> None:
    (one,) = cases(("dora, bias",), ((6, 4),), 5, "cpu")
    assert one.magnitude is not None
    with torch.no_grad():
        one.magnitude[2] = 0
    x = torch.randn(5, 4, dtype=torch.float64)
    for a, b in zip(values(check_lora.linears, x, [one]), values(check_lora.linears_written_out, x, [one]), strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


def test_what_cannot_be_is_refused() -> None:
    (one,) = cases(("plain",), ((6, 4),), 5, "cpu")
    x = torch.randn(5, 4, dtype=torch.float64)
    assert isinstance(one.weight, Tensor)
    for bad, field in (
        (one._replace(weight=one.weight.requires_grad_()), "weight"),
        (one._replace(weight=one.weight.detach(), b=None), "a, b"),
        (Projection(one.weight.detach(), magnitude=torch.ones(6)), "magnitude"),
        (one._replace(weight=one.weight.detach(), magnitude=torch.ones(6), lora_bias=torch.ones(6)), "lora_bias"),
    ):
        with pytest.raises(ValueError, match=field):
            lora_linear(x, bad)
    with pytest.raises(ValueError, match="activation"):
        lora_mlp(x, one, one, one, "relu")


def saved_elements(fn: Callable[[], object], given: list[Projection]) -> int:
    """Elements of the different tensors that autograd keeps and that were not given."""
    known = {value.untyped_storage().data_ptr() for one in given for value in one if isinstance(value, Tensor)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = fn()
    del out
    return sum(kept.values())


def test_the_input_gate_and_up_are_all_that_is_kept() -> None:
    tokens, hidden, wide = 64, 32, 80
    ones = [converted(one, torch.float32) for one in cases(("plain",) * 3, ((wide, hidden), (wide, hidden), (hidden, wide)), tokens, "cpu")]
    x = torch.randn(tokens, hidden, requires_grad=True)
    low = 8 * tokens
    assert saved_elements(lambda: lora_mlp(x, *ones, "silu"), ones) == tokens * (hidden + 2 * wide) + 3 * low
    assert saved_elements(lambda: lora_linears(x, ones[:2]), ones) == tokens * hidden + 2 * low


def test_autocast_computes_in_its_type_and_returns_gradients_in_the_parameters() -> None:
    ones = [converted(one, torch.float32) for one in cases(("bias", "plain", "plain"), ((8, 6), (8, 6), (6, 8)), 5, "cpu")]
    x = torch.randn(5, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = lora_mlp(x, *ones, "silu")
    out.sum().backward()
    low = [converted(one, torch.bfloat16) for one in ones]
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, lora_mlp(x.bfloat16(), *low, "silu"))
    assert ones[0].a is not None and ones[0].a.grad is not None and ones[0].a.grad.dtype == torch.float32


PEFT: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 3},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.4},
    "dora and dropout": {"use_dora": True, "lora_dropout": 0.4},
    "lora_bias": {"lora_bias": True},
}


@pytest.mark.parametrize("kind", PEFT)
@pytest.mark.parametrize("mode", ["train", "eval", "disabled"])
def test_every_option_equals_pefts_own_module(kind: str, mode: str) -> None:
    torch.manual_seed(0)
    module = nn.ModuleDict({"layer": nn.Linear(6, 5)})
    inject_adapter_in_model(LoraConfig(**{"target_modules": ["layer"], "r": 2, "lora_alpha": 3, **PEFT[kind]}), module)
    layer: Any = module["layer"].train(mode == "train")
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("base_layer" not in name)
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    if mode == "disabled":
        layer.enable_adapters(False)
    x = torch.randn(2, 7, 6, requires_grad=True)

    def run(fn: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        out = fn(x)
        trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
        grads = torch.autograd.grad((out * torch.arange(5)).sum(), trained, allow_unused=True, materialize_grads=True)
        return [out, *grads]

    for a, b in zip(run(lambda x: lora_linear(x, projection_of(layer, x))), run(layer), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_hash_drops_what_row_dropout_drops() -> None:
    keys = DropoutKeys()
    keys.tokens = torch.randint(0, 2**32, (9,))
    layer = RowDropout(0.3, 2**40 + 17, keys)
    x = torch.randn(1, 9, 33)
    assert torch.equal(layer(x)[0], token_dropout(x[0], keys.tokens, layer.seed, layer.p))
    module = nn.Linear(33, 4)
    dropout = TokenDropout(keys.tokens, layer.seed, 0.3)
    one = Projection(module.weight.detach(), None, torch.randn(2, 33), torch.randn(4, 2), 1.0, dropout=dropout)
    assert one.a is not None and one.b is not None
    torch.testing.assert_close(lora_linear(x, one), F.linear(x, module.weight) + layer(x) @ one.a.t() @ one.b.t())
