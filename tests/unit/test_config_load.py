"""Reading, overriding, writing, comparing and explaining runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayft.config import load as load_module
from rayft.config import rules
from rayft.config.load import differences, dump, load, schema
from rayft.config.schema import SftRun
from rayft.errors import ConfigError

MINIMAL = """
method: sft
run: {name: first}
model: {path: tiny}
data:
  train:
    gsm8k: {path: gsm8k.jsonl}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path / "run.yaml", MINIMAL)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*overrides: str, file: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load([file] if file else [], overrides)
    return str(caught.value)


def value_of(text: str) -> Any:
    """The value that YAML text gets, by way of an override."""
    return load_module._assignment(f"key={text}")["key"]


# Examples of the core schema, https://yaml.org/spec/1.2.2/#103-core-schema, and the words that YAML 1.1 reads otherwise.
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("12.", 12.0),
        ("-2.5e+2", -250.0),
        (".inf", float("inf")),
        ("-.INF", float("-inf")),
        ("0", 0),
        ("012", 12),
        ("-012", -12),
        ("+7", 7),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("on", "on"),
        ("yes", "yes"),
        ("NO", "NO"),
        ("tRUE", "tRUE"),
        ("2026-01-01", "2026-01-01"),
        ("1e", "1e"),
        ("=", "="),
        ("<|im_end|>", "<|im_end|>"),
        ("'12'", "12"),
        ("[a:b, ./c.py:d]", ["a:b", "./c.py:d"]),
        ("{a: 1, b: }", {"a": 1, "b": None}),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    parsed = value_of(text)
    assert parsed == value
    assert type(parsed) is type(value)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text("abc {}[],:#'\"\\\n-_01e.~&*!|>%@"),
    lambda item: st.lists(item, max_size=4) | st.dictionaries(st.text("abc:#1~ ", max_size=5), item, max_size=4),
    max_leaves=8,
)


@given(JSON)
def test_an_override_takes_any_json_value(value: object) -> None:
    assert value_of(json.dumps(value)) == value


@given(st.lists(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), min_size=1, max_size=5), st.integers())
def test_an_override_nests_by_its_dots(names: list[str], value: int) -> None:
    nested: Any = load_module._assignment(f"{'.'.join(names)}={value}")
    for name in names:
        assert list(nested) == [name]
        nested = nested[name]
    assert nested == value


def test_later_files_win_key_by_key_and_overrides_win_over_files(tmp_path: Path, minimal: Path) -> None:
    base = write(
        tmp_path / "base.yaml", "optim: {lr: 1e-3, beta1: 0.5}\nrun: {seed: 3, callbacks: ['a:b', 'c:d']}\ncheckpoint: {every: 5}\n"
    )
    over = write(tmp_path / "over.yaml", "optim: {lr: 2e-3}\nrun: {callbacks: ['e:f']}\n")
    cfg = load([base, minimal, over], ["optim.beta1=0.6", "data.train.gsm8k.limit=10", "checkpoint.every=null", "run.dir=a=b"])
    assert (cfg.optim.lr, cfg.optim.beta1, cfg.run.seed) == (2e-3, 0.6, 3)
    assert cfg.run.callbacks == ("e:f",)
    assert cfg.data.train["gsm8k"].limit == 10
    assert cfg.data.train["gsm8k"].path == "gsm8k.jsonl"
    assert cfg.checkpoint.every is None
    assert cfg.run.dir == "a=b"


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    text = """
method: sft
run: {name: first}
model: {path: tiny}
data:
  train:
    a: &a {path: a.jsonl, limit: 3}
    b: {<<: *a, path: b.jsonl}
    c: {<<: *a, limit: 4}
"""
    cfg = load([write(tmp_path / "run.yaml", text)], [])
    assert [(source.path, source.limit) for source in cfg.data.train.values()] == [("a.jsonl", 3), ("b.jsonl", 3), ("a.jsonl", 4)]


def test_names_of_sources_are_text_as_written(minimal: Path) -> None:
    cfg = load([minimal], ["data.train={on: {path: a}, 012: {path: b}}", "data.train.012.limit=1"])
    assert [(name, source.limit) for name, source in cfg.data.train.items()] == [("gsm8k", None), ("on", None), ("012", 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: {c: 2, c: 3}\n", "{file}, line 2, column 11: not valid YAML: the key c appears twice. Correct it, or quote the value."),
        (
            "a: 1\nb: [\n",
            "{file}, line 3, column 1: not valid YAML: expected the node content, but found '<stream end>'. Correct it",
        ),
        ("a: b: c\n", "{file}, line 1, column 5: not valid YAML: mapping values are not allowed here. Correct it, or quote the value."),
        ("a: &a [*a]\n", "{file}, line 1, column 4: not valid YAML: found unconstructable recursive node. Correct it, or quote the value."),
        ("? [a]\n: 1\n", "{file}, line 1, column 3: not valid YAML: a key must be text. Correct it, or quote the value."),
        ("a: !!python/name:os.system\n", "could not determine a constructor"),
        ("a: '\x07'\n", "{file}: not valid YAML: unacceptable character #x0007"),
        ("- 1\n", "{file}: must hold a mapping of sections, not list. Start with lines such as method: sft."),
        ("# nothing\n", "{file}: must hold a mapping of sections, not nothing. Start with lines such as method: sft."),
    ],
)
def test_files_that_cannot_be_read_are_refused_with_their_place(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "run.yaml", text)
    assert message.replace("{file}", str(file)) in refusal(file=file)


def test_a_missing_file_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "none.yaml"
    assert refusal(file=file) == f"{file}: cannot be read: No such file or directory. Give the path of a YAML file."


@pytest.mark.parametrize("override", ["optim.lr", "=1", ".a=1", "a..b=1", "a.=1"])
def test_malformed_overrides_are_refused(override: str) -> None:
    assert refusal(override) == f"override = {override!r}: must read section.key=value. Write it like optim.lr=1e-4."


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=fast", "optim.lr = 'fast': must be a finite number > 0. Run rayft config-schema --field optim.lr for its meaning."),
        ("optim.lr=.nan", "optim.lr = nan: must be a finite number > 0. Run rayft config-schema --field optim.lr for its meaning."),
        ("optim.lr=true", "optim.lr = True: must be a finite number > 0. Run rayft config-schema --field optim.lr for its meaning."),
        ("batch.rows=8.0", "batch.rows = 8.0: must be an integer >= 1. Run rayft config-schema --field batch.rows for its meaning."),
        ("data.pack=on", "data.pack = 'on': must be true or false. Run rayft config-schema --field data.pack for its meaning."),
        ("run.seed=null", "run.seed: is null but must be an integer >= 0. Run rayft config-schema --field run.seed for its meaning."),
        (
            "eval=",
            "eval: is null but must be a mapping with keys among every, at_start, max_rows, patience, min_delta, samples. "
            "Remove the line, or indent keys below it.",
        ),
        ("adapter.targets=[q_proj, 3]", "adapter.targets = ['q_proj', 3]: must be text or a list, each item text. Run"),
        ("optim.warmup=-1", "optim.warmup = -1: must be an integer >= 0 or a finite number >= 0 and <= 1. Run"),
        ("run.callbacks=[a:b, 3]", "run.callbacks.1 = 3: must be text. Run rayft config-schema --field run.callbacks for its meaning."),
        ("data.train.gsm8k.path=null", "data.train.gsm8k.path: is null but must be text. Run"),
        ("data.train.other.limit=3", "data.train.other.path: is required and must be text. Add it."),
        ("parallel.device=tpu", "parallel.device = 'tpu': must be one of auto, cpu, cuda. Run"),
        ("schema_version=2", "schema_version = 2: must be 1. Run rayft config-schema --field schema_version for its meaning."),
        ("method=ppo", "method = 'ppo': must be one of sft, grpo. Name a method that exists."),
        ("method=[sft]", "method = ['sft']: must be one of sft, grpo. Name a method that exists."),
    ],
)
def test_a_wrong_value_names_field_value_and_what_is_wanted(minimal: Path, override: str, message: str) -> None:
    assert refusal(override, file=minimal).startswith(message)


def test_a_run_without_a_method_is_refused() -> None:
    assert refusal("optim.lr=1") == "method: is required and must be one of sft, grpo. Add it, or give a configuration file."


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("optim.lrr=1", "Did you mean optim.lr"),
        ("optim.learning_rate=1", "Did you mean optim.lr"),
        ("lr=1", "Did you mean optim.lr"),
        ("learning_rate=1", "Did you mean optim.lr"),
        ("optim.seed=1", "Did you mean run.seed"),
        ("max_step=1", "Did you mean run.max_steps"),
        ("every=1", "Did you mean checkpoint.every or eval.every or eval.samples.every"),
        ("optimizer.lr=1", "Did you mean optim"),
        ("data.train.gsm8k.limt=1", "Did you mean data.train.gsm8k.limit"),
        ("export.xyzzy=1", "The keys here are at_end, merge, dtype"),
    ],
)
def test_an_unknown_key_names_the_nearest(minimal: Path, override: str, suggestion: str) -> None:
    field = "optimizer" if override.startswith("optimizer") else override.partition("=")[0]
    shown = "" if field == "optimizer" else " = 1"
    assert refusal(override, file=minimal) == f"{field}{shown}: unknown key. {suggestion}."


def test_a_dotted_key_in_a_file_is_told_to_nest(tmp_path: Path) -> None:
    file = write(tmp_path / "run.yaml", f"{MINIMAL}\noptim.lr: 1\n")
    assert "optim.lr = 1: unknown key. Nest the keys in a file" in refusal(file=file)


def test_all_problems_come_in_one_message_one_a_line(minimal: Path) -> None:
    lines = refusal("optim.lr=0", "optim.foo=1", "run.name=null", file=minimal).split("\n")
    assert lines[0] == "configuration: 3 settings are refused"
    assert [line.split()[0] for line in lines[1:]] == ["run.name:", "optim.lr", "optim.foo"]
    assert all(re.fullmatch(r"  \S.*[^.]\.", line) for line in lines[1:])


def test_rules_are_applied_after_validation(minimal: Path) -> None:
    assert refusal("batch.micro_rows=9", file=minimal).startswith("batch.micro_rows = 9: is more than batch.rows = 8")


def test_suggestions_for_foreign_names_lead_to_keys_that_exist() -> None:
    for target in load_module.ELSEWHERE.values():
        schema(target, "json")


def values(node: Any) -> st.SearchStrategy[Any]:
    """Raw values that a node of the JSON schema takes."""
    if "anyOf" in node:
        return st.one_of([values(option) for option in node["anyOf"]])
    if "enum" in node or "const" in node:
        return st.sampled_from(node.get("enum", [node.get("const")]))
    if "pattern" in node:
        return st.from_regex(node["pattern"].removeprefix("^").removesuffix("$"), fullmatch=True)
    if node["type"] == "array":
        return st.lists(values(node["items"]), max_size=3)
    if "properties" in node:
        required = node.get("required", ())
        fields = {name: values(child) for name, child in node["properties"].items()}
        return st.fixed_dictionaries(
            {name: child for name, child in fields.items() if name in required},
            optional={name: child for name, child in fields.items() if name not in required},
        )
    if node["type"] == "object":
        return st.dictionaries(st.text(max_size=8), values(node["additionalProperties"]), min_size=node.get("minProperties", 0), max_size=2)
    least, most = node.get("minimum", node.get("exclusiveMinimum")), node.get("maximum")
    return {
        "integer": st.integers(min_value=least),
        "number": st.floats(least, most, exclude_min="exclusiveMinimum" in node, allow_nan=False, allow_infinity=False),
        "boolean": st.booleans(),
        "string": st.text(max_size=20) | st.sampled_from(["on", "1e-5", "012", "1:30", "0o17", "null", "<<", "=", " a\n b\n", "a: b"]),
        "null": st.none(),
    }[node["type"]]


RUNS = values(load_module._tree(SftRun)).map(SftRun.model_validate)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], deadline=None)
@given(cfg=RUNS)
def test_a_written_run_reads_back_equal_in_yaml_1_2_and_1_1(tmp_path: Path, cfg: SftRun) -> None:
    text = dump(cfg)
    with mock.patch.object(rules, "RULES", ()), mock.patch.object(rules, "ROW_RULES", ()):
        again = load([write(tmp_path / "run.yaml", text)], [])
    assert again == cfg
    assert dump(again) == text, "types and order survive too"
    assert differences(cfg, again) == []
    assert yaml.safe_load(text) == cfg.model_dump(mode="json")


def test_differences_name_what_changed(minimal: Path) -> None:
    two = ["data.train.more.path=more.jsonl"]
    old = load([minimal], two)
    new = load([minimal], [*two, "optim.lr=1e-3", "run.callbacks=[a:b]", "data.eval.held={path: held.jsonl}"])
    assert differences(old, old) == []
    assert [(field, before) for field, before, _ in differences(old, new)] == [
        ("run.callbacks", ()),
        ("data.eval.held", None),
        ("optim.lr", 1e-5),
    ]
    assert [after for _, _, after in differences(old, new)][::2] == [("a:b",), 1e-3]


def test_the_order_of_sources_is_a_difference(minimal: Path) -> None:
    old = load([minimal], ["data.train.more.path=more.jsonl"])
    new = old.model_copy(update={"data": old.data.model_copy(update={"train": dict(reversed(old.data.train.items()))})})
    assert new == old
    assert differences(old, new) == [("data.train", ["gsm8k", "more"], ["more", "gsm8k"])]


def test_the_reference_sets_every_default_and_marks_what_is_required() -> None:
    text = schema(None, "yaml")
    reference = yaml.safe_load(text)
    cfg = SftRun(method="sft", run={"name": "x"}, model={"path": "x"}, data={"train": {"NAME": {"path": "x"}}}).model_dump(mode="json")
    required = {"method": cfg.pop("method"), "run.name": "x", "model.path": "x", "data.train.NAME.path": "x"}
    assert sorted(re.findall(r"required\)\n *(\w+):\n", text)) == ["method", "name", "path", "path", "train"]
    for field, value in required.items():
        *sections, key = field.split(".")
        at = reference
        for section in sections:
            at = at[section]
        assert at.pop(key) is None
        assert value in ("sft", "x")
    for section, key in (("run", "name"), ("model", "path")):
        del cfg[section][key]
    del cfg["data"]["train"]["NAME"]["path"]
    assert reference == cfg


def test_the_reference_of_one_field() -> None:
    assert schema("optim.lr", "yaml") == "# Highest learning rate. (a finite number > 0)\nlr: 1.0e-05\n"
    assert json.loads(schema("optim.lr", "json")) == {
        "default": 1e-5,
        "description": "Highest learning rate.",
        "exclusiveMinimum": 0,
        "type": "number",
    }
    assert json.loads(schema("data.train.any.roles", "json"))["default"] == {"human": "user", "gpt": "assistant", "model": "assistant"}
    assert schema("checkpoint", "yaml").startswith("# When to save what is needed to resume.\ncheckpoint:\n  # ")
    assert "$ref" not in schema(None, "json")


def test_the_reference_of_an_unknown_field_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^--field = 'optim.lrr': unknown key. Did you mean optim.lr.$"):
        schema("optim.lrr", "yaml")
    with pytest.raises(ConfigError, match=r"^--field = 'optim.lr.x': unknown key. It has no keys.$"):
        schema("optim.lr.x", "yaml")


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "adamw_8bit", "paged_adamw", "paged_lion_8bit", "lion_32bit"])
def test_optimizers_of_bitsandbytes_are_refused_with_the_reason(name: str, minimal: Path) -> None:
    message = refusal(f"optim.type={name}", file=minimal)
    assert message.startswith(f"optim.type = '{name}': is an optimizer of bitsandbytes, which cannot update sharded parameters")
    assert "Use adamw8bit" in message
    assert "bitsandbytes" not in refusal("optim.type=sgd", file=minimal)
