"""What rank 0 writes down of an online run: metrics.jsonl, trackers, and answers as text in samples.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping

from rayft.config.schema import GrpoRun
from rayft.experience.orders import Order
from rayft.models.tokenizer import load_tokenizer
from rayft.observe.log import MetricsLog, read
from rayft.observe.trackers import TrackerLog
from rayft.train.journal import cut_back
from rayft.types import Group, Launch, Session


class ExperienceLog:
    """The records of one run, cut back to the restored step. On other ranks than 0 it writes nothing.

    Args:
        launch: the run.
        session: of this rank.
        step: steps done so far.
    """

    def __init__(self, launch: Launch[GrpoRun], session: Session, step: int) -> None:
        cfg = launch.cfg
        self._writes, self._samples, self._count = session.rank == 0, session.run_dir / "samples.jsonl", cfg.rollout.samples
        if self._writes:
            path = session.run_dir / "metrics.jsonl"
            self._metrics = MetricsLog(path, step)
            records, facts = read(path), cfg.model_dump(mode="json")
            self._evaluated = {record["step"] for record in records if "eval/reward" in record}
            self._trackers = TrackerLog(cfg.trackers, session.run_dir, cfg.run.name, facts, self._metrics.reached, records)
            self._metrics.start(launch.attempt, session.world_size)
            cut_back(self._samples, step)
            self._tokenizer = load_tokenizer(cfg.model)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A record of metrics; an evaluation that a resumed run makes again is not."""
        if not self._writes or ("eval/reward" in values and step in self._evaluated):
            return
        if "eval/reward" in values:
            self._evaluated.add(step)
        self._metrics.write(step, values)
        self._trackers.log(step, values)

    def add_samples(self, step: int, order: Order, groups: Mapping[int, Group]) -> None:
        """Answers of the step's first groups, with rewards and the versions that wrote them."""
        chosen = [(number, place) for number, group in groups.items() for place in range(len(group.trajectories))][: self._count]
        if not self._writes or not chosen:
            return
        with self._samples.open("a") as file:
            for number, place in chosen:
                group, scored = groups[number], order.scores[number]
                trajectory = group.trajectories[place]
                line = {
                    "step": step,
                    "key": scored.key,
                    "prompt": self._tokenizer.decode(list(group.prompt.tokens)),
                    "answer": self._tokenizer.decode(list(trajectory.tokens)),
                    "reward": scored.total[place],
                    "rewards": {name: values[place] for name, values in scored.rewards.items()},
                    "finish_reason": trajectory.finish_reason,
                    "versions": trajectory.versions,
                }
                file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Finish what is on its way."""
        if self._writes:
            self._metrics.close()
            self._trackers.close()
