"""Prompts in every spelling, options that reach the engine alike, and what is refused before anything is loaded."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from herdgraph.cli import answers
from herdgraph.model.config.presets import TINY
from herdgraph.runtimes.bundle.manifest import MANIFEST, Manifest, describe_files
from herdgraph.runtimes.generation import Generation, Timings
from herdgraph.runtimes.server import replicas
from support.command_line import run


class Recorder:
    """Stands in for an engine and for a cluster; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, dict[str, Any]]] = []

    def stream(self, prompt: Any, **options: Any) -> Any:
        self.asked.append((prompt, options))
        return _Answer()

    def generate_all(self, prompts: list[Any], **options: Any) -> list[Generation]:
        self.asked += [(prompt, options) for prompt in prompts]
        return [Generation(f"answer {number}") for number, _ in enumerate(prompts, 1)]

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Answer:
    result = Generation("moo", timings=Timings(1, 0, 1, 1.0, 1.0))

    def __iter__(self) -> Any:
        return iter(["moo"])


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    sequence = SimpleNamespace(stopped_by=lambda _: nullcontext())
    recorder.config, recorder.new_sequence = TINY, lambda: sequence  # type: ignore[attr-defined]
    recorder.processor = SimpleNamespace(prepare=lambda prompt: None)  # type: ignore[attr-defined]
    monkeypatch.setattr("herdgraph.cli.source.load_engine", lambda *_: recorder)
    monkeypatch.setattr(replicas, "Cluster", lambda *_: recorder)
    return recorder


SAID = [{"role": "user", "content": "Hi"}]


def test_prompts_in_every_spelling(engine: Recorder, tmp_path: Path) -> None:
    (tmp_path / "hi.txt").write_text("Hi\n")
    for words, stdin in (["Hi"], ""), (["-p", "Hi"], ""), (["-f", tmp_path / "hi.txt"], ""), (["-"], "Hi\n"), (
            ["-p", "-"], "Hi"), (["-f", "-"], "Hi\r\n"):
        assert run("generate", "bundle", *words, stdin=stdin).stdout == "moo\n"
    assert [prompt for prompt, _ in engine.asked] == [SAID] * 6
    engine.asked.clear()
    done = run("run", "bundle", "Hi", "-", "-p", "Hi", "-f", tmp_path / "hi.txt", stdin="Hi")
    assert [prompt for prompt, _ in engine.asked] == [SAID] * 4
    assert done.stdout.startswith("> Hi\nanswer 1\n\n> Hi\nanswer 2\n")


OPTIONS = {
    "-n": ("max_new_tokens", 7), "--temperature": ("temperature", 0.5), "--top-p": ("top_p", 0.9),
    "--top-k": ("top_k", 3), "--min-p": ("min_p", 0.1), "--repetition-penalty": ("repetition_penalty", 1.2),
    "--seed": ("seed", 1), "--stop": ("stop", ("x",)), "--stop-id": ("stop_ids", (5,)),
}


@pytest.mark.parametrize("verb", ["generate", "chat", "run"])
def test_sampling_options_reach_the_engine_alike(verb: str, engine: Recorder) -> None:
    """What is not given is not passed: the checkpoint's recommendation holds."""
    words, stdin = ([], "Hi\n") if verb == "chat" else (["Hi"], "")
    given = [word for option, (_, value) in OPTIONS.items()
             for word in (option, value[0] if isinstance(value, tuple) else value)]
    run(verb, "bundle", *words, stdin=stdin)
    run(verb, "bundle", *words, *given, "--system", "Be brief.", stdin=stdin)
    run(verb, "bundle", *words, "--raw", stdin=stdin)
    asked = [(prompt, {name: value for name, value in options.items() if name != "sequence" and value is not None})
             for prompt, options in engine.asked]
    system = {"role": "system", "content": "Be brief."}
    assert asked == [(SAID, {"max_new_tokens": 256}), ([system, *SAID], dict(OPTIONS.values())),
                     ("Hi", {"max_new_tokens": 256})]


def test_logprobs(paths: tuple[Path, Path]) -> None:
    document = json.loads(run("generate", paths[1], "Hi", "-n", 2, "--logprobs", 3, "--json").stdout)
    assert [len(entry["top"]) for entry in document["logprobs"]] == [3] * len(document["token_ids"])
    assert "--logprobs are shown in JSON only" in run("generate", paths[1], "Hi", "--logprobs", 3).stderr


@pytest.fixture
def text_bundle(tmp_path: Path) -> Path:
    """The manifest of a model without images; nothing that could run."""
    (tmp_path / "decoder.onnx").write_bytes(b"")
    manifest = Manifest(target="cpu", executor="onnxruntime", provider="", recipe="fp32", active_bytes=1,
                        config=replace(TINY, vision=None), graphs={"decoder": "decoder.onnx"},
                        files=describe_files(tmp_path))
    (tmp_path / MANIFEST).write_text(json.dumps(manifest.to_json()))
    return tmp_path


@pytest.mark.parametrize("words", [("generate", "Hi"), ("run", "Hi"), ("chat",)])
def test_a_text_model_refuses_pictures_before_it_loads(words: tuple[str, ...], text_bundle: Path) -> None:
    for shown in ("--image", "--video"):
        done = run(words[0], text_bundle, *words[1:], shown, "none.png")
        assert (done.returncode, done.stderr) == (1, "error: this model reads text only, images were given\n")


@pytest.mark.parametrize(("words", "stdin", "message"), [
    (["generate"], "", "No prompt was given: give PROMPT, -p PROMPT, -f FILE, or - for standard input"),
    (["run"], "", "No prompt was given"),
    (["generate", "Hi", "-p", "Hi"], "", "2 prompts were given, one is needed"),
    (["generate", "-p", "Hi", "-f", "x"], "", "2 prompts were given"),
    (["run", "-", "-f", "-"], "", "Standard input can be read once"),
    (["generate", "-"], b"\xff", "standard input is not UTF-8 text (byte 0)"),
    (["generate", "-f", "/none.txt"], "", "/none.txt cannot be read: No such file"),
    (["generate", "-f", "/dev/zero"], "", "/dev/zero is not a regular file"),
    (["generate", "Hi", "--raw", "--system", "x"], "", "--system is said through the chat template"),
])
def test_wrong_prompts_are_one_line(words: list[str], stdin: str | bytes, message: str) -> None:
    done = run(words[0], "bundle", *words[1:], stdin=stdin)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.returncode in (1, 2)


def test_a_terminal_gets_no_escape_sequences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    text = "\x1b]0;title\x07 \x9b2J\x1b[2J a\tb\n"
    answers.print_stream([text])
    assert capsys.readouterr().out == f"{text}\n", "a pipe gets what was said"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    answers.print_stream([text])
    assert capsys.readouterr().out == "�]0;title� �2J�[2J a\tb\n\n"
