"""An emulated long-distance link: TCP forwarded with a delay and a shared rate.

    with running_wan(rtt_s=0.03, bytes_per_s=125e6, targets={"nfs": nas_port}) as wan:
        connect("127.0.0.1", wan.port("nfs"))

Owns one forwarding process, its listening ports, and what "far away" means:

- each direction is one link: half the round trip of delay, and one rate that all connections
  share, taken in turns (256 KiB) so that a bulk transfer does not starve a small request;
- a connection opens one round trip after it was accepted, as a handshake would take;
- a receiver that does not read stops its sender: at most ``STREAM_BYTES_MAX`` wait for it here.

It does not own loss, slow start or congestion: a connection behaves like a tuned, long-lived
one.  Connecting to a *frozen* link succeeds (the kernel accepts) but nothing ever arrives.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HORIZON_S = 0.010
"""How far a saturated link accepts data ahead of sending it: hides late wake-ups of the loop,
which refills it when half of that is left."""
BURST_S = 0.005
"""How much unused capacity a link may make up for after a late wake-up."""
TURN_BYTES = 256 << 10
STREAM_BYTES_MAX = 64 << 20

_EDGE = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET


@dataclass(frozen=True, slots=True)
class WanStatistics:
    """Since the start of the link.  *up* is towards the target, *down* towards the client."""

    up_bytes: int
    down_bytes: int
    connections: int
    """Open now."""
    connections_total: int
    cpu_s: float
    """What the forwarding process itself used."""


class Link:
    """One direction as a virtual clock: when does what is sent now arrive?  Pure."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.bytes_per_s = float("inf")
        self._sent_until = 0.0
        self._last_arrival = 0.0

    def admits(self, now: float) -> bool:
        return self._sent_until - now < HORIZON_S

    def refill_at(self, now: float) -> float:
        """When the loop should look again: at once if there is room, else at half a horizon."""
        return now if self.admits(now) else self._sent_until - HORIZON_S / 2

    def send(self, now: float, byte_count: int) -> float:
        """Put bytes on the link; returns their time of arrival, never before earlier bytes'."""
        begin = max(self._sent_until, now - BURST_S)
        self._sent_until = begin + byte_count / self.bytes_per_s
        self._last_arrival = max(self._last_arrival, max(now, self._sent_until) + self.delay_s)
        return self._last_arrival


class _End:
    """One of the two sockets of a connection, with what edge-triggered epoll told about it."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.readable = False
        self.writable = False


class _Stream:
    """One direction of one connection."""

    def __init__(self, connection: _Connection, source: _End, sink: _End, way: _Direction) -> None:
        self.connection = connection
        self.source = source
        self.sink = sink
        self.way = way
        self.arrived: deque[memoryview] = deque()
        """Due, and not yet accepted by the sink; an empty view stands for the end."""
        self.waiting_bytes = 0
        """On the link or arrived."""
        self.queued = False
        """In the direction's list of those that want to send."""
        self.ended = False


class _Direction:
    def __init__(self) -> None:
        self.link = Link()
        self.byte_count = 0
        self.wanting: deque[_Stream] = deque()
        self.in_flight: deque[tuple[float, _Stream, memoryview]] = deque()


class _Connection:
    def __init__(self, client: _End, target: _End, proxy: _Proxy, opens_at: float) -> None:
        self.ends = (client, target)
        self.opens_at = opens_at
        self.streams = (
            _Stream(self, client, target, proxy.up), _Stream(self, target, client, proxy.down))
        self.closed = False
        self.half_closed = 0


class _Proxy:
    """The forwarding process: one epoll loop, no threads."""

    def __init__(self, targets: list[tuple[str, int]], control: socket.socket) -> None:
        self.up = _Direction()
        self.down = _Direction()
        self._epoll = select.epoll()
        self._control = control
        self._targets = targets
        self._reserved = [self._bound(0) for _ in targets]
        self._listeners: dict[int, tuple[socket.socket, tuple[str, int]]] = {}
        self._connections: dict[int, _Connection] = {}
        self._opening: deque[_Connection] = deque()
        self._connections_total = 0
        self._frozen = False
        self._epoll.register(control, select.EPOLLIN)
        self._listen()

    @staticmethod
    def _bound(port: int) -> socket.socket:
        """A socket that holds *port*, so that it stays ours while the link is cut."""
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", port))
        return sock

    def _listen(self) -> None:
        for reserved, target in zip(self._reserved, self._targets, strict=True):
            listener = self._bound(reserved.getsockname()[1])
            listener.listen(128)
            listener.setblocking(False)
            self._listeners[listener.fileno()] = (listener, target)
            self._epoll.register(listener, select.EPOLLIN)

    # -- the loop ------------------------------------------------------------------------------

    def run(self) -> None:
        while True:
            now = time.monotonic()
            wait_s = None if self._frozen else self._next_event_at(now) - now
            if wait_s is not None and wait_s < 3600:
                # epoll's own timeout counts whole milliseconds; select() is exact.
                select.select([self._epoll], [], [], max(wait_s, 0.0))
                events = self._epoll.poll(0, 256)
            else:
                events = self._epoll.poll(None, 256)
            for fd, mask in events:
                if fd == self._control.fileno():
                    if not self._serve_control():
                        return
                elif fd in self._listeners:
                    self._accept(fd)
                else:
                    self._note(fd, mask)
            if not self._frozen:
                self._move()

    def _next_event_at(self, now: float) -> float:
        times = [float("inf")]
        if self._opening:
            times.append(self._opening[0].opens_at)
        for way in (self.up, self.down):
            if way.in_flight:
                times.append(way.in_flight[0][0])
            if way.wanting:
                times.append(way.link.refill_at(now))
        return min(times)

    def _note(self, fd: int, mask: int) -> None:
        connection = self._connections.get(fd)
        if connection is None:
            return
        end = connection.ends[0 if connection.ends[0].sock.fileno() == fd else 1]
        if mask & select.EPOLLERR:
            self._close(connection, reset=True)
            return
        if mask & (select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP):
            end.readable = True
        if mask & select.EPOLLOUT:
            end.writable = True
        for stream in connection.streams:
            if stream.sink is end and stream.arrived and not self._frozen:
                self._deliver(stream)
            self._want(stream)

    def _want(self, stream: _Stream) -> None:
        if (
            stream.source.readable and not stream.queued and not stream.ended
            and not stream.connection.closed and not stream.connection.opens_at
            and stream.waiting_bytes < STREAM_BYTES_MAX
        ):
            stream.queued = True
            stream.way.wanting.append(stream)

    def _move(self) -> None:
        now = time.monotonic()
        while self._opening and self._opening[0].opens_at <= now:
            connection = self._opening.popleft()
            connection.opens_at = 0.0
            for stream in connection.streams:
                self._want(stream)
        for way in (self.up, self.down):
            while way.wanting and way.link.admits(now):
                self._take(way, way.wanting.popleft(), now)
            touched: dict[_Stream, None] = {}
            while way.in_flight and way.in_flight[0][0] <= now:
                _, stream, chunk = way.in_flight.popleft()
                stream.arrived.append(chunk)
                touched[stream] = None
            for stream in touched:
                if stream.sink.writable:
                    self._deliver(stream)

    def _take(self, way: _Direction, stream: _Stream, now: float) -> None:
        """Let *stream* put one turn's worth of bytes on the link."""
        stream.queued = False
        if stream.connection.closed:
            return
        try:
            data = stream.source.sock.recv(TURN_BYTES)
        except BlockingIOError:
            stream.source.readable = False
            return
        except OSError:
            self._close(stream.connection, reset=True)
            return
        if not data:
            stream.ended = True
        stream.waiting_bytes += len(data)
        way.byte_count += len(data)
        way.in_flight.append((way.link.send(now, len(data)), stream, memoryview(data)))
        self._want(stream)

    def _deliver(self, stream: _Stream) -> None:
        """Give the sink what has arrived, as far as it accepts it."""
        while stream.arrived and not stream.connection.closed:
            chunk = stream.arrived[0]
            try:
                if not chunk:
                    stream.arrived.popleft()
                    stream.sink.sock.shutdown(socket.SHUT_WR)
                    stream.connection.half_closed += 1
                    if stream.connection.half_closed == 2:
                        self._close(stream.connection, reset=False)
                    return
                sent = stream.sink.sock.send(chunk)
            except BlockingIOError:
                stream.sink.writable = False
                return
            except OSError:
                self._close(stream.connection, reset=True)
                return
            stream.waiting_bytes -= sent
            if sent == len(chunk):
                stream.arrived.popleft()
            else:
                stream.arrived[0] = chunk[sent:]
        self._want(stream)

    # -- connections ---------------------------------------------------------------------------

    def _accept(self, fd: int) -> None:
        listener, address = self._listeners[fd]
        if self._frozen:
            # Level-triggered: leave the queue alone until the link is restored.
            self._epoll.modify(fd, 0)
            return
        try:
            client = _End(listener.accept()[0])
        except OSError:
            return
        target = _End(socket.socket())
        target.sock.connect_ex(address)
        rtt_s = self.up.link.delay_s + self.down.link.delay_s
        connection = _Connection(client, target, self, time.monotonic() + rtt_s)
        self._connections_total += 1
        self._opening.append(connection)
        for end in connection.ends:
            self._connections[end.sock.fileno()] = connection
            self._epoll.register(end.sock, _EDGE)

    def _close(self, connection: _Connection, *, reset: bool) -> None:
        if connection.closed:
            return
        connection.closed = True
        for end in connection.ends:
            del self._connections[end.sock.fileno()]
            if reset:
                end.sock.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            end.sock.close()

    # -- control -------------------------------------------------------------------------------

    def _serve_control(self) -> bool:
        """One request from the owner; false when the owner is gone."""
        request = self._control.recv(4096)
        if not request:
            return False
        message = json.loads(request)
        reply = getattr(self, f"do_{message.pop('do')}")(**message)
        self._control.send(json.dumps(reply).encode())
        return True

    def do_ports(self) -> list[int]:
        return [reserved.getsockname()[1] for reserved in self._reserved]

    def do_set(self, rtt_s: float | None = None, bytes_per_s: float | None = None) -> None:
        for way in (self.up, self.down):
            if rtt_s is not None:
                way.link.delay_s = rtt_s / 2
            if bytes_per_s is not None:
                way.link.bytes_per_s = bytes_per_s

    def do_cut(self) -> None:
        for fd, (listener, _) in self._listeners.items():
            self._epoll.unregister(fd)
            listener.close()
        self._listeners.clear()
        for connection in set(self._connections.values()):
            self._close(connection, reset=True)

    def do_freeze(self) -> None:
        self._frozen = True

    def do_restore(self) -> None:
        if not self._listeners:
            self._listen()
        self._frozen = False
        for fd in self._listeners:
            self._epoll.modify(fd, select.EPOLLIN)

    def do_statistics(self) -> dict[str, float]:
        return {
            "up_bytes": self.up.byte_count, "down_bytes": self.down.byte_count,
            "connections": len(self._connections) // 2,
            "connections_total": self._connections_total, "cpu_s": time.process_time(),
        }


class Wan:
    """The owner's side of a running link."""

    def __init__(self, process: subprocess.Popen[bytes], control: socket.socket,
                 labels: list[Hashable]) -> None:
        self._control = control
        self.pid = process.pid
        self._ports: dict[Hashable, int] = dict(
            zip(labels, self._ask("ports"), strict=True))

    def _ask(self, verb: str, **arguments: object) -> Any:
        self._control.send(json.dumps({"do": verb, **arguments}).encode())
        reply = self._control.recv(65536)
        if not reply:
            raise ConnectionError("the process of the emulated link has died")
        return json.loads(reply)

    def port(self, label: Hashable) -> int:
        """The near end of the target that was named *label*, on 127.0.0.1."""
        return self._ports[label]

    def set(self, *, rtt_s: float | None = None, bytes_per_s: float | None = None) -> None:
        """Change the link for what is sent from now on; ``inf`` removes the limit."""
        self._ask("set", rtt_s=rtt_s, bytes_per_s=bytes_per_s)

    def cut(self) -> None:
        """Reset every connection and refuse new ones until ``restore()``."""
        self._ask("cut")

    def freeze(self) -> None:
        """Nothing moves any more, nobody is told, until ``restore()``."""
        self._ask("freeze")

    def restore(self) -> None:
        self._ask("restore")

    def statistics(self) -> WanStatistics:
        return WanStatistics(**self._ask("statistics"))


@contextlib.contextmanager
def running_wan(
    *, targets: Mapping[Hashable, int | tuple[str, int]], rtt_s: float = 0.0,
    bytes_per_s: float = float("inf"),
) -> Iterator[Wan]:
    """Start the link; *targets* maps a label to a port of 127.0.0.1 or to (host, port)."""
    addresses = [t if isinstance(t, tuple) else ("127.0.0.1", t) for t in targets.values()]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.wan", str(theirs.fileno()),
                 json.dumps(addresses)],
                cwd=Path(__file__).parents[2], pass_fds=[theirs.fileno()],
                # Ctrl-C is for the owner, who then closes the control socket.
                start_new_session=True)
        try:
            wan = Wan(process, ours, list(targets))
            wan.set(rtt_s=rtt_s, bytes_per_s=bytes_per_s)
            yield wan
        finally:
            ours.close()
            process.wait()


def _main() -> None:
    # Buffers of a turn come from the heap and stay there instead of being mapped each time.
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc.mallopt(m_mmap_threshold, 64 << 20)
    libc.mallopt(m_trim_threshold, 512 << 20)
    with contextlib.suppress(PermissionError):
        # The far end of a real link does not slow down because our processors are busy.
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    control = socket.socket(fileno=int(sys.argv[1]))
    _Proxy([(host, port) for host, port in json.loads(sys.argv[2])], control).run()


if __name__ == "__main__":
    _main()
