"""An environment in which strangers' templates run: no way out, and no more time and memory than a chat needs.

jinja2's sandbox keeps a template from Python's insides. Here it is also kept within a ``Budget``: the parsed template
is changed so that each of its loops, comparisons, literals and joined texts reports, and operators, calls and filters
that can make much of little are measured before they run. Filters that no chat needs are left out.
"""

# ruff: noqa: N802  (jinja2 calls visitors by the names of its nodes)
from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from .budget import TemplateCostError, budget, charging, require_bits

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
_CONVERSION = re.compile(r"%(?:\(\w*\))?[-+ 0#]{0,5}\d{0,3}(?:\.\d{0,3})?[sdifFeEgGxXorc%]")
_WIDEST_CONVERSION = 2000
_WIDEST_INDENT = 64


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
                         finalize=_finalize)
        self.filters = {name: wraps(FILTERS[name])(charging(FILTERS[name])) for name in _FILTERS}
        self.filters.update(format=_formatted, indent=_indented, join=_joined_values, replace=_replaced,
                            tojson=to_json)
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.charged, self.concatenated, self.tick = _charged, _concatenated, _tick

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
        if __obj in (_tick, _charged, _concatenated):
            return __obj(*args)
        for value in (*args, *options.values()):
            budget().charged(value)
        text, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(text, str) and name in ("join", "replace"):
            return _joined(text, *args) if name == "join" else _replaced(text, *args, **options)
        return budget().charged(super().call(__context, __obj, *args, **options))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The operators whose results can be larger than their operands, measured before they run."""
        if operator == "%" and isinstance(left, str):
            return _percent(left, right)
        if operator == "+":
            _check_sum(left, right)
        elif operator == "*":
            _check_product(left, right)
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


def _tick(size: int) -> bool:
    budget().spend(size)
    return True


def _charged(value: Any) -> Any:
    return budget().charged(value)


def _text(value: Any) -> str:
    """A value as text; a list is measured before all of it is written."""
    return value if isinstance(value, str) else str(budget().charged(str(budget().charged(value))))


@jinja2.pass_context  # so that constants are not printed, and left out of the budget, when the template is compiled
def _finalize(context: Context, value: Any) -> str:
    text = _text(value)
    budget().spend(len(text))
    return text


def _concatenated(*values: Any) -> str:
    return _joined("", values)


def _joined(separator: str, values: Iterable[Any]) -> str:
    texts = [_text(value) for value in values]
    budget().spend_text(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


@jinja2.pass_environment
def _joined_values(
    environment: jinja2.Environment, value: Iterable[Any], d: str = "", attribute: str | int | None = None
) -> str:
    return _joined(_text(d), value if attribute is None else map(make_attrgetter(environment, attribute), value))


def _replaced(s: Any, old: Any, new: Any, count: int | None = None) -> str:
    text, before, after = _text(s), _text(old), _text(new)
    budget().spend_text(len(text) + text.count(before) * len(after))
    return text.replace(before, after, -1 if count is None else count)


def _indented(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    text, step = _text(s), width if isinstance(width, str) else width * " " if width <= _WIDEST_INDENT else None
    if step is None:
        raise TemplateCostError(f"it indents by {width}, at most {_WIDEST_INDENT} are allowed")
    budget().spend_text(len(text) + (len(text.splitlines()) + 1) * len(step))
    return str(FILTERS["indent"](text, step, first, blank))


def _formatted(value: Any, *args: Any, **options: Any) -> str:
    return _percent(_text(value), options or args)


def _percent(pattern: str, values: Any) -> str:
    """Old-style formatting, whose fields may not be wider than 999."""
    rest, fields = _CONVERSION.subn("", pattern)
    if "%" in rest:
        raise TemplateCostError(f"it formats by {pattern[:80]!r}, whose fields must be simple and narrow")
    given = values.values() if isinstance(values, dict) else values if isinstance(values, tuple) else (values,)
    widest = max((len(_text(value)) for value in given), default=0)
    budget().spend_text(len(pattern) + fields * (widest + _WIDEST_CONVERSION))
    return pattern % values


def _check_sum(left: Any, right: Any) -> None:
    if isinstance(left, str) and isinstance(right, str):
        budget().spend_text(len(left) + len(right))
    elif isinstance(left, (list, tuple)):
        budget().spend(8 * len(left))  # what it refers to was counted when it was made
        budget().charged(right)


def _check_product(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        return require_bits(left.bit_length() + right.bit_length())
    many, times = (left, right) if isinstance(right, int) else (right, left)
    if isinstance(many, str) and isinstance(times, int):
        budget().spend_text(len(many) * max(times, 0))
    elif isinstance(many, (list, tuple)) and isinstance(times, int):
        budget().spend_copies(many, max(times, 0))
    return None


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """``json.dumps`` without HTML escapes, as transformers' templates expect."""
    if indent is not None and not 0 <= indent <= _WIDEST_INDENT:
        raise TemplateCostError(f"it indents by {indent}, at most {_WIDEST_INDENT} are allowed")
    if separators is not None and sum(map(len, separators)) > _WIDEST_INDENT:
        raise TemplateCostError("its JSON has long separators")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    pieces = []
    for piece in encoder.iterencode(budget().charged(value)):
        budget().spend(len(piece))
        pieces.append(piece)
    return "".join(pieces)
