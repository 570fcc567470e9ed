"""A full disk on either side: clients are slowed or told, and nothing acknowledged is lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.nas import running_nas
from tests.support.node import JUNCTION, NodeFailed, running_node

pytestmark = [pytest.mark.nfs, pytest.mark.fuse]

MIB = 1 << 20


@contextmanager
def small_disk(path: Path, size_bytes: int) -> Iterator[Path]:
    path.mkdir(parents=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_cache_disk_smaller_than_the_work_serves_and_takes_every_byte(tmp_path):
    behind = tmp_path / "behind"
    behind.mkdir()
    contents = {f"texture-{n}": os.urandom(8 * MIB) for n in range(16)}
    for name, data in contents.items():
        (behind / name).write_bytes(data)
    with (
        small_disk(tmp_path / "ssd", 64 * MIB) as ssd,
        running_node(tmp_path / "node", behind.as_uri(), cache_dir=ssd / "cache") as node,
    ):
        shows = node.mountpoint()
        for name, data in contents.items():
            assert (shows / name).read_bytes() == data
        frames = {f"frame-{n}": os.urandom(8 * MIB) for n in range(12)}
        for name, data in frames.items():
            with open(shows / name, "wb") as frame:
                frame.write(data)
                os.fsync(frame.fileno())
        for name, data in frames.items():
            assert (shows / name).read_bytes() == data
        node.cli("flush", JUNCTION)
        for name, data in frames.items():
            assert (behind / name).read_bytes() == data


def test_a_full_nas_is_told_and_takes_the_data_when_it_has_room_again(tmp_path):
    with (
        small_disk(tmp_path / "behind", 24 * MIB) as behind,
        running_nas(tmp_path / "nas", {"/shows": behind}) as nas,
        running_node(tmp_path / "node", nas.url("/shows"), policy="full") as node,
    ):
        (behind / "filler").write_bytes(bytes(16 * MIB))
        data = os.urandom(16 * MIB)
        with open(node.mountpoint() / "frame", "wb") as frame:
            frame.write(data)
            os.fsync(frame.fileno())

        with pytest.raises(NodeFailed, match="No space left"):
            node.cli("flush", JUNCTION)
        assert (node.mountpoint() / "frame").read_bytes() == data

        (behind / "filler").unlink()
        node.cli("flush", JUNCTION)
        assert (behind / "frame").read_bytes() == data
