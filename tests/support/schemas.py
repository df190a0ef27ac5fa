"""Random JSON schemas and tools from a seed: mostly what a grammar can enforce, now and then what it cannot."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

WORDS = ["name", "city", "count", "unit", "tags", "price", "is_open", "note", "x", "größe", "first name", "user-id"]
PATTERNS = ["^[a-z]{1,8}$", "^[0-9]{3}-[0-9]{2}$", "^(yes|no)$", "^\\d+$", "^[A-Z][a-z]*( [A-Z][a-z]*)?$", "^é+"]
FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "email"]
REFUSED: list[Schema] = [
    {"not": {"type": "string"}}, {"type": "array", "uniqueItems": True}, {"type": "string", "pattern": "(?=a)b"},
    {"type": "string", "format": "horoscope"}, {"type": "text"}, {"$ref": "#/$defs/nowhere"}, {"enum": []},
    {"type": "array", "contains": {"type": "integer"}}, {"type": "object", "propertyNames": {"pattern": "a"}},
    {"if": {"type": "string"}, "then": {"minLength": 1}}, {"type": "object", "minProperties": 3},
    {"oneOf": [{"type": "integer"}, {"type": "number"}]}, {"type": "object", "dependencies": {"a": ["b"]}},
    {"type": "object", "dependentRequired": {"a": ["b"]}}, {"type": "array", "items": [{"type": "string"}]},
    {"type": "string", "pattern": "^(a+)\\1$"}, {"unevaluatedProperties": False}, {"$dynamicRef": "#a"},
]
"""Schemas of which each must be refused."""


class SchemaGenerator:
    """Draws schemas; the same seed gives the same ones.

    Args:
        seed: of the random numbers.
        refused: how often a part is taken that cannot be enforced.
    """

    def __init__(self, seed: int, refused: float = 0.01) -> None:
        self._random, self._refused = random.Random(seed), refused

    def schema(self) -> Schema:
        """A schema of any kind, sometimes with definitions that it refers to, also to itself."""
        schema = self._part(3)
        if self._chance(0.2):
            link = {"type": "object", "properties": {"value": self._part(1), "next": {"$ref": "#/$defs/link"}},
                    "required": ["value"], "additionalProperties": False}
            return {"type": "object", "properties": {"head": {"$ref": "#/$defs/link"}, "rest": schema},
                    "required": ["head"], "$defs": {"link": link}}
        return schema

    def object(self, depth: int = 2) -> Schema:
        """A schema of an object."""
        names = self._random.sample(WORDS, self._random.randint(0, 4))
        schema: Schema = {"type": "object", "properties": {name: self._part(depth - 1) for name in names}}
        if self._chance(0.7):
            schema["required"] = [name for name in names if self._chance(0.6)]
        if self._chance(0.5):
            schema["additionalProperties"] = self._random.choice([False, {"type": "integer", "maximum": 9}])
        if self._chance(0.05):
            schema["patternProperties"] = {"^_[a-z]$": {"type": "boolean"}}
        return schema

    def tools(self) -> list[Schema]:
        """One to four tools in OpenAI's form."""
        names = self._random.sample(["get_weather", "get", "search.web", "run-code", "f", "f2", "_x"],
                                    self._random.randint(1, 4))
        return [{"type": "function", "function": {
            "name": name, "description": f"Does {name}.", "parameters": self.object()}} for name in names]

    def _part(self, depth: int) -> Schema:
        if self._chance(self._refused):
            return dict(self._random.choice(REFUSED))
        kinds = [self._string, self._string, self._number, self._integer, self._constant]
        if depth > 0:
            kinds += [lambda: self.object(depth), lambda: self.object(depth), lambda: self._array(depth),
                      lambda: self._union(depth)]
        return self._random.choice(kinds)()

    def _string(self) -> Schema:
        return self._random.choice([
            {"type": "string"}, {"type": "string", "maxLength": self._random.randint(0, 12)},
            {"type": "string", "minLength": 2, "maxLength": self._random.randint(2, 9)},
            {"type": "string", "pattern": self._random.choice(PATTERNS)},
            {"type": "string", "format": self._random.choice(FORMATS)},
            {"type": "string", "enum": self._random.sample(["a", "b b", 'say "hi"', "back\\slash", "日本"], 2)},
        ])

    def _integer(self) -> Schema:
        low = self._random.randint(-300, 300)
        return self._random.choice([
            {"type": "integer", "minimum": low}, {"type": "integer", "minimum": low, "maximum": low + 40},
            {"type": "integer", "exclusiveMaximum": low, "multipleOf": self._random.choice([2, 3, 10])},
            {"type": "integer"},
        ])

    def _number(self) -> Schema:
        low = self._random.randint(-30, 30) / 4
        return self._random.choice([
            {"type": "number", "minimum": low, "maximum": low + 2.5}, {"type": "number", "exclusiveMinimum": low},
            {"type": "number", "maximum": 1e6},
        ])

    def _constant(self) -> Schema:
        return self._random.choice([
            {"type": "boolean"}, {"type": "null"}, {"const": {"a": [1, None, "x"]}}, {"enum": [1, "1", None, True]},
            {"type": ["string", "null"], "maxLength": 5}, {"type": ["boolean", "integer"], "maximum": 7},
        ])

    def _array(self, depth: int) -> Schema:
        items = self._part(depth - 1)
        return self._random.choice([
            {"type": "array", "items": items}, {"type": "array", "items": items, "minItems": 1, "maxItems": 3},
            {"type": "array", "prefixItems": [items, {"type": "integer"}], "minItems": 2, "items": False},
        ])

    def _union(self, depth: int) -> Schema:
        return self._random.choice([
            {"anyOf": [self._part(depth - 1), self._part(depth - 1)]},
            {"oneOf": [{"type": "string", "maxLength": 4}, {"type": "integer", "minimum": 5}]},
            {"allOf": [{"type": "integer", "minimum": -5}, {"maximum": 99}]},
        ])

    def _chance(self, share: float) -> bool:
        return self._random.random() < share
