"""What the end-to-end tests share: a guest for the whole run, core filers, nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.guest import Guest
from tests.support.guest import guest as booted_guest
from tests.support.nas import Nas, running_nas
from tests.support.node import Node, running_node

NodeFactory = Callable[..., Node]


@pytest.fixture(scope="session")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """A Linux client; tests unmount what they mount in it."""
    with booted_guest(tmp_path_factory.mktemp("guest")) as guest:
        yield guest


@pytest.fixture
def nas(tmp_path: Path) -> Iterator[Nas]:
    """A NAS whose export ``/shows`` is the test's directory ``core``."""
    core = tmp_path / "core"
    core.mkdir()
    with running_nas(tmp_path / "nas", {"/shows": core}) as nas:
        yield nas


@pytest.fixture
def start_node(tmp_path: Path) -> Iterator[NodeFactory]:
    """``start_node(core_url, **settings)``; all nodes end with the test."""
    with ExitStack() as nodes:
        count = 0

        def start(core_url: str, **settings: Any) -> Node:
            nonlocal count
            count += 1
            return nodes.enter_context(
                running_node(tmp_path / f"node-{count}", core_url, **settings))

        yield start


@pytest.fixture
def local_core(tmp_path: Path) -> Path:
    """A directory to be a node's core filer."""
    core = tmp_path / "local-core"
    core.mkdir()
    return core


@pytest.fixture
def node(local_core: Path, start_node: NodeFactory) -> Node:
    """A node in front of `local_core` whose clients alone change it."""
    return start_node(f"file://{local_core}", policy="full")
