"""The keeper of one volume: a small process that holds the mount while servers come and go.

    python -m filer.keeper --volume shows --mountpoint /run/filer/mnt/shows \\
        --state /run/filer/shows.json -- python -m filer.volume_server …

Owns the mount, the /dev/fuse descriptor and the life of the volume server.  The server can
crash, be killed or be replaced by a newer one: the mount stays, clients wait, and requests that
were being answered are answered by the next server.  Decides nothing else.

The server is started with ``--fuse-fd N --init-fd M`` appended.  N is /dev/fuse; on M, a
SEQPACKET socket, it finds one :class:`~filer.fuse_connection.Handover` and answers
``Handover.READY``.

============  ==================================================================================
signal to us  meaning
============  ==================================================================================
SIGTERM       SIGTERM to the server, wait until it has exited, unmount, exit 0.
              A second one: SIGKILL to the server.
SIGHUP        Replace the server: SIGUSR1 to it, wait until it has exited, start it again.
============  ==================================================================================

============  ==================================================================================
server exits  meaning
============  ==================================================================================
0             after SIGTERM: stopped;  after SIGUSR1: left for its successor
64            Misconfigured: it would fail again.  Unmount, exit 64; the reason is in the state
else          died: started again, at once the first time, then after 0.1 … 5 s
============  ==================================================================================

The state file is JSON, replaced atomically; see :class:`State`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

from filer.fuse_connection import FuseConnection, Handover, remove_mounts

EXIT_MISCONFIGURED = 64
EXIT_LOCKED = 75

_PR_SET_PDEATHSIG = 1
_STABLE_AFTER_S = 30.0
_REPLACE_TIMEOUT_S = 30.0
_LOOK_AT_SERVER_EVERY_S = 0.25
_STUCK_AFTER_S = 1.0
_ERROR_LINE_BYTES_MAX = 2000


def restart_delay_s(deaths: int) -> float:
    """How long to wait after the *deaths*-th death in a row of a server that ran < 30 s."""
    return 0.0 if deaths <= 1 else float(min(0.1 * 2 ** min(deaths - 2, 10), 5.0))


@dataclass
class State:
    """What the keeper tells everybody, in the state file."""

    volume: str
    mountpoint: str
    keeper_pid: int
    server_pid: int | None = None
    phase: Literal["starting", "running", "backoff", "stopping", "stopped", "misconfigured"] = (
        "starting"
    )
    since: float = 0.0
    """Wall clock time at which *phase* began."""
    restarts: int = 0
    last_exit: str | None = None
    """``"signal 9"``, ``"exit 1"``."""
    last_line: str | None = None
    """The last line that a server which failed wrote to its standard error."""


class Keeper:
    def __init__(
        self, state: State, state_path: str, command: list[str], *,
        die_with_parent: bool, resend: bool,
    ) -> None:
        self._state = state
        self._state_path = state_path
        self._command = command
        self._resend = resend
        self._stop = False
        self._kill = False
        self._replace = False
        self._is_ready = False
        self._scan = False
        self._last_line = b""
        self._zombie_since = float("inf")
        self._server: subprocess.Popen[bytes] | None = None
        # Not PR_SET_PDEATHSIG: that fires when the *thread* that started us ends.
        parent = os.getppid()
        self._parent_fd = os.pidfd_open(parent) if die_with_parent and parent else None
        self._signal_fd, wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGHUP, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGHUP:
            self._replace = True
        else:
            self._kill, self._stop = self._stop, True

    # -- one server after the other ------------------------------------------------------------

    def run(self) -> int:
        stale = remove_mounts(self._state.mountpoint)
        if stale:
            self._say(f"removed {stale} mount(s) of an earlier keeper")
        os.makedirs(self._state.mountpoint, exist_ok=True)
        self._connection = FuseConnection(self._state.mountpoint)
        if not self._connection.raise_read_ahead():
            self._say("cannot raise read_ahead_kb: cold sequential reads will be slower")
        exit_code, deaths = 0, 0
        while True:
            started = time.monotonic()
            self._start_server()
            status = self._watch_server()
            ran_s = time.monotonic() - started
            if os.WIFEXITED(status) and os.WEXITSTATUS(status) == EXIT_MISCONFIGURED:
                exit_code = EXIT_MISCONFIGURED
                break
            if self._stop:
                # SIGTERM ends a server that had not yet come to handle it, too.
                is_orderly = status == 0 or (os.WIFSIGNALED(status) and not self._is_ready)
                exit_code = 0 if is_orderly else 1
                break
            if self._is_ready:  # else FUSE_INIT, which is replayed, is the only open request
                self._scan = self._connection.retry_in_flight(resend=self._resend)
            self._state.restarts += 1
            if self._replace:
                self._replace = False
                deaths = 0
                continue
            deaths = 1 if ran_s >= _STABLE_AFTER_S else deaths + 1
            self._back_off(restart_delay_s(deaths))
            if self._stop:
                break
        self._connection.unmount(self._say)
        self._enter("misconfigured" if exit_code == EXIT_MISCONFIGURED else "stopped")
        return exit_code

    def _start_server(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection = self._connection
        ours.send(
            Handover(
                connection.mount_id, self._state.restarts, connection.init_request
            ).pack()
        )
        self._is_ready = False
        self._server = subprocess.Popen(
            [*self._command, "--fuse-fd", str(connection.fd), "--init-fd", str(theirs.fileno())],
            pass_fds=(connection.fd, theirs.fileno()),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is for our parent to turn into SIGTERM
            preexec_fn=_die_with_keeper,
        )
        theirs.close()
        self._handover = ours
        self._state.server_pid = self._server.pid
        self._enter("starting")

    def _watch_server(self) -> int:
        """Serve until the server is dead; return its wait status."""
        server = self._server
        assert server is not None
        assert server.stderr is not None
        stderr = server.stderr
        os.set_blocking(stderr.fileno(), False)
        pidfd = os.pidfd_open(server.pid)
        poll = select.poll()
        for fd in (pidfd, stderr.fileno(), self._handover.fileno(), self._signal_fd):
            poll.register(fd, select.POLLIN)
        if self._parent_fd is not None:
            poll.register(self._parent_fd, select.POLLIN)
        sent: set[signal.Signals] = set()
        replace_before = float("inf")
        while (status := self._wait_status(server)) is None:
            self._free_if_stuck(server)
            if self._stop and signal.SIGTERM not in sent:
                sent.add(signal.SIGTERM)
                self._enter("stopping")
                server.send_signal(signal.SIGTERM)
            elif self._replace and not sent:
                sent.add(signal.SIGUSR1)
                replace_before = time.monotonic() + _REPLACE_TIMEOUT_S
                server.send_signal(signal.SIGUSR1)
            is_late = time.monotonic() > replace_before and not self._stop
            if (self._kill or is_late) and signal.SIGKILL not in sent:
                sent.add(signal.SIGKILL)
                server.send_signal(signal.SIGKILL)
            if self._scan:
                self._scan = self._connection.answer_older()
            timeout_s = 0.0 if self._scan else _LOOK_AT_SERVER_EVERY_S
            for fd, _ in poll.poll(timeout_s * 1000):
                if fd == stderr.fileno():
                    if not self._copy_stderr(fd):
                        poll.unregister(fd)
                elif fd == self._handover.fileno():
                    # A reset: it died before it read what we sent.
                    with contextlib.suppress(ConnectionResetError):
                        self._is_ready = self._handover.recv(64) == Handover.READY
                    if self._is_ready and not sent:
                        self._enter("running")
                    poll.unregister(fd)
                elif fd == self._signal_fd:
                    os.read(fd, 64)
                elif fd == self._parent_fd:
                    self._stop = True
                    poll.unregister(fd)
        self._copy_stderr(stderr.fileno())
        if os.WIFSIGNALED(status):
            self._state.last_exit = f"signal {os.WTERMSIG(status)}"
        else:
            self._state.last_exit = f"exit {os.WEXITSTATUS(status)}"
        self._state.last_line = self._last_line.decode(errors="replace") if status else None
        self._state.server_pid = None
        os.close(pidfd)
        stderr.close()
        self._handover.close()
        return status

    def _wait_status(self, server: subprocess.Popen[bytes]) -> int | None:
        """The wait status if the server is dead."""
        if server.poll() is None:
            return None
        code = server.returncode
        return -code if code < 0 else code << 8

    def _free_if_stuck(self, server: subprocess.Popen[bytes]) -> None:
        """Let a server die that waits in the kernel for an answer of its own.

        Dropping a name waits for a directory's lock, which a LOOKUP in that directory holds until
        it is answered.  Killed at that moment, the server stays half dead (its main thread a
        zombie, its files and locks still held), so no other one can be started to answer.  Its
        requests are answered EAGAIN then, whatever the kernel could do better otherwise.
        """
        with open(f"/proc/{server.pid}/stat", "rb") as file:
            is_zombie = file.read().rpartition(b")")[2].split()[0] == b"Z"
        if not is_zombie:
            self._zombie_since = float("inf")
        elif self._zombie_since == float("inf"):
            self._zombie_since = time.monotonic()
        elif time.monotonic() - self._zombie_since > _STUCK_AFTER_S and self._is_ready:
            self._say("the server cannot die: its requests are answered EAGAIN")
            self._scan = self._connection.retry_in_flight(resend=False)
            self._zombie_since = float("inf")

    def _back_off(self, delay_s: float) -> None:
        if delay_s == 0 or self._stop:
            return
        self._enter("backoff")
        end = time.monotonic() + delay_s
        fds = [self._signal_fd] + ([] if self._parent_fd is None else [self._parent_fd])
        while not self._stop and (left_s := end - time.monotonic()) > 0:
            if self._scan:
                self._scan = self._connection.answer_older()
                left_s = 0
            readable = select.select(fds, [], [], left_s)[0]
            if self._signal_fd in readable:
                os.read(self._signal_fd, 64)
            if self._parent_fd in readable:
                self._stop = True

    # -- what others see -------------------------------------------------------------------------

    def _copy_stderr(self, fd: int) -> bool:
        """Pass on what the server wrote; False at the end."""
        while True:
            try:
                text = os.read(fd, 1 << 16)
            except BlockingIOError:
                return True
            if not text:
                return False
            lines = text.strip().rsplit(b"\n", 1)
            if lines[-1]:
                self._last_line = lines[-1][-_ERROR_LINE_BYTES_MAX:]
            with contextlib.suppress(OSError):  # nobody reads us any more: serve on
                os.write(2, text)

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(2, f"keeper of {self._state.volume}: {text}\n".encode())

    def _enter(
        self,
        phase: Literal["starting", "running", "backoff", "stopping", "stopped", "misconfigured"],
    ) -> None:
        self._state.phase = phase
        self._state.since = time.time()
        temporary = f"{self._state_path}.new"
        with open(temporary, "w") as file:
            json.dump(dataclasses.asdict(self._state), file)
        os.replace(temporary, self._state_path)


def _die_with_keeper() -> None:
    """In the child: without us nobody could restart the server or unmount."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(prog="filer.keeper", description=__doc__.splitlines()[0])
    parser.add_argument("--volume", required=True)
    parser.add_argument("--mountpoint", required=True, help="created if it does not exist")
    parser.add_argument("--state", required=True, metavar="FILE.json")
    parser.add_argument(
        "--die-with-parent", action=argparse.BooleanOptionalAction, default=True,
        help="when the parent process dies, act as on SIGTERM (default: yes)",
    )
    parser.add_argument(
        "--resend", action=argparse.BooleanOptionalAction, default=True,
        help="have the kernel repeat a dead server's requests if it can (default: yes); "
        "no: answer them EAGAIN",
    )
    parser.add_argument("server", nargs="+", metavar="ARG", help="the volume server's command")
    arguments = parser.parse_args()

    state = State(arguments.volume, os.path.abspath(arguments.mountpoint), os.getpid())
    # Held for life: two keepers of one mount would remove each other's.
    lock = os.open(f"{arguments.state}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"another keeper holds {arguments.state}.lock", file=sys.stderr)
        return EXIT_LOCKED
    keeper = Keeper(
        state, arguments.state, arguments.server,
        die_with_parent=arguments.die_with_parent, resend=arguments.resend,
    )
    return keeper.run()


if __name__ == "__main__":
    sys.exit(main())
