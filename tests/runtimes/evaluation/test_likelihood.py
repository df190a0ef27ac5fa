"""Log-likelihoods: shared and batched calls give what each text gives alone; texts are divided as lm-eval does it."""

from __future__ import annotations

import numpy as np
import pytest

from herdgraph.errors import HerdError
from herdgraph.runtimes import Engine
from herdgraph.runtimes.evaluation import likelihood
from herdgraph.runtimes.evaluation.likelihood import EncodedPair, Scorer, check_pair, encode_pair


def _alone(engine: Engine, pair: EncodedPair) -> tuple[float, bool]:
    """A pair by a prompt of its own."""
    logits = engine.prefill(engine.new_sequence(), pair.token_ids, all_positions=True)[pair.first - 1 : -1]
    logits = logits.astype(np.float64)
    logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(
        -1, keepdims=True)
    wanted = pair.token_ids[pair.first :]
    return float(logprobs[range(len(wanted)), wanted].sum()), bool((logits.argmax(-1) == wanted).all())


def _groups(seed: int, contexts: list[int], choices: list[int]) -> list[list[EncodedPair]]:
    random = np.random.default_rng(seed)
    groups = []
    for length in contexts:
        context = random.integers(3, 250, length).tolist()
        groups.append([EncodedPair([*context, *random.integers(3, 250, more).tolist()], length) for more in choices])
    return groups


def _check(engine: Engine, groups: list[list[EncodedPair]]) -> None:
    found = Scorer(engine).score(groups)
    for group, scores in zip(groups, found, strict=True):
        for pair, score in zip(group, scores, strict=True):
            total, greedy = _alone(engine, pair)
            assert score.total == pytest.approx(total, abs=1e-4)
            assert (score.greedy, score.tokens) == (greedy, len(pair.token_ids) - pair.first)


def test_choices_of_many_lengths(engine: Engine) -> None:
    _check(engine, _groups(0, [1, 5, 20, 33, 64], [1, 1, 2, 9]))


def test_contexts_that_cross_attention_chunks(engine: Engine) -> None:
    _check(engine, _groups(1, [127, 128, 129, 300], [3, 140]))


def test_choices_that_begin_alike_and_contexts_that_differ(engine: Engine) -> None:
    context = list(range(3, 40))
    same = [EncodedPair([*context, 50, 60, 70], 37), EncodedPair([*context, 50, 60], 37),
            EncodedPair([*context, 50, 60, 71, 72], 37), EncodedPair([*context, 50, 60, 70], 37)]
    other = [EncodedPair([9, *context, 50], 30), EncodedPair([8, *context, 50], 31)]
    _check(engine, [same, other])


def test_examples_before_every_question_are_computed_once(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = np.random.default_rng(2).integers(3, 250, 150).tolist()
    groups = [[EncodedPair([*examples, *pair.token_ids], 150 + pair.first) for pair in group]
              for group in _groups(3, [4, 6, 8], [2, 3])]
    prefilled: list[int] = []
    prefill = engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda sequence, ids: prefilled.append(len(ids)) or prefill(sequence, ids))
    found = Scorer(engine).score(groups)
    assert prefilled == [150]
    monkeypatch.undo()
    assert found[2][1].total == pytest.approx(_alone(engine, groups[2][1])[0], abs=1e-4)


def test_rows_of_a_large_vocabulary_come_in_parts(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "ROWS_BYTES", 1)
    scorer = Scorer(engine)
    rows, step = [], engine.runner.step
    monkeypatch.setattr(engine.runner, "step",
                        lambda steps: rows.append(sum(len(one.rows) for one in steps)) or step(steps))
    groups = _groups(4, [10, 12], [50, 3])
    found = scorer.score(groups)
    assert max(rows) == 16
    monkeypatch.undo()
    assert found[0][0].total == pytest.approx(_alone(engine, groups[0][0])[0], abs=1e-4)


def test_memory_is_given_back(engine: Engine) -> None:
    pools = engine.runner.pools
    assert pools is not None
    before = pools.whole.budget.used
    calls: list[None] = []
    Scorer(engine).score(_groups(5, [30] * 40, [4, 4]), lambda: calls.append(None))
    assert pools.whole.budget.used == before
    assert len(calls) == 40


def test_the_continuation_begins_where_the_context_alone_ends(engine: Engine) -> None:
    tokenizer = engine.processor.tokenizer
    assert encode_pair(tokenizer, "The cow", " says moo") == (tokenizer.encode("The cow says moo"), 7)
    assert encode_pair(tokenizer, "The cow ", "says") == encode_pair(tokenizer, "The cow", " says")


def test_what_stands_before_an_empty_context(engine: Engine) -> None:
    tokenizer = engine.processor.tokenizer
    assert encode_pair(tokenizer, "", "moo") == ([tokenizer.bos_id, *tokenizer.encode("moo")], 1)
    with pytest.raises(HerdError, match="a continuation is empty"):
        encode_pair(tokenizer, "moo", "")


def test_pairs_that_the_model_cannot_read(engine: Engine) -> None:
    context = engine.config.text.max_position_embeddings
    with pytest.raises(HerdError, match=f"question 7 has {context + 1} tokens, the model's context is {context}"):
        check_pair(engine.config, EncodedPair([3] * (context + 1), 1), "question 7")
    with pytest.raises(HerdError, match="question 7 has token 512, which is no text of this model's vocabulary"):
        check_pair(engine.config, EncodedPair([3, 512], 1), "question 7")
    with pytest.raises(HerdError, match="which is no text"):
        check_pair(engine.config, EncodedPair([3, engine.config.image_token_id], 1), "a request")
