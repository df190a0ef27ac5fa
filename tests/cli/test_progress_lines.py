"""Where there is no terminal, work that lasts is told in lines, ever fewer of them."""

from __future__ import annotations

import time

import pytest

from herdgraph.console import duration, progress
from herdgraph.progress_lines import PATIENCE, ProgressLines


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_line_when_patience_ends(clock: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    with progress() as bar:
        assert isinstance(bar, ProgressLines), "standard error is no terminal here"
        task = bar.add_task("writing\x1b[31m weights", total=200)
        bar.advance(task, 10)
        assert capfd.readouterr() == ("", ""), "what is soon done is not told"
        clock[0] += PATIENCE
        bar.update(task, completed=50)
        out, err = capfd.readouterr()
        assert not out
        assert err == "writing\\x1b[31m weights: 25 %, about 60 s left\n"
        bar.advance(task)
        clock[0] += PATIENCE / 2
        bar.advance(task)
    assert capfd.readouterr() == ("", "")


def test_what_has_no_end_and_what_is_complete(clock: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    with progress() as bar:
        task = bar.add_task("reading", total=None)
        clock[0] += PATIENCE
        bar.advance(task)
        bar.reset(task, description="layers", total=2)
        clock[0] += PATIENCE
        bar.update(task, completed=3)
    assert capfd.readouterr().err == "reading\nlayers: 100 %, about 0 s left\n"


def test_an_hour_has_few_lines(clock: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    with progress() as bar:
        task = bar.add_task("training", total=3600)
        for _ in range(3600):
            clock[0] += 1
            bar.advance(task)
    assert 20 < len(capfd.readouterr().err.splitlines()) < 50


def test_quiet_is_quiet(clock: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    with progress(quiet=True) as bar:
        task = bar.add_task("reading", total=10)
        clock[0] += 10 * PATIENCE
        bar.advance(task)
    assert capfd.readouterr() == ("", "")


def test_durations() -> None:
    assert [duration(seconds) for seconds in (4.4, 99, 150, 7200)] == ["4 s", "99 s", "2 min", "2.0 h"]
