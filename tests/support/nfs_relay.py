"""A TCP relay in front of a NAS that understands just enough RPC to misbehave on demand.

It runs in the test's own trio loop.  Rules are armed per NFSv3 procedure and used up in order;
a call without a rule is passed on, and so is its answer.
"""

from __future__ import annotations

import struct
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

_NFS_PROGRAM = 100003
_LAST_FRAGMENT = 0x80000000

PROCEDURES = (
    "null", "getattr", "setattr", "lookup", "access", "readlink", "read", "write", "create",
    "mkdir", "symlink", "mknod", "remove", "rmdir", "rename", "link", "readdir", "readdirplus",
    "fsstat", "fsinfo", "pathconf", "commit",
)
"""By their numbers in RFC 1813."""


@dataclass
class _Rule:
    kind: str
    status: int = 0
    before_cut: Callable[[], None] = lambda: None
    gate: trio.Event = field(default_factory=trio.Event)


class NfsRelay:
    def __init__(self, target_port: int) -> None:
        self.calls: Counter[str] = Counter()
        """NFS calls that arrived here, by procedure."""
        self.connections = 0
        self.port = 0
        self._target_port = target_port
        self._rules: dict[str, deque[_Rule]] = defaultdict(deque)
        self._called = trio.Event()

    def let_pass(self, procedure: str) -> None:
        """The next such call is left alone, so that a later rule meets a later call."""
        self._rules[procedure].append(_Rule("let pass"))

    def lose_answer(self, procedure: str) -> None:
        """The next such call is applied; its answer is thrown away and the connection cut."""
        self._rules[procedure].append(_Rule("lose answer"))

    def lose_call(self, procedure: str, before_cut: Callable[[], None] = lambda: None) -> None:
        """The next such call never reaches the NAS; the connection is cut."""
        self._rules[procedure].append(_Rule("lose call", before_cut=before_cut))

    def answer(self, procedure: str, status: int, *, times: int = 1) -> None:
        """The next such calls do not reach the NAS but are answered with this nfsstat3."""
        self._rules[procedure].extend(_Rule("answer", status) for _ in range(times))

    def hold_answer(self, procedure: str) -> trio.Event:
        """The answer to the next such call waits for the event; others overtake it."""
        rule = _Rule("hold answer")
        self._rules[procedure].append(rule)
        return rule.gate

    async def wait_called(self, procedure: str, count: int = 1) -> None:
        while self.calls[procedure] < count:
            self._called = trio.Event()
            await self._called.wait()

    async def serve(self, client: trio.SocketStream) -> None:
        self.connections += 1
        try:
            target = await trio.open_tcp_stream("127.0.0.1", self._target_port)
        except OSError:
            await client.aclose()
            return
        async with client, target:
            await _Connection(self, client, target).run()

    def take_rule(self, procedure: str) -> _Rule | None:
        self.calls[procedure] += 1
        self._called.set()
        return self._rules[procedure].popleft() if self._rules[procedure] else None


class _Connection:
    def __init__(
        self, relay: NfsRelay, client: trio.SocketStream, target: trio.SocketStream
    ) -> None:
        self._relay, self._client, self._target = relay, client, target
        self._by_xid: dict[int, _Rule] = {}
        self._client_lock = trio.Lock()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            self._scope = nursery.cancel_scope
            self._nursery = nursery
            nursery.start_soon(self._pump, self._client, self._on_call)
            nursery.start_soon(self._pump, self._target, self._on_reply)

    async def _pump(
        self, source: trio.SocketStream, handle: Callable[[bytes], object]
    ) -> None:
        buffer = bytearray()
        try:
            async for data in source:
                buffer += data
                while (record := _take_record(buffer)) is not None:
                    await handle(record)  # type: ignore[misc]
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self._scope.cancel()

    async def _on_call(self, record: bytes) -> None:
        xid, _, _, program, _, number = struct.unpack_from(">6I", record)
        name = PROCEDURES[number] if program == _NFS_PROGRAM else ""
        rule = self._relay.take_rule(name) if program == _NFS_PROGRAM else None
        if rule is None:
            await self._target.send_all(_framed(record))
        elif rule.kind == "lose call":
            rule.before_cut()
            self._scope.cancel()
        elif rule.kind == "answer":
            # Accepted, empty verifier, success; then the status and "no attributes" throughout.
            await self._to_client(struct.pack(">7I", xid, 1, 0, 0, 0, 0, rule.status) + bytes(32))
        else:
            self._by_xid[xid] = rule
            await self._target.send_all(_framed(record))

    async def _on_reply(self, record: bytes) -> None:
        rule = self._by_xid.pop(struct.unpack_from(">I", record)[0], None)
        if rule is None:
            await self._to_client(record)
        elif rule.kind == "lose answer":
            self._scope.cancel()
        elif rule.kind == "let pass":
            await self._to_client(record)
        else:
            self._nursery.start_soon(self._later, rule.gate, record)

    async def _later(self, gate: trio.Event, record: bytes) -> None:
        await gate.wait()
        await self._to_client(record)

    async def _to_client(self, record: bytes) -> None:
        async with self._client_lock:
            await self._client.send_all(_framed(record))


@asynccontextmanager
async def running_relay(target_port: int) -> AsyncIterator[NfsRelay]:
    relay = NfsRelay(target_port)
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        relay.port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, relay.serve, listeners)
        yield relay
        nursery.cancel_scope.cancel()


def _take_record(buffer: bytearray) -> bytes | None:
    """The next complete record, without its marks (RFC 5531 §11)."""
    position, fragments = 0, []
    while len(buffer) >= position + 4:
        mark = struct.unpack_from(">I", buffer, position)[0]
        end = position + 4 + (mark & ~_LAST_FRAGMENT)
        if len(buffer) < end:
            return None
        fragments.append(bytes(buffer[position + 4 : end]))
        position = end
        if mark & _LAST_FRAGMENT:
            del buffer[:position]
            return b"".join(fragments)
    return None


def _framed(record: bytes) -> bytes:
    return struct.pack(">I", _LAST_FRAGMENT | len(record)) + record
