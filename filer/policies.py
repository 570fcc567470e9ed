"""Cache policies by the names that users of such appliances know.

A policy says how long verified attributes are believed, and what happens to writes.
Pure values; ``filer explain PATH`` prints the one that applies.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class WriteMode(enum.Enum):
    BEHIND = "behind"
    """Acknowledged from the write-behind log, flushed later."""
    THROUGH = "through"
    """Acknowledged when the core filer has it on stable storage."""
    REFUSED = "refused"
    """EROFS."""
    NEVER_FLUSHED = "never-flushed"
    """Lives in the log until its time to live ends; the core filer never sees the bytes."""


@dataclass(frozen=True, slots=True)
class Policy:
    name: str
    verify_s: float | None
    """Attributes older than this are asked for again; ``None``: believed for ever."""
    write_mode: WriteMode
    write_back_s: float
    """How long dirty data may wait before it is flushed."""
    why: str


POLICIES: dict[str, Policy] = {
    p.name: p
    for p in (
        Policy(
            "clients-bypass", 30.0, WriteMode.BEHIND, 1.0,
            "others change the core filer directly: verify every 30 s, flush at once",
        ),
        Policy(
            "read", 600.0, WriteMode.THROUGH, 0.0,
            "mostly read: verify every 10 min, writes go through",
        ),
        Policy(
            "read-write", None, WriteMode.BEHIND, 3600.0,
            "only this filer's clients change it: never verify, flush within 1 h",
        ),
        Policy(
            "full", None, WriteMode.BEHIND, 600.0,
            "only this filer's clients change it: never verify, flush within 10 min",
        ),
        Policy(
            "transition", 30.0, WriteMode.THROUGH, 0.0,
            "clients are moving to or from this filer: verify every 30 s, writes go through",
        ),
        Policy(
            "collaborate", 30.0, WriteMode.BEHIND, 30.0,
            "several sites write: verify every 30 s, flush within 30 s",
        ),
        Policy(
            "immutable", None, WriteMode.REFUSED, 0.0,
            "never changes: never verify, refuse writes",
        ),
        Policy(
            "scratch", None, WriteMode.NEVER_FLUSHED, float("inf"),
            "temporary files: bytes are never flushed and go away with their time to live",
        ),
    )
}

DEFAULT_POLICY = "clients-bypass"
