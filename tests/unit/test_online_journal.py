"""The controller's journal: what a restarted controller and a new command make of what is on disk."""

from __future__ import annotations

from pathlib import Path

from rayft.actors.journal import Journal
from rayft.experience.admission import Limits

LIMITS = Limits(groups=2, staleness=1, steps=9, restarts=1, rescores=1)


def begun(path: Path) -> Journal:
    """A journal in which attempt 1 has trained step 0 on groups 0 and 1; group 2 is ready and group 3 under way."""
    journal = Journal(path, LIMITS, "first", 0)
    journal.joined(1)
    journal.serves("1.0")
    journal.add("pushed", step=0)
    for ordinal in range(4):
        journal.add("started", ordinal=ordinal)
    for ordinal in range(3):
        journal.add("finished", ordinal=ordinal)
        journal.add("scored", ordinal=ordinal, kept=True)
    journal.add("consumed", step=0, ordinals=[0, 1])
    return journal


def test_a_restarted_controller_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    before = begun(path)
    with path.open("a") as stream:
        stream.write('{"event": "sco')  # killed while it wrote
    after = Journal(path, LIMITS, "first", 0)
    assert (after.attempt, after.serving) == (1, "1.0")
    assert after.state.batches == before.state.batches and after.state.caught_up
    assert after.state.again == [2, 3] and not after.state.accepted and not after.state.running
    assert Journal(path, LIMITS, "first", 0).state == after.state, "half a line is gone for good"


def test_a_new_command_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    begun(path)
    fresh = Journal(path, LIMITS, "second", 0)
    assert (fresh.attempt, fresh.serving, fresh.state.caught_up) == (0, "", False)
    assert fresh.state.again == [0, 1, 2, 3] and not fresh.state.batches
    begun(tmp_path / "other")
    later = Journal(tmp_path / "other", LIMITS, "second", 1)
    assert later.state.batches == {0: (0, 1)} and later.state.again == [2, 3] and later.state.version == 1


def test_a_lost_journal_takes_the_first_prompts_as_asked(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "gone", LIMITS, "first", 3)
    assert journal.state.next_ordinal == 6 and len(journal.state.batches) == 3
