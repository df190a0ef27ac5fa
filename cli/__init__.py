"""The ``herdgraph`` command, one file per verb.

A verb imports what it needs when it runs: ``generate`` and ``chat`` work on a machine without torch, and every
``--help`` on the base install.
"""

from .group import main

__all__ = ["main"]
