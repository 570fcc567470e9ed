"""The emulated link: its clock as pure arithmetic, the forwarding with real sockets.

Times are only bounded from below: a busy machine may be late, a far-away one is never early.
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.support.wan import BURST_S, HORIZON_S, STREAM_BYTES_MAX, Link, running_wan


class Echo:
    """A server that sends back what it got, and ends when its client ends."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.accepted = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            try:
                while data := sock.recv(1 << 20):
                    sock.sendall(data)
            except OSError:
                pass

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.close()


def read_to_end(sock: socket.socket) -> bytes:
    parts = []
    while data := sock.recv(1 << 20):
        parts.append(data)
    return b"".join(parts)


# -- the clock -----------------------------------------------------------------------------------


def test_bytes_arrive_after_their_time_on_the_wire_and_the_delay():
    link = Link()
    link.delay_s, link.bytes_per_s = 0.015, 1000.0

    assert link.send(10.0, 100) == pytest.approx(10.0 - BURST_S + 0.1 + 0.015)
    assert link.send(10.0, 100) == pytest.approx(10.0 - BURST_S + 0.2 + 0.015)


def test_an_unlimited_link_only_delays():
    link = Link()
    link.delay_s = 0.1

    assert [link.send(5.0, 1 << 30), link.send(5.0, 1)] == [5.1, 5.1]
    assert link.admits(5.0)


def test_a_saturated_link_takes_nothing_until_half_its_horizon_is_left():
    link = Link()
    link.bytes_per_s = 1000.0
    link.send(1.0, 100)

    assert not link.admits(1.0)
    refill_at = link.refill_at(1.0)
    assert refill_at == pytest.approx(1.1 - BURST_S - HORIZON_S / 2)
    assert link.admits(refill_at)


def test_a_shorter_link_does_not_let_later_bytes_overtake_earlier_ones():
    link = Link()
    link.delay_s = 0.2
    first = link.send(0.0, 1)

    link.delay_s = 0.0

    assert link.send(0.01, 1) == first


def test_over_any_long_time_the_rate_is_never_exceeded():
    link = Link()
    link.bytes_per_s = 1e6
    rng = random.Random(7)
    now = sent = arrival = 0.0
    for _ in range(5000):
        now += rng.expovariate(1000)
        while link.admits(now):
            size = rng.randrange(1, 5000)
            sent += size
            arrival = link.send(now, size)

    assert sent <= 1e6 * (arrival + BURST_S) * 1.000001
    assert sent >= 1e6 * arrival * 0.98


# -- the forwarding ------------------------------------------------------------------------------


def test_an_answer_takes_a_round_trip_and_opening_another(echo):
    with running_wan(rtt_s=0.1, targets={"echo": echo.port}) as wan:
        begin = time.monotonic()
        with socket.create_connection(("127.0.0.1", wan.port("echo"))) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
            opened = time.monotonic()
            assert opened - begin >= 0.2
            sock.sendall(b"y")
            assert sock.recv(1) == b"y"
            assert time.monotonic() - opened >= 0.1


def test_the_rate_is_shared_by_all_connections(echo):
    size, count, rate = 1 << 20, 3, 10e6
    with running_wan(bytes_per_s=rate, targets={0: echo.port, 1: echo.port}) as wan:
        socks = [socket.create_connection(("127.0.0.1", wan.port(i % 2))) for i in range(count)]
        begin = time.monotonic()
        for sock in socks:
            threading.Thread(target=sock.sendall, args=(bytes(size),), daemon=True).start()
        for sock in socks:
            received = 0
            while received < size:
                received += len(sock.recv(1 << 20))
        elapsed_s = time.monotonic() - begin
        for sock in socks:
            sock.close()
        statistics = wan.statistics()

    assert elapsed_s >= size * count / rate - 2 * BURST_S
    assert (statistics.up_bytes, statistics.down_bytes) == (size * count, size * count)
    assert statistics.connections_total == count


def test_bytes_keep_their_order_and_the_end_passes_through_both_ways(echo):
    data = os.urandom(8 << 20)
    with (
        running_wan(rtt_s=0.01, bytes_per_s=200e6, targets={0: echo.port}) as wan,
        socket.create_connection(("127.0.0.1", wan.port(0))) as sock,
    ):
        def send() -> None:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        threading.Thread(target=send, daemon=True).start()
        received = read_to_end(sock)

    assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()


def test_a_receiver_that_does_not_read_stops_the_sender_of_only_its_own_connection():
    with (
        socket.create_server(("127.0.0.1", 0)) as slow,
        socket.create_server(("127.0.0.1", 0)) as quick,
        running_wan(targets={s: s.getsockname()[1] for s in (slow, quick)}) as wan,
        socket.create_connection(("127.0.0.1", wan.port(slow))) as stuck,
        socket.create_connection(("127.0.0.1", wan.port(quick))) as lively,
        slow.accept()[0] as far_stuck,
        quick.accept()[0] as far_lively,
    ):
        stuck.setblocking(False)
        sent = idle_rounds = 0
        while idle_rounds < 3:
            try:
                sent += stuck.send(bytes(1 << 20))
                idle_rounds = 0
            except BlockingIOError:
                # A round trip on the other connection: the loop has run since.
                lively.sendall(b"ping")
                assert far_lively.recv(4) == b"ping"
                idle_rounds += 1
                before = wan.statistics().up_bytes
                while (after := wan.statistics().up_bytes) != before:
                    before = after
        assert sent >= STREAM_BYTES_MAX
        assert wan.statistics().up_bytes <= STREAM_BYTES_MAX * 1.5

        received = 0
        while received < sent:
            received += len(far_stuck.recv(1 << 20))
        assert received == sent


def test_a_cut_resets_connections_and_refuses_new_ones_until_restored(echo):
    with running_wan(targets={0: echo.port}) as wan:
        address = ("127.0.0.1", wan.port(0))
        with socket.create_connection(address) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
            wan.cut()
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)

        wan.restore()

        with socket.create_connection(address) as sock:
            sock.sendall(b"y")
            assert sock.recv(1) == b"y"


def test_a_frozen_link_moves_nothing_and_loses_nothing(echo):
    with running_wan(targets={0: echo.port}) as wan:
        address = ("127.0.0.1", wan.port(0))
        with socket.create_connection(address) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
            wan.freeze()
            sock.sendall(b"later")
            with socket.create_connection(address) as new:
                new.sendall(b"new")
                assert [wan.statistics().up_bytes for _ in range(50)] == [1] * 50

                wan.restore()

                assert sock.recv(5, socket.MSG_WAITALL) == b"later"
                assert new.recv(3, socket.MSG_WAITALL) == b"new"


def test_a_dead_target_looks_like_a_reset():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with (
        running_wan(targets={0: port}) as wan,
        socket.create_connection(("127.0.0.1", wan.port(0))) as sock,
        pytest.raises(ConnectionResetError),
    ):
        sock.recv(1)


def test_the_link_can_be_changed_while_it_runs(echo):
    with (
        running_wan(targets={0: echo.port}) as wan,
        socket.create_connection(("127.0.0.1", wan.port(0))) as sock,
    ):
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"

        wan.set(rtt_s=0.2)

        begin = time.monotonic()
        sock.sendall(b"y")
        assert sock.recv(1) == b"y"
        assert time.monotonic() - begin >= 0.2


def test_the_process_ends_with_its_owner(echo):
    with running_wan(targets={0: echo.port}) as wan:
        pid = wan.pid
        os.kill(pid, 0)

    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
