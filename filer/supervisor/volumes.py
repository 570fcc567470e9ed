"""One volume as the supervisor sees it: its keeper, its mount, its admin socket.

The keeper is our child; the volume server is the keeper's, which restarts and upgrades it
without losing the mount.  If the keeper itself dies the mount is lost with it.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
import structlog
import trio

from filer.admin.client import CallFailed, NotRunning, OnProgress, call
from filer.admin.protocol import BadMessage
from filer.admin.reports import ChildStatus, StopReport, TopSample, VolumeReport, VolumeStatus
from filer.settings import VolumeSettings
from filer.supervisor.child import Child, Program
from filer.supervisor.claim import is_mounted, unmount
from filer.supervisor.layout import Layout
from filer.supervisor.process import Process

log = structlog.get_logger()

KEEPER = (sys.executable, "-m", "filer.keeper")
_VOLUME_SERVER = (sys.executable, "-m", "filer.volume_server")

_KEEPER_PHASES = {"running": "running", "backoff": "restarting", "stopping": "stopped",
                  "stopped": "stopped", "misconfigured": "failed"}

_ANSWER_WITHIN_S = 10.0
"""A volume server that takes longer for a snapshot of its counters is unwell."""
_WATCH_EVERY_S = 1.0
_WATCH_EVERY_S_AT_START = 0.05


class Keeper(Program):
    name = "keeper"

    def __init__(
        self, settings: VolumeSettings, layout: Layout, environment: Mapping[str, str], *,
        command: tuple[str, ...], lost: Callable[[], None],
        wait_serving: Callable[[], Awaitable[None]],
    ) -> None:
        self.volume = settings.name
        self._layout = layout
        self._environment = environment
        self._command = command
        self._lost = lost
        self._wait_serving = wait_serving

    async def prepare(self) -> None:
        mountpoint = self._layout.mountpoint(self.volume)
        if is_mounted(mountpoint):
            unmount(mountpoint)
        mountpoint.mkdir(parents=True, exist_ok=True)

    def start(self) -> Process:
        layout = self._layout
        # It dies with us, as the NFS server does: a node without its supervisor is down, not
        # half alive.
        return Process(
            [*self._command, "--volume", self.volume,
             "--mountpoint", str(layout.mountpoint(self.volume)),
             "--state", str(layout.keeper_state(self.volume)), "--die-with-parent", "--",
             *_VOLUME_SERVER, "--config", str(layout.node_config), "--volume", self.volume],
            self._environment)

    async def wait_ready(self) -> None:
        await self._wait_serving()

    async def ended(self) -> None:
        self._lost()

    def explain(self, status: int) -> str:
        return str(self.state().get("last_line") or "")

    def state(self) -> dict[str, Any]:
        """The keeper's state file; empty if there is none."""
        try:
            state = json.loads(self._layout.keeper_state(self.volume).read_bytes())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}


class Volume:
    """*lost* is called when the mount is gone."""

    def __init__(
        self, settings: VolumeSettings, layout: Layout, environment: Mapping[str, str], *,
        keeper: tuple[str, ...], lost: Callable[[], None],
    ) -> None:
        self.settings = settings
        self._layout = layout
        self._socket = layout.volume_socket(settings.name)
        self._on_lost = lost
        self._status: VolumeStatus | None = None
        self._problem = "the volume server has not started yet"
        self.serving = trio.Event()
        """It answers and its mount is there; a new event after the mount was lost."""
        self._keeper = Keeper(settings, layout, environment, command=keeper, lost=self._lost,
                              wait_serving=self.wait_serving)
        self.child = Child(self._keeper)

    async def wait_serving(self) -> None:
        await self.serving.wait()

    @property
    def core_answers(self) -> bool:
        """By the last status; a volume server that does not answer is no excuse for others."""
        return self._status is None or self._status.core_reachable

    def _lost(self) -> None:
        self._status, self._problem = None, "its keeper ended, and the mount with it"
        self.serving = trio.Event()
        self._on_lost()

    async def watch(self) -> None:
        """Keep the last status fresh, notice when the volume serves.  Runs for ever."""
        restarts = 0
        while True:
            await self.refresh()
            server = self.server_status()
            if server.restarts > restarts and server.last_exit_age_s is not None:
                log.warning("volume server ended, its keeper starts it again",
                            volume=self.settings.name, reason=server.last_exit)
            restarts = server.restarts
            if (
                not self.serving.is_set() and self._status is not None
                and self._status.phase == "serving" and self.child.pid is not None
                and is_mounted(self._layout.mountpoint(self.settings.name))
            ):
                self.serving.set()
            await trio.sleep(
                _WATCH_EVERY_S if self.serving.is_set() else _WATCH_EVERY_S_AT_START)

    async def refresh(self) -> None:
        """Ask for the status now."""
        try:
            answer = await self.ask("status")
            self._status = msgspec.convert(answer, VolumeStatus)
        except trio.TooSlowError:
            self._status = None
            self._problem = f"the volume server does not answer within {_ANSWER_WITHIN_S:.0f} s"
        except NotRunning:
            self._status, self._problem = None, "the volume server is not running"
        except (CallFailed, BadMessage, msgspec.ValidationError, OSError) as exc:
            self._status, self._problem = None, f"the volume server does not answer: {exc}"

    def report(self) -> VolumeReport:
        return VolumeReport(
            name=self.settings.name, junction=self.settings.junction, core=self.settings.core,
            policy=self.settings.policy, status=self._status,
            problem="" if self._status is not None else self._problem)

    def server_status(self) -> ChildStatus:
        """The volume server, as its keeper tells."""
        state = self._keeper.state()
        last_exit = state.get("last_exit") or ""
        ended_itself = last_exit not in ("", "exit 0")  # exit 0: it was replaced
        if last_exit.startswith("exit ") and ended_itself and state.get("last_line"):
            last_exit = f"{last_exit} ({state['last_line']})"
        return ChildStatus(
            name="volume server", volume=self.settings.name, pid=state.get("server_pid"),
            state=_KEEPER_PHASES.get(state.get("phase", ""), "starting"),
            restarts=state.get("restarts", 0), last_exit=last_exit,
            last_exit_age_s=max(0.0, time.time() - state["since"]) if ended_itself else None)

    async def ask(
        self, verb: str, arguments: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """A verb that answers at once.  Raises as ``admin.client.call``, and trio.TooSlowError."""
        with trio.fail_after(_ANSWER_WITHIN_S):
            return await call(self._socket, verb, arguments)

    async def work(
        self, verb: str, arguments: dict[str, Any], on_progress: OnProgress | None = None
    ) -> dict[str, Any]:
        """A verb that takes as long as it takes.  Raises as ``admin.client.call``."""
        return await call(self._socket, verb, arguments, on_progress=on_progress)

    async def top(self) -> TopSample | None:
        try:
            return msgspec.convert(await self.ask("top"), TopSample)
        except (CallFailed, NotRunning, BadMessage, msgspec.ValidationError, OSError,
                trio.TooSlowError):
            return None

    async def metrics_text(self) -> str | None:
        try:
            return str((await self.ask("metrics"))["text"])
        except (CallFailed, NotRunning, BadMessage, KeyError, OSError, trio.TooSlowError):
            return None

    async def flush_and_stop(
        self, *, keep_dirty: bool, on_progress: OnProgress | None = None
    ) -> StopReport | None:
        """Ask the volume server to write everything back (unless *keep_dirty*) and to end.

        ``None``: it does not answer; its dirty data stays in the log.
        """
        try:
            answer = await self.work("stop", {"keep_dirty": keep_dirty}, on_progress)
            return msgspec.convert(answer, StopReport)
        except (CallFailed, NotRunning, BadMessage, msgspec.ValidationError, OSError) as exc:
            log.warning("volume cannot be flushed, its dirty data stays in the log",
                        volume=self.settings.name, reason=str(exc))
            return None

    async def release(self, grace_s: float) -> None:
        """Stop the keeper; the mount is gone afterwards."""
        await self.child.stop(grace_s)
        mountpoint = self._layout.mountpoint(self.settings.name)
        if is_mounted(mountpoint):
            log.warning("the keeper left its mount, unmounting", mountpoint=str(mountpoint))
            unmount(mountpoint)

    async def upgrade(self) -> None:
        """Have the keeper replace the volume server; returns when the new one answers.

        Raises: trio.TooSlowError: it did not within a minute.
        """
        before = None if self._status is None else self._status.pid
        self.child.signal(signal.SIGHUP)
        with trio.fail_after(60):
            while self._status is None or self._status.pid == before:
                await trio.sleep(_WATCH_EVERY_S_AT_START)
                await self.refresh()
