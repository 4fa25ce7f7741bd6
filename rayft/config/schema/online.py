"""The sections of online methods: prompts, rollouts, rewards and the algorithm that learns from them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayft.config.schema.base import Bool, Count, Float, Fraction, Int, NonNegative, PositiveFloat, PositiveInt, Section, Str
from rayft.config.schema.sections import Dataset


class Prompts(Section):
    """What the policy is asked. A row's columns go to the rewards as they are."""

    train: dict[Str, Dataset] = Field(
        min_length=1,
        description="Sources of prompts by name. A chat is asked without its last assistant turns, an instruction without its output, a text as it is.",
    )
    eval: dict[Str, Dataset] = Field(default_factory=dict, description="Sources of held-out prompts by name.")
    too_long: Literal["drop", "raise"] = Field("drop", description="What happens to a prompt longer than rollout.max_prompt_tokens.")
    shuffle: Bool = Field(True, description="Permute the prompts anew in each epoch.")
    cache_dir: Str | None = Field(None, description="Folder or URL of the rendered prompts; null is <run.dir>/.shards.")


class Rollout(Section):
    """How answers are made: the pool of engines, the shape of a step, and how far engines may be behind the trainer."""

    engine: Literal["vllm", "local"] = Field(
        "vllm", description="vllm, or local: transformers in the engine's process, for tests and first looks."
    )
    engines: PositiveInt = Field(1, description="Engines in the pool; each is a process that holds the whole policy.")
    tensor_parallel: PositiveInt = Field(1, description="GPUs that one engine spreads the policy over.")
    prompts_per_step: PositiveInt = Field(64, description="Prompts, each a group of answers, in a training step.")
    group_size: PositiveInt = Field(8, description="Answers to each prompt.")
    max_prompt_tokens: PositiveInt = Field(1024, description="Longest prompt.")
    max_tokens: PositiveInt = Field(1024, description="Longest answer.")
    temperature: PositiveFloat = Field(1.0, description="Sampling temperature; the trainer computes log-probabilities at the same one.")
    max_staleness: Count = Field(
        1, description="Steps that the weights behind any token may be older than those that it trains; 0 is strictly on-policy."
    )
    kv_cache_gib: PositiveFloat = Field(4.0, description="Memory of an engine's key-value cache on each of its devices.")
    eager: Bool = Field(False, description="Run vLLM on GPUs without CUDA graphs: it starts sooner and generates slower.")
    deadline_s: PositiveFloat = Field(600.0, description="Longest time for a group's answers; then they are asked for again.")
    health_s: PositiveFloat = Field(
        30.0, description="Longest time that an engine may leave a question about its state unanswered before it is restarted."
    )
    start_s: PositiveFloat = Field(
        600.0, description="Longest time that an engine may take to start, and to take in new weights; and a reward model to be loaded."
    )
    restarts: Count = Field(
        5,
        description="Times that a group is asked for again after its engine died or missed a deadline, and after its environment failed; then its prompt is dropped.",
    )
    samples: Count = Field(2, description="Answers of each step that rank 0 writes to samples.jsonl, as text.")


class Environment(Section):
    """What the policy talks to over several turns; without one, an answer is one turn."""

    function: Str | None = Field(
        None,
        description="module:name or ./file.py:name of a class, or function, that makes one environment for each answer; tools or openenv; or null for none.",
    )
    arguments: dict[Str, Bool | Int | Float | Str | list[Str] | None] = Field(
        default_factory=dict, description="What it is called with, by name."
    )
    tools: list[Str] = Field(
        default_factory=list,
        description="Functions that the policy may call with the environment tools, each module:function or ./file.py:function; the prompt shows their schemas.",
    )
    max_turns: PositiveInt = Field(16, description="Most turns of the policy; an answer that is not done by then counts as truncated.")
    deadline_s: PositiveFloat = Field(
        60.0, description="Longest time for one answer of an environment; then the group is asked for again, see rollout.restarts."
    )
    weight: Float = Field(1.0, description="Factor of the environment's own reward, named environment, in an answer's total reward.")


class HttpJudge(Section):
    """A model behind an OpenAI-compatible chat endpoint that judges answers."""

    url: Str = Field(description="Address of the endpoint without /chat/completions, such as http://host:8000/v1.")
    model: Str = Field(description="Name of the model there.")
    prompt: Str = Field(
        description="What it is asked: a Jinja template of prompt, completion and row, the columns of the row, or a path to a .jinja file, which is read where the command starts."
    )
    score: Str = Field(
        r"(?i:score)\s*[:=]\s*(-?[0-9]+(?:\.[0-9]+)?)",
        description="Regular expression whose only group, where it matches last, is the score.",
    )
    json_field: Str | None = Field(
        None, description="Key of the score in an answer that has a JSON object; null looks for the pattern score."
    )
    max_score: PositiveFloat = Field(10.0, description="Best score, which is a reward of 1; what is not between 0 and it is an error.")
    max_tokens: PositiveInt = Field(512, description="Longest answer of the judge.")
    temperature: NonNegative = Field(0.0, description="Its sampling temperature.")
    api_key_env: Str | None = Field(
        None, description="Name of the variable that holds the API key; it must be in env.forward. null sends none."
    )
    concurrency: PositiveInt = Field(32, description="Requests of one reward process at a time.")
    timeout_s: PositiveFloat = Field(
        30.0,
        description="Longest time for one request; it is sent again, as after 429 and 5xx, until nine tenths of reward.deadline_s are over.",
    )


class RewardModel(Section):
    """A model that scores chats, on processes of its own."""

    path: Str = Field(
        description="Folder, id of the Hugging Face hub, or URL, of a sequence classifier, or of a causal model where token is set."
    )
    revision: Str | None = Field(None, description="Branch, tag or commit of a model of the hub; null is its main branch.")
    trust_remote_code: Bool = Field(False, description="Run model code that comes with the weights.")
    label: Count = Field(0, description="Which output of a classifier is the reward.")
    token: Str | None = Field(
        None,
        description="A causal model's reward is the probability of this token, such as Yes, as the first of its answer; null is for classifiers.",
    )
    replicas: PositiveInt = Field(1, description="Processes that hold the model.")
    gpus: NonNegative = Field(1.0, description="GPUs of each, also a part of one; 0 runs it on a CPU.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of the model; auto is bfloat16 on GPUs and float32 on CPUs."
    )
    max_tokens: PositiveInt = Field(4096, description="Longest chat; a longer one is an error.")
    batch: PositiveInt = Field(8, description="Chats in one forward.")


class RewardFunction(Section):
    """One judgement of answers: exactly one of function, judge and model."""

    function: Str | None = Field(
        None,
        description="module:function or ./file.py:function of (prompt, completion, row) -> number, plain or async; or the name of a ready reward.",
    )
    judge: HttpJudge | None = Field(None, description="A model behind an HTTP endpoint judges instead.")
    model: RewardModel | None = Field(None, description="A reward model on processes of its own scores instead.")
    weight: Float = Field(1.0, description="Factor of its value in an answer's total reward.")
    batch: Bool = Field(False, description="The function takes the answers of a group as one list and returns a list of numbers.")
    trl: Bool = Field(
        False,
        description="The function is one of trl or has the form of those: (prompts, completions, completion_ids, **columns) -> list of numbers.",
    )
    arguments: dict[Str, Bool | Int | Float | Str | list[Str] | None] = Field(
        default_factory=dict, description="Further arguments of the function by name, such as those of the ready reward code."
    )


class Reward(Section):
    """What answers are worth. A reward that cannot be given is an error, never a zero."""

    functions: dict[Str, RewardFunction] = Field(
        default_factory=dict, description="Functions by name; an answer's total is their weighted sum, with the environment's reward."
    )
    workers: PositiveInt = Field(1, description="Processes that rewards run in.")
    deadline_s: PositiveFloat = Field(60.0, description="Longest time for scoring a group; then its process is replaced.")
    retries: Count = Field(2, description="Times that a group is scored again after a reward raised; then its prompt is dropped.")
    max_dropped: Fraction = Field(0.1, description="Fraction of all groups that may be dropped before the run stops.")
    overlong_buffer: Count = Field(
        0, description="Last tokens below rollout.max_tokens in which an answer loses linearly up to overlong_penalty; 0 turns it off."
    )
    overlong_penalty: PositiveFloat = Field(1.0, description="What an answer of rollout.max_tokens loses then.")


class Algorithm(Section):
    """How rewards change the policy. null takes what the type stands for."""

    type: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo", "rloo", "reinforce_pp"] = Field(
        "grpo",
        description="grpo; dr_grpo, without division by deviation and length; dapo, asymmetric clip, token mean and no groups without variance; gspo, ratios of whole answers; cispo, clipped importance weights; sapo, smooth gate; rloo, leave-one-out baseline; reinforce_pp, deviation over the batch.",
    )
    advantage: Literal["group_mean_std", "group_mean", "leave_one_out", "reinforce_pp_baseline", "gdpo", "gae"] | None = Field(
        None,
        description="How rewards of a group become advantages; gdpo normalises each reward function on its own; gae gives each token its own by a critic, see values.",
    )
    values: Str | None = Field(
        None,
        description="module:function or ./file.py:function of (prompt, answers, by_policy, row), plain or async: the critic of gae, which gives a value for each token that the policy wrote.",
    )
    gamma: Fraction = Field(1.0, description="Discount of gae from one token to the next.")
    lam: Fraction = Field(1.0, description="Lambda of gae: 0 trusts the values alone, 1 the reward.")
    average: Literal["token", "sequence", "constant"] | None = Field(
        None,
        description="token: mean over all tokens; sequence: mean over answers of their token means; constant: sum over answers times rollout.max_tokens.",
    )
    clip_low: PositiveFloat | None = Field(None, description="How far below 1 the ratio to the policy before the step may fall.")
    clip_high: PositiveFloat | None = Field(None, description="How far above 1 it may rise.")
    dual_clip: PositiveFloat | None = Field(None, description="Largest ratio that counts for answers of negative advantage; null is none.")
    beta: NonNegative = Field(
        0.0, description="Weight of the divergence from the reference, the policy that the run started from; 0 needs no reference."
    )
    kl: Literal["k1", "k2", "k3"] = Field("k3", description="Estimator of the divergence from the reference.")
    importance: Literal["none", "token", "sequence"] = Field(
        "token",
        description="Weights that make up for differences between trainer and engine, staleness included: by token, by answer, or none.",
    )
    importance_mode: Literal["truncate", "mask"] = Field(
        "truncate", description="truncate cuts these weights at importance_cap; mask leaves out what is outside [1 / cap, cap]."
    )
    importance_cap: PositiveFloat = Field(2.0, description="Their cap.")
    updates: PositiveInt = Field(1, description="Optimizer updates in a step, each on a part of its prompts.")
    mask_truncated: Bool = Field(
        False, description="Leave answers that were cut at rollout.max_tokens out of the loss, but not out of baselines."
    )
    filter: Literal["none", "zero_variance"] | None = Field(
        None, description="zero_variance replaces groups whose answers all have the same reward by other prompts."
    )
    rerolls: Count = Field(
        0, description="Times that the prompt of a filtered group is asked again under later weights, with answers drawn anew."
    )
    replay: Count = Field(
        0,
        description="Most groups of a step that, in the place of filtered ones, are taken from earlier steps within rollout.max_staleness and trained once more, those with the largest deviation of rewards first.",
    )
    max_filtered: PositiveInt = Field(
        20, description="Steps' worth of groups that may be filtered in a row before the run stops: nothing is learnt then."
    )


class TokenBudget(Section):
    """How many tokens a worker computes at once."""

    micro_tokens: PositiveInt | None = Field(
        None,
        description="Tokens of a micro-batch, into which answers are packed; null is the smallest that holds the longest answer with its prompt.",
    )


class WeightSync(Section):
    """How the policy's weights get from the trainer to the engines."""

    type: Literal["auto", "disk", "gloo", "nccl", "ipc"] = Field(
        "auto",
        description="disk: files in the run's directory; gloo: between processes on CPUs; nccl: between GPUs; ipc: on one GPU; auto takes nccl or ipc on GPUs, and on CPUs disk, or gloo when run.dir is a URL.",
    )
    payload: Literal["auto", "full", "adapter"] = Field(
        "auto",
        description="full sends every weight, adapters merged; adapter what is trained only, which engines merge; auto takes adapter for LoRA of linear layers that are not in 4 bits.",
    )
    verify_every: PositiveInt = Field(
        10,
        description="Pushes from one comparison of every tensor on both sides to the next; the first push to a set of engines always has one.",
    )
    max_difference: PositiveFloat | None = Field(
        0.25,
        description="The run stops when trainer and engine, with the same weights, give tokens log-probabilities that differ by more on average, in nats; null never stops it.",
    )


class Placement(Section):
    """Who shares GPUs with whom."""

    mode: Literal["separate", "colocated"] = Field(
        "separate", description="separate: engines have GPUs of their own; colocated: each engine shares the GPU of one training worker."
    )


class OnlineEval(Section):
    """Reward on held-out prompts, by the same engines."""

    every: PositiveInt | None = Field(None, description="Steps between evaluations; null evaluates only at the end.")
    at_start: Bool = Field(False, description="Evaluate before the first step too.")
    samples: PositiveInt = Field(1, description="Sampled answers to each prompt, beside one without sampling.")
    max_prompts: PositiveInt | None = Field(None, description="Prompts to evaluate on; null takes all.")
    patience: PositiveInt | None = Field(
        None, description="Stop after this many evaluations in a row that improve eval/reward by no more than min_delta; null goes on."
    )
    min_delta: NonNegative = Field(0.0, description="By how much eval/reward must rise to count as an improvement.")
    correct_from: Float = Field(1.0, description="Total reward from which an answer counts as correct, for pass@k.")
