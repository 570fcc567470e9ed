"""Set-up that every test shares."""

from __future__ import annotations

import pytest

# The cases are imported by several test modules; without this their asserts say nothing.
pytest.register_assert_rewrite(
    *(f"tests.posix.{name}" for name in (
        "attributes", "creation", "data", "directories", "links", "locks", "mappings", "models",
        "names", "permissions", "renames", "times", "tools", "unlinks",
    )))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the long variants too")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "soak: long; runs with --soak")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--soak"):
        return
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(pytest.mark.skip(reason="long: needs --soak"))
