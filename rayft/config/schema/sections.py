"""The sections that every method shares. Field descriptions are the reference that `rayft config-schema` prints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayft.config.schema.base import Bool, Count, Fraction, PositiveFloat, PositiveInt, Section, Str


class Run(Section):
    """Identity, length and limits of the run."""

    name: Str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$", description="Name of the run. The same name and directory resume it.")
    dir: Str = Field(
        "runs",
        description="Folder that holds run folders, on storage that every node sees. A relative one is taken from where the command starts.",
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


class Model(Section):
    """Which weights to start from and in which precision."""

    path: Str = Field(description="Hugging Face model folder, or the id of one in the local cache.")
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
    tokenizer: Str | None = Field(None, description="Folder of the tokenizer when it is not the model's own.")
    chat_template: Str | None = Field(None, description="Jinja text, a path to a .jinja file, or null for the tokenizer's own template.")
    pad_token: Str | None = Field(None, description="Token to pad with; null takes the tokenizer's, else its end token.")
    eos_token: Str | None = Field(None, description="End token; null takes the tokenizer's.")
    trust_remote_code: Bool = Field(False, description="Run model code that comes with the weights.")


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
    modules_to_save: tuple[Str, ...] = Field(
        (), description="Further modules that are trained in full and saved with the adapter, by name ending."
    )
    rslora: Bool = Field(False, description="Scale by alpha / sqrt(r) instead of alpha / r.")


class Dataset(Section):
    """One source of rows."""

    path: Str = Field(description="File, folder or glob: json, jsonl, ndjson, parquet, csv, tsv, txt, each also as .gz, .bz2, .xz or .zst.")
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
        None, description="Folder of the packed shards; null is <run.dir>/.shards. Shards are keyed by all that changes them."
    )


class BatchShape(Section):
    """How many rows make a step."""

    rows: PositiveInt = Field(8, description="Packed rows in an optimizer step, over all workers.")
    micro_rows: PositiveInt = Field(1, description="Packed rows that one worker runs at once; the rest is accumulated.")


class Optim(Section):
    """Optimizer and learning-rate schedule."""

    lr: PositiveFloat = Field(1e-5, description="Highest learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="How the learning rate falls after the warm-up.")
    warmup: Count | Fraction = Field(0.03, description="Steps of linear warm-up, or, below 1, a fraction of all steps.")
    min_lr_ratio: Fraction = Field(0.0, description="Learning rate at the end over the highest one, for cosine and linear.")
    beta1: Fraction = Field(0.9, description="Decay of the first moment.")
    beta2: Fraction = Field(0.95, description="Decay of the second moment.")
    eps: PositiveFloat = Field(1e-8, description="Added to the denominator of the update.")
    weight_decay: Fraction = Field(0.0, description="Decoupled weight decay, on matrices only.")
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
    activation_checkpointing: Bool = Field(
        False, description="Keep only the input of each decoder layer and recompute the rest in the backward."
    )
    compile: Bool = Field(False, description="torch.compile each decoder layer.")
    attention: Literal["auto", "sdpa", "flex"] = Field(
        "auto", description="Attention backend; auto takes what was measured fastest for the layer and the rows, and says why."
    )


class Checkpoint(Section):
    """When to save what is needed to resume."""

    every: PositiveInt | None = Field(None, description="Steps between checkpoints; null saves only at the end.")
    keep: PositiveInt = Field(2, description="Checkpoints to keep; older ones are deleted once a newer one is committed.")


class Eval(Section):
    """Loss on the evaluation sources."""

    every: PositiveInt | None = Field(None, description="Steps between evaluations; null evaluates only at the end.")
    at_start: Bool = Field(False, description="Evaluate before the first step too.")
    max_rows: PositiveInt | None = Field(None, description="Packed rows to evaluate on; null takes all.")


class Export(Section):
    """What the run leaves for others to load."""

    at_end: Bool = Field(True, description="Write a Hugging Face folder when training ends.")
    merge: Bool = Field(False, description="Also write the base model with the adapter added to its weights.")
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="Precision of exported full weights; adapters are float32.")
