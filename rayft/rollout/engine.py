"""Start a generation engine, and run one on a thread of this process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rayft.types import Engine

Kind = Literal["vllm", "local"]
KV_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is started with.

    Attributes:
        model: Hugging Face folder; with `random_weights` only its configuration is read.
        kind: "vllm", or "local": plain transformers in this process, for tests and for looking at a run without vLLM.
        dtype: precision of weights and computation, such as "bfloat16".
        context: most tokens of a prompt with its completion.
        stop_tokens: ids that end a completion; they are its last token.
        version: that the weights at start are labelled with; "<attempt>.<step>".
        random_weights: do not read weights, because a push follows before the first prompt.
        concurrency: most requests that run at once; others wait.
        kv_cache_bytes: of the key-value cache; vLLM only.
        eager: no CUDA graphs: starts sooner, and a GPU then waits for its host at every token; vLLM only.
        workers: GPUs that the model is split over (tensor parallel); vLLM only.
        seed: of vLLM itself; every request brings its own.
        trust_remote_code: run model code that comes with the weights.
        deadline_s: for each part of a push.
    """

    model: Path
    kind: Kind = "vllm"
    dtype: str = "bfloat16"
    context: int = 2048
    stop_tokens: tuple[int, ...] = ()
    version: str = "0.0"
    random_weights: bool = False
    concurrency: int = 64
    kv_cache_bytes: int = KV_CACHE_BYTES
    eager: bool = True
    workers: int = 1
    seed: int = 0
    trust_remote_code: bool = False
    deadline_s: float = 120.0


async def create_engine(options: EngineOptions) -> Engine:
    """Start an engine in the running event loop; it is used in this loop only, and ended by `close`.

    In a Ray actor: make it an async actor, await this in its first method, and keep constructor arguments small.

    Raises:
        InfrastructureError: it could not start.
    """
    if options.kind == "local":
        from rayft.rollout.local_engine import LocalEngine

        return LocalEngine(options)
    from rayft.rollout.vllm_engine import start_vllm

    return await start_vllm(options)


class EngineThread:
    """An engine on an event loop of its own thread, for callers that are not asynchronous: a local run, scripts, tests.

    Args:
        options: of the engine.
        start_s: longest start.
    """

    def __init__(self, options: EngineOptions, start_s: float = 600.0) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.engine = self.run(create_engine(options)).result(start_s)

    def run(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Start a coroutine on the engine's loop, such as `agent.rollout(thread.engine, ...)`."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def call(self, method: str, *arguments: Any, **options: Any) -> Future[Any]:
        """Start a method of the engine; fits `weight_sync.protocol.EngineHandle`."""
        return self.run(getattr(self.engine, method)(*arguments, **options))

    def close(self, deadline_s: float = 60.0) -> None:
        """End engine and thread."""
        self.call("close").result(deadline_s)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(deadline_s)
