"""Which kernels ONNX Runtime takes for the operators that the target ``cuda`` emits, at Scout's and Maverick's sizes.

The target's choices (128 tokens in a cache block, experts in turns, blocks of 32) rest on these facts of one release.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.hollow_cuda import graphs
from support.hollow_cuda.decoder import SESSION
from support.hollow_cuda.device import Call, RefusedError, run
from support.hollow_cuda.kernels import (
    FLASH,
    GATHERED,
    GROUPED_ON_HOPPER,
    SPLIT,
    UNPACKING,
    UNPACKING_EXPERTS,
    UNPACKING_EXPERTS_OF_ROW,
    UNPACKING_ROW,
)
from support.hollow_cuda.report import Report

pytestmark = pytest.mark.slow

HIDDEN, EXPERT = 5120, 8192


def paged(cache: str, block: int) -> str:
    scales = ("w_scale, w_scale", ', k_quant_type="PER_TENSOR", v_quant_type="PER_TENSOR"')
    inputs, attributes = ("", "") if cache == "bfloat16" else scales
    inputs = inputs or '"", ""'
    held = f"{cache}[pool, {block}, 8, 128]"
    return f"""
        paged (bfloat16[tokens, 7168] qkv, {held} "past.k", {held} "past.v", int32[ends] ends, int32[sequences] past,
               int32[sequences, 8] table, int32[2] bounds, bfloat16[8192, 64] w_cos, bfloat16[8192, 64] w_sin,
               bfloat16[128] w_one, float[1] w_scale)
            => (bfloat16[tokens, 5120] y, {held} "present.k", {held} "present.v") {{
            y, "present.k", "present.v" = com.microsoft.PagedAttention <num_heads = 40, kv_num_heads = 8,
                do_rotary = 1, rotary_interleaved = 1, qk_norm_epsilon = 1e-5{attributes}>
                (qkv, "", "", "past.k", "past.v", ends, past, table, w_cos, w_sin, "", "", w_one, w_one, {inputs},
                 bounds)
        }}"""


def attend(directory: Path, cache: str, block: int) -> dict[str, Report]:
    def call(name: str, new: list[int], past: list[int], *, record: bool) -> Call:
        ends = [0, *(sum(new[: count + 1]) for count in range(len(new)))]
        dims = {"tokens": sum(new), "sequences": len(new), "ends": len(ends), "pool": 64}
        return Call(name, dims, {"ends": ends, "past": past, "table": [[0] * 8] * len(new),
                                 "bounds": [max(new), 1024]}, record)

    path = graphs.save(graphs.parse(paged(cache, block)), directory)
    return run([call("tokens", [1] * 8, [100, 3, 5, 70, 9, 1, 0, 64], record=True),
                call("ragged", [64, 1, 1], [0, 100, 3], record=False)], path)


@pytest.mark.parametrize(("cache", "block", "tokens", "ragged"), [
    ("bfloat16", 64, SPLIT, GATHERED),  # Flash takes no smaller blocks than 128 with heads of 128
    ("bfloat16", 128, FLASH, FLASH),
    ("int8", 128, SPLIT, GATHERED), ("float8e4m3fn", 128, SPLIT, GATHERED),
])
def test_paged_attention(weights: Path, cache: str, block: int, tokens: str, ragged: str) -> None:
    found = attend(weights, cache, block)
    assert found["tokens/eager"].count(tokens) == 1
    assert found["ragged/eager"].count(ragged) == 1
    assert found["tokens/eager"].count(GATHERED) == 0, "decoding reads the past where it lies"
    assert found["tokens/eager"].launches == found["tokens/replay"].of("replay")[0]["steps"] <= 6


def mixture(experts: int) -> str:
    return f"""
        mixture (bfloat16[tokens, {HIDDEN}] x, bfloat16[tokens, {experts}] choices,
                 bfloat16[{experts}, {2 * EXPERT}, {HIDDEN}] w_up, bfloat16[{experts}, {HIDDEN}, {EXPERT}] w_down)
            => (bfloat16[tokens, {HIDDEN}] y) {{
            y = com.microsoft.MoE <k = 1, normalize_routing_weights = 1, activation_type = "swiglu", swiglu_fusion = 1,
                activation_alpha = 1.0, activation_beta = 0.0> (x, choices, w_up, "", w_down)
        }}"""


def coded_mixture(experts: int, bits: int) -> str:
    blocks = {8: ("", ""), 4: (f", {HIDDEN // 32}", f", {EXPERT // 32}")}[bits]
    size = "" if bits == 8 else ", block_size = 32"
    return f"""
        mixture (bfloat16[tokens, {HIDDEN}] x, bfloat16[tokens, {experts}] choices,
                 uint8[{experts}, {2 * EXPERT}, {HIDDEN * bits // 8}] w_up,
                 bfloat16[{experts}, {2 * EXPERT}{blocks[0]}] w_up_scales,
                 uint8[{experts}, {HIDDEN}, {EXPERT * bits // 8}] w_down,
                 bfloat16[{experts}, {HIDDEN}{blocks[1]}] w_down_scales)
            => (bfloat16[tokens, {HIDDEN}] y) {{
            y = com.microsoft.QMoE <k = 1, normalize_routing_weights = 1, activation_type = "swiglu", swiglu_fusion = 1,
                activation_alpha = 1.0, activation_beta = 0.0, expert_weight_bits = {bits}{size}>
                (x, choices, w_up, w_up_scales, "", w_down, w_down_scales)
        }}"""


def rows(directory: Path, text: str, **options: dict[str, str]) -> tuple[Report, Report]:
    """A graph on one row, which is recorded too, and on 512."""
    path = graphs.save(graphs.parse(text), directory)
    found = run([Call("token", {"tokens": 1}, record=True), Call("prompt", {"tokens": 512})], path, **options)
    return found["token/eager"], found["prompt/eager"]


@pytest.mark.parametrize("experts", [16, 128])
def test_mixture_of_bfloat16_runs_on_tensor_cores_of_hopper(weights: Path, experts: int) -> None:
    token, prompt = rows(weights, mixture(experts))
    assert token.count(GROUPED_ON_HOPPER) == prompt.count(GROUPED_ON_HOPPER) == 2
    assert (token.launches, prompt.launches) == (8, 10)


@pytest.mark.parametrize("experts", [16, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_mixture_of_integers_unpacks_as_it_multiplies(weights: Path, experts: int, bits: int) -> None:
    token, prompt = rows(weights, coded_mixture(experts, bits))
    assert token.count(UNPACKING_EXPERTS_OF_ROW) == prompt.count(UNPACKING_EXPERTS) == 2
    assert token.launches <= 4
    assert prompt.launches == 9


@pytest.mark.parametrize("bits", [4, 8])
def test_product_of_integers_unpacks_as_it_multiplies(weights: Path, bits: int) -> None:
    text = f"""
        product (bfloat16[tokens, {HIDDEN}] x, uint8[7168, {HIDDEN // 32}, {32 * bits // 8}] w_codes,
                 bfloat16[7168, {HIDDEN // 32}] w_scales) => (bfloat16[tokens, 7168] y) {{
            y = com.microsoft.MatMulNBits <K = {HIDDEN}, N = 7168, bits = {bits}, block_size = 32>
                (x, w_codes, w_scales)
        }}"""
    token, prompt = rows(weights, text, session=SESSION)
    assert token.count(UNPACKING_ROW) == prompt.count(UNPACKING) == 1
    assert token.launches == prompt.launches == 1


def test_node_without_a_cuda_kernel_is_refused(weights: Path) -> None:
    path = graphs.save(graphs.parse("missing (float[2, 2] x) => (float y) { y = Det (x) }"), weights)
    with pytest.raises(RefusedError, match="fallback to CPU EP has been explicitly disabled"):
        run([Call("call", {})], path)


def test_node_that_the_host_waits_for_is_not_recorded(weights: Path) -> None:
    """NonZero reads back how many there are."""
    text = """waits (float[tokens] x) => (float[1, 1] y) {
        places = NonZero (x)
        numbers = Cast <to = 1> (places)
        y = ReduceSum (numbers)
    }"""
    with pytest.raises(RefusedError, match="cudaErrorStreamCapture"):
        rows(weights, text)
