"""Pushes to in-process engines: exact, verified, and every kind of corruption or failure found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from families import write_model
from rayft.config.schema import Adapter
from rayft.errors import InfrastructureError, TrainingError
from rayft.models.adapt import adapt
from rayft.rollout.engine import EngineOptions, EngineThread
from rayft.rollout.receive import loaded_flaws
from rayft.weight_sync.protocol import EngineHandle, Sender
from rayft.weight_sync.source import full_weights
from rayft.weight_sync.wire import bit_sum

CHUNK = 60_000
Alter = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model, the base of policies and engines."""
    return write_model("llama_tied", tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def threads(folder: Path) -> Iterator[list[EngineThread]]:
    """Two engines; every test pushes to them anew."""
    made = [EngineThread(EngineOptions(folder, "local", "float32", context=64)) for _ in range(2)]
    yield made
    for thread in made:
        thread.close()


def policy(folder: Path, seed: int, lora: bool = False) -> nn.Module:
    """The base moved by noise; with `lora` the base stays and adapters and the final norm are moved."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if lora:
        adapt(model, Adapter(type="lora", r=4, targets=("q_proj", "down_proj"), modules_to_save=("model.norm",)), 0)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def held(thread: EngineThread) -> dict[str, torch.Tensor]:
    """What the engine's model holds."""
    return {name: parameter.clone() for name, parameter in thread.engine._model.named_parameters()}


def sender(transport: str, tmp_path: Path, **options: Any) -> Sender:
    defaults = {"dtype": torch.float32, "device": "cpu", "deadline_s": 10, "chunk_bytes": CHUNK, "folder": tmp_path / "weights"}
    return Sender(transport, **(defaults | options))  # type: ignore[arg-type]


def handles(threads: list[EngineThread], life: int = 0) -> list[EngineHandle]:
    return [EngineHandle(f"engine-{index}-{life}", thread.call) for index, thread in enumerate(threads)]


def altered(thread: EngineThread, alter: Alter) -> EngineHandle:
    """The engine behind a wire that changes chunk messages."""

    def call(method: str, *arguments: Any) -> Future[Any]:
        if method == "receive" and arguments[1]["phase"] == "chunk":
            arguments = (arguments[0], alter(dict(arguments[1])))
        return thread.call(method, *arguments)

    return EngineHandle("altered", call)


@pytest.mark.parametrize("transport", ["disk", "gloo"])
def test_engines_hold_exactly_what_was_pushed(transport: str, folder: Path, threads: list[EngineThread], tmp_path: Path) -> None:
    push = sender(transport, tmp_path, verify_every=3)
    for step in range(4):
        model = policy(folder, step)
        report = push.push(model, f"1.{step}", handles(threads))
        assert (report.verified, report.unchecked, dict(report.lost)) == (step in (0, 3), (), {})
        assert report.bytes == sum(parameter.numel() * 4 for parameter in model.parameters())
        for thread in threads:
            assert all(torch.equal(value, model.get_parameter(name)) for name, value in held(thread).items())
            assert thread.call("version").result() == f"1.{step}"
    assert push.push(model, "1.5", handles(threads[:1], life=1)).verified  # other members: a new group, verified at once
    assert push.push(model, "2.5", handles(threads)).verified
    push.close()
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("transport", ["disk", "gloo"])
def test_adapters_arrive_merged_or_are_merged_there(transport: str, folder: Path, threads: list[EngineThread], tmp_path: Path) -> None:
    """Both ways give the same bits, also in bfloat16, and equal peft's own merge."""
    model = policy(folder, 5, lora=True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    whole, small = sender(transport, tmp_path), sender(transport, tmp_path, payload="adapter")
    large = whole.push(model, "1.1", handles(threads[:1]))
    merged = held(threads[0])
    report = small.push(model, "1.2", handles(threads[1:]))
    assert report.verified and report.bytes < large.bytes / 4
    assert all(torch.equal(value, merged[name]) for name, value in held(threads[1]).items())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())

    layer = model.model.layers[1].self_attn.q_proj
    expected = layer.base_layer.weight + layer.get_delta_weight("default")
    torch.testing.assert_close(merged["model.layers.1.self_attn.q_proj.weight"], expected)
    assert torch.equal(merged["model.norm.weight"], model.model.norm.modules_to_save["default"].weight)
    assert not torch.equal(merged["model.norm.weight"], model.model.norm.original_module.weight)
    names = {weight.name: weight.gather() for weight in full_weights(model, torch.bfloat16)}
    assert names.keys() == merged.keys() and all(torch.equal(value, merged[name].bfloat16()) for name, value in names.items())


def dropped(message: dict[str, Any]) -> dict[str, Any]:
    return message | {"table": [row for row in message["table"] if row[0] != "model.layers.1.mlp.up_proj.weight"]}


def swapped(message: dict[str, Any]) -> dict[str, Any]:
    first, second = "model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.gate_proj.weight"
    other = {first: second, second: first}
    return message | {"table": [[other.get(name, name), *rest] for name, *rest in message["table"]]}


@pytest.mark.parametrize(
    ("alter", "finding"),
    [
        (dropped, r"layers.1.mlp.up_proj.weight did not arrive.*2 in all"),
        (swapped, r"layers.2.mlp.(gate|up)_proj.weight differs.*2 in all"),
    ],
)
def test_wrong_tensors_stop_the_run(alter: Alter, finding: str, folder: Path, threads: list[EngineThread], tmp_path: Path) -> None:
    push = sender("gloo", tmp_path)
    with pytest.raises(TrainingError, match=finding):
        push.push(policy(folder, 1), "1.1", [altered(threads[0], alter)])
    assert not threads[0].engine._going.is_set()  # it stays paused
    push.push(policy(folder, 1), "1.2", handles(threads))
    assert threads[0].engine._going.is_set()


@pytest.mark.parametrize("payload", ["full", "adapter"])
def test_a_missing_tensor_is_found_without_sums(payload: str, folder: Path, threads: list[EngineThread], tmp_path: Path) -> None:
    push, model = sender("disk", tmp_path, payload=payload, verify_every=1000), policy(folder, 1, payload == "adapter")
    wire = {"torn": False}
    engine = [altered(threads[0], lambda message: message | {"table": message["table"][wire["torn"] :]})]
    push.push(model, "1.1", engine)
    assert not push.push(model, "1.2", engine).verified
    wire["torn"] = True
    with pytest.raises(TrainingError, match=r"\d+ of \d+ tensors arrived"):
        push.push(model, "1.3", engine)


@pytest.mark.parametrize("payload", ["full", "adapter"])
def test_stale_weights_stop_the_run(payload: str, folder: Path, threads: list[EngineThread], tmp_path: Path) -> None:
    """A file of the last version in place of this one's: names, types and sizes are right, values are not."""
    push = sender("disk", tmp_path, payload=payload, verify_every=1)
    kept = tmp_path / "old.safetensors"

    def keep(message: dict[str, Any]) -> dict[str, Any]:
        kept.write_bytes(Path(message["file"]).read_bytes())
        return message

    push._chunk_bytes = 10**9
    push.push(policy(folder, 1, payload == "adapter"), "1.1", [altered(threads[0], keep)])
    with pytest.raises(TrainingError, match="differs"):
        push.push(policy(folder, 2, payload == "adapter"), "1.2", [altered(threads[0], lambda message: message | {"file": str(kept)})])
    push.push(policy(folder, 2), "1.3", handles(threads))


def test_a_weight_that_arrives_but_is_not_loaded_stops_the_run(
    folder: Path, threads: list[EngineThread], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver, lost = threads[0].engine._receiver, "model.layers.0.input_layernorm.weight"
    load = receiver._load
    monkeypatch.setattr(receiver, "_load", lambda tensors: load([(name, tensor) for name, tensor in tensors if name != lost]))
    with pytest.raises(TrainingError, match=f"{lost} was loaded wrongly"):
        sender("disk", tmp_path).push(policy(folder, 9), "1.1", handles(threads[:1]))


def test_fused_weights_are_held_to_their_parts() -> None:
    q, k, v = torch.randn(4, 8), torch.randn(2, 8), torch.randn(2, 8)
    given = {f"l.0.{name}.weight": int(bit_sum(t)) for name, t in (("q_proj", q), ("k_proj", k), ("v_proj", v))}
    fused = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
    good = {"l.0.qkv_proj.weight": torch.cat([q, k, v, torch.zeros(3, 8)]), "other": torch.ones(1), "packed": torch.empty(0)}
    assert loaded_flaws(given, good, fused) == ([], ["packed", "other"])
    stale = {"l.0.qkv_proj.weight": torch.cat([q, torch.randn(2, 8), v])}
    assert loaded_flaws(given, stale, fused) == (["l.0.qkv_proj.weight"], [])


def failing(when: str, thread: EngineThread) -> EngineHandle:
    """An engine that dies, or hangs, at a message."""

    def call(method: str, *arguments: Any) -> Future[Any]:
        phase = arguments[1]["phase"] if method == "receive" else method
        future: Future[Any] = Future()
        if when == "hang":
            return future
        if phase == when:
            future.set_exception(ConnectionError("the actor died"))
            return future
        return thread.call(method, *arguments)

    return EngineHandle(f"failing-{when}", call)


@pytest.mark.parametrize("when", ["pause", "start", "chunk", "finish", "hang"])
def test_an_engine_that_fails_is_left_out(when: str, folder: Path, threads: list[EngineThread], tmp_path: Path) -> None:
    model = policy(folder, 3)
    report = sender("disk", tmp_path, deadline_s=0.5).push(model, "1.1", [failing(when, threads[1]), *handles(threads[:1])])
    assert list(report.lost) == [f"failing-{when}"] and report.verified
    assert torch.equal(held(threads[0])["model.norm.weight"], model.get_parameter("model.norm.weight"))
    assert threads[0].engine._going.is_set()
    threads[1].engine._receiving = False  # a process would be ended; the next test takes it for another one


def test_a_broken_group_ends_the_push_in_time(folder: Path, threads: list[EngineThread], tmp_path: Path) -> None:
    push = sender("gloo", tmp_path, deadline_s=1.5)
    began = time.monotonic()
    with pytest.raises(InfrastructureError, match="failing-start: ConnectionError"):
        push.push(policy(folder, 3), "1.1", [failing("start", threads[1]), *handles(threads[:1])])
    assert time.monotonic() - began < 8
    report = push.push(policy(folder, 3), "2.1", [failing("pause", threads[1]), *handles(threads[:1], life=1)])
    assert report.verified and list(report.lost) == ["failing-pause"]  # found dead before the group was made


def test_an_engine_in_which_a_push_broke_off_serves_no_version_and_is_never_pushed_to_again(folder: Path, tmp_path: Path) -> None:
    """As after the death of the trainer in the middle of it, when nobody is left who knows."""
    thread, model = EngineThread(EngineOptions(folder, "local", "float32", context=64)), policy(folder, 3)
    assert thread.call("version").result() == "0.0"
    seen: list[str] = []

    def watched(method: str, *arguments: Any) -> Future[Any]:
        seen.append(thread.call("version").result())
        return thread.call(method, *arguments)

    sender("disk", tmp_path).push(model, "1.1", [EngineHandle("watched", watched)])
    assert set(seen) == {"0.0", "", "1.1"} and sorted(seen, key=["0.0", "", "1.1"].index) == seen
    sender("disk", tmp_path, deadline_s=0.5).push(model, "1.2", [failing("finish", thread)])
    assert thread.call("version").result() == ""
    for transport in ("disk", "gloo"):
        report = sender(transport, tmp_path, deadline_s=5).push(model, "2.1", handles([thread], life=1))
        assert "an earlier push to it broke off, so what it holds is undefined" in report.lost["engine-0-1"]
    assert thread.call("version").result() == "" and not thread.engine._going.is_set()
    thread.close()


STACKS = ("experts.gate_up_proj", "experts.down_proj")


def test_experts_travel_one_by_one_with_their_adapters_merged(tmp_path: Path) -> None:
    """Under the names of checkpoint files, which every engine knows; peft's own merge of the stack is the reference."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    folder = write_model("qwen3_moe", tmp_path / "moe")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = {name: parameter.clone() for name, parameter in model.named_parameters()}
    adapt(model, Adapter(type="lora", r=4, targets=("q_proj",), target_parameters=STACKS), 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    thread = EngineThread(EngineOptions(folder, "local", "float32", context=64))
    assert sender("disk", tmp_path).push(model, "1.1", handles([thread])).verified
    got = held(thread)
    thread.close()

    with safe_open(folder / "model.safetensors", "pt") as file:
        sent = {weight.name: weight for weight in full_weights(model, torch.float32)}
        assert sent.keys() == set(file.keys())
        assert all(weight.shape == tuple(file.get_slice(name).get_shape()) for name, weight in sent.items())
    for layer in (1, 2):
        wrapper = model.model.layers[layer].mlp.experts
        while hasattr(wrapper, "parameter_name"):
            name = f"model.layers.{layer}.mlp.experts.{wrapper.parameter_name}"
            expected = plain[name] + wrapper.get_delta_weight("default")
            torch.testing.assert_close(got[name], expected)
            assert (expected - plain[name]).abs().max() > 0.1
            wrapper = wrapper.base_layer
    assert torch.equal(got["model.layers.0.mlp.gate_proj.weight"], plain["model.layers.0.mlp.gate_proj.weight"])


def test_a_base_in_4_bits_is_sent_as_it_computes(folder: Path, threads: list[EngineThread], tmp_path: Path) -> None:
    from rayft.models import nf4

    model: Any = policy(folder, 2)
    dense = {name: parameter.clone() for name, parameter in model.named_parameters()}
    names = nf4.choose(model, model.model.layers, ("o_proj",))
    nf4.replace(model, names)
    for name, layer in nf4.quantised(model):
        layer.to_empty(device="cpu").fill(dense[f"{name}.weight"], lambda whole, own: whole.data.copy_(own))
    adapt(model, Adapter(type="lora", r=4, targets=("q_proj",)), 0)
    model.model.layers[1].self_attn.q_proj.lora_B["default"].weight.data.normal_()
    assert sender("gloo", tmp_path).push(model, "1.1", handles(threads[:1])).verified
    got, adapted = held(threads[0]), model.model.layers[1].self_attn.q_proj
    assert len(names) == 3 * 5 and got.keys() == dense.keys()
    for name, value in dense.items():
        if name.removesuffix(".weight") not in names:
            assert torch.equal(got[name], value), name
        elif "q_proj" not in name:
            assert 0 < (got[name] - value).abs().max() < 0.15 * value.abs().max(), name
    x = torch.randn(7, 64)
    torch.testing.assert_close(x @ got["model.layers.1.self_attn.q_proj.weight"].T, adapted(x), atol=1e-5, rtol=1e-5)


def test_fused_experts_are_held_to_all_of_their_parts() -> None:
    """As vLLM holds them: gate and up of all experts in one parameter, in an order of its own."""
    own = {(expert, part): torch.randn(4, 3) for expert in range(3) for part in ("gate_proj", "up_proj", "down_proj")}
    given = {f"m.0.mlp.experts.{expert}.{part}.weight": int(bit_sum(tensor)) for (expert, part), tensor in own.items()}
    fused = torch.stack([torch.cat([own[expert, "up_proj"], own[expert, "gate_proj"]]) for expert in (2, 0, 1)])
    down = torch.stack([own[expert, "down_proj"] for expert in range(3)])
    for middle in ("", "routed_experts."):
        parameters = {f"m.0.mlp.experts.{middle}w13_weight": fused, f"m.0.mlp.experts.{middle}w2_weight": down}
        assert loaded_flaws(given, parameters) == ([], [])
        changed = {name: value.clone() for name, value in parameters.items()}
        changed[f"m.0.mlp.experts.{middle}w2_weight"][1, 0, 0] += 1
        assert loaded_flaws(given, changed) == ([f"m.0.mlp.experts.{middle}w2_weight"], [])


def test_what_an_engine_holds_in_more_bits_is_compared_all_the_same() -> None:
    sent = torch.randn(5, 7).bfloat16()
    given, held = {"gate.weight": int(bit_sum(sent))}, sent.float()
    assert loaded_flaws(given, {"gate.weight": held}) == ([], [])
    held[2, 3] += 1e-3
    assert loaded_flaws(given, {"gate.weight": held}) == (["gate.weight"], [])
