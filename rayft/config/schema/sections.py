"""The sections that every method shares. Field descriptions are the reference that `rayft config-schema` prints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayft.config.schema.base import Bool, Count, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Section, Str


class Run(Section):
    """Identity, length and limits of the run."""

    name: Str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", description="Name of the run. The same name and directory resume it.")
    dir: Str = Field(
        "runs",
        description="Folder that holds run folders, on storage that every node sees, or a URL such as s3://bucket/runs. A relative one is taken from where the command starts.",
    )
    seed: Count = Field(0, description="Seed of everything random: data order, adapter initialisation, dropout.")
    epochs: PositiveFloat = Field(1.0, description="Passes over the training rows; ignored when max_steps is set.")
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps to take; null derives them from epochs.")
    stop_at: PositiveInt | None = Field(
        None, description="Stop after this step with a checkpoint, leaving the schedule as it is; run again without it to go on."
    )
    max_failures: Count = Field(3, description="Restarts after a worker or controller death, per command, before it gives up.")
    callbacks: tuple[Str, ...] = Field((), description="Functions called on trainer events, as module:function or ./file.py:function.")
    deadline_s: PositiveFloat = Field(1800.0, description="Longest time that ranks wait for each other, in seconds.")
    start_s: PositiveFloat = Field(
        600.0,
        description="Longest time to wait for the cluster to have room, for packing, for engines and for each start of the workers, in seconds.",
    )


class Model(Section):
    """Which weights to start from and in which precision."""

    path: Str = Field(
        description="Hugging Face model folder, an id of the hub, s3://bucket/folder, or run:NAME or run:NAME@STEP for the result of another run in run.dir."
    )
    revision: Str | None = Field(None, description="Branch, tag or commit of a model of the hub; null is its main branch.")
    init: Literal["pretrained", "random"] = Field(
        "pretrained",
        description="pretrained reads the weights; random draws them from run.seed and needs only a configuration and a tokenizer.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Precision that base weights, and when they are trained their optimizer states, are held in. auto holds trained weights in float32 and frozen ones in compute_dtype; adapters are always float32.",
    )
    compute_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of forward and backward; auto is bfloat16 on GPUs and float32 on CPUs."
    )
    reduce_dtype: Literal["float32", "bfloat16"] = Field("float32", description="Precision in which gradients are summed over ranks.")
    quantize: Literal["none", "nf4"] = Field(
        "none",
        description="nf4 holds the linear layers of the decoder blocks in 4 bits below a LoRA adapter (QLoRA: NF4 in blocks of 64, scales in 8 bits); embeddings, norms, head, routers and experts are not quantised.",
    )
    tokenizer: Str | None = Field(None, description="Folder of the tokenizer when it is not the model's own.")
    chat_template: Str | None = Field(None, description="Jinja text, a path to a .jinja file, or null for the tokenizer's own template.")
    pad_token: Str | None = Field(None, description="Token to pad with; null takes the tokenizer's, else its end token.")
    eos_token: Str | None = Field(None, description="End token; null takes the tokenizer's.")
    trust_remote_code: Bool = Field(False, description="Run model code that comes with the weights.")
    unfrozen: tuple[Str, ...] = Field(
        (),
        description="Train only these weights: regular expressions that match from the start of a checkpoint's parameter name, each with an optional range of rows such as [n], [a:], [:b] or [a:b]; empty trains all.",
    )


class Adapter(Section):
    """What is trained: every weight, or a low-rank adapter."""

    type: Literal["none", "lora"] = Field("none", description="none trains every weight; lora trains low-rank adapters (peft).")
    r: PositiveInt = Field(16, description="Rank of the adapters.")
    alpha: PositiveFloat = Field(32.0, description="Scale of the adapters; the update is alpha / r times B A.")
    dropout: Fraction = Field(0.0, description="Dropout on the adapters' input.")
    targets: Str | tuple[Str, ...] = Field(
        "all-linear",
        description="all-linear, a list of module name endings, or one regular expression that must match a whole module name.",
    )
    target_parameters: tuple[Str, ...] = Field(
        (),
        description="Stacks of experts that get adapters too, by name ending such as experts.gate_up_proj and experts.down_proj; each expert has its own of rank r, without dropout.",
    )
    modules_to_save: tuple[Str, ...] = Field(
        (), description="Further modules that are trained in full and saved with the adapter, by name ending."
    )
    rslora: Bool = Field(False, description="Scale by alpha / sqrt(r) instead of alpha / r.")


class Dataset(Section):
    """One source of rows."""

    path: Str = Field(
        description="File, folder or glob, also as s3:// URL: json, jsonl, ndjson, parquet, csv, tsv, txt, each also as .gz, .bz2, .xz or .zst; or the id of a dataset of the Hugging Face hub; for prompts also reasoning-gym://TASK?size=500&seed=0 with settings of the task."
    )
    subset: Str | None = Field(None, description="Configuration of a hub dataset, such as main; null is its default.")
    split: Str = Field("train", description="Split of a hub dataset, also a slice such as train[:10%].")
    revision: Str | None = Field(
        None, description="Branch, tag or commit of a hub dataset; null is what the hub has when it is first read."
    )
    format: Literal["chat", "instruction", "text"] = Field(
        "chat", description="chat: a list of messages; instruction: instruction, input, output columns; text: one text column."
    )
    messages: Str = Field("messages", description="Column that holds the messages of a chat row.")
    role: Str = Field("role", description="Key of the role in a message (from also works when role is absent).")
    content: Str = Field("content", description="Key of the content in a message (value also works when content is absent).")
    roles: dict[Str, Str] = Field(
        default_factory=lambda: {"human": "user", "gpt": "assistant", "model": "assistant"},
        description="Role names in the data -> role names of the template.",
    )
    instruction: Str = Field("instruction", description="Column of the instruction.")
    input: Str | None = Field("input", description="Column of the optional input, or null.")
    output: Str = Field("output", description="Column of the expected output.")
    system: Str | None = Field(None, description="Column of the system message of an instruction row, or null.")
    text: Str = Field("text", description="Column of the text; a .txt file has one row a line.")
    limit: PositiveInt | None = Field(None, description="Use only the first rows of the source.")


class Data(Section):
    """Rows in, packed shards out."""

    train: dict[Str, Dataset] = Field(min_length=1, description="Training sources by name, read in this order.")
    eval: dict[Str, Dataset] = Field(default_factory=dict, description="Evaluation sources by name.")
    seq_len: PositiveInt = Field(2048, description="Tokens in a packed row.")
    pack: Bool = Field(True, description="Several documents in a row, isolated from each other; false puts one document in each row.")
    too_long: Literal["drop", "truncate", "raise"] = Field(
        "drop", description="What happens to a chat longer than seq_len. Plain text is always cut into pieces of seq_len."
    )
    train_on_inputs: Bool = Field(False, description="Loss on every token of a chat, not only on the roles below.")
    roles_to_train: tuple[Str, ...] = Field(("assistant",), description="Roles whose turns count in the loss.")
    shuffle: Bool = Field(True, description="Permute rows inside a window of shards, anew each epoch.")
    window: PositiveInt = Field(8, description="Shards in the window that rows are shuffled in.")
    shard_rows: PositiveInt = Field(512, description="Packed rows in a shard.")
    unit_mb: PositiveFloat = Field(16.0, description="Size of a work unit, in megabytes of input.")
    pack_window: PositiveInt = Field(4096, description="Documents that are packed together.")
    actors: PositiveInt | None = Field(None, description="Processes that tokenise; null takes the cluster's CPUs but one.")
    cache_dir: Str | None = Field(
        None, description="Folder or URL of the packed shards; null is <run.dir>/.shards. Shards are keyed by all that changes them."
    )


class BatchShape(Section):
    """How many rows make a step."""

    rows: PositiveInt = Field(8, description="Packed rows in an optimizer step, over all workers.")
    micro_rows: PositiveInt | Literal["auto"] = Field(
        1,
        description="Packed rows that one worker runs at once; the rest is accumulated. auto takes, at every start, as many as the memory plan fits on the cards; it is 1 on CPUs.",
    )


class Optim(Section):
    """Optimizer and learning-rate schedule."""

    type: Literal["adamw", "adamw8bit", "adafactor", "muon"] = Field(
        "adamw",
        description="adamw; adamw8bit keeps its two states in 8 bits (torchao); adafactor keeps one row and one column of a matrix's second moment, and lr is relative to each tensor's size; muon orthogonalises the momentum of hidden matrices, for which every rank gathers each of them once a step, and leaves embeddings, head and vectors to adamw.",
    )
    lr: PositiveFloat = Field(1e-5, description="Highest learning rate.")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="How the learning rate falls after the warm-up; wsd holds it and lets it fall over the last steps only."
    )
    warmup: Count | Fraction = Field(0.03, description="Steps of linear warm-up, or, below 1, a fraction of all steps.")
    decay: Count | Fraction = Field(0.2, description="Steps of the fall at the end of wsd, or, below 1, a fraction of all steps.")
    decay_shape: Literal["linear", "cosine", "sqrt"] = Field(
        "linear", description="Shape of the fall of wsd; sqrt is 1 - sqrt(progress), steep at first."
    )
    min_lr_ratio: Fraction = Field(0.0, description="Learning rate at the end over the highest one, for every schedule but constant.")
    embedding_lr: PositiveFloat | None = Field(
        None, description="Highest learning rate of input embeddings and output head; null takes lr. It follows the schedule of lr."
    )
    embedding_lr_ratio: PositiveFloat | None = Field(None, description="The same as a multiple of lr.")
    loraplus_lr_ratio: PositiveFloat | None = Field(
        None, description="Learning rate of the adapters' B matrices as a multiple of lr (LoRA+); null takes lr."
    )
    beta1: Fraction = Field(0.9, description="Decay of the first moment of adamw, adamw8bit, and of muon for what is no hidden matrix.")
    beta2: Fraction = Field(0.95, description="Decay of the second moment, likewise.")
    eps: PositiveFloat = Field(1e-8, description="Added to the denominator of their update.")
    momentum: Fraction = Field(0.95, description="Decay of muon's momentum (Nesterov).")
    weight_decay: Fraction = Field(0.0, description="Decoupled weight decay, on matrices only.")
    no_decay: tuple[Str, ...] = Field(
        (),
        description="Further parameters without weight decay: regular expressions that match from the start of a checkpoint's parameter name.",
    )
    max_grad_norm: PositiveFloat | None = Field(1.0, description="Gradients are scaled down to this global norm; null leaves them.")


class Parallel(Section):
    """Workers and how tensors are spread over them."""

    workers: PositiveInt = Field(
        1, description="Training processes; parameters, gradients and optimizer states are sharded over them (FSDP2)."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes GPUs when the cluster has them.")
    cpus_per_worker: PositiveInt | None = Field(
        None, description="CPUs that Ray reserves for a worker; null is 1 without a GPU and 0 with one."
    )
    autoscaling: Bool = Field(
        False,
        description="The cluster adds nodes when work waits for them: one that is too small now is waited for, run.start_s at most, instead of refused. Needs device cpu or cuda.",
    )
    replicas: PositiveInt = Field(
        1, description="Groups of workers that each hold the whole state, sharded inside the group only (HSDP); workers is a multiple."
    )
    cpu_offload: Bool = Field(
        False, description="Keep parameters, gradients and optimizer states in host memory and update them on the CPU."
    )
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none",
        description="What the backward recomputes of a decoder layer: nothing; all but attention, whose inputs and output are kept; or all, from the layer's input.",
    )
    activation_offload: Bool = Field(
        False, description="Keep what decoder layers save for the backward in host memory; copies run beside the computation."
    )
    compile: Bool = Field(False, description="torch.compile each decoder layer.")
    attention: Literal["auto", "sdpa", "flex", "triton"] = Field(
        "auto",
        description="Attention backend; auto takes what was measured fastest for the layer and the rows, and says why; triton is rayft's own kernels.",
    )


class Kernels(Section):
    """Fused operations put into decoder layers; a layer that cannot have one keeps the family's own."""

    lora: Literal["auto", "on", "off"] = Field(
        "auto",
        description="LoRA projections and the MLP in one autograd node each; auto takes it for LoRA on GPUs, on refuses a model of which no layer can have it.",
    )
    norm_rope: Literal["auto", "on", "off"] = Field(
        "auto", description="Norm and rotation of queries and keys in one kernel, for families that norm each head; auto takes it on GPUs."
    )
    glu: Literal["auto", "on", "off"] = Field(
        "auto", description="The gated activation of an MLP without fused LoRA in one kernel; auto takes it on GPUs."
    )
    experts: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Experts and their adapters in one autograd node over grouped products; auto takes it on GPUs, and everywhere for adapters on experts.",
    )
    linear_cross_entropy: Literal["fast", "lean"] = Field(
        "fast",
        description="Loss of a trained head on GPUs: fast sums the head's gradient in a float32 copy of it, lean computes the logits a second time instead.",
    )


class Checkpoint(Section):
    """When to save what is needed to resume."""

    every: PositiveInt | None = Field(None, description="Steps between checkpoints; null saves only at the end.")
    keep: PositiveInt = Field(2, description="Checkpoints to keep; older ones are deleted once a newer one is committed.")
    keep_best: Bool = Field(
        False,
        description="Keep the checkpoint of the best evaluation beside the others: lowest eval/loss, saved when it is found, or highest eval/reward, for which every step that is evaluated is saved.",
    )
    trigger: Bool = Field(
        True, description="Save at the next step when a file CHECKPOINT_NOW appears in the run's directory; it is looked for once a second."
    )


class Samples(Section):
    """Texts that the model writes during training."""

    prompts: tuple[Str, ...] = Field((), description="Prompts to answer; the answers go to samples.jsonl and are shown.")
    every: PositiveInt | None = Field(None, description="Steps between samples; null makes them at the end only.")
    max_tokens: PositiveInt = Field(64, description="Longest answer, in tokens; each token takes a forward, as nothing is cached.")


class Eval(Section):
    """Loss on the evaluation sources."""

    every: PositiveInt | None = Field(None, description="Steps between evaluations; null evaluates only at the end.")
    at_start: Bool = Field(False, description="Evaluate before the first step too.")
    max_rows: PositiveInt | None = Field(None, description="Packed rows to evaluate on; null takes all.")
    patience: PositiveInt | None = Field(
        None, description="Stop after this many evaluations in a row that improve eval/loss by no more than min_delta; null goes on."
    )
    min_delta: NonNegativeFloat = Field(0.0, description="By how much eval/loss must fall to count as an improvement.")
    samples: Samples = Samples()


class Export(Section):
    """What the run leaves for others to load."""

    at_end: Bool = Field(True, description="Write a Hugging Face folder when training ends.")
    merge: Bool = Field(False, description="Also write the base model with the adapter added to its weights.")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Precision of exported full weights; adapters are float32.")


class Trackers(Section):
    """Experiment trackers, which get what metrics.jsonl gets."""

    names: tuple[Literal["mlflow", "tensorboard", "trackio", "wandb"], ...] = Field(
        (), description="Trackers to log to, from rank 0; each needs its package (rayft[trackers] has all)."
    )
    project: Str = Field("rayft", description="Project, or experiment, that the run is shown in.")
    dir: Str | None = Field(None, description="Folder of the trackers' files; null is the folder trackers in the run's directory.")
    offline: Bool = Field(
        True,
        description="Write files only. false lets mlflow, trackio and wandb reach the server that their own environment variables name.",
    )


class Env(Section):
    """The workers' environment."""

    forward: tuple[Str, ...] = Field(
        (), description="Names of variables that workers get from the driver, such as WANDB_API_KEY. Their values are saved nowhere."
    )
