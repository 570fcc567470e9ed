"""Prometheus metrics of a volume server: every name and label in one place.

Label values are bounded: operations, directions, layers and errno names; never paths, clients
or inodes.  The supervisor adds ``volume`` when it collects the volume servers.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

_LATENCY_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

UPCALLS = Counter(
    "filer_upcalls", "FUSE requests that entered Python", ["operation"], registry=REGISTRY)
CLIENT_LATENCY = Histogram(
    "filer_client_operation_seconds", "Time from a FUSE request to its reply",
    ["operation"], buckets=_LATENCY_S, registry=REGISTRY)
CLIENT_ERRORS = Counter(
    "filer_client_errors", "FUSE requests answered with an error",
    ["operation", "errno"], registry=REGISTRY)
CLIENT_BYTES = Counter(
    "filer_client_bytes", "Bytes of FUSE reads and writes", ["direction"], registry=REGISTRY)

CACHE_LOOKUPS = Counter(
    "filer_cache_lookups", "Answered by the layer (hit) or passed on (miss)",
    ["layer", "outcome"], registry=REGISTRY)
"""layer: attributes, names, pages; outcome: hit, miss."""
CACHE_BYTES = Gauge("filer_cache_bytes", "Bytes of clean pages on the cache disk",
                    registry=REGISTRY)
CACHE_EVICTIONS = Counter("filer_cache_evicted_bytes", "Bytes evicted", registry=REGISTRY)
CACHE_CORRUPT = Counter(
    "filer_cache_corrupt_pages", "Pages whose checksum failed and that were fetched again",
    registry=REGISTRY)
CACHE_DEGRADED = Gauge(
    "filer_cache_degraded", "1 while the cache disk fails and reads pass through",
    registry=REGISTRY)
FETCHED_BYTES = Counter(
    "filer_fetched_bytes", "Bytes fetched from the core filer",
    ["cause"], registry=REGISTRY)
"""cause: demand, read_ahead, warm."""
FETCHED_USED_BYTES = Counter(
    "filer_read_ahead_used_bytes", "Bytes fetched ahead that a client then read",
    registry=REGISTRY)

CORE_LATENCY = Histogram(
    "filer_core_operation_seconds", "Core filer operations", ["operation"],
    buckets=_LATENCY_S, registry=REGISTRY)
CORE_ERRORS = Counter(
    "filer_core_errors", "Core filer errors", ["operation", "error"], registry=REGISTRY)
CORE_BYTES = Counter(
    "filer_core_bytes", "Payload bytes exchanged with the core filer", ["direction"],
    registry=REGISTRY)
CORE_REACHABLE = Gauge("filer_core_reachable", "1 while the core filer answers",
                       registry=REGISTRY)

DIRTY_BYTES = Gauge("filer_dirty_bytes", "Bytes not yet in the core filer", registry=REGISTRY)
DIRTY_FILES = Gauge("filer_dirty_files", "Files with dirty data", registry=REGISTRY)
DIRTY_OLDEST_S = Gauge("filer_dirty_oldest_seconds", "Age of the oldest dirty data",
                       registry=REGISTRY)
FLUSHED_BYTES = Counter("filer_flushed_bytes", "Bytes flushed to the core filer",
                        registry=REGISTRY)
CONFLICTS = Counter("filer_conflict_copies", "Conflict copies made by flushes",
                    registry=REGISTRY)
JOURNAL_SYNC_S = Histogram("filer_journal_sync_seconds", "fsync of the write-behind log",
                           buckets=_LATENCY_S, registry=REGISTRY)

INODES = Gauge("filer_inodes_in_memory", "Inodes held in memory", registry=REGISTRY)
INVALIDATIONS = Counter("filer_kernel_invalidations", "Notifications to the kernel's caches",
                        ["kind"], registry=REGISTRY)
LOOP_LAG_S = Histogram("filer_loop_lag_seconds", "How late the event loop runs a timer",
                       buckets=_LATENCY_S, registry=REGISTRY)
INTERNAL_ERRORS = Counter("filer_internal_errors", "Unexpected exceptions, answered EIO",
                          registry=REGISTRY)
