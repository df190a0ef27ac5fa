"""A hundred damaged inputs of every kind in each run; `make fuzz` goes on for an hour with other seeds."""

from __future__ import annotations

from pathlib import Path

from fuzz.harness import BAD, Tally, run_cases

CASES = 100


def test_damaged_inputs_are_refused_or_sound(tmp_path: Path) -> None:
    tally = run_cases("mixed", tmp_path, 0, CASES)
    assert tally.findings == []
    assert sum(tally.counts.values()) == CASES
    assert min(tally.counts["refused"], tally.counts["accepted"]) > CASES // 10


def test_the_harness_sees_what_goes_wrong(tmp_path: Path) -> None:
    """A worker that cannot begin counts as a crash, and what is bad is kept with its words."""
    (tmp_path / "images").touch()  # where the folder of the sound inputs should be
    assert run_cases("images", tmp_path, 0, 1).counts == {"crash": 1}
    tally = Tally()
    for seed, outcome in enumerate(BAD):
        tally.add("x", seed, outcome, "told")
    assert len(tally.findings) == len(BAD)
