"""The fused ops inside FSDP2 modules on two ranks: gradients of sharded weights are those of one process."""

from __future__ import annotations

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from ranks import run_ranks
from rayft_kernels import Projection, glu_packed, lora_linear, lora_mlp, qkv_norm_rope, rms_norm, token_logprobs, weighted_nll_sum

HEADS, DIM, WIDTH, VOCAB = 3, 8, 12, 21


class Layer(nn.Module):
    """A decoder layer without attention: norm, projections, head norms and rotation, gated activation, an adapted MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q_norm = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.rand(DIM) + 0.5)
        self.q_proj, self.gate_up = adapted(WIDTH, HEADS * DIM), nn.Linear(HEADS * DIM, 2 * WIDTH)
        self.gate, self.up, self.down = adapted(WIDTH, 20), adapted(WIDTH, 20), adapted(20, WIDTH)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, WIDTH] to the same."""
        q = lora_linear(rms_norm(x, self.norm), projection(self.q_proj)).view(*x.shape[:-1], HEADS, DIM)
        q, _, _ = qkv_norm_rope(q, None, None, self.q_norm, None, cos, sin)
        x = x + glu_packed(self.gate_up(q.flatten(2)))
        return x + lora_mlp(x, *map(projection, (self.gate, self.up, self.down)), "silu")


class Model(nn.Module):
    """Two layers, of which one is computed again in the backward, and a head that gives a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([Layer(), Layer()]), nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, WIDTH] to the sum of both head operations."""
        x = torch.utils.checkpoint.checkpoint(self.layers[0], x, cos, sin, use_reentrant=False)
        rows = self.layers[1](x, cos, sin).flatten(0, 1)
        head, targets = self.head, torch.arange(len(rows)) % VOCAB
        logprobs, entropy = token_logprobs(rows, head.weight, targets, bias=head.bias)
        weighted = weighted_nll_sum(rows, head.weight, targets, torch.linspace(0, 1, len(rows)), bias=head.bias)
        return weighted + logprobs.square().sum() + entropy.sum()


def adapted(width: int, out: int) -> nn.ParameterDict:
    """A frozen weight and the two matrices of an adapter."""
    made = {"weight": torch.randn(out, width) / 4, "a": torch.randn(2, width), "b": torch.randn(out, 2)}
    return nn.ParameterDict({name: nn.Parameter(value, requires_grad=name != "weight") for name, value in made.items()})


def projection(tensors: nn.ParameterDict) -> Projection:
    """What the ops take; called inside the forward of the layer, where parameters are whole."""
    return Projection(tensors["weight"], a=tensors["a"], b=tensors["b"], scale=0.5)


def gradients(rank: int, world: int) -> list[Tensor]:
    """Of the loss by every trained parameter, sharded if there are several ranks."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Model()
    x, cos, sin = torch.randn(2, 5, WIDTH), torch.randn(1, 5, DIM), torch.randn(1, 5, DIM)
    if world > 1:
        for layer in model.layers:
            fully_shard(layer)
        fully_shard(model)
    model(x, cos, sin).backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    return [g.full_tensor() if world > 1 else g for g in grads]


def test_sharded_gradients_equal_those_of_one_process() -> None:
    expected = gradients(0, 1)
    for got in run_ranks(2, gradients):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
