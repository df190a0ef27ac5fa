"""The bench command: its accounting by hand, its embedded models, its report. No time is asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from herdgraph.cli import main
from herdgraph.errors import HerdError
from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.names import expected_tensors
from herdgraph.model.config.presets import TINY
from herdgraph.model.quantization.recipes import RECIPES
from herdgraph.runtimes.benchmark.bench import bench, kv_bytes, prefill_operations
from herdgraph.runtimes.benchmark.gpu_peaks import BF16_MATMUL
from herdgraph.runtimes.benchmark.peaks import FP32_MATMUL, INT8_MATMUL, measure_peaks
from herdgraph.runtimes.bundle.manifest import Bundle
from support import herds

# The 1.5 B bench model: 16 layers of 16 experts, iRoPE (only sizes matter here).
SCOUT_MINI = HerdConfig(text=replace(
    TINY.text, vocab_size=32768, hidden_size=1024, num_layers=16, num_heads=8, num_kv_heads=2, head_dim=128,
    expert_size=1664, dense_size=3328, num_experts=16, moe_layers=tuple(range(16)),
    rope_layers=tuple((i + 1) % 4 != 0 for i in range(16)), chunked_layers=tuple((i + 1) % 4 != 0 for i in range(16)),
    attention_chunk_size=8192,
))


def test_keys_and_values_by_hand() -> None:
    assert kv_bytes(SCOUT_MINI.text, 512) == 2 * 2 * 128 * 4 * 16 * 513


def test_chunked_layers_read_their_chunk_only() -> None:
    text = SCOUT_MINI.text
    far, near = (kv_bytes(text, context) for context in (8192 * 10, 8192 * 10 + 1))
    assert near - far == 2 * 2 * 128 * 4 * 16, "one more key and value in each of the 16 layers"
    everywhere = replace(text, chunked_layers=(False,) * 16)
    assert kv_bytes(everywhere, 8192 * 10) - far == 2 * 2 * 128 * 4 * 12 * 8192 * 10


def test_active_bytes_by_hand(bundle: Path) -> None:
    """Of the routed experts one of four counts, of the vocabulary the head but not the table."""
    config, recipe = TINY.text, RECIPES["fp32"]
    shapes = {name: recipe.stored_bytes(name, shape, 4, packed=True) for name, shape in expected_tensors(TINY).items()}
    routed = sum(size for name, size in shapes.items() if ".experts." in name)
    rest = sum(
        size for name, size in shapes.items()
        if ".experts." not in name and name != "embed_tokens.weight"
        and not name.startswith(("vision_model", "multi_modal_projector"))
    )
    constants = Bundle.open(bundle).manifest.active_bytes - rest - routed * config.top_k // config.num_experts
    assert 0 <= constants < 0.05 * rest, "rotary frequencies and the like"


def test_prefill_operations_by_hand() -> None:
    layer = 1024 * (1024 + 2 * 256 + 1024) + 2 * 3 * 1024 * 1664 + 16 * 1024 + 2 * 1024
    attention = 4 * 8 * 128 * 16 * (512 + 1) / 2
    assert prefill_operations(SCOUT_MINI, 512) == pytest.approx(2 * (16 * layer + 1024) + attention, rel=1e-9)
    assert prefill_operations(SCOUT_MINI, 512) == pytest.approx(0.43e9, rel=0.03)


def test_embedded_models_are_what_they_say() -> None:
    header = '<ir_version: 10, opset_import: ["" : 21]> '
    for model, text in (
        (FP32_MATMUL, "g (float[M,K] a, float[K,N] b) => (float[M,N] y) { y = MatMul (a, b) }"),
        (BF16_MATMUL, "g (bfloat16[M,K] a, bfloat16[K,N] b) => (bfloat16[M,N] y) { y = MatMul (a, b) }"),
        (INT8_MATMUL, "g (uint8[M,K] a, int8[K,N] b) => (int32[M,N] y) { y = MatMulInteger (a, b) }"),
    ):
        assert model == onnx.parser.parse_model(header + text).SerializeToString()


def test_peaks_are_positive() -> None:
    found = measure_peaks(1, bandwidth_rows=16, side=64)
    assert min(found.read_bandwidth, found.fp32_gemm, found.int8_gemm) > 0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench")
    herds.save(TINY, directory / "checkpoint")
    with open_checkpoint(directory / "checkpoint") as checkpoint:
        build_bundle(checkpoint, directory / "bundle")
    return directory / "bundle"


def test_report(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = measure_peaks(1, bandwidth_rows=16, side=64)
    monkeypatch.setattr("herdgraph.runtimes.benchmark.bench.measure_peaks", lambda threads: small)
    arguments = ["bench", str(bundle), "--prompt-tokens", "40", "-n", "5", "--context", "21", "--threads", "1"]
    document = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert (document["prompt_tokens"], document["new_tokens"], document["context"]) == (40, 5, 21)
    for name in ("prefill", "decode"):
        assert 0 < document[name]["low"] <= document[name]["median"] <= document[name]["high"]
    read = Bundle.open(bundle).manifest.active_bytes + kv_bytes(TINY.text, 21)
    utilization = document["decode"]["median"] * read / small.read_bandwidth
    assert document["decode_utilization"] == pytest.approx(utilization)
    assert "of the read bandwidth" in " ".join(CliRunner().invoke(main, arguments).stdout.split())


def test_a_gpu_for_a_bundle_that_runs_on_a_cpu(bundle: Path) -> None:
    done = CliRunner().invoke(main, ["bench", str(bundle), "--device", "cuda:0"])
    assert done.exit_code == 1
    assert "runs on a CPU and takes neither device" in " ".join(done.stderr.split())


@pytest.mark.parametrize("options", [{"prompt": 0}, {"new": -1}, {"context": 0}, {"repeats": 0}])
def test_impossible_lengths(options: dict[str, int], bundle: Path) -> None:
    with pytest.raises(HerdError, match=r"it must be at least 1"):
        bench(bundle, **options)
