"""Exchanges between processes of one machine through memory that all of them map.

A *channel* has one writer and some readers: a ring of slots, a word that counts what was written, and a word per reader
that counts what it has read. The writer fills slot ``written % SLOTS`` once every reader has passed it, then raises its
word; readers wait for that word. Every word has one writer, and x86 keeps the order of stores, so no lock is needed.

All-reduce: everybody writes its part to a channel of its own and adds the parts of all, in the order of the ranks. A
rank that writes part i + 2 knows that the others have read part i. Messages longer than a slot travel in slots.

Who waits first looks again and again, then lets others run, then sleeps for a part of the time that it has waited. It
looks whether the one it waits for still lives, and writes down whom it waits for and until when: in a chain of waiting
ranks the one that could go on is the one that stalls.
"""

from __future__ import annotations

import mmap
import os
import platform
import sys
import time
from typing import NoReturn

import numpy as np

from .collectives import TIMEOUT, Array, Collectives, RankError, stalled
from .process_state import alive, is_stopped

SLOT = 1 << 20
SLOTS = 2
_LINE = 64
"""Bytes of a cache line: words of different writers do not share one."""
_WORDS = _LINE // 8
_TEXT = 1024

_PID, _FAILED, _BARRIERS, _WAITS_FOR = range(4)
"""Words in a rank's line; the last is followed by the word that it waits for, and what that has to reach."""
_MARKS = _WAITS_FOR + 3
"""Counts steps; followed by the number of the rank with which the last one is taken, and 1, or 0 for the stage."""
_LOOKS = 100
"""Times that a waiting rank looks before it lets others run: about 10 µs."""
_AWAKE = 2e-3
"""Seconds until a waiting rank begins to sleep."""
_LONGEST_SLEEP = 5e-3
_HEARTBEAT = 0.05
"""Seconds between two looks at whether another process lives."""


def supported() -> bool:
    """Whether this machine orders stores and shares anonymous files as the ring needs it."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


def create(world: int) -> int:
    """A file in memory for so many ranks, as a descriptor; it vanishes with the last process that holds it."""
    descriptor = os.memfd_create("herdgraph")
    os.truncate(descriptor, _Layout(world).bytes)
    return descriptor


class _Layout:
    """Where things lie: a line and a text of every rank, then the channels."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.channel_bytes = (1 + world) * _LINE + SLOTS * SLOT
        self.channels = -(-world * (_LINE + _TEXT) // mmap.PAGESIZE) * mmap.PAGESIZE
        self.bytes = self.channels + (2 * world + 1) * self.channel_bytes


class SharedMemory(Collectives):
    """See the module.

    Args:
        descriptor: of ``create``.
        rank: index of this process.
        world: number of processes.
        group: the ranks of this one's stage.
        timeout: seconds that a rank may keep the others waiting in the middle of a call.
    """

    def __init__(self, descriptor: int, rank: int, world: int, group: range, *, timeout: float = TIMEOUT) -> None:
        super().__init__(rank, world, group, timeout)
        self.layout = _Layout(world)
        self.memory = mmap.mmap(descriptor, self.layout.bytes)
        os.close(descriptor)
        self.words = memoryview(self.memory)[: self.layout.bytes // 8 * 8].cast("q")
        self._sums = [Channel(self, index, index) for index in range(world)]
        self._posts = [Channel(self, world + index, index) for index in range(world)]
        self._commands = Channel(self, 2 * world, 0)
        self.words[self._cell(rank, _PID)] = os.getpid()

    # -- exchanges -----------------------------------------------------------------------------------------------

    def all_reduce(self, value: Array, result: Array) -> None:
        """See ``Collectives``."""
        with self.counted():
            flat, total = value.reshape(-1), result.reshape(-1)
            step = SLOT // flat.itemsize
            for begin in range(0, flat.size, step):
                self._sum(flat[begin : begin + step], total[begin : begin + step])

    def _sum(self, part: Array, total: Array) -> None:
        self._sums[self.rank].put(part, self.group)
        for index, member in enumerate(self.group):
            theirs = self._sums[member].peek(part.nbytes).view(part.dtype)
            if index == 0:
                total[:] = theirs
            else:
                total += theirs
            self._sums[member].release()

    def all_gather(self, value: Array, result: Array) -> None:
        """See ``Collectives``."""
        with self.counted():
            rows, width = value.reshape(-1, value.shape[-1]), len(self.group)
            joined = result.reshape(len(rows), width, value.shape[-1])
            step = SLOT // value.itemsize
            for row, target in zip(rows, joined, strict=True):
                for begin in range(0, len(row), step):
                    self._gather(row[begin : begin + step], target[:, begin : begin + step])

    def _gather(self, part: Array, target: Array) -> None:
        self._sums[self.rank].put(part, self.group)
        for place, member in zip(target, self.group, strict=True):
            place[:] = self._sums[member].peek(part.nbytes).view(part.dtype)
            self._sums[member].release()

    def send(self, value: Array, target: int) -> None:
        """See ``Collectives``."""
        with self.counted():
            self._posts[self.rank].write(value, range(target, target + 1))

    def receive(self, result: Array, source: int) -> None:
        """See ``Collectives``."""
        with self.counted():
            self._posts[source].read(result)

    def broadcast(self, value: Array) -> None:
        """See ``Collectives``."""
        if self.rank == 0:
            self._commands.write(value, range(1, self.world))
        else:
            self._commands.read(value, patient=True)

    def barrier(self) -> None:
        """See ``Collectives``."""
        mine = self._cell(self.rank, _BARRIERS)
        self.words[mine] += 1
        for member in range(self.world):
            self.wait(self._cell(member, _BARRIERS), self.words[mine], member, patient=True)

    # -- waiting and failing -------------------------------------------------------------------------------------

    def wait(self, cell: int, least: int, rank: int, *, patient: bool = False) -> None:
        """Until another rank has raised a word.

        Args:
            cell: index of the word.
            least: what it has to reach.
            rank: who raises it.
            patient: wait as long as that process lives.

        Raises:
            RankError: a rank failed, ended or stalls.
        """
        words = self.words
        for _ in range(_LOOKS):
            if words[cell] >= least:
                return
        mine = self._cell(self.rank, _WAITS_FOR)
        words[mine], words[mine + 1], words[mine + 2] = rank + 1, cell, least
        waited, heartbeat, before = 0.0, 0.0, time.monotonic()
        while words[cell] < least:
            if waited < _AWAKE:
                os.sched_yield()
            else:
                time.sleep(min(waited / 40, _LONGEST_SLEEP))
            now = time.monotonic()
            waited += min(now - before, 2 * _HEARTBEAT)  # a process that was stopped itself has not waited meanwhile
            before = now
            if waited > heartbeat:
                self._check(rank, cell, least)
                heartbeat = waited + _HEARTBEAT
            if waited > self.timeout and not patient:
                self._fail_stalled(rank)
        words[mine] = 0

    def _check(self, rank: int, cell: int, least: int) -> None:
        """Nobody has failed, and the one that is waited for lives, or raised the word before it ended."""
        self._check_told()
        if not self._lives(rank) and self.words[cell] < least:
            self._raise_ended(rank)

    def _check_told(self) -> None:
        for member in range(self.world):
            if self.words[self._cell(member, _FAILED)]:
                raise RankError(self._text(member))

    def _lives(self, rank: int) -> bool:
        pid = self.pid(rank)
        return not pid or alive(pid)

    def check(self) -> None:
        """See ``Collectives``."""
        self._check_told()
        for member in range(self.world):
            if not self._lives(member):
                self._raise_ended(member)

    def mark(self, peer: int | None = None) -> None:
        """See ``Collectives``."""
        mine = self._cell(self.rank, _MARKS)
        self.words[mine + 1] = 0 if peer is None else peer + 1
        self.words[mine] += 1

    def blame(self) -> str:
        """See ``Collectives``: ranks whose processes are stopped, else the end of the chain of those that wait.

        Marks alone do not tell: a rank that is stopped in a step which all of its stage have begun looks like them.
        """
        stopped = [rank for rank in range(self.world) if is_stopped(self.pid(rank))]
        named = stopped or self._end_of_chain()
        return stalled(named, self.timeout) if named else ""

    def _end_of_chain(self) -> list[int]:
        """The rank that this one waits for in the end, if it waits for any."""
        seen = [self.rank]
        while (further := self._keeps_waiting(seen[-1])) is not None and further not in seen:
            seen.append(further)
        return seen[1:][-1:]

    def _keeps_waiting(self, rank: int) -> int | None:
        """The rank with which another takes its step, or one of its stage that is behind."""
        steps, peer = self.words[self._cell(rank, _MARKS) :][:2].tolist()
        if peer:
            return int(peer) - 1
        first = rank // len(self.group) * len(self.group)
        stage = range(first, first + len(self.group))
        return next((member for member in stage if self.words[self._cell(member, _MARKS)] < steps), None)

    def _fail_stalled(self, rank: int) -> NoReturn:
        """Name the rank at the end of the chain of those that wait for each other."""
        for _ in range(self.world):
            first = self._cell(rank, _WAITS_FOR)
            further, cell, least = self.words[first : first + 3].tolist()
            if not further or self.words[cell] >= least:  # it could go on, and does not
                break
            rank = further - 1
        self._raise(stalled([rank], self.timeout, f" (process {self.pid(rank)})"))

    def _raise_ended(self, rank: int) -> NoReturn:
        self._check_told()  # it may have told why, and ended, since the last look
        self._raise(f"rank {rank} (process {self.pid(rank)}) has ended")

    def _raise(self, message: str) -> NoReturn:
        self.fail(message)
        raise RankError(message)

    def fail(self, message: str) -> None:
        """See ``Collectives``."""
        text = message.encode()[: _TEXT - 1]
        begin = self._text_at(self.rank)
        self.memory[begin : begin + _TEXT] = text.ljust(_TEXT, b"\0")
        self.words[self._cell(self.rank, _FAILED)] = 1

    def expect(self, rank: int, pid: int) -> None:
        """Know a rank's process before it has come, so that its end is seen."""
        self.words[self._cell(rank, _PID)] = pid

    def pid(self, rank: int) -> int:
        """Process of a rank; 0 as long as it has not come."""
        return self.words[self._cell(rank, _PID)]

    def _cell(self, rank: int, which: int) -> int:
        return rank * _WORDS + which

    def _text_at(self, rank: int) -> int:
        return self.world * _LINE + rank * _TEXT

    def _text(self, rank: int) -> str:
        begin = self._text_at(rank)
        return self.memory[begin : begin + _TEXT].rstrip(b"\0").decode(errors="replace")


class Channel:
    """A ring of slots with one writer.

    Args:
        link: the memory, and who this rank is.
        index: of the channel.
        writer: rank that writes.
    """

    def __init__(self, link: SharedMemory, index: int, writer: int) -> None:
        layout = link.layout
        begin = layout.channels + index * layout.channel_bytes
        self._link, self._writer = link, writer
        self._written = begin // 8
        self._read = [begin // 8 + (1 + reader) * _WORDS for reader in range(layout.world)]
        slots = begin + (1 + layout.world) * _LINE
        self._slots = [np.frombuffer(link.memory, np.uint8, SLOT, slots + slot * SLOT) for slot in range(SLOTS)]
        self._count = 0
        """Slots that this rank has written or passed."""

    def put(self, part: Array, readers: range) -> None:
        """Write one slot, as soon as every other reader has passed what is in it."""
        link, free = self._link, self._count - SLOTS + 1
        for reader in readers:
            if reader != link.rank:
                link.wait(self._read[reader], free, reader)
        self._slots[self._count % SLOTS][: part.nbytes] = part.view(np.uint8)
        self._count += 1
        link.words[self._written] = self._count

    def peek(self, size: int, *, patient: bool = False) -> Array:
        """The next slot's first bytes, as soon as they are there; the writer sees what it wrote last."""
        if self._writer == self._link.rank:
            return self._slots[(self._count - 1) % SLOTS][:size]
        self._link.wait(self._written, self._count + 1, self._writer, patient=patient)
        return self._slots[self._count % SLOTS][:size]

    def release(self) -> None:
        """Pass the slot: the writer may use it again."""
        if self._writer != self._link.rank:
            self._count += 1
            self._link.words[self._read[self._link.rank]] = self._count

    def write(self, value: Array, readers: range) -> None:
        """Write an array of any size."""
        flat = value.reshape(-1).view(np.uint8)
        for begin in range(0, flat.size, SLOT):
            self.put(flat[begin : begin + SLOT], readers)

    def read(self, result: Array, *, patient: bool = False) -> None:
        """Read an array of any size."""
        flat = result.reshape(-1).view(np.uint8)
        for begin in range(0, flat.size, SLOT):
            part = flat[begin : begin + SLOT]
            part[:] = self.peek(part.size, patient=patient)
            self.release()
