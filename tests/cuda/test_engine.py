"""Engines on the hollow device: what is sent and fetched, what is recorded, how memory is taken; no logit counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.model.quantization.recipes import RECIPES
from support import herds
from support.hollow_cuda.engine import run_engine
from support.hollow_cuda.libraries import UnavailableError
from support.hollow_cuda.report import Report

pytestmark = pytest.mark.slow

VOCABULARY, LAYERS = TINY.text.vocab_size, TINY.text.num_layers


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with pictures, its attention chunks a cache block long."""
    directory = tmp_path_factory.mktemp("cuda")
    herds.save(replace(TINY, text=replace(TINY.text, attention_chunk_size=128)), directory / "checkpoint")
    herds.write_processor(directory / "checkpoint")
    with open_checkpoint(directory / "checkpoint") as checkpoint:
        build_bundle(checkpoint, directory / "bundle", target="cuda", recipe=RECIPES["bf16"])
    return directory / "bundle"


def on_device(bundle: Path, code: str) -> tuple[list[Any], dict[str, Report]]:
    try:
        return run_engine("import json\nfrom herdgraph.runtimes.executors.runner import Step\n"
                          "engine = Engine.load(ARGUMENTS[0], gpu_memory=2 << 30)\nrunner = engine.runner\n" + code,
                          str(bundle))
    except UnavailableError as reason:
        pytest.skip(str(reason))


def copied(report: Report, source: str, target: str) -> list[int]:
    return [event["bytes"] for event in report.copies(source, target)]


def test_a_token_is_one_upload_one_replay_and_one_id(bundle: Path) -> None:
    _, found = on_device(bundle, """
sequence = engine.new_sequence()
engine.prefill(sequence, [3, 4, 5])
runner.decode_greedy(sequence, 6)
mark("greedy")
runner.decode_greedy(sequence, 7)
mark("logits")
engine.decode(sequence, 8)
mark("end")
""")
    for name, fetched in (("greedy", 8), ("logits", 4 * VOCABULARY)):
        report = found[name]
        assert len(report.of("replay")) == 1, report.summary()
        assert not report.launches
        assert not report.allocations
        assert len(copied(report, "host", "device")) == 1
        assert copied(report, "device", "host") == [fetched]


def test_batches_of_a_power_of_two_are_recorded_once(bundle: Path) -> None:
    (recorded,), found = on_device(bundle, """
runner.warm_up(8)
sequences = [engine.new_sequence() for _ in range(8)]
for sequence in sequences:
    engine.prefill(sequence, [3] * 5)
mark("tokens")
for count in (1, 2, 3, 4, 5, 6, 7, 8):
    engine.decode_batch(sequences[:count], [5] * count)
mark("end")
print(json.dumps(len(runner._recorded)))
""")
    assert recorded == 4
    assert len(found["tokens"].of("replay")) == 8
    assert not found["tokens"].launches


def test_prompts_and_tokens_in_one_call_run_without_a_recording(bundle: Path) -> None:
    _, found = on_device(bundle, """
sequences = [engine.new_sequence() for _ in range(3)]
steps = [Step(sequence, [3] * count, [count - 1], greedy=True) for sequence, count in zip(sequences, (40, 1, 7))]
runner.rows(steps)
steps = [Step(sequence, [3] * count, [count - 1], greedy=True) for sequence, count in zip(sequences, (40, 1, 7))]
mark("ragged")
runner.rows(steps)
mark("end")
""")
    report = found["ragged"]
    assert not report.of("replay")
    assert report.launches
    assert len(copied(report, "host", "device")) == 1, "inputs go together"
    assert copied(report, "device", "host") == [3 * 8]


def test_a_shared_block_is_copied_on_the_device(bundle: Path) -> None:
    (block,), found = on_device(bundle, """
sequence = engine.new_sequence()
engine.prefill(sequence, [3] * 20)
twin = sequence.fork()
mark("copy")
twin.make_room(1)
mark("end")
print(json.dumps(runner.pools.whole.cost // 2))
""")
    assert copied(found["copy"], "device", "device") == [block] * 2 * LAYERS
    assert not copied(found["copy"], "device", "host")


def test_sequences_fork_truncate_and_go_on(bundle: Path) -> None:
    (lengths, used), _ = on_device(bundle, """
sequence = engine.new_sequence()
engine.prefill(sequence, [3] * 300)
twin = sequence.fork()
engine.truncate(sequence, 200)
engine.truncate(twin, 128)
engine.decode_batch([sequence, twin], [5, 6])
print(json.dumps([len(sequence), len(twin)]))
del sequence, twin
print(json.dumps([budget.used for budget in runner.pools.budgets]))
""")
    assert lengths == [201, 129]
    assert len(used) == 2


def test_pictures_are_looked_at_on_the_device(bundle: Path) -> None:
    (tokens,), found = on_device(bundle, """
import numpy as np
tile = np.zeros((1, 3, engine.config.vision.image_size, engine.config.vision.image_size), np.float32)
mark("picture")
features = engine.vision.features(tile)
mark("end")
sequence = engine.new_sequence()
image = engine.config.image_token_id
engine.prefill(sequence, [7, *[image] * len(features), 9], tile)
print(json.dumps(len(sequence)))
""")
    assert found["picture"].launches
    assert tokens == 2 + TINY.vision.tokens_per_tile  # type: ignore[union-attr]


def test_a_service_answers(bundle: Path) -> None:
    """Prefixes are found again; nothing runs on logits of the host."""
    answers, _ = on_device(bundle, """
from herdgraph.model.processing import PreparedPrompt
from herdgraph.runtimes import Sampling
from herdgraph.runtimes.generation import StopRule
from herdgraph.runtimes.scheduler import GenerationRequest, Service, ServiceOptions
def request(ids, new=5):
    return GenerationRequest(request_id="r", prompt=PreparedPrompt(ids), sampling=Sampling(), stop=StopRule(new))
with Service(engine, ServiceOptions(sequences=4)) as service:
    answers = [service.submit(request([3 + number] * 150)) for number in range(6)]
    counts = [sum(len(delta.token_ids) for delta in answer) for answer in answers]
    again = service.submit(request([3] * 150))
    counts.append(sum(len(delta.token_ids) for delta in again))
print(json.dumps([counts, again.usage.cached_tokens]))
""")
    assert answers == [[[5] * 7, 128]]


def test_a_benchmark_measures_the_gpu(bundle: Path) -> None:
    """`herdgraph bench --device`: rates as shares of what the GPU itself reads and multiplies."""
    (report,), _ = run_engine("""
import json
from pathlib import Path
from herdgraph.runtimes.benchmark.bench import bench
print(json.dumps(bench(Path(ARGUMENTS[0]), prompt=40, new=4, batch=2, repeats=1, device="cuda:0").to_json()))
""", str(bundle))
    assert {"gpus", "read_bandwidth", "bf16_gemm"} == report["peaks"].keys()
    assert min(report["decode_utilization"], report["prefill_utilization"], report["batch_decode"]["median"]) > 0


def test_memory_is_what_was_asked_for(bundle: Path) -> None:
    (most, used, limit), _ = on_device(bundle, """
from herdgraph.runtimes.executors.ort.cuda.memory import free_bytes
print(json.dumps(sum(budget.most for budget in runner.pools.budgets)))
print(json.dumps((80 << 30) - free_bytes(runner.place)))
print(json.dumps(2 << 30))
""")
    assert 0.5 * limit < most < limit
    assert used < most + (64 << 20), "what is asked for is what is taken"


@pytest.mark.parametrize(("options", "message"), [
    ("gpu_memory=90 << 30", "gpu_memory is 96.6 GB, cuda:0 has 8"),
    ("gpu_memory=1 << 20", "leaves nothing for keys and values"),
    ("device='cuda:x'", "device is 'cuda:x'"), ("cache_bytes=100 << 30", "cache_bytes is 107.4 GB"),
])
def test_what_cannot_be_loaded(bundle: Path, options: str, message: str) -> None:
    (said,), _ = run_engine(f"""
import json
try:
    Engine.load(ARGUMENTS[0], {options})
except Exception as error:
    print(json.dumps(str(error)))
""", str(bundle))
    assert message in said
    assert "\n" not in said
