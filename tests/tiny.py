"""Small things that tests of several rooms build: so far a tokenizer, made without network."""

from __future__ import annotations

from pathlib import Path

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip
CORPUS = (
    "The quick brown fox jumps over the lazy dog. The answer is 4. Let me think about the question again.\n",
    "user assistant system model tool What is the sum of two and two? It is four, she said, and the other one agreed.\n",
    "You are a helpful guide. Train this word and not this. Here are the words that the model has to write.\n",
)


def tiny_tokenizer(folder: Path, template: str | None = CHATML, eos: str = "<|im_end|>", trim_offsets: bool = False) -> Path:
    """Write a byte-level BPE tokenizer of some 600 tokens and return its folder.

    Args:
        folder: created if needed.
        template: chat template, or None.
        eos: end token, one of SPECIAL. The padding token is <|endoftext|>.
        trim_offsets: let the post-processor take leading spaces out of the offsets, as RoBERTa's does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(CORPUS * 2, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token="<|endoftext|>")
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
