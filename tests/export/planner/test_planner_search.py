"""Which plan is chosen, what fits, and what it would take."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdgraph.errors import HerdError
from herdgraph.export.planner import ServingSpec, Storage, Workload, candidates, choose, least_devices, parse_fleet
from herdgraph.export.planner.devices import Device
from herdgraph.export.planner.memory import fullest_rank
from herdgraph.export.planner.report import make_report
from herdgraph.export.planner.search import usable, valid_plans
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import BEHEMOTH, MAVERICK, SCOUT, TINY
from herdgraph.model.config.shard_plan import ShardPlan
from support.configs import configs

FP8 = Storage("fp8", "bf16")


def spec(context: int = 8192, batch: int = 1, config=SCOUT, storage: Storage = FP8) -> ServingSpec:
    return ServingSpec(config, storage, Workload(context, batch))


def test_valid_plans_are_all_that_pass_the_check() -> None:
    text = TINY.text
    every = [ShardPlan(t, e, p) for t in range(1, 9) for e in range(1, 9) for p in range(1, 9) if t * e * p <= 8]
    assert set(valid_plans(TINY, 8)) == {plan for plan in every if plan.fits(text)}
    for plan in every:
        if not plan.fits(text):
            with pytest.raises(HerdError):
                plan.check(TINY)


def test_candidates_are_ordered_and_complete() -> None:
    found = candidates(spec(batch=8), parse_fleet("8xH100"))
    assert {one.plan for one in found} == set(valid_plans(SCOUT, 8))
    fitting = [one for one in found if one.fits]
    assert found[: len(fitting)] == fitting, "what does not fit comes last"
    rates = [one.decode.tokens_per_second for one in fitting]
    assert rates == sorted(rates, reverse=True)
    assert all(one.replicas == 8 // one.plan.world for one in found)


def test_equal_rates_are_told_apart_by_collectives() -> None:
    """Bytes are all that a memory-only fleet is measured by: stages in a row read what one device would."""
    found = candidates(spec(), parse_fleet("2x200GB"))
    one, staged = (next(each for each in found if each.plan == plan) for plan in (ShardPlan(), ShardPlan(pipeline=2)))
    assert one.decode.tokens_per_second == staged.decode.tokens_per_second
    assert found.index(one) < found.index(staged)


def test_large_batches_of_small_contexts_want_replicas() -> None:
    """Where weights are read anyway, fewer exchanges win; one sequence wants all devices to read for it."""
    fleet = parse_fleet("8xH200")
    assert candidates(spec(), fleet)[0].plan.world == 8
    assert candidates(spec(1024, 4096), fleet)[0].replicas > 1


@pytest.mark.parametrize(("devices", "recipe", "plan"), [
    ("1xH200", "fp8", ShardPlan()), ("8x80GB", "fp8", ShardPlan(tensor=8)), ("2x80GB", "fp8", ShardPlan(tensor=2)),
])
def test_choose(devices: str, recipe: str, plan: ShardPlan) -> None:
    assert choose(SCOUT, recipe, devices) == plan


def test_choose_refuses_what_does_not_fit() -> None:
    message = (r"nothing fits 1 x 80GB: the best plan \(tp=1,ep=1,pp=1\) needs 1[12]\d\.\d GB on a device that has "
               r"76\.0 GB to plan with; it would take 2 of them \(tp=")
    with pytest.raises(HerdError, match=message):
        choose(SCOUT, "fp8", "1x80GB")


def test_an_answer_of_how_many_holds_and_one_less_does_not() -> None:
    for asked in (spec(1 << 20, 32), spec(1 << 17, 4, MAVERICK), spec(8192, 1, BEHEMOTH)):
        fleet = parse_fleet("1xH100")
        least = least_devices(asked, fleet.device)
        assert least
        count, plan, replicas = least
        assert count == plan.world * replicas
        parts = fullest_rank(asked.config, plan, asked.storage, asked.shared_by(replicas))
        assert sum(parts.values()) <= usable(fleet.device)
        fewer = candidates(asked, replace(fleet, count=count - 1))
        assert not any(one.fits for one in fewer)


@pytest.mark.parametrize("kilobytes", [1000, 1600, 2000, 3000, 5000, 20_000])
@pytest.mark.parametrize("batch", [1, 7, 40])
def test_the_fewest_devices_are_those_of_trying_everything(kilobytes: int, batch: int) -> None:
    """Every plan with every number of replicas; at many sequences more replicas are the way to fit."""
    asked = spec(600, batch, HerdConfig(text=TINY.text))
    device = Device("x", 1000 * kilobytes)
    every = [plan.world * replicas for plan in valid_plans(asked.config, 64) for replicas in range(1, batch + 1)
             if sum(fullest_rank(asked.config, plan, FP8, asked.shared_by(replicas)).values()) <= usable(device)]
    least = least_devices(asked, device)
    assert (least[0] if least else None) == min(every, default=None)


def test_nothing_fits_whatever_the_number() -> None:
    with pytest.raises(HerdError, match="no number of them would do"):
        choose(SCOUT, "bf16", "8x1GB")


@settings(max_examples=25, deadline=None)
@given(configs(), st.integers(1, 12), st.integers(1, 6), st.integers(1, 200))
def test_more_devices_never_need_more_memory_on_a_device(config, count: int, batch: int, context: int) -> None:
    asked, fleet = spec(context, batch, config), parse_fleet("1x80GB")
    less, more = (min(one.used for one in candidates(asked, replace(fleet, count=n))) for n in (count, count + 1))
    assert more <= less


@pytest.mark.parametrize(("workload", "message"), [
    (Workload(0, 1), "context is 0"), (Workload(1, 0), "batch 0"),
    (Workload(2 << 20, 1), "a context of 2097152 tokens is beyond the model's 1048576"),
])
def test_impossible_workloads(workload: Workload, message: str) -> None:
    with pytest.raises(HerdError, match=message):
        ServingSpec(MAVERICK, FP8, workload)


@pytest.mark.parametrize(("devices", "message"), [
    ("8xH1000", "did you mean H100"), ("8xA100", "did you mean A100-40GB or A100-80GB"),
    ("8xfoo", "choose among RTX4090"), ("0xH100", "0 devices"), ("8x0GB", "holds nothing"),
    ("", "devices are empty"), ("999999xH100", "999999 devices"),
    ("2xcpu", "2 of this machine"), ("8x", "no device is called '8x'"), ("-1xH100", "no device is called '-1xH100'"),
])
def test_impossible_devices(devices: str, message: str) -> None:
    with pytest.raises(HerdError, match=message):
        parse_fleet(devices)


@pytest.mark.parametrize(("text", "count", "machine"), [
    ("H100", 1, 8), ("8xH100", 8, 8), ("16xh100", 16, 8), ("4x4xH100", 16, 4), ("72xGB200", 72, 72),
    ("2xrtx4090", 2, 8), ("3 x 80GB".replace(" ", ""), 3, 8), ("8xrtx-pro-6000", 8, 8),
])
def test_fleets(text: str, count: int, machine: int) -> None:
    fleet = parse_fleet(text)
    assert (fleet.count, fleet.per_machine) == (count, machine)
    assert fleet.inside_machines(min(count, machine))


def test_sixteen_ranks_leave_a_machine_of_eight() -> None:
    assert not parse_fleet("2x8xH100").inside_machines(16)
    assert parse_fleet("2x8xH100").inside_machines(4)
    assert not parse_fleet("2x8xH100").inside_machines(5), "the second group of five lies on both"
    assert parse_fleet("72xGB200").inside_machines(40)


def test_contexts_of_scout_take_what_they_take() -> None:
    report = make_report(spec(1 << 17, 4), parse_fleet("8xH100"))
    assert [row.context for row in report.contexts] == [1 << 17, 1 << 20, 10 << 20]
    assert [row.cache_bytes / 2**30 for row in report.contexts] == [7.125, 49.125, 481.125]
    needed = [row.devices for row in report.contexts]
    assert needed == sorted(needed)
    assert all(row.batch_devices >= row.devices for row in report.contexts)
    weights_and_cache = (report.weight_bytes + report.contexts[2].cache_bytes) / usable(report.fleet.device)
    assert report.contexts[2].devices >= weights_and_cache
