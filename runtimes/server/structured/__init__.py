"""Answers of a given form: JSON of a schema, a regular expression, a choice, a grammar, or calls of tools."""

from .constraint import TokenConstraint
from .grammars import Grammars
from .spec import GrammarSpec

__all__ = ["GrammarSpec", "Grammars", "TokenConstraint"]
