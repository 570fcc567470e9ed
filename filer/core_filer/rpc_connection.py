"""One TCP connection to an RPC program of a NAS, spoken by libnfs and driven by trio.

Owns the libnfs context, the requests in flight on it, and the judgement that the peer is gone.
Does not own reconnecting or repeating: when the connection is lost, everything in flight fails
with `ConnectionLost` and the object is of no further use.

libnfs encodes a call as it is queued and decodes a reply inside ``rpc_service``; the decoded
structure lives only during the callback, so requests bring the function that turns it into
Python values along.
"""

from __future__ import annotations

import itertools
import os
import select
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import outcome
import trio

from filer.core_filer._libnfs import ffi, lib
from filer.errors import FilerError, OutcomeUnknown, TryAgain

_T = TypeVar("_T")


class ConnectionLost(OutcomeUnknown):
    """The connection ended after the request was queued and before its reply came."""


class NotConnected(TryAgain):
    """The request was not sent."""


class RpcRejected(FilerError):
    """The server answered on the level of RPC: program or procedure missing, credentials…"""


class Unencodable(FilerError):
    """libnfs has 4 KiB for a call (and more for the data of WRITE); nothing was sent."""


@dataclass(frozen=True, slots=True)
class Request(Generic[_T]):
    procedure: Callable[..., int]
    """``procedure(context, callback, *arguments, private_data)``."""
    arguments: tuple[Any, ...]
    decode: Callable[[Any], _T]
    """From libnfs's ``void *data``; may raise, and the caller gets that."""
    payload_bytes: int = 0
    """By which requests are spread over connections."""
    keep_alive: Any = None
    """Buffers that the arguments point into."""


@dataclass(frozen=True, slots=True)
class Limits:
    silence_s: float = 15.0
    """With requests in flight, and probes, and nothing heard for so long, the peer is gone."""
    connect_s: float = 10.0
    """For the TCP connection and the first answer over it."""


@dataclass(slots=True, eq=False)
class _Call:
    request: Request[Any]
    connection: Connection
    task: trio.lowlevel.Task | None
    """``None``: nobody waits, it is a probe."""


_calls: dict[int, _Call] = {}
"""Everything in flight in this process, by what libnfs is given as private data."""
_call_ids = itertools.count(1)


class Connection:
    """*null* is the program's procedure 0: the first question on the connection, and the probe."""

    def __init__(
        self, null: Callable[..., int], *, machine_name: str, limits: Limits
    ) -> None:
        self.in_flight_bytes = 0
        self.lost_reason: str | None = None
        self.heard_s = trio.current_time()
        """When the peer last showed life, or was first asked after an idle time."""
        self._give_up_s = self.heard_s + limits.silence_s
        self._probe_request = Request(null, (), lambda data: None)
        self._limits = limits
        self._machine_name = machine_name
        self._context: Any = None
        self._in_flight: set[int] = set()
        self._rejected: list[tuple[int, str]] = []
        self._scope = trio.CancelScope()
        self._settled = trio.Event()
        self._up = False
        self._sendable = trio.Event()

    async def run(self, host: str, port: int, address_index: int = 0) -> None:
        """Connect and serve until the connection is lost; ``lost_reason`` then says why.

        Of several addresses of *host* the one with that index (modulo their number) is used.
        """
        try:
            with self._scope:
                await self._serve(host, port, address_index)
        finally:
            self._end(self.lost_reason or "closed")

    async def wait_up(self) -> None:
        """Raises NotConnected if it does not come up."""
        await self._settled.wait()
        if not self._up:
            raise NotConnected(self.lost_reason or "closed")

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    async def call(self, request: Request[_T]) -> _T:
        """Raises NotConnected, ConnectionLost, RpcRejected, Unencodable, or what decoding raises.

        After a cancellation the reply, if any, is ignored.
        """
        call_id = self._submit(request, trio.lowlevel.current_task())

        def abort(_: Callable[[], None]) -> trio.lowlevel.Abort:
            if _calls.pop(call_id, None) is not None:
                self._forget(call_id, request)
            return trio.lowlevel.Abort.SUCCEEDED

        result: _T = await trio.lowlevel.wait_task_rescheduled(abort)
        return result

    def suspect(self) -> None:
        """Another connection to this peer died: find out soon about this one."""
        if self._up and self.lost_reason is None:
            soon_s = trio.current_time() + self._limits.silence_s / 3
            self._give_up_s = min(self._give_up_s, soon_s)
            self._probe()

    # --- Sending

    def _submit(self, request: Request[Any], task: trio.lowlevel.Task | None) -> int:
        if self.lost_reason is not None:
            raise NotConnected(self.lost_reason)
        if task is not None and not self._in_flight:
            self._heard()
        call_id = next(_call_ids)
        if request.procedure(
            self._context, lib.libnfs_replied, *request.arguments, ffi.cast("void *", call_id)
        ):
            raise Unencodable(self._error("too long"))
        _calls[call_id] = _Call(request, self, task)
        self._in_flight.add(call_id)
        self.in_flight_bytes += request.payload_bytes
        self._send()
        return call_id

    def _probe(self) -> None:
        if self.lost_reason is None:
            self._submit(self._probe_request, None)

    def _send(self) -> None:
        """As much as the socket takes; the rest is the sending task's."""
        self._service(select.POLLOUT)
        if self.lost_reason is None and lib.rpc_which_events(self._context) & select.POLLOUT:
            self._sendable.set()

    async def _keep_sending(self, fd: int) -> None:
        while True:
            await self._sendable.wait()
            self._sendable = trio.Event()
            await trio.lowlevel.wait_writable(fd)
            # The peer took something: a long upload is not silence.
            self._heard()
            self._send()

    # --- Receiving

    async def _keep_receiving(self, fd: int) -> None:
        while True:
            await trio.lowlevel.wait_readable(fd)
            self._heard()
            self._service(select.POLLIN)

    def _service(self, events: int) -> None:
        if lib.rpc_service(self._context, events) != 0:
            # What was in flight stays so, until the end of `run` fails it.
            self._rejected.clear()
            self.lose(self._error("the NAS closed the connection"))
            return
        for call_id, message in self._rejected:
            call = _calls.pop(call_id)
            self._forget(call_id, call.request)
            if call.task is not None:
                trio.lowlevel.reschedule(call.task, outcome.Error(RpcRejected(message)))
        self._rejected.clear()

    def replied(self, call_id: int, call: _Call, status: int, data: Any) -> None:
        """Called inside ``rpc_service``: must not raise, and must not use the context."""
        if status != lib.RPC_STATUS_SUCCESS:
            # The server's answer or the connection's end?  That is known after ``rpc_service``.
            text = ffi.string(ffi.cast("char *", data)) if data else b"cancelled"
            self._rejected.append((call_id, text.decode(errors="replace")))
            return
        del _calls[call_id]
        self._forget(call_id, call.request)
        if call.task is not None:
            trio.lowlevel.reschedule(call.task, outcome.capture(call.request.decode, data))

    def _forget(self, call_id: int, request: Request[Any]) -> None:
        self._in_flight.discard(call_id)
        self.in_flight_bytes -= request.payload_bytes

    # --- Life

    async def _serve(self, host: str, port: int, address_index: int) -> None:
        with trio.move_on_after(self._limits.connect_s) as connecting:
            fd = await self._connect(host, port, address_index)
        if connecting.cancelled_caught:
            self.lose(f"no connection to {host} port {port} in {self._limits.connect_s:g} s")
        if self.lost_reason is not None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_sending, fd)
            nursery.start_soon(self._keep_receiving, fd)
            with trio.move_on_after(self._limits.connect_s) as answering:
                try:
                    await self.call(self._probe_request)
                except (NotConnected, RpcRejected) as error:
                    self.lose(str(error))
            if answering.cancelled_caught:
                self.lose(f"{host} port {port} accepts connections and does not answer")
            if self.lost_reason is None:
                self._up = True
                self._settled.set()
                nursery.start_soon(self._watch)

    async def _connect(self, host: str, port: int, address_index: int) -> int:
        """The connected socket; on failure -1 and the connection is lost."""
        try:
            addresses = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            self.lose(f"{host}: {error.strerror}")
            return -1
        address = str(addresses[address_index % len(addresses)][4][0])
        self._context = lib.rpc_init_context()
        assert self._context != ffi.NULL, "out of memory"
        lib.rpc_set_auth(
            self._context,
            # Root of this host: permissions are checked on our side, by our clients' kernels.
            lib.libnfs_authunix_create(self._machine_name.encode(), 0, 0, 0, ffi.NULL),
        )
        # The callback of the connection attempt is not needed: ``rpc_service`` tells the same.
        if lib.rpc_connect_async(
            self._context, address.encode(), port, lib.libnfs_replied, ffi.NULL
        ):
            self.lose(self._error(f"cannot connect to {address} port {port}"))
            return -1
        fd: int = lib.rpc_get_fd(self._context)
        os.set_inheritable(fd, False)
        await trio.lowlevel.wait_writable(fd)
        if lib.rpc_service(self._context, select.POLLOUT):
            self.lose(self._error(f"cannot connect to {address} port {port}"))
            return -1
        _configure(fd)
        return fd

    async def _watch(self) -> None:
        """Silence while something is in flight: first probe, then give up."""
        silence_s = self._limits.silence_s
        while True:
            await trio.sleep(silence_s / 10)
            if not self._in_flight:
                continue
            patience_s = self._give_up_s - trio.current_time()
            if patience_s <= 0:
                self.lose(f"no answer for {trio.current_time() - self.heard_s:.0f} s")
            elif patience_s <= silence_s * 2 / 3:
                self._probe()

    def _heard(self) -> None:
        self.heard_s = trio.current_time()
        self._give_up_s = self.heard_s + self._limits.silence_s

    def lose(self, reason: str) -> None:
        """Give the connection up; its `run` ends soon."""
        if self.lost_reason is None:
            self.lost_reason = reason
            self._scope.cancel()

    def _end(self, reason: str) -> None:
        self.lost_reason = reason
        self._settled.set()
        for call_id in list(self._in_flight):
            call = _calls.pop(call_id)
            self._forget(call_id, call.request)
            if call.task is not None:
                trio.lowlevel.reschedule(call.task, outcome.Error(ConnectionLost(reason)))
        if self._context is not None:
            fd = lib.rpc_get_fd(self._context)
            if fd >= 0:
                trio.lowlevel.notify_closing(fd)
            # Closes the socket and runs the callbacks of what was in flight: all unknown by now.
            lib.rpc_destroy_context(self._context)
            self._context = None

    def _error(self, otherwise: str) -> str:
        text = lib.rpc_get_error(self._context)
        return ffi.string(text).decode() if text else otherwise


def _configure(fd: int) -> None:
    with socket.socket(fileno=os.dup(fd)) as s:
        # Requests follow each other without waiting for acknowledgements.
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


@ffi.def_extern()  # type: ignore[untyped-decorator]
def libnfs_replied(context: Any, status: int, data: Any, private_data: Any) -> None:
    call_id = int(ffi.cast("uintptr_t", private_data))
    call = _calls.get(call_id)
    if call is not None:
        call.connection.replied(call_id, call, status, data)
