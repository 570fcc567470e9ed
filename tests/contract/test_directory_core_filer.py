"""What only the core filer in a local directory does."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from filer.core_filer.base import CoreFiler
from filer.core_filer.factory import open_core_filer
from filer.errors import Misconfigured, Refused


@pytest.fixture
async def core(tmp_path: Path) -> AsyncIterator[CoreFiler]:
    async with open_core_filer(f"file://{tmp_path}", random=Random(1)) as core:
        yield core


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def tmpfs(directory: Path, options: str) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


async def test_handles_survive_closing_and_opening_again(tmp_path: Path) -> None:
    async with open_core_filer(f"file://{tmp_path}", random=Random(1)) as core:
        f = await core.create(core.root, b"f", mode=0o644, uid=0, gid=0)
        written = await core.write(f.handle, 0, b"data")
    async with open_core_filer(f"file://{tmp_path}", random=Random(2)) as core:
        assert (await core.read(f.handle, 0, 10)).data == b"data"
        assert (await core.commit(f.handle)).verifier != written.verifier


async def test_descriptors_stay_bounded_and_are_all_closed(tmp_path: Path) -> None:
    before = open_descriptors()
    async with open_core_filer(f"file://{tmp_path}", random=Random(1)) as core:
        for i in range(600):
            f = await core.create(core.root, b"%d" % i, mode=0o644, uid=0, gid=0)
            await core.write(f.handle, 0, b"x")
            await core.read(f.handle, 0, 1)
        assert open_descriptors() < before + 1600
    assert open_descriptors() == before


async def test_a_removed_file_is_not_kept_open(core: CoreFiler, tmp_path: Path) -> None:
    f = await core.create(core.root, b"f", mode=0o644, uid=0, gid=0)
    await core.write(f.handle, 0, b"x")
    with_file = open_descriptors()
    await core.remove(core.root, b"f")
    assert open_descriptors() < with_file


async def test_removal_behind_our_back_makes_the_handle_stale(
    core: CoreFiler, tmp_path: Path
) -> None:
    f = await core.create(core.root, b"f", mode=0o644, uid=0, gid=0)
    await core.write(f.handle, 0, b"x" * 8192)
    await core.read(f.handle, 0, 4096)
    (tmp_path / "f").unlink()
    for ask in (core.getattr(f.handle), core.read(f.handle, 0, 4096)):
        with pytest.raises(Refused) as caught:
            await ask
        assert caught.value.errno == errno.ESTALE


async def test_another_file_system_inside_is_not_entered(
    core: CoreFiler, tmp_path: Path
) -> None:
    (tmp_path / "mounted").mkdir()
    with tmpfs(tmp_path / "mounted", "size=1m"):
        with pytest.raises(Refused) as caught:
            await core.lookup(core.root, b"mounted")
        assert caught.value.errno == errno.EXDEV
        batch = await anext(core.readdir(core.root))
        assert [(e.name, e.handle) for e in batch] == [(b"mounted", None)]


async def test_a_full_file_system_refuses_with_enospc(tmp_path: Path) -> None:
    with tmpfs(tmp_path, "size=64k"):
        async with open_core_filer(f"file://{tmp_path}", random=Random(1)) as core:
            f = await core.create(core.root, b"f", mode=0o644, uid=0, gid=0)
            written = await core.write(f.handle, 0, b"x" * 128 * 1024)
            assert written.count == 64 * 1024
            with pytest.raises(Refused) as caught:
                await core.write(f.handle, written.count, b"x")
            assert caught.value.errno == errno.ENOSPC


async def test_a_file_system_without_handles_is_a_misconfiguration() -> None:
    with pytest.raises(Misconfigured) as caught:
        async with open_core_filer("file:///proc/self/task", random=Random(1)):
            pass
    assert caught.value.hint


@pytest.mark.parametrize("owner", [(0, 0), (5, 6)], ids=["not given away", "mode not yet set"])
async def test_a_repeat_finishes_what_a_killed_process_left_half_made(
    core: CoreFiler, tmp_path: Path, owner: tuple[int, int],
) -> None:
    os.close(os.open(tmp_path / "f", os.O_CREAT, 0o600))
    (tmp_path / "d").mkdir(0o700)
    for name in ("f", "d"):
        os.chown(tmp_path / name, *owner)

    for make, name, mode in ((core.create, b"f", 0o644), (core.mkdir, b"d", 0o755)):
        with pytest.raises(Refused):
            await make(core.root, name, mode=mode, uid=5, gid=6)
        made = (await make(core.root, name, mode=mode, uid=5, gid=6, repeated=True)).attributes
        assert (made.mode & 0o7777, made.uid, made.gid) == (mode, 5, 6)
