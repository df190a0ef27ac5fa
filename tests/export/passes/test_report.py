"""What passes say at debug level: what was rewritten, what was declined, and why."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from herdgraph.export.passes import JoinMatMuls, QuantizeMatMuls
from herdgraph.export.passes.report import SHOWN
from herdgraph.model.quantization.formats import ChannelFormat
from herdgraph.model.quantization.recipes import Recipe, Rule
from support import graphs

MODEL = """
g (float[1, 8] x, float[8, 4] left, float[8, 4] right, float[4, 4] last)
    => (float[1, 4] a, float[1, 4] b, float[1, 4] c) {
    [q] a = MatMul (x, left)
    [k] b = MatMul (x, right)
    [o] c = MatMul (a, last)
}
"""
WEIGHTS = {"left": np.ones((8, 4), np.float32), "right": np.ones((8, 4), np.float32),
           "last": np.ones((4, 4), np.float32)}


def test_rewritten_and_declined_nodes_are_named(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="herdgraph")
    JoinMatMuls()(graphs.parse(MODEL, **WEIGHTS))
    assert "JoinMatMuls rewrote 2: q, k" in caplog.messages
    assert "JoinMatMuls declined 1, no other product reads its input: o" in caplog.messages
    caplog.clear()
    QuantizeMatMuls(Recipe("r", "r", (Rule("last", None), Rule("*", ChannelFormat()))))(graphs.parse(MODEL, **WEIGHTS))
    assert "QuantizeMatMuls rewrote 2: q, k" in caplog.messages
    assert "QuantizeMatMuls declined 1, the recipe keeps floats: o" in caplog.messages


def test_long_lists_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    products = "\n".join(f"    [n{index}] y{index} = MatMul (x, w{index})" for index in range(SHOWN + 3))
    outputs = ", ".join(f"float[1, 2] y{index}" for index in range(SHOWN + 3))
    weights = ", ".join(f"float[2, 2] w{index}" for index in range(SHOWN + 3))
    text = f"g (float[1, 2] x, {weights}) => ({outputs}) {{\n{products}\n}}"
    caplog.set_level(logging.DEBUG, logger="herdgraph")
    QuantizeMatMuls(Recipe("r", "r", (Rule("*", ChannelFormat()),)))(
        graphs.parse(text, **{f"w{index}": np.ones((2, 2), np.float32) for index in range(SHOWN + 3)}))
    assert f"n{SHOWN - 1} and 3 more" in caplog.text
    assert f"n{SHOWN}," not in caplog.text


def test_nothing_is_said_by_default(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    JoinMatMuls()(graphs.parse(MODEL, **WEIGHTS))
    assert caplog.messages == []
