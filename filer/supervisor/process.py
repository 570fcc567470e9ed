"""One child process.  Owns its pid and its end; what happens then is ``child.py``'s business."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

import trio

_SETPRIV = "/usr/bin/setpriv"


class Process:
    """Started at construction, in a session of its own, with standard output on our standard
    error.

    ``subprocess`` directly rather than trio's: that one forks in a worker thread, and the
    kernel sends a parent-death signal when the forking *thread* ends (prctl(2)).

    Raises: OSError: the program cannot be started.
    """

    def __init__(
        self, argv: Sequence[str], environment: Mapping[str, str], *,
        die_with_parent: bool = False,
    ) -> None:
        prefix = [_SETPRIV, "--pdeathsig", "KILL", "--"] if die_with_parent else []
        # In its own session, so that Ctrl-C reaches the supervisor alone: it stops the
        # children in their order.
        self._popen = subprocess.Popen(
            [*prefix, *argv], env=dict(environment), stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if _has_fileno(sys.stderr) else subprocess.DEVNULL,
            start_new_session=True)
        self._pidfd = os.pidfd_open(self._popen.pid)
        self._one_waits = trio.Lock()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def has_ended(self) -> bool:
        return self._popen.returncode is not None

    async def wait(self) -> int:
        """Its return code, as ``subprocess`` counts: negative is a signal."""
        async with self._one_waits:
            if not self.has_ended:
                await trio.lowlevel.wait_readable(self._pidfd)
                self._popen.wait()
                os.close(self._pidfd)
        return self._popen.returncode

    def signal(self, number: signal.Signals) -> None:
        """Does nothing once it has ended."""
        if not self.has_ended:
            signal.pidfd_send_signal(self._pidfd, number)


def _has_fileno(stream: object) -> bool:
    try:
        stream.fileno()  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False
    return True
