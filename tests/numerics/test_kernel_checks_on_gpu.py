"""The Triton ops on a CUDA device: each check of kernels/bench, in bfloat16."""

from __future__ import annotations

import pytest
import torch

from bench import check_glu, check_linear_ce, check_lora, check_norm_rope, check_rms_norm

CHECKS = check_norm_rope.checks("cuda", (torch.bfloat16,)) | check_glu.checks("cuda", (torch.bfloat16,))
CHECKS |= check_rms_norm.checks("cuda", (torch.bfloat16,))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_check(name: str) -> None:
    CHECKS[name]()


@pytest.mark.gpu
@pytest.mark.parametrize("module", [check_norm_rope, check_rms_norm, check_glu, check_linear_ce, check_lora])
def test_beyond_32_bits(module: object) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB")
    module.check_large("cuda")
