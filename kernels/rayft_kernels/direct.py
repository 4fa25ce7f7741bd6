"""Whether an operation may call its body itself. torch's dispatcher takes some 50 microseconds each way to find the same function.

Operators of torch are what torch.compile, fake tensors, selective checkpointing and torch's other modes see of an operation. Where none
of these looks on, an autograd function around the same body gives the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

PLAIN = frozenset((Tensor, Parameter))


def unobserved(*tensors: Tensor | None) -> bool:
    """No compiler or transform traces, no mode intercepts, and no tensor is of a class with rules of its own (fake, distributed)."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return all(tensor is None or type(tensor) in PLAIN for tensor in tensors)
