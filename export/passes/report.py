"""What a pass says, at debug level, of what it rewrote and what it declined."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult

SHOWN = 8
"""Names in a message; the rest is counted."""


def report(
    rewrite: InPlacePass, model: ir.Model, rewrote: Sequence[ir.Node | ir.Value],
    declined: Iterable[tuple[ir.Node | ir.Value, str]] = (),
) -> PassResult:
    """Log what a pass did, and return its result.

    Args:
        rewrite: the pass; its module's logger is used.
        model: rewritten in place.
        rewrote: nodes, or inputs and outputs of the graph, that were rewritten.
        declined: what might have been rewritten, and why it was not.
    """
    logger, name = logging.getLogger(type(rewrite).__module__), type(rewrite).__name__
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("%s rewrote %d: %s", name, len(rewrote), _names(rewrote))
        reasons: dict[str, list[ir.Node | ir.Value]] = {}
        for item, reason in declined:
            reasons.setdefault(reason, []).append(item)
        for reason, items in reasons.items():
            logger.debug("%s declined %d, %s: %s", name, len(items), reason, _names(items))
    return PassResult(model, modified=bool(rewrote))


def _names(items: Sequence[ir.Node | ir.Value]) -> str:
    shown = ", ".join(str(item.name) for item in items[:SHOWN])
    return f"{shown} and {len(items) - SHOWN} more" if len(items) > SHOWN else shown or "nothing"
