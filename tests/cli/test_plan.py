"""The plan command: what it says, its JSON, its picture, and one line for everything that is wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from herdgraph.cli import main
from herdgraph.export.planner.plot import _visible
from herdgraph.model.config import to_hf
from herdgraph.model.config.names import expected_tensors
from herdgraph.model.config.parameter_counts import model_size
from herdgraph.model.config.presets import MAVERICK, PRESETS, SCOUT
from herdgraph.runtimes.benchmark.peaks import HardwarePeaks

SHORT = ("--devices", "8xH100", "--context", "8k")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


def test_the_context_is_no_longer_than_the_models() -> None:
    most = PRESETS["tiny-text"].text.max_position_embeddings
    assert f"1 x {most} tokens" in run("tiny-text", "--devices", "8xH100").stdout


def test_a_plan_is_said() -> None:
    done = run("scout", "--devices", "8xH100", "--context", "1M", "--batch", 8, "--kv", "fp8")
    assert done.exit_code == 0, done.stderr
    for said in ("plan       tp=8,ep=1,pp=1", "decodes fastest of the", "limited by bandwidth", "assumed, not measured",
                 "keys and values, global layers   25.8 GB", "data sheet", "plans (12 of 26)", "10M"):
        assert said in done.stdout, said


def test_json_says_the_same() -> None:
    done = run("maverick", "--devices", "8xH200", "--context", "128k", "--batch", 32, "--json")
    document: dict[str, Any] = json.loads(done.stdout)
    plan = document["plan"]
    assert (plan["tensor"] * plan["expert"] * plan["pipeline"] * plan["replicas"], plan["fits"]) == (8, True)
    assert plan == document["candidates"][0]
    assert plan["device_total"] == pytest.approx(sum(plan["device_bytes"].values()), abs=len(plan["device_bytes"]))
    outputs = [math.prod(shape) // shape[1] for name, shape in expected_tensors(MAVERICK).items()
               if len(shape) > 1 and name.startswith("layers.") and "router" not in name]
    bytes_of_outliers = 2 * 16 * sum(outputs)
    assert document["weight_bytes"] == pytest.approx(
        model_size(MAVERICK).total + bytes_of_outliers, rel=0.01), "a byte each, 16 outlier channels, and a little"
    assert [row["context"] for row in document["contexts"]] == [1 << 17, 1 << 20], "10M is beyond Maverick"
    assert document["devices"]["source"].startswith("data sheet")
    assert plan["decode"]["tokens_per_second"] * plan["decode"]["seconds"] == pytest.approx(32)


def test_memory_only_devices_get_no_rates() -> None:
    document = json.loads(run("scout", "--devices", "8x80GB", "--json").stdout)
    assert (document["prefill"], document["plan"]["decode"]) == (None, None)
    assert "no throughput is predicted" in " ".join(document["notes"])
    said = run("scout", "--devices", "8x80GB")
    assert "tokens/s" not in said.stdout
    assert "no throughput is predicted" in said.stdout


def test_formats_without_a_target_are_said() -> None:
    assert "fp32 is built for a CPU only" in run("scout", *SHORT, "--recipe", "fp32").stdout
    assert "no FP8 products" in run("scout", "--devices", "8xA100-80GB", "--context", "8k").stdout


def test_a_checkpoint_is_read_for_its_configuration_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_hf(SCOUT)))
    names = (tmp_path, "scout", "meta-llama/Llama-4-Scout-17B-16E", "meta-llama/Llama-4-Scout-17B-16E-Instruct")
    first, *others = (json.loads(run(model, *SHORT, "--json").stdout)["candidates"] for model in names)
    assert all(found == first for found in others)


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    found = HardwarePeaks(0, 15e9, 165e9, 600e9)
    monkeypatch.setattr("herdgraph.export.planner.devices.measure_peaks", lambda threads: found)
    document = json.loads(run("tiny-text", "--devices", "cpu", "--recipe", "int8", "--context", 512, "--json").stdout)
    assert document["devices"]["source"].startswith("measured")
    assert document["kv"] == "float32"
    assert document["plan"]["decode"]["tokens_per_second"] > 0
    refused = run("tiny-text", "--devices", "cpu", "--recipe", "bf16", "--context", 512)
    assert "target cpu has no recipe 'bf16'" in refused.stderr


@pytest.mark.parametrize("devices", ["8xH100", "8x80GB"])
def test_picture(devices: str, tmp_path: Path) -> None:
    picture = tmp_path / "plan.png"
    assert run("scout", "--devices", devices, "--batch", 4, "--plot", picture).exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000


def test_the_picture_joins_what_is_too_thin_to_be_seen() -> None:
    found = [{"thin": 1.0, "experts": 50.0, "beyond": 0.5, "caches": 10.0 * context} for context in (1, 3, 90)]
    found[2]["beyond"] = 90.0
    stack = _visible(found, top=100.0)
    assert stack == {"2 smaller parts": [1.5, 1.5, 91.0], "experts": [50.0] * 3, "caches": [10.0, 30.0, 900.0]}


@pytest.mark.parametrize(("arguments", "message"), [
    (("scout", "--devices", "8xH1000"), "did you mean H100"),
    (("nothing", *SHORT), "neither a directory nor a preset: give a checkpoint or one of scout"),
    (("no/thing", *SHORT), "does not exist"),
    (("maverick", "--devices", "8xH200", "--context", "2M"), "beyond the model's 1048576"),
    (("scout", "--devices", "8xH100", "--context", "1M", "--batch", "32"), "it would take 28 of them"),
    (("scout", "--devices", "8xH100", "--context", "1x"), "'1x' is no number of tokens such as 4096, 128k or 1m"),
    (("scout", "--devices", "8xH100", "--context", "0"), "0 is fewer than 1"),
    (("scout", *SHORT, "--batch", "0"), "0 is not in the range"),
    (("scout", *SHORT, "--recipe", "int3"), "recipe is 'int3'"),
    (("scout", *SHORT, "--kv", "int4"), "'int4' is not one of 'float', 'int8', 'fp8'"),
    (("scout", *SHORT, "--plot", "/nonexistent/a.png"), "No such file"),
    (("scout", *SHORT, "--plot", "a.foo"), "a.foo cannot be drawn"),
    (("scout",), "Missing option '--devices'"),
])
def test_what_is_wrong_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code in (1, 2)
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not done.stdout


def test_the_planner_needs_no_torch() -> None:
    code = ("from herdgraph.cli import main; import sys\n"
            "try: main(['plan', 'scout', '--devices', '8xH100', '--json'])\n"
            "finally: print(*sorted({'torch', 'onnx', 'onnx_ir', 'matplotlib'} & set(sys.modules)), file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["plan"]["fits"]
    assert done.stderr.strip() == ""
