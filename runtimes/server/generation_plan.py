"""A chat's body to a request for the service, and a parser for its answers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from starlette.types import Scope

from ...model.processing import PreparedPrompt
from ..scheduler import Constraint, GenerationRequest
from .errors import wrong
from .keys import Key
from .prompts import chat_prompt, kept_tokens, on_thread
from .protocol.chat import ChatBody, ChatTool, NamedTool, RenderBody
from .protocol.common import GenerationBody, ResponseFormat, StructuredOutputs
from .records import record_of
from .sampling_params import room_for, sampling_of, stop_rule_of
from .serving import Serving
from .toolkit import Parser, Spec, Tool, Toolkit


@dataclass(frozen=True)
class Plan:
    """A request for the service, and how its answers are read.

    Attributes:
        request: for ``Serving.submit``.
        toolkit: makes parsers.
        tools: that the model may call.
        has_form: whether text of an answer is of a form, so that calls come in its place.
    """

    request: GenerationRequest
    toolkit: Toolkit
    tools: tuple[Tool, ...] = ()
    has_form: bool = False

    def parser(self) -> Parser | None:
        """A parser for one answer; None where all of it is text."""
        return self.toolkit.parser(list(self.tools), leading=self.has_form) if self.tools else None


async def plan_chat(serving: Serving, scope: Scope, body: ChatBody) -> Plan:
    """What a chat asks for.

    Raises:
        ApiError: it cannot be done.
    """
    check_chat(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise wrong("top_logprobs needs logprobs: true", "top_logprobs")
    if body.stream and body.prompt_logprobs is not None:
        raise wrong("prompt_logprobs are not streamed: leave out stream", "prompt_logprobs")
    tools, has_form = offered_tools(body), _wanted(body) is not None
    if tools and has_form and body.skip_special_tokens is False:
        raise wrong("skip_special_tokens: false cannot go with a format and tools: the form has no control tokens",
                    "skip_special_tokens")
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    prompt = await chat_prompt(serving, body, tools, kept_tokens(serving, body.truncate_prompt_tokens, limit))
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    constraint = await constraint_of(serving, body, tools)
    request = await request_of(serving, scope, body, prompt, limit, logprobs, constraint=constraint)
    return Plan(request, serving.toolkit, tuple(tools), has_form)


async def request_of(
    serving: Serving, scope: Scope, body: GenerationBody, prompt: PreparedPrompt, limit: int | None,
    logprobs: int | None, *, constraint: Constraint | None = None, prompt_logprobs: int | None = None,
) -> GenerationRequest:
    """The request of a prepared prompt.

    Raises:
        ApiError: prompt and answer do not fit, or a value is out of its range.
    """
    processor, config = serving.processor, serving.config
    room = room_for(len(prompt.token_ids), limit, serving.context)
    sampling = sampling_of(body, processor.generation_defaults, processor.tokenizer, config.text.vocab_size, logprobs)
    record = record_of(scope)
    record.choices, record.most_tokens = body.n or 1, room
    record.temperature, record.top_p = sampling.temperature, sampling.top_p
    stop = stop_rule_of(body, processor.tokenizer, config.text.vocab_size, room)
    return GenerationRequest(
        request_id=record.request_id, prompt=prompt, sampling=sampling, stop=stop, choices=body.n or 1,
        constraint=constraint,
        prompt_logprobs=body.prompt_logprobs if prompt_logprobs is None else prompt_logprobs,
        priority=body.priority or 0, salt=_salt(scope, body.cache_salt),
        never=(config.image_token_id,) if config.vision else (), shows_special=body.skip_special_tokens is False)


def check_chat(body: RenderBody) -> None:
    """Refuse what the template cannot be asked.

    Raises:
        ApiError: the prompt would not end where an answer begins.
    """
    if body.add_generation_prompt is False and not body.continue_final_message:
        raise wrong("add_generation_prompt: false needs continue_final_message: true", "add_generation_prompt")


def offered_tools(body: RenderBody) -> list[Tool]:
    """The tools that the model gets to see.

    Raises:
        ApiError: two have one name, or the choice names none of them.
    """
    tools, choice = body.tools or [], body.tool_choice
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise wrong("two tools have the same name", "tools")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise wrong(f"tool_choice names {choice.function.name[:64]!r}, which is not among the tools", "tool_choice")
    if choice == "required" and not tools:
        raise wrong("tool_choice is required, and there are no tools", "tool_choice")
    return [] if choice == "none" else [_plain_tool(tool) for tool in tools]


async def constraint_of(serving: Serving, body: GenerationBody, tools: list[Tool] | None = None) -> Constraint | None:
    """What an answer may be.

    Raises:
        ApiError: two rules at once, or one that cannot be enforced.
    """
    given = _wanted(body)
    if given is None and not tools:
        return None

    def compile_() -> Constraint:
        toolkit = serving.toolkit
        form = toolkit.spec(given[0], *given[1:]) if given else None
        if not tools or not isinstance(body, ChatBody):
            return toolkit.compile(form)
        if form is not None and body.tool_choice in (None, "auto"):
            return toolkit.compile_beside_calls(form, tools, parallel=body.parallel_tool_calls is not False)
        return toolkit.compile(_tools_spec(serving, body, tools))

    return await on_thread(serving, compile_, "response_format" if given else "tools")


def _tools_spec(serving: Serving, body: ChatBody, tools: list[Tool]) -> Spec:
    choice = body.tool_choice.function.name if isinstance(body.tool_choice, NamedTool) else body.tool_choice or "auto"
    return serving.toolkit.spec("tools", tools, choice, parallel=body.parallel_tool_calls is not False,
                                formats=serving.toolkit.formats)


def _wanted(body: GenerationBody) -> tuple[Any, ...] | None:
    """The name of a grammar's constructor and its arguments, None for any text."""
    wanted = [*_of_format(body.response_format), *_of_structured(body.structured_outputs)]
    if len(wanted) > 1:
        raise wrong("the answer has more than one format: keep one", "structured_outputs")
    return wanted[0] if wanted else None


def _of_format(form: ResponseFormat | None) -> list[tuple[Any, ...]]:
    if form is None or form.type == "text":
        return []
    if form.type == "json_object":
        return [("json_object",)]
    if form.json_schema is None or form.json_schema.schema_ is None:
        raise wrong("response_format json_schema needs json_schema.schema", "response_format")
    return [("json_schema", form.json_schema.schema_)]


def _of_structured(given: StructuredOutputs | None) -> list[tuple[Any, ...]]:
    if given is None:
        return []
    if given.structural_tag is not None or given.model_extra:
        raise wrong("structured_outputs takes json, regex, choice, grammar or json_object", "structured_outputs")
    schema = given.json_
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise wrong("structured_outputs.json is no JSON", "structured_outputs") from error
    wanted: list[tuple[Any, ...]] = [("json_object",)] if given.json_object else []
    named = {"json_schema": schema, "regex": given.regex, "choice": given.choice, "lark": given.grammar}
    return [*wanted, *((name, value) for name, value in named.items() if value is not None)]


def _plain_tool(tool: ChatTool) -> Tool:
    function = tool.function
    plain: dict[str, Any] = {"name": function.name, "description": function.description or "",
                             "parameters": function.parameters or {"type": "object", "properties": {}}}
    return {"type": "function", "function": plain}


def _salt(scope: Scope, asked: str | None) -> bytes:
    """Prefixes are shared among requests with one key; how fast an answer comes would tell others what was asked."""
    key: Key | None = scope.get("herdgraph.key")
    if key is None and asked is None:
        return b""
    return hashlib.sha256((key.digest if key else b"") + (asked or "").encode("utf-8", "replace")).digest()
