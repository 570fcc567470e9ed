"""What the rows run against: a NAS, a link, a node, and the machine's caches.

Owns the scratch directory and the start and end of every process of a row; the rows own what
is measured.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.bench.load import Export
from tests.bench.results import Measure
from tests.support.nas import running_nas
from tests.support.wan import Wan, running_wan

MIB, GIB = 1 << 20, 1 << 30


class Node(Protocol):
    """One filer node as a user would start it, with one volume."""

    export: Export

    @property
    def volume_server_pid(self) -> int: ...

    @property
    def nfs_server_pid(self) -> int: ...

    def filer(self, *arguments: str) -> str:
        """Run ``filer ARGUMENTS`` against this node; returns what it printed."""
        ...

    def upcalls(self) -> dict[str, int]:
        """FUSE requests that entered Python since the start, by operation."""
        ...

    def core_read_bytes(self) -> int: ...


class StartNode(Protocol):
    def __call__(
        self, work_dir: Path, *, core: str, settings: dict[str, str]
    ) -> AbstractContextManager[Node]:
        """Start a node in front of *core*; *settings* are flags of ``filer serve``."""
        ...


@dataclass(frozen=True, slots=True)
class Site:
    """Everything a row needs, running."""

    base_dir: Path
    """What the baseline's Ganesha exports."""
    core_dir: Path
    """What the NAS behind the node exports."""
    baseline: Export
    node: Node
    link: Wan

    @property
    def ours(self) -> Export:
        return self.node.export


class Rig:
    def __init__(
        self, work_dir: Path, *, scale: float, runs: int, start_node: StartNode,
        say: Callable[[str], None],
    ) -> None:
        self.work_dir = work_dir
        self.scale = scale
        self.runs = runs
        self.say = say
        self._start_node = start_node

    def count(self, full: int, *, least: int = 1) -> int:
        return max(least, round(full * self.scale))

    def bytes(self, full: int) -> int:
        """*full* scaled, in whole MiB."""
        return max(MIB, int(full * self.scale) // MIB * MIB)

    @contextlib.contextmanager
    def site(
        self, *, rtt_s: float = 0.0, bytes_per_s: float = float("inf"), one_tree: bool = True,
        core: Callable[[Path], str] | None = None, **settings: str,
    ) -> Iterator[Site]:
        """A NAS, a node reading it through a link, and Ganesha on ext4 to compare with.

        *one_tree*: the baseline exports the directory that is behind the node, too.
        *core* makes another core filer URL of that directory.
        """
        core_dir = self.work_dir / "core"
        base_dir = core_dir if one_tree else self.work_dir / "base"
        for directory in {core_dir, base_dir}:
            directory.mkdir(exist_ok=True)
        exports = {"/core": core_dir} if one_tree else {"/core": core_dir, "/base": base_dir}
        with contextlib.ExitStack() as stack:
            nas = stack.enter_context(running_nas(self.work_dir / "nas", exports))
            link = stack.enter_context(
                running_wan(targets={"nfs": nas.port, "mount": nas.mount_port},
                            rtt_s=rtt_s, bytes_per_s=bytes_per_s))
            url = core(core_dir) if core else nas.url(
                "/core", port=link.port("nfs"), mount_port=link.port("mount"))
            self.say("starting a node")
            node = stack.enter_context(
                self._start_node(self.work_dir / "node", core=url, settings=settings))
            baseline = Export(
                nas.port, nas.mount_port, "/core" if one_tree else "/base")
            yield Site(base_dir, core_dir, baseline, node, link)

    def alternate(
        self, name: str, ours: Callable[[int], float], baseline: Callable[[int], float],
        unit: str,
    ) -> Measure:
        """Ours and baseline in turns; each is given the number of its run."""
        pairs = []
        for run in range(self.runs):
            pairs.append((ours(run), baseline(run)))
            self.say(
                f"{name}, run {run + 1} of {self.runs}: "
                f"ours {pairs[-1][0]:.4g} {unit}, baseline {pairs[-1][1]:.4g} {unit}")
        return Measure(name, tuple(p[0] for p in pairs), tuple(p[1] for p in pairs))


def drop_caches() -> None:
    """Empty the kernel's page, dentry and inode caches."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def cpu_s(pid: int) -> float:
    """User and system time of a process and all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_bytes(pid: int) -> tuple[int, int]:
    """Proportional and resident set size of a process."""
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, value, *_ = line.split()
        sizes[key] = int(value) << 10
    return sizes["Pss:"], sizes["Rss:"]


def link_rate(byte_count: int, *, rtt_s: float, bytes_per_s: float) -> float:
    """Bytes a second that one plain TCP stream gets through such a link."""
    block = bytes(MIB)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        running_wan(targets={0: listener.getsockname()[1]}, rtt_s=rtt_s,
                    bytes_per_s=bytes_per_s) as wan,
        socket.create_connection(("127.0.0.1", wan.port(0))) as near,
        listener.accept()[0] as far,
    ):
        def send() -> None:
            with contextlib.suppress(OSError):
                for _ in range(byte_count // MIB):
                    far.sendall(block)
                far.shutdown(socket.SHUT_WR)

        near.sendall(b"x")  # The connection is open once this has arrived.
        far.recv(1)
        sender = threading.Thread(target=send)
        begin_s = time.monotonic()
        sender.start()
        buffer = bytearray(MIB)
        received = 0
        while count := near.recv_into(buffer):
            received += count
        elapsed_s = time.monotonic() - begin_s
        sender.join()
    return received / elapsed_s
