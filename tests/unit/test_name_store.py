"""The name store: what survives the death of the process and of the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from filer.core_filer.base import Attributes, CoreVersion, Handle
from filer.ids import DataVersion, InodeId
from filer.namespace.store import InodeRecord, NameStore


def record(number: int, handle: bytes = b"handle") -> InodeRecord:
    told = Attributes(number, 0o100644, 1, 2, 3, 4 << 33, 5, 6, -7, 8, 9, 10)
    return InodeRecord(
        InodeId(number), 3, InodeId(1), Handle(handle), told, CoreVersion(-1, 2, 3),
        DataVersion(2**63 - 1))


def test_an_inode_reads_back_as_it_was_put(tmp_path: Path):
    store = NameStore(tmp_path)
    store.put_inodes([record(2**64 - 1, b"h" * 128)])

    assert store.inode(InodeId(2**64 - 1)) == record(2**64 - 1, b"h" * 128)
    assert store.inode(InodeId(5)) is None


async def test_puts_are_seen_before_during_and_after_a_commit(tmp_path: Path):
    store = NameStore(tmp_path)
    store.put_inodes([record(5)])
    assert store.inode(InodeId(5)) == record(5)
    await store.commit()
    assert store.inode(InodeId(5)) == record(5)
    store.forget_inode(InodeId(5))
    assert store.inode(InodeId(5)) is None
    await store.commit()
    assert store.inode(InodeId(5)) is None


async def test_a_directory_reads_back_from_commit_and_overlay_together(tmp_path: Path):
    store = NameStore(tmp_path)
    store.put_dentries(InodeId(1), [(3, b"a", InodeId(10)), (4, b"b", InodeId(11))])
    store.put_dentries(InodeId(2), [(3, b"other", InodeId(12))])
    store.put_directory(InodeId(1), 5, 77)
    await store.commit()
    store.put_dentries(InodeId(1), [(3, b"a", None), (5, b"c\xff", InodeId(13))])

    found = await store.directory(InodeId(1))

    assert found is not None
    assert found.entries == [(4, b"b", InodeId(11)), (5, b"c\xff", InodeId(13))]
    assert (found.next_cookie, found.core_mtime_ns) == (5, 77)


def test_orphans_are_listed_until_forgotten(tmp_path: Path):
    store = NameStore(tmp_path)
    store.put_orphan(InodeId(4), b"4-0")
    store.put_orphan(InodeId(5), b"5-0")
    store.forget_orphan(InodeId(4))

    assert store.orphans() == {InodeId(5): b"5-0"}


def test_every_put_survives_kill_9(tmp_path: Path):
    script = (
        "import sys, os, signal; sys.path.insert(0, sys.argv[2])\n"
        "from tests.unit.test_name_store import *\n"
        "s = NameStore(Path(sys.argv[1]))\n"
        "for n in range(2, 502): s.put_inodes([record(n)])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    died = subprocess.run([sys.executable, "-c", script, str(tmp_path), str(root)])
    assert died.returncode == -signal.SIGKILL

    store = NameStore(tmp_path)

    assert all(store.inode(InodeId(n)) == record(n) for n in range(2, 502))


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_torn_names_log_is_cut_at_the_first_bad_record(tmp_path: Path, damage: str):
    store = NameStore(tmp_path)
    for number in (5, 6, 7):
        store.put_inodes([record(number)])
    store._environment.close()  # as a crash would leave it: no commit
    [log] = tmp_path.glob("log.*")
    raw = bytearray(log.read_bytes())
    if damage == "cut":
        del raw[-1]
    else:
        raw[-10] ^= 1
    log.write_bytes(raw)

    again = NameStore(tmp_path)

    assert again.inode(InodeId(5))
    assert again.inode(InodeId(6))
    assert again.inode(InodeId(7)) is None


async def test_a_failing_commit_keeps_its_puts_and_says_so(tmp_path: Path, monkeypatch):
    store = NameStore(tmp_path)
    store.put_inodes([record(5)])

    def full(batch):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(store, "_commit_batch", full)
        await store.commit()
    assert store.degraded is not None
    assert store.inode(InodeId(5)) == record(5)

    await store.commit()

    assert store.degraded is None
    assert NameStore(tmp_path / "other").inode(InodeId(5)) is None
    assert store.inode(InodeId(5)) == record(5)
