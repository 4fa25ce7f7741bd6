"""The engine of the rollout pool: vLLM's AsyncLLM, tokens in, tokens out, with exact versions and log-probabilities.

AsyncLLM keeps its model in a child process, so this process stays responsive, and its death takes the child along within seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
from collections.abc import Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rayft.errors import InfrastructureError
from rayft.rollout import compat
from rayft.rollout.receive import UNDEFINED, refuse_undefined
from rayft.types import Completion

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from rayft.rollout.engine import EngineOptions

Result = TypeVar("Result")
SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # vLLM's FlashInfer sampler compiles kernels for minutes at the first token; its own sampler needs none.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # Otherwise every engine of a machine without GPU pins itself to the same first cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
EXIT_S = 10.0
GRAPHS: dict[str, Any] = {
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    "max_num_batched_tokens": 8192,  # vLLM's default for large cards; for a caller that is neither of its own front ends it takes 2048
}
"""Whole decoding steps as CUDA graphs, captured in seconds. vLLM's default compiles the model as well, which takes minutes at a start."""
UNUSED_SHARE = 0.01
"""vLLM refuses to start when less than this share of the card is free; the cache's size is given in bytes, so it means nothing else."""


async def start_vllm(options: EngineOptions) -> VllmEngine:
    """Start the engine; some 20 s on a CPU, 40 s on a GPU without compilation.

    Raises:
        InfrastructureError: vLLM could not start.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    with contextlib.suppress(KeyError):
        del os.environ["VLLM_CPU_KVCACHE_SPACE"]  # it would override kv_cache_memory_bytes
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = AsyncEngineArgs(
        model=str(options.model),
        dtype=options.dtype,
        load_format="dummy" if options.random_weights else "auto",
        trust_remote_code=options.trust_remote_code,
        skip_tokenizer_init=True,
        generation_config="vllm",
        max_model_len=options.context,
        max_num_seqs=options.concurrency,
        kv_cache_memory_bytes=options.kv_cache_bytes,
        gpu_memory_utilization=UNUSED_SHARE,
        tensor_parallel_size=options.workers,
        # In a placement group vLLM would take Ray for its own workers, and look for bundles of theirs.
        distributed_executor_backend="mp" if options.workers > 1 else None,
        enforce_eager=options.eager,
        **({} if options.eager else GRAPHS),
        **({"enable_chunked_prefill": False, "max_num_batched_tokens": max(options.context, 2048)} if current_platform.is_cpu() else {}),
        enable_prefix_caching=True,
        logprobs_mode="processed_logprobs",
        seed=options.seed,
        disable_log_stats=True,
        weight_transfer_config=WeightTransferConfig(backend="rayft"),
        worker_extension_cls="rayft.rollout.vllm_worker.Extension",
    )
    load, before = _Load(), set(multiprocessing.active_children())
    try:
        llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[load.logger])
    except (RuntimeError, ValueError) as problem:
        remedy = "Read vLLM's own lines above; give it less cache or a smaller context when memory is short"
        raise InfrastructureError("rollout engine", str(options.model), f"vLLM did not start ({problem})", remedy) from problem
    await compat.name_version(llm, options.version)
    return VllmEngine(llm, options, load, [child for child in multiprocessing.active_children() if child not in before])


class VllmEngine:
    """See `types.Engine`. Made by `start_vllm`.

    Log-probabilities are those of the distribution that was sampled from: after temperature and top_p.

    Args:
        llm: a running AsyncLLM.
        options: what it was started with.
        load: counts that vLLM reports.
        children: the processes of the engine.
    """

    def __init__(self, llm: Any, options: EngineOptions, load: _Load, children: Sequence[BaseProcess]) -> None:
        self._llm, self._options, self._load, self._children = llm, options, load, children
        self._version, self._receiving = options.version, False
        self._native = compat.knows_versions()
        self._tags: dict[str, list[tuple[str, int]]] = {}  # request -> tokens by each version before the one in force, see compat.spans_of

    async def generate(
        self, request_id: str, prompt: Sequence[int], *, max_tokens: int, temperature: float, top_p: float, seed: int
    ) -> Completion:
        """One completion. Cancelling aborts it.

        Args:
            request_id: unique among requests in flight.
            prompt: token ids.
            max_tokens: most tokens to generate; prompt and they fit into the context.
            temperature, top_p: of the sampling; temperature 0 takes the likeliest token.
            seed: of this request's sampling; with the same weights it gives the same tokens, up to rounding.

        Raises:
            InfrastructureError: the engine died.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            logprobs=0,
            detokenize=False,
            stop_token_ids=list(self._options.stop_tokens),
            ignore_eos=True,  # else the configuration's end token would stop it too
            output_kind=RequestOutputKind.FINAL_ONLY,  # an answer for every token would keep this process busier than the GPU
        )
        tags: list[tuple[str, int]] = []
        self._tags[request_id] = tags
        # Blocks of the prefix cache are named by the version too: no request can reuse what other weights computed.
        text = {"prompt_token_ids": list(prompt), "cache_salt": self._version}
        try:
            async for answer in self._llm.generate(text, params, request_id):
                output = answer.outputs[0]
        except EngineDeadError as problem:
            raise _dead(self._options, str(problem)) from problem
        finally:
            del self._tags[request_id]
        logprobs = tuple(step[token].logprob for step, token in zip(output.logprobs or (), output.token_ids, strict=True))
        last = (self._version, len(output.token_ids) - sum(count for _, count in tags))
        spans = compat.native_spans(output) if self._native else compat.spans_of([*tags, last])
        return Completion(tuple(output.token_ids), logprobs, spans, output.finish_reason)

    async def pause(self) -> None:
        """Stop producing tokens; requests stay and wait.

        Raises:
            InfrastructureError: a push to this engine broke off.
        """
        refuse_undefined(await self.version())
        await self._in_time(self._llm.pause_generation(mode="keep", clear_cache=False))

    async def resume(self) -> None:
        """Go on; requests that were under way compute their context anew when the weights changed."""
        await self._in_time(self._llm.resume_generation())

    async def receive(self, version: str, push: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Take one message of a push; call it between `pause` and `resume`.

        The version changes with the message "finish", and nothing that was computed with older weights survives it: prefix cache
        and the context of waiting requests go. That message is answered by each worker with `Receiver.answer`.

        Raises:
            InfrastructureError: not done in time; the engine must be ended, what it holds is undefined.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

        if push["phase"] == "start":
            await self._in_time(self._llm.init_weight_transfer_engine(WeightTransferInitRequest({"push": dict(push)})))
            self._receiving = True
            await self._in_time(self._llm.start_weight_update())
            return []
        if push["phase"] == "chunk":
            await self._in_time(self._llm.update_weights(WeightTransferUpdateRequest({"push": dict(push)})))
            return []
        await self._in_time(compat.finish_update(self._llm, version))
        for request_id, count in compat.tokens_so_far(self._llm).items():
            if (tags := self._tags.get(request_id)) is not None:
                tags.append((self._version, count - sum(earlier for _, earlier in tags)))
        self._load.expect_preemptions()
        await self._in_time(self._llm.reset_prefix_cache(reset_running_requests=True))
        self._version, self._receiving = version, False
        return list(await self._in_time(self._llm.collective_rpc("rayft_answer")))

    async def version(self) -> str:
        """Version of the weights that the next token is produced with; `receive.UNDEFINED` in the middle of a push."""
        return UNDEFINED if self._receiving else self._version

    async def load(self) -> Mapping[str, float]:
        """See `types.Engine`, as of the last step; preemptions that a push caused are not counted.

        The child process is asked something, so that one which hangs leaves this unanswered.

        Raises:
            InfrastructureError: it died.
        """
        await self._in_time(self._llm.is_paused())
        return self._load.read()

    async def close(self) -> None:
        """End the engine and wait for its processes; those that stay are killed."""
        self._llm.shutdown()
        self._llm = None  # its finaliser, run when the interpreter is half gone, would complain
        for child in self._children:
            await asyncio.to_thread(child.join, EXIT_S)
            if child.is_alive():
                child.kill()
                await asyncio.to_thread(child.join, EXIT_S)

    async def _in_time(self, work: Awaitable[Result]) -> Result:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            return await asyncio.wait_for(work, self._options.deadline_s)
        except TimeoutError as problem:
            raise _dead(self._options, f"no answer within {self._options.deadline_s:g} s") from problem
        except EngineDeadError as problem:
            raise _dead(self._options, str(problem)) from problem


class _Load:
    """The newest counts of vLLM's scheduler."""

    def __init__(self) -> None:
        self._running = self._waiting = self._preempted = self._expected = 0
        self._kv_use = 0.0

    def logger(self, config: Any, index: int = 0) -> Any:
        """A stat logger for vLLM that writes here."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        load = self

        class Counts(StatLoggerBase):  # type: ignore[misc]
            def __init__(self, config: Any, index: int = 0) -> None:
                """vLLM makes it; there is nothing to set up."""

            def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
                load.record(scheduler_stats, iteration_stats)

            def log_engine_initialized(self) -> None:
                """Nothing to say."""

        return Counts(config, index)

    def record(self, scheduler: Any, iteration: Any) -> None:
        """Take what vLLM reports after a step; either may be None."""
        if scheduler is not None:
            self._running, self._waiting = scheduler.num_running_reqs, scheduler.num_waiting_reqs
            self._kv_use = scheduler.kv_cache_usage
        if iteration is not None:
            self._preempted += iteration.num_preempted_reqs

    def expect_preemptions(self) -> None:
        """All running requests are about to be preempted for new weights, which is no sign of too little memory."""
        self._expected += self._running

    def read(self) -> dict[str, float]:
        """See `types.Engine.load`."""
        preemptions = max(0, self._preempted - self._expected)
        return {"running": self._running, "waiting": self._waiting, "kv_use": self._kv_use, "preemptions": preemptions}


def _dead(options: EngineOptions, reason: str) -> InfrastructureError:
    return InfrastructureError("rollout engine", str(options.model), f"vLLM is gone or stuck ({reason})", "Restart the engine")
