"""The tokenizer of a run: its chat template, end and padding tokens, and the fingerprint that says when shards are stale."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from rayft.errors import DataError
from rayft.models.hub import model_folder

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    from rayft.config.schema import Dataset, Model

Tokenizer: TypeAlias = "PreTrainedTokenizerFast"
Backend: TypeAlias = "tokenizers.Tokenizer"

log = logging.getLogger("rayft")


def load_tokenizer(model: Model) -> Tokenizer:
    """The run's tokenizer, complete: chat template, end token and padding token are set.

    `model.tokenizer` is a folder or the id of one in the local cache; without it, the model's own files are read.

    Raises:
        DataError: there is no tokenizer, it is a slow one, a token is not one of its tokens, or it has nothing to pad with.
    """
    field, path = ("model.path", model_folder(model)) if model.tokenizer is None else ("model.tokenizer", model.tokenizer)
    tokenizer = _read(field, path, model.trust_remote_code)
    if model.chat_template is not None:
        tokenizer.chat_template = _template(model.chat_template)
    if model.eos_token is not None:
        tokenizer.eos_token = _one_token(tokenizer, "model.eos_token", model.eos_token)
    if model.pad_token is not None:
        tokenizer.pad_token = _one_token(tokenizer, "model.pad_token", model.pad_token)
    elif tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            rule = "the tokenizer has neither a padding token nor an end token to pad with"
            raise DataError("model.pad_token", None, rule, "Set model.pad_token or model.eos_token to one of its tokens")
        log.warning("The tokenizer has no padding token; its end token %r is used. Set model.pad_token to choose.", tokenizer.eos_token)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def template_text(tokenizer: Tokenizer) -> str | None:
    """The chat template that rows are rendered with; of several named ones the default one; None when there is none."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def fingerprint(tokenizer: Tokenizer) -> str:
    """sha256, in hexadecimal, over everything of the tokenizer that decides the token ids of a row.

    It covers the serialised backend (vocabulary, merges, normalisation, added tokens), the special tokens and the chat
    template, but not the backend's padding and truncation, which are left over from the last call.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["padding"] = backend["truncation"] = None
    parts = [backend, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def exact_backend(tokenizer: Tokenizer) -> Backend:
    """A copy of the backend that adds no token and whose offsets are exact.

    A byte-level post-processor with `trim_offsets` takes leading spaces out of the offsets, so that a token looks as if
    it lay in one span when it straddles two. Without post-processor the offsets cover every character of the token.
    """
    from tokenizers import Tokenizer as BackendTokenizer

    backend = BackendTokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = None
    backend.no_padding()
    backend.no_truncation()
    return backend


def has_chats(sources: Mapping[str, Dataset]) -> bool:
    """Whether any source is more than plain text, so that questions are asked as chats."""
    return any(source.format != "text" for source in sources.values())


def question(tokenizer: Tokenizer, conversation: Sequence[Mapping[str, str]], *, chat: bool) -> list[int]:
    """Token ids that the model is to continue: a rendered chat, or plain text where that is wanted or there is no template.

    Args:
        tokenizer: of the model.
        conversation: turns of {role, content}.
        chat: render them by the chat template, if there is one.
    """
    if chat and tokenizer.chat_template:
        rendered: Any = tokenizer.apply_chat_template(list(conversation), add_generation_prompt=True, return_dict=True)
        return list(rendered["input_ids"])
    return list(tokenizer("\n".join(turn["content"] for turn in conversation))["input_ids"])


def special_tokens(tokenizer: Tokenizer) -> frozenset[str]:
    """Texts of the tokens that mark structure: turn ends, headers, begin and end of text."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset(added | {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token})


def leading_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The begin token (one id) when the tokenizer puts one before every text, else nothing."""
    starts = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id] != tokenizer.encode("a", add_special_tokens=False)[:1]
    return (int(tokenizer.bos_token_id),) if starts else ()


def _read(field: str, path: str, trust_remote_code: bool) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as problem:
        rule = f"no tokenizer can be read from it ({str(problem).splitlines()[0]})"
        raise DataError(field, path, rule, "Name a folder with tokenizer.json, here or as model.tokenizer") from problem
    if not tokenizer.is_fast:
        rule = f"{type(tokenizer).__name__} cannot tell which characters a token covers"
        raise DataError(field, path, rule, "Use a tokenizer that comes as tokenizer.json")
    # Some families answer a folder that has no tokenizer files with an empty vocabulary instead of an error.
    if tokenizer.get_vocab().keys() <= tokenizer.added_tokens_encoder.keys():
        raise DataError(field, path, "its tokenizer has an empty vocabulary", "Put the model's tokenizer.json into the folder")
    return cast("Tokenizer", tokenizer)


def _one_token(tokenizer: Tokenizer, field: str, token: str) -> str:
    if tokenizer.backend_tokenizer.token_to_id(token) is None:
        ids = tokenizer.encode(token, add_special_tokens=False)
        rule = f"must be one token of the tokenizer, but encodes to {len(ids)}: {ids}"
        raise DataError(field, token, rule, "Name a token that the tokenizer has")
    return token


def _template(value: str) -> str:
    if "{{" in value or "{%" in value:
        return value
    shipped = files("rayft.data") / "templates"
    file = Path(value).expanduser() if value.endswith(".jinja") else shipped / f"{value}.jinja"
    if not file.is_file():
        names = ", ".join(sorted(entry.name.removesuffix(".jinja") for entry in shipped.iterdir() if entry.name.endswith(".jinja")))
        rule = "is neither Jinja text, nor a .jinja file that exists, nor a template that comes with rayft"
        raise DataError("model.chat_template", value, rule, f"Correct the path, or use one of: {names}")
    return file.read_text(encoding="utf-8")
