"""A disk that keeps no promise it was not asked for: what is not synced may be lost, torn or
reordered by a crash, names included.  Seeded, deterministic.

Each unsynced write may survive a crash wholly, up to any byte, or not at all, independently of
the others; so may a truncation.  A created or removed name survives by itself, or not, until
the directory is synced.  This is weaker than any real file system: what survives here survives
there.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

import trio

from filer.disk import Buffer


@dataclass(eq=False)
class _Content:
    """A file's bytes, with or without a name."""

    stable: bytes = b""
    """What a crash leaves at least."""
    unsynced: list[tuple[int, bytes | None]] = field(default_factory=list)
    """Writes (position, bytes) and truncations (size, None) since the last sync."""
    now: bytearray = field(default_factory=bytearray)

    def after(self, survivors: Sequence[tuple[int, bytes | None]]) -> bytes:
        result = bytearray(self.stable)
        for at, data in survivors:
            if data is None:
                _resize(result, at)
            elif data:
                _resize(result, max(len(result), at))
                result[at : at + len(data)] = data
        return bytes(result)


def _resize(content: bytearray, size: int) -> None:
    if size < len(content):
        del content[size:]
    else:
        content.extend(bytes(size - len(content)))


class SimFile:
    def __init__(self, disk: SimDisk, content: _Content) -> None:
        self._disk = disk
        self._content = content
        self._generation = disk.generation
        self._is_closed = False

    def can_write_now(self, byte_count: int) -> bool:
        return byte_count <= self._disk.inline_bytes_max

    async def write(self, start: int, buffers: Sequence[Buffer]) -> None:
        await self._arrive()
        self.write_now(start, buffers)

    def write_now(self, start: int, buffers: Sequence[Buffer]) -> None:
        self._disk._refuse_if_read_only()
        data = b"".join(bytes(buffer) for buffer in buffers)
        room = self._disk._room_for(self._content, start + len(data))
        # A disk that fills up has written the beginning.
        accepted = data[: max(0, room - start)]
        failure = self._disk.fail_writes
        if failure:
            random = self._disk.random
            accepted = data[: random.choice([0, random.randint(0, len(data)), len(data)])]
        if accepted:
            content = self._content
            content.unsynced.append((start, accepted))
            _resize(content.now, max(len(content.now), start))
            content.now[start : start + len(accepted)] = accepted
        if failure:
            raise OSError(failure, os.strerror(failure))
        if len(accepted) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def read(self, start: int, end: int) -> bytes:
        await self._arrive()
        if self._disk.fail_reads:
            raise OSError(self._disk.fail_reads, os.strerror(self._disk.fail_reads))
        return bytes(self._content.now[start:end])

    async def sync(self) -> None:
        await self._arrive()
        self._disk._refuse_if_read_only()
        self._disk.sync_count += 1
        pending = list(self._content.unsynced)
        await trio.lowlevel.checkpoint()
        if self._disk.fail_syncs:
            # The kernel drops what it could not write and does not try again.
            del self._content.unsynced[: len(pending)]
            raise OSError(self._disk.fail_syncs, os.strerror(self._disk.fail_syncs))
        self._content.stable = self._content.after(pending)
        del self._content.unsynced[: len(pending)]

    async def start_write_out(self, start: int, end: int) -> None:
        await self._arrive()

    async def truncate(self, size: int) -> None:
        await self._arrive()
        self._disk._refuse_if_read_only()
        if self._disk.fail_writes:
            raise OSError(self._disk.fail_writes, os.strerror(self._disk.fail_writes))
        self._content.unsynced.append((size, None))
        _resize(self._content.now, size)

    async def size(self) -> int:
        await self._arrive()
        return len(self._content.now)

    def close(self) -> None:
        self._is_closed = True

    async def _arrive(self) -> None:
        await self._disk._arrive()
        assert not self._is_closed, "used after close"
        assert self._generation == self._disk.generation, "used after a crash"


class SimDisk:
    """Set the public attributes to make it fail."""

    def __init__(self, seed: int = 0) -> None:
        self.random = Random(seed)
        self.generation = 0
        self.inline_bytes_max = -1 if seed % 2 == 0 else 2000
        self.capacity_bytes: int | None = None
        self.fail_writes = 0
        self.fail_reads = 0
        self.fail_syncs = 0
        """Of files."""
        self.is_read_only = False
        """As a file system that its kernel has given up on."""
        self.before_operation: Callable[[], None] = lambda: None
        self.sync_count = 0
        self._names: dict[str, _Content] = {}
        self._stable_names: dict[str, _Content] = {}

    # --- Disk

    async def names(self) -> list[str]:
        await self._arrive()
        return list(self._names)

    async def open(self, name: str) -> SimFile:
        await self._arrive()
        return SimFile(self, self._names[name])

    async def create(self, name: str) -> SimFile:
        await self._arrive()
        self._refuse_if_read_only()
        if self.fail_writes:
            raise OSError(self.fail_writes, os.strerror(self.fail_writes))
        content = self._names.get(name)
        if content is None:
            content = self._names[name] = _Content()
        else:
            content.unsynced.append((0, None))
            content.now.clear()
        return SimFile(self, content)

    async def remove(self, name: str) -> None:
        await self._arrive()
        self._refuse_if_read_only()
        del self._names[name]

    async def sync_directory(self) -> None:
        await self._arrive()
        self._refuse_if_read_only()
        self._stable_names = dict(self._names)

    async def free_bytes(self) -> int:
        await self._arrive()
        return 1 << 40 if self.capacity_bytes is None else self.capacity_bytes - self.used_bytes

    # --- the world

    @property
    def used_bytes(self) -> int:
        return sum(len(content.now) for content in self._names.values())

    def contents(self) -> dict[str, bytes]:
        return {name: bytes(content.now) for name, content in self._names.items()}

    @classmethod
    def holding(cls, contents: dict[str, bytes], seed: int = 0) -> SimDisk:
        """A disk on which *contents* is stable."""
        disk = cls(seed)
        disk._names = {name: _Content(data, [], bytearray(data)) for name, data in contents.items()}
        disk._stable_names = dict(disk._names)
        return disk

    def kill(self) -> None:
        """The process dies: everything written stays, open files are void."""
        self.generation += 1

    def crash(self) -> None:
        """The machine dies: of what was not synced anything may survive."""
        self.generation += 1
        self._become(self._random_state())

    def crash_states(self) -> Iterator[dict[str, bytes]]:
        """Contents that a crash now could leave: a systematic choice instead of a random one.

        Every subset of surviving names; for each file every subset of its unsynced writes (of
        the last six of them) and each prefix of the sequence torn at a few telling bytes.
        """
        doubtful = sorted(self._names.keys() ^ self._stable_names.keys())
        sure = [name for name in self._names if name in self._stable_names]
        for chosen in _subsets(doubtful):
            names = sure + [name for name in doubtful if name in chosen]
            variants = [[(name, v) for v in self._file_states(name)] for name in names]
            # One file at a time varies freely, the others are at an extreme: a product over all
            # would explode and finds the same mistakes.
            for extreme in (0, -1):
                base = {name: states[extreme][1] for name, states in zip(names, variants,
                                                                         strict=True)}
                yield base
                for states in variants:
                    for name, content in states[1:-1]:
                        yield {**base, name: content}

    def _file_states(self, name: str) -> list[bytes]:
        content = self._names.get(name) or self._stable_names[name]
        writes = content.unsynced
        states = [content.after([])]
        for count in range(len(writes)):
            at, data = writes[count]
            for cut in _telling_cuts(data):
                states.append(content.after([*writes[:count], (at, data[:cut])]))
        fixed, last = writes[:-6], writes[-6:]
        for subset in _subsets(range(len(last))):
            states.append(content.after([*fixed, *(last[i] for i in sorted(subset))]))
        states.append(content.after(writes))
        return states

    def _random_state(self) -> dict[str, bytes]:
        random = self.random
        doubtful = sorted(self._names.keys() ^ self._stable_names.keys())
        both = {**self._stable_names, **self._names}
        names = [n for n in self._names if n in self._stable_names]
        names += [name for name in doubtful if random.random() < 0.5]
        result = {}
        for name in names:
            content = both[name]
            survivors = []
            style = random.choice(["none", "all", "prefix", "any"])
            keep = random.randint(0, len(content.unsynced))
            for index, (at, data) in enumerate(content.unsynced):
                if style == "none" or (style == "prefix" and index > keep):
                    continue
                if style == "any" and random.random() < 0.5:
                    continue
                is_torn = data is not None and (
                    (style == "prefix" and index == keep) or
                    (style == "any" and random.random() < 0.5))
                if is_torn:
                    data = data[: random.randint(0, len(data))]
                survivors.append((at, data))
            result[name] = content.after(survivors)
        return result

    def _become(self, contents: dict[str, bytes]) -> None:
        other = SimDisk.holding(contents)
        self._names, self._stable_names = other._names, other._stable_names

    async def _arrive(self) -> None:
        await trio.lowlevel.checkpoint()
        self.before_operation()

    def _refuse_if_read_only(self) -> None:
        if self.is_read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def _room_for(self, content: _Content, end: int) -> int:
        if self.capacity_bytes is None:
            return end
        others = self.used_bytes - len(content.now)
        return max(len(content.now), self.capacity_bytes - others)


def _subsets(items: Sequence[int] | Sequence[str] | range) -> Iterator[set[object]]:
    for count in range(len(items) + 1):
        for chosen in itertools.combinations(items, count):
            yield set(chosen)


def _telling_cuts(data: bytes | None) -> list[int]:
    """Where to tear a write: every byte of small ones, and around the ends of larger ones."""
    if data is None:
        return []
    if len(data) <= 64:
        return list(range(1, len(data)))
    return sorted({1, 7, 51, 52, 53, len(data) // 2, len(data) - 1})
