"""Is the node well?  Green, yellow or red, and why.  Pure.

Red: clients are hurt now, or data that is not yet in the core filer cannot get there.
Yellow: it works, but somebody should look.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence

from filer.admin.reports import ChildStatus, Reason, VolumeReport, VolumeStatus

RECENT_S = 600.0
"""A restart stays a reason for this long."""
_OVERDUE_FACTOR, _OVERDUE_GRACE_S = 2.0, 60.0
"""Dirty data is overdue at twice the policy's delay and a minute: a flush takes its time."""
_DIRTY_NEARLY_FULL = 0.9


class Level(enum.StrEnum):
    GREEN = "green"
    YELLOW = "yellow"
    RED = "red"


def level(reasons: Iterable[Reason]) -> Level:
    """The worst of *reasons*; none is green."""
    levels = {reason.level for reason in reasons}
    return Level.RED if "red" in levels else Level.YELLOW if "yellow" in levels else Level.GREEN


def assess(volumes: Sequence[VolumeReport], children: Sequence[ChildStatus]) -> list[Reason]:
    """Every reason why the node is not green, the worst first."""
    reasons = [reason for child in children for reason in _child(child)]
    for report in volumes:
        reasons += [Reason(lvl, report.name, text) for lvl, text in _volume(report)]
    return sorted(reasons, key=lambda reason: reason.level != "red")


def _child(child: ChildStatus) -> list[Reason]:
    if child.state == "failed":
        return [Reason("red", child.volume, f"{child.name} gave up: {child.last_exit}")]
    if child.state == "restarting":
        return [Reason("red", child.volume, f"{child.name} is down: {child.last_exit}")]
    if child.state == "unresponsive":
        return [Reason("red", child.volume, f"{child.name} does not answer")]
    if child.last_exit_age_s is not None and child.last_exit_age_s < RECENT_S:
        return [Reason("yellow", child.volume,
                       f"{child.name} was restarted {_ago(child.last_exit_age_s)}:"
                       f" {child.last_exit}")]
    return []


def _volume(report: VolumeReport) -> list[tuple[str, str]]:
    status = report.status
    if status is None:
        return [("red", report.problem or "the volume server does not answer")]
    found: list[tuple[str, str]] = []
    if status.phase != "serving":
        found.append(("yellow", f"the volume server is {status.phase}"))
    if not status.core_reachable:
        since = "" if status.core_unreachable_s is None else (
            f" for {_duration(status.core_unreachable_s)}")
        why = f": {status.core_reason}" if status.core_reason else ""
        found.append(("red", f"the core filer does not answer{since}{why}"))
    if status.cache_degraded:
        why = f": {status.cache_reason}" if status.cache_reason else ""
        found.append(("yellow", f"the cache disk fails, reads pass through{why}"))
    if status.corrupt_pages:
        found.append(("yellow", f"{status.corrupt_pages} corrupt pages on the cache disk"
                                " were fetched again: check the disk"))
    found += _dirty(status)
    if status.conflict_copies:
        found.append(("yellow", f"{status.conflict_copies} conflict copies were made: files"
                                " changed in the core filer and here at once"))
    if status.internal_errors:
        found.append(("yellow", f"{status.internal_errors} unexpected errors: see the log"))
    return found


def _dirty(status: VolumeStatus) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    if status.flush_errors:
        first = status.flush_errors[0]
        more = f" (and {len(status.flush_errors) - 1} more)" if len(status.flush_errors) > 1 else ""
        found.append(("red", f"the core filer refuses to take {first.path}: {first.error}{more}"))
    if (
        status.dirty_oldest_s is not None and status.write_back_s is not None
        and status.dirty_oldest_s > status.write_back_s * _OVERDUE_FACTOR + _OVERDUE_GRACE_S
    ):
        found.append(("yellow", f"data has waited {_duration(status.dirty_oldest_s)} to be"
                                f" flushed; the policy says {_duration(status.write_back_s)}"))
    if status.dirty_bytes_max and status.dirty_bytes >= _DIRTY_NEARLY_FULL * status.dirty_bytes_max:
        share = status.dirty_bytes / status.dirty_bytes_max
        found.append(("yellow", f"the write-behind log is {share:.0%} full: writers are slowed"))
    return found


def _ago(age_s: float) -> str:
    return f"{_duration(age_s)} ago"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"
