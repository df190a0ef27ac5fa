"""An environment in which strangers' templates run: no way out, and no more time and memory than a chat needs.

jinja2's sandbox keeps a template from Python's insides. Here it is also kept within a ``Budget``: the parsed template
is changed so that each of its loops, comparisons, literals and joined texts reports, and operators, calls and filters
that can make much of little are measured before they run. Filters that no chat needs are left out.
"""

# ruff: noqa: N802  (jinja2 calls visitors by the names of its nodes)
from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from .budget import budget, charging, require_bits
from .measured import (
    charged,
    check_product,
    check_sum,
    concatenated,
    formatted,
    indented,
    join_filter,
    joined,
    percent,
    printed,
    replaced,
    tick,
    to_json,
)

_FILTERS = (
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby",
    "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "safe",
    "select", "selectattr", "sort", "string", "title", "trim", "truncate", "unique", "upper",
)
_TEXT = (
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal",
    "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip", "partition",
    "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split",
    "splitlines", "startswith", "strip", "swapcase", "title", "upper",
)
_METHODS: dict[type, tuple[str, ...]] = {
    str: _TEXT, dict: ("copy", "get", "items", "keys", "values"), list: ("copy", "count", "index"),
    tuple: ("count", "index"), bytes: (), int: (), float: (),
}
"""What may be called on the values of a template."""


class _Generation(Extension):
    """Accepts ``{% generation %}``, with which some templates mark what was generated; it changes nothing here."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compiles templates whose rendering spends the current ``budget``."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols],
                         finalize=printed)
        self.filters = {name: wraps(FILTERS[name])(charging(FILTERS[name])) for name in _FILTERS}
        self.filters.update(format=formatted, indent=indented, join=join_filter, replace=replaced,
                            tojson=to_json)
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.charged, self.concatenated, self.tick = charged, concatenated, tick

    def compile_bounded(self, tree: nodes.Template) -> jinja2.Template:
        """A template of a parsed tree, which is changed."""
        changed = _Bounding().visit(tree)
        changed.set_environment(self)
        return self.template_class.from_code(self, self.compile(changed), self.make_globals(None))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Of the values that a template holds, only methods whose results are about as large as they are."""
        for kind, names in _METHODS.items():
            if isinstance(obj, kind):
                return attr in names
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` is refused like other methods: one field can be as wide as the memory."""
        return None

    def call(__self, __context: Context, __obj: Any, *args: Any, **options: Any) -> Any:  # noqa: N805
        """Call a function, method or macro; what it makes is accounted for."""
        if __obj in (tick, charged, concatenated):
            return __obj(*args)
        for value in (*args, *options.values()):
            budget().charged(value)
        text, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(text, str) and name in ("join", "replace"):
            return joined(text, *args) if name == "join" else replaced(text, *args, **options)
        return budget().charged(super().call(__context, __obj, *args, **options))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators whose results can be larger than their operands, measured before they run."""
        if operator == "%" and isinstance(left, str):
            return percent(left, right)
        if operator == "+":
            check_sum(left, right)
        elif operator == "*":
            check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            require_bits(left.bit_length() * abs(right))
        return super().call_binop(context, operator, left, right)


class _Bounding(NodeTransformer):
    """Inserts what reports to the budget."""

    def visit_Output(self, node: nodes.Output) -> list[nodes.Node]:
        """The template's own text costs as often as it is printed."""
        size = sum(len(part.data) for part in node.nodes if isinstance(part, nodes.TemplateData))
        return [_report(size), self.generic_visit(node)]

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, _report(0))
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        return nodes.And(_call("tick", nodes.Const(0)), self.generic_visit(node))

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenated", *node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _call("charged", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _call("charged", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _call("charged", node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _call("charged", node) if isinstance(node.arg, nodes.Slice) else node


def _call(name: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(arguments), [], None, None)


def _report(size: int) -> nodes.ExprStmt:
    return nodes.ExprStmt(_call("tick", nodes.Const(size)))
