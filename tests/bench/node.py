"""A filer node for benchmarks and the demo, started as a user does: ``filer serve URL …``."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filer.admin.client import NotRunning, call_sync
from tests.bench.load import Export
from tests.support.nas import free_ports

JUNCTION = "/shows"
_START_LIMIT_S = 60.0
_STOP_LIMIT_S = 120.0
"""Stopping writes back what is dirty."""
_FILER = [sys.executable, "-m", "filer"]
_ROOT = Path(__file__).parents[2]


class NodeFailed(Exception):
    """It did not start, or a command about it failed."""


class FilerNode:
    """A running node with one volume; see ``rig.Node`` for what the rows use."""

    def __init__(self, work_dir: Path, core: str, settings: dict[str, str]) -> None:
        nfs_port, mount_port, nlm_port = free_ports(3)
        self.export = Export(nfs_port, mount_port, JUNCTION)
        self._run_dir = work_dir / "run"
        self._log = work_dir / "log"
        self._log_file = self._log.open("wb")
        for_user = [core, "--cache", str(work_dir / "cache"), "--export", JUNCTION]
        for key, value in settings.items():
            for_user += [f"--{key.replace('_', '-')}", value]
        self.command_line = " ".join(["filer", "serve", *for_user])
        self._process = subprocess.Popen(
            [*_FILER, "serve", *for_user,
             # Free ports instead of NFS's own: another server may run on this machine.
             "--nfs-port", str(nfs_port), "--nfs-mount-port", str(mount_port),
             "--nfs-nlm-port", str(nlm_port), "--no-nfs-locks", "--nfs-bind", "127.0.0.1",
             "--run-dir", str(self._run_dir), "--metrics-port", "0"],
            cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=self._log_file, stderr=self._log_file,
            # Ctrl-C is for us; the node is then stopped in order.
            start_new_session=True)

    def wait_until_serving(self) -> None:
        deadline_s = time.monotonic() + _START_LIMIT_S
        while True:
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise NodeFailed(f"the node did not start:\n{self.log_tail()}")
            try:
                if self._ask("status")["phase"] == "serving":
                    return
            except NotRunning:
                pass
            time.sleep(0.05)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise NodeFailed(f"the node did not stop:\n{self.log_tail()}") from None
        finally:
            self._log_file.close()

    def log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def filer(self, *arguments: str) -> str:
        done = subprocess.run(
            [*_FILER, *arguments], cwd=_ROOT, capture_output=True, text=True,
            env={**os.environ, "FILER_RUN_DIR": str(self._run_dir)})
        if done.returncode:
            raise NodeFailed(f"filer {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def _ask(self, verb: str) -> dict[str, Any]:
        return call_sync(self._run_dir / "node.sock", verb)

    def _top(self) -> dict[str, Any]:
        sample: dict[str, Any] = self._ask("top")["samples"][0]
        return sample

    @property
    def volume_server_pid(self) -> int:
        pid: int = self._ask("status")["volumes"][0]["status"]["pid"]
        return pid

    @property
    def nfs_server_pid(self) -> int:
        children = self._ask("status")["children"]
        pid: int = next(c["pid"] for c in children if c["name"] == "nfs server")
        return pid

    def upcalls(self) -> dict[str, int]:
        operations: dict[str, int] = self._top()["operations"]
        return operations

    def core_read_bytes(self) -> int:
        byte_count: int = self._top()["core_read_bytes"]
        return byte_count


@contextmanager
def start_node(work_dir: Path, *, core: str, settings: dict[str, str]) -> Iterator[FilerNode]:
    """Start a node in front of *core*; *settings* are further flags, without their dashes."""
    work_dir.mkdir(parents=True)
    node = FilerNode(work_dir, core, settings)
    try:
        node.wait_until_serving()
        yield node
    except Exception:
        print(node.log_tail(), file=sys.stderr)
        raise
    finally:
        node.stop()
