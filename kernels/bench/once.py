"""Every operation once on small shapes of one GPU, for compute-sanitizer: `kernels/bench/sanitize.sh`.

Odd sizes leave masked edges in every tile, where a step outside a tensor would happen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench import check_attention, check_glu, check_linear_ce, check_lora, check_moe, check_nf4, check_norm_rope, check_rms_norm
from bench.check_attention import Case as Documents
from bench.check_linear_ce import Case as Head
from bench.check_norm_rope import Case as Norm
from bench.checks import failures

LOW = torch.bfloat16
NORMS = (
    Norm(seq=9, heads=(3, 1, 2), dim=80, rotated=80, unit_offset=True),
    Norm(seq=5, heads=(2, 1, 0), dim=128, rotated=64, shared_table=False),
)
HEADS = (
    Head(9, 24, 203),
    Head(9, 24, 203, bias=True, softcap=5.0, smoothing=0.1, z_loss=1e-2),
    Head(9, 24, 203, lean=True),
)


def checks(device: str) -> dict[str, Callable[[], None]]:
    """By name; each compares with torch as well."""
    found: dict[str, Callable[[], None]] = {}
    found |= {f"norm_rope {case.name}": partial(check_norm_rope.check_error, case, LOW, device) for case in NORMS}
    found["rms_norm"] = partial(check_rms_norm.check_error, (5, 760), LOW, device)
    found |= {f"glu {act}": partial(check_glu.check_error, act, (3, 2049), LOW, device) for act in ("silu", "gelu")}
    found |= {f"linear_ce {case.name}": partial(check_linear_ce.check_error, case, LOW, device) for case in HEADS}
    found["linear_ce terms"] = partial(check_linear_ce.check_terms, HEADS[0], LOW, device)
    found["lora mlp"] = partial(check_lora.check_against, ("plain", "hash", "dora"), "silu", LOW, device)
    found["lora linears"] = partial(check_lora.check_against, ("hash", "plain", "mask"), None, LOW, device)
    documents = (Documents((33, 1, 70, 5), 512), Documents((33, 1, 70, 5), 80, window=9, softcap=20.0))
    found |= {f"attention {case.name}": partial(check_attention.check_error, case, LOW, device) for case in documents}
    found["moe_lora"] = partial(check_moe.check_against, check_moe.CASES["adapters"], LOW, device)
    found["nf4"] = partial(check_nf4.check_linears, LOW, device)
    return found


if __name__ == "__main__":
    raise SystemExit(1 if failures(checks("cuda")) else 0)
