"""Every `herdgraph` command of README and docs is run as it stands there, page by page, in the order of the page.

Words in capitals are replaced by small models; options in brackets are left out. In every run each command is parsed;
`make test-slow` runs them.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from herdgraph.model.config.presets import TINY
from herdgraph.model.training.runs import TRAINING_RUNS
from support import clips, herds
from support.command_line import run

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

EXCUSED = {
    "herdgraph build | calibrate": "a list of verbs",
    "herdgraph generate | chat": "a list of verbs",
    "herdgraph COMMAND": "no command by itself",
    "herdgraph -v COMMAND": "no command by itself",
    "herdgraph generate --url": "tests/cli/test_url.py asks servers",
    "herdgraph chat --url": "tests/cli/test_url.py asks servers",
    "herdgraph eval": "tests/cli/test_eval.py asks questions of its own",
    "herdgraph upcycle MODEL.gguf": "make demo runs it on a real file",
    "herdgraph run": "tests/runtimes/server runs replicas on Ray",
    "herdgraph build CHECKPOINT -o bundle/ --recipe int8 --shards tp=2,ep=4,pp=2": "TINY has no heads for 16 ranks",
    "herdgraph build CHECKPOINT -o bundle/ --recipe bf16 --target tensorrt-rtx --shards tp=8": "minutes, and 8 heads",
    "herdgraph build CHECKPOINT -o BUNDLE --target tensorrt-rtx": "tests/export/targets builds plans",
    "herdgraph build CHECKPOINT -o BUNDLE6": "TINY is too small for 6 bits: tests/export/test_allocation",
    "herdgraph inspect BUNDLE --products": "of TensorRT plans: tests/cli",
    "herdgraph serve": "tests/cli starts and ends servers",
    "herdgraph train distil": "tests/model/training/distill trains students",
    "herdgraph train codistil": "tests/model/training/distill trains students",
}
"""Commands that are only parsed, by how they begin, and why."""


def commands_of(page: Path) -> list[str]:
    """The commands of a page: continued lines joined, comments and what may be left out removed."""
    found = []
    for block in re.findall(r"^```(?:bash|console|sh)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.M):
        for line in block.replace("\\\n", " ").splitlines():
            if (command := re.sub(r"\s+#.*", "", line)).startswith(("herdgraph ", "cat ")):
                found.append(re.sub(r"\s+\[.*?\]", "", " ".join(command.split())))
    return found


COMMANDS = [(page, command) for page in PAGES for command in commands_of(page)]


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 30
    assert [begin for begin in EXCUSED if not any(command.startswith(begin) for _, command in COMMANDS)] == []


CLICK = sorted({command for _, command in COMMANDS if not re.search(r"\||COMMAND| train ", command)})
"""Commands that click parses as they stand; tyro parses those of train."""


@pytest.mark.parametrize("command", CLICK)
def test_every_option_exists(command: str) -> None:
    """An option that is gone or misspelt ends the parsing before the help is shown."""
    done = run(*shlex.split(command)[1:], "--help")
    assert done.returncode == 0, done.stderr


def test_every_training_recipe_is_told() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = re.search(r"^\| recipe \| does \|\n(.*?)\n\n", page, re.DOTALL | re.M)
    assert table is not None
    named = {name.replace("_", "-") for name in TRAINING_RUNS}
    assert set(re.findall(r"^\| `(.*?)`", table[1], re.M)) == named
    assert {command.split()[2] for _, command in COMMANDS if command.startswith("herdgraph train ")} <= named


def _write_files(directory: Path) -> None:
    """The files that the pages speak of."""
    herds.save(TINY, directory / "CHECKPOINT")
    herds.write_processor(directory / "CHECKPOINT")
    (directory / "docs" / "pictures").mkdir(parents=True)
    (directory / "pictures").mkdir()
    shutil.copyfile(ROOT / "docs" / "runtime.md", directory / "docs" / "runtime.md")
    for name in ("cow.png", "pictures/a.png"):
        Image.effect_noise((60, 40), 50).convert("RGB").save(directory / name)
    (directory / "cow.mp4").write_bytes(clips.film(clips.frames()))
    rows = [json.dumps({"text": f"The cow {number} says moo."}) for number in range(200)]
    for name in ("texts.jsonl", "corpus.jsonl"):
        (directory / name).write_text("\n".join(rows))
    for name in ("question.txt", "more.txt", "book.txt", "TEXT_FILE"):
        (directory / name).write_text("What is a herd? " * 40)
    for name, source in (("CHECKPOINT_OR_PRESET", "CHECKPOINT"), ("DIR", "CHECKPOINT")):
        (directory / name).symlink_to(source)
    done = run("build", directory / "CHECKPOINT", "-o", directory / "BUNDLE")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=lambda page: page.stem)
def test_commands_of_a_page_work(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in commands_of(page):
        if any(command.startswith(begin) for begin in EXCUSED) or command.startswith("cat "):
            continue
        words = shlex.split(command)[1:]
        if "-o" in words and words[words.index("-o") + 1] == "BUNDLE":
            shutil.rmtree("BUNDLE")
        done = run(*[*words, *(["--train.steps", "4"] if words[0] == "train" and "--help" not in words else [])])
        assert done.returncode == 0, f"{command}: {done.stderr}"
