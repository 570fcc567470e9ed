"""Several connections to one NAS, kept up for ever, and requests repeated until answered.

Owns reconnecting, which connection a request takes, and the repetition of requests whose
connection was lost.  Does not know what the requests mean: whether a repetition may have been
applied twice is told to the caller through `Attempts`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TypeVar

import trio

from filer.core_filer.backoff import backoff_s
from filer.core_filer.base import CoreFilerState
from filer.core_filer.observed import report_reachable
from filer.core_filer.rpc_connection import (
    Connection,
    ConnectionLost,
    Limits,
    NotConnected,
    Request,
)

_T = TypeVar("_T")

class Lane(enum.Enum):
    """Small requests must not queue behind megabytes, nor the other way round."""

    METADATA = "metadata"
    BULK = "bulk"


@dataclass(slots=True)
class Attempts:
    """What became of one request so far."""

    lost: int = 0
    outage: bool = False
    """The server did not accept connections meanwhile: it may have died in the middle of it."""

    @property
    def uncertain(self) -> bool:
        """An attempt was sent and its answer lost: it may have been applied."""
        return self.lost > 0


class Pool:
    """*connections* ≥ 1 to *host*; with two or more, the first is for metadata."""

    def __init__(
        self, host: str, port: int, null: Callable[..., int], *, connections: int,
        machine_name: str, random: Random, limits: Limits,
    ) -> None:
        self._host, self._port, self._null = host, port, null
        self._machine_name, self._random, self._limits = machine_name, random, limits
        self._slots: list[Connection | None] = [None] * connections
        self._came_up = trio.Event()
        self._waiting = 0
        self._refusals = 0
        """Attempts to connect that failed."""
        self._reconnects = -connections
        self._unreachable_since_s: float | None = trio.current_time()
        self._reason = "not yet connected"

    async def run(self) -> None:
        """Keep the connections up until cancelled."""
        async with trio.open_nursery() as nursery:
            for index in range(len(self._slots)):
                nursery.start_soon(self._keep_up, index)

    async def wait_up(self) -> None:
        """Until at least one connection is up."""
        while self._choose(Lane.METADATA) is None:
            await self._came_up.wait()

    def state(self) -> CoreFilerState:
        return CoreFilerState(
            reachable=self._unreachable_since_s is None,
            unreachable_since=self._unreachable_since_s,
            reason=self._reason, in_flight=self._waiting, reconnects=max(0, self._reconnects),
        )

    async def call(self, request: Request[_T], lane: Lane, attempts: Attempts) -> _T:
        """Repeat until a reply comes; *attempts* tells about those before.

        Raises RpcRejected, Unencodable, or what decoding the reply raises.
        """
        self._waiting += 1
        refusals = self._refusals
        try:
            while True:
                connection = self._choose(lane)
                if connection is None:
                    await self.wait_up()
                    continue
                try:
                    return await connection.call(request)
                except NotConnected:
                    # It was lost and its task has not noticed yet; it must get to run.
                    await trio.lowlevel.checkpoint()
                except ConnectionLost:
                    attempts.lost += 1
                    if attempts.lost > 1:
                        # Maybe it is this very request that the server cannot bear.
                        await trio.sleep(backoff_s(attempts.lost, self._random))
        finally:
            self._waiting -= 1
            attempts.outage |= attempts.uncertain and self._refusals != refusals

    def _choose(self, lane: Lane) -> Connection | None:
        """The least loaded of the lane; any other if the lane has none."""
        up = [c for c in self._slots if c is not None and c.lost_reason is None]
        if len(self._slots) > 1:
            first = self._slots[0]
            preferred = [c for c in up if (c is first) == (lane is Lane.METADATA)]
            up = preferred or up
        return min(up, key=lambda c: (c.in_flight_bytes, c.in_flight), default=None)

    async def _keep_up(self, index: int) -> None:
        failures = 0
        while True:
            connection = Connection(
                self._null, machine_name=self._machine_name, limits=self._limits
            )
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.run, self._host, self._port, failures)
                try:
                    await connection.wait_up()
                except NotConnected:
                    failures += 1
                else:
                    failures = 0
                    self._up(index, connection)
            self._down(index, connection)
            await trio.sleep(backoff_s(max(failures, 1), self._random))

    def _up(self, index: int, connection: Connection) -> None:
        self._slots[index] = connection
        self._reconnects += 1
        self._unreachable_since_s, self._reason = None, ""
        report_reachable(True)
        self._came_up.set()
        self._came_up = trio.Event()

    def _down(self, index: int, connection: Connection) -> None:
        was_up, self._slots[index] = self._slots[index] is connection, None
        alive = [c for c in self._slots if c is not None and c.lost_reason is None]
        if was_up:
            for other in alive:
                other.suspect()
        else:
            self._refusals += 1
        if not alive:
            self._reason = connection.lost_reason or ""
            if self._unreachable_since_s is None:
                self._unreachable_since_s = connection.heard_s
                report_reachable(False)
