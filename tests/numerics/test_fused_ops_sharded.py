"""The fused ops inside an FSDP2 module on two ranks: gradients of sharded weights are those of one process."""

from __future__ import annotations

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from ranks import run_ranks
from rayft_kernels import glu_packed, qkv_norm_rope, rms_norm

HEADS, DIM, WIDTH = 3, 8, 12


class Layer(nn.Module):
    """A decoder layer without attention: norm, projections, head norms and rotation, gated activation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q_norm = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.rand(DIM) + 0.5)
        self.q_proj, self.gate_up = nn.Linear(WIDTH, HEADS * DIM), nn.Linear(HEADS * DIM, 2 * WIDTH)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, WIDTH] to the same."""
        q = self.q_proj(rms_norm(x, self.norm)).view(*x.shape[:-1], HEADS, DIM)
        q, _, _ = qkv_norm_rope(q, None, None, self.q_norm, None, cos, sin)
        return x + glu_packed(self.gate_up(q.flatten(2)))


def gradients(rank: int, world: int) -> list[Tensor]:
    """Of a loss through two checkpointed layers, sharded if there are several ranks."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    layers = [Layer(), Layer()]
    x, cos, sin = torch.randn(2, 5, WIDTH), torch.randn(1, 5, DIM), torch.randn(1, 5, DIM)
    if world > 1:
        for layer in layers:
            fully_shard(layer)
    for layer in layers:
        x = torch.utils.checkpoint.checkpoint(layer, x, cos, sin, use_reentrant=False)
    x.square().sum().backward()
    grads = [p.grad for layer in layers for p in layer.parameters()]
    return [g.full_tensor() if world > 1 else g for g in grads]


def test_sharded_gradients_equal_those_of_one_process() -> None:
    expected = gradients(0, 1)
    for got in run_ranks(2, gradients):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
