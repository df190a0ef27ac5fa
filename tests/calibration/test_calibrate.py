"""Calibration from end to end: what is written, that it can be cut off and repeated, what it holds and refuses."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from herdgraph.calibration import calibrate as module
from herdgraph.calibration.calibrate import CalibrationProgress, Options, backend_factory, calibrate
from herdgraph.calibration.evaluate import evaluate
from herdgraph.calibration.measure import measure
from herdgraph.calibration.windows import Data, Window, data_of, split
from herdgraph.console import quantity
from herdgraph.errors import HerdError
from herdgraph.model.checkpoint import Checkpoint, open_checkpoint
from herdgraph.model.checkpoint.tensors import write
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from herdgraph.model.data import Picture, Record
from herdgraph.model.llama4.model import Llama4
from herdgraph.model.quantization.calibration_check import hessian_bytes
from herdgraph.model.quantization.calibration_file import CalibrationFile
from herdgraph.model.quantization.formats import Fp8Format
from herdgraph.model.quantization.recipes import RECIPES, Recipe
from support import herds

OBSERVERS = ("max", "percentile", "mse", "entropy")
OPTIONS, FP8 = Options(min_tokens_shown=8), RECIPES["fp8"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("calibrate") / "checkpoint"
    herds.save(TINY, found)
    herds.write_processor(found)
    return found


@pytest.fixture
def checkpoint(directory: Path) -> Iterator[Checkpoint]:
    with open_checkpoint(directory) as found:
        yield found


def samples(seed: int = 0) -> list[Record]:
    text = " ".join(str(number * 7919 % 1000) for number in range(seed, 300 + seed))
    pictures = [Image.effect_noise((size, 40), 80).convert("RGB") for size in (30, 50, 90)]
    documents = [(text,), *((Picture(picture), "What is it?") for picture in pictures)]
    return [Record("sample", "sample", document=parts) for parts in documents]


@pytest.fixture(scope="module")
def data(directory: Path) -> Data:
    with open_checkpoint(directory) as source:
        found = data_of(source, samples(), most_tokens=3000)
    # Windows of 512 are few: cut them, so that there is something to hold out.
    pieces = [Window(window.token_ids[at : at + 128], window.pixels) for window in (*found.measured, *found.held_out)
              for at in (range(0, len(window.token_ids), 128) if window.pixels is None else [0])]
    return split([Window(piece.token_ids, piece.pixels) for piece in pieces], 0.2)


@pytest.fixture(scope="module")
def calibrated(directory: Path, data: Data, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("calibrated") / "out"
    with open_checkpoint(directory) as source:
        return output, calibrate(source, output, data, OPTIONS)


def stored_in_fp8(recipe: Recipe, checkpoint: Checkpoint) -> list[str]:
    return [name for name, info in checkpoint.tensors.items() if name.endswith(("_proj", ".weight"))
            and len(info.shape) > 1 and isinstance(recipe.layout_of(name), Fp8Format)]


def test_one_run_measures_for_all_recipes(calibrated: tuple[Path, dict[str, Any]], checkpoint: Checkpoint) -> None:
    output, description = calibrated
    assert {path.name for path in output.iterdir()} == {"calibration.json", "scales.safetensors", "report.html",
                                                        "hessians"}
    assert [path.name for path in output.parent.iterdir()] == ["out"], "no leftovers"
    assert json.loads((output / "calibration.json").read_text()) == description
    assert description["high_precision_parts"] == []
    file, scales = CalibrationFile.open(output, checkpoint.fingerprint()), load_file(output / "scales.safetensors")
    names = stored_in_fp8(FP8, checkpoint)
    assert len(names) == 4 * 4 + 2 * 3 + 2 * 3 + 2 * 2 + 2 * 6 + 2 + 1, "attention, dense, shared, routed, images"
    for name in names:
        for observer in OBSERVERS:
            amax = scales[f"{observer}/{name}"]
            assert amax.shape == ((4,) if ".experts." in name else ())
            assert (amax > 0).all()
            assert (amax <= scales[f"max/{name}"]).all()
        assert torch.equal(file.input_amax(name), scales[f"mse/{name}"])
        energy, outliers = scales[f"input_energy/{name}"], file.outliers(name)
        assert outliers is not None
        assert len(outliers) == min(16, len(energy) // 8)
        assert energy[outliers].min() >= energy.kthvalue(len(energy) - len(outliers)).values
    assert not any("router" in name or "lm_head" in name or "embed_tokens" in name for name in scales)
    assert all(file.kv_amax(layer) for layer in range(4))
    assert set(description["inputs"]) == {*names, *(f"layers.{layer}.self_attn.cache" for layer in range(4))}


def test_the_report_holds_everything(
    calibrated: tuple[Path, dict[str, Any]], directory: Path, tmp_path: Path
) -> None:
    from herdgraph.calibration.report import write_report

    output, description = calibrated
    text = (output / "report.html").read_text()
    assert "http" not in text
    assert text.count("<img src='data:image/png;base64,") == 4
    name, digits = f"{directory.parent.name}/{directory.name}", description["fingerprint"][:8]
    assert f"<h1>Calibration of {name}: {quantity(description['parameters'])} parameters, fingerprint {digits}" in text
    assert "<script" not in text
    assert "vision_model.model.layers.1.mlp.fc2.weight" in text
    coverage = description["coverage"] | {"dead": [[3, 2]]}
    write_report(tmp_path / "report.html", description | {"coverage": coverage, "checkpoint": "<b>me & you</b>"})
    text = (tmp_path / "report.html").read_text()
    assert "No token of its own: layer 3 expert 2." in text
    assert "&lt;b&gt;me &amp; you&lt;/b&gt;" in text


def test_energies_and_magnitudes_are_those_of_the_model(
    calibrated: tuple[Path, dict[str, Any]], checkpoint: Checkpoint, data: Data
) -> None:
    """An independent look: hooks on the torch model."""
    scales = load_file(calibrated[0] / "scales.safetensors")
    model, seen = Llama4.from_checkpoint(checkpoint).eval(), []
    model.decoder.layers[2].feed_forward.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        for window in data.measured:
            pixels = None if window.pixels is None else torch.from_numpy(window.pixels)
            model(torch.tensor([window.token_ids]), pixels)
    x_ND = torch.cat([x[0] for x in seen])
    found = scales["input_energy/layers.2.feed_forward.down_proj.weight"]
    torch.testing.assert_close(found, x_ND.square().mean(0), atol=1e-6, rtol=1e-4)
    found = scales["max/layers.2.feed_forward.down_proj.weight"]
    torch.testing.assert_close(found, x_ND.abs().max(), atol=1e-5, rtol=1e-5)


def test_the_same_data_gives_the_same_bytes(
    calibrated: tuple[Path, dict[str, Any]], checkpoint: Checkpoint, data: Data, tmp_path: Path
) -> None:
    first, again = calibrated[0], tmp_path / "again"
    calibrate(checkpoint, again, data, OPTIONS)
    assert contents(again) == contents(first)


def contents(directory: Path) -> dict[Path, bytes]:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*.*")}


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from herdgraph.calibration.calibrate import Options, CalibrationProgress, calibrate
from herdgraph.model.checkpoint import open_checkpoint
checkpoint, output, data = sys.argv[1:]
parts = []
def part():
    parts.append(1)
    if len(parts) == 3:  # the image tower and two layers
        os.kill(os.getpid(), signal.SIGKILL)
with open_checkpoint(Path(checkpoint)) as source:
    calibrate(source, Path(output), pickle.loads(Path(data).read_bytes()), Options(min_tokens_shown=8),
              progress=CalibrationProgress(part=part))
"""


def killed(directory: Path, output: Path, data: Data) -> None:
    """Run a calibration in a process of its own that is killed after its second layer."""
    import pickle

    stored = output.with_name("data.pickle")
    stored.write_bytes(pickle.dumps(data))
    done = subprocess.run([sys.executable, "-c", KILLED, directory, output, stored], check=False,
                          env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert done.returncode == -signal.SIGKILL
    assert not output.exists()
    stored.unlink()


class Recording:
    """A source that tells what is read, and how many bytes of what it handed out are alive."""

    def __init__(self, source: Checkpoint) -> None:
        self.source, self.config = source, source.config
        self.names: list[tuple[str, int | None]] = []
        self._alive: weakref.WeakValueDictionary[int, torch.UntypedStorage] = weakref.WeakValueDictionary()
        self.most = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def read(self, name: str, index: int | None = None) -> torch.Tensor:
        self.names.append((name, index))
        tensor = self.source.read(name, index)
        storage = tensor.untyped_storage()
        self._alive[len(self.names)] = storage
        self.most = max(self.most, sum(alive.nbytes() for alive in self._alive.values()))
        return tensor


def test_a_killed_run_continues(directory: Path, checkpoint: Checkpoint, data: Data, tmp_path: Path) -> None:
    killed(directory, tmp_path / "out", data)
    work = tmp_path / ".out.calibrating"
    assert {path.stem for path in work.glob("*.json")} == {"vision", "layers.0", "layers.1"}
    before = {path: path.stat().st_mtime_ns for path in work.glob("*.json")}
    recorded, counts = Recording(checkpoint), {"parts": 0}

    def part() -> None:
        counts["parts"] += 1
        if counts["parts"] == 5:
            assert before.items() <= {path: path.stat().st_mtime_ns for path in work.glob("*.json")}.items()
            first = len(recorded.names)
            assert not any(name.startswith(("layers.0.self", "layers.1.self", "vision", "embed"))
                           for name, _ in recorded.names[:first]), "nothing that is done is read again"

    calibrate(recorded, tmp_path / "out", data, OPTIONS, progress=CalibrationProgress(part=part))  # type: ignore[arg-type]
    calibrate(checkpoint, tmp_path / "whole", data, OPTIONS)
    assert not work.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    assert len(contents(tmp_path / "whole")) == 8
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_output_that_fails_costs_no_measurement(
    checkpoint: Checkpoint, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever happens while the directory is made, the next run finds all that was measured, the Hessians too."""
    whole = Data(data.measured, [])  # evaluation reads the weights again
    recorded = Recording(checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_report", raise_full)
        with pytest.raises(HerdError, match="No space left on device"):
            calibrate(recorded, tmp_path / "out", whole, OPTIONS)  # type: ignore[arg-type]
    read = len(recorded.names)
    calibrate(recorded, tmp_path / "out", whole, OPTIONS)  # type: ignore[arg-type]
    assert len(recorded.names) == read
    assert len(list((tmp_path / "out" / "hessians").iterdir())) == 5, "of four layers and the head"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_says_what_is_kept(
    checkpoint: Checkpoint, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it ends, in one line, and with the number of parts that the next run finds."""
    written, real = [], write.save_file

    def full(tensors: Any, path: Path, **options: Any) -> None:
        written.append(path)
        if len(written) == 4:  # after the image tower and layer 0 (magnitudes and states), in layer 1
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(write, "save_file", full)
        with pytest.raises(HerdError) as caught:
            calibrate(checkpoint, tmp_path / "out", data, OPTIONS)
    work = tmp_path / ".out.calibrating"
    assert str(caught.value) == (
        f"writing {work} failed: I/O error: No space left on device (os error 28); {work} keeps 2 of 5 parts: make "
        "room and run the same command again to go on")
    assert len(list(work.glob("*.json"))) == 2
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_report", raise_full)
        with pytest.raises(HerdError, match=r"writing \S+ failed: No space .*; \S+ keeps 5 of 5 parts: make room"):
            calibrate(checkpoint, tmp_path / "out", data, OPTIONS)
    calibrate(checkpoint, tmp_path / "out", data, OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.stat().st_mode & 0o444 for path in (tmp_path / "out").iterdir()} == {0o444}


def raise_full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_other_data_starts_anew(checkpoint: Checkpoint, data: Data, tmp_path: Path) -> None:
    other = Data(data.measured[1:], data.held_out)
    parts: list[str] = []

    def run(some: Data, key: str) -> int:
        recorded = Recording(checkpoint)
        measure(recorded, some, tmp_path / "work", key=key, min_tokens_shown=8, on_part=parts.append)
        return sum(1 for name, _ in recorded.names if name.endswith("q_proj.weight"))

    assert run(data, "a") == 4 + 2
    assert run(data, "a") == 0
    assert run(other, "b") == 4 + 2
    assert parts == ["vision", *(f"layers.{layer}" for layer in range(4))] * 3
    assert data.digest() != other.digest()
    assert data.digest() != Data([*data.measured, *data.held_out], []).digest(), "the same windows, all measured"


def test_options_decide_whether_work_is_continued(
    checkpoint: Checkpoint, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []

    def noted(*_: object, key: str, **__: object) -> None:
        keys.append(key)
        raise HerdError("far enough")

    monkeypatch.setattr(module, "measure", noted)
    for options in (OPTIONS, replace(OPTIONS, observer="max", min_tokens=3), replace(OPTIONS, min_tokens_shown=9),
                    replace(OPTIONS, hessians=False)):
        with pytest.raises(HerdError, match="far enough"):
            calibrate(checkpoint, tmp_path / "out", data, options)
    assert keys[0] == keys[1], "neither the observer nor the gate changes what is measured"
    assert len(set(keys)) == 3


def test_one_layer_and_one_expert_are_in_memory(tmp_path: Path, data: Data) -> None:
    """More layers do not need more memory; experts are read one by one, once for all runs."""
    most = {}
    for layers in (4, 12):
        config = herds.variant(
            num_layers=layers, moe_layers=tuple(range(1, layers, 2)), rope_layers=(True,) * layers,
            chunked_layers=(True,) * layers,
        )
        herds.save(config, tmp_path / str(layers))
        text = [Window(window.token_ids) for window in data.measured if window.pixels is None][:2]
        with open_checkpoint(tmp_path / str(layers)) as source:
            recorded = Recording(source)
            measured = measure(recorded, Data(text, []), tmp_path / "work", key=str(layers), min_tokens_shown=4)
            most[layers] = recorded.most
            experts = [(name, index) for name, index in recorded.names if ".experts." in name]
            assert len(experts) == len(set(experts)) == 2 * 4 * (layers // 2)
            assert None not in {index for _, index in experts}
            assert not any(name == "embed_tokens.weight" and index is None for name, index in recorded.names)
            recorded.names.clear()
            make = backend_factory(measured.amaxes, "mse")
            variants = {kept: make(FP8.with_high_precision([kept])) for kept in ("self_attn", "shared_expert")}
            evaluate(recorded, variants, text, local=make(FP8))
            decoder = [name for name in recorded.names if name[0] != "embed_tokens.weight"]
            assert len(decoder) == len(set(decoder)), "a weight is read once for all variants"
            assert recorded.most < 2.5 * most[layers]
    assert most[4] == most[12]


BROKEN = {
    "q_proj": ("layers.2.self_attn.q_proj.weight", torch.nan,
               "layers.2.self_attn.q_proj.weight in model.safetensors holds a NaN"),
    "expert": ("layers.1.feed_forward.experts.down_proj", torch.inf,
               r"layers.1.feed_forward.experts.down_proj \[1\] in model.safetensors holds an infinity"),
    "norm": ("layers.3.post_attention_layernorm.weight", torch.nan,
             "layers.3.post_attention_layernorm.weight in model.safetensors holds a NaN"),
    "vision": ("vision_model.model.layers.1.mlp.fc1.weight", torch.nan, "vision_model.model.layers.1.mlp.fc1.weight"),
    "overflow": ("layers.2.feed_forward.up_proj.weight", 3e38, "the input of layers.2.feed_forward.down_proj.weight"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_weights_are_named(case: str, directory: Path, data: Data, tmp_path: Path) -> None:
    name, value, message = BROKEN[case]
    tensors = load_file(directory / "model.safetensors")
    stored = next(found for found in tensors if found.endswith(name))
    tensors[stored].view(-1)[tensors[stored].numel() // 3 : tensors[stored].numel() // 3 + 40] = value
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text((directory / "config.json").read_text())
    save_file(tensors, tmp_path / "checkpoint" / "model.safetensors", metadata={"format": "pt"})
    with open_checkpoint(tmp_path / "checkpoint") as broken, pytest.raises(HerdError, match=message) as caught:
        calibrate(broken, tmp_path / "out", data, OPTIONS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_checkpoints_calibration_is_refused(calibrated: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(HerdError, match=r"was measured on another checkpoint \(its fingerprint is"):
        CalibrationFile.open(calibrated[0], "0" * 64)
    with pytest.raises(HerdError, match=r"has no calibration\.json, it is not a calibration"):
        CalibrationFile.open(tmp_path, "0" * 64)
    (tmp_path / "calibration.json").write_text('{"format": 99}')
    with pytest.raises(HerdError, match="is 99, this herdgraph reads 4"):
        CalibrationFile.open(tmp_path, "0" * 64)


def test_unknown_names_are_refused(
    calibrated: tuple[Path, dict[str, Any]], checkpoint: Checkpoint, data: Data, tmp_path: Path
) -> None:
    with pytest.raises(HerdError, match=r"knows no observer 'best': choose one of max, percentile, mse, entropy"):
        CalibrationFile.open(calibrated[0], checkpoint.fingerprint(), observer="best")
    with pytest.raises(HerdError, match="no observer is called 'best': choose one of max"):
        calibrate(checkpoint, tmp_path / "out", data, replace(OPTIONS, observer="best"))
    file = CalibrationFile.open(calibrated[0], checkpoint.fingerprint(), observer="entropy")
    assert file.input_amax("layers.1.feed_forward.experts.down_proj").shape == (4,)
    with pytest.raises(HerdError, match=r"says nothing of lm_head\.weight by observer 'entropy'"):
        file.input_amax("lm_head.weight")
    assert not list(tmp_path.iterdir()), "refused before anything was read"


def test_damaged_scales_are_one_line(
    calibrated: tuple[Path, dict[str, Any]], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "calibration.json").write_bytes((calibrated[0] / "calibration.json").read_bytes())
    (tmp_path / "scales.safetensors").write_bytes((calibrated[0] / "scales.safetensors").read_bytes()[:100])
    with pytest.raises(HerdError, match="is damaged or cut off"):
        CalibrationFile.open(tmp_path, checkpoint.fingerprint()).input_amax("layers.0.self_attn.q_proj.weight")


def test_pictures_are_needed_for_scales_of_the_image_tower(
    checkpoint: Checkpoint, data: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = Data([window for window in data.measured if window.pixels is None], [])
    found = calibrate(checkpoint, tmp_path / "out", text, OPTIONS)
    assert found["high_precision_parts"] == ["vision_model", "multi_modal_projector"]
    assert "has no pictures: the image tower will stay in high precision" in caplog.text
    file = CalibrationFile.open(tmp_path / "out", checkpoint.fingerprint())
    fc1 = "vision_model.model.layers.0.mlp.fc1.weight"
    assert file.applied_to(FP8).layout_of(fc1) is None
    assert file.applied_to(RECIPES["int8"]) == RECIPES["int8"], "8-bit integers need no scales of inputs"


def test_parts_stay_in_high_precision_as_asked(checkpoint: Checkpoint, data: Data, tmp_path: Path) -> None:
    """Routed experts only, as Meta ships; a search goes on from there."""
    kept = ("attention", "shared experts", "dense feed-forwards", "images")
    options = replace(OPTIONS, high_precision=kept, hessians=False)
    found = calibrate(checkpoint, tmp_path / "out", data, options)
    file = CalibrationFile.open(tmp_path / "out", checkpoint.fingerprint())
    in_fp8 = stored_in_fp8(file.applied_to(FP8), checkpoint)
    assert sorted(in_fp8) == [f"layers.{layer}.feed_forward.experts.{part}_proj"
                              for layer in TINY.text.moe_layers for part in ("down", "gate_up")]
    best = found["quality"]["mean_kl"]
    more = calibrate(checkpoint, tmp_path / "more", data, replace(options, max_kl=0.5 * best))
    assert set(more["high_precision_parts"]) == {*found["high_precision_parts"], "feed_forward.experts"}


def test_parts_that_a_model_has_not(tmp_path: Path) -> None:
    herds.save(HerdConfig(text=TINY.text), tmp_path / "text")
    with open_checkpoint(tmp_path / "text") as text, pytest.raises(
            HerdError, match="this model has no images to keep in high precision: choose among attention, routed exp"):
        calibrate(text, tmp_path / "out", Data([], []), replace(OPTIONS, high_precision=("images",)))


def search_with(bound: float, checkpoint: Checkpoint, data: Data, output: Path, **options: Any) -> dict[str, Any]:
    return calibrate(checkpoint, output, data, replace(OPTIONS, max_kl=bound, hessians=False, **options))


def test_a_generous_bound_keeps_nothing(checkpoint: Checkpoint, data: Data, tmp_path: Path) -> None:
    found = search_with(1.0, checkpoint, data, tmp_path / "out")
    assert found["high_precision_parts"] == []
    assert set(found["quality"]["tried"]) == {
        "nothing", "attention", "routed experts", "shared experts", "dense feed-forwards", "images"}
    assert found["quality"]["tried"]["nothing"]["mean_kl"] == pytest.approx(found["quality"]["mean_kl"])


def test_a_tight_bound_keeps_few_parts(
    calibrated: tuple[Path, dict[str, Any]], checkpoint: Checkpoint, data: Data, tmp_path: Path
) -> None:
    everything = calibrated[1]["quality"]["mean_kl"]
    found = search_with(0.7 * everything, checkpoint, data, tmp_path / "out")
    assert found["high_precision_parts"]
    assert found["quality"]["mean_kl"] <= 0.7 * everything
    tried = found["quality"]["tried"]
    chosen = next(kept for kept in tried if tried[kept]["mean_kl"] == pytest.approx(found["quality"]["mean_kl"], 1e-6))
    fewer = ", ".join(chosen.split(", ")[:-1]) or "nothing"
    assert tried[fewer]["mean_kl"] > 0.7 * everything, "the last part was needed"
    file = CalibrationFile.open(tmp_path / "out", checkpoint.fingerprint())
    assert file.high_precision_parts == found["high_precision_parts"]
    assert "high precision: nothing" in (tmp_path / "out" / "report.html").read_text()


def test_an_impossible_bound_is_one_line(checkpoint: Checkpoint, data: Data, tmp_path: Path) -> None:
    """FP8 caches cost something whatever stays in high precision."""
    message = r"no choice of parts keeps KL within 1e-09: .* it is .*; raise the bound"
    with pytest.raises(HerdError, match=message) as caught:
        search_with(1e-9, checkpoint, data, tmp_path / "out", kv="fp8")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bound_without_held_out_data(checkpoint: Checkpoint, data: Data, tmp_path: Path) -> None:
    with pytest.raises(HerdError, match="no data is held out"):
        calibrate(checkpoint, tmp_path / "out", Data(data.measured, []), Options(max_kl=0.1))
    assert not list(tmp_path.iterdir())


def test_quality_is_that_of_an_independent_computation(
    calibrated: tuple[Path, dict[str, Any]], checkpoint: Checkpoint, data: Data
) -> None:
    quality, model = calibrated[1]["quality"], Llama4.from_checkpoint(checkpoint).eval()
    losses = []
    for window in data.held_out:
        ids = torch.tensor([window.token_ids])
        pixels = None if window.pixels is None else torch.from_numpy(window.pixels)
        with torch.inference_mode():
            logits = model(ids, pixels)[0].double()
        losses += [float(-logits[at].log_softmax(-1)[after]) for at, after in enumerate(window.token_ids[1:])
                   if after != TINY.image_token_id]
    assert any(window.pixels is not None for window in data.held_out)
    assert quality["exact_perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert quality["tokens"] == sum(len(window.token_ids) for window in data.held_out)
    assert 0 < quality["mean_kl"] < 0.1
    assert 0.7 < quality["top1"] < 1
    assert quality["perplexity"] == pytest.approx(quality["exact_perplexity"] * (1 + quality["change"]))
    assert 0 < quality["noise"] < 0.2
    assert all(0.01 < error < 0.2 for pair in quality["layer_errors"] for error in pair)
    assert len(quality["layers_in_high_precision"]) == 3


def test_what_is_kept_costs_nothing(
    calibrated: tuple[Path, dict[str, Any]], checkpoint: Checkpoint, data: Data
) -> None:
    make: Callable[[Recipe], Any] = backend_factory(load_file(calibrated[0] / "scales.safetensors"), "mse")
    variants = {
        "all kept": make(FP8.with_high_precision(["*"])), "fp8": make(FP8),
        "fp8 caches": make(replace(FP8.with_high_precision(["*"]), caches="fp8")),
    }
    found = evaluate(checkpoint, variants, data.held_out)
    assert found.variants["all kept"].mean_kl == 0
    assert found.variants["all kept"].top1 == 1
    assert found.variants["all kept"].perplexity == found.exact_perplexity
    assert found.variants["all kept"].noise == 0
    assert 0 < found.variants["fp8 caches"].mean_kl < found.variants["fp8"].mean_kl
    assert found.layer_errors == []
    assert evaluate(checkpoint, {}, data.held_out, local=variants["all kept"]).layer_errors == [(0, 0)] * 4


def test_hessians_are_written_once_for_an_input_and_found_again(
    calibrated: tuple[Path, dict[str, Any]], checkpoint: Checkpoint
) -> None:
    file = CalibrationFile.open(calibrated[0], checkpoint.fingerprint())
    stored = load_file(calibrated[0] / "hessians" / "layers.1.safetensors")
    written = [load_file(path) for path in (calibrated[0] / "hessians").iterdir()]
    assert sum(tensor.nbytes for tensors in written for tensor in tensors.values()) == hessian_bytes(TINY)
    assert set(stored) == {f"layers.1.{name}" for name in (
        "self_attn.q_proj.weight", "self_attn.o_proj.weight", "feed_forward.experts.gate_up_proj",
        "feed_forward.experts.down_proj", "feed_forward.shared_expert.gate_proj.weight",
        "feed_forward.shared_expert.down_proj.weight")}
    expert = file.hessian("layers.1.feed_forward.experts.down_proj", 2)
    assert expert is not None
    assert torch.equal(expert, stored["layers.1.feed_forward.experts.down_proj"][2])
    assert torch.linalg.eigvalsh(expert.double()).min() > -1e-4
    keys, queries = (file.hessian(f"layers.0.self_attn.{part}.weight") for part in ("k_proj", "q_proj"))
    assert keys is not None
    assert queries is not None
    assert torch.equal(keys, queries)
    assert file.hessian("layers.0.feed_forward.router.weight") is None
    assert all(file.kv_amax(layer, observer="max") for layer in range(4))


def test_what_a_sublayer_adds_is_a_share_of_the_residual_stream(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Against the torch model: the energy of what attentions and feed-forwards give, and of the stream after them."""
    ids, shares, stream = herds.tokens(50), {}, {}
    found = measure(checkpoint, Data([Window(ids)], []), tmp_path, key="", with_hessians=False).amaxes
    decoder = Llama4.from_checkpoint(checkpoint).eval().decoder

    def note(sublayer: str, y_BTD: torch.Tensor) -> None:
        stream["h"] = stream["h"] + y_BTD
        shares[sublayer] = (y_BTD.square().sum(-1) / stream["h"].square().sum(-1)).clamp_max(1).mean()

    for index, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(lambda _, inputs: stream.update(h=inputs[0]))
        layer.self_attn.register_forward_hook(
            lambda _, inputs, output, index=index: note(f"layers.{index}.self_attn", output[0]))
        layer.feed_forward.register_forward_hook(
            lambda _, inputs, output, index=index: note(f"layers.{index}.feed_forward", output))
    with torch.inference_mode():
        decoder(torch.tensor([ids]))
    assert len(shares) == 8
    for sublayer, share in shares.items():
        assert 0.01 < share < 0.99, "neither all nor nothing"
        assert float(found[f"residual_share/{sublayer}"]) == pytest.approx(float(share), rel=1e-4)


def test_hessians_can_be_left_out(
    calibrated: tuple[Path, dict[str, Any]], checkpoint: Checkpoint, data: Data, tmp_path: Path
) -> None:
    """Nothing else changes, and a disk without room for them is told in time."""
    calibrate(checkpoint, tmp_path / "out", data, replace(OPTIONS, hessians=False))
    file = CalibrationFile.open(tmp_path / "out", checkpoint.fingerprint())
    assert not file.has_hessians
    assert (tmp_path / "out" / "scales.safetensors").read_bytes() == (calibrated[0] / "scales.safetensors").read_bytes()
    assert calibrated[1]["hessians"]
    assert not file.description["hessians"]


def test_a_disk_without_room_for_hessians(
    checkpoint: Checkpoint, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("herdgraph.files.free_bytes", lambda _: 1000)
    with pytest.raises(HerdError, match=r"Hessians \(--no-hessians leaves them out\) needs .*, .* has 1\S* kB free"):
        calibrate(checkpoint, tmp_path / "out", data, OPTIONS)
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written(checkpoint: Checkpoint, data: Data, directory: Path, tmp_path: Path) -> None:
    with pytest.raises(HerdError, match="cannot write to /proc/none"):
        calibrate(checkpoint, Path("/proc/none/out"), data, OPTIONS)
    with pytest.raises(HerdError, match="overlaps the input"):
        calibrate(checkpoint, directory / "out", data, OPTIONS)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(HerdError, match=r"out has no calibration\.json"):
        calibrate(checkpoint, tmp_path / "out", data, OPTIONS, overwrite=True)
