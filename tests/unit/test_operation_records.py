"""Operation records: repeats get the first answer, whenever the server died."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from filer.vfs.operation_records import PAYLOAD_BYTES_MAX, UNIQUE_RESEND, OperationRecords, Repeat

MOUNT = b"m" * 16


def reopened(path: Path, mount_id: bytes = MOUNT) -> OperationRecords:
    """As the next server finds it: nothing was closed or flushed."""
    return OperationRecords(path, mount_id)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records"


@pytest.fixture
def records(path):
    return OperationRecords(path, MOUNT)


def test_what_is_done_is_answered_again(path, records):
    assert records.begin(10) is None
    records.done(10, 0, b"inode 7")
    assert records.begin(12) is None
    records.done(12, errno.EEXIST)

    after = reopened(path)
    assert after.begin(10 | UNIQUE_RESEND) == Repeat(True, 0, b"inode 7")
    assert after.begin(12 | UNIQUE_RESEND) == Repeat(True, errno.EEXIST, b"")


def test_what_is_only_begun_may_have_been_done(path, records):
    records.begin(10)

    after = reopened(path)
    assert after.begin(10 | UNIQUE_RESEND) == Repeat(is_done=False)
    after.done(10 | UNIQUE_RESEND, 0, b"now")

    assert reopened(path).begin(10 | UNIQUE_RESEND) == Repeat(True, 0, b"now")


def test_what_was_received_but_not_begun_is_a_first_time(path, records):
    assert reopened(path).begin(10 | UNIQUE_RESEND) is None


def test_a_repeat_can_be_repeated_again_and_again(path, records):
    records.begin(10)
    records.done(10, 0, b"x")
    for _ in range(3):
        after = reopened(path)
        assert after.begin(10 | UNIQUE_RESEND) == Repeat(True, 0, b"x")
        after.done(10 | UNIQUE_RESEND, 0, b"ignored: the first answer stands")
        for unique in range(1000, 5000, 2):
            after.begin(unique)
            after.done(unique, 0)


def test_another_mount_starts_empty(path, records):
    records.begin(10)
    records.done(10, 0)

    assert reopened(path, b"n" * 16).begin(10 | UNIQUE_RESEND) is None
    assert reopened(path, b"n" * 16).begin(12) is None


def test_only_marked_requests_are_repeats(path, records):
    """The same number without the mark is a new request: a kernel that cannot resend."""
    records.begin(10)
    assert reopened(path).begin(10) is None


@pytest.mark.parametrize("length", [0, 1, 20])
def test_a_server_that_dies_between_any_two_stores_leaves_the_state_before(path, records, length):
    records.begin(10)
    begun = path.read_bytes()
    records.done(10, errno.ENOTEMPTY, b"p" * length)
    done = path.read_bytes()
    changed = [at for at in range(len(begun)) if begun[at] != done[at]]
    state_byte = changed[0]  # the slot's first byte, stored last

    for cut in range(1, len(changed)):
        torn = bytearray(begun)
        for at in changed[1 : cut + 1]:
            torn[at] = done[at]
        path.write_bytes(torn)
        assert reopened(path).begin(10 | UNIQUE_RESEND) == Repeat(is_done=False)

        # Nor is the state byte believed if what it vouches for is not there.
        if cut < len(changed) - 1:
            torn[state_byte] = done[state_byte]
            path.write_bytes(torn)
            assert reopened(path).begin(10 | UNIQUE_RESEND) == Repeat(is_done=False)

    path.write_bytes(done)
    repeat = reopened(path).begin(10 | UNIQUE_RESEND)
    assert repeat == Repeat(True, errno.ENOTEMPTY, b"p" * length)


def test_the_longest_payload_is_kept_whole(path, records):
    payload = bytes(range(PAYLOAD_BYTES_MAX))
    records.begin(10)
    records.done(10, 0, payload)
    assert reopened(path).begin(10 | UNIQUE_RESEND) == Repeat(True, 0, payload)


def test_a_slow_operation_keeps_its_record_while_thousands_pass(path, records):
    records.begin(2)
    for unique in range(4, 40_000, 2):
        assert records.begin(unique) is None
        records.done(unique, 0)

    after = reopened(path)
    assert after.begin(2 | UNIQUE_RESEND) == Repeat(is_done=False)
    assert after.begin(39_998 | UNIQUE_RESEND) == Repeat(True, 0, b"")


def test_repeats_are_found_while_as_many_new_operations_begin_as_there_is_room_for(path, records):
    waiting = range(2, 2 + 2 * 2000, 2)
    for unique in waiting:
        records.begin(unique)

    after = reopened(path)
    for unique in range(10_000, 10_000 + 2 * 2096, 2):
        after.begin(unique)
    assert all(after.begin(unique | UNIQUE_RESEND) == Repeat(False) for unique in waiting)


def test_operations_that_are_never_done_do_not_stop_new_ones(path, records):
    for unique in range(2, 20_000, 2):
        assert records.begin(unique) is None
    records.done(2, 0)  # long overtaken

    assert reopened(path).begin(19_998 | UNIQUE_RESEND) == Repeat(is_done=False)


def test_a_file_of_something_else_is_replaced(path):
    path.write_bytes(b"not records" * 1000)
    assert OperationRecords(path, MOUNT).begin(10 | UNIQUE_RESEND) is None
