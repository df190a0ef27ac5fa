"""Sharded bundles in lockstep: the logits of the single engine, whatever the plan, recipe, prompt or skew."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from herdgraph.calibration.calibrate import Options, calibrate
from herdgraph.calibration.windows import Data, Window
from herdgraph.errors import HerdError
from herdgraph.export import job
from herdgraph.export.cache_type import cache_type
from herdgraph.export.graph import capture
from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.checkpoint.sharded import sharded
from herdgraph.model.checkpoint.tensors.lazy import FileTensor
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from herdgraph.model.config.shard_plan import ShardPlan, shapes_of_rank
from herdgraph.model.quantization.recipes import RECIPES
from herdgraph.runtimes import Engine
from herdgraph.runtimes.bundle.manifest import Bundle
from support import herds
from support.lockstep import Lockstep
from support.processes import worker_environment

BOUND = 1e-4
UNDECIDED = 0.03
"""Router logits (of deviation 1) so near each other that rounding to 8 bits may send a token to another expert."""
PLANS = ["tp=2", "tp=4", "ep=2", "ep=4", "pp=2", "pp=4", "tp=2,ep=2", "tp=2,pp=2", "ep=2,pp=2", "tp=2,ep=2,pp=2"]
HERDS = {
    "plain": herds.variant(),
    "odd": herds.variant(use_qk_norm=False, tie_word_embeddings=True, top_k=2, moe_layers=(0, 1, 2, 3), vocab_size=511),
    "tied": herds.variant(tie_word_embeddings=True, attention_chunk_size=5, num_heads=8, num_kv_heads=1),
    "dense": herds.variant(moe_layers=()),
    "seeing": TINY,
}


@pytest.fixture(scope="module", autouse=True)
def _captured_once() -> Iterator[None]:
    """Capturing is what takes the time, and is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("capture_decoder", "capture_vision"):
            once = functools.cache(getattr(capture, name))
            patch.setattr(job, name, lambda config, once=once: once(config).clone())
        yield


class Family:
    """A checkpoint and the bundles built of it."""

    def __init__(self, directory: Path, config: HerdConfig) -> None:
        self.directory, self.config = directory, config
        self.model = herds.save(config, directory / "checkpoint")

    def build(self, plan: str = "", recipe: str = "fp32", caches: str = "float") -> Bundle:
        """A bundle; calibrated where the recipe wants it."""
        precision = replace(RECIPES[recipe], caches=caches)  # type: ignore[arg-type]
        output = self.directory / f"{plan or 'whole'}-{recipe}-{caches}"
        if output.exists():
            return Bundle.open(output, verify=False)
        calibrated = self.calibration() if precision.needs_calibration or recipe == "int4" else None
        with open_checkpoint(self.directory / "checkpoint") as checkpoint:
            return build_bundle(checkpoint, output, recipe=precision, calibration=calibrated,
                                shards=ShardPlan.parse(plan) if plan else None)

    def calibration(self) -> Path:
        output = self.directory / "calibration"
        if output.exists():
            return output
        data = Data([Window(herds.tokens(60, seed)) for seed in range(3)], [])
        with open_checkpoint(self.directory / "checkpoint") as checkpoint:
            calibrate(checkpoint, output, data, Options(min_tokens_shown=8))
        return output

    def engine(self, recipe: str = "fp32", caches: str = "float") -> Engine:
        return Engine.load(self.build("", recipe, caches).directory, threads=1)

    def lockstep(self, plan: str, recipe: str = "fp32", caches: str = "float") -> Lockstep:
        return Lockstep(Bundle.open(self.build(plan, recipe, caches).directory))


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    return functools.cache(lambda name: Family(tmp_path_factory.mktemp(name), HERDS[name]))


def _decoded(lockstep: Lockstep, ids: list[int], prompt: int) -> np.ndarray:
    """Logits of a prompt and of tokens decoded after it."""
    return np.concatenate([lockstep.prefill(ids[:prompt]), *(lockstep.append([token]) for token in ids[prompt:])])


def _router_margins(family: Family, ids: list[int]) -> np.ndarray:
    """By how much the router prefers the expert of a token to the next one, in float32: the least of all layers."""
    margins = []

    def watch(router: torch.nn.Module, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        best = torch.nn.functional.linear(inputs[0].flatten(0, -2), router.weight).topk(2).values
        margins.append(best[:, 0] - best[:, 1])

    hooks = [module.register_forward_hook(watch) for name, module in family.model.named_modules()
             if name.endswith(".router")]
    herds.logits(family.model, ids)
    for hook in hooks:
        hook.remove()
    return torch.stack(margins).amin(0).numpy()


def _single(engine: Engine, ids: list[int], prompt: int) -> np.ndarray:
    sequence = engine.new_sequence()
    found = engine.prefill(sequence, ids[:prompt], all_positions=True)
    return np.concatenate([found, *(engine.decode(sequence, token)[None] for token in ids[prompt:])])


CASES = [("plain", plan) for plan in PLANS] + [
    ("odd", "tp=2,ep=2,pp=2"), ("odd", "ep=4"), ("tied", "tp=2,ep=2,pp=2"), ("tied", "tp=8"), ("tied", "pp=4"),
    ("dense", "tp=4"), ("dense", "tp=2,pp=2"),
]


@pytest.mark.parametrize(("name", "plan"), CASES)
def test_text_has_the_logits_of_the_single_engine(family: Callable[[str], Family], name: str, plan: str) -> None:
    """A prompt of three chunks, then tokens across the next boundary."""
    ids = herds.tokens(52)
    wanted = _single(family(name).engine(), ids, 44)
    assert 0.3 < wanted.std() < 3, "logits of order one are what the bound is for"
    np.testing.assert_allclose(_decoded(family(name).lockstep(plan), ids, 44), wanted, atol=BOUND, rtol=0)


@pytest.mark.parametrize("plan", ["tp=2,ep=2,pp=2", "ep=4", "pp=2"])
def test_images(family: Callable[[str], Family], plan: str) -> None:
    """Tiles across a chunk boundary; the tower runs once, and its features enter on every rank of the first stage."""
    vision, seeing = TINY.vision, family("seeing")
    assert vision is not None
    tiles = 5
    ids = [7, *[TINY.image_token_id] * (tiles * vision.tokens_per_tile), *herds.tokens(8)]
    pixels = torch.randn(tiles, 3, vision.image_size, vision.image_size).numpy()
    engine, lockstep = seeing.engine(), seeing.lockstep(plan)
    wanted = engine.prefill(engine.new_sequence(), ids, pixels, all_positions=True)
    assert lockstep.bundle.graph("vision") == lockstep.bundle.directory / "vision.onnx"
    assert engine._vision is not None
    features = engine._vision.features(pixels)
    np.testing.assert_allclose(lockstep.prefill(ids, features), wanted, atol=BOUND, rtol=0)


@pytest.mark.parametrize("plan", ["tp=2,ep=2,pp=2", "ep=4", "tp=4"])
@pytest.mark.parametrize(("recipe", "caches"), [("int8", "float"), ("int4", "float"), ("fp8", "float"),
                                                ("fp32", "int8"), ("int8", "int8")])
def test_recipes_are_as_near_to_float32_as_the_single_engine(
    family: Callable[[str], Family], plan: str, recipe: str, caches: str
) -> None:
    """By the median of all tokens, and the mean of those not between two experts: ranks may choose another one."""
    ids, plain = herds.tokens(52), family("plain")
    exact = _single(plain.engine(), ids, 44)
    assert cache_type(plain.build(plan, recipe, caches)) == {"float": "float32", "int8": "int8"}[caches]
    alone = np.abs(_single(plain.engine(recipe, caches), ids, 44) - exact)
    found = np.abs(_decoded(plain.lockstep(plan, recipe, caches), ids, 44) - exact)
    assert 0 < np.median(found.mean(1)) < 1.15 * np.median(alone.mean(1))
    decided = _router_margins(plain, ids) > UNDECIDED
    assert decided.sum() >= len(ids) - 2
    assert found[decided].mean() < 1.3 * alone[decided].mean()
    assert found[decided].max() < 2 * alone.max()


def test_tied_and_rotated(family: Callable[[str], Family]) -> None:
    """Rotation gives a tied head weights of its own: they are slices of the embedding on the last stage."""
    ids, tied = herds.tokens(30), family("tied")
    exact, alone = _single(tied.engine(), ids, 20), _single(tied.engine("int8"), ids, 20)
    found = _decoded(tied.lockstep("tp=2,ep=2,pp=2", "int8"), ids, 20)
    assert np.abs(found - exact).mean() < 1.3 * np.abs(alone - exact).mean()


@pytest.mark.parametrize("tokens", [1, 4096])
@pytest.mark.parametrize("plan", ["ep=4", "tp=2,ep=2"])
def test_all_tokens_on_one_expert(tmp_path: Path, tokens: int, plan: str) -> None:
    """The worst skew: one rank, or one pair, has all the routed work, the others none."""
    config = herds.variant(attention_chunk_size=0, chunked_layers=(False,) * 4)
    herds.save(config, tmp_path / "checkpoint")
    with open_checkpoint(tmp_path / "checkpoint") as source:
        router = {name: _Zeros(lazy) for name, lazy in source.sources.items() if ".router." in name}
        checkpoint = replace(source, sources={**source.sources, **router})
        whole, split = (build_bundle(checkpoint, tmp_path / name, shards=shards)
                        for name, shards in (("whole", None), ("split", ShardPlan.parse(plan))))
    ids, engine = herds.tokens(tokens), Engine.load(whole.directory, threads=1)
    wanted = engine.prefill(engine.new_sequence(), ids)
    np.testing.assert_allclose(Lockstep(split).append(ids)[-1], wanted, atol=BOUND, rtol=0)


class _Zeros:
    """A router that cannot tell experts apart: ties go to the first."""

    def __init__(self, lazy: Any) -> None:
        self.lazy, self.shape, self.dtype = lazy, lazy.shape, lazy.dtype

    def read(self, index: Any = None) -> torch.Tensor:
        return torch.zeros_like(self.lazy.read(index))


@pytest.mark.parametrize(("plan", "cuts"), [
    ("tp=2", 10), ("ep=4", 10), ("tp=2,ep=2,pp=2", 6), ("pp=2", 1), ("tp=1", 1),
])
def test_two_cuts_per_layer(family: Callable[[str], Family], plan: str, cuts: int) -> None:
    """Of 4 layers: the embedding, two per layer, the head."""
    bundle = family("plain").build(plan)
    shards = bundle.manifest.shards
    assert shards is not None
    assert len(shards.ranks[0].partitions) == cuts
    for rank, entry in enumerate(shards.ranks):
        files = {path.name for path in (bundle.directory / f"rank{rank}").iterdir()}
        assert files == {"decoder.data", "decoder.data.blake3",
                         *(f"decoder.{index:02}.onnx" for index in range(len(entry.partitions)))}
        sums = [e for partition in entry.partitions for e in partition.after if e.op == "all_reduce"]
        layers = entry.layers[1] - entry.layers[0]
        assert len(sums) == (0 if shards.plan.width == 1 else 2 * layers + (entry.layers[0] == 0))
        graphs = [ir.load(bundle.directory / partition.graph) for partition in entry.partitions]
        assert not any(node.domain == "herdgraph" for graph in graphs for node in graph.graph.all_nodes())


def test_types_and_shapes_of_crossing_values(family: Callable[[str], Family]) -> None:
    """Shapes are in the names of the inputs' sizes."""
    shards = family("seeing").build("tp=2,ep=2,pp=2").manifest.shards
    assert shards is not None
    known = {"tokens", "rows", "image_tokens", "sequences", "sequences_plus_1", "global_blocks", "chunked_blocks",
             "global_pool", "chunked_pool"}
    for partition in (partition for entry in shards.ranks for partition in entry.partitions):
        graph = ir.load(family("seeing").build("tp=2,ep=2,pp=2").directory / partition.graph).graph
        for value in (*graph.inputs, *graph.outputs):
            assert value.dtype is not None
            names = {part for dim in value.shape if not isinstance(dim, int) for part in str(dim.value).split("*")}
            assert all(name in known or name.isdigit() for name in names), value


def test_weights_are_stored_once(family: Callable[[str], Family]) -> None:
    """What all ranks store is the whole model, and the norms and routers once more for each rank of a stage."""
    bundle, plan = family("plain").build("tp=2,ep=2"), ShardPlan(2, 2)
    stored = sum(entry.bytes for name, entry in bundle.manifest.files.items() if name.endswith("decoder.data"))
    wanted = sum(4 * int(np.prod(shape)) for rank in range(4)
                 for shape in shapes_of_rank(plan, HERDS["plain"], rank).values())
    assert wanted <= stored + 4 * 4096 < wanted + 4 * 4096 * 200  # small ones are in the graphs, large ones aligned
    assert bundle.files_of(1) == [name for name in bundle.manifest.files if name.startswith("rank1/")]
    assert "rank0/decoder.data" in bundle.files_of(0)


@pytest.mark.parametrize("plan", ["tp=2,ep=2,pp=2", "tp=4", "pp=2"])
def test_no_rank_reads_anothers_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: str) -> None:
    """Every read of a file is looked at: a byte that only other ranks hold is never asked for."""
    config, split = herds.variant(tie_word_embeddings=True), ShardPlan.parse(plan)
    herds.save(config, tmp_path)
    reads: list[tuple[int, int]] = []
    preadv, fromfile = os.preadv, np.fromfile

    def counted(file: int, buffers: list[Any], offset: int) -> int:
        reads.append((offset, sum(map(len, buffers))))
        return preadv(file, buffers, offset)

    def counted_whole(path: Path, dtype: Any, count: int, offset: int = 0) -> Any:
        reads.append((offset, count))
        return fromfile(path, dtype, count, offset=offset)

    monkeypatch.setattr(os, "preadv", counted)
    monkeypatch.setattr(np, "fromfile", counted_whole)
    with open_checkpoint(tmp_path) as checkpoint:
        size = max(path.stat().st_size for path in checkpoint.weight_files)
        for rank in range(split.world):
            reads.clear()
            part = sharded(checkpoint, split, rank)
            for name in part.sources:
                part.read(name)
            read = np.zeros(size, bool)
            for offset, count in reads:
                read[offset : offset + count] = True
            assert np.array_equal(read, _held(checkpoint, config, split, rank, size))


def _held(checkpoint: Any, config: HerdConfig, plan: ShardPlan, rank: int, size: int) -> np.ndarray:
    """The bytes of a single safetensors file that a rank's slices are."""
    held = np.zeros(size, bool)
    for name, lazy in checkpoint.sources.items():
        parts = plan.parts(config, name, rank)
        if parts is None:
            continue
        assert isinstance(lazy, FileTensor)
        index = np.ix_(*([i for r in parts.get(axis, (range(n),)) for i in r] for axis, n in enumerate(lazy.shape)))
        mask = np.zeros(lazy.shape, bool)
        mask[index] = True
        flat = np.repeat(mask.reshape(-1), lazy.dtype.itemsize)
        held[lazy.offset : lazy.offset + len(flat)] |= flat
    return held


KILLED = """
import sys, time
from pathlib import Path
from support import capture_cache
capture_cache.install()
from herdgraph.export.pipeline import BuildProgress, build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.shard_plan import ShardPlan

def stage(name):
    if name == "writing weights of rank 1":
        print(name, flush=True)
        time.sleep(60)

with open_checkpoint(Path(sys.argv[1])) as source:
    build_bundle(source, Path(sys.argv[2]), shards=ShardPlan(2), progress=BuildProgress(stage))
"""


def test_a_kill_leaves_nothing(family: Callable[[str], Family], tmp_path: Path) -> None:
    checkpoint, output = family("plain").directory / "checkpoint", tmp_path / "bundle"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(checkpoint), str(output)], stdout=subprocess.PIPE,
                               env=worker_environment())
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"writing weights of rank 1")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    with open_checkpoint(checkpoint) as source:
        build_bundle(source, output, shards=ShardPlan(2))
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(("target", "plan", "message"), [
    ("cpu", "tp=3", "4 attention heads cannot be split over 3 ranks evenly; the nearest that does is tp=2"),
    ("canonical", "tp=2", "target canonical is not lowered and runs on one device, the plan tp=2,ep=1,pp=1 is for 2"),
])
def test_refusals(family: Callable[[str], Family], tmp_path: Path, target: str, plan: str, message: str) -> None:
    with open_checkpoint(family("plain").directory / "checkpoint") as source, pytest.raises(HerdError, match=message):
        build_bundle(source, tmp_path / "b", target=target, shards=ShardPlan.parse(plan))
    assert not any(tmp_path.iterdir())


def test_memory_and_progress_know_all_ranks(family: Callable[[str], Family], tmp_path: Path) -> None:
    totals, written = [], []
    progress = job.BuildProgress(weights=totals.append, written=written.append)
    with open_checkpoint(family("plain").directory / "checkpoint") as source:
        build_bundle(source, tmp_path / "b", shards=ShardPlan(2, 1, 2), progress=progress)
    assert len(totals) == 4
    assert sum(written) <= totals[-1] < 1.05 * sum(written) + 60_000


def test_other_layouts_are_split_too(family: Callable[[str], Family], tmp_path: Path) -> None:
    """Experts stored one by one and transposed: the same slices as of fused ones."""
    from safetensors.torch import load_file, save_file

    source = family("plain").directory / "checkpoint"
    shutil.copytree(source, tmp_path / "c")
    path = tmp_path / "c" / "model.safetensors"
    tensors = {}
    for name, value in load_file(path).items():
        if name.endswith("experts.gate_up_proj"):
            for expert, both in enumerate(value):
                for kind, half in zip(("gate", "up"), both.chunk(2, dim=-1), strict=True):
                    tensors[name.replace("gate_up_proj", f"{expert}.{kind}_proj.weight")] = half.T.contiguous()
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(value):
                tensors[name.replace("down_proj", f"{expert}.down_proj.weight")] = down.T.contiguous()
        else:
            tensors[name] = value
    save_file(tensors, path)
    plan = ShardPlan(2, 2, 2)
    with open_checkpoint(source) as fused, open_checkpoint(tmp_path / "c") as apart:
        for rank in range(plan.world):
            one, other = sharded(fused, plan, rank), sharded(apart, plan, rank)
            assert one.tensors == other.tensors
            assert all(torch.equal(one.read(name), other.read(name)) for name in one.sources)
