"""``generation_config.json``: what it says, what it leaves out, what it may not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from herdgraph.errors import HerdError
from herdgraph.model.processing import GenerationDefaults, load_tokenizer
from support import herds


def _read(directory: Path, content: Any) -> GenerationDefaults:
    (directory / "generation_config.json").write_text(json.dumps(content))
    return GenerationDefaults.from_directory(directory)


def test_values(tmp_path: Path) -> None:
    assert GenerationDefaults.from_directory(tmp_path) == GenerationDefaults()
    assert GenerationDefaults().temperature is None
    found = _read(tmp_path, {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "min_p": 0.05,
                             "repetition_penalty": 1, "eos_token_id": [1, 5], "transformers_version": "4"})
    assert found == GenerationDefaults(temperature=0.6, top_p=0.9, top_k=40, min_p=0.05, repetition_penalty=1.0,
                                       eos_ids=(1, 5))
    assert _read(tmp_path, {"do_sample": True}).temperature == 1
    assert _read(tmp_path, {"do_sample": False, "temperature": 0.6, "eos_token_id": 3}) == GenerationDefaults(
        eos_ids=(3,))


@pytest.mark.parametrize(("content", "message"), [
    ({"eos_token_id": [[1]]}, r"has eos_token_id \[\[1\]\], a token id or a list"), ({"eos_token_id": {}}, "eos_token"),
    ({"eos_token_id": [{}]}, "eos_token"), ({"eos_token_id": -1}, "eos_token"), ({"eos_token_id": True}, "eos_token"),
    ({"eos_token_id": "2"}, "eos_token"), ({"eos_token_id": 1.5}, "eos_token"), ({"eos_token_id": [1] * 5000}, "1024"),
    ({"temperature": "hot"}, "has temperature 'hot', a number within 0 and inf is needed"),
    ({"temperature": -1}, "temperature"), ({"temperature": True}, "temperature"), ({"temperature": [1]}, "temperature"),
    ({"top_p": 2}, "within 0 and 1"), ({"min_p": -0.5}, "min_p"), ({"top_k": 1.5}, "top_k"), ({"top_k": -1}, "top_k"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"do_sample": "no"}, "true or false"), ([1], "a JSON object"),
])
def test_refusals(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(HerdError, match=message) as caught:
        _read(tmp_path, content)
    assert "\n" not in str(caught.value)
    herds.write_processor(tmp_path)
    with pytest.raises(HerdError, match=message):
        load_tokenizer(tmp_path)
