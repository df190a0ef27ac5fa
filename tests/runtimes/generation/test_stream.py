"""Stop strings and streams against plain string operations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from herdgraph.errors import HerdError
from herdgraph.runtimes.generation.stop_strings import StopRule, StopStrings

TEXT = st.text("ab\n", max_size=30)


@given(TEXT, st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.lists(st.integers(1, 5), max_size=30))
def test_stop_strings_cut_where_find_would(text: str, stops: list[str], sizes: list[int]) -> None:
    """Whatever the pieces, what is shown is the text before a stop string, and no stop string is shown."""
    guard, shown, at, stopped = StopStrings(stops), "", 0, False
    for size in [*sizes, len(text)]:
        piece, stopped = guard.feed(text[at : at + size])
        shown, at = shown + piece, at + size
        if stopped:
            break
    if not stopped:
        shown += guard.flush()
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert stopped == any(stop in text for stop in stops)
    assert any(text.startswith(stop, len(shown)) for stop in stops) if stopped else shown == text


def test_text_is_only_held_while_it_may_begin_a_stop() -> None:
    guard = StopStrings(["END"])
    assert guard.feed("abcE") == ("abc", False)
    assert guard.feed("N") == ("", False)
    assert guard.feed("x") == ("ENx", False)
    assert guard.feed("EN") == ("", False)
    assert guard.flush() == "EN"


def test_wrong_rules() -> None:
    with pytest.raises(HerdError, match="max_new_tokens is 0"):
        StopRule(0)
    with pytest.raises(HerdError, match="a stop string is ''"):
        StopRule(1, strings=("",))
    for arguments, problem in (((1.5, (), ()), "max_new_tokens is 1.5"), ((1, 5, ()), "stop is 5, a list"),
                               ((1, [5], ()), "a stop string is 5"), ((1, (), 7), "stop_ids is 7, a list"),
                               ((1, (), ["a"]), "a stop id is 'a'"), ((True, (), ()), "max_new_tokens is True")):
        with pytest.raises(HerdError, match=problem):
            StopRule.of(*arguments)


def test_one_string_is_one_stop() -> None:
    """Not a stop at each of its characters."""
    assert StopRule.of(4, "xtz", [1]) == StopRule.of(4, ["xtz"], (1,)) == StopRule(4, frozenset({1}), ("xtz",))
