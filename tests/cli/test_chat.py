"""Chat: commands, files by any spelling, and on a real terminal pasted paragraphs and Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from herdgraph.cli.chat_input import first_word
from herdgraph.model.config.presets import TINY
from support import clips
from support.command_line import run
from support.scripted_server import ScriptedServer, begun


@pytest.mark.parametrize(("text", "word", "rest"), [
    ("a.png", "a.png", ""), ("a.png What's it?", "a.png", "What's it?"), ("'a b.png' What?", "a b.png", "What?"),
    (r"a\ b.png", "a b.png", ""), ("it's.png", "it's.png", ""), ("#1.png", "#1.png", ""), ("", "", ""),
])
def test_first_word(text: str, word: str, rest: str) -> None:
    assert first_word(text) == (word, rest)


def test_what_was_said_is_saved(paths: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are found by ~, quotes and escaped blanks; the file is what the engine takes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (30, 30), "green").save(tmp_path / "a b.png")
    said = ["hello", r"/image ~/a\ b.png What's this?", f"/image {tmp_path / 'a b.png'}", "/image '~/a b.png'", "both",
            "/regen", "/save ~/chat.json", "/save ~/chat.json"]
    done = run("chat", paths[1], "--system", "Be brief.", "-n", 3, stdin="\n".join(said))
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["/help lists the commands", "error: ~/chat.json cannot be written: File exists"]
    messages = json.loads((tmp_path / "chat.json").read_text())
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 3]
    parts = [[part.get("path", part.get("text")) for part in messages[at]["content"]] for at in (3, 5)]
    picture = str(tmp_path / "a b.png")
    assert parts == [[picture, "What's this?"], [picture, picture, "both"]]


def test_a_video_is_saved_by_name_and_frames(paths: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(clips.animation(clips.frames(), kind="gif"))
    said = [f"/video {tmp_path / 'a.gif'} What happens?", "/video", f"/save {tmp_path / 'chat.json'}"]
    done = run("chat", paths[1], "--video-frames", 2, "-n", 3, stdin="\n".join(said))
    assert done.stderr.splitlines()[1:] == ["error: /video needs the name of a file: /video FILE"]
    shown = json.loads((tmp_path / "chat.json").read_text())[0]["content"][0]
    assert shown == {"type": "video", "path": str(tmp_path / "a.gif"), "max_frames": 2}


def test_options_are_set(paths: tuple[Path, Path]) -> None:
    said = ["/set max-new-tokens 2", "/set temperature 0.5", "/set temperature", "/set stop '. '", "/set",
            "/set top-p 3", "/set colour red", "/set top-k many", "/set stop-id 5", "/regen", "/help"]
    done = run("chat", paths[1], stdin="\n".join(said))
    shown = dict(line.split("  ", 1) for line in done.stderr.splitlines() if "  " in line)
    assert shown["max-new-tokens"].strip() == "2"
    assert shown["temperature"].strip() == "greedy"
    assert shown["stop"].strip() == "'. '"
    for message in ("top-p cannot be '3'", "top-k cannot be 'many': 'many' is not a valid integer",
                    "there is no option colour: max-new-tokens, ", "nothing was answered yet", "/save FILE"):
        assert message in done.stderr


def test_raw_messages_continue_one_text(paths: tuple[Path, Path], tmp_path: Path) -> None:
    done = run("chat", paths[1], "--raw", "-n", 4, stdin=f"Once\nupon\n/image x.png\n/save {tmp_path / 'story.txt'}")
    story = (tmp_path / "story.txt").read_text()
    first = json.loads(run("generate", paths[1], "--raw", "Once", "-n", 4, "--json").stdout)["text"]
    assert story.startswith(f"Once{first}upon")
    assert "with --raw there are no messages" in done.stderr


class Terminal:
    """A command on a pseudo-terminal of its own."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self._end, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "herdgraph", *map(str, arguments)], stdin=other, stdout=other, stderr=other,
            env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **environment},
            preexec_fn=_own_terminal)  # noqa: PLW1509
        os.close(other)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)

    def type(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def until(self, text: str, seconds: float = 20) -> str:
        """What is shown up to a text."""
        shown, ends = b"", time.monotonic() + seconds
        while text.encode() not in shown:
            assert time.monotonic() < ends, shown
            if select.select([self._end], [], [], 0.1)[0]:
                shown += os.read(self._end, 1 << 16)
        return shown.decode(errors="replace")

    def more(self) -> None:
        """Wait until anything further is shown."""
        assert select.select([self._end], [], [], 20)[0]
        os.read(self._end, 1 << 16)


def _own_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_paste_and_interrupt_on_a_terminal(paths: tuple[Path, Path], tmp_path: Path) -> None:
    """A pasted paragraph is one message; Ctrl-C stops its answer, which stays, and then clears a line."""
    ready = "\x1b[?2004h"  # bracketed paste is on: a line is read
    # The image token is never chosen: the answer goes on for seconds.
    with Terminal("chat", paths[1], "-n", 4000, "--stop-id", TINY.image_token_id, XDG_STATE_HOME=str(tmp_path)) as chat:
        chat.until(ready)
        chat.type("\x1b[200~one\ntwo\x1b[201~\r")
        chat.until("\x1b[?2004l")
        chat.more()
        chat.type("\x03")
        assert " tokens/s, stopped by Ctrl-C" in chat.until(ready)
        chat.type(f"nonsense\x03/save {tmp_path / 'chat.json'}\r")
        assert "saved as" in chat.until(ready)
        chat.type("\x04")
        assert chat.process.wait(10) == 0
    question, answer = json.loads((tmp_path / "chat.json").read_text())
    assert question["content"] == "one\ntwo"
    assert answer["role"] == "assistant"
    history = tmp_path / "herdgraph" / "chat_history"
    assert "+one\n+two\n" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_interrupt_of_a_server_that_says_nothing(tmp_path: Path) -> None:
    """Ctrl-C closes the connection, what came stays, and the chat goes on."""
    ready, over = "\x1b[?2004h", threading.Event()
    with ScriptedServer([begun("He\x1b[2Jllo")], then=lambda: over.wait(20)) as server, \
            Terminal("chat", "--url", server.url, XDG_STATE_HOME=str(tmp_path)) as chat:
        chat.until(ready)
        chat.type("Hi\r")
        chat.until("He\N{REPLACEMENT CHARACTER}[2Jllo")
        chat.type("\x03")
        assert " tokens/s, stopped by Ctrl-C" in chat.until(ready, 5)
        chat.type(f"/save {tmp_path / 'chat.json'}\r")
        chat.until("saved as")
        over.set()
    assert [said["content"] for said in json.loads((tmp_path / "chat.json").read_text())] == ["Hi", "He\x1b[2Jllo"]
