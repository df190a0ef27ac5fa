"""The one exception type that is meant for people."""

from __future__ import annotations


class HerdError(Exception):
    """A wrong input or environment, told in one line: what was wrong, both values, what to do.

    Command lines print the message without a traceback and exit with status 1; applications may show it as it is.
    Anything else that escapes is a defect of herdgraph.
    """
