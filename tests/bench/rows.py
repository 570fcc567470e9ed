"""The rows N1 … N11: each prepares its site, measures, and says what precisely it measured.

A row function returns its measures and notes; the table at the end maps ids to functions and
targets.  "One client" is one TCP connection with several calls in flight, as the Linux NFS
client has; every row checks the status, length and (sampled) contents of every answer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.load import Export, LoadFailed, check, fill, run_load
from tests.bench.results import Measure, Row, Target
from tests.bench.rig import GIB, MIB, Rig, Site, cpu_s, drop_caches, link_rate, memory_bytes

RTT_S, LINK_BYTES_PER_S = 0.030, 125e6
IN_FLIGHT = 8
"""Calls of 1 MiB that one client keeps in flight."""

Outcome = tuple[list[Measure], list[str]]


def _unrelated(run: int) -> str:
    """Names that are no numbered sequence, of which the next would be fetched ahead."""
    return "cold-" + chr(ord("a") + run)


def _read_rate(export: Export, name: str, size: int, **options: Any) -> float:
    """MB/s of one sequential read."""
    options = {"window": IN_FLIGHT, **options}
    return run_load(export, "read", name=name, bytes=size, **options).bytes_per_s / 1e6


def _files(rig: Rig, where: Path, **options: Any) -> None:
    rig.say(f"making files: {', '.join(f'{k} {v}' for k, v in options.items())}")
    where.mkdir(exist_ok=True)
    fill(where, **options)
    os.sync()


def hot_read(rig: Rig) -> Outcome:
    size = rig.bytes(GIB)
    with rig.site() as site:
        _files(rig, site.core_dir, name="big", bytes=size)
        for export in (site.ours, site.baseline) * 2:
            _read_rate(export, "big", size)
        before = _upcalls(site)
        measure = rig.alternate(
            "hot read",
            lambda _: _read_rate(site.ours, "big", size),
            lambda _: _read_rate(site.baseline, "big", size), "MB/s")
        upcalls = _upcalls(site) - before
    return [measure], [
        f"one file of {size / MIB:.0f} MiB in the page cache of both, 1 client, {IN_FLIGHT} "
        f"READs of 1 MiB in flight",
        f"FUSE requests during {rig.runs} runs: {upcalls}",
    ]


def hot_metadata(rig: Rig) -> Outcome:
    count, repeats = rig.count(10_000, least=100), 4
    common: dict[str, Any] = {"dir": "many", "files": count, "clients": 4, "files_at_once": 8}
    measures = []
    with rig.site() as site:
        _files(rig, site.core_dir / "many", files=count, bytes=100)
        notes = [f"{count} files, 4 clients, 8 calls in flight each, {repeats} rounds a run"]
        for operation in ("getattr", "lookup"):
            for export in (site.ours, site.baseline):
                run_load(export, operation, **common)
            before = _upcalls(site)
            measures.append(rig.alternate(
                operation.upper(),
                lambda _, op=operation: run_load(  # type: ignore[misc]
                    site.ours, op, repeats=repeats, **common).operations_per_s,
                lambda _, op=operation: run_load(  # type: ignore[misc]
                    site.baseline, op, repeats=repeats, **common).operations_per_s, "/s"))
            calls = count * repeats * rig.runs
            notes.append(
                f"FUSE requests for {calls} {operation.upper()} (GETATTR: with the LOOKUPs that "
                f"fetch the handles): {_upcalls(site) - before}")
    return measures, notes


def warm_listing(rig: Rig) -> Outcome:
    count, repeats = rig.count(10_000, least=100), 5

    def entries_per_s(export: Export) -> float:
        result = run_load(export, "readdirplus", dir="many", repeats=repeats)
        if result.entries != count * repeats:
            raise LoadFailed(f"READDIRPLUS listed {result.entries} names in {repeats} scans "
                             f"of a directory with {count}")
        return result.entries / result.seconds

    with rig.site() as site:
        _files(rig, site.core_dir / "many", files=count, bytes=100)
        for export in (site.ours, site.baseline):
            entries_per_s(export)
        before = _upcalls(site)
        measure = rig.alternate(
            "READDIRPLUS", lambda _: entries_per_s(site.ours),
            lambda _: entries_per_s(site.baseline), "/s")
        upcalls = _upcalls(site) - before
    return [measure], [
        f"whole directory of {count} entries, 1 client, one call at a time, {repeats} scans a run",
        f"FUSE requests for {repeats * rig.runs} scans: {upcalls}",
    ]


def ssd_warm_read(rig: Rig) -> Outcome:
    size = rig.bytes(GIB)

    def cold_caches(export: Export) -> float:
        drop_caches()
        return _read_rate(export, "big", size)

    with rig.site() as site:
        _files(rig, site.core_dir, name="big", bytes=size)
        _read_rate(site.ours, "big", size)
        _wait_until_cached(rig, site, "big", size)
        fetched = site.node.core_read_bytes()
        measure = rig.alternate(
            "SSD-warm read", lambda _: cold_caches(site.ours),
            lambda _: cold_caches(site.baseline), "MB/s")
        fetched = site.node.core_read_bytes() - fetched
    return [measure], [
        f"one file of {size / MIB:.0f} MiB, 1 client, {IN_FLIGHT} READs of 1 MiB in flight; the "
        "kernel's caches are dropped before every run of both",
        f"bytes fetched from the NAS during {rig.runs} runs: {fetched}",
    ]


def _wait_until_cached(rig: Rig, site: Site, name: str, size: int) -> None:
    """Read again until a read with empty kernel caches asks the NAS for nothing."""
    for _ in range(5):
        drop_caches()
        before = site.node.core_read_bytes()
        _read_rate(site.ours, name, size)
        if site.node.core_read_bytes() - before < size / 100:
            return
    raise LoadFailed(f"{name} does not stay in the cache: every read fetches it again")


def cold_read_over_wan(rig: Rig) -> Outcome:
    size = rig.bytes(GIB)
    with rig.site(rtt_s=RTT_S, bytes_per_s=LINK_BYTES_PER_S) as site:
        for run in range(rig.runs):
            _files(rig, site.core_dir, name=_unrelated(run), bytes=size)
        measure = rig.alternate(
            "cold read over the WAN",
            lambda run: _read_rate(site.ours, _unrelated(run), size),
            lambda _: link_rate(
                rig.bytes(GIB // 4), rtt_s=RTT_S, bytes_per_s=LINK_BYTES_PER_S) / 1e6, "MB/s")
        per_file = site.link.statistics().down_bytes / rig.runs / size
    return [measure], [
        f"a file of {size / MIB:.0f} MiB never read before in every run, 1 client, {IN_FLIGHT} "
        "READs of 1 MiB in flight; baseline: a plain TCP stream through an equal link",
        f"bytes over the WAN per byte read: {per_file:.3f}",
    ]


def warmed_small_files_over_wan(rig: Rig) -> Outcome:
    count, size = rig.count(2000, least=16), 256 << 10

    def hint_and_read(site: Site, run: int) -> float:
        directory = f"set{run}"
        warm = threading.Thread(
            target=site.node.filer, args=("warm", f"{site.ours.path}/{directory}"))
        begin_s = time.monotonic()
        warm.start()
        try:
            result = run_load(
                site.ours, "read", dir=directory, files=count, bytes=size, clients=8,
                window=IN_FLIGHT)
        finally:
            warm.join()
        return result.bytes / (time.monotonic() - begin_s) / 1e6

    with rig.site(rtt_s=RTT_S, bytes_per_s=LINK_BYTES_PER_S) as site:
        for run in range(rig.runs):
            _files(rig, site.core_dir / f"set{run}", files=count, bytes=size)
        measure = rig.alternate(
            "small files over the WAN",
            lambda run: hint_and_read(site, run),
            lambda _: link_rate(
                rig.bytes(GIB // 4), rtt_s=RTT_S, bytes_per_s=LINK_BYTES_PER_S) / 1e6, "MB/s")
        per_set = site.link.statistics().down_bytes / rig.runs / (count * size)
    return [measure], [
        f"{count} files of 256 KiB in a directory never seen before in every run; the clock "
        "starts with `filer warm DIRECTORY`, 8 clients read at the same time, one file at a "
        "time each, until both have ended; baseline: a plain TCP stream through an equal link",
        f"bytes over the WAN per byte read: {per_set:.3f}",
    ]


def warm_read_far_and_near(rig: Rig) -> Outcome:
    size = rig.bytes(GIB)

    def seconds(site: Site, rtt_s: float) -> float:
        site.link.set(rtt_s=rtt_s)
        drop_caches()
        return run_load(site.ours, "read", name="big", bytes=size, window=IN_FLIGHT).seconds

    with rig.site() as site:
        _files(rig, site.core_dir, name="big", bytes=size)
        _read_rate(site.ours, "big", size)
        _wait_until_cached(rig, site, "big", size)
        measure = rig.alternate(
            "warm read", lambda _: seconds(site, 0.2), lambda _: seconds(site, 0.0), "s")
    return [measure], [
        f"one file of {size / MIB:.0f} MiB, all of it on the node's SSD, the kernel's caches "
        "dropped before every run; ours: NAS at 200 ms, baseline: the same node with the NAS "
        "at 0 ms",
    ]


def many_readers_cold(rig: Rig) -> Outcome:
    size, readers = rig.bytes(GIB), 20
    ours: list[float] = []
    rates: list[float] = []
    with rig.site(rtt_s=RTT_S, bytes_per_s=LINK_BYTES_PER_S) as site:
        for run in range(rig.runs):
            _files(rig, site.core_dir, name=_unrelated(run), bytes=size)
        for run in range(rig.runs):
            before = site.link.statistics().down_bytes
            result = run_load(
                site.ours, "read", name=_unrelated(run), bytes=size, clients=readers, each=1,
                window=2)
            ours.append((site.link.statistics().down_bytes - before) / MIB)
            rates.append(result.bytes_per_s / 1e6)
            rig.say(f"{readers} readers, run {run + 1} of {rig.runs}: {ours[-1]:.1f} MiB over "
                    f"the WAN for {size / MIB:.0f} MiB, {rates[-1]:.0f} MB/s to the clients")
        measure = Measure("bytes from the NAS", tuple(ours), (size / MIB,) * len(ours))
    return [measure], [
        f"{readers} clients read the same {size / MIB:.0f} MiB file at the same time, never "
        "read before; all bytes that crossed the WAN towards the node, RPC headers included",
        f"together the clients got {sorted(rates)[len(rates) // 2]:.0f} MB/s (median)",
    ]


def sequential_write(rig: Rig) -> Outcome:
    size = rig.bytes(GIB)

    def rate(export: Export, run: int, keep: bool) -> float:
        os.sync()
        result = run_load(export, "write", name=f"out{run}", bytes=size, window=IN_FLIGHT)
        if not keep:
            # Neither the flush of one run nor the disk's queue may disturb the next.
            run_load(export, "remove", name=f"out{run}")
        return result.bytes_per_s / 1e6

    with rig.site(one_tree=False, policy="full") as site:
        measure = rig.alternate(
            "write + COMMIT", lambda run: rate(site.ours, run, keep=run + 1 == rig.runs),
            lambda run: rate(site.baseline, run, keep=False), "MB/s")
        begin_s = time.monotonic()
        site.node.filer("flush", site.ours.path)
        flush_s = time.monotonic() - begin_s
        check(site.core_dir, name=f"out{rig.runs - 1}", bytes=size)
    return [measure], [
        f"a new file of {size / MIB:.0f} MiB in every run, 1 client, {IN_FLIGHT} unstable WRITEs "
        "of 1 MiB in flight, then COMMIT; policy `full`, so that no flush to the NAS on the same "
        "machine runs meanwhile",
        f"`filer flush` of the last run afterwards: {flush_s:.2f} s, every byte on the NAS checked",
    ]


def small_creates(rig: Rig) -> Outcome:
    count = rig.count(2000, least=40)
    cpu = {"volume server": 0.0, "NFS server": 0.0}
    upcalls: dict[str, int] = {}

    def rate(export: Export, run: int) -> float:
        result = run_load(
            export, "write", dir="new", name=f"r{run}_%06ld", files=count, bytes=4096, clients=4)
        return count / result.seconds

    def ours(site: Site, run: int) -> float:
        os.sync()
        before = site.node.upcalls()
        pids = {"volume server": site.node.volume_server_pid,
                "NFS server": site.node.nfs_server_pid}
        used = {name: cpu_s(pid) for name, pid in pids.items()}
        value = rate(site.ours, run)
        for name, pid in pids.items():
            cpu[name] += cpu_s(pid) - used[name]
        for operation, number in site.node.upcalls().items():
            upcalls[operation] = upcalls.get(operation, 0) + number - before.get(operation, 0)
        return value

    def baseline(site: Site, run: int) -> float:
        os.sync()
        return rate(site.baseline, run)

    with rig.site(one_tree=False, policy="full") as site:
        for directory in (site.core_dir, site.base_dir):
            (directory / "new").mkdir()
        measure = rig.alternate(
            "create", lambda run: ours(site, run), lambda run: baseline(site, run), "/s")
        site.node.filer("flush", site.ours.path)
        for run in range(rig.runs):
            check(site.core_dir / "new", name=f"r{run}_%06ld", files=count, bytes=4096)
    files = count * rig.runs
    per_file = ", ".join(
        f"{op} {n / files:.2f}" for op, n in sorted(upcalls.items()) if n * 100 >= files)
    return [measure], [
        f"{count} new files a run: CREATE, unstable WRITE of 4 KiB, COMMIT; 4 clients, one file "
        "at a time each; policy `full`; all files checked on the NAS after `filer flush`",
        f"FUSE requests per file: {sum(upcalls.values()) / files:.2f} ({per_file})",
        *(f"CPU of the {name} per file: {used_s / files * 1e6:.0f} µs"
          for name, used_s in cpu.items()),
    ]


@contextmanager
def _in_memory(directory: Path) -> Iterator[None]:
    """A tmpfs on *directory*: a million files are made there in seconds."""
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(directory)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def memory(rig: Rig) -> Outcome:
    directories, each = 100, rig.count(10_000, least=100)
    traffic_files, traffic_bytes = rig.count(8), GIB
    samples: list[float] = []
    with _in_memory(rig.work_dir / "core"), rig.site(
        core=lambda path: f"file://{path}", cache_capacity_bytes="2GiB"
    ) as site:
        rig.say(f"making {directories * each} empty files")
        for d in range(directories):
            directory = site.core_dir / f"d{d:03d}"
            directory.mkdir()
            fill(directory, files=each, bytes=0)
        for i in range(traffic_files):
            with (site.core_dir / f"sparse{i}").open("wb") as file:
                file.truncate(traffic_bytes)
        pid = site.node.volume_server_pid

        def sample(what: str) -> float:
            pss, rss = memory_bytes(pid)
            samples.append(rss / MIB)
            rig.say(f"{what}: RSS {rss / MIB:.0f} MiB, PSS {pss / MIB:.0f} MiB")
            return rss / MIB

        start = sample("at the start")
        for d in range(directories):
            result = run_load(site.ours, "readdirplus", dir=f"d{d:03d}")
            if result.entries != each:
                raise LoadFailed(f"d{d:03d} lists {result.entries} names instead of {each}")
            if d % 20 == 19:
                sample(f"after {(d + 1) * each} inodes")
        seen = samples[-1]
        traffic: list[float] = []
        for i in range(traffic_files):
            run_load(site.ours, "read", name=f"sparse{i}", bytes=traffic_bytes, verify=0,
                     window=IN_FLIGHT)
            traffic.append(sample(f"after {i + 1} GiB read through a cache of 2 GiB"))
    inodes = directories * each
    return [Measure("RSS, the largest seen", (max(samples),))], [
        f"RSS of the volume server: {start:.0f} MiB at its start, {seen:.0f} MiB after "
        f"READDIRPLUS of {inodes} inodes in {directories} directories "
        f"({(seen - start) * MIB / inodes:.0f} bytes an inode, all still known to the kernel)",
        f"then {traffic_files} GiB of cold reads through a cache of 2 GiB, that is "
        f"{traffic_files / 2:.0f} times its capacity: "
        f"{', '.join(f'{s:.0f}' for s in traffic[:: max(1, len(traffic) // 8)])} MiB",
    ]


def _upcalls(site: Site) -> int:
    return sum(site.node.upcalls().values())


@dataclass(frozen=True, slots=True)
class Definition:
    id: str
    what: str
    unit: str
    target: Target
    measure: Callable[[Rig], Outcome]

    def run(self, rig: Rig) -> Row:
        """Raises what the rig or the load raised; the scratch directory is empty afterwards."""
        rig.work_dir.mkdir(parents=True, exist_ok=True)
        try:
            measures, notes = self.measure(rig)
        finally:
            shutil.rmtree(rig.work_dir, ignore_errors=True)
        return Row(
            self.id, self.what, self.unit, self.target, tuple(measures), tuple(notes), rig.scale)

    def failed(self, reason: str, scale: float) -> Row:
        return Row(self.id, self.what, self.unit, self.target, scale=scale, failure=reason)


DEFINITIONS = {
    d.id: d
    for d in (
        Definition("N1", "hot sequential read, 1 client", "MB/s", Target(0.95), hot_read),
        Definition("N2", "hot GETATTR and LOOKUP, 4 clients", "/s", Target(0.85), hot_metadata),
        Definition("N3", "READDIRPLUS, warm", "entries/s", Target(0.5), warm_listing),
        Definition("N4", "SSD-warm read", "MB/s", Target(0.6), ssd_warm_read),
        Definition("N5", "cold sequential read over 30 ms, 1 Gb/s", "MB/s", Target(0.9),
                   cold_read_over_wan),
        Definition("N6", "files of 256 KiB over 30 ms, 1 Gb/s, 8 clients, after a warm hint",
                   "MB/s", Target(0.8), warmed_small_files_over_wan),
        Definition("N7", "warm read, NAS at 200 ms versus at 0 ms", "s",
                   Target(1.05, at_most=True), warm_read_far_and_near),
        Definition("N8", "20 clients read the same cold file: bytes from the NAS", "MiB",
                   Target(1.02, at_most=True), many_readers_cold),
        Definition("N9", "sequential write + COMMIT", "MB/s", Target(0.5), sequential_write),
        Definition("N10", "create + write 4 KiB + COMMIT, 4 clients", "files/s", Target(0.4),
                   small_creates),
        Definition("N11", "memory of a volume server after 1,000,000 inodes and traffic", "MiB",
                   Target(400, at_most=True, of_ratio=False), memory),
    )
}
