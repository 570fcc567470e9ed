"""The NFS server of a node: NFS-Ganesha, and rpcbind and rpc.statd where nobody runs them.

Owns those three processes, Ganesha's files and its health check.  Restarting any of them
disturbs no mount: they are clients of the mounts like any other program.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog
import trio

from filer.errors import Misconfigured
from filer.settings import NodeSettings
from filer.supervisor import ganesha, rpc_probe
from filer.supervisor.child import Child, Program
from filer.supervisor.layout import Layout
from filer.supervisor.process import Process
from filer.supervisor.restart import HangDetector
from filer.supervisor.volumes import Volume

log = structlog.get_logger()

GANESHA = Path("/usr/bin/ganesha.nfsd")
RPCBIND = Path("/usr/sbin/rpcbind")
STATD = Path("/usr/sbin/rpc.statd")

_PROBE_EVERY_S = 5.0
_PROBE_EVERY_EAGERLY_S = 0.2
"""While something is to be noticed soon: a volume that is late, a server that may hang."""
_PROBE_WITHIN_S = 5.0
_LOG_BYTES_MAX = 32 << 20
_LOG_TAIL_BYTES = 16 << 10


def preload(module: str) -> Path:
    """The compiled library *module*.  Raises: Misconfigured: the package was not built."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise Misconfigured(
            f"the compiled part {module} is missing", "install the package: make install")
    return Path(spec.origin)


class Ganesha(Program):
    name = "nfs server"

    def __init__(
        self, settings: NodeSettings, layout: Layout, environment: Mapping[str, str],
        volumes: Sequence[Volume], *, late_after_s: float,
    ) -> None:
        self._settings = settings
        self._layout = layout
        self._volumes = volumes
        self._late_after_s = late_after_s
        self._environment = dict(environment)
        libraries = [preload("filer.supervisor._fsid_preload")]
        if not settings.nfs.registers:
            libraries.append(preload("filer.supervisor._no_rpcbind"))
        self._environment["LD_PRELOAD"] = ":".join(map(str, libraries))
        self._environment["FILER_FSID"] = ganesha.fsid_environment(
            (layout.mountpoint(v.settings.name), ganesha.fsid(v.settings)) for v in volumes)
        self.exported: frozenset[str] = frozenset()
        """Names of the volumes in the configuration that Ganesha read last."""

    async def prepare(self) -> None:
        with trio.move_on_after(self._late_after_s) as patience:
            for volume in self._volumes:
                await volume.serving.wait()
        if patience.cancelled_caught:
            log.warning("volumes are late, the others are served without them", late=[
                v.settings.name for v in self._volumes if not v.serving.is_set()])
        await rpc_probe.until(self._any_serves)
        self._layout.ganesha_recovery.mkdir(parents=True, exist_ok=True)
        self._layout.ganesha_log.write_bytes(b"")
        self.write_configuration()
        self._epoch = self._new_epoch()

    async def _any_serves(self) -> bool:
        return any(volume.serving.is_set() for volume in self._volumes)

    def write_configuration(self) -> None:
        """With the volumes that serve now: an export of an empty mountpoint would show, and
        take, files that are not there."""
        serving = [volume for volume in self._volumes if volume.serving.is_set()]
        text = ganesha.render(
            self._settings,
            [(v.settings, self._layout.mountpoint(v.settings.name)) for v in serving],
            self._layout.ganesha_recovery)
        replace_file(self._layout.ganesha_config, text)
        self.exported = frozenset(volume.settings.name for volume in serving)

    def start(self) -> Process:
        layout = self._layout
        return Process(
            [str(GANESHA), "-F", "-f", str(layout.ganesha_config), "-L", str(layout.ganesha_log),
             "-p", str(layout.ganesha_pid), "-E", str(self._epoch)],
            self._environment, die_with_parent=True)

    async def wait_ready(self) -> None:
        await rpc_probe.until(self.answers)

    async def answers(self, within_s: float = _PROBE_WITHIN_S) -> bool:
        nfs = self._settings.nfs
        with trio.move_on_after(within_s):
            return await rpc_probe.answers(
                reachable(nfs.bind), nfs.port, rpc_probe.NFS_PROGRAM, 3)
        return False

    def explain(self, status: int) -> str:
        return ganesha.last_complaint(_tail(self._layout.ganesha_log))

    def _new_epoch(self) -> int:
        path = self._layout.ganesha_epoch
        try:
            previous = int(path.read_text())
        except (FileNotFoundError, ValueError):
            previous = 0
        epoch = ganesha.next_epoch(int(time.time()), previous)
        replace_file(path, f"{epoch}\n")
        return epoch


class Rpcbind(Program):
    name = "rpcbind"

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def start(self) -> Process:
        Path("/run/rpcbind").mkdir(exist_ok=True)  # its lock file's
        return Process([str(RPCBIND), "-f"], self._environment, die_with_parent=True)

    async def wait_ready(self) -> None:
        await rpc_probe.until(rpcbind_answers)


class Statd(Program):
    name = "statd"

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment

    def start(self) -> Process:
        return Process([str(STATD), "-F"], self._environment, die_with_parent=True)

    async def wait_ready(self) -> None:
        await rpc_probe.until(statd_answers)


async def rpcbind_answers() -> bool:
    with trio.move_on_after(_PROBE_WITHIN_S):
        return await rpc_probe.answers(
            "127.0.0.1", rpc_probe.PORTMAP_PORT, rpc_probe.PORTMAP_PROGRAM, 2)
    return False


async def statd_answers() -> bool:
    with trio.move_on_after(_PROBE_WITHIN_S):
        return await rpc_probe.registered_port(rpc_probe.STATUS_PROGRAM, 1) != 0
    return False


class NfsServer:
    """Ganesha with what it needs; ``start`` returns when clients can mount."""

    def __init__(
        self, settings: NodeSettings, layout: Layout, environment: Mapping[str, str],
        volumes: Sequence[Volume], *, late_after_s: float, hung_after_s: float,
    ) -> None:
        self._settings = settings
        self._layout = layout
        self._volumes = volumes
        self._environment = environment
        self._probe_within_s = hung_after_s / HangDetector.probes_needed
        self._program = Ganesha(
            settings, layout, environment, volumes, late_after_s=late_after_s)
        self._ganesha = Child(self._program)
        self.children: list[Child] = []
        """Those that were started, in order."""

    async def start(self, nursery: trio.Nursery) -> None:
        """Raises: Misconfigured: one of them gave up."""
        if self._settings.nfs.registers and not await rpcbind_answers():
            await self._run(nursery, Child(Rpcbind(self._environment)))
        if self._settings.nfs.locks and not await statd_answers():
            await self._run(nursery, Child(Statd(self._environment)))
        await self._run(nursery, self._ganesha)
        nursery.start_soon(self._watch)

    async def _run(self, nursery: trio.Nursery, child: Child) -> None:
        self.children.append(child)
        nursery.start_soon(child.run)
        await child.settled.wait()
        if child.state == "failed":
            raise Misconfigured(f"{child.program.name}: {child.status().last_exit}")

    async def stop(self, grace_s: float) -> None:
        """In the reverse order of the start."""
        for child in reversed(self.children):
            await child.stop(grace_s)

    def mount_lost(self, volume: str) -> None:
        """Ganesha holds the lost mount and cannot let go of it: a restart, not a SIGHUP."""
        if volume in self._program.exported:
            self._ganesha.kill(f"the mount of volume {volume} was lost")

    async def _watch(self) -> None:
        """Restart Ganesha when it hangs; export volumes that came late; bound its log."""
        hangs = HangDetector()
        while True:
            eager = self._ganesha.state == "unresponsive" or not self._all_exported()
            await trio.sleep(_PROBE_EVERY_EAGERLY_S if eager else _PROBE_EVERY_S)
            if self._ganesha.state not in ("running", "unresponsive"):
                hangs = HangDetector()
                continue
            self._export_late_volumes()
            _bound_log(self._layout.ganesha_log)
            answered = await self._program.answers(self._probe_within_s)
            if self._ganesha.state not in ("running", "unresponsive"):
                continue
            self._ganesha.state = "running" if answered else "unresponsive"
            excused = not all(volume.core_answers for volume in self._volumes)
            if hangs.probed(answered=answered, excused=excused):
                self._ganesha.kill("it hung: no answer to NULL requests")

    def _all_exported(self) -> bool:
        return len(self._program.exported) == len(self._volumes)

    def _export_late_volumes(self) -> None:
        late = [v.settings.name for v in self._volumes
                if v.serving.is_set() and v.settings.name not in self._program.exported]
        if late:
            self._program.write_configuration()
            self._ganesha.signal(signal.SIGHUP)
            log.info("volumes that came late are exported", volumes=late)


def reachable(bind: str) -> str:
    """An address at which to reach a server that is bound to *bind*."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(bind, bind)


def replace_file(path: Path, text: str) -> None:
    """Write *text* so that a reader sees all of it or what was there before."""
    fresh = path.with_name(path.name + ".new")
    with open(fresh, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(path)


def _tail(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _bound_log(path: Path) -> None:
    """Ganesha appends for ever; it opens with O_APPEND, so cutting the file is safe."""
    try:
        if path.stat().st_size > _LOG_BYTES_MAX:
            os.truncate(path, 0)
    except FileNotFoundError:
        pass
