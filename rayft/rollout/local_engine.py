"""A small engine in this process, by plain transformers on the CPU: for tests, and for looking at a run without vLLM.

All requests in flight advance together, one token per step; a step runs on a thread, so the event loop stays free. Sampling draws
from a generator of the request's own seed, so a completion does not depend on what else was running.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rayft.models.decode import Decoder, load_for_decoding
from rayft.models.load import persistent_buffers
from rayft.models.stacked import by_stored_name, stacks_of
from rayft.rollout.compat import spans_of
from rayft.rollout.receive import UNDEFINED, Receiver, refuse_undefined
from rayft.types import Completion

if TYPE_CHECKING:
    from rayft.rollout.engine import EngineOptions


@dataclass
class _Request:
    """A completion in the making."""

    tokens: list[int]
    prompt_length: int
    max_tokens: int
    temperature: float
    top_p: float
    generator: torch.Generator
    done: asyncio.Future[str]
    logprobs: list[float] = field(default_factory=list)
    tags: list[tuple[str, int]] = field(default_factory=list)


class LocalEngine:
    """See `types.Engine`.

    Args:
        options: model, dtype, context, stop_tokens, version, random_weights and concurrency count.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._options, self._version, self._receiving = options, options.version, False
        dtype: torch.dtype = getattr(torch, options.dtype)
        self._model = load_for_decoding(
            options.model, dtype, random_weights=options.random_weights, trust_remote_code=options.trust_remote_code
        )
        self._decoder = Decoder(self._model)
        stacks = stacks_of(self._model)
        own: dict[str, Tensor] = dict(self._model.named_parameters()) | dict(persistent_buffers(self._model))
        self._parameters = {part: view for name in own for part, view in by_stored_name(name, own[name], stacks)}
        self._receiver = Receiver(self._copy, options.model, dtype, torch.device("cpu"))
        self._requests: dict[str, _Request] = {}
        self._turn = asyncio.Lock()
        self._going = asyncio.Event()
        self._going.set()
        self._loop: asyncio.Task[None] | None = None

    async def generate(
        self, request_id: str, prompt: Sequence[int], *, max_tokens: int, temperature: float, top_p: float, seed: int
    ) -> Completion:
        """See `VllmEngine.generate`: the same arguments and meaning.

        Raises:
            ValueError: prompt and completion do not fit into the context, or the id is in flight.
        """
        if request_id in self._requests:
            raise ValueError(f"request {request_id} is in flight already")
        if not prompt or len(prompt) + max_tokens > self._options.context:
            raise ValueError(f"{len(prompt)} + {max_tokens} tokens do not fit into a context of {self._options.context}")
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        generator = torch.Generator().manual_seed(seed)
        request = _Request(list(prompt), len(prompt), max_tokens, temperature, top_p, generator, done)
        self._requests[request_id] = request
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._advance())
        try:
            reason = await done
        finally:
            self._requests.pop(request_id)
        return Completion(tuple(request.tokens[len(prompt) :]), tuple(request.logprobs), spans_of(request.tags), reason)

    async def pause(self) -> None:
        """Stop producing tokens; returns when the step under way is over.

        Raises:
            InfrastructureError: a push to this engine broke off.
        """
        refuse_undefined(await self.version())
        self._going.clear()
        async with self._turn:
            pass

    async def resume(self) -> None:
        """Go on."""
        self._going.set()

    async def receive(self, version: str, push: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """See `VllmEngine.receive`. Every weight is checked after loading."""
        if push["phase"] == "start":
            await asyncio.to_thread(self._receiver.start, push)
            return []
        if push["phase"] == "chunk":
            self._receiving = True
            await asyncio.to_thread(self._receiver.chunk, push)
            return []
        await asyncio.to_thread(self._receiver.finish)
        self._decoder.forget()
        self._version, self._receiving = version, False
        return [self._receiver.answer(self._parameters)]

    async def version(self) -> str:
        """Version of the weights that the next token is produced with; `receive.UNDEFINED` in the middle of a push."""
        return UNDEFINED if self._receiving else self._version

    async def load(self) -> Mapping[str, float]:
        """See `types.Engine`; the cache grows as needed, so it is never full."""
        running = min(len(self._requests), self._options.concurrency)
        return {"running": running, "waiting": len(self._requests) - running, "kv_use": 0.0, "preemptions": 0}

    async def close(self) -> None:
        """Stop; requests in flight fail."""
        if self._loop is not None:
            self._loop.cancel()
        for request in self._requests.values():
            request.done.cancel()
        self._receiver.close()

    async def _advance(self) -> None:
        """One step after the other while there are requests."""
        while self._requests:
            await self._going.wait()
            async with self._turn:
                if not self._going.is_set():
                    continue
                running = dict(list(self._requests.items())[: self._options.concurrency])
                try:
                    ended = await asyncio.to_thread(self._step, running)
                except Exception as problem:
                    for request in running.values():
                        request.done.set_exception(problem)
                    raise
            for name, reason in ended.items():
                if not running[name].done.done():
                    running[name].done.set_result(reason)
            await asyncio.sleep(0)  # requests that ended leave before the next step

    def _step(self, running: Mapping[str, _Request]) -> dict[str, str]:
        """Give every request its next token. Names of those that ended -> why."""
        ended = {}
        for name, logits in self._decoder.logits({name: request.tokens for name, request in running.items()}).items():
            request = running[name]
            token, logprob = sample(logits, request.temperature, request.top_p, request.generator)
            request.tokens.append(token)
            request.logprobs.append(logprob)
            request.tags.append((self._version, 1))
            if token in self._options.stop_tokens:
                ended[name] = "stop"
            elif len(request.tokens) - request.prompt_length == request.max_tokens:
                ended[name] = "length"
        return ended

    @torch.no_grad()
    def _copy(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            if name in self._parameters:  # the head of a tied model is its embedding, whatever the files say
                self._parameters[name].copy_(tensor)


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> tuple[int, float]:
    """Draw a token; its log-probability under the distribution that was drawn from.

    Args:
        logits: float32 [V].
        temperature: divides the logits; 0 takes the likeliest token, whose log-probability is that at temperature 1.
        top_p: keep the likeliest tokens whose probabilities sum to at least this. arXiv 1904.09751 sec. 3.1.
        generator: of the draw, by the Gumbel-max trick.
    """
    if temperature == 0:
        logprobs = torch.log_softmax(logits, -1)
        token = int(logprobs.argmax())
        return token, float(logprobs[token])
    logprobs = torch.log_softmax(logits / temperature, -1)
    if top_p < 1:
        ordered, order = logprobs.sort(descending=True)
        above = ordered.exp().cumsum(-1) - ordered.exp()
        logprobs = torch.log_softmax(logprobs.index_fill(-1, order[above >= top_p], float("-inf")), -1)
    noise = torch.empty_like(logprobs).exponential_(generator=generator)
    token = int((logprobs - noise.log()).argmax())
    return token, float(logprobs[token])
