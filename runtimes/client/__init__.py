"""Servers that others run, in OpenAI's form, used as if their model were here. Nothing but the standard library."""

from .address import Address
from .server import RemoteServer
from .stream import RemoteStream

__all__ = ["Address", "RemoteServer", "RemoteStream"]
