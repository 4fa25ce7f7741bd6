"""The records and protocols that rooms hand to each other. Importable without torch, ray, vllm or transformers.

Shape letters: T packed tokens of one micro-batch on one rank, D documents in it, H hidden size, V vocabulary size.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from rayft.config.functions import UserFunction
    from rayft.config.schema import AnyRun

R = TypeVar("R", bound="AnyRun")
"""The kind of run, such as SftRun."""

Need = Literal["weighted_nll", "logprobs"]
Metrics = dict[str, "Tensor"]
"""Name -> scalar tensor, a *sum* over this rank's tokens. `observe.metrics` says how each is reduced and divided."""


@dataclass(frozen=True)
class Batch:
    """One packed micro-batch of one rank, for every method (SFT, preference, RL, multimodal).

    Documents lie end to end; position t predicts `targets[t]`, the next token of the same document, and counts with
    `loss_weights[t]`. A position without a target (the last of its document, padding) has weight 0 and target 0.

    Attributes:
        tokens: int64 [T].
        positions: int64 [T], restart at 0 in every document.
        cu_seqlens: int32 [capacity + 1], document boundaries, padded to a fixed capacity by repeating T.
        targets: int64 [T].
        loss_weights: float32 [T].
        trained: int64 [M], the positions with a non-zero weight, ascending; M is known on the host.
        row_keys: int64 [T], (row id << 24) + offset in the row: names each token independently of batching, for randomness.
        source_ids: int32 [T], index of the dataset that each position came from.
        document_lengths: the D lengths on the host; they sum to T.
        num_tokens: tokens that are not padding, on the host.
        step: the optimizer step the micro-batch belongs to.
        rollout_logprobs, policy_logprobs, ref_logprobs, advantages: float32 [T], for RL and preference losses: as the engine sampled
            them, as the policy gave them before the step's first update, and as the reference gives them.
        versions: int32 [T], policy version of each completion token.
        multimodal: extra tensors by name, passed to the model's forward.
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    targets: Tensor
    loss_weights: Tensor
    trained: Tensor
    row_keys: Tensor
    source_ids: Tensor
    document_lengths: tuple[int, ...]
    num_tokens: int
    step: int = 0
    rollout_logprobs: Tensor | None = None
    policy_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    versions: Tensor | None = None
    multimodal: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`; copies are asynchronous from pinned memory."""
        moved: dict[str, Any] = {}
        for name, value in vars(self).items():
            if hasattr(value, "to"):
                moved[name] = value.to(device, non_blocking=True)
            elif name == "multimodal":
                moved[name] = {key: tensor.to(device, non_blocking=True) for key, tensor in value.items()}
        return replace(self, **moved)


@dataclass(frozen=True)
class Terms:
    """What `model.score` returns for a batch: never logits.

    Attributes:
        nll_sum: float32 scalar, sum over t of loss_weights[t] * -log p(targets[t]); for need="weighted_nll".
        nll_parts: float32 [M], what each of the positions `batch.trained` adds to it, without gradient; likewise.
        logprobs: float32 [M], log p(targets[t]) at the positions `batch.trained`; for need="logprobs".
        entropy: float32 [M], entropy of the next-token distribution there; for need="logprobs".
    """

    nll_sum: Tensor | None = None
    nll_parts: Tensor | None = None
    logprobs: Tensor | None = None
    entropy: Tensor | None = None


class Scorer(Protocol):
    """A model ready for the step: body and head run inside the FSDP root's forward."""

    def score(self, batch: Batch, need: Need) -> Terms: ...


class LossFn(Protocol):
    """A pure loss: returns the *sum* over the batch's tokens (never a mean) and metrics, which are sums too.

    The step divides once by the global count, so micro-batches, packing and world size cannot change the value.
    """

    def __call__(self, terms: Terms, batch: Batch) -> tuple[Tensor, Metrics]: ...


@dataclass(frozen=True)
class Session:
    """All that a worker needs to know of whoever runs it: Ray Train, or this very process (`--local`).

    Attributes:
        rank, world_size, local_rank: place in the group.
        device: "cpu" or "cuda:N".
        run_dir: folder for the files of this run: its directory, or, for a run on an object store, a folder of this node whose
            files go to the store.
        report: `report(metrics, directory, finish)`; every rank calls it at the same step. `finish()` runs off the
            training thread, waits until the directory is complete, and raises if it could not be written; only then
            does the checkpoint count as committed.
        deadline_s: longest time that any wait between ranks may take.
        remote: URL of the run's directory when it is on an object store.
    """

    rank: int
    world_size: int
    local_rank: int
    device: str
    run_dir: Path
    report: Callable[[dict[str, float], str, Callable[[], None]], None]
    deadline_s: float
    remote: str | None = None

    @property
    def home(self) -> str:
        """The run's directory as every process reaches it: a path or a URL."""
        return self.remote or str(self.run_dir)


@dataclass(frozen=True)
class Launch(Generic[R]):
    """All that a worker is started with; picklable, complete before anything is placed.

    Attributes:
        cfg: the run.
        run_dir: absolute; see Session.
        train_shards, eval_shards: folders of packed shards, by path or URL.
        identity: facts by name that a checkpoint must share to be resumed: digests of shards and base weights.
        total_steps: length of the schedule.
        device_type: "cpu" or "cuda".
        local: the worker is this process, without Ray.
        callbacks: the run's user functions, resolved.
        attempt: number of this start of the run, from 1.
        remote: see Session.
        controller: name of the actor that leads an online run.
    """

    cfg: R
    run_dir: Path
    train_shards: str
    eval_shards: str | None
    identity: Mapping[str, str]
    total_steps: int
    device_type: str
    local: bool
    callbacks: tuple[UserFunction, ...] = ()
    attempt: int = 0
    remote: str | None = None
    controller: str = ""

    @property
    def home(self) -> str:
        """The run's directory as every process reaches it: a path or a URL."""
        return self.remote or str(self.run_dir)

    @property
    def last_step(self) -> int:
        """The step that this command stops after."""
        return min(self.total_steps, self.cfg.run.stop_at or self.total_steps)


@dataclass(frozen=True)
class Fix:
    """A correction of one model family, applied to an instance and verified.

    Attributes:
        name: short name, unique in its family.
        why: what goes wrong without it.
        where: module or attribute that it touches.
        upstream: issue or pull request that will make it unnecessary.
        remove_when: version rule, such as "transformers >= 5.30".
        apply: changes the instance.
        check: True once the instance shows the effect.
    """

    name: str
    why: str
    where: str
    upstream: str
    remove_when: str
    apply: Callable[[Any], None]
    check: Callable[[Any], bool]


@dataclass(frozen=True)
class ModelSpec:
    """What rayft must know of a model family beyond what its Hugging Face class tells.

    Attributes:
        model_types: values of `config.model_type` that it covers.
        layers: dotted path of the list of decoder layers, the unit of FSDP, checkpointing and compile.
        unsupported: feature -> reason; asking for the feature raises the reason.
        fixes: corrections applied by `models.patch`.
    """

    model_types: tuple[str, ...]
    layers: str = "model.layers"
    unsupported: Mapping[str, str] = field(default_factory=dict)
    fixes: tuple[Fix, ...] = ()


@dataclass(frozen=True)
class Completion:
    """One finished generation, tokens in, tokens out.

    Attributes:
        tokens: the generated ids.
        logprobs: log-probability of each under the sampling distribution.
        versions: policy version "attempt.step" that produced each token, run-length encoded as (version, first, end).
        finish_reason: "stop", "length" or "abort".
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[tuple[str, int, int], ...]
    finish_reason: str


@dataclass(frozen=True)
class Prompt:
    """One unit of online work: a prompt to answer several times.

    Attributes:
        key: "<epoch>-<row id>", unique in a run; everything random about the group is drawn from it.
        row_id: row of the prompt dataset.
        tokens: the rendered prompt.
        row: the dataset's columns, for rewards and environments.
    """

    key: str
    row_id: int
    tokens: tuple[int, ...]
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Trajectory:
    """One answer to a prompt: all that the policy wrote and, in environments, read, token for token.

    Attributes:
        tokens: what follows the prompt; n ids.
        by_policy: n flags, true where the policy generated the token; only those are trained.
        logprobs: n values, log-probability of each generated token under the sampling distribution; 0 elsewhere.
        versions: spans (policy version, first, end) over the generated tokens' positions in `tokens`, ascending.
        finish_reason: "stop" or "length"; an aborted generation is a failure, never a trajectory.
        turns: calls of the engine that it took.
        rewards: what an environment gave, by name, summed over the turns.
    """

    tokens: tuple[int, ...]
    by_policy: tuple[bool, ...]
    logprobs: tuple[float, ...]
    versions: tuple[tuple[str, int, int], ...]
    finish_reason: str
    turns: int = 1
    rewards: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """All answers to one prompt: a rollout's return value, which the controller passes on by reference and never opens.

    Attributes:
        prompt: what was asked.
        trajectories: the answers, in the order of their sample index.
    """

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True)
class Scored:
    """What the controller keeps of a group: numbers, never tokens.

    Attributes:
        key: of the prompt.
        rewards: reward name -> one value per trajectory.
        total: weighted sum of the rewards, one per trajectory.
        lengths: generated tokens of each trajectory.
        sizes: all tokens of each trajectory, with its prompt and what it read.
        truncated: whether each ended by length.
        oldest, newest: lowest and highest policy step among its tokens.
        turns: of the policy in each trajectory; empty when not told.
        advantages: of each generated token of each trajectory, before whitening; empty without a critic.
    """

    key: str
    rewards: Mapping[str, tuple[float, ...]]
    total: tuple[float, ...]
    lengths: tuple[int, ...]
    sizes: tuple[int, ...]
    truncated: tuple[bool, ...]
    oldest: int
    newest: int
    turns: tuple[int, ...] = ()
    advantages: tuple[array[float], ...] = ()


class Engine(Protocol):
    """A generation engine of the rollout pool (vLLM, or a small in-process one for tests).

    Cancelling `generate` aborts the request. Between `pause` and `resume` no token is produced and nothing is lost; what was under
    way goes on under the weights that `receive` brought meanwhile. `receive` takes one part of a push (`weight_sync.protocol`)
    and answers once per worker. `load` gives running, waiting, kv_use (0 to 1) and preemptions (since the start).
    """

    async def generate(
        self, request_id: str, prompt: Sequence[int], *, max_tokens: int, temperature: float, top_p: float, seed: int
    ) -> Completion: ...

    async def pause(self) -> None: ...

    async def resume(self) -> None: ...

    async def receive(self, version: str, push: Mapping[str, Any]) -> list[Mapping[str, Any]]: ...

    async def version(self) -> str: ...

    async def load(self) -> Mapping[str, float]: ...

    async def close(self) -> None: ...


class Reward(Protocol):
    """Scores one completion; `row` holds the dataset's columns. Raises when it cannot score: never a silent zero."""

    def __call__(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float: ...


class Callback(Protocol):
    """A user's hook on a named event of the trainer. It runs on every rank and may raise to stop the run."""

    def __call__(self, event: str, state: Mapping[str, Any]) -> None: ...
