"""Scores of reward models: in batches, as plain transformers gives them for each chat alone."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError

from rayft.config.environment import Credentials
from rayft.config.load import load
from rayft.config.schema import GrpoRun, RewardModel
from rayft.errors import ConfigError, DataError, InfrastructureError, RayftError, ResourceError
from rayft.models.scoring import ChatScorer
from tiny import tiny_tokenizer

CHATS = [
    [{"role": "user", "content": "What is the sum?"}, {"role": "assistant", "content": text}]
    for text in ("four", "It is four, she said, and the other one agreed.", "no", "the question again " * 9, "")
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier of two outputs that names its padding token, one that names none, and a causal model."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    root, made = tmp_path_factory.mktemp("models"), {}
    sizes: dict[str, Any] = {
        "vocab_size": 700, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_labels": 2,
    }  # fmt: skip
    for name, kind, pad in (
        ("padded", LlamaForSequenceClassification, 0),
        ("plain", LlamaForSequenceClassification, None),
        ("causal", LlamaForCausalLM, None),
    ):
        torch.manual_seed(1)
        made[name] = tiny_tokenizer(root / name)
        kind(LlamaConfig(**sizes, pad_token_id=pad)).save_pretrained(made[name])
    return made


@pytest.mark.parametrize(("name", "label"), [("padded", 0), ("plain", 1)])
def test_a_classifier_scores_a_chat_as_if_it_were_alone(folders: dict[str, Path], name: str, label: int) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folders[name]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    with torch.no_grad():
        ids = [tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")["input_ids"] for chat in CHATS]
        expected = [float(model(row).logits[0, label]) for row in ids]
    found = ChatScorer(RewardModel(path=str(folders[name]), label=label, batch=2), "cpu").score(CHATS)
    assert found == pytest.approx(expected, abs=1e-5) and len({round(value, 4) for value in expected}) == len(CHATS)


def test_a_causal_model_gives_the_probability_of_its_first_word(folders: dict[str, Path]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folders["causal"]).eval(), AutoTokenizer.from_pretrained(folders["causal"])
    (token,) = tokenizer.encode("e", add_special_tokens=False)
    with torch.no_grad():
        ids = [
            tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt", add_generation_prompt=True)["input_ids"]
            for chat in CHATS
        ]
        expected = [float(model(row).logits[0, -1].softmax(-1)[token]) for row in ids]
    found = ChatScorer(RewardModel(path=str(folders["causal"]), token="e", batch=3), "cpu").score(CHATS)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "fields", "sentence"),
    [
        ("causal", {}, "lacks weights of a SequenceClassification model: score.weight. Name a sequence classifier, or set token"),
        ("plain", {"label": 2}, "model.label = 2: is not one of the model's 2 outputs"),
        ("causal", {"token": "four apples"}, "model.token = 'four apples': must be one token, but encodes to"),
    ],
)
def test_a_model_that_cannot_score_is_refused(folders: dict[str, Path], name: str, fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        ChatScorer(RewardModel(path=str(folders[name]), **fields), "cpu")


def test_a_chat_that_is_too_long_is_an_error_and_never_cut(folders: dict[str, Path]) -> None:
    scorer = ChatScorer(RewardModel(path=str(folders["plain"]), max_tokens=30), "cpu")
    assert len(scorer.score(CHATS[:1])) == 1
    with pytest.raises(DataError, match=r"model.max_tokens = 30: is shorter than a chat of \d+ tokens"):
        scorer.score(CHATS)


@pytest.mark.parametrize(
    ("overrides", "device", "resources", "sentence"),
    [
        (["model.gpus=0", "model.replicas=2"], "cpu", {"CPU": 4.0}, ""),
        (["model.gpus=0", "model.replicas=3"], "cpu", {"CPU": 4.0}, "model.replicas = 3: brings the run to 5 CPUs, the cluster has 4. Use"),
        (["model.gpus=0.5", "model.replicas=2"], "cuda", {"GPU": 3.0}, ""),
        (
            ["model.gpus=0.5", "model.replicas=3"],
            "cuda",
            {"GPU": 3.0},
            "model.gpus = 0.5: brings the run to 3.5 GPUs, the cluster has 3. Use",
        ),
        (["model.batch=2"], "cpu", {"CPU": 4.0}, "model.gpus = 1.0: brings the run to 1 GPUs, the cluster has 0. Use a smaller share or"),
    ],
)
def test_models_that_never_fit_are_refused(overrides: list[str], device: str, resources: dict[str, float], sentence: str) -> None:
    from rayft.actors.reward_model import check_room

    base = ["method=grpo", "run.name=a", "model.path=m", "data.train.a.path=x", "reward.functions.r.model.path=m"]
    cfg = load([], [*base, *(f"reward.functions.r.{one}" for one in overrides)])
    assert isinstance(cfg, GrpoRun)
    if not sentence:
        return check_room(cfg, device, resources)
    with pytest.raises(ResourceError, match=re.escape(f"reward.functions.r.{sentence}")):
        check_room(cfg, device, resources)


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        (ActorDiedError(), r"reward model = 'r': died while it was loaded \(ActorDiedError\)"),
        (GetTimeoutError(), "rollout.start_s = 600.0: reward models were not loaded within 600 s"),
        (RayTaskError("start", "", ConfigError("model", None, "is none", "Name one")), "model: is none"),
    ],
)
def test_a_model_that_does_not_come_up_ends_the_run_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, problem: Exception, sentence: str
) -> None:
    from rayft.actors import reward_model

    def never(*_: Any, **__: Any) -> None:
        raise problem

    actor = MagicMock()
    killed: list[Any] = []
    for name, stand_in in (("remote", actor), ("get", never), ("kill", killed.append), ("cluster_resources", lambda: {"CPU": 4.0})):
        monkeypatch.setattr(reward_model.ray, name, stand_in)
    base = ["method=grpo", "run.name=a", "model.path=m", "data.train.a.path=x", "reward.functions.r.model.path=m"]
    cfg = load([], [*base, "reward.functions.r.model.gpus=0"])
    assert isinstance(cfg, GrpoRun)
    with pytest.raises(RayftError, match=sentence), reward_model.open_models(cfg, "d", "cpu", {}, Credentials({}, {})):
        pass
    assert len(killed) == 1


class Replica:
    """An actor that loads its model for `load_s` after each restart, and then scores, or is stuck."""

    def __init__(self, load_s: float = 0.0, loaded: bool = True, stuck: bool = False) -> None:
        self.load_s, self.loaded, self.stuck = load_s, loaded, stuck
        self.killed = self.asked = 0
        self.start, self.score = MagicMock(), MagicMock()
        self.start.remote, self.score.remote = self._start, self._score

    async def _start(self) -> None:
        lives = self.killed
        if not self.loaded:
            await asyncio.sleep(self.load_s)
        if self.killed != lives:
            raise ActorUnavailableError("killed", None)
        self.loaded = True

    async def _score(self, chats: list[Any]) -> list[float] | None:
        self.asked += 1
        if self.loaded and self.stuck:
            await asyncio.sleep(60.0)
        return [1.0] * len(chats) if self.loaded else None

    def kill(self) -> None:
        self.killed, self.loaded, self.stuck = self.killed + 1, False, False


def replicas_of(monkeypatch: pytest.MonkeyPatch, deadline_s: float, start_s: float, **replicas: Replica) -> Any:
    from rayft.actors import reward_model

    monkeypatch.setattr(reward_model.ray, "get_actor", replicas.__getitem__)
    monkeypatch.setattr(reward_model.ray, "kill", lambda one, no_restart: one.kill())
    monkeypatch.setattr(reward_model, "AGAIN_S", 0.01)
    return reward_model.Replicas(tuple(replicas), deadline_s / reward_model.SHARE, start_s)


def test_a_replica_that_loads_is_not_ended_at_the_deadline_of_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Replica(load_s=0.5, loaded=False)

    async def run() -> None:
        replicas = replicas_of(monkeypatch, 0.1, 30.0, slow=slow)
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(InfrastructureError, match=r"has not scored 2 chats within 0\.1 s"):
                await replicas(CHATS[:2])
            assert time.monotonic() - began < 0.3
        await replicas.loaded()
        assert await replicas(CHATS[:2]) == [1.0, 1.0]

    asyncio.run(run())
    assert slow.killed == 0


def test_a_replica_that_loads_gets_no_questions_while_another_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, there = Replica(load_s=0.2, loaded=False), Replica()

    async def run() -> None:
        replicas = replicas_of(monkeypatch, 5.0, 30.0, slow=slow, there=there)
        for _ in range(5):
            assert await replicas(CHATS[:1]) == [1.0]
        await replicas.loaded()
        assert (slow.asked, there.asked) == (1, 5)
        while slow.asked == 1:
            await replicas(CHATS[:1])
            await asyncio.sleep(0.01)

    asyncio.run(run())


def test_only_a_loaded_replica_that_is_stuck_and_one_that_never_loads_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, endless = Replica(stuck=True), Replica(load_s=60.0, loaded=False)

    async def run() -> None:
        replicas = replicas_of(monkeypatch, 0.1, 0.2, stuck=stuck)
        with pytest.raises(InfrastructureError):
            await replicas(CHATS[:1])
        await replicas.loaded()
        assert stuck.killed == 1 and await replicas(CHATS[:1]) == [1.0]
        with pytest.raises(InfrastructureError):
            await (never := replicas_of(monkeypatch, 0.1, 0.2, endless=endless))(CHATS[:1])
        await asyncio.sleep(0.3)
        assert endless.killed == 1
        endless.load_s = 0.0
        await never.loaded()
        assert await never(CHATS[:1]) == [1.0]

    asyncio.run(run())
