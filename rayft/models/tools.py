"""Python functions as tools of a chat template: their JSON schemas, from signature and docstring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rayft.errors import ConfigError


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function, as transformers makes it: types from the signature, descriptions from a docstring with `Args:`.

    Raises:
        ConfigError: an argument has no type or no description.
    """
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    try:
        schema: dict[str, Any] = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException) as problem:
        name = getattr(function, "__name__", repr(function))
        remedy = "Give each argument a type, and a line under Args: in its docstring"
        raise ConfigError("environment.tools", name, f"has no schema ({problem})", remedy) from problem
    return schema
