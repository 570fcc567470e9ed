"""A complete filer node for tests: the ``filer serve`` of this work tree, on free ports.

Owns the processes of the node, which are all gone when the block ends, and its directories
below *work_dir*.  Does not own the core filer.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from filer.admin.protocol import Failure, LineSplitter, Request, Result, decode_reply, encode
from filer.supervisor.layout import CHILD_OF, Layout
from tests.support import nfs3
from tests.support.nas import free_ports

VOLUME, JUNCTION = "shows", "/shows"
_PROJECT = Path(__file__).resolve().parents[2]
_START_LIMIT_S = 90.0
_STOP_LIMIT_S = 90.0
_LOOK_AGAIN_S = 0.02


class NodeFailed(AssertionError):
    """The node, or a command about it, did not do what a test counts on."""


@dataclass(frozen=True, slots=True)
class Pids:
    supervisor: int
    keeper: int
    volume: int
    ganesha: int


class Metrics:
    """One scrape of a volume server."""

    def __init__(self, text: str) -> None:
        self._samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of *name* that carry these labels; 0 if there are none."""
        wanted = set(labels.items())
        return sum(value for (found, having), value in self._samples.items()
                   if found == name and wanted <= set(having))

    def upcalls(self) -> dict[str, int]:
        """FUSE requests that entered Python so far, by operation."""
        return {dict(labels)["operation"]: int(value)
                for (name, labels), value in self._samples.items()
                if name == "filer_upcalls_total"}


class Node:
    """A node; ``start`` and ``stop`` may alternate, the ports and directories stay the same."""

    def __init__(
        self, work_dir: Path, core_url: str, *, policy: str | None = None,
        cache_dir: Path | None = None, nfs: Mapping[str, Any] | None = None,
        node: Mapping[str, Any] | None = None, **volume: Any,
    ) -> None:
        self.nfs_port, self.mount_port, self.nlm_port = free_ports(3)
        self.run_dir = work_dir / "run"
        self.cache_dir = cache_dir or work_dir / "cache"
        self.layout = Layout(self.run_dir, self.cache_dir)
        self.config = work_dir / "node.toml"
        self.log = work_dir / "node.log"
        for directory in (self.run_dir, self.cache_dir):
            directory.mkdir(parents=True, exist_ok=True)
        settings: dict[str, Any] = {
            "cache_dir": str(self.cache_dir), "run_dir": str(self.run_dir), "metrics_port": 0,
            "log_level": "debug", **(node or {}),
            "nfs": {"bind": "127.0.0.1", "port": self.nfs_port, "mount_port": self.mount_port,
                    "nlm_port": self.nlm_port, "locks": False, "lease_s": 5, **(nfs or {})},
            "volumes": [{"name": VOLUME, "core": core_url, "junction": JUNCTION,
                         **({"policy": policy} if policy else {}), **volume}],
        }
        self.config.write_text(to_toml(settings))
        self._process: subprocess.Popen[bytes] | None = None

    # Life

    def start(self, *flags: str) -> None:
        """Start and wait until it serves."""
        self.spawn(*flags)
        self.wait_until_serving()

    def spawn(self, *flags: str) -> None:
        assert self._process is None or self._process.poll() is not None, "it runs already"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "filer", "serve", "--config", str(self.config), *flags],
                cwd=_PROJECT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)

    def wait_until_serving(self, limit_s: float = _START_LIMIT_S) -> None:
        """Until every volume and the NFS server answer."""
        deadline_s = time.monotonic() + limit_s
        while not self._is_serving():
            if self._process is not None and self._process.poll() is not None:
                raise NodeFailed(f"the node ended with {self._process.returncode}\n{self.tail()}")
            if time.monotonic() > deadline_s:
                raise NodeFailed(f"the node does not serve\n{self.tail()}")
            select.select([], [], [], _LOOK_AGAIN_S)

    def _is_serving(self) -> bool:
        try:
            status = self.status()
        except NodeFailed:
            return False
        if status["phase"] != "serving" or any(
            child["state"] != "running" for child in status["children"]
        ):
            return False
        if any((report["status"] or {}).get("phase") != "serving" for report in status["volumes"]):
            return False
        try:
            nfs3.mount("127.0.0.1", self.mount_port, JUNCTION, timeout_s=5)
        except (OSError, nfs3.NfsError, nfs3.RpcError):
            return False
        return True

    def stop(self, *, limit_s: float = _STOP_LIMIT_S) -> int:
        """SIGTERM; the exit status."""
        if self._process is None:
            return 0
        process, self._process = self._process, None
        process.terminate()
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise NodeFailed(f"the node did not stop\n{self.tail()}") from None

    def kill(self, what: str) -> None:
        """SIGKILL: ``volume`` server, ``ganesha``, ``keeper``, or the whole ``node`` at once.

        Returns when the processes are gone.
        """
        if what == "node":
            self._kill_everything()
            return
        _kill_and_wait([getattr(self.pids, what)])

    def _kill_everything(self) -> None:
        pids = self.processes()
        if self._process is not None:
            self._process.kill()
        _kill_and_wait(pids)
        if self._process is not None:
            self._process.wait()
            self._process = None

    def processes(self) -> list[int]:
        """All processes of the node but the supervisor, found by what they inherited from it."""
        mark = f"{CHILD_OF}={self.run_dir}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    environment = (entry / "environ").read_bytes()
                except OSError:
                    continue
                if mark in environment.split(b"\0"):
                    found.append(int(entry.name))
        return found

    def clean_up(self) -> None:
        """Nothing of the node is left, however the test ended."""
        try:
            self.stop()
        finally:
            self._kill_everything()
            mountpoint = self.mountpoint()
            while _is_mounted(mountpoint):
                _abort_fuse(mountpoint)
                subprocess.run(["umount", "-l", str(mountpoint)], check=True)

    # What tests look at

    def mountpoint(self, volume: str = VOLUME) -> Path:
        return self.layout.mountpoint(volume)

    @property
    def pids(self) -> Pids:
        status = self.status()
        children = {child["name"]: child["pid"] for child in status["children"]}
        server = status["volumes"][0]["status"]
        if server is None or not children.get("nfs server"):
            raise NodeFailed(f"not all processes run: {status}")
        return Pids(status["pid"], children["keeper"], server["pid"], children["nfs server"])

    def status(self) -> dict[str, Any]:
        return self.ask("status")

    def volume_status(self) -> dict[str, Any]:
        """The answer of the volume server itself."""
        return ask(self.layout.volume_socket(VOLUME), "status")

    def metrics(self) -> Metrics:
        return Metrics(ask(self.layout.volume_socket(VOLUME), "metrics")["text"])

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        return ask(self.layout.node_socket, verb, arguments)

    def cli(self, *arguments: str) -> dict[str, Any]:
        """``filer VERB … --json`` as a user runs it."""
        done = self.run_cli(*arguments, "--json")
        if done.returncode:
            raise NodeFailed(f"filer {' '.join(arguments)}: {done.returncode} {done.stderr}")
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    def run_cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "filer", *arguments], cwd=_PROJECT, capture_output=True,
            text=True, timeout=120, env={**os.environ, "FILER_RUN_DIR": str(self.run_dir)})

    def tail(self, byte_count: int = 6000) -> str:
        return self.log.read_text(errors="replace")[-byte_count:] if self.log.exists() else ""

    # Clients

    def client(self, *, is_hard: bool = True, **options: Any) -> nfs3.Nfs3:
        return nfs3.Nfs3("127.0.0.1", self.nfs_port, is_hard=is_hard, **options)

    def root_handle(self) -> bytes:
        return nfs3.mount("127.0.0.1", self.mount_port, JUNCTION)


@contextmanager
def running_node(work_dir: Path, core_url: str, **settings: Any) -> Iterator[Node]:
    """A node that serves *core_url* as `JUNCTION`; see `Node` for the settings.

    On failure of the block the end of the node's log is printed.
    """
    node = Node(work_dir, core_url, **settings)
    try:
        node.start()
        yield node
    except BaseException:
        print(f"the node's log ends with:\n{node.tail()}", file=sys.stderr)
        raise
    finally:
        node.clean_up()


def ask(
    socket_path: Path, verb: str, arguments: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One exchange with an admin socket, without an event loop."""
    splitter = LineSplitter()
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            with opened_directory(socket_path.parent) as directory:
                # The path may be longer than a socket's address can be.
                connection.connect(f"/proc/self/fd/{directory}/{socket_path.name}")
            connection.sendall(encode(Request(verb, dict(arguments or {}))))
            while data := connection.recv(1 << 16):
                for line in splitter.feed(data):
                    match decode_reply(line):
                        case Result(value):
                            return value
                        case Failure() as failure:
                            raise NodeFailed(f"{verb}: {failure.message}")
    except OSError as error:
        raise NodeFailed(f"{socket_path} does not answer {verb}: {error}") from error
    raise NodeFailed(f"{socket_path} closed without an answer to {verb}")


@contextmanager
def opened_directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def to_toml(settings: Mapping[str, Any], prefix: str = "") -> str:
    """TOML of nested mappings, lists of mappings, strings, numbers and booleans."""
    plain, nested = [], []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            nested.append(f"[{prefix}{key}]\n{to_toml(value, f'{prefix}{key}.')}")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            nested += [f"[[{prefix}{key}]]\n{to_toml(item, f'{prefix}{key}.')}" for item in value]
        else:
            # JSON's strings, numbers, booleans and lists of them are TOML's too.
            plain.append(f"{key} = {json.dumps(value)}\n")
    return "".join(plain + nested)


def _kill_and_wait(pids: list[int]) -> None:
    watched = []
    for pid in pids:
        try:
            watched.append(os.pidfd_open(pid))
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    try:
        deadline_s = time.monotonic() + 30
        for fd in watched:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise NodeFailed("a killed process does not end: stuck in the kernel?")
    finally:
        for fd in watched:
            os.close(fd)


def _is_mounted(mountpoint: Path) -> bool:
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(mountpoint) for line in mounts)


def _abort_fuse(mountpoint: Path) -> None:
    """A request nobody will answer would keep the mount busy for ever."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[4] == str(mountpoint):
            minor = fields[2].split(":")[1]
            abort = Path(f"/sys/fs/fuse/connections/{minor}/abort")
            if abort.exists():
                abort.write_text("1")
