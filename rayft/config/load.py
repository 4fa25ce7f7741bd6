"""Reads a run: YAML files, then dotted overrides, merged and validated once; also writes, compares and explains runs.

YAML follows the core schema of YAML 1.2 (https://yaml.org/spec/1.2.2/#103-core-schema): `1e-5` is a number, `012` is
twelve, `on`, `yes` and `1:30` are text. PyYAML alone reads the schema of 1.1, where none of this holds.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError
from pydantic.json_schema import GenerateJsonSchema

from rayft.config import rules
from rayft.config.schema import METHODS, AnyRun
from rayft.errors import ConfigError

Raw = dict[str, Any]
Name = str | int
Node = Mapping[str, Any]
"""A node of the run's JSON schema."""

ENTRY = "NAME"
"""Stands for the user's own name of a source in references and suggestions."""
ELSEWHERE = {
    "activation_offloading": "parallel.activation_offload",
    "base_model": "model.path",
    "batch_size": "batch.rows",
    "bf16": "model.compute_dtype",
    "data_parallel_replicate_degree": "parallel.replicas",
    "dataset": f"data.train.{ENTRY}",
    "datasets": f"data.train.{ENTRY}",
    "gradient_accumulation_steps": "batch.rows",
    "gradient_checkpointing": "parallel.activation_checkpointing",
    "learning_rate": "optim.lr",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "lora_r": "adapter.r",
    "lora_target_modules": "adapter.targets",
    "lr_scheduler": "optim.schedule",
    "lr_scheduler_type": "optim.schedule",
    "max_length": "data.seq_len",
    "max_seq_length": "data.seq_len",
    "micro_batch_size": "batch.micro_rows",
    "model_name_or_path": "model.path",
    "num_epochs": "run.epochs",
    "num_train_epochs": "run.epochs",
    "num_workers": "parallel.workers",
    "output_dir": "run.dir",
    "packing": "data.pack",
    "per_device_train_batch_size": "batch.micro_rows",
    "sample_packing": "data.pack",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "sequence_len": "data.seq_len",
    "target_modules": "adapter.targets",
    "torch_dtype": "model.dtype",
    "warmup_ratio": "optim.warmup",
    "warmup_steps": "optim.warmup",
}
"""What other trainers call a key -> its name here, for suggestions only."""

BITSANDBYTES = re.compile(r".*(bnb|paged|_8bit|_32bit).*")
"""What other trainers call optimizers of bitsandbytes."""


def load(paths: Sequence[Path], overrides: Sequence[str]) -> AnyRun:
    """The run that the files describe together, later ones over earlier ones, and overrides `a.b.c=value` over all.

    Mappings merge key by key; everything else, null included, replaces what was there. Sources are addressed by name:
    `data.train.gsm8k.limit=10`.

    Raises:
        ConfigError: a file cannot be read, or settings are refused; lists every refused setting.
    """
    raw: Raw = {}
    for path in paths:
        raw = _merge(raw, _read(path))
    for override in overrides:
        raw = _merge(raw, _assignment(override))
    cfg = _validate(raw)
    rules.check(cfg)
    return cfg


def dump(cfg: AnyRun) -> str:
    """The run as YAML with every key written out, in the schema's order; `load` reads it back to an equal value."""
    return _write(cfg.model_dump(mode="json"), default_flow_style=False)


def differences(old: AnyRun, new: AnyRun) -> list[tuple[str, Any, Any]]:
    """What changed: (dotted name, old value, new value), None for a source that is absent; the order of sources counts."""
    return list(_compare("", old.model_dump(), new.model_dump()))


def schema(field: str | None, form: Literal["json", "yaml"], method: str = "sft") -> str:
    """The reference of a dotted field, or of everything: JSON schema, or YAML with descriptions, types and defaults.

    Raises:
        ConfigError: there is no such field.
    """
    tree = _tree(METHODS[method])
    names = tuple(field.split(".")) if field else ()
    known, node = _locate(tree, names)
    if known != names:
        raise ConfigError("--field", field, "unknown key", _suggest(tree, known, node, names[len(known)]))
    if form == "json":
        return json.dumps(node, indent=2) + "\n"
    if names:
        return "\n".join(_reference(names[-1], node, "default" not in node, "")) + "\n"
    return "\n".join([f"# {node['description']}", *_references(node, "")]) + "\n"


class _Reader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2. Keys are text as written, and may not repeat."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} appears twice", key.start_mark)
            if key.tag != f"{_TAG}merge":
                key.tag = f"{_TAG}str"
            seen.add(key.value)
        return node


class _Writer(yaml.SafeDumper):
    """Quotes whatever a reader of YAML 1.1 or 1.2 could take for something other than text, so both read the same.

    Its output is ASCII: PyYAML writes U+0085 and the like unescaped otherwise, and reads them back as line breaks.
    """

    def ignore_aliases(self, data: object) -> bool:
        return True


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


# Mappings and lists are built whole at once, so that a node inside itself is an error here and not an endless value.
def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    return loader.construct_mapping(node, deep=True)


def _list(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


_TAG = "tag:yaml.org,2002:"
_Reader.yaml_implicit_resolvers = {}
for _kind, _form, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Reader, _Writer):
        _class.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_form})\Z"), _first)
_Reader.add_constructor(f"{_TAG}int", _integer)
_Reader.add_constructor(f"{_TAG}map", _mapping)
_Reader.add_constructor(f"{_TAG}seq", _list)


def _parse(text: bytes | str, where: str) -> Any:
    try:
        return yaml.load(text, _Reader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}, line {mark.line + 1}, column {mark.column + 1}" if mark else where
        raise ConfigError(place, None, f"not valid YAML: {error.problem}", "Correct it, or quote the value") from error
    except (yaml.YAMLError, ValueError) as error:  # undecodable bytes; a number of more digits than Python converts
        raise ConfigError(where, None, f"not valid YAML: {' '.join(str(error).split())}", "Correct it") from error


def _write(value: object, **style: Any) -> str:
    text: str = yaml.dump(value, Dumper=_Writer, sort_keys=False, **style)
    return text


def _read(path: Path) -> Raw:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(str(path), None, f"cannot be read: {error.strerror}", "Give the path of a YAML file") from error
    raw = _parse(content, str(path))
    if not isinstance(raw, dict):
        rule = f"must hold a mapping of sections, not {'nothing' if raw is None else type(raw).__name__}"
        raise ConfigError(str(path), None, rule, "Start with lines such as method: sft")
    return raw


def _assignment(override: str) -> Raw:
    """`a.b=value` as nested mappings."""
    name, equals, text = override.partition("=")
    names = name.split(".")
    if not equals or not all(names):
        raise ConfigError("override", override, "must read section.key=value", "Write it like optim.lr=1e-4")
    value = _parse(text, f"override {override}")
    for key in reversed(names):
        value = {key: value}
    return value  # type: ignore[no-any-return]


def _merge(base: Raw, over: Raw) -> Raw:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _validate(raw: Raw) -> AnyRun:
    method, known = raw.get("method"), ", ".join(METHODS)
    if "method" not in raw:
        raise ConfigError("method", None, f"is required and must be one of {known}", "Add it, or give a configuration file")
    if not isinstance(method, str) or method not in METHODS:
        raise ConfigError("method", method, f"must be one of {known}", "Name a method that exists")
    try:
        return METHODS[method].model_validate(raw)
    except ValidationError as error:
        raise rules.combine(_problems(error, _tree(METHODS[method]), raw)) from None


def _problems(error: ValidationError, tree: Node, raw: Raw) -> list[ConfigError]:
    """Pydantic's errors as sentences, one a field: the alternatives of a union are one problem."""
    found: dict[tuple[Name, ...], ConfigError] = {}
    for item in error.errors(include_url=False):
        names, node = _locate(tree, item["loc"])
        if item["type"] == "extra_forbidden":
            key = str(item["loc"][-1])
            value = None if isinstance(item["input"], dict) else item["input"]
            found[item["loc"]] = ConfigError(_dotted(item["loc"]), value, "unknown key", _suggest(tree, names, node, key))
        elif item["type"] == "missing":
            found[names] = ConfigError(_dotted(names), None, f"is required and must be {_wanted(node)}", "Add it")
        else:
            found[names] = _mismatch(raw, names, node)
    return list(found.values())


def _mismatch(raw: Any, names: Sequence[Name], node: Node) -> ConfigError:
    value = raw
    for name in names:
        value = value[name]
    if tuple(names) == ("optim", "type") and isinstance(value, str) and BITSANDBYTES.fullmatch(value):
        rule = "is an optimizer of bitsandbytes, which cannot update sharded parameters: it has no code for DTensor"
        return ConfigError("optim.type", value, rule, "Use adamw8bit, whose states take 8 bits as well")
    rule = f"{'is null but ' if value is None else ''}must be {_wanted(node)}"
    if value is None and "properties" in node:
        return ConfigError(_dotted(names), None, rule, "Remove the line, or indent keys below it")
    field = _dotted([name for name in names if isinstance(name, str)])
    return ConfigError(_dotted(names), value, rule, f"Run rayft config-schema --field {field} for its meaning")


def _dotted(names: Sequence[Name]) -> str:
    return ".".join(map(str, names))


class _Schema(GenerateJsonSchema):
    """Pydantic's JSON schema, with the defaults that a factory makes."""

    def get_default_value(self, schema: Any) -> Any:
        return schema["default_factory"]() if "default_factory" in schema else super().get_default_value(schema)


def _tree(run: type[AnyRun]) -> Node:
    whole = run.model_json_schema(schema_generator=_Schema)
    return _inline(whole, whole.pop("$defs"))  # type: ignore[no-any-return]


def _inline(node: Any, definitions: Node) -> Any:
    """A schema without references, titles, and pydantic's own names of bounds."""
    bounds = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    if isinstance(node, list):
        return [_inline(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        node = definitions[node["$ref"].rpartition("/")[2]] | {key: value for key, value in node.items() if key != "$ref"}
    is_title = isinstance(node.get("title"), str)
    return {bounds.get(key, key): _inline(value, definitions) for key, value in node.items() if key != "title" or not is_title}


def _child(node: Node, name: Name) -> Node | None:
    """The schema of one key or item, None where there is none or where a union leaves it open."""
    if name in node.get("properties", ()):
        return node["properties"][name]  # type: ignore[no-any-return]
    if isinstance(node.get("additionalProperties"), dict):
        return node["additionalProperties"]  # type: ignore[no-any-return]
    if isinstance(name, int) and "items" in node:
        return node["items"]  # type: ignore[no-any-return]
    options = [option for option in node.get("anyOf", ()) if option.get("type") != "null"]
    return _child(options[0], name) if len(options) == 1 else None


def _locate(tree: Node, names: Sequence[Name]) -> tuple[tuple[Name, ...], Node]:
    """The longest part of a path that the schema knows, and the schema there."""
    node = tree
    for depth, name in enumerate(names):
        child = _child(node, name)
        if child is None:
            return tuple(names[:depth]), node
        node = child
    return tuple(names), node


def _leaves(node: Node, names: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Paths of all keys below a node, sections included."""
    for name, child in node.get("properties", {}).items():
        yield (*names, name)
        yield from _leaves(child, (*names, name))
    entries = node.get("additionalProperties")
    if isinstance(entries, dict):
        yield from _leaves(entries, (*names, ENTRY))


def _suggest(tree: Node, section: Sequence[Name], node: Node, key: str) -> str:
    """What an unknown key of a section was most likely meant to be."""
    named: dict[str, list[str]] = {}
    for names in _leaves(tree, ()):
        named.setdefault(names[-1], []).append(_dotted(names))
    siblings = difflib.get_close_matches(key, node.get("properties", ()), n=1)
    others = difflib.get_close_matches(key, named, n=1)
    if "." in key:
        return "Nest the keys in a file: a line for each section, its keys indented below"
    if key in ELSEWHERE:
        return f"Did you mean {ELSEWHERE[key]}"
    if key in named:
        return f"Did you mean {' or '.join(named[key])}"
    if siblings:
        return f"Did you mean {_dotted([*section, siblings[0]])}"
    if others:
        return f"Did you mean {' or '.join(named[others[0]])}"
    return f"The keys here are {', '.join(node['properties'])}" if "properties" in node else "It has no keys"


def _wanted(node: Node) -> str:
    """The values that a schema takes, in words."""
    if "anyOf" in node:
        return " or ".join(_wanted(option) for option in node["anyOf"])
    choices = node.get("enum", [node["const"]] if "const" in node else [])
    if choices:
        return f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else str(choices[0])
    if node["type"] == "array":
        return f"a list, each item {_wanted(node['items'])}"
    if "properties" in node:
        return f"a mapping with keys among {', '.join(node['properties'])}"
    if node["type"] == "object":
        least = f"at least {node['minProperties']} " if "minProperties" in node else ""
        entry = "a section" if "properties" in node["additionalProperties"] else _wanted(node["additionalProperties"])
        return f"a mapping of {least}names, each to {entry}"
    kinds = {"integer": "an integer", "number": "a finite number", "boolean": "true or false", "string": "text", "null": "null"}
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = " and ".join(f"{sign} {node[bound]}" for bound, sign in signs.items() if bound in node)
    pattern = f"matching {node['pattern']}" if "pattern" in node else ""
    return " ".join(filter(None, (kinds[node["type"]], bounds, pattern)))


def _references(node: Node, pad: str) -> Iterator[str]:
    for name, child in node["properties"].items():
        yield from _reference(name, child, name in node.get("required", ()), pad)


def _reference(name: str, node: Node, required: bool, pad: str) -> Iterator[str]:
    """Lines of YAML that explain a key; those of a key with a default set that default."""
    if "properties" in node:
        yield f"{pad}# {node['description']}"
        yield f"{pad}{name}:"
        yield from _references(node, f"{pad}  ")
        return
    yield f"{pad}# {node['description']} ({_wanted(node)}{'; required' if required else ''})"
    entries = node.get("additionalProperties", {})
    if "properties" in entries and required:
        yield f"{pad}{name}:"
        yield from _reference(ENTRY, entries, required, f"{pad}  ")
    elif required:
        yield f"{pad}{name}:"
    else:
        yield f"{pad}{name}: {_write(node['default'], default_flow_style=True, width=1 << 30).removesuffix('...' + chr(10)).strip()}"


def _compare(field: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if not isinstance(old, dict) or not isinstance(new, dict):
        if old != new:
            yield field, old, new
        return
    for name in old | new:
        yield from _compare(f"{field}.{name}".lstrip("."), old.get(name), new.get(name))
    sections = all(isinstance(entry, dict) for entry in (*old.values(), *new.values()))
    if sections and old.keys() == new.keys() and list(old) != list(new):
        yield field, list(old), list(new)
