"""Answers of a given form: JSON of a schema, a regular expression, a choice, a grammar, or calls of tools."""

from .constraint import TokenConstraint
from .form_or_calls import FormOrCalls
from .grammars import Grammars
from .spec import GrammarSpec

__all__ = ["FormOrCalls", "GrammarSpec", "Grammars", "TokenConstraint"]
