"""Calls of tools: how models are asked for them, held to them, and understood."""

from .definitions import Tool, checked_tools
from .formats import ToolChoice
from .messages import call_format, prepare_messages
from .openings import Format
from .parser import Part, TextPart, ToolArguments, ToolCallStart, ToolParser, joined

__all__ = ["Format", "Part", "TextPart", "Tool", "ToolArguments", "ToolCallStart", "ToolChoice", "ToolParser",
           "call_format", "checked_tools", "joined", "prepare_messages"]
