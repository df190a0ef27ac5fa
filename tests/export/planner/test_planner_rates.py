"""What a call reads, computes and exchanges, and how long that takes: formulas by hand, routing against dice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from herdgraph.export.planner.devices import ON_CPU, Device, Fleet, cpu_device, known_devices, parse_fleet
from herdgraph.export.planner.memory import Workload
from herdgraph.export.planner.roofline import collective_seconds, decode_rate, prefill_rate, stage_seconds
from herdgraph.export.planner.storage import Storage
from herdgraph.export.planner.traffic import (
    Call,
    Collective,
    busiest_group,
    collectives_per_token,
    distinct_experts,
    sends,
    work_of,
)
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.parameter_counts import model_size
from herdgraph.model.config.presets import MAVERICK, SCOUT, TINY
from herdgraph.model.config.shard_plan import ShardPlan
from herdgraph.runtimes.benchmark.bench import kv_bytes, prefill_operations
from herdgraph.runtimes.benchmark.peaks import HardwarePeaks

FP8, FP32 = Storage("fp8", "bf16"), Storage("fp32", "float32", on_cpu=True)
ONE = ShardPlan()


def dice(experts: int, top_k: int, tokens: int, groups: int, draws: int = 1500) -> tuple[float, float]:
    """Touched experts, and the most in a group, of tokens that draw without preference: means over draws."""
    generator = np.random.default_rng(0)
    order = generator.random((draws, tokens, experts)).argpartition(top_k - 1, axis=-1)[..., :top_k]
    touched = np.zeros((draws, experts), bool)
    np.put_along_axis(touched, order.reshape(draws, -1), True, axis=1)
    return float(touched.sum(1).mean()), float(touched.reshape(draws, groups, -1).sum(2).max(1).mean())


@pytest.mark.parametrize(("experts", "top_k", "tokens", "groups"), [
    (16, 1, 1, 4), (16, 1, 8, 1), (16, 1, 8, 4), (128, 1, 32, 8), (128, 1, 32, 128), (16, 2, 4, 8), (16, 1, 200, 16),
])
def test_touched_experts_are_those_of_dice(experts: int, top_k: int, tokens: int, groups: int) -> None:
    touched, most = dice(experts, top_k, tokens, groups)
    assert distinct_experts(experts, top_k, tokens) == pytest.approx(touched, rel=0.01)
    assert busiest_group(experts, top_k, tokens, groups) == pytest.approx(most, rel=0.1)


def test_eight_tokens_of_sixteen_experts() -> None:
    """docs/performance.md measured 6.5 of 16 with eight random sequences."""
    assert distinct_experts(16, 1, 8) == pytest.approx(6.5, abs=0.15)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 300), st.integers(1, 2))
def test_the_busiest_group_lies_between_its_bounds(groups: int, tokens: int, top_k: int) -> None:
    touched, most = distinct_experts(16, top_k, tokens), busiest_group(16, top_k, tokens, groups)
    assert touched / groups - 1e-9 <= most <= min(touched, 16 / groups) + 1e-9


def test_bytes_of_a_token_of_scout_by_hand() -> None:
    """All that is active but the embedding table, two bytes each, and router and norms at four; all keys and values."""
    work = work_of(SCOUT, ONE, Storage("bf16", "bf16"), 0, Call(1, 1, 8191, 1))
    text = SCOUT.text
    in_float32 = text.num_layers * (text.num_experts * 5120 + 2 * 5120) + 5120
    read = model_size(SCOUT).active - text.vocab_size * 5120
    assert work.weight_bytes == pytest.approx(2 * read + 2 * in_float32, rel=1e-9)
    assert work.cache_bytes == 192 * 1024 * 8192
    assert work.products == 0, "everything is in floats"
    attention = 4 * 40 * 128 * 48 * 8192
    assert work.float_operations == pytest.approx(2 * read + attention, rel=1e-9)


def test_a_batch_reads_only_the_experts_it_touches() -> None:
    one, many = (work_of(MAVERICK, ONE, FP8, 0, Call(batch, 1, 1000, batch)).weight_bytes for batch in (1, 32))
    # A byte per weight, and in bfloat16 what the 16 outlier channels of each input meet.
    expert = 3 * 5120 * 8192 + 2 * 16 * (2 * 8192 + 5120)
    assert many - one == pytest.approx(24 * expert * (distinct_experts(128, 1, 32) - 1), rel=2e-3)


def test_operations_of_a_prompt_are_those_that_bench_counts() -> None:
    call = Call(1, 512, 0, 1)
    work = work_of(SCOUT, ONE, FP8, 0, call)
    head = 2 * SCOUT.text.vocab_size * 5120
    counted = (work.products + work.float_operations - head) / 512
    assert counted == pytest.approx(prefill_operations(SCOUT, 512), rel=1e-9)


def test_an_expert_per_rank_makes_one_rank_read_a_whole_one() -> None:
    """One token, one expert: split along F everybody reads a share of it, by ranges one rank reads all of it."""
    tensor, expert = (work_of(SCOUT, plan, FP8, 0, Call(1, 1, 0, 1)).weight_bytes
                      for plan in (ShardPlan(tensor=8), ShardPlan(expert=8)))
    assert expert - tensor == pytest.approx(48 * 3 * 5120 * 8192 * (1 - 1 / 8), rel=5e-3)


def test_collectives_by_hand() -> None:
    """Two per layer and one for the embedding, an AllGather of logits; stages send hidden states, then logits."""
    call = Call(4, 1, 100, 4)
    sums, logits = work_of(SCOUT, ShardPlan(tensor=8), FP8, 0, call).collectives
    assert sums == Collective("all_reduce", 97, 8, 4 * 5120 * 2)
    assert logits == Collective("all_gather", 1, 8, 4 * 202048 * 4)
    split = ShardPlan(tensor=4, pipeline=3)
    counts = [sum(one.count for one in work_of(SCOUT, split, FP8, stage, call).collectives) for stage in range(3)]
    assert counts == [33, 32, 33]
    between = sends(SCOUT.text, split, FP8, call)
    assert [(one.count, one.bytes) for one in between] == [(2, 4 * 5120 * 2), (1, 4 * 202048 * 4)]
    assert collectives_per_token(SCOUT.text, split) == sum(counts) + 3
    assert collectives_per_token(SCOUT.text, ONE) == 0
    odd = HerdConfig(text=replace(SCOUT.text, vocab_size=202047))
    assert collectives_per_token(odd.text, ShardPlan(tensor=8)) == 96, "a whole vocabulary needs no exchange"


def test_time_of_collectives_by_hand() -> None:
    device = Device("x", 1e9, link_bandwidth=100e9, link_latency=1e-6, network_bandwidth=10e9, network_latency=5e-6,
                    per_machine=8)
    near, far = Fleet(device, 16, 8), Fleet(device, 16, 8)
    assert collective_seconds(Collective("all_reduce", 10, 8, 1e6), near) == pytest.approx(
        10 * (6 * 1e-6 + 2 * 7 / 8 * 1e6 / 80e9))
    assert collective_seconds(Collective("all_gather", 1, 16, 1e6), far) == pytest.approx(
        4 * 5e-6 + 15 / 16 * 1e6 / 8e9), "sixteen do not share a machine"
    assert collective_seconds(Collective("send", 2, 2, 1e6), near) == pytest.approx(2 * (1e-6 + 1e6 / 80e9))


def mini() -> HerdConfig:
    """The bench model scout-mini: sizes only."""
    irope = tuple((i + 1) % 4 != 0 for i in range(16))
    return HerdConfig(text=replace(
        TINY.text, vocab_size=32768, hidden_size=1024, num_layers=16, num_heads=8, num_kv_heads=2, head_dim=128,
        expert_size=1664, dense_size=3328, num_experts=16, moe_layers=tuple(range(16)), rope_layers=irope,
        chunked_layers=irope, attention_chunk_size=8192, max_position_embeddings=1 << 20,
    ))


def test_decoding_on_this_cpu_is_the_formula() -> None:
    """A token reads its weights and caches once at shares of the bandwidth, and pays for its layers."""
    config, peaks = mini(), HardwarePeaks(1, 15e9, 165e9, 600e9)
    fleet = Fleet(cpu_device(peaks=peaks), 1, 1)
    rate = decode_rate(config, ONE, FP32, fleet, Workload(512, 1))
    routers = 16 * 1024 * (32 - 16)  # filled up to whole tiles
    weights, keys = 4 * (model_size(config).active - 32768 * 1024 + routers), kv_bytes(config.text, 511, 4)
    seconds = weights / (ON_CPU.weights * 15e9) + keys / (ON_CPU.caches * 15e9) + 16 * ON_CPU.layer_seconds
    assert rate.seconds == pytest.approx(seconds, rel=1e-6)
    assert rate.tokens_per_second == pytest.approx(1 / seconds, rel=1e-6)
    assert rate.limit == "bandwidth"


def test_a_prompt_on_this_cpu_is_limited_by_arithmetic() -> None:
    fleet = Fleet(cpu_device(peaks=HardwarePeaks(1, 15e9, 165e9, 600e9)), 1, 1)
    rate = prefill_rate(mini(), ONE, FP32, fleet, 512)
    assert rate.limit == "compute"
    assert rate.tokens_per_second == pytest.approx(
        512 / (512 * prefill_operations(mini(), 512) / (ON_CPU.compute * 165e9) + 16 * ON_CPU.layer_seconds), rel=1e-6)


def test_a_pipeline_alone_does_not_decode_faster() -> None:
    """One sequence passes stage after stage, each of which reads its layers at the pace of one device."""
    fleet = parse_fleet("8xH100")
    alone = decode_rate(SCOUT, ONE, FP8, fleet, Workload(8192, 1)).seconds
    staged = decode_rate(SCOUT, ShardPlan(pipeline=4), FP8, fleet, Workload(8192, 1)).seconds
    assert alone < staged < 1.1 * alone
    assert decode_rate(SCOUT, ShardPlan(tensor=4), FP8, fleet, Workload(8192, 1)).seconds < alone / 2


def test_micro_batches_keep_stages_busy() -> None:
    """Long contexts: keys and values of a sequence are read once however the batch is cut, stages work side by side."""
    fleet, plan, work = parse_fleet("8xH200"), ShardPlan(pipeline=8), Workload(1 << 17, 8)
    call = Call(8, 1, work.context - 1, 8)
    in_one = sum(stage_seconds(work_of(SCOUT, plan, FP8, stage, call), FP8, fleet).total for stage in range(8))
    assert decode_rate(SCOUT, plan, FP8, fleet, work).seconds < 0.7 * in_one


def test_replicas_share_the_batch() -> None:
    fleet = parse_fleet("8xH100")
    both = decode_rate(SCOUT, ShardPlan(tensor=4), FP8, fleet, Workload(8192, 16), replicas=2)
    half = decode_rate(SCOUT, ShardPlan(tensor=4), FP8, fleet, Workload(8192, 8))
    assert both.tokens_per_second == pytest.approx(2 * half.tokens_per_second)


def test_devices_without_a_type_compute_in_the_next() -> None:
    a100, h100 = known_devices()["A100-80GB"], known_devices()["H100"]
    assert (a100.computes("fp8"), h100.computes("fp8"), a100.computes("int8")) == ("bf16", "fp8", "int8")
    assert a100.rate("fp8") == a100.flops["bf16"]


def test_the_data_file_is_sound() -> None:
    for name, device in known_devices().items():
        assert device.name == name
        assert "data sheet" in device.source
        assert {"fp32", "bf16"} <= set(device.flops)
        assert device.flops["fp32"] < device.flops["bf16"] < device.flops["int8"]
        assert device.link_bandwidth < device.bandwidth
        assert 1e9 < device.memory < 1e12
