"""Random histories of several clients, power cuts, kills, faults of disk and core filer.

Each client has a file of its own and remembers every content it had since the last successful
sync.  After any crash the file must have one of them; after everything is flushed the core filer
must have the last one.
"""

from __future__ import annotations

import errno
from random import Random

import pytest
import trio
from trio._core import _run

from filer.errors import Refused, TryAgain
from filer.ids import InodeId
from tests.sim.write_behind_rig import AT_ONCE, LATER, THROUGH, Rig

SPAN = 3000
"""Files are about this long: several segments' worth of records, several pieces a flush."""


class Client:
    """Changes one file at random and knows what it may contain."""

    def __init__(self, rig: Rig, inode: InodeId, random: Random) -> None:
        self.rig = rig
        self.inode = inode
        self.random = random
        self.possible = [b""]
        """Contents since the last sync, oldest first."""
        self.refusals: set[int] = set()

    async def run_for_ever(self) -> None:
        while True:
            await trio.sleep(self.random.choice([0, 0, 0, 0.01, 0.5, 3]))
            await self.act()

    async def act(self) -> None:
        service = self.rig.service
        match self.random.choices(
            ["write", "truncate", "times", "sync", "flush", "read"], [50, 8, 3, 12, 4, 20])[0]:
            case "write":
                start = self.random.randrange(SPAN)
                data = self.random.randbytes(self.random.choice([1, 10, 100, 700]))
                await self.change(
                    written(self.possible[-1], start, data),
                    self.rig.write(self.inode, start, data))
            case "truncate":
                size = self.random.choice([0, self.random.randrange(SPAN)])
                old = self.possible[-1]
                await self.change(
                    old[:size] + bytes(max(0, size - len(old))),
                    self.rig.set_size(self.inode, size))
            case "times":
                await self.change(
                    self.possible[-1], self.rig.set_times(self.inode, atime_ns=self.rig.clock()))
            case "sync":
                await self.durable(service.sync(self.inode))
            case "flush":
                report = await service.flush([self.inode])
                if not report.errors:
                    del self.possible[:-1]
            case "read":
                assert await self.rig.view(self.inode) == self.possible[-1]

    async def change(self, content: bytes, operation) -> None:
        self.possible.append(content)
        try:
            await operation
        except Refused as refused:
            self.refusals.add(refused.errno)
            self.possible.pop()
        except TryAgain:
            self.possible.pop()

    async def durable(self, operation) -> None:
        try:
            await operation
        except Refused as refused:
            self.refusals.add(refused.errno)
        else:
            del self.possible[:-1]

    async def restarted(self) -> None:
        view = await self.rig.view(self.inode)
        assert view in self.possible
        self.possible = [view]


def written(old: bytes, start: int, data: bytes) -> bytes:
    padded = old + bytes(max(0, start - len(old)))
    return padded[:start] + data + padded[start + len(data) :]


async def trouble(rig: Rig, random: Random, kinds: list[str]) -> None:
    """Something happens to the core filer or to the disk now and then, and passes."""
    while True:
        await trio.sleep(random.expovariate(0.5))
        match random.choice(kinds):
            case "core restart":
                rig.core.lose_unstable()
            case "core full":
                number = random.choice([errno.ENOSPC, errno.EDQUOT])
                operation = random.choice(["write", "write", "commit"])
                rig.core.fail_next(operation, Refused(number), times=random.randint(1, 3))
            case "core away":
                rig.core.disconnect()
                await trio.sleep(random.expovariate(0.1))
                rig.core.reconnect()
            case "disk full":
                rig.disk.capacity_bytes = rig.disk.used_bytes + random.randint(0, 500)
                await trio.sleep(random.expovariate(0.1))
                rig.disk.capacity_bytes = None
            case "disk refuses":
                rig.disk.fail_writes = errno.EIO
                await trio.sleep(random.expovariate(1))
                rig.disk.fail_writes = 0
            case "read-only":
                rig.disk.is_read_only = True
                await trio.sleep(random.expovariate(0.1))
                rig.disk.is_read_only = False
            case "fsync fails":
                rig.disk.fail_syncs = errno.EIO
                await trio.sleep(random.expovariate(1))
                rig.disk.fail_syncs = 0


CORE = ["core restart", "core full", "core away"]
DISK = ["disk full", "disk refuses"]

WORLDS = {
    "quiet": dict(policy=AT_ONCE, kinds=[]),
    "core in trouble": dict(policy=AT_ONCE, kinds=CORE),
    "through, core in trouble": dict(policy=THROUGH, kinds=CORE),
    "small limits": dict(policy=LATER, kinds=["core away"], dirty_bytes_max=4000),
    # A log that refuses may come back older than what the core filer already has, without a
    # record of the flush: until the guard has looked clients may see the older bytes, and
    # afterwards there is a conflict copy.
    "disk in trouble": dict(policy=AT_ONCE, kinds=DISK, may_conflict=True),
    "all in trouble": dict(policy=AT_ONCE, kinds=[*CORE, *DISK], may_conflict=True),
    "fsync fails": dict(policy=AT_ONCE, kinds=["fsync fails"], may_conflict=True),
    "disk turns read-only": dict(policy=AT_ONCE, kinds=["read-only"], lives=1),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("world", WORLDS)
async def test_nothing_acknowledged_is_lost_and_nothing_is_torn(
    world, seed, autojump_clock, monkeypatch
):
    monkeypatch.setattr(_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    _run._r.seed(seed)
    random = Random(f"{world} {seed}")
    settings = dict(WORLDS[world])
    kinds, lives = settings.pop("kinds"), settings.pop("lives", 6)
    may_conflict = settings.pop("may_conflict", False)
    rig = Rig(seed=seed, segment_bytes=4096, **settings)
    clients = [
        Client(rig, await rig.create(b"f%d" % i), Random(random.random())) for i in range(4)]

    for _ in range(lives):
        async with rig.running(), trio.open_nursery() as nursery:
            if may_conflict:
                await rig.service.drain()
            for client in clients:
                await client.restarted()
                nursery.start_soon(client.run_for_ever)
            if kinds:
                nursery.start_soon(trouble, rig, random, kinds)
            await trio.sleep(random.expovariate(0.05))
            nursery.cancel_scope.cancel()
            if lives == 1:
                heal(rig)
                await all_is_well(rig, clients)
        heal(rig)
        if random.random() < 0.7:
            rig.disk.crash()

    if lives > 1:
        async with rig.running():
            if may_conflict:
                await rig.service.drain()
            for client in clients:
                await client.restarted()
            await all_is_well(rig, clients)
    assert may_conflict or rig.namespace.conflicts == []


async def all_is_well(rig: Rig, clients: list[Client]) -> None:
    service = rig.service
    with trio.CancelScope(shield=True):
        while service.dirty_inodes():
            await service.drain()
        await trio.sleep(60)
        for client in clients:
            assert await rig.core_content(client.inode) in client.possible[-2:]
            assert client.refusals <= {errno.ENOSPC, errno.EDQUOT}
    statistics = service.statistics()
    assert (statistics.dirty_bytes, statistics.degraded, statistics.errors) == (0, "", {})
    assert rig.disk.used_bytes <= 3 * rig.settings.segment_bytes


def heal(rig: Rig) -> None:
    rig.core.reconnect()
    rig.core._faults.clear()
    rig.disk.capacity_bytes, rig.disk.is_read_only = None, False
    rig.disk.fail_writes = rig.disk.fail_syncs = 0
