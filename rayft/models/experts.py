"""Experts on the fused operation, by transformers' own interface for experts: which can be, and what runs in their place.

transformers gives each class of experts a description (`use_experts_implementation`): orientation of its stacks, biases, how gate and up
are held, how they are joined. What fits that description to the fused operation is taken, whatever the family. Adapters are peft's
wrappers of parameters; where they are fused, the wrappers' own forwards, which would build W + s B A of the whole stack, are passed by.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rayft_kernels import ExpertAdapter, moe_lora
from rayft_kernels.moe_lora.op import MAX_RANK

EXPERTS = "rayft"
"""Name under which the operation is registered with transformers."""
ADAPTER = "default"
"""The one adapter that rayft injects."""
STACKS = ("gate_up_proj", "down_proj")


class ExpertsPlan(NamedTuple):
    """How one layer's experts are run.

    Attributes:
        activation: as the operation names it.
        adapters: name of the stack -> peft's wrapper of it, for those that have one.
        config: the configuration that the experts had before.
    """

    activation: str
    adapters: dict[str, Any]
    config: Any


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The registered function: hidden_states [T, H], top_k_index and top_k_weights [T, k] -> [T, H]."""
    plan: ExpertsPlan = self.rayft_plan
    of_gate_up, of_down = (_adapter(plan.adapters.get(name)) for name in STACKS)
    return moe_lora(
        hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj, plan.activation,
        gate_up_adapter=of_gate_up, down_adapter=of_down, transposed=self.is_transposed,
    )  # fmt: skip


def _adapter(wrapper: Any) -> ExpertAdapter | None:
    """A and B as peft holds them; None while the adapter is disabled or merged."""
    if wrapper is None or wrapper.disable_adapters or wrapper.merged:
        return None
    return ExpertAdapter(wrapper.lora_A[ADAPTER].weight, wrapper.lora_B[ADAPTER].weight, wrapper.scaling[ADAPTER])


def _past_wrappers(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Stands for the forward of peft's outermost wrapper."""
    out: Tensor = self.get_base_layer()(*args, **kwargs)
    return out


def experts_of(layer: nn.Module) -> Iterator[tuple[Any, Any]]:
    """(what is called, the experts themselves) of every stack of experts in a layer; the same where there is no adapter."""
    seen: set[nn.Module] = set()
    for part in layer.modules():
        core = _core(part)
        if core not in seen and isinstance(getattr(core, "down_proj", None), nn.Parameter) and hasattr(core, "is_transposed"):
            seen.add(core)
            yield part, core


def _core(part: Any) -> Any:
    return part.get_base_layer() if is_wrapper(part) else part


def is_wrapper(part: nn.Module) -> bool:
    """Whether it is peft's wrapper of a parameter."""
    return hasattr(part, "parameter_name") and hasattr(part, "lora_A")


def wrappers(outer: Any) -> dict[str, Any]:
    """Name of the parameter -> its wrapper, from the outermost one inwards."""
    found: dict[str, Any] = {}
    while is_wrapper(outer):
        found[outer.parameter_name] = outer
        outer = outer.base_layer
    return found


def update_of(wrapper: Any, stack: Tensor) -> Tensor:
    """stack + scaling B_e A_e of every expert, in float32, sharded as `stack` is; for exports, not inside of a forward.

    Args:
        wrapper: peft's, of this stack.
        stack: [E, out, in], or [E, in, out] where the class says so.
    """
    a, b = (_whole(side[ADAPTER].weight).float() for side in (wrapper.lora_A, wrapper.lora_B))
    experts = stack.shape[0]
    a, b = a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)
    transposed, scaling = wrapper.get_base_layer().is_transposed, float(wrapper.scaling[ADAPTER])

    def merged(local: Tensor, first: int) -> Tensor:
        here = slice(first, first + local.shape[0])
        update = b[here].to(local.device) @ a[here].to(local.device)
        return local.float() + scaling * (update.transpose(1, 2) if transposed else update)

    if not isinstance(stack, DTensor):
        return merged(stack, 0)
    _, (first, *_) = compute_local_shape_and_global_offset(stack.shape, stack.device_mesh, stack.placements)
    local = merged(stack.to_local(), first)
    return DTensor.from_local(local, stack.device_mesh, stack.placements, run_check=False, shape=stack.shape, stride=stack.stride())


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def other_experts(outer: Any, core: Any, activations: dict[str, str]) -> str | None:
    """Why the fused operation may not stand for these experts, or None."""
    name = type(core).__name__
    if not core.has_gate or core.has_bias or not core.is_concatenated or getattr(core, "has_post_expert_norm", False):
        return f"{name} has biases, a norm, no gate, or gate and up interleaved"
    if type(core)._apply_gate.__name__ != "_default_apply_gate":
        return f"{name} joins gate and up in its own way"
    if type(core.act_fn).__name__ not in activations:
        return f"no kernel has the activation {type(core.act_fn).__name__}"
    if getattr(core, "_is_expert_parallel", False) or "forward" in vars(outer):
        return f"{name}.forward is replaced already"
    if any(part._forward_hooks or part._forward_pre_hooks or part._backward_hooks for part in outer.modules()):
        return "the experts have hooks, which would not run"
    return next((reason for part in wrappers(outer).values() if (reason := _other_adapter(part))), None)


def _other_adapter(wrapper: Any) -> str | None:
    if wrapper.parameter_name not in STACKS or list(wrapper.lora_A) != [ADAPTER] or wrapper.active_adapters != [ADAPTER]:
        return "the experts have an adapter other than one active LoRA of gate_up_proj and down_proj"
    return f"the rank is above {MAX_RANK}" if wrapper.r[ADAPTER] > MAX_RANK else None


def install(outer: Any, core: Any, activation: str) -> None:
    """Let the experts be served by the registered function, for this instance alone."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(EXPERTS, experts_forward)
    core.rayft_plan = ExpertsPlan(activation, wrappers(outer), core.config)
    core.config = copy.copy(core.config)
    core.config._experts_implementation = EXPERTS
    if outer is not core:
        outer.forward = types.MethodType(_past_wrappers, outer)


def remove(outer: Any, core: Any) -> None:
    """Take it off again."""
    if "rayft_plan" in vars(core):
        core.config = core.rayft_plan.config
        del core.rayft_plan
        vars(outer).pop("forward", None)
