"""The FUSE session of a volume server: requests from the kernel to the handlers, concurrently.

Owns the read loop and the session's life: takeover from the keeper, stop, close.  Does not own
the mount (``filer/keeper.py``) nor what the handlers do.

pyfuse3's own loop goes through trio's scheduler and epoll for each request and spends about
20 µs of CPU on that.  Here one task, the *reader*, reads requests without asking first, and
handles each itself.  A handler that completes without waiting costs no scheduling at all.
When the handler does wait, an idle task becomes the reader in its place::

    reader ── request ──► handling ──(handler returns)──► reader, if there is none now
       ▲                     │                             else idle
       └── a standby, made runnable once ──────────────────┘

The standby is made runnable when a request is taken and no standby is on its way; so it runs
exactly when the handling task gives way to the scheduler, and finds either no reader (it is the
one now) or the old one back at its place (it goes idle again).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from typing import Any

import trio

from filer.fuse_connection import Handover
from filer.vfs.shim import process_init, pyfuse3, receive

HANDLERS_AT_ONCE_MAX = 2000
"""Requests beyond wait in the kernel, also those that would be answered from memory.

Far above what clients have open (NFS-Ganesha has 256 workers); bounds memory, not speed.
"""

_IDLE_TASKS_MAX = 32
_SLICE_S = 0.001
"""The reader gives way to other tasks at least this often: 1 % of the time goes into that."""
_SPIN_US = 50
"""How long the thread waits for the next request before it asks the scheduler.

An NFS server that was just answered asks again within this time; going to sleep in epoll and
coming back costs half as much CPU as a whole request.  Only when no handler is waiting.
"""


# <linux/fuse.h>: fuse_out_header and fuse_init_out; fuse_in_header and fuse_init_in.
_INIT_ANSWER = struct.Struct("<IiQ IIII")
_INIT_REQUEST_FLAGS_AT = 40 + 12
_PARALLEL_DIROPS = 1 << 18


class KeptMount:
    """The mount as a volume server gets it from its keeper, at start."""

    def __init__(self, fuse_fd: int, init_fd: int) -> None:
        """Takes over both descriptors (``--fuse-fd``, ``--init-fd``)."""
        self.fuse_fd = fuse_fd
        self._keeper = socket.socket(fileno=init_fd)
        handover = Handover.unpack(self._keeper.recv(1 << 16))
        self.mount_id = handover.mount_id
        """Names this mount, over all its servers: the key of the operation records."""
        self.is_taken_over = handover.predecessors > 0
        """Whether the kernel may hold names, attributes and data from an earlier server."""
        self.init_request = handover.init_request

    def tell_ready(self) -> None:
        with self._keeper, contextlib.suppress(BrokenPipeError):  # nobody is interested
            self._keeper.send(Handover.READY)


class FuseSession:
    """Serves one mount with *operations*::

        mount = KeptMount(fuse_fd, init_fd)
        session = FuseSession(Operations(…), mount)
        await nursery.start(session.run)
        …
        session.stop()  # run() returns when the handlers in progress have answered
        session.close()

    Leaving without ``stop()``, by cancellation or by death, is safe too: requests without an
    answer go to the next server.  There can be one session in a process at a time.
    """

    def __init__(self, operations: pyfuse3.Operations, mount: KeptMount) -> None:
        self._mount = mount
        # libfuse answers FUSE_INIT into a socket, which then becomes the real thing: its answer
        # lacks something, and the kernel wants to hear the first server only.
        answers, session = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with answers:
            fd = session.detach()  # libfuse's from here on
            # The mount options are the keeper's affair.
            pyfuse3.init(operations, f"/dev/fd/{fd}", set())
            process_init(mount.init_request)
            self._init_answer = _with_parallel_lookups(answers.recv(1 << 12), mount.init_request)
        os.dup2(mount.fuse_fd, fd, inheritable=False)
        os.close(mount.fuse_fd)
        self._fd = fd
        self._loop = RequestLoop(fd)

    @property
    def handler_count(self) -> int:
        """Requests being handled now."""
        return self._loop.handler_count

    async def run(
        self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Answer requests until ``stop()`` or until the mount is gone."""
        pyfuse3._wait_fuse_readable = self._loop.wait_request  # type: ignore[attr-defined]
        with contextlib.suppress(FileNotFoundError):  # a predecessor has answered
            os.write(self._fd, self._init_answer)
        self._mount.tell_ready()
        task_status.started()
        await self._loop.run()

    def stop(self) -> None:
        """Read no more requests; those not yet read wait for the next server."""
        self._loop.stop()

    def close(self) -> None:
        """Let go of the connection; the mount stays.

        Not pyfuse3.close(): libfuse would free what a thread that still waits in a notification
        comes back to.
        """
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, self._fd, inheritable=False)
        os.close(null)


def _with_parallel_lookups(answer: bytes, request: bytes) -> bytes:
    """libfuse 3.14 forgets this flag; without, a directory gets one LOOKUP at a time."""
    _, error, _, _, _, _, flags = _INIT_ANSWER.unpack_from(answer)
    if error:
        raise OSError(-error, f"libfuse refused FUSE_INIT: {os.strerror(-error)}")
    (offered,) = struct.unpack_from("<I", request, _INIT_REQUEST_FLAGS_AT)
    flags |= offered & _PARALLEL_DIROPS
    patched = bytearray(answer)
    struct.pack_into("<I", patched, _INIT_ANSWER.size - 4, flags)
    return bytes(patched)


class RequestLoop:
    """Decides which task reads next.  One for a session; see the module's docstring."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._nursery: trio.Nursery | None = None
        self._has_reader = False
        self._standby_is_due = False
        self._idle: list[trio.lowlevel.Task] = []
        self._task_count = 0
        self._stopping = False
        self._slice_end_s = 0.0

    @property
    def handler_count(self) -> int:
        """Handlers that were started and have not returned."""
        return self._task_count - len(self._idle) - self._has_reader - self._standby_is_due

    async def run(self) -> None:
        """Read and handle until stopped or unmounted, then wait for the handlers still running."""
        async with trio.open_nursery() as self._nursery:
            self._start_task()

    def stop(self) -> None:
        """Read no more requests."""
        if self._stopping:
            return
        self._stopping = True
        trio.lowlevel.notify_closing(self._fd)
        self._wake_idle()

    def _start_task(self) -> None:
        assert self._nursery is not None
        self._task_count += 1
        self._nursery.start_soon(self._task)

    async def _task(self) -> None:
        self._standby_is_due = False
        try:
            # Of its own accord pyfuse3 would start more tasks; 0 says that there are enough.
            await pyfuse3._session_loop(self._nursery, 1, 0)  # type: ignore[attr-defined]
        finally:
            self._task_count -= 1

    async def wait_request(self) -> bool:
        """Called by pyfuse3 when a task is free; True when the shim holds a request for it."""
        while not self._stopping:
            if self._has_reader:
                if len(self._idle) >= _IDLE_TASKS_MAX:
                    return False
                await self._idle_until_standby()
                continue
            self._has_reader = True
            try:
                has_request = await self._read()
            finally:
                self._has_reader = False
            if has_request:
                self._call_standby()
            return has_request
        return False

    async def _read(self) -> bool:
        while not self._stopping:
            if time.monotonic() >= self._slice_end_s:
                await trio.lowlevel.checkpoint()
                self._slice_end_s = time.monotonic() + _SLICE_S
                continue
            received = receive(_SPIN_US if self.handler_count == 0 else 0)
            if received > 0:
                return True
            if received < 0:
                self._stopping = True
                self._wake_idle()
                break
            try:
                await trio.lowlevel.wait_readable(self._fd)
            except trio.ClosedResourceError:
                break
            self._slice_end_s = time.monotonic() + _SLICE_S
        return False

    def _call_standby(self) -> None:
        if self._standby_is_due:
            return
        if self._idle:
            trio.lowlevel.reschedule(self._idle.pop())
        elif self._task_count < HANDLERS_AT_ONCE_MAX:
            self._start_task()
        else:
            return  # the next task whose handler returns is the reader
        self._standby_is_due = True

    async def _idle_until_standby(self) -> None:
        task = trio.lowlevel.current_task()
        self._idle.append(task)

        def abort(_: Any) -> trio.lowlevel.Abort:
            self._idle.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        self._standby_is_due = False

    def _wake_idle(self) -> None:
        while self._idle:
            trio.lowlevel.reschedule(self._idle.pop())
