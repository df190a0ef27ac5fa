"""Which control tokens of a rendered chat are the template's own.

Tokens such as ``<|eot|>`` end turns and open others, so that nothing but the template may write them. Its literals are
marked when it is compiled: each special token in them becomes one lone surrogate, a character that no Unicode text has
and that is refused in everything that people and tools say. Whatever the template does then, joins, slices, trims or
prints JSON, a surrogate in the rendered text came from a literal, and everything else is ordinary text.

Literals that are only compared or searched for are not marked: ``'<think>' in message.content`` looks for what was
typed. A token that a template puts together of pieces, or of a role's name, stays ordinary text.
"""

# ruff: noqa: N802  (jinja2 calls visitors by the names of its nodes)
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from ...errors import HerdError

_FIRST, _MOST = 0xD800, 0x800
_MARKED = re.compile("([\ud800-\udfff])")
_SEARCHING = frozenset((
    "count", "endswith", "find", "get", "index", "lstrip", "partition", "removeprefix", "removesuffix", "replace",
    "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "startswith", "strip",
))


class ControlTokens:
    """The special tokens that a template writes.

    Args:
        tokens: all special tokens of the vocabulary.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        longest_first = sorted(filter(None, tokens), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._marks: dict[str, str] = {}

    def mark(self, text: str) -> str:
        """A text of the template with every special token replaced by its mark.

        Raises:
            HerdError: they are too many.
        """
        return self._pattern.sub(lambda found: self._mark(found.group()), text)

    def mark_literals(self, tree: nodes.Template) -> None:
        """Mark all that a template may print."""
        _Marking(self).visit(tree)

    def unmark(self, rendered: str) -> str:
        """The text with its special tokens spelled out."""
        return "".join(token or text for token, text in self.split(rendered))

    def split(self, rendered: str) -> Iterator[tuple[str, str]]:
        """The text as pairs of which one is empty: a control token, or ordinary text."""
        tokens = {mark: token for token, mark in self._marks.items()}
        for index, part in enumerate(_MARKED.split(rendered)):
            if index % 2 and part in tokens:
                yield tokens[part], ""
            elif part:
                yield "", part

    def _mark(self, token: str) -> str:
        if token not in self._marks:
            if len(self._marks) == _MOST:
                raise HerdError(f"the chat template writes more than {_MOST} different special tokens")
            self._marks[token] = chr(_FIRST + len(self._marks))
        return self._marks[token]


class _Marking(NodeTransformer):
    def __init__(self, tokens: ControlTokens) -> None:
        self._tokens = tokens

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        node.data = self._tokens.mark(node.data)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if isinstance(node.value, str):
            node.value = self._tokens.mark(node.value)
        return node

    def visit_Operand(self, node: nodes.Operand) -> nodes.Node:
        return self._but_for(node, node.expr)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        return self._but_for(node, node.expr)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        return self._but_for(node, node.arg)

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        return self._but_for(node, *node.args)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        return self._but_for(node, *(node.args[:1] if node.name == "replace" else ()))

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        searches = isinstance(node.node, nodes.Getattr) and node.node.attr in _SEARCHING
        return self._but_for(node, *(node.args[:1] if searches else ()))

    def _but_for(self, node: nodes.Node, *kept: nodes.Node) -> nodes.Node:
        """Mark inside of a node, except in literals that are only looked for."""
        values = [(literal, literal.value) for literal in kept if isinstance(literal, nodes.Const)]
        self.generic_visit(node)
        for literal, value in values:
            literal.value = value
        return node
