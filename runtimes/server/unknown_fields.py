"""Fields that a request has and this server does not know.

In silence they are how a constraint is lost: vLLM takes ``guided_json``, which it no longer has, and answers free text.
Here a field that looks like a known one, or that would have promised something, is refused; others are ignored, and
the reply's header ``x-herdgraph-ignored`` names them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .errors import ApiError, wrong
from .protocol.common import Body

HEADER = "x-herdgraph-ignored"
_SHORTEST = 4
_MOST_NAMED = 20

_STRUCTURED = "use structured_outputs={json, regex, choice, grammar} or response_format"
_GONE = {
    "guided_json": _STRUCTURED, "guided_regex": _STRUCTURED, "guided_choice": _STRUCTURED,
    "guided_grammar": _STRUCTURED, "guided_json_object": _STRUCTURED, "guided_decoding_backend": _STRUCTURED,
    "guided_whitespace_pattern": _STRUCTURED, "grammar": _STRUCTURED, "json_schema": _STRUCTURED,
    "functions": "use tools", "function_call": "use tool_choice",
    "chat_template": "the checkpoint's own template is used", "documents": "put them into a message",
    "logits_processors": "a program of a stranger is not run", "audio": "the model says text only",
    "suffix": "the model only continues a text", "truncate_prompt_tokens": "shorten the prompt",
    "logprob_token_ids": "use top_logprobs", "prompt_embeds": "give text or token ids",
    "web_search_options": "offer a tool that searches", "mcp_servers": "offer their tools, and call them yourself",
    "container": "nothing is run here", "moderation": "nothing is looked at but what the model reads",
    "prompt": "give the messages themselves", "kv_transfer_params": "there is one server",
    "mm_processor_kwargs": "pictures are tiled as the checkpoint says",
}
"""Fields that would have promised something, and what to do."""

_NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "use_beam_search": lambda value: value is False,
    "length_penalty": lambda value: value == 1,
    "spaces_between_special_tokens": lambda value: value is True,
    "modalities": lambda value: value == ["text"],
    "logit_processors": lambda value: not value,
    "detokenize": lambda value: value is True,
}
"""Fields that are ignored where they ask for what is done anyway, and refused otherwise."""


def check_unknown(body: Body) -> dict[str, str]:
    """Look at the fields that a body's model does not have.

    Returns:
        Headers for the reply: the names of those that are ignored.

    Raises:
        ApiError: one is misspelt, or would have promised something.
    """
    unknown: Mapping[str, Any] = body.model_extra or {}
    known = [field.alias or name for name, field in type(body).model_fields.items()]
    ignored = [name for name, value in unknown.items() if value is not None and _is_ignored(name, value, known, body)]
    named = [name for name in ignored if re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII)][:_MOST_NAMED]
    return {HEADER: ", ".join(named)} if named else {}


def _is_ignored(name: str, value: Any, known: list[str], body: Body) -> bool:
    """Whether a field changes nothing; what it asks for may be done anyway."""
    if name in _NEUTRAL:
        if _NEUTRAL[name](value):
            return False
        raise _refused(name, "this server cannot do it")
    if name == "best_of":
        if isinstance(value, int) and value <= (getattr(body, "n", None) or 1):
            return False
        raise _refused(name, "only as many answers as n asks for are made")
    if name in _GONE:
        raise _refused(name, _GONE[name])
    if meant := next((field for field in known if is_misspelt(name, field)), None):
        raise wrong(f"{name} is no field of this request: did you mean {meant}?", name, "unknown_parameter")
    return True


def _refused(name: str, advice: str) -> ApiError:
    return wrong(f"{name} is not supported: {advice}", name, "unsupported_parameter")


def is_misspelt(name: str, known: str) -> bool:
    """Whether one letter more, less, other or exchanged with its neighbor, or another way to join words, is all
    that differs.
    """
    ours, theirs = (re.sub(r"[_.-]", "", word).lower() for word in (known, name))
    if len(ours) < _SHORTEST or abs(len(ours) - len(theirs)) > 1:
        return False
    start = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if start is None:
        return True
    a, b = ours[start:], theirs[start:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])
