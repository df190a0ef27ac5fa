"""Pages that are made from the code say what the code says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from herdgraph.export.pipeline import build_bundle
from herdgraph.model.checkpoint import open_checkpoint
from herdgraph.model.config.presets import TINY
from herdgraph.runtimes import Engine
from support import graphs, herds

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("tool", ["structure.py", "passes_table.py", "memory_table.py"])
def test_page_is_up_to_date(tool: str) -> None:
    command = [sys.executable, ROOT / "tools" / tool, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = "model|export|runtimes|calibration|cli|tests|benchmarks|examples|tools|docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_paths_in_pages_exist(page: Path) -> None:
    """A path of this repository that a page names in code is there."""
    named = re.findall(rf"`((?:{FOLDERS})/[\w/.-]+)", page.read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path.rstrip("./")).exists()] == []


def test_links_in_the_readme_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_example_of_a_pass_works() -> None:
    """The pass and the test that docs/add-a-pass-or-target.md shows, run as they stand there."""
    text = (ROOT / "docs" / "add-a-pass-or-target.md").read_text(encoding="utf-8")
    a_pass, its_test = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    package = {"__package__": "herdgraph.export.passes.layout", "np": np, "graphs": graphs}
    exec(compile(a_pass, "add-a-pass-or-target.md", "exec"), package)
    exec(compile(its_test, "add-a-pass-or-target.md", "exec"), package)
    package["test_squares_become_products"]()


def test_the_plain_onnxruntime_program_says_what_the_engine_says(tmp_path: Path) -> None:
    """docs/onnx.md as it stands there, in a process that has nothing of herdgraph, over several chunks."""
    herds.save(TINY, tmp_path / "checkpoint")
    herds.write_processor(tmp_path / "checkpoint")
    with open_checkpoint(tmp_path / "checkpoint") as checkpoint:
        build_bundle(checkpoint, tmp_path / "bundle", target="cpu-stock")
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-I", "program.py", "bundle", "Once upon a time"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with Engine.load(tmp_path / "bundle", threads=1) as engine:
        ids = engine.processor.tokenizer.encode("Once upon a time")
        answer = engine.generate(ids, max_new_tokens=64 - len(ids) + 1, temperature=0)
        assert done.stdout.rstrip("\n") == "Once upon a time" + answer.text
        about = engine._decoder.graph.session.get_modelmeta().custom_metadata_map
    assert about["herdgraph.role"] == "decoder"
    assert json.loads(about["herdgraph.stop_token_ids"]) == sorted(engine.processor.tokenizer.stop_ids)
    assert about["herdgraph.chat_template"] == engine.processor.template.source
