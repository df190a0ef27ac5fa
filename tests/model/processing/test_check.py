"""A checkpoint's processor is tried before hours of building."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from herdgraph.errors import HerdError
from herdgraph.model.config import HerdConfig
from herdgraph.model.config.presets import TINY
from herdgraph.model.processing import check_processor
from support import herds


def test_good_processors(tmp_path: Path) -> None:
    check_processor(tmp_path, TINY)
    herds.write_processor(tmp_path)
    check_processor(tmp_path, TINY)
    check_processor(tmp_path, HerdConfig(text=TINY.text))


def _write(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda directory: (directory / name).write_bytes(data)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "tokenizer": (_write("tokenizer.json", b"\x00junk"), "is not a tokenizer.json"),
    "pipe": (lambda path: ((path / "tokenizer.json").unlink(), os.mkfifo(path / "tokenizer.json")), "not a regular"),
    "bos": (_write("tokenizer_config.json", '{"bos_token": [1]}'), r"has bos_token \[1\], a text is needed"),
    "bos content": (_write("tokenizer_config.json", '{"bos_token": {"content": 5}}'), "has bos_token"),
    "pad": (_write("tokenizer_config.json", '{"pad_token": [1]}'), r"has pad_token \[1\]"),
    "template": (_write("chat_template.jinja", "{% for %}"), "cannot be parsed"),
    "costly template": (_write("chat_template.jinja", "{{ 'a' * 10**9 }}"), "a text of 1000000000 characters"),
    "names of templates": (_write("chat_template.json", '{"chat_template": [{"name": [1], "template": 7}]}'), "int as"),
    "stops": (_write("generation_config.json", '{"eos_token_id": [[1]]}'), "eos_token_id"),
    "picture options": (_write("preprocessor_config.json", '{"max_patches": "x"}'), "wrong kind"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_processors(name: str, tmp_path: Path) -> None:
    herds.write_processor(tmp_path)
    breaks, message = BROKEN[name]
    breaks(tmp_path)
    with pytest.raises(HerdError, match=message) as caught:
        check_processor(tmp_path, TINY)
    assert "\n" not in str(caught.value)


def test_processor_of_another_model(tmp_path: Path) -> None:
    herds.write_processor(tmp_path)
    with pytest.raises(HerdError, match="the model's vocabulary has 8: is it this model's tokenizer"):
        check_processor(tmp_path, replace(TINY, text=replace(TINY.text, vocab_size=8)))


def test_named_templates(tmp_path: Path) -> None:
    herds.write_processor(tmp_path)
    named = [{"name": [1], "template": "x"}, {"name": "default", "template": "<|header_start|>"}]
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    check_processor(tmp_path, TINY)
