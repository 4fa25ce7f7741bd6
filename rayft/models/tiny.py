"""A model folder to train from nothing: a tokenizer fitted to given texts and a small Llama configuration, without weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPACED = (
    "{% for message in messages %}{{ '<|im_start|> ' + message.role + ' ' + message.content + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
"""A chat template for tokenizers that split at spaces."""


def write_tiny_model(
    folder: Path, texts: Iterable[str], *, vocab_size: int = 512, hidden_size: int = 128, layers: int = 2, max_length: int = 2048
) -> None:
    """Write config.json, tokenizer files and a ChatML template, for `model.init: random`.

    Args:
        folder: created if needed.
        texts: what the byte-level BPE tokenizer is fitted to; any other text still encodes, byte by byte.
        vocab_size: tokens of the tokenizer and of the model; at least 256 bytes and 3 special tokens.
        hidden_size: width of the model, in heads of 32.
        layers: number of decoder layers.
        max_length: longest sequence.
    """
    _write(folder, fit_tokenizer(texts, vocab_size), hidden_size, layers, max_length)


def write_word_model(folder: Path, words: Sequence[str], *, hidden_size: int = 64, layers: int = 2, max_length: int = 512) -> None:
    """The same for a language of a few words, each one token, in which even a model that knows nothing soon says something that counts.

    Args:
        folder: created if needed.
        words: without space in them; turn markup and the roles of chats are added.
        hidden_size, layers, max_length: as of `write_tiny_model`.
    """
    every = dict.fromkeys([PAD, START, END, "system", "user", "assistant", "tool", *words])
    level = Tokenizer(models.WordLevel({word: number for number, word in enumerate(every)}, unk_token=PAD))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=level, pad_token=PAD, eos_token=END, extra_special_tokens=[START])
    tokenizer.chat_template = SPACED
    _write(folder, tokenizer, hidden_size, layers, max_length)


def _write(folder: Path, tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int, max_length: int) -> None:
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=max(1, hidden_size // 64),
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)


def fit_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a ChatML template, fitted to the texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    fitted = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=END, extra_special_tokens=[START])
    fitted.chat_template = (files("rayft.data") / "templates" / "chatml.jinja").read_text(encoding="utf-8")
    return fitted
