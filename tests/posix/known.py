"""Failures that are known, with the reason, for each way to reach a file system."""

from __future__ import annotations

KNOWN_FAILURES: dict[str, dict[str, str]] = {
    "native": {},
}
