"""The benchmarks of accuracy on a tiny model: answers are kept, and long prompts do not depend on how they are cut."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import dithered
from benchmarks.retrieval import document, measure
from benchmarks.tasks import Answers, accuracy_table, results
from herdgraph.runtimes import Engine
from herdgraph.runtimes.evaluation.questions import TaskFiles


def test_answers_are_kept(
    chunked_bundle: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    options, files, kept = argparse.Namespace(limit=3, threads=1), TaskFiles(wheel), tmp_path / "answers.json"
    tasks = [files.read(name, options.limit) for name in ("animals", "lambada")]
    found = results(chunked_bundle, tasks, Answers(kept), options)
    monkeypatch.setattr("benchmarks.tasks.Engine", None)
    assert results(chunked_bundle, tasks, Answers(kept), options) == found
    shown = accuracy_table({"one": found, "other": found}, {"one": 1, "other": 1})
    assert [column.header for column in shown.columns] == ["task", "questions", "one", "other"]
    assert "+0.0 % ± 0.0; 0 changed" in next(iter(shown.columns[3].cells))


def test_long_documents_are_read_alike_with_a_shared_past_and_alone(engine: Engine) -> None:
    random = np.random.default_rng(0)
    known = [(f"w{number}", "".join(map(chr, random.integers(97, 123, 20)))) for number in range(100)]
    documents = [document(known, engine.processor.tokenizer, tokens, seed=0) for tokens in (500, 700)]
    found = measure("tiny", engine, documents, alone=3)
    assert (found.questions, found.tokens) == (32, pytest.approx(700, abs=100))
    assert 0 <= found.found <= 1
    assert found.alone < 1e-3, "attention chunks of 128 tokens end at several places of these prompts"


@pytest.mark.parametrize("shape", [(8, 64), (2, 64, 8)], ids=["matrix", "experts"])
def test_dithered_weights_stay_within_their_rounding_intervals(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(0, dithered.VALUES, shape, generator=generator) * 0.25 - 1.5
    moved = dithered.dithered(weight, generator)
    assert torch.equal((moved / 0.25).round() * 0.25, weight)
    assert 0.3 < float((moved - weight).abs().max() / 0.25) <= 0.5
    assert len(moved.unique()) > 500


def test_weights_on_no_grid_are_not_dithered() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dithered.dithered(weight, torch.Generator()), weight)
