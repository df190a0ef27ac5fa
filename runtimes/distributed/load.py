"""Loading a sharded bundle: this process becomes rank 0 of several, or serves the one that is."""

from __future__ import annotations

from ...errors import HerdError
from ..bundle.manifest import Bundle
from ..executors.blocks import BlockRunner
from .buffered import BufferedShards
from .front_end import ShardedRunner
from .launch import join, start
from .options import ShardOptions, launched_externally
from .paged import PagedShards
from .processes import abandon
from .shard import load_shard
from .worker import serve


def load_sharded(bundle: Bundle, options: ShardOptions) -> ShardedRunner:
    """Load a sharded bundle with the other ranks.

    Where this process is one of several that somebody else has started, and not the first, it serves until the first
    one's engine is closed and then ends: this function does not return.

    Raises:
        HerdError: a rank cannot load, or they do not come together.
    """
    link, processes = (join(bundle, options), None) if launched_externally() else start(bundle, options)
    if link.rank:
        serve(bundle, link, options)
        raise SystemExit(0)
    try:
        shard, stage = load_shard(bundle, link, options)
        if isinstance(shard, BlockRunner):
            return PagedShards(shard, stage, bundle, processes)
        return BufferedShards(shard, stage, bundle, processes)
    except HerdError as error:
        raise HerdError(abandon(error, link, processes)) from error
    except BaseException as error:
        abandon(error, link, processes)
        raise
