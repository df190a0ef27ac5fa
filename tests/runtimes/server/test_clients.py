"""The SDKs of OpenAI and Anthropic against a real server on a real port."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from herdgraph.runtimes.server.app import create_app
from herdgraph.runtimes.server.listen import HttpServer, listening
from herdgraph.runtimes.server.options import ServerOptions
from support.command_line import run
from support.fake_service import FakeEngine, FakeService
from support.fake_toolkit import FakeToolkit

CHAT: Any = [{"role": "user", "content": "Hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
CALLING = 'Look: <weather {"city": "Ulm"}><weather {"city": "Bonn"}>'


@pytest.fixture(scope="module")
def running(fake_engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, FakeService]]:
    """The address of a server, and its service."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    Path(keys).write_text("sk-one alice\n")
    service = FakeService(fake_engine)
    app = create_app(service, ServerOptions(names=("calf",), api_keys=keys), FakeToolkit())
    with HttpServer(app, listening("127.0.0.1", 0)) as server:
        yield server.url, service


@pytest.fixture
def service(running: tuple[str, FakeService]) -> FakeService:
    """The running server's service, as new."""
    fresh = FakeService(running[1].engine)
    vars(running[1]).update(vars(fresh))
    return running[1]


@pytest.fixture
def client(running: tuple[str, FakeService], service: FakeService) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running[0]}/v1", api_key="sk-one", max_retries=0) as found:
        yield found


@pytest.fixture
def claude(running: tuple[str, FakeService], service: FakeService) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=running[0], api_key="sk-one", max_retries=0) as found:
        yield found


# -- our own ---------------------------------------------------------------------------------------------------------


def test_command_line(running: tuple[str, FakeService], service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HERDGRAPH_API_KEY", "sk-one")
    assert run("generate", "--url", running[0], "Hi").stdout == "Hello\n"
    assert "status 404: the model 'cow' does not exist here" in run(
        "generate", "--url", running[0], "Hi", "--model", "cow").stderr
    service.fails_after = 2
    done = run("chat", "--url", running[0], stdin="Hi\n")
    assert (done.returncode, done.stdout.replace("> ", "")) == (0, "He\n")
    assert "failed in the middle of the answer: the weights are on fire" in done.stderr
    monkeypatch.setenv("HERDGRAPH_API_KEY", "sk-two")
    assert "status 401: this API key is not known here" in run("generate", "--url", running[0], "Hi").stderr


# -- OpenAI ----------------------------------------------------------------------------------------------------------


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model="calf", messages=CHAT, logprobs=True, top_logprobs=1)
    assert reply.choices[0].message.content == "Hello"
    assert reply.choices[0].logprobs.content[0].top_logprobs[0].logprob == -0.5
    assert reply.usage.prompt_tokens_details.cached_tokens == 1


def test_streamed_chat(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="calf", messages=CHAT, stream_options={"include_usage": True}) as stream:
        kinds = [event.type for event in stream]
        reply = stream.get_final_completion()
    assert "content.done" in kinds
    assert reply.choices[0].message.content == "Hello"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == 6


def test_tools(client: openai.OpenAI, service: FakeService) -> None:
    service.script = lambda request, choice: CALLING
    tools: Any = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
    reply = client.chat.completions.create(model="calf", messages=CHAT, tools=tools)
    calls = reply.choices[0].message.tool_calls
    with client.chat.completions.stream(model="calf", messages=CHAT, tools=tools) as stream:
        streamed = stream.get_final_completion().choices[0].message
    assert [call.function.arguments for call in calls] == ['{"city": "Ulm"}', '{"city": "Bonn"}']
    assert [call.function.arguments for call in streamed.tool_calls] == ['{"city": "Ulm"}', '{"city": "Bonn"}']
    assert [call.id for call in streamed.tool_calls] == ["call_0", "call_1"]
    assert streamed.content == "Look: "


def test_completions(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="calf", prompt=["a", "b"], echo=True, logprobs=1)
    assert [choice.text for choice in reply.choices] == ["aHello", "bHello"]
    streamed = client.completions.create(model="calf", prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "Hello"
    assert [model.id for model in client.models.list()] == ["calf"]
    assert client.models.retrieve("calf").model_extra["max_model_len"] == 4096
    assert client.models.retrieve("calf").model_extra["input_modalities"] == ["text", "image", "video"]


def test_errors_are_those_of_the_sdk(client: openai.OpenAI, service: FakeService) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="calf", messages=CHAT, max_tokens=5000)
    assert (wrong.value.code, wrong.value.param) == ("context_length_exceeded", "max_tokens")
    with pytest.raises(openai.NotFoundError, match="only calf"):
        client.chat.completions.create(model="gpt-9", messages=CHAT)
    with pytest.raises(openai.AuthenticationError, match="not known"):
        client.with_options(api_key="sk-two").models.list()
    with pytest.raises(openai.NotFoundError, match="does not do that"):
        client.embeddings.create(model="calf", input="x")
    service.fails_after = 1
    with pytest.raises(openai.APIError, match="on fire"):
        list(client.chat.completions.create(model="calf", messages=CHAT, stream=True))
    service.full = True
    with pytest.raises(openai.InternalServerError, match="queue is full"):
        client.chat.completions.create(model="calf", messages=CHAT, stream=True)


def test_responses(client: openai.OpenAI, service: FakeService) -> None:
    reply = client.responses.create(model="calf", input="Hi", instructions="Be short.")
    assert reply.output_text == "Hello"
    assert (reply.status, reply.usage.output_tokens) == ("completed", 6)
    rendered = service.engine.processor.tokenizer.decode(service.requests[0].prompt.token_ids)
    assert "Be short." in rendered
    assert client.responses.create(model="calf", input="Hi", max_output_tokens=2).status == "incomplete"
    with pytest.raises(openai.BadRequestError, match="keeps nothing"):
        client.responses.create(model="calf", input="Hi", previous_response_id="resp_1")


def test_streamed_response(client: openai.OpenAI) -> None:
    with client.responses.stream(model="calf", input="Hi") as stream:
        events = list(stream)
        reply = stream.get_final_response()
    assert reply.output_text == "Hello"
    kinds = [event.type for event in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added",
                         "response.content_part.added"]
    assert kinds[4:9] == ["response.output_text.delta"] * 5
    assert kinds[9:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done",
                         "response.completed"]
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_response_with_tools(client: openai.OpenAI, service: FakeService) -> None:
    service.script = lambda request, choice: CALLING
    tools: Any = [{"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}]
    with client.responses.stream(model="calf", input="Hi", tools=tools) as stream:
        kinds = [event.type for event in stream]
        message, first, second = stream.get_final_response().output
    assert kinds.count("response.function_call_arguments.done") == 2
    assert message.content[0].text == "Look: "
    assert (first.name, first.call_id, json.loads(first.arguments)) == ("weather", "call_0", {"city": "Ulm"})
    assert json.loads(second.arguments) == {"city": "Bonn"}
    service.script = lambda request, choice: "Rain"
    history: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}, message.to_dict(),
                    first.to_dict(), second.to_dict(),
                    {"type": "function_call_output", "call_id": "call_0", "output": "rain"},
                    {"type": "function_call_output", "call_id": "call_1", "output": "sun"}]
    assert client.responses.create(model="calf", input=history, tools=tools).output_text == "Rain"
    rendered = service.engine.processor.tokenizer.decode(service.requests[-1].prompt.token_ids)
    assert "rain" in rendered
    assert "sun" in rendered


def test_failed_response(client: openai.OpenAI, service: FakeService) -> None:
    service.fails_after = 1
    events = list(client.responses.create(model="calf", input="Hi", stream=True))
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.message == "the weights are on fire"


# -- Anthropic -------------------------------------------------------------------------------------------------------


def test_messages(claude: anthropic.Anthropic, service: FakeService) -> None:
    reply = claude.messages.create(model="calf", max_tokens=9, messages=CHAT, system="Be short.")
    assert reply.content[0].text == "Hello"
    assert reply.stop_reason == "end_turn"
    prompt = len(service.requests[0].prompt.token_ids)
    assert reply.usage.input_tokens + reply.usage.cache_read_input_tokens == prompt
    assert claude.messages.count_tokens(model="calf", messages=CHAT, system="Be short.").input_tokens == prompt
    assert claude.messages.create(model="calf", max_tokens=2, messages=CHAT).stop_reason == "max_tokens"
    stopped = claude.messages.create(model="calf", max_tokens=9, messages=CHAT, stop_sequences=["ll"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "ll")


def test_streamed_message(claude: anthropic.Anthropic) -> None:
    with claude.messages.stream(model="calf", max_tokens=9, messages=CHAT) as stream:
        assert "".join(stream.text_stream) == "Hello"
        message = stream.get_final_message()
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == 6


def test_message_with_tools(claude: anthropic.Anthropic, service: FakeService) -> None:
    service.script = lambda request, choice: CALLING
    tools: Any = [{"name": "weather", "input_schema": PARAMETERS}]
    whole = claude.messages.create(model="calf", max_tokens=99, messages=CHAT, tools=tools)
    with claude.messages.stream(model="calf", max_tokens=99, messages=CHAT, tools=tools) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        text, first, second = message.content
        assert message.stop_reason == "tool_use"
        assert text.text == "Look: "
        assert (first.name, first.input, second.input) == ("weather", {"city": "Ulm"}, {"city": "Bonn"})
    results: Any = [{"type": "tool_result", "tool_use_id": block.id, "content": "rain"} for block in whole.content[1:]]
    history = [*CHAT, {"role": "assistant", "content": whole.content}, {"role": "user", "content": results}]
    claude.messages.create(model="calf", max_tokens=99, messages=history, tools=tools,
                           tool_choice={"type": "any", "disable_parallel_tool_use": True})
    assert service.requests[-1].constraint[1][1] == "required"
    assert service.requests[-1].constraint[2]["parallel"] is False


def test_a_message_of_a_form(claude: anthropic.Anthropic, service: FakeService) -> None:
    schema: Any = {"type": "object", "properties": {}}
    claude.messages.create(model="calf", max_tokens=9, messages=CHAT, output_config={
        "effort": "low", "format": {"type": "json_schema", "schema": schema}})
    claude.messages.create(model="calf", max_tokens=9, messages=CHAT, extra_body={
        "output_format": {"type": "json_schema", "schema": schema}})
    assert [request.constraint for request in service.requests] == [("json_schema", (schema,), {})] * 2


def test_a_call_that_is_cut_off_is_left_out(claude: anthropic.Anthropic, service: FakeService) -> None:
    service.script = lambda request, choice: 'Look: <weather {"city: "Ul}><weather {"city": "Bonn"}>'
    message = claude.messages.create(model="calf", max_tokens=99, messages=CHAT,
                                     tools=[{"name": "weather", "input_schema": PARAMETERS}])
    assert [block.type for block in message.content] == ["text", "tool_use"]
    assert message.content[1].input == {"city": "Bonn"}  # type: ignore[union-attr]


def test_errors_of_messages(claude: anthropic.Anthropic, service: FakeService) -> None:
    with pytest.raises(anthropic.BadRequestError, match="context is 4096"):
        claude.messages.create(model="calf", max_tokens=5000, messages=CHAT)
    with pytest.raises(anthropic.NotFoundError) as absent:
        claude.messages.create(model="claude", max_tokens=5, messages=CHAT)
    assert absent.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.AuthenticationError):
        claude.with_options(api_key="sk-two").messages.create(model="calf", max_tokens=5, messages=CHAT)
    service.fails_after = 1
    with pytest.raises(anthropic.APIStatusError, match="on fire"), claude.messages.stream(
        model="calf", max_tokens=5, messages=CHAT
    ) as stream:
        stream.get_final_message()
