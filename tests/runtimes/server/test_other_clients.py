"""Clients that people use, against a real server: litellm, LangChain, lm-eval; and a fuzzer that knows the interface.

They are many packages, so that they have their own extra and target: ``make test-clients``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from herdgraph.runtimes.scheduler import Service

pytestmark = pytest.mark.slow
CHAT: list[Any] = [{"role": "user", "content": "Hello"}]
WEATHER: dict[str, Any] = {"type": "function", "function": {
    "name": "weather", "description": "Weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"enum": ["Ulm", "Bonn"]}}, "required": ["city"]}}}


def _script(code: str, url: str, seconds: int = 240) -> Any:
    """What a program of its own prints as JSON in its last line; these packages change too much of a process."""
    environment = os.environ | {"OPENAI_API_KEY": "none", "URL": f"{url}/v1", "LITELLM_LOCAL_MODEL_COST_MAP": "True",
                                "DISABLE_AIOHTTP_TRANSPORT": "True"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=seconds,
                          env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_litellm(real_url: str) -> None:
    pytest.importorskip("litellm")
    found = _script(f"""
import json, os, litellm
call = dict(model="openai/calf", api_base=os.environ["URL"], messages={CHAT!r}, max_tokens=8, temperature=0)
whole = litellm.completion(**call)
stream = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(stream=True, **call))
tools = litellm.completion(**(call | dict(tools=[{WEATHER!r}], tool_choice="required", max_tokens=60)))
print(json.dumps([whole.choices[0].message.content, stream, whole.usage.completion_tokens,
                  tools.choices[0].message.tool_calls[0].function.name]))
""", real_url)
    assert found[0] == found[1]
    assert found[2:] == [8, "weather"]


def test_langchain(real_url: str) -> None:
    pytest.importorskip("langchain_openai")
    found = _script(f"""
import json, os
from langchain_openai import ChatOpenAI
model = ChatOpenAI(model="calf", base_url=os.environ["URL"], max_tokens=60, temperature=0)
said = model.invoke("Hello").content
streamed = "".join(chunk.content for chunk in model.stream("Hello"))
called = model.bind_tools([{WEATHER!r}], tool_choice="required").invoke("Weather?").tool_calls
schema = dict(title="Place", type="object", properties=dict(city=dict(enum=["Ulm", "Bonn"])), required=["city"],
              additionalProperties=False)
place = model.with_structured_output(schema, method="json_schema").invoke("Where?")
print(json.dumps([said == streamed, called[0]["args"]["city"], place["city"]]))
""", real_url)
    assert found[0] is True
    assert {found[1], found[2]} <= {"Ulm", "Bonn"}


def test_lm_eval_scores_likelihoods_as_the_engine_does(real_url: str, real_service: Service, tmp_path: Path) -> None:
    """A task of its own, from files here: nothing is fetched."""
    pytest.importorskip("lm_eval")
    lines = [{"question": f"Question {number}: the cat sat on the", "choices": [" mat", " dog"], "answer": number % 2}
             for number in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "task.yaml").write_text(f"""
task: offline
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/data.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
""")
    tokenizer = real_service.engine.bundle.processor
    found = _script(f"""
import json, os
import lm_eval
from lm_eval.tasks import TaskManager
arguments = dict(model="calf", base_url=os.environ["URL"] + "/completions", tokenizer="{tokenizer}",
                 tokenizer_backend="huggingface", num_concurrent=4, max_retries=1)
tasks = TaskManager(include_path="{tmp_path}", include_defaults=False)
done = lm_eval.simple_evaluate(model="local-completions", model_args=arguments, tasks=["offline"], task_manager=tasks)
samples = [[float(value[0][0]) for value in sample["resps"]] for sample in done["samples"]["offline"]]
print(json.dumps([done["results"]["offline"]["acc,none"], samples]))
""", real_url)
    engine = real_service.engine
    tokens = engine.processor.tokenizer
    for line, told in zip(lines, found[1], strict=True):
        for choice, value in zip(line["choices"], told, strict=True):  # type: ignore[call-overload]
            context = tokens.encode(str(line["question"]))
            whole = tokens.encode(str(line["question"]) + choice)
            assert value == pytest.approx(_likelihood(real_service, whole, len(context)), abs=1e-3)
    assert 0 <= found[0] <= 1


def _likelihood(service: Service, ids: list[int], first: int) -> float:
    """Log-probability of the tokens from ``first`` on."""
    from herdgraph.model.processing import PreparedPrompt
    from herdgraph.runtimes import Sampling
    from herdgraph.runtimes.generation import StopRule
    from herdgraph.runtimes.scheduler import GenerationRequest

    answer = service.submit(GenerationRequest(request_id="", prompt=PreparedPrompt(ids), sampling=Sampling(),
                                              stop=StopRule(1), prompt_logprobs=0))
    for _ in answer:
        pass
    return sum(entry.logprob for entry in answer.prompt_logprobs[first:] if entry)


def test_a_fuzzer_finds_no_server_error(real_url: str) -> None:
    """schemathesis makes requests from the OpenAPI description, valid ones and others."""
    pytest.importorskip("schemathesis")
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{real_url}/openapi.json", "--checks", "not_a_server_error",
         "--max-examples", "60", "--seed", "1", "--phases", "examples,coverage,fuzzing", "--request-timeout", "60"],
        capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
