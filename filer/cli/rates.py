"""Rates from two samples of counters.  Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from filer.admin.reports import TopSample


class OperationRate(msgspec.Struct, frozen=True):
    operation: str
    per_s: float
    mean_s: float | None
    """Mean time from request to reply."""


class VolumeRates(msgspec.Struct, frozen=True):
    volume: str
    operations_per_s: float
    read_bytes_per_s: float
    written_bytes_per_s: float
    hit_ratio: dict[str, float | None]
    """By layer; ``None``: nothing was looked up."""
    core_operations_per_s: float
    core_read_bytes_per_s: float
    core_written_bytes_per_s: float
    core_in_flight: int
    cache_bytes: int
    cache_capacity_bytes: int
    dirty_bytes: int
    dirty_files: int
    dirty_oldest_s: float | None
    busiest: list[OperationRate]


def rates(before: TopSample | None, after: TopSample) -> VolumeRates:
    """What happened between two samples of one volume.

    Without an earlier sample, or if the volume server was restarted in between (its counters
    start at 0 again), all rates are 0.
    """
    if before is None or before.time_s >= after.time_s or _restarted(before, after):
        before = after
    elapsed_s = after.time_s - before.time_s

    def per_s(count: float) -> float:
        return count / elapsed_s if elapsed_s > 0 else 0.0

    return VolumeRates(
        volume=after.volume,
        operations_per_s=per_s(sum(after.operations.values()) - sum(before.operations.values())),
        read_bytes_per_s=per_s(after.read_bytes - before.read_bytes),
        written_bytes_per_s=per_s(after.written_bytes - before.written_bytes),
        hit_ratio={
            layer: _ratio(_grown(before.hits, after.hits, layer),
                          _grown(before.misses, after.misses, layer))
            for layer in sorted(after.hits.keys() | after.misses.keys())
        },
        core_operations_per_s=per_s(after.core_operations - before.core_operations),
        core_read_bytes_per_s=per_s(after.core_read_bytes - before.core_read_bytes),
        core_written_bytes_per_s=per_s(after.core_written_bytes - before.core_written_bytes),
        core_in_flight=after.core_in_flight,
        cache_bytes=after.cache_bytes, cache_capacity_bytes=after.cache_capacity_bytes,
        dirty_bytes=after.dirty_bytes, dirty_files=after.dirty_files,
        dirty_oldest_s=after.dirty_oldest_s,
        busiest=sorted(
            (_operation(name, before, after, per_s) for name in after.operations
             if _grown(before.operations, after.operations, name) > 0),
            key=lambda rate: rate.per_s, reverse=True),
    )


def _restarted(before: TopSample, after: TopSample) -> bool:
    return any(after.operations.get(name, 0) < count for name, count in before.operations.items())


def _operation(
    name: str, before: TopSample, after: TopSample, per_s: Callable[[float], float]
) -> OperationRate:
    count = _grown(before.operations, after.operations, name)
    seconds = after.operation_seconds.get(name, 0.0) - before.operation_seconds.get(name, 0.0)
    return OperationRate(name, per_s(count), seconds / count if count else None)


def _grown(before: Mapping[str, int], after: Mapping[str, int], key: str) -> int:
    return after.get(key, 0) - before.get(key, 0)


def _ratio(hits: int, misses: int) -> float | None:
    return hits / (hits + misses) if hits + misses else None
