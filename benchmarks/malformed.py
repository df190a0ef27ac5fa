"""Requests that are wrong in all ways that one can think of, from a seed: valid bodies, broken."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

Body = dict[str, Any]

_SAY = {"role": "user", "content": "Say something about a calf."}
_TOOL = {"name": "weather", "description": "Of a place", "parameters": {
    "type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}}
VALID: dict[str, Body] = {
    "/v1/chat/completions": {
        "messages": [{"role": "system", "content": "Be kind."}, _SAY], "max_tokens": 4, "n": 2, "stop": ["\n\n"],
        "temperature": 0.5, "logit_bias": {"400": -1.5}, "stream": True, "stream_options": {"include_usage": True},
        "tools": [{"type": "function", "function": _TOOL}], "tool_choice": "auto", "seed": 7},
    "/v1/completions": {
        "prompt": ["Once", "Twice"], "max_tokens": 4, "echo": True, "logprobs": 2, "top_p": 0.9, "top_k": 40,
        "stop_token_ids": [401], "bad_words": ["never"], "response_format": {"type": "json_object"}},
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}], "max_output_tokens": 4,
        "tools": [{"type": "function", **_TOOL}], "text": {"format": {"type": "text"}}, "stream": True},
    "/v1/messages": {
        "model": "calf", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "max_tokens": 4,
        "system": "Be kind.", "tools": [{"name": "weather", "input_schema": _TOOL["parameters"]}], "stream": True},
    "/v1/messages/count_tokens": {"model": "calf", "messages": [_SAY]},
    "/tokenize": {"prompt": "A calf", "add_special_tokens": True, "return_token_strs": True},
    "/detokenize": {"tokens": [400, 401, 402]},
    "/v1/chat/completions/render": {"messages": [_SAY], "add_generation_prompt": True},
}
"""A valid body of every address that takes one."""

_ODD: list[Any] = [
    None, True, False, 0, -1, 2**31, 2**63, -2**70, 10**40, 1e308, 1e-320, 0.1, "", " ", "NaN", "x" * 70_000, "\0",
    "\ud800", "\udfff\ud800", "<|eot|>", "../../etc/passwd", [], {}, [[]], [None], [{}], {"": {}}, ["a"] * 3000,
    list(range(-5, 5)), {"type": "text"}, {"type": "image_url", "image_url": {"url": "data:,"}}, [[[[[[]]]]]],
]
_LOOP = {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}
_SCHEMAS: list[Any] = [
    _LOOP, {"$ref": "http://127.0.0.1/schema"}, {"$ref": "#/nowhere"}, {"type": "wrong"}, {"type": ["string"] * 500},
    {"type": "string", "pattern": "(a{1000}){1000}{1000}"}, {"type": "string", "pattern": "(?=a)b"},
    {"type": "string", "minLength": 10**9}, {"type": "array", "minItems": 10**9}, {"enum": []},
    {"enum": [str(number) for number in range(20_000)]}, {"allOf": [{"not": {}}] * 50},
    {"type": "object", "properties": {f"p{number}": {"type": "string"} for number in range(3000)}},
    {"type": "integer", "multipleOf": 1e-300}, {"const": "\ud800"}, {"type": "object", "required": ["a"] * 10_000},
]
_ABSURD: list[Body] = [
    {"n": 10**6}, {"n": 64, "max_tokens": 10**18}, {"stop": [""]}, {"stop": ["x"] * 17}, {"stop": "x" * 10**5},
    {"logit_bias": {str(token): 1 for token in range(5000)}}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"9" * 500: 1}},
    {"tools": [{"type": "function", "function": _TOOL}] * 257}, {"tools": [{"type": "function", "function": {}}]},
    {"tools": [{"type": "function", "function": {"name": "<|eot|>"}}]}, {"tool_choice": {"type": "function"}},
    {"tool_choice": {"type": "function", "function": {"name": "nobody"}}}, {"max_tokens": -1}, {"min_tokens": 10**9},
    {"seed": 2**200}, {"priority": 10**9}, {"top_logprobs": 10**6, "logprobs": True}, {"temperature": -3},
    {"temperature": 1e300}, {"top_p": 7}, {"top_k": -5}, {"repetition_penalty": 0}, {"stop_token_ids": [-1] * 256},
    {"allowed_token_ids": []}, {"bad_words": ["x"] * 257}, {"structured_outputs": {"regex": "(" * 5000}},
    {"structured_outputs": {"regex": "(a|a)*" * 300 + "b"}}, {"structured_outputs": {"choice": []}},
    {"structured_outputs": {"choice": ["a" * 10**5] * 50}}, {"structured_outputs": {"grammar": "start: start start"}},
    {"structured_outputs": {"grammar": "start: (((\n" * 500}}, {"model": "nobody"}, {"maxtokens": 3},
    {"cache_salt": "s" * 257}, {"prompt_logprobs": 101}, {"stream_options": 3}, {"response_format": {"type": "xml"}},
    *({"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}}
      for schema in _SCHEMAS),
    *({"tools": [{"type": "function", "function": _TOOL | {"parameters": schema}}], "tool_choice": "required"}
      for schema in _SCHEMAS),
]


@dataclass(frozen=True)
class Raw:
    """A request as it goes over the wire.

    Attributes:
        kind: what is wrong with it.
        data: head and body.
    """

    kind: str
    data: bytes


def malformed(count: int, seed: int = 0) -> list[Raw]:
    """So many requests, all kinds and all addresses in turn."""
    random, kinds, paths = Random(seed), list(_BROKEN.items()), list(VALID.items())
    made = []
    for number in range(count):
        kind, broken = kinds[number % len(kinds)]
        path, body = paths[number // len(kinds) % len(paths)]
        made.append(Raw(f"{kind} {path}", broken(random, path, copy.deepcopy(body))))
    return made


def request(path: str, body: bytes, *headers: str, length: str | None = None, kind: str = "application/json") -> bytes:
    """A POST; its length is told as it is, as ``length`` says, or with an empty ``length`` not at all."""
    length = str(len(body)) if length is None else length
    lines = [f"POST {path} HTTP/1.1", "host: x", "connection: close", *headers]
    lines += [f"content-type: {kind}"] if kind else []
    lines += [f"content-length: {length}"] if length else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def dumps(value: Any) -> bytes:
    """JSON, with NaN and lone surrogates if need be."""
    return json.dumps(value).encode()


# -- ways to be wrong ------------------------------------------------------------------------------------------------


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container of a body with every key of it."""
    if not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]


def _truncated(random: Random, path: str, body: Body) -> bytes:
    data = dumps(body)
    return request(path, data[: random.randrange(len(data))])


def _other_types(random: Random, path: str, body: Body) -> bytes:
    for _ in range(random.randint(1, 3)):
        holder, key = random.choice(_places(body))
        holder[key] = copy.deepcopy(random.choice(_ODD))
    return request(path, dumps(body))


def _no_numbers(random: Random, path: str, body: Body) -> bytes:
    holder, key = random.choice(_places(body))
    holder[key] = "@"
    odd = ("NaN", "Infinity", "-Infinity", "1e999", "-1e-999", "9" * 5000, "-0", "01", "0x10", "1.", "+1", "1_000")
    return request(path, dumps(body).replace(b'"@"', random.choice(odd).encode(), 1))


def _deep(random: Random, path: str, body: Body) -> bytes:
    opened, closed = random.choice([("[", "]"), ('{"a":', "}")])
    depth = random.choice([63, 64, 65, 500, 20_000, 200_000])
    text = opened * depth + "1" + closed * random.choice([0, depth])
    holder, key = random.choice(_places(body))
    holder[key] = "@"
    return request(path, dumps(body).replace(b'"@"', text.encode(), 1))


def _half_characters(random: Random, path: str, body: Body) -> bytes:
    texts = [(holder, key) for holder, key in _places(body) if isinstance(holder[key], str)] or [(body, "prompt")]
    holder, key = random.choice(texts)
    holder[key] = random.choice(["\ud800", "a\udc00b", "\udbff", "\ud83d" * 50, "\ufffe\0"])
    return request(path, dumps(body))


def _bad_bytes(random: Random, path: str, body: Body) -> bytes:
    data = bytearray(dumps(body))
    for _ in range(random.randint(1, 8)):
        data[random.randrange(len(data))] = random.randrange(256)
    place = random.randrange(len(data))
    data[place:place] = random.choice([b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5", b"\0", b"\xef\xbb\xbf"])
    return request(path, bytes(data))


def _twice(random: Random, path: str, body: Body) -> bytes:
    name = random.choice(list(body))
    again = dumps({name: random.choice(_ODD)})[1:-1]
    return request(path, dumps(body)[:-1] + b"," + b",".join([again] * random.choice([1, 3000])) + b"}")


def _other_kind(random: Random, path: str, body: Body) -> bytes:
    kind = random.choice(["", "text/plain", "multipart/form-data; boundary=x", "application/json; charset=utf-16",
                          "*/*", "application/x-www-form-urlencoded", "application/" + "j" * 5000, "application/xml"])
    data = random.choice([dumps(body), json.dumps(body).encode("utf-16"), gzip.compress(dumps(body)), b"", b"null"])
    return request(path, data, *random.choice([(), ("content-encoding: gzip",), ("expect: 100-continue",)]), kind=kind)


def _absurd(random: Random, path: str, body: Body) -> bytes:
    return request(path, dumps(body | random.choice(_ABSURD)))


def _missing(random: Random, path: str, body: Body) -> bytes:
    holder, key = random.choice(_places(body))
    if isinstance(holder, dict):
        holder[random.choice(["x", key + "s", key.upper(), "\ud800", "k" * 10_000])] = holder[key]
    del holder[key]
    return request(path, dumps(body))


def _chunks(random: Random, path: str, body: Body) -> bytes:
    data = dumps(body)
    whole = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
    broken = random.choice([whole[:-5], b"zz\r\n" + data, b"-1\r\n" + data, b"F" * 40 + b"\r\n" + data,
                            whole[:-2] + b"x: " + b"y" * 70_000 + b"\r\n\r\n", b"1;" + b"e" * 70_000 + whole])
    both = random.choice([(), ("content-length: 5",)])
    return request(path, broken, "transfer-encoding: chunked", *both, length="")


def _lies(random: Random, path: str, body: Body) -> bytes:
    data = dumps(body)
    length = random.choice([str(len(data) + 50), str(len(data) // 2), "-1", "1e3", "0", "9" * 300, str(1 << 40), "x",
                            f"{len(data)}, {len(data)}", f"{len(data)}\r\ncontent-length: 3", "+5", "\u00b2"])
    return request(path, data, length=length)


def _many_headers(random: Random, path: str, body: Body) -> bytes:
    floods = [[f"x-{number}: y" for number in range(5000)], ["x: " + "y" * 200_000], ["x" * 70_000 + ": y"],
              ["x-request-id: " + "\xff" * 300], ["cookie: a=b"] * 900, ["no colon"], [" : empty"], ["x: \x01"],
              ["authorization: Bearer " + "\xe9" * 90], ["transfer-encoding: gzip"], ["host: y"]]
    return request(path, dumps(body), *random.choice(floods))


def _noise(random: Random, path: str, body: Body) -> bytes:
    data = random.choice([random.randbytes(300), b"", b"null", b"[]", b'"x"', b"1", b" " * 100_000, b"{}", b"{" * 30])
    start = random.choice([request(path, data)] * 3 + [data, b"\x16\x03\x01" + data, b"PRI * HTTP/2.0\r\n\r\n"])
    return start + random.choice([b"", b"\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n"])


_BROKEN: dict[str, Callable[[Random, str, Body], bytes]] = {
    "truncated": _truncated, "types": _other_types, "numbers": _no_numbers, "deep": _deep,
    "surrogates": _half_characters, "bytes": _bad_bytes, "duplicates": _twice, "content type": _other_kind,
    "absurd": _absurd, "missing": _missing, "chunks": _chunks, "length": _lies, "headers": _many_headers,
    "noise": _noise,
}
