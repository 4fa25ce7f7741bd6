"""Run as a program: the CUDA body of the head operations on CPU tensors, its Triton kernels interpreted, through its checks.

A process of its own, because Triton decides when its functions are defined whether to interpret them. The operators get the CUDA
body as their CPU kernel. Chunks and blocks are small, so that every loop runs more than once. Types are float32 and float16: the
interpreter truncates where a GPU rounds to bfloat16. float16 takes the body's way without exponentials.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from triton.runtime import interpreter

from bench import check_linear_ce
from bench.check_linear_ce import Case
from bench.checks import failures
from rayft_kernels.linear_cross_entropy import cuda_body, op, scaling
from rayft_kernels.linear_cross_entropy import triton as kernels
from rayft_kernels.linear_cross_entropy.chunks import Head

CASES = (
    Case(rows=9, hidden=16, vocab=75, size=4.0),
    Case(rows=0, vocab=20),
    Case(rows=5, hidden=16, vocab=40, bias=True, softcap=5.0, scale=0.7, smoothing=0.1, z_loss=1e-2),
    Case(rows=5, hidden=16, vocab=75, bias=True, softcap=3.0, lean=True),
)


def allow_scalars_of_one_element() -> None:
    """The interpreter keeps scalars as arrays of one element, which numpy 2.4 no longer takes as the bounds of a range."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def run_cuda_body_on_cpu() -> None:
    """The CUDA body as the operators' CPU kernel, in chunks of 4 rows or 32 columns and blocks of 32."""
    kernels.BLOCK = 32
    cuda_body.row_chunk = lambda *_: 4
    cuda_body.column_chunk = lambda *_: 32

    def nll(hidden: Any, weight: Any, targets: Any, loss_weights: Any, bias: Any, softcap: Any, scale: Any, *options: Any) -> Any:
        return op._filled(hidden, *cuda_body.weighted_nll(hidden, Head(weight, bias, softcap, scale), targets, loss_weights, *options))

    def terms(hidden: Any, weight: Any, targets: Any, *head: Any) -> Any:
        return cuda_body.token_terms(hidden, Head(weight, *head), targets)

    def backward(
        a: Any, b: Any, hidden: Any, weight: Any, targets: Any, bias: Any, lse: Any, entropy: Any, cap: Any, scale: Any, needs: Any
    ) -> Any:
        head = Head(weight, bias, cap, scale)
        return op._in_their_types(hidden, head, cuda_body.token_terms_backward(a, b, hidden, head, targets, lse, entropy, needs))

    def scale_in_place(grad: Any, factor: Any) -> None:
        kernels.scale(grad, factor, grad)

    op._weighted_nll.register_kernel("cpu", nll)
    op._token_logprobs.register_kernel("cpu", terms)
    op._token_logprobs_backward.register_kernel("cpu", backward)
    scaling.scale_.register_kernel("cpu", scale_in_place)
    scaling.scaled.register_kernel("cpu", lambda grad, factor, dtype: kernels.scale(grad, factor, torch.empty_like(grad, dtype=dtype)))


def main() -> int:
    """Exit code 1 if a check fails."""
    allow_scalars_of_one_element()
    run_cuda_body_on_cpu()
    found = {}
    for case in CASES:
        found[f"error {case.name}"] = partial(check_linear_ce.check_error, case, torch.float32, "cpu")
        found[f"terms {case.name}"] = partial(check_linear_ce.check_terms, case, torch.float32, "cpu")
    found["error float16"] = partial(check_linear_ce.check_error, replace(CASES[0], rows=5), torch.float16, "cpu")
    found["terms float16"] = partial(check_linear_ce.check_terms, replace(CASES[0], rows=5), torch.float16, "cpu")
    found["rising"] = partial(check_linear_ce.check_rising, torch.float32, "cpu")
    found["frozen"] = partial(check_linear_ce.check_frozen, Case(rows=3, hidden=8, vocab=20, bias=True, softcap=4.0), "cpu")
    return 1 if failures(found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
