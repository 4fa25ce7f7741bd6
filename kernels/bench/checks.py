"""Comparisons that the checks of the ops share. A check is a function of a device that raises AssertionError."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter

import torch
from torch import Tensor

Fn = Callable[..., Tensor | tuple[Tensor | None, ...]]


def outputs_of(fn: Fn, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What fn returns, as a list without the Nones."""
    out = fn(*inputs)
    return [out] if isinstance(out, Tensor) else [y for y in out if y is not None]


def results(fn: Fn, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of fn and the gradients of its inputs for the given gradients of its outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = outputs_of(fn, leaves)
    return [y.detach() for y in outputs] + list(
        torch.autograd.grad(outputs, leaves, [g.to(y.dtype) for g, y in zip(grads, outputs, strict=True)])
    )


def assert_as_exact_as(ours: list[Tensor], torchs: list[Tensor], exact: list[Tensor], times: float = 2.0) -> None:
    """The largest error of each tensor is at most `times` that of torch in the same type (and never NaN)."""
    for index, (a, b, truth) in enumerate(zip(ours, torchs, exact, strict=True)):
        assert a.shape == truth.shape, f"tensor {index}: shape {tuple(a.shape)}, not {tuple(truth.shape)}"
        error, allowed = ((x.double() - truth).abs().max().item() if x.numel() else 0.0 for x in (a, b))
        floor = torch.finfo(a.dtype).eps * max(1.0, truth.abs().max().item()) if truth.numel() else 0.0
        assert error <= times * allowed + floor, f"tensor {index}: error {error:.3e}, torch's {allowed:.3e}"


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    """Bit for bit."""
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        assert torch.equal(x, y), f"tensor {index} differs by {(x.double() - y.double()).abs().max().item():.3e}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are filled with NaN, so that an element which nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def randn(*shape: int, device: str, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers that are the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


def kinds_of_failure() -> tuple[type[Exception], ...]:
    """What a check or a foreign implementation may raise."""
    kinds: tuple[type[Exception], ...] = (AssertionError, RuntimeError, TypeError, ValueError, LookupError, ImportError, AttributeError)
    if triton := sys.modules.get("triton"):
        kinds += (triton.TritonError,)  # a kernel that does not compile or fit; no RuntimeError
    return kinds


def failures(checks: dict[str, Callable[[], None]]) -> list[str]:
    """Run the checks, print PASS or FAIL for each, and name those that failed."""
    failed = []
    kinds = kinds_of_failure()
    for name, check in checks.items():
        start = perf_counter()
        try:
            check()
            print(f"PASS {name} ({perf_counter() - start:.1f} s)", flush=True)
        except kinds as error:
            failed.append(name)
            print(f"FAIL {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    return failed
