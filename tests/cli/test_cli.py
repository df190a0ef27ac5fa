"""The command line as a newcomer meets it: help, results, and one line for everything that is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from support import clips, herds
from support.command_line import run, run_process


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that a process of its own builds quickly."""
    directory = tmp_path_factory.mktemp("small") / "checkpoint"
    herds.save(herds.variant(**herds.TWO_LAYERS), directory)
    return directory


COMMANDS = ("build", "calibrate", "train", "generate", "chat", "inspect", "verify", "upcycle")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(command: list[str]) -> None:
    done = run(*command, "--help") if command else run_process("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ")


def test_the_script_is_the_command() -> None:
    command = [sys.executable, Path(__file__).parents[2] / "build.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: build.py [OPTIONS] CHECKPOINT")


def test_generate(paths: tuple[Path, Path], tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (60, 30), "green").save(tmp_path / "green.png")
    arguments = ("generate", paths[1], "-p", "Hi", "--image", tmp_path / "green.png", "--max-new-tokens", 5)
    streamed, document = run_process(*arguments), json.loads(run(*arguments, "--json").stdout)
    assert streamed.returncode == 0, streamed.stderr
    assert streamed.stdout.strip("\n") == document["text"].strip("\n")
    assert "prompt tokens" in streamed.stderr
    assert len(document["token_ids"]) <= 5


def test_generate_with_a_video(paths: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(clips.film(clips.frames()))
    arguments = ("generate", paths[1], "What?", "--video", tmp_path / "a.mp4", "-n", 2, "--json")
    tokens = [json.loads(run(*arguments, *more).stdout)["timings"]["prompt_tokens"]
              for more in ((), ("--video-fps", 1), ("--video-frames", 1), ("--video-sampling", "keyframes"))]
    assert tokens[0] > tokens[3] > tokens[2]
    assert tokens[0] > tokens[1] > tokens[2]


def test_chat(paths: tuple[Path, Path], tmp_path: Path) -> None:
    from PIL import Image

    missing = tmp_path / ("long" * 30) / "[/red].png"
    Image.new("RGB", (60, 30), "green").save(tmp_path / "green.png")
    lines = ["hello", f"/image {missing}", "/image", "/foo bar", f"/image {tmp_path / 'green.png'}", "look", "x" * 5000,
             "\udcff", "again", "/reset", "/quit"]
    done = run_process("chat", paths[1], "--max-new-tokens", 3, stdin="\n".join(lines) + "\n")
    assert done.returncode == 0, done.stderr
    errors = done.stderr.splitlines()[1:]
    for error, found in zip(errors, (
        f"error: {missing} cannot be read: No such file or directory", "error: /image needs the name of a file",
        "error: there is no command /foo: /help lists them", "the model's context is 4096",
        "no Unicode character",
    ), strict=True):
        assert found in error


def test_inspect(paths: tuple[Path, Path]) -> None:
    for path in paths:
        document = json.loads(run("inspect", path, "--json").stdout)
        assert document["facts"]["total"] > document["facts"]["active"]
        assert document["files"]
        table = run_process("inspect", path)
        assert "top-1, plus a shared one" in table.stdout
        for shown in (document["fingerprint"], str(path)):
            assert shown in table.stdout, "whole, however wide"
    assert (document["format"], document["graphs"]["decoder"]) == (3, "decoder.onnx")


def test_verify(paths: tuple[Path, Path]) -> None:
    checkpoint, bundle = paths
    document = json.loads(run_process("verify", bundle, checkpoint, "--tokens", 40, "--json").stdout)
    assert document["passed"]
    assert document["max_difference"] < 1e-4
    assert document["top1_agreement"] == 1
    failed = run("verify", bundle, checkpoint, "--bound", 1e-12)
    assert failed.returncode == 1
    assert "the bound is 1e-12" in failed.stderr
    judged = run("verify", bundle, checkpoint, "--tokens", 9, "--max-kl", 0, "--min-top1", 1, "--json")
    assert "the mean KL divergence is" in judged.stderr
    assert json.loads(judged.stdout)["bounds"] == {"difference": 1e-3, "kl": 0, "top1": 1}


def test_verify_finds_a_wrong_weight(paths: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, bundle = paths
    for path in checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.2.self_attn.v_proj.weight"))
    weights[name] = weights[name] + 0.05
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert run("verify", bundle, tmp_path).returncode == 1


def _file(path: Path, content: str = "not a picture") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _altered(bundle: Path, copy: Path, **text: object) -> Path:
    """A copy of a bundle whose manifest has another configuration."""
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["config"]["text"] |= text
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def one_error(done: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """The error line, which has to be all that a failed command says."""
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stdout == ""
    return done.stderr


WRONG = {
    "missing checkpoint": (lambda c, b, t: ("build", t / "none", "-o", t / "out"), "none does not exist"),
    "empty checkpoint": (lambda c, b, t: ("build", t, "-o", t / "out"), "neither config.json nor params.json"),
    "bundle as checkpoint": (lambda c, b, t: ("build", b, "-o", t / "out"), "is a bundle: give the checkpoint"),
    "unknown target": (lambda c, b, t: ("build", c, "-o", t / "out", "--target", "abacus"), "no target is called"),
    "unknown recipe": (lambda c, b, t: ("build", c, "-o", t / "out", "--recipe", "int3"), "has no recipe 'int3'"),
    "output exists": (lambda c, b, t: ("build", c, "-o", b), "exists already"),
    "output is input": (lambda c, b, t: ("build", c, "-o", c, "--overwrite"), "overlaps the input"),
    "output holds input": (lambda c, b, t: ("build", c, "-o", c.parent, "--overwrite"), "overlaps the input"),
    "output in input": (lambda c, b, t: ("build", c, "-o", c / "out"), "overlaps the input"),
    "foreign output": (lambda c, b, t: ("build", c, "-o", _file(t / "home" / "a").parent, "--overwrite"),
                       "home has no manifest.json"),
    "nameless output": (lambda c, b, t: ("build", c, "-o", ""), "the output is the current directory"),
    "not a bundle": (lambda c, b, t: ("generate", c, "-p", "x"), "is a checkpoint: not a herdgraph bundle"),
    "no bundle": (lambda c, b, t: ("generate", t / "none", "-p", "x"), "none does not exist"),
    "other bundle": (lambda c, b, t: ("generate", _altered(b, t / "b", num_kv_heads=1), "-p", "x"),
                     "has cache blocks of [8192] bytes, the manifest's configuration gives one of [4096, 2048, 1280]"),
    "other depth": (lambda c, b, t: ("generate", _altered(b, t / "b", num_layers=2, rope_layers=[True] * 2,
                                                          chunked_layers=[True] * 2, moe_layers=[1]), "-p", "x"),
                    "takes 8 caches, the manifest's configuration gives 4"),
    "empty prompt": (lambda c, b, t: ("generate", b, "-p", " "), "the prompt is empty"),
    "empty raw prompt": (lambda c, b, t: ("generate", b, "--raw", "-p", ""), "the prompt is empty"),
    "half a character": (lambda c, b, t: ("generate", b, "-p", "\udcff"), "give it in UTF-8"),
    "no temperature": (lambda c, b, t: ("generate", b, "-p", "x", "--temperature", "1e-320"), "temperature is 1e-320"),
    "missing image": (lambda c, b, t: ("generate", b, "-p", "x", "--image", t / "none.png"), "none.png"),
    "not an image": (lambda c, b, t: ("generate", b, "-p", "x", "--image", _file(t / "[/red].png")), "[/red].png"),
    "endless image": (lambda c, b, t: ("generate", b, "-p", "x", "--image", _fifo(t / "f")), "is not a regular file"),
    "missing video": (lambda c, b, t: ("generate", b, "-p", "x", "--video", t / "none.mp4"), "none.mp4 cannot be read"),
    "not a video": (lambda c, b, t: ("generate", b, "-p", "x", "--video", _file(t / "a.mp4")), "a.mp4 is not a video"),
    "raw video": (lambda c, b, t: ("generate", b, "--raw", "x", "--video", "a.mp4"), "a video is shown through the"),
    "frames": (lambda c, b, t: ("generate", b, "x", "--video", "a.mp4", "--video-frames", 999), "within 1 and 256"),
    "long prompt": (lambda c, b, t: ("generate", b, "--raw", "-p", "x" * 5000), "4096"),
    "inspect nothing": (lambda c, b, t: ("inspect", t / "none"), "none does not exist"),
    "chat without template": (lambda c, b, t: ("chat", _bare(b, t / "bare")), "has no tokenizer.json"),
    "chat without text": (lambda c, b, t: ("chat", b, "--system", "\udcff"), "give it in UTF-8"),
    "verify too long": (lambda c, b, t: ("verify", b, c, "--tokens", "99999"), "more than the context of 4096"),
    "verify an image": (lambda c, b, t: ("verify", b, c, "--image", "x.png"), "--image needs a prompt"),
    "calibrate nothing": (lambda c, b, t: ("calibrate", t / "none", "-o", t / "out"), "none does not exist"),
    "calibrate over": (lambda c, b, t: ("calibrate", c, "-o", b, *_text(t)), "bundle exists already"),
    "calibrate over another": (lambda c, b, t: ("calibrate", c, "-o", b, "--overwrite", *_text(t)),
                               "bundle has no calibration.json"),
    "calibrate in place": (lambda c, b, t: ("calibrate", c, "-o", c, "--overwrite", *_text(t)), "overlaps the input"),
    "calibrate on nothing": (lambda c, b, t: ("calibrate", c, "-o", t / "out", "--data", t / "none.txt"),
                             "none.txt does not exist"),
    "calibrate on too little": (lambda c, b, t: ("calibrate", c, "-o", t / "out", *_text(t, "moo")),
                                "fewer than 16 tokens"),
    "calibrate on no JSON": (lambda c, b, t: ("calibrate", c, "-o", t / "out", "--data", _file(t / "a.jsonl")),
                             "a.jsonl line 1 cannot be read as JSON"),
    "calibrate on a broken picture": (lambda c, b, t: ("calibrate", c, "-o", t / "out", "--data", _file(t / "a.png")),
                                      "a.png is not an image"),
    "import no scales": (lambda c, b, t: ("calibrate", c, "-o", t / "out", "--import-scales"),
                         "carries no scales of inputs"),
    "FP8 without calibration": (lambda c, b, t: ("build", c, "-o", t / "out", "--recipe", "fp8"),
                                "pass --calibration DIRECTORY"),
    "upcycle nothing": (lambda c, b, t: ("upcycle", t / "none", "-o", t / "out"), "none does not exist"),
    "upcycle in place": (lambda c, b, t: ("upcycle", c, "-o", c, "--overwrite"), "overlaps the input"),
    "upcycle a herd": (lambda c, b, t: ("upcycle", c, "-o", t / "out"), "model_type is 'llama4'"),
}


def _text(directory: Path, content: str = "A herd of words. " * 80) -> tuple[str, Path]:
    return "--data", _file(directory / "text.txt", content)


def _bare(bundle: Path, copy: Path) -> Path:
    """A copy of a bundle without processor files."""
    shutil.copytree(bundle, copy)
    shutil.rmtree(copy / "processor")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"] = {name: file for name, file in manifest["files"].items() if not name.startswith("processor/")}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_one_line(case: str, paths: tuple[Path, Path], tmp_path: Path) -> None:
    arguments, message = WRONG[case]
    assert message in one_error(run(*arguments(*paths, tmp_path)))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


def test_an_output_that_turns_out_unwritable_follows_the_plan(paths: tuple[Path, Path]) -> None:
    done = run("build", paths[0], "-o", "/proc/none/out")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: cannot write to /proc/none: ")
    assert all(done.stderr.splitlines())


@pytest.mark.parametrize(("arguments", "message"), [
    (("--max-new-tokens", "many"), "'many' is not a valid integer"),
    (("--max-new-tokens", "0"), "0 is not in the range x>=1"),
    (("--temperature", "-1"), "-1.0 is not in the range x>=0"),
    (("--seed", "-1"), "-1 is not in the range x>=0"),
    (("--threads", "100000"), "100000 is not in the range 1<=x<=1024"),
    (("--colour", "red"), "No such option"),
])
def test_wrong_usage_is_one_line(arguments: tuple[str, ...], message: str, paths: tuple[Path, Path]) -> None:
    assert message in one_error(run("generate", paths[1], "-p", "x", *arguments), status=2)


def test_dry_run(paths: tuple[Path, Path], tmp_path: Path) -> None:
    for target in ("cpu", "cpu-stock"):
        done = run("build", paths[0], "-o", tmp_path / "out", "--target", target, "--dry-run", "--json")
        plan = json.loads(done.stdout)
        filled_up = plan["bundle_bytes"] - 4 * plan["parameters"]
        assert 0 < filled_up < 0.2 * plan["bundle_bytes"] if target == "cpu" else filled_up == 0, "whole tiles"
        assert done.stderr == ""
    assert not (tmp_path / "out").exists()
    warned = run("build", paths[0], "-o", paths[1], "--dry-run")
    assert warned.returncode == 0
    assert "peak memory" in warned.stdout
    assert warned.stderr == f"warning: {paths[1]} exists already: choose another output or pass --overwrite\n"


def test_a_plan_does_not_need_a_reader(small: Path, tmp_path: Path) -> None:
    output = tmp_path / "[red]out[/red]"
    done = run_process("build", small, "-o", output)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0] == "build plan"
    assert lines[-1].startswith(f"built {output} (")
    assert all(lines), "no line is empty"


def test_calibrate(paths: tuple[Path, Path], tmp_path: Path) -> None:
    from PIL import Image

    data = _text(tmp_path)
    Image.new("RGB", (60, 30), "green").save(tmp_path / "green.png")
    done = run_process("calibrate", paths[0], "-o", tmp_path / "out", *data, "--data", tmp_path / "green.png")
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"wrote {tmp_path / 'out'}; open {tmp_path / 'out' / 'report.html'}\n"
    for shown in (" tokens, 3 image tiles", "tokens from the router", "KL ", "nothing beyond the recipe"):
        assert shown in done.stdout
    command = [sys.executable, "-m", "herdgraph.calibration", paths[0], "-o", tmp_path / "again", *data, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert document["high_precision_parts"] == ["vision_model", "multi_modal_projector"]
    assert done.stderr.count("\n") == 1, "the warning that there were no pictures"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "green.png", "out", "text.txt"]
    few = one_error(run("calibrate", paths[0], "-o", tmp_path / "few", *data, "--under-covered", "fail",
                        "--min-tokens", 5000))
    assert "8 experts got fewer than 5000 tokens from the router: layer 1 expert 0" in few
    assert not (tmp_path / "few").exists()


def test_upcycle_says_one_line(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(tmp_path / "dense")
    done = run_process("upcycle", tmp_path / "dense", "-o", tmp_path / "out", "--experts", 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(f"wrote {tmp_path / 'out'}: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert "overlaps" in one_error(run("upcycle", tmp_path / "dense", "-o", tmp_path, "--overwrite"))
    assert "free: choose another" in one_error(run("upcycle", tmp_path / "dense", "-o", tmp_path / "x", "--experts",
                                                   10**12))


def test_a_full_standard_output_is_one_line(paths: tuple[Path, Path]) -> None:
    for arguments in (("--help",), ("inspect", paths[0]), ("inspect", paths[0], "--json")):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run([sys.executable, "-m", "herdgraph", *map(str, arguments)], check=False, text=True,
                                  stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 1
        assert done.stderr == "error: input or output failed: No space left on device\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_nothing_behind(number: signal.Signals, paths: tuple[Path, Path], tmp_path: Path) -> None:
    # Whoever runs the tests may ignore signals (nohup, a background job); a child would inherit that.
    process = subprocess.Popen([sys.executable, "-m", "herdgraph", "build", paths[0], "-o", tmp_path / "out"],
                               stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))  # noqa: PLW1509
    while not any(tmp_path.glob(".out.*.partial")):  # before that, a file is written to see how fast the disk is
        time.sleep(0.01)
        assert process.poll() is None
    time.sleep(0.1)  # beyond the instant between making the directory and guarding it
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 128 + number
    assert said.splitlines()[-1] == "error: interrupted; no incomplete out was left behind"
    assert not any(tmp_path.iterdir())


def test_an_interrupted_reader_promises_nothing(paths: tuple[Path, Path]) -> None:
    process = subprocess.Popen([sys.executable, "-m", "herdgraph", "chat", paths[1]], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.read(2) == "> "
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[1].endswith("error: interrupted\n")
    assert process.returncode == 143


def test_what_the_caller_ignores_stays_ignored(small: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "herdgraph", "build", small, "-o", tmp_path / "out"]
    process = subprocess.Popen(["nohup", *command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while not any(tmp_path.iterdir()):
        time.sleep(0.01)
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 0
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_running_out_of_memory_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from herdgraph.console import run_cli

    with pytest.raises(SystemExit):
        run_cli(lambda: torch.empty(1 << 60))
    assert capsys.readouterr().err == "error: out of memory: close other programs or use a smaller model\n"
    with pytest.raises(RuntimeError, match="boom"):
        run_cli(lambda: exec('raise RuntimeError("boom")'))


def test_an_interruption_that_a_library_swallows_is_still_one(capsys: pytest.CaptureFixture[str]) -> None:
    from herdgraph.console import Interrupted, run_cli

    def run() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except Interrupted as error:
            raise RuntimeError("the export failed") from error

    with pytest.raises(SystemExit) as ended:
        run_cli(run)
    assert ended.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "error: interrupted\n"
