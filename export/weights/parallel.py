"""Jobs on all cores, with the same results on any number of them.

Every job computes on one thread, its products of matrices too: what a job gives does not depend on what runs beside
it. torch and numpy release the interpreter lock while they compute, so that threads are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch

MOST_WORKERS = 8
"""Each worker holds a matrix of its own: memory grows with them, and the disk is the limit at last."""

_Result = TypeVar("_Result")


def workers() -> int:
    """Jobs that run side by side: one per thread of torch's (``OMP_NUM_THREADS``), at most ``MOST_WORKERS``."""
    return min(torch.get_num_threads(), MOST_WORKERS)


def in_parallel(jobs: Iterable[Callable[[], _Result]]) -> Iterator[_Result]:
    """Run jobs side by side, started in order; what they return, in the order in which they end.

    The first error stops the rest: jobs that have not begun never do, and those that run are waited for.
    """
    with _one_thread_each(workers()) as count, ThreadPoolExecutor(count) as pool:
        running = [pool.submit(job) for job in jobs]
        try:
            for job in as_completed(running):
                yield job.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _one_thread_each(count: int) -> Iterator[int]:
    """Let torch compute on one thread, new threads too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield count
    finally:
        torch.set_num_threads(before)
