"""Run as a program: the Triton bodies of norm + RoPE and of the gated activations, interpreted on CPU tensors, through their checks.

A process of its own, because Triton decides when its functions are defined, once for the process, whether to interpret them. The
operators get the Triton bodies on a CPU, so that the checks call what they call on a GPU. Types are float32 and
float16: the interpreter truncates where a GPU rounds to bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.runtime import interpreter

from bench import check_glu, check_norm_rope, check_rms_norm
from bench.check_norm_rope import Case
from bench.checks import failures
from rayft_kernels.glu import op as glu_op
from rayft_kernels.glu import triton as glu_body
from rayft_kernels.norm_rope import op as norm_op
from rayft_kernels.norm_rope import triton as norm_body

PROGRAMS = 3
"""Of the backward: fewer than tiles, so that each program takes several, and not the same number."""
TILES = norm_body.Tiles(rows=8, warps=4)
BLOCK = glu_body.Block(elements=512)
CASES = (
    Case(seq=9, dim=64, rotated=64, heads=(3, 1, 2), unit_offset=True),
    Case(seq=3, dim=96, rotated=32, heads=(2, 1, 1), shared_table=False),
    Case(seq=7, dim=80, rotated=80, heads=(1, 0, 0), batch=1),
    Case(seq=3, dim=64, rotated=0, heads=(1, 2, 1), scale=False),
)


def allow_scalars_of_one_element() -> None:
    """The interpreter keeps scalars as arrays of one element, which numpy 2.4 no longer takes as the bounds of a range."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def run_triton_on_cpu() -> None:
    """Triton bodies in place of the torch ones."""
    dense = norm_op._with_dense_columns

    def forward(*args: Any) -> tuple[torch.Tensor, ...]:
        return norm_op._filled(args[0], *norm_body.forward(*map(dense, args), TILES))

    def backward(*args: Any) -> tuple[torch.Tensor, ...]:
        *rest, need_wq, need_wk = map(dense, args)
        return norm_op._filled(args[3], *norm_body.backward(tuple(rest[:3]), *rest[3:], (need_wq, need_wk), PROGRAMS, TILES))

    norm_op._bodies = lambda _: (forward, backward)
    bodies = {
        "glu": lambda *args: glu_body.forward(*args, BLOCK),
        "glu_backward": lambda *args: glu_body.backward(*args, BLOCK),
        "glu_packed": lambda *args: glu_body.forward(*args[0].chunk(2, -1), args[1], BLOCK),
        "glu_packed_backward": lambda *args: glu_body.backward_packed(*args, BLOCK),
    }
    glu_op._bodies = lambda _: bodies


def main() -> int:
    """Exit code 1 if a check fails."""
    allow_scalars_of_one_element()
    run_triton_on_cpu()
    found = {f"norm_rope {case.name}": lambda case=case: check_norm_rope.check_error(case, torch.float32, "cpu") for case in CASES}
    found |= {
        f"norm_rope {casts}": lambda casts=casts: check_norm_rope.check_casts(casts, torch.float16, "cpu", CASES[0])
        for casts in ("gemma", "llama")
    }
    found["norm_rope twice"] = lambda: check_norm_rope.check_twice(CASES[1], torch.float32, "cpu")
    found["norm_rope gradients kept"] = lambda: check_norm_rope.check_gradients_kept("cpu")
    for shape in ((5, 48), (0, 8)):
        found[f"rms_norm {shape}"] = lambda shape=shape: check_rms_norm.check_error(shape, torch.float32, "cpu")
    found["rms_norm twice"] = lambda: check_rms_norm.check_twice(torch.float32, "cpu")
    found["norm_rope operator"] = lambda: check_norm_rope.check_operator("cpu")
    found["glu operator"] = lambda: check_glu.check_operator("cpu")
    for activation in glu_op.ACTIVATIONS:
        found[f"glu {activation}"] = lambda act=activation: check_glu.check_error(act, (2, 700), torch.float32, "cpu")
    found["glu twice"] = lambda: check_glu.check_twice("cpu", torch.float32)
    found["glu extremes"] = lambda: check_glu.check_extremes("cpu", torch.float32)
    return 1 if failures(found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
