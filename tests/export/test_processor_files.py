"""Tokenizer, template and picture settings are opened before a build, and only what can be used is carried."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from herdgraph.errors import HerdError
from herdgraph.export.pipeline import plan_build
from herdgraph.export.processor_files import check_processor_files, copy_processor_files
from herdgraph.model.checkpoint import Checkpoint
from herdgraph.model.config.presets import TINY
from support import herds


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    (tmp_path / "checkpoint").mkdir()
    herds.write_processor(tmp_path / "checkpoint")
    return Checkpoint(tmp_path / "checkpoint", TINY, {}, [])


def link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "tokenizer binary": (lambda d: (d / "tokenizer.json").write_bytes(bytes(range(256))), "tokenizer.json cannot be"),
    "tokenizer of another kind": (lambda d: (d / "tokenizer.json").write_text("{}"), "is not a tokenizer.json"),
    "password file": (lambda d: link(d / "special_tokens_map.json", "/etc/passwd"), "map.json cannot be"),
    "template endless": (lambda d: link(d / "chat_template.jinja", "/dev/zero"), "jinja is not a regular file"),
    "template binary": (lambda d: (d / "chat_template.jinja").write_bytes(b"\xff"), "jinja cannot be read"),
    "template of no sense": (lambda d: (d / "chat_template.jinja").write_text("{% if %}"), "template"),
    "generation broken": (lambda d: (d / "generation_config.json").write_text("{"), "generation_config.json cannot be"),
    "generation a list": (lambda d: (d / "generation_config.json").write_text("[]"), "holds a list"),
    "processor broken": (lambda d: (d / "preprocessor_config.json").write_text("5"), "holds a int"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_build_does_not_start_with_files_that_cannot_be_used(
    fault: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    damage, message = FAULTS[fault]
    damage(checkpoint.directory)
    with pytest.raises(HerdError, match=message) as caught:
        plan_build(checkpoint, tmp_path / "bundle")
    assert "\n" not in str(caught.value)


def test_whole_files_and_none_at_all_pass(checkpoint: Checkpoint, tmp_path: Path) -> None:
    check_processor_files(checkpoint)
    copy_processor_files(checkpoint, tmp_path / "copied")
    assert {path.name for path in (tmp_path / "copied").iterdir()} == {
        "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"}
    (tmp_path / "empty").mkdir()
    check_processor_files(Checkpoint(tmp_path / "empty", TINY, {}, []))


def test_four_bits_without_a_calibration_are_told(
    checkpoint: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        plan_build(checkpoint, tmp_path / "bundle", recipe="int8")
        assert not caplog.records
        plan_build(checkpoint, tmp_path / "bundle", recipe="int4")
    assert "int4 without Hessians costs perplexity (+22 % instead of +3 % on a small model)" in caplog.text
    assert "`herdgraph calibrate` and pass --calibration" in caplog.text
