"""What a calibration's report says and draws, on descriptions made by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from herdgraph.calibration import plots
from herdgraph.calibration.evaluate import _quality, _row_sums
from herdgraph.calibration.report import _magnitudes, change


@pytest.mark.parametrize(("found", "noise", "text"), [
    (-0.0121, 0.01, "-1.21% ± 2.00%, noise"), (0.03, 0.01, "+3.00% ± 2.00%"), (-0.03, 0.01, "-3.00% ± 2.00%"),
])
def test_a_change_smaller_than_its_noise_is_called_noise(found: float, noise: float, text: str) -> None:
    assert change({"change": found, "noise": noise}) == text


def test_noise_is_the_standard_error_of_the_change() -> None:
    exact, found = torch.randn(2, 500, 11, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    targets = torch.arange(500) % 11
    targets[::5] = -1
    counted = targets >= 0
    differences = (exact - found)[counted, targets[counted]].double()
    quality = _quality(_row_sums(exact, found, targets), 500, 400)
    assert quality.change == pytest.approx(float(differences.mean().exp()) - 1)
    assert quality.noise == pytest.approx(float(differences.std(correction=0)) / 20)


def test_lines_stand_at_their_layers_and_shared_inputs_are_one() -> None:
    def row(amax: float) -> dict[str, Any]:
        return {"amax": {"mse": [1.0, amax]}}

    inputs = {f"layers.{layer}.self_attn.{part}_proj.weight": row(2.0 + layer) for layer in (0, 1) for part in "qkv"}
    inputs |= {"layers.1.feed_forward.experts.down_proj": row(9.0),
               "vision_model.model.layers.1.mlp.fc1.weight": row(4), "multi_modal_projector.linear_1.weight": row(7)}
    assert _magnitudes({"observer": "mse", "inputs": inputs}) == {
        "the decoder's": {"self_attn.q_proj, k_proj, v_proj": {0: 2.0, 1: 3.0}, "experts.down_proj": {1: 9.0}},
        "the image tower's": {"mlp.fc1": {1: 4.0}},
    }


def test_ticks_are_whole_layers_and_plain_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plots, "_png", lambda figure: drawn.append(figure) or b"")
    plots.lines({"a": {0: 4.0, 1: 9.0, 2: 5.0}, "b": {0: 4.1, 1: 6.0, 2: 5.01}}, title="", x="layer", y="", log=True)
    axes = drawn[0].axes[0]
    drawn[0].canvas.draw()
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert {label.get_text() for label in axes.get_yticklabels()} >= {"5", "6", "7"}
    low, high = sorted(text.xyann[1] for text in axes.texts)
    assert high - low >= 0.99 * plots.LABEL_GAP, "names do not meet"


def test_cells_have_their_numbers_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plots, "_png", lambda figure: drawn.append(figure) or b"")
    for values in (np.array([[0, 12], [5120, 999]]), np.ones((2, 40), int)):
        labels = [str(column) for column in range(values.shape[1])]
        plots.heat_map(values, title="", x="layer", y="expert", labels=labels, note="")
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["0", "12", "5.1k", "999"]
    assert not drawn[1].axes[0].texts
