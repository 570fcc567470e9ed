"""Keeps one child process running under the restart policy.

Owns the loop *prepare, start, wait, decide* and what ``filer status`` says about it.  When to
start again is decided by ``restart.py``; what the program is, and what must be true before it
starts and when it is ready, the caller says with a ``Program``.
"""

from __future__ import annotations

import signal

import structlog
import trio

from filer.admin.reports import ChildStatus
from filer.supervisor.process import Process
from filer.supervisor.restart import (
    EXIT_MISCONFIGURED,
    GiveUp,
    RestartAt,
    RestartPolicy,
    Restarts,
    exit_reason,
)

log = structlog.get_logger()


class Program:
    """What a child is.  Subclasses say how it is started and what surrounds that."""

    name: str
    volume: str = ""

    async def prepare(self) -> None:
        """Before every start: write files, clean up, wait for what it needs.

        Cancelled when the child is to stop.
        """

    def start(self) -> Process:
        """Raises: OSError: the program cannot be started."""
        raise NotImplementedError

    async def wait_ready(self) -> None:
        """After every start; cancelled if the process ends first."""

    async def ended(self) -> None:
        """After every end that nobody asked for."""

    def explain(self, status: int) -> str:
        """More about an end than its exit status; or nothing."""
        return ""


class Child:
    def __init__(self, program: Program, policy: RestartPolicy | None = None) -> None:
        self.program = program
        self.state = "starting"
        """As in ``ChildStatus``."""
        self.settled = trio.Event()
        """It was ready for the first time, or was given up."""
        self._restarts = Restarts(policy or RestartPolicy())
        self._process: Process | None = None
        self._killed_because = ""
        self._stop_asked = trio.Event()
        self._stopped = trio.Event()
        self._is_run = False
        about = {"child": program.name} | ({"volume": program.volume} if program.volume else {})
        self._log = log.bind(**about)

    @property
    def pid(self) -> int | None:
        return None if self._process is None or self._process.has_ended else self._process.pid

    def status(self) -> ChildStatus:
        exit_s = self._restarts.last_exit_s
        return ChildStatus(
            name=self.program.name, volume=self.program.volume, pid=self.pid, state=self.state,
            restarts=self._restarts.count, last_exit=self._restarts.last_reason,
            last_exit_age_s=None if exit_s is None else trio.current_time() - exit_s)

    async def run(self) -> None:
        """Until it is stopped or given up."""
        self._is_run = True
        try:
            while not self._stop_asked.is_set():
                match await self._run_once():
                    case RestartAt(at_s, reason):
                        self._log.warning("child ended, it is started again", reason=reason,
                                          in_s=round(max(at_s - trio.current_time(), 0.0), 1))
                        with trio.move_on_at(at_s):
                            await self._stop_asked.wait()
                    case GiveUp(reason):
                        self.state = "failed"
                        self._log.error("child failed, it is not started again", reason=reason)
                        self.settled.set()
                        return
            self.state = "stopped"
        finally:
            self._stopped.set()

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, after *grace_s* SIGKILL; returns when it has ended."""
        self._stop_asked.set()
        self.signal(signal.SIGTERM)
        with trio.move_on_after(grace_s) as scope:
            await self._wait_ended()
        if scope.cancelled_caught:
            self._log.warning("child does not stop, killing it", after_s=grace_s)
            self.signal(signal.SIGKILL)
            await self._wait_ended()

    async def _wait_ended(self) -> None:
        if self._process is not None:
            await self._process.wait()  # also if ``run`` was cancelled and left it behind
        if self._is_run:
            await self._stopped.wait()

    def kill(self, because: str) -> None:
        """SIGKILL, and start again; *because* is the reason shown."""
        if self.pid is not None:
            self._killed_because = because
            self.signal(signal.SIGKILL)

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.signal(number)

    async def _run_once(self) -> RestartAt | GiveUp | None:
        """One life; ``None`` if its end was asked for."""
        self._killed_because = ""
        await self._until_stop_asked(self.program)
        if self._stop_asked.is_set():
            return None
        self._restarts.started(trio.current_time())
        try:
            process = self._process = self.program.start()
        except OSError as exc:
            return self._restarts.ended(trio.current_time(), f"cannot be started: {exc}")
        self._log.debug("child started", pid=process.pid)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._become_ready)
            status = await process.wait()
            nursery.cancel_scope.cancel()
        if self._stop_asked.is_set():
            return None
        self.state = "restarting"
        await self.program.ended()
        more = self.program.explain(status)
        why = self._killed_because or exit_reason(status)
        return self._restarts.ended(
            trio.current_time(), f"{why} ({more})" if more else why,
            misconfigured=status == EXIT_MISCONFIGURED)

    async def _until_stop_asked(self, program: Program) -> None:
        async def prepare(scope: trio.CancelScope) -> None:
            await program.prepare()
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(prepare, nursery.cancel_scope)
            await self._stop_asked.wait()
            nursery.cancel_scope.cancel()

    async def _become_ready(self) -> None:
        await self.program.wait_ready()
        self.state = "running"
        self.settled.set()
