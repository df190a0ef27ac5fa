"""What a run begins with: names, directories, and configurations alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from herdgraph.errors import HerdError
from herdgraph.model.checkpoint import CALF
from herdgraph.model.config import read_config, to_hf
from herdgraph.model.config.presets import TINY
from herdgraph.model.llama4.initialization import EMBEDDING_STD
from herdgraph.model.training.data import Encoder
from herdgraph.model.training.runs import start
from herdgraph.model.training.runs.start import open_model, start_of


def test_the_calf_by_its_name(tmp_path: Path) -> None:
    found = start_of(Path("calf"), tmp_path, fresh=False)
    assert (found.files, found.fresh) == (CALF, False)


@pytest.mark.parametrize("name", ["tiny", "tiny-text", "small.json"])
def test_a_configuration_alone_gets_random_weights_and_the_calfs_tokenizer(name: str, tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text(json.dumps(to_hf(TINY)))
    checkpoint = tmp_path / name if name.endswith(".json") else Path(name)
    found = start_of(checkpoint, tmp_path / "run", fresh=False)
    assert (found.files, found.fresh) == (tmp_path / "run" / "start", True)
    model = found.model(seed=0)
    assert float(model.decoder.embed_tokens.weight.detach().std()) == pytest.approx(EMBEDDING_STD, rel=0.02)
    config = model.config
    assert config.text.hidden_size == TINY.text.hidden_size
    assert config.text.vocab_size == read_config(CALF).text.vocab_size
    assert len(Encoder(found.files, config, max_tokens=16).processor.tokenizer.encode("The herd grazes.")) > 2


def test_a_tokenizer_beside_a_configuration_is_the_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(to_hf(TINY)))
    (tmp_path / "tokenizer.json").write_bytes((CALF / "tokenizer.json").read_bytes())
    found = start_of(tmp_path / "config.json", tmp_path / "run", fresh=False)
    assert read_config(found.files).text.vocab_size == TINY.text.vocab_size


def test_what_is_none_of_them_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    for given, problem in ((tmp_path / "none", "does not exist"), (tmp_path / "a.txt", "is not a directory")):
        with pytest.raises(HerdError, match=f"{problem}: give a checkpoint directory, a config.json, or one of calf, "):
            start_of(given, tmp_path, fresh=False)


def test_a_model_that_is_larger_than_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start.os, "sysconf", lambda _: 100)
    with pytest.raises(HerdError, match=r"parameters, in float32 17\.\d MB, and this machine 10\.0 kB of memory"):
        open_model(Path("calf"))
