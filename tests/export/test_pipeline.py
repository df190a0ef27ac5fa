"""Builds: atomic, streamed, and refused when they cannot work."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file

from herdgraph.errors import HerdError
from herdgraph.export.pipeline import BuildProgress, build_bundle
from herdgraph.export.targets.registry import target_of
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.checkpoint.tensors.write import write_tensors
from herdgraph.model.config.presets import TINY
from herdgraph.runtimes.bundle.manifest import Bundle
from support import herds
from support.processes import worker_environment


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pipeline") / "checkpoint"
    herds.save(TINY, directory)
    herds.write_processor(directory)
    return directory


def _build(checkpoint: Path, output: Path, **options: object) -> Bundle:
    with open_checkpoint(checkpoint) as source:
        return build_bundle(source, output, **options)


def test_bundle_content(checkpoint: Path, tmp_path: Path) -> None:
    stages, totals, written = [], [], []
    progress = BuildProgress(stages.append, totals.append, written.append)
    bundle = _build(checkpoint, tmp_path / "bundle", progress=progress)
    assert {path.name for path in bundle.directory.iterdir()} == {
        "manifest.json", "decoder.onnx", "decoder.data", "vision.onnx", "vision.data", "processor",
        "decoder.data.blake3", "vision.data.blake3",
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (bundle.processor / name).read_bytes() == (checkpoint / name).read_bytes()
    assert sum(written) <= totals[0] < 1.05 * sum(written) + 60_000
    assert stages[:2] == ["checking weights", "capturing decoder"]
    assert bundle.manifest.toolchain["torch"].startswith("2.13")
    decoder = ir.load(bundle.graph("decoder"))
    assert not decoder.functions
    assert {node.domain for node in decoder.graph.all_nodes()} == {"", "herdgraph.cpu"}


def test_a_checkpoint_without_processor_files_builds(tmp_path: Path) -> None:
    from herdgraph.runtimes import Engine

    herds.save(herds.variant(), tmp_path / "checkpoint")
    bundle = _build(tmp_path / "checkpoint", tmp_path / "bundle")
    engine = Engine.load(bundle.directory)
    assert engine.prefill(engine.new_sequence(), [5, 6]).shape == (512,)
    with pytest.raises(HerdError, match="tokenizer"):
        engine.generate("Hello")


def test_full_disk(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(HerdError, match=r"bundle needs .* has 1.0 kB free: choose another output or make room"):
        _build(checkpoint, tmp_path / "bundle")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_a_damaged_weight_is_refused_before_anything_else(value: float, checkpoint: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    [file] = damaged.glob("*.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.1.input_layernorm.weight"))
    tensors[name][3] = value
    write_tensors(tensors, file)
    stages: list[str] = []
    told = rf"^layers\.1\.input_layernorm\.weight in {file.name} holds an? \w+ at \[3\]"
    with open_checkpoint(damaged) as source, pytest.raises(HerdError, match=told):
        build_bundle(source, tmp_path / "bundle", progress=BuildProgress(stages.append))
    assert stages == ["checking weights"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_the_check_of_weights_reads_all_of_them(checkpoint: Path) -> None:
    seen: list[tuple[int, int]] = []
    with open_checkpoint(checkpoint) as source:
        source.check_weights(lambda *bytes_read: seen.append(bytes_read))
        stored = sum(source.read(name).nbytes for name in source.tensors)
    assert seen[-1] == (stored, stored)
    assert seen == sorted(seen)


def test_disk_full_while_writing(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", fail)
    with pytest.raises(HerdError, match="No space left on device; nothing was left behind"):
        _build(checkpoint, tmp_path / "bundle")
    assert not any(tmp_path.iterdir())


KILLED = """
import sys, time
from pathlib import Path
from support import capture_cache
capture_cache.install()
from herdgraph.export.pipeline import BuildProgress, build_bundle
from herdgraph.model.checkpoint import open_checkpoint

def stage(name):
    if name.startswith("writing"):
        print(name, flush=True)
        time.sleep(60)

with open_checkpoint(Path(sys.argv[1])) as source:
    build_bundle(source, Path(sys.argv[2]), progress=BuildProgress(stage))
"""


def test_a_kill_leaves_no_bundle_and_a_rerun_succeeds(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(checkpoint), str(output)], stdout=subprocess.PIPE,
                               env=worker_environment())
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"writing")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    _build(checkpoint, output)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_unknown_target_and_recipe() -> None:
    with pytest.raises(HerdError, match="no target is called 'abacus': choose one of cpu, cpu-stock, cuda, tensorrt"):
        target_of("abacus", "fp32")
    with pytest.raises(HerdError, match="target cpu has no recipe 'int3': choose one of fp32, int8, int4"):
        target_of("cpu", "int3")
