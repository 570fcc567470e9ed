"""What the verbs of the admin sockets take and give back.

Owns the shapes that a volume server fills in, the supervisor merges and the command line
shows; owns no behaviour.  All have defaults, so that a field can be added without breaking the
other side.  ``msgspec.to_builtins(report)`` is the ``Result.value``.

    verb      arguments                                   result
    status    –                                           VolumeStatus
    top       –                                           TopSample
    metrics   –                                           {"text": Prometheus text format}
    explain   {path}                                      Explanation
    flush     {path}                                      FlushReport
    evict     {path}                                      EvictReport
    warm      {paths, rate_bytes_s: int | null}           WarmReport
    stop      {keep_dirty: bool}                          StopReport

*path* is relative to the volume's root: ``""`` is the root itself, no leading slash, as
``os.fsdecode`` gives it.
"""

from __future__ import annotations

import msgspec


class FlushError(msgspec.Struct, frozen=True):
    """A file that the core filer refuses; it stays dirty and is tried again."""

    path: str
    error: str
    """The errno's name, such as ``ENOSPC``."""
    age_s: float = 0.0


class VolumeStatus(msgspec.Struct, frozen=True):
    volume: str
    pid: int = 0
    phase: str = "serving"
    """``starting``, ``recovering``, ``serving`` or ``stopping``."""
    core: str = ""
    policy: str = ""
    mountpoint: str = ""

    core_reachable: bool = True
    core_unreachable_s: float | None = None
    core_reason: str = ""
    core_in_flight: int = 0
    core_reconnects: int = 0

    cache_bytes: int = 0
    cache_capacity_bytes: int = 0
    cache_degraded: bool = False
    cache_reason: str = ""
    corrupt_pages: int = 0

    dirty_bytes: int = 0
    dirty_bytes_max: int = 0
    dirty_files: int = 0
    dirty_oldest_s: float | None = None
    write_back_s: float | None = None
    """The delay that applies; ``None``: this volume never flushes."""
    flush_errors: list[FlushError] = []
    conflict_copies: int = 0

    inodes_in_memory: int = 0
    internal_errors: int = 0


class TopSample(msgspec.Struct, frozen=True):
    """Counters since the volume server started; rates are differences of two samples."""

    volume: str
    time_s: float
    """A monotonic clock of the volume server; only differences mean something."""
    operations: dict[str, int] = {}
    """Client operations that entered Python, by FUSE operation."""
    operation_seconds: dict[str, float] = {}
    read_bytes: int = 0
    written_bytes: int = 0
    hits: dict[str, int] = {}
    """By layer: attributes, names, pages."""
    misses: dict[str, int] = {}
    core_operations: int = 0
    core_read_bytes: int = 0
    core_written_bytes: int = 0
    core_in_flight: int = 0
    cache_bytes: int = 0
    cache_capacity_bytes: int = 0
    dirty_bytes: int = 0
    dirty_files: int = 0
    dirty_oldest_s: float | None = None


class Explanation(msgspec.Struct, frozen=True):
    path: str
    kind: str = "file"
    """``file``, ``directory``, ``symlink``, ``special`` or ``missing``."""
    inode: int | None = None
    size: int = 0
    policy: str = ""
    policy_why: str = ""
    write_mode: str = ""
    verify_s: float | None = None
    write_back_s: float | None = None
    last_verified_s: float | None = None
    """Seconds since the core filer confirmed the attributes; ``None``: never."""
    cached_bytes: int = 0
    cached_pages: int = 0
    total_pages: int = 0
    dirty_bytes: int = 0
    dirty_oldest_s: float | None = None
    flush_error: str = ""
    why_missed: str = ""
    """Why the last read of it went to the core filer; empty if none did."""


class FlushReport(msgspec.Struct, frozen=True):
    path: str
    files: int = 0
    bytes: int = 0
    statement: str = ""
    """What is durable where, in one sentence."""


class EvictReport(msgspec.Struct, frozen=True):
    path: str
    files: int = 0
    bytes: int = 0
    kept_dirty_bytes: int = 0
    """Dirty data is never evicted."""


class WarmFailure(msgspec.Struct, frozen=True):
    path: str
    error: str


class WarmReport(msgspec.Struct, frozen=True):
    files: int = 0
    bytes: int = 0
    """Fetched now."""
    already_cached_bytes: int = 0
    failed: list[WarmFailure] = []


class StopReport(msgspec.Struct, frozen=True):
    dirty_bytes: int = 0
    """Still in the write-behind log, not in the core filer."""
    dirty_files: int = 0


# What the supervisor makes of it.


class ChildStatus(msgspec.Struct, frozen=True):
    name: str
    """``keeper``, ``nfs server``, ``rpcbind`` or ``statd``."""
    volume: str = ""
    pid: int | None = None
    state: str = "running"
    """``starting``, ``running``, ``unresponsive``, ``restarting``, ``failed`` or ``stopped``."""
    restarts: int = 0
    last_exit: str = ""
    last_exit_age_s: float | None = None


class Reason(msgspec.Struct, frozen=True):
    """Why the node is not green."""

    level: str
    """``yellow`` or ``red``."""
    volume: str
    """Empty: the node itself."""
    text: str


class VolumeReport(msgspec.Struct, frozen=True):
    name: str
    junction: str
    core: str
    policy: str
    status: VolumeStatus | None = None
    """``None``: the volume server does not answer; *problem* says why."""
    problem: str = ""


class NodeStatus(msgspec.Struct, frozen=True):
    """The answer of the node's socket to ``status``."""

    node: str
    version: str
    pid: int
    phase: str
    """``starting``, ``serving`` or ``stopping``."""
    uptime_s: float
    health: str
    reasons: list[Reason]
    nfs: str
    """Where clients mount from: address and port."""
    volumes: list[VolumeReport]
    children: list[ChildStatus]


class NodeTop(msgspec.Struct, frozen=True):
    """The answer of the node's socket to ``top``."""

    node: str
    health: str
    samples: list[TopSample]
