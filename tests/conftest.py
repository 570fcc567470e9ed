"""Set-up that every test shares."""

from __future__ import annotations

import pytest

# The cases are imported by several test modules; without this their asserts say nothing.
pytest.register_assert_rewrite(
    *(f"tests.posix.{name}" for name in (
        "attributes", "creation", "data", "directories", "links", "locks", "mappings", "models",
        "names", "permissions", "renames", "times", "tools", "unlinks",
    )))
