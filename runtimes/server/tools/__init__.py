"""Calls of tools: how models are asked for them, held to them, and understood."""

from ..parts import CallArguments, CallStart, Part, TextPart
from .definitions import Tool, checked_tools
from .formats import ToolChoice
from .leading import LeadingCallParser
from .messages import call_formats, prepare_messages
from .openings import Format
from .parser import ToolParser, joined

__all__ = [
           "CallArguments",
           "CallStart",
           "Format",
           "LeadingCallParser",
           "Part",
           "TextPart",
           "Tool",
           "ToolChoice",
           "ToolParser",
           "call_formats",
           "checked_tools",
           "joined",
           "prepare_messages",
]
