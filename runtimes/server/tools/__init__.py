"""Calls of tools: how models are asked for them, held to them, and understood."""

from .definitions import Tool, checked_tools
from .formats import ToolChoice
from .openings import Format
from .parser import Part, TextPart, ToolArguments, ToolCallStart, ToolParser, joined

__all__ = ["Format", "Part", "TextPart", "Tool", "ToolArguments", "ToolCallStart", "ToolChoice", "ToolParser",
           "checked_tools", "joined"]
