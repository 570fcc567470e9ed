"""The core filers that the contract suite runs over."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from random import Random

import pytest

from filer.core_filer.base import CoreFiler
from filer.core_filer.factory import open_core_filer
from filer.core_filer.memory import MemoryCoreFiler
from tests.support.nas import Nas, running_nas


@pytest.fixture(scope="session")
def shared_nas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nas]:
    """One Ganesha for all tests that leave it alone; each test has its own directory in it."""
    work_dir = tmp_path_factory.mktemp("nas")
    exported = tmp_path_factory.mktemp("exported")
    with running_nas(work_dir, {"/shows": exported}) as nas:
        yield nas


@pytest.fixture(params=["memory", "directory", pytest.param("nfs", marks=pytest.mark.nfs)])
async def core(
    request: pytest.FixtureRequest, tmp_path: Path
) -> AsyncIterator[CoreFiler]:
    if request.param == "memory":
        yield MemoryCoreFiler(wall_clock=time.time_ns)
        return
    if request.param == "directory":
        url = f"file://{tmp_path}"
    else:
        nas: Nas = request.getfixturevalue("shared_nas")
        directory = nas.exports["/shows"] / tmp_path.name
        directory.mkdir()
        url = nas.url(f"/shows/{tmp_path.name}")
    async with open_core_filer(url, random=Random(1)) as opened:
        yield opened
