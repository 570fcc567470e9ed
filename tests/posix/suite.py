"""All cases, imported once."""

from tests.posix import (
    attributes,
    creation,
    data,
    directories,
    links,
    locks,
    mappings,
    models,
    names,
    permissions,
    renames,
    times,
    unlinks,
)
from tests.posix.registry import CASES, Case, Skipped

__all__ = [
    "CASES", "Case", "Skipped", "attributes", "creation", "data", "directories", "links", "locks",
    "mappings", "models", "names", "permissions", "renames", "times", "unlinks",
]
