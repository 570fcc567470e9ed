"""Runs a real supervisor with the real NFS server over fake keepers, in a process of its own."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import trio

from filer.admin.client import NotRunning, call_sync
from filer.settings import NodeSettings
from filer.supervisor import rpc_probe
from filer.supervisor.claim import remove_leftovers
from filer.supervisor.layout import Layout
from tests.support.nas import free_ports

_REPOSITORY = Path(__file__).parents[2]
_WAIT_S = 60.0

_MAIN = """
import sys
from filer.errors import Misconfigured
from filer.node import NodeOptions, run_node
from filer.settings import NodeSettings
settings = NodeSettings.model_validate_json(open(sys.argv[1]).read())
options = NodeOptions(keep_dirty="--keep-dirty" in sys.argv,
                      late_after_s=0.0 if "--no-patience" in sys.argv else 15.0,
                      hung_after_s=1.0 if "--no-patience" in sys.argv else 20.0,
                      keeper=(sys.executable, "-m", "tests.support.fake_keeper"))
try:
    run_node(settings, options)
except Misconfigured as exc:
    print("REFUSED", exc, exc.hint, file=sys.stderr)
    sys.exit(64)
"""


class FakeNode:
    """A node under *directory* with fake volumes called *volumes*."""

    def __init__(self, directory: Path, *volumes: str, **settings: Any) -> None:
        self.fake = directory / "fake"
        self.run_dir = directory / "run"
        self._directory = directory
        self.port, mount_port, nlm_port, self.metrics_port = free_ports(4)
        self.mount_port = mount_port
        data = {
            "node": "n1", "cache_dir": str(directory / "cache"), "run_dir": str(self.run_dir),
            "metrics_port": self.metrics_port, "log_format": "json", "log_level": "debug",
            "nfs": {"bind": "127.0.0.1", "port": self.port, "mount_port": mount_port,
                    "nlm_port": nlm_port, "locks": False},
            "volumes": [{"name": name, "core": f"file://{directory}/core/{name}",
                         "junction": f"/{name}"} for name in volumes],
            **settings,
        }
        self.settings = NodeSettings.model_validate(data)
        self.process: subprocess.Popen[bytes] | None = None
        self.log: list[dict[str, Any]] = []
        self.raw_log: list[str] = []
        self._news = threading.Condition()
        for name in volumes:
            (self.fake / "data" / name).mkdir(parents=True, exist_ok=True)

    @property
    def socket(self) -> Path:
        return self.run_dir / "node.sock"

    def start(self, *arguments: str, inside: Sequence[str] = ()) -> None:
        """*inside*: a command that runs what is appended to it, such as unshare(1)."""
        config = self._directory / "settings.json"
        config.write_text(self.settings.model_dump_json())
        self.process = subprocess.Popen(
            [*inside, sys.executable, "-c", _MAIN, str(config), *arguments], cwd=_REPOSITORY,
            env={**os.environ, "FILER_FAKE": str(self.fake)}, stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL, start_new_session=True)
        self._reader = threading.Thread(target=self._read_log, args=(self.process.stderr,))
        self._reader.start()

    def _read_log(self, stream: Any) -> None:
        for line in stream:
            with self._news:
                self.raw_log.append(line.decode(errors="replace"))
                try:
                    self.log.append(json.loads(line))
                except ValueError:
                    pass
                self._news.notify_all()

    def wait_logged(self, event: str, count: int = 1, **fields: Any) -> dict[str, Any]:
        """The *count*-th log line with this event and these fields."""
        def found() -> list[dict[str, Any]]:
            return [entry for entry in self.log if entry.get("event") == event
                    and all(entry.get(k) == v for k, v in fields.items())]

        with self._news:
            if not self._news.wait_for(lambda: len(found()) >= count, _WAIT_S):
                raise AssertionError(f"no {event!r} in the log:\n{''.join(self.raw_log)}")
            return found()[count - 1]

    def wait_serving(self) -> None:
        self.wait_logged("node serves")

    def status(self) -> dict[str, Any]:
        return call_sync(self.socket, "status")

    def wait_status(self, holds: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Asks until *holds*; the node tells nobody that its status changed."""
        for _ in range(1200):
            try:
                status = self.status()
            except NotRunning:
                status = {}
            if status and holds(status):
                return status
            select.select([], [], [], 0.05)
        raise AssertionError(f"never so: {status}")

    def child(self, name: str, volume: str = "") -> dict[str, Any]:
        return next(c for c in self.status()["children"]
                    if c["name"] == name and c["volume"] == volume)

    def events(self) -> list[str]:
        path = self.fake / "events"
        return path.read_text().splitlines() if path.exists() else []

    def nfs_answers(self) -> bool:
        return trio.run(rpc_probe.answers, "127.0.0.1", self.port, rpc_probe.NFS_PROGRAM, 3)

    def signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        assert self.process is not None
        status = self.process.wait(_WAIT_S)
        self._reader.join(_WAIT_S)
        return status

    def clean_up(self) -> None:
        """Whatever the test did: no process and no mount is left."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        remove_leftovers(Layout(self.run_dir.resolve(), self.settings.cache_dir))
        if self.process is not None:
            self._reader.join(_WAIT_S)
