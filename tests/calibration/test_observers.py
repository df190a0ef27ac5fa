"""Histograms of magnitudes, and the largest magnitudes that observers read off them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from herdgraph.calibration import histogram as histograms
from herdgraph.calibration.histogram import BINS, Histogram, bin_centers, bins_of, edges
from herdgraph.calibration.observers import ESTIMATORS
from herdgraph.calibration.recording import CalibrationObserver, without_zeros
from herdgraph.errors import HerdError
from herdgraph.model.checkpoint.rotated import head_rotation
from herdgraph.model.config.presets import TINY
from herdgraph.model.quantization.e4m3 import E4M3_MAX, to_e4m3
from herdgraph.model.quantization.observers import OBSERVERS

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def histogram_of(*parts: torch.Tensor) -> Histogram:
    found = Histogram()
    for part in parts:
        found.add(part)
    return found


def heavy(seed: int, shape: tuple[int, ...] = (64, 32)) -> torch.Tensor:
    """Values like those of a language model: most are small, a few are a thousand times larger."""
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.randn(shape, generator=generator).mul(2).exp()
    return torch.randn(shape, generator=generator) * magnitude * 10.0 ** (seed % 7 - 3)


def mean_square_error(x: torch.Tensor, amax: float) -> float:
    scale = amax / E4M3_MAX
    return float((to_e4m3(x / scale).float() * scale - x).double().square().mean())


@given(st.lists(FLOATS, min_size=1, max_size=60), st.data())
def test_any_order_and_any_split_count_the_same(values: list[float], data: st.DataObject) -> None:
    x = torch.tensor(values)
    order = torch.tensor(data.draw(st.permutations(range(len(x)))))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(x)), max_size=4)))
    whole, parts = histogram_of(x[:, None]), histogram_of(*x[order][:, None].tensor_split(cuts))
    assert torch.equal(whole.counts, parts.counts)
    assert (whole.zeros, whole.amax, whole.rows) == (parts.zeros, parts.amax, parts.rows)
    assert whole.amax == max(map(abs, x.tolist())), "exactly"
    assert (whole.zeros, whole.total, whole.rows) == (values.count(0), len(values), len(values))


def test_values_are_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = heavy(3)
    x[::5] = 0
    whole = histogram_of(x)
    monkeypatch.setattr(histograms, "_PIECE", 100)
    pieces = histogram_of(x)
    assert torch.equal(whole.counts, pieces.counts)
    assert (whole.zeros, whole.amax, whole.rows) == (pieces.zeros, pieces.amax, pieces.rows)
    assert (whole.zeros, whole.rows) == (13 * 32, 64)


@given(st.floats(2.0**-48, 2.0**31, width=32), st.booleans())
def test_a_bin_contains_its_values(value: float, negative: bool) -> None:
    index = int(bins_of(torch.tensor([-value if negative else value])))
    low, high = edges()[index : index + 2].tolist()
    assert low <= value < high
    assert high <= low * (1 + 1 / 64)
    assert low < float(bin_centers()[index]) < high


def test_what_lies_outside_of_all_bins_counts_to_the_ends() -> None:
    found = histogram_of(torch.tensor([[1e-30, 2.0**-48, 2.0**32, 3e38]]))
    assert found.counts[[0, -1]].tolist() == [2, 2]
    assert found.amax == float(torch.tensor(3e38))
    assert len(edges()) == BINS + 1


def test_share_beyond() -> None:
    found = histogram_of(torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 4.0, 8.0]]))
    assert [found.share_beyond(amax) for amax in (8.1, 8.0, 3.0, 1.5, 0.5)] == [0, 1 / 8, 2 / 8, 3 / 8, 6 / 8]
    assert Histogram().share_beyond(1.0) == 0


@pytest.mark.parametrize("seed", range(14))
def test_observers_stay_within_what_was_seen(seed: int) -> None:
    x = heavy(seed)
    found = {name: choose(histogram_of(x)) for name, choose in ESTIMATORS.items()}
    amax = float(x.abs().max())
    assert found["max"] == amax
    assert all(0 < value <= amax for value in found.values()), found
    errors = {name: mean_square_error(x, value) for name, value in found.items()}
    assert errors["mse"] <= errors["max"] * 1.001


@pytest.mark.parametrize("seed", range(7))
def test_mse_is_the_best_candidate_on_its_histogram(seed: int) -> None:
    found = histogram_of(heavy(seed))
    values = bin_centers().clamp(max=found.amax).repeat_interleave(found.counts)
    best = mean_square_error(values, ESTIMATORS["mse"](found))
    candidates = [found.amax * 2 ** (-step / 8) for step in range(41)]
    assert best == min(mean_square_error(values, amax) for amax in candidates)
    assert best <= mean_square_error(values, ESTIMATORS["max"](found))


def test_mse_clips_where_it_pays() -> None:
    """Most values lie half-way between two steps of the largest value's scale, and on a step of a smaller one's."""
    smaller = 2 ** (-1 / 8)
    x = torch.cat((torch.full((1000,), smaller / 2), torch.ones(1)))
    chosen = ESTIMATORS["mse"](histogram_of(x[:, None]))
    assert chosen == pytest.approx(smaller)
    assert mean_square_error(x, chosen) < 0.5 * mean_square_error(x, 1.0)


def test_the_percentile_leaves_one_in_a_hundred_thousand() -> None:
    x = torch.cat((torch.linspace(0.5, 1, 199_999), torch.tensor([100.0])))
    value = ESTIMATORS["percentile"](histogram_of(x[:, None]))
    assert 1 <= value < 1.02
    few = histogram_of(x[-1000:, None])
    assert ESTIMATORS["percentile"](few) == 100, "one of a thousand is not one of a hundred thousand"


def test_zeros_do_not_decide() -> None:
    """Any scale represents a zero: an input that is nearly always zero has the percentile of its other values."""
    x = torch.zeros(400_000)
    x[7] = 3.0
    assert {name: choose(histogram_of(x[:, None])) for name, choose in ESTIMATORS.items()}["percentile"] == 3.0


EMPTY = {"zeros": torch.zeros(3, 4), "none": torch.empty(0, 4), "tiny": torch.full((2, 2), 1e-44)}


@pytest.mark.parametrize("x", EMPTY.values(), ids=EMPTY)
def test_an_input_without_magnitude_can_be_divided_by(x: torch.Tensor) -> None:
    found = torch.tensor([choose(histogram_of(x)) for choose in ESTIMATORS.values()])
    assert torch.equal(without_zeros(found), torch.ones(len(ESTIMATORS)))
    assert without_zeros(torch.tensor([0.0, 3.0, 2.0])).tolist() == [3, 3, 2]


def test_files_know_the_observers() -> None:
    assert tuple(ESTIMATORS) == OBSERVERS


def test_weights_that_meet_one_input_share_its_statistics() -> None:
    observed, x = CalibrationObserver(TINY.text), heavy(5)
    names = [f"layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    for name in names:
        observed(name, x, torch.zeros(32, 4))
    observed("layers.0.self_attn.o_proj.weight", x * 2, torch.zeros(32, 4))
    found = observed.amaxes()
    assert len({float(found[f"mse/{name}"]) for name in names}) == 1
    for name in names:
        torch.testing.assert_close(found[f"input_energy/{name}"], x.square().mean(0))
    assert found[f"max/{names[2]}"] == x.abs().max()
    assert found["max/layers.0.self_attn.o_proj.weight"] == x.abs().max() * 2
    assert observed.histograms[names[0]][0].rows == len(x), "counted once"


def test_a_single_expert_is_still_one_of_a_list() -> None:
    observed, x = CalibrationObserver(replace(TINY.text, num_experts=1)), heavy(5)
    observed("layers.1.feed_forward.experts.down_proj", x, torch.zeros(32, 4), 0)
    assert observed.amaxes()["max/layers.1.feed_forward.experts.down_proj"].tolist() == [x.abs().max()]


def test_energies_are_those_of_all_experts_of_a_layer() -> None:
    observed, x, name = CalibrationObserver(TINY.text), heavy(5), "layers.1.feed_forward.experts.down_proj"
    observed(name, x, torch.zeros(32, 4), 0)
    observed(name, 3 * x[:2], torch.zeros(32, 4), 1)
    wanted = torch.cat((x, 3 * x[:2])).square().mean(0)
    torch.testing.assert_close(observed.amaxes()[f"input_energy/{name}"], wanted)


def test_values_are_measured_in_the_basis_of_rotated_recipes_too() -> None:
    """What stands out in a channel is spread over its head, so the largest magnitude is another."""
    observed, width = CalibrationObserver(TINY.text), TINY.text.head_dim
    keys, values = heavy(0)[:, :32], torch.zeros(5, 32)
    values[:, 3] = 40.0
    observed.cached("layers.0.self_attn", keys, values)
    found = observed.amaxes()
    assert found["max/layers.0.self_attn.kv_amax"].tolist() == [keys.abs().max(), 40.0]
    rotated = values.unflatten(-1, (-1, width)) @ head_rotation(width)
    assert found["max/layers.0.self_attn.rotated_value_amax"] == rotated.abs().max() == pytest.approx(10.0)


@pytest.mark.parametrize(("value", "kind"), [(torch.nan, "a NaN"), (torch.inf, "an infinity")])
def test_what_is_not_finite_is_named(value: float, kind: str) -> None:
    x = heavy(0)
    x[3, 3] = value
    name = "layers.1.feed_forward.experts.down_proj"
    with pytest.raises(HerdError, match=f"the input of {name}, expert 1, holds {kind} at "):
        CalibrationObserver(TINY.text)(name, x, torch.zeros(32, 4), 1)
