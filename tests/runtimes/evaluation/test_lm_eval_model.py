"""The model that lm-eval finds: its log-likelihoods are those of ``herdgraph eval``. `make test-clients` runs this."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from herdgraph.runtimes import Engine
from herdgraph.runtimes.evaluation.accuracy import EncodedTask, evaluate
from herdgraph.runtimes.evaluation.likelihood import EncodedPair, Scorer
from herdgraph.runtimes.evaluation.questions import TaskFiles
from support.request_files import animals, small_wheel

pytestmark = pytest.mark.slow


def _script(code: str) -> Any:
    """What a program of its own prints as JSON in its last line; lm-eval changes too much of a process."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=240,
                          env=os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The questions of ``animals`` as a task of lm-eval: nothing is fetched."""
    directory = tmp_path_factory.mktemp("task")
    rows = [{"question": line["request"]["context"], "choices": line["doc"]["choices"], "answer": line["label"]}
            for line in animals() if line["idx"] == 0 and line["doc_id"] < 1000]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "task.yaml").write_text(f"""
task: offline
dataset_path: json
dataset_kwargs: {{data_files: {{test: {directory}/data.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
""")
    return directory


def test_likelihoods_are_those_of_eval(chunked_bundle: Path, task: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    found = _script(f"""
import json, lm_eval, herdgraph.lm_eval_model
from lm_eval.tasks import TaskManager
done = lm_eval.simple_evaluate(model="herdgraph", model_args=dict(bundle={str(chunked_bundle)!r}, threads=1),
                               tasks=["offline"], task_manager=TaskManager(include_path={str(task)!r},
                                                                           include_defaults=False))
print(json.dumps([done["results"]["offline"]["acc_norm,none"],
                  [[value[0][0] for value in sample["resps"]] for sample in done["samples"]["offline"]]]))
""")
    engine = Engine.load(chunked_bundle, threads=1)
    asked = TaskFiles(small_wheel(tmp_path)).read("animals")
    ours = evaluate(EncodedTask.of(asked, engine.processor.tokenizer, engine.config), Scorer(engine))
    assert found[0] == pytest.approx(ours.accuracy)
    for answer, told in zip(ours.answers, found[1], strict=True):
        assert [float(value) for value in told] == pytest.approx(answer.likelihoods, abs=1e-4)


def test_rolling_windows_and_answers(chunked_bundle: Path) -> None:
    pytest.importorskip("lm_eval")
    text, prompt = "The cow says moo. " * 4, "The cow says"
    found = _script(f"""
import json
from types import SimpleNamespace
from herdgraph.lm_eval_model import HerdgraphModel
model = HerdgraphModel({str(chunked_bundle)!r}, threads=1, max_length=32)
ask = lambda *arguments: [SimpleNamespace(args=arguments)]
print(json.dumps([model.loglikelihood_rolling(ask({text!r}), disable_tqdm=True),
                  model.generate_until(ask({prompt!r}, dict(until=["zzz"], max_gen_toks=8)), disable_tqdm=True),
                  model.apply_chat_template([dict(role="user", content="Moo?")])]))
""")
    engine = Engine.load(chunked_bundle, threads=1)
    ids = engine.processor.tokenizer.encode(text)
    assert len(ids) == 72, "windows of 31 tokens, of which the third is one with more context"
    before = [engine.processor.tokenizer.bos_id, *ids]
    windows = [(before[:32], 1), (before[31:63], 1), (before[41:73], 22)]
    expected = sum(Scorer(engine).score([[EncodedPair(*window)]])[0][0].total for window in windows)
    assert found[0] == [pytest.approx(expected, abs=1e-3)]
    assert found[1] == [engine.generate(prompt, max_new_tokens=8, temperature=0.0).text]
    assert "Moo?" in found[2]
