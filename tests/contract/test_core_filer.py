"""What every core filer promises (``filer/core_filer/base.py``)."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio

from filer import metrics
from filer.core_filer.base import CoreFiler, DirectoryEntry, Found, Handle, SetAttributes
from filer.errors import Refused

NOREPLACE, EXCHANGE = 1, 2


async def make_file(core: CoreFiler, name: bytes = b"file", data: bytes = b"") -> Found:
    found = await core.create(core.root, name, mode=0o644, uid=0, gid=0)
    if data:
        await core.write(found.handle, 0, data, stable=True)
    return found


async def make_directory(core: CoreFiler, name: bytes = b"directory") -> Handle:
    return (await core.mkdir(core.root, name, mode=0o755, uid=0, gid=0)).handle


async def content(core: CoreFiler, handle: Handle) -> bytes:
    return (await core.read(handle, 0, core.io_bytes_max)).data


async def listing(core: CoreFiler, directory: Handle) -> dict[bytes, DirectoryEntry]:
    return {e.name: e async for batch in core.readdir(directory) for e in batch}


@contextmanager
def refused(*errnos: int) -> Iterator[None]:
    with pytest.raises(Refused) as caught:
        yield
    assert errno.errorcode[caught.value.errno] in {errno.errorcode[e] for e in errnos}


# --- Attributes


async def test_root_is_a_directory_that_can_be_asked_for(core: CoreFiler) -> None:
    attributes = await core.getattr(core.root)
    assert attributes.is_directory
    assert attributes.nlink >= 2
    assert core.state().reachable


async def test_created_file_has_the_mode_and_owner_asked_for(core: CoreFiler) -> None:
    made = await core.create(core.root, b"f", mode=0o4640, uid=1234, gid=5678)
    a = made.attributes
    assert a.is_regular
    assert (stat.S_IMODE(a.mode), a.uid, a.gid, a.size, a.nlink) == (0o4640, 1234, 5678, 0, 1)
    assert await core.getattr(made.handle) == a
    assert made.directory is not None
    assert made.directory.fileid == (await core.getattr(core.root)).fileid


async def test_setattr_changes_what_is_given_and_leaves_the_rest(core: CoreFiler) -> None:
    f = await make_file(core, data=b"12345")
    before = await core.getattr(f.handle)

    after = await core.setattr(f.handle, SetAttributes(mode=0o600))
    assert stat.S_IMODE(after.mode) == 0o600
    assert (after.uid, after.size, after.mtime_ns) == (before.uid, 5, before.mtime_ns)
    assert after.ctime_ns > before.ctime_ns

    after = await core.setattr(f.handle, SetAttributes(uid=7))
    assert (after.uid, after.gid) == (7, before.gid)
    after = await core.setattr(f.handle, SetAttributes(gid=8))
    assert (after.uid, after.gid) == (7, 8)


async def test_times_are_set_to_the_nanosecond_and_singly(core: CoreFiler) -> None:
    f = await make_file(core)
    await core.setattr(
        f.handle, SetAttributes(atime_ns=1_600_000_000_123_456_789, mtime_ns=1_000_000_001)
    )
    after = await core.setattr(f.handle, SetAttributes(mtime_ns=1_500_000_000_987_654_321))
    assert after.atime_ns == 1_600_000_000_123_456_789
    assert after.mtime_ns == 1_500_000_000_987_654_321


async def test_every_change_of_data_moves_mtime_and_ctime(core: CoreFiler) -> None:
    f = await make_file(core)
    seen = [await core.getattr(f.handle)]
    for i in range(3):
        await core.write(f.handle, i, b"x", stable=True)
        seen.append(await core.getattr(f.handle))
    versions = [a.version for a in seen]
    assert len(set(versions)) == len(versions)


async def test_truncation_cuts_and_extends_with_zeros(core: CoreFiler) -> None:
    f = await make_file(core, data=b"0123456789")
    assert (await core.setattr(f.handle, SetAttributes(size=4))).size == 4
    assert (await core.setattr(f.handle, SetAttributes(size=8))).size == 8
    assert await content(core, f.handle) == b"0123\0\0\0\0"


async def test_truncating_a_directory_is_refused(core: CoreFiler) -> None:
    with refused(errno.EISDIR, errno.EINVAL):
        await core.setattr(await make_directory(core), SetAttributes(size=0))


# --- Data


async def test_written_bytes_are_read_back_and_eof_is_told(core: CoreFiler) -> None:
    f = await make_file(core, data=b"hello world")
    middle = await core.read(f.handle, 2, 5)
    assert (middle.data, middle.eof) == (b"llo", False)
    tail = await core.read(f.handle, 6, 100)
    assert (tail.data, tail.eof) == (b"world", True)
    beyond = await core.read(f.handle, 50, 60)
    assert (beyond.data, beyond.eof) == (b"", True)


async def test_a_read_that_ends_at_the_end_of_the_file_is_complete(core: CoreFiler) -> None:
    f = await make_file(core, data=b"x" * 4096)
    for _ in range(2):  # the second time from whatever cache there is
        whole = await core.read(f.handle, 0, 4096)
        assert (len(whole.data), whole.eof) == (4096, True)


async def test_the_largest_read_and_write_go_through_in_one_piece(core: CoreFiler) -> None:
    size = core.io_bytes_max
    assert size >= 1 << 18
    data = os.urandom(size)
    f = await make_file(core)
    result = await core.write(f.handle, 0, memoryview(data))
    assert result.count == size
    assert await content(core, f.handle) == data


async def test_many_reads_and_writes_at_once_stay_apart(core: CoreFiler) -> None:
    f = await make_file(core)
    pieces = {i * 100_000: bytes([i]) * 100_000 for i in range(40)}

    async def write(start: int, data: bytes) -> None:
        await core.write(f.handle, start, data)

    async def check(start: int, data: bytes) -> None:
        assert (await core.read(f.handle, start, start + len(data))).data == data

    for act in (write, check):
        async with trio.open_nursery() as nursery:
            for start, data in pieces.items():
                nursery.start_soon(act, start, data)


async def test_offsets_beyond_4_gib_and_holes(core: CoreFiler) -> None:
    f = await make_file(core)
    far = 5 * (1 << 30) + 123
    await core.write(f.handle, far, b"far away", stable=True)
    attributes = await core.getattr(f.handle)
    assert attributes.size == far + 8
    assert attributes.used_bytes < 1 << 20
    assert (await core.read(f.handle, far - 4, far + 4)).data == b"\0\0\0\0far "
    assert (await core.read(f.handle, 1 << 32, (1 << 32) + 10)).data == bytes(10)


async def test_write_tells_attributes_before_and_after(core: CoreFiler) -> None:
    f = await make_file(core, data=b"1234")
    before = await core.getattr(f.handle)
    result = await core.write(f.handle, 4, b"5678", stable=True)
    assert result.stable
    # A server may leave out what was before, but must not tell anything else.
    assert result.before is None or result.before.same_data(before.version)
    assert result.after is not None
    assert result.after.size == 8


async def test_commit_answers_with_the_verifier_of_the_writes(core: CoreFiler) -> None:
    f = await make_file(core)
    first = await core.write(f.handle, 0, b"a")
    second = await core.write(f.handle, 1, b"b")
    committed = await core.commit(f.handle)
    assert first.verifier == second.verifier == committed.verifier
    assert await content(core, f.handle) == b"ab"


async def test_data_of_a_directory_is_refused(core: CoreFiler) -> None:
    directory = await make_directory(core)
    with refused(errno.EISDIR, errno.EINVAL):
        await core.read(directory, 0, 10)
    with refused(errno.EISDIR, errno.EINVAL):
        await core.write(directory, 0, b"x")


# --- Names


async def test_lookup_finds_what_was_made_and_refuses_what_was_not(core: CoreFiler) -> None:
    made = await make_file(core, b"there")
    found = await core.lookup(core.root, b"there")
    assert found.handle == made.handle
    assert found.attributes.fileid == made.attributes.fileid
    with refused(errno.ENOENT):
        await core.lookup(core.root, b"not there")
    with refused(errno.ENOTDIR):
        await core.lookup(made.handle, b"below a file")


async def test_dot_dot_leads_to_the_parent(core: CoreFiler) -> None:
    outer = await make_directory(core, b"outer")
    inner = await core.mkdir(outer, b"inner", mode=0o755, uid=0, gid=0)
    assert (await core.lookup(inner.handle, b"..")).handle == outer
    assert (await core.lookup(outer, b"..")).attributes.fileid == (
        await core.getattr(core.root)).fileid


@pytest.mark.parametrize(
    "name",
    [
        b"caf\xe9 \xff\xfe", "日本語".encode(), b"new\nline", b"-rf *", b"...", b"\x01\x7f",
        b"x" * 255,
    ],
)
async def test_names_are_bytes(core: CoreFiler, name: bytes) -> None:
    made = await make_file(core, name)
    assert (await core.lookup(core.root, name)).handle == made.handle
    assert set(await listing(core, core.root)) == {name}
    await core.remove(core.root, name)
    assert await listing(core, core.root) == {}


async def test_too_long_and_impossible_names_are_refused(core: CoreFiler) -> None:
    with refused(errno.ENAMETOOLONG):
        await make_file(core, b"x" * 256)
    for name in (b"", b"a/b"):
        with refused(errno.EINVAL, errno.EACCES, errno.ENOENT):
            await make_file(core, name)
    for name in (b".", b".."):
        with refused(errno.EEXIST, errno.EINVAL, errno.EISDIR):
            await make_file(core, name)


async def test_a_taken_name_is_refused_whatever_is_made(core: CoreFiler) -> None:
    f = await make_file(core, b"taken")
    with refused(errno.EEXIST):
        await make_file(core, b"taken")
    with refused(errno.EEXIST):
        await make_directory(core, b"taken")
    with refused(errno.EEXIST):
        await core.symlink(core.root, b"taken", b"x", uid=0, gid=0)
    with refused(errno.EEXIST):
        await core.mknod(core.root, b"taken", mode=stat.S_IFIFO | 0o600, rdev=0, uid=0, gid=0)
    with refused(errno.EEXIST):
        await core.link(f.handle, core.root, b"taken")


async def test_mkdir_has_mode_and_owner_and_counts_as_link(core: CoreFiler) -> None:
    links = (await core.getattr(core.root)).nlink
    made = await core.mkdir(core.root, b"d", mode=0o1770, uid=11, gid=12)
    a = made.attributes
    assert a.is_directory
    assert (stat.S_IMODE(a.mode), a.uid, a.gid) == (0o1770, 11, 12)
    assert (await core.getattr(core.root)).nlink == links + 1


async def test_symlink_keeps_its_target_bytes_and_owner(core: CoreFiler) -> None:
    target = b"../no where/\xff" + b"x" * 500
    made = await core.symlink(core.root, b"l", target, uid=21, gid=22)
    assert stat.S_ISLNK(made.attributes.mode)
    assert (made.attributes.uid, made.attributes.gid) == (21, 22)
    assert await core.readlink(made.handle) == target
    f = await make_file(core)
    with refused(errno.EINVAL):
        await core.readlink(f.handle)


@pytest.mark.parametrize(
    ("kind", "rdev"),
    [
        (stat.S_IFIFO, 0), (stat.S_IFSOCK, 0), (stat.S_IFCHR, os.makedev(1, 3)),
        (stat.S_IFBLK, os.makedev(259, 70000)),
    ],
)
async def test_special_files_have_type_mode_owner_and_number(
    core: CoreFiler, kind: int, rdev: int
) -> None:
    made = await core.mknod(core.root, b"n", mode=kind | 0o640, rdev=rdev, uid=31, gid=32)
    a = (await core.lookup(core.root, b"n")).attributes
    assert (a.mode, a.uid, a.gid) == (kind | 0o640, 31, 32)
    if rdev:
        assert a.rdev == rdev
    assert a.fileid == made.attributes.fileid


async def test_hard_links_share_inode_and_data(core: CoreFiler) -> None:
    f = await make_file(core, b"one", b"data")
    linked = await core.link(f.handle, core.root, b"two")
    assert linked.handle == f.handle
    assert linked.attributes.nlink == 2
    await core.remove(core.root, b"one")
    assert (await core.getattr(f.handle)).nlink == 1
    assert await content(core, (await core.lookup(core.root, b"two")).handle) == b"data"


async def test_symbolic_links_can_be_hard_linked(core: CoreFiler) -> None:
    made = await core.symlink(core.root, b"l", b"nowhere", uid=0, gid=0)
    await core.link(made.handle, core.root, b"l2")
    assert await core.readlink((await core.lookup(core.root, b"l2")).handle) == b"nowhere"


async def test_linking_a_directory_is_refused(core: CoreFiler) -> None:
    with refused(errno.EPERM, errno.EISDIR, errno.EINVAL):
        await core.link(await make_directory(core), core.root, b"again")


async def test_remove_and_rmdir_refuse_each_others_kind(core: CoreFiler) -> None:
    await make_file(core, b"f")
    await make_directory(core, b"d")
    with refused(errno.EISDIR, errno.EPERM):
        await core.remove(core.root, b"d")
    with refused(errno.ENOTDIR):
        await core.rmdir(core.root, b"f")
    await core.remove(core.root, b"f")
    await core.rmdir(core.root, b"d")
    assert await listing(core, core.root) == {}


async def test_rmdir_of_a_directory_in_use_is_refused(core: CoreFiler) -> None:
    d = await make_directory(core)
    await core.create(d, b"child", mode=0o644, uid=0, gid=0)
    with refused(errno.ENOTEMPTY, errno.EEXIST):
        await core.rmdir(core.root, b"directory")


async def test_removing_nothing_is_refused(core: CoreFiler) -> None:
    with refused(errno.ENOENT):
        await core.remove(core.root, b"nothing")
    with refused(errno.ENOENT):
        await core.rmdir(core.root, b"nothing")


async def test_changes_of_names_move_the_directorys_times(core: CoreFiler) -> None:
    seen = {(await core.getattr(core.root)).version}
    made = await make_file(core, b"a")
    assert made.directory is not None
    seen.add(made.directory.version)
    old, new = await core.rename(core.root, b"a", core.root, b"b")
    assert old is not None
    assert old == new
    seen.add(old.version)
    after = await core.remove(core.root, b"b")
    assert after is not None
    seen.add(after.version)
    assert len(seen) == 4
    assert (await core.getattr(core.root)).version == after.version


async def test_handles_of_removed_inodes_are_stale(core: CoreFiler) -> None:
    f, d = await make_file(core, b"f", b"data"), await make_directory(core, b"d")
    await core.read(f.handle, 0, 4)
    await core.remove(core.root, b"f")
    await core.rmdir(core.root, b"d")
    for handle in (f.handle, d):
        with refused(errno.ESTALE):
            await core.getattr(handle)
    with refused(errno.ESTALE):
        await core.read(f.handle, 0, 4)
    with refused(errno.ESTALE):
        await core.create(d, b"x", mode=0o644, uid=0, gid=0)


# --- Rename


async def test_rename_moves_between_directories_and_keeps_the_handle(core: CoreFiler) -> None:
    f = await make_file(core, b"f", b"data")
    d = await make_directory(core)
    old, new = await core.rename(core.root, b"f", d, b"g")
    assert old is not None
    assert new is not None
    assert old.fileid != new.fileid
    assert (await core.lookup(d, b"g")).handle == f.handle
    assert await content(core, f.handle) == b"data"
    with refused(errno.ENOENT):
        await core.lookup(core.root, b"f")


async def test_rename_replaces_a_file(core: CoreFiler) -> None:
    a, b = await make_file(core, b"a", b"A"), await make_file(core, b"b", b"B")
    await core.rename(core.root, b"a", core.root, b"b")
    assert (await core.lookup(core.root, b"b")).handle == a.handle
    with refused(errno.ESTALE):
        await core.getattr(b.handle)


async def test_rename_of_a_moved_directory_takes_its_dot_dot_along(core: CoreFiler) -> None:
    a, b = await make_directory(core, b"a"), await make_directory(core, b"b")
    child = await core.mkdir(a, b"child", mode=0o755, uid=0, gid=0)
    await core.rename(a, b"child", b, b"child")
    assert (await core.lookup(child.handle, b"..")).handle == b


async def test_rename_refuses_what_posix_refuses(core: CoreFiler) -> None:
    await make_file(core, b"f")
    d = await make_directory(core, b"d")
    inner = (await core.mkdir(d, b"inner", mode=0o755, uid=0, gid=0)).handle
    with refused(errno.ENOENT):
        await core.rename(core.root, b"nothing", core.root, b"x")
    with refused(errno.EISDIR, errno.EEXIST):
        await core.rename(core.root, b"f", core.root, b"d")
    with refused(errno.ENOTDIR, errno.EEXIST):
        await core.rename(core.root, b"d", core.root, b"f")
    with refused(errno.EINVAL):
        await core.rename(core.root, b"d", inner, b"loop")
    await core.mkdir(core.root, b"e", mode=0o755, uid=0, gid=0)
    with refused(errno.ENOTEMPTY, errno.EEXIST):
        await core.rename(core.root, b"e", core.root, b"d")


async def test_noreplace_moves_only_to_a_free_name(core: CoreFiler) -> None:
    a, b = await make_file(core, b"a"), await make_file(core, b"b")
    with refused(errno.EEXIST):
        await core.rename(core.root, b"a", core.root, b"b", flags=NOREPLACE)
    assert (await core.lookup(core.root, b"b")).handle == b.handle
    await core.rename(core.root, b"a", core.root, b"c", flags=NOREPLACE)
    moved = await core.lookup(core.root, b"c")
    assert (moved.handle, moved.attributes.nlink) == (a.handle, 1)
    assert set(await listing(core, core.root)) == {b"b", b"c"}


async def test_noreplace_moves_directories_too(core: CoreFiler) -> None:
    d, e = await make_directory(core, b"d"), await make_directory(core, b"e")
    with refused(errno.EEXIST):
        await core.rename(core.root, b"d", core.root, b"e", flags=NOREPLACE)
    await core.rename(core.root, b"d", e, b"moved", flags=NOREPLACE)
    assert (await core.lookup(e, b"moved")).handle == d


async def test_noreplace_of_nothing_is_refused(core: CoreFiler) -> None:
    with refused(errno.ENOENT):
        await core.rename(core.root, b"nothing", core.root, b"x", flags=NOREPLACE)


async def test_exchange_swaps_whatever_the_kinds(core: CoreFiler) -> None:
    f, d = await make_file(core, b"f", b"data"), await make_directory(core, b"d")
    await core.rename(core.root, b"f", core.root, b"d", flags=EXCHANGE)
    assert (await core.lookup(core.root, b"d")).handle == f.handle
    assert (await core.lookup(core.root, b"f")).handle == d
    assert set(await listing(core, core.root)) == {b"f", b"d"}


async def test_exchange_needs_both(core: CoreFiler) -> None:
    f = await make_file(core, b"f")
    with refused(errno.ENOENT):
        await core.rename(core.root, b"f", core.root, b"nothing", flags=EXCHANGE)
    with refused(errno.ENOENT):
        await core.rename(core.root, b"nothing", core.root, b"f", flags=EXCHANGE)
    assert (await core.lookup(core.root, b"f")).handle == f.handle
    assert set(await listing(core, core.root)) == {b"f"}


# --- Listings


async def test_listing_of_an_empty_directory_is_empty(core: CoreFiler) -> None:
    assert await listing(core, await make_directory(core)) == {}


async def test_listing_names_kinds_and_numbers(core: CoreFiler) -> None:
    f, d = await make_file(core, b"f", b"123"), await make_directory(core, b"d")
    await core.symlink(core.root, b"l", b"x", uid=0, gid=0)
    entries = await listing(core, core.root)
    assert set(entries) == {b"f", b"d", b"l"}
    assert entries[b"f"].fileid == f.attributes.fileid
    for name, entry in entries.items():
        found = await core.lookup(core.root, name)
        assert entry.handle in (None, found.handle)
        assert entry.attributes is None or entry.attributes.fileid == found.attributes.fileid
    assert d in {e.handle for e in entries.values()}


async def test_listing_a_file_is_refused(core: CoreFiler) -> None:
    f = await make_file(core)
    with refused(errno.ENOTDIR):
        await listing(core, f.handle)


async def test_a_directory_of_5000_is_listed_once_each(core: CoreFiler) -> None:
    d = await make_directory(core)
    limit = trio.CapacityLimiter(64)

    async def make(i: int) -> None:
        async with limit:
            await core.create(d, b"frame.%06d.exr" % i, mode=0o644, uid=0, gid=0)

    async with trio.open_nursery() as nursery:
        for i in range(5000):
            nursery.start_soon(make, i)
    batches = [batch async for batch in core.readdir(d)]
    names = [e.name for batch in batches for e in batch]
    assert len(batches) > 1
    assert len(names) == 5000
    assert set(names) == {b"frame.%06d.exr" % i for i in range(5000)}


async def test_a_listing_may_be_left_half_way(core: CoreFiler) -> None:
    d = await make_directory(core)
    for i in range(300):
        await core.create(d, b"%d" % i, mode=0o644, uid=0, gid=0)
    entries = core.readdir(d)
    async for batch in entries:
        assert batch
        break
    await entries.aclose()  # type: ignore[attr-defined]
    assert len(await listing(core, d)) == 300


async def test_names_that_stay_are_listed_while_others_go(core: CoreFiler) -> None:
    d = await make_directory(core)
    for i in range(600):
        await core.create(d, b"%04d" % i, mode=0o644, uid=0, gid=0)
    seen: set[bytes] = set()
    gone = False
    async for batch in core.readdir(d):
        seen |= {e.name for e in batch}
        if not gone:
            gone = True
            for i in range(0, 600, 2):
                await core.remove(d, b"%04d" % i)
    assert {b"%04d" % i for i in range(1, 600, 2)} <= seen


# --- Repeated requests


async def test_repeated_create_accepts_what_its_first_try_made(core: CoreFiler) -> None:
    how = {"mode": 0o640, "uid": 5, "gid": 6}
    first = await core.create(core.root, b"f", **how)
    again = await core.create(core.root, b"f", **how, repeated=True)
    assert again.handle == first.handle


async def test_repeated_create_refuses_what_somebody_else_made(core: CoreFiler) -> None:
    await core.create(core.root, b"f", mode=0o640, uid=5, gid=6)
    with refused(errno.EEXIST):
        await core.create(core.root, b"f", mode=0o640, uid=7, gid=6, repeated=True)
    with refused(errno.EEXIST):
        await core.mkdir(core.root, b"f", mode=0o640, uid=5, gid=6, repeated=True)


async def test_repeated_create_refuses_a_file_that_has_content(core: CoreFiler) -> None:
    await make_file(core, b"f", b"content")
    with refused(errno.EEXIST):
        await core.create(core.root, b"f", mode=0o644, uid=0, gid=0, repeated=True)


async def test_repeated_mkdir_symlink_mknod_and_link_are_accepted(core: CoreFiler) -> None:
    r = core.root
    f = await make_file(core)
    for repeated in (False, True):
        await core.mkdir(r, b"d", mode=0o750, uid=1, gid=2, repeated=repeated)
        await core.symlink(r, b"l", b"target", uid=1, gid=2, repeated=repeated)
        await core.mknod(
            r, b"n", mode=stat.S_IFIFO | 0o600, rdev=0, uid=1, gid=2, repeated=repeated
        )
        linked = await core.link(f.handle, r, b"h", repeated=repeated)
        assert linked.handle == f.handle
        assert linked.attributes.nlink == 2


async def test_repeated_symlink_and_link_to_something_else_are_refused(core: CoreFiler) -> None:
    await core.symlink(core.root, b"l", b"target", uid=1, gid=2)
    with refused(errno.EEXIST):
        await core.symlink(core.root, b"l", b"other", uid=1, gid=2, repeated=True)
    f = await make_file(core, b"f")
    await make_file(core, b"g")
    with refused(errno.EEXIST):
        await core.link(f.handle, core.root, b"g", repeated=True)


async def test_repeated_removal_of_what_is_gone_is_success(core: CoreFiler) -> None:
    await core.remove(core.root, b"gone", repeated=True)
    await core.rmdir(core.root, b"gone", repeated=True)


async def test_repeated_rename_that_was_done_is_success(core: CoreFiler) -> None:
    f = await make_file(core, b"a")
    await core.rename(core.root, b"a", core.root, b"b")
    await core.rename(core.root, b"a", core.root, b"b", repeated=True)
    assert (await core.lookup(core.root, b"b")).handle == f.handle
    with refused(errno.ENOENT):
        await core.rename(core.root, b"x", core.root, b"y", repeated=True)


async def test_repeated_rename_that_was_not_done_is_done(core: CoreFiler) -> None:
    f = await make_file(core, b"a")
    await make_file(core, b"b")
    await core.rename(core.root, b"a", core.root, b"b", repeated=True)
    assert (await core.lookup(core.root, b"b")).handle == f.handle
    assert set(await listing(core, core.root)) == {b"b"}


async def test_repeated_noreplace_rename_that_was_done_is_success(core: CoreFiler) -> None:
    f = await make_file(core, b"a")
    await core.rename(core.root, b"a", core.root, b"b", flags=NOREPLACE)
    await core.rename(core.root, b"a", core.root, b"b", flags=NOREPLACE, repeated=True)
    assert (await core.lookup(core.root, b"b")).handle == f.handle


# --- The whole


async def test_statistics_are_plausible(core: CoreFiler) -> None:
    s = await core.statfs()
    assert s.total_bytes >= s.free_bytes >= s.available_bytes > 0
    assert s.total_files >= s.free_files > 0


async def test_a_foreign_handle_is_stale(core: CoreFiler) -> None:
    with refused(errno.ESTALE, errno.EINVAL, errno.EBADF):
        await core.getattr(Handle(b"\x01\x00\x00\x00" + bytes(12)))


async def test_operations_bytes_and_errors_are_counted(core: CoreFiler) -> None:
    def read_bytes() -> float:
        return metrics.CORE_BYTES.labels("read")._value.get()

    def lookup_errors() -> float:
        return metrics.CORE_ERRORS.labels("lookup", "ENOENT")._value.get()

    f = await make_file(core, data=b"12345")
    bytes_before, errors_before = read_bytes(), lookup_errors()
    await core.read(f.handle, 0, 5)
    with refused(errno.ENOENT):
        await core.lookup(core.root, b"nothing")
    assert read_bytes() - bytes_before == 5
    assert lookup_errors() - errors_before == 1
    assert core.state().in_flight == 0
