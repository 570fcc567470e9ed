"""The codec: what was written comes back, anything else is never taken for a record."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filer.core_filer.base import CoreVersion, Handle
from filer.ids import DataVersion, Epoch, InodeId, Lsn
from filer.journal.record import (
    DATA_BYTES_MAX,
    Bad,
    Base,
    Discarded,
    FlushBegun,
    Flushed,
    Incomplete,
    Logged,
    Probe,
    Rebased,
    SegmentStart,
    Size,
    Times,
    Write,
    decode,
    encode,
)

u64 = st.integers(0, 2**64 - 1)
time_ns = st.integers(-(2**62), 2**62)
inodes = u64.map(InodeId)
versions = st.builds(CoreVersion, time_ns, time_ns, u64)
handles = st.binary(max_size=128).map(Handle)
records = st.one_of(
    st.builds(SegmentStart, st.text(max_size=20)),
    st.builds(Base, inodes, handles, versions, u64.map(DataVersion)),
    st.builds(Write, inodes, u64, time_ns, st.binary(max_size=200)),
    st.builds(Size, inodes, u64, time_ns),
    st.builds(Times, inodes, st.none() | time_ns, st.none() | time_ns),
    st.builds(FlushBegun, inodes, handles, versions, u64.map(DataVersion), u64, u64,
              st.none() | time_ns, time_ns),
    st.builds(Flushed, inodes, u64.map(Lsn), versions, u64.map(DataVersion)),
    st.builds(Rebased, inodes, versions),
    st.builds(Discarded, inodes),
    st.just(Probe()),
)

SAMPLES = [
    Base(InodeId(7), Handle(b"handle"), CoreVersion(1, 2, 3), DataVersion(4)),
    Write(InodeId(7), 4096, 99, b"some bytes of a file"),
    Times(InodeId(7), None, 5),
]


def encoded(record, lsn=4711, epoch=3, stable_end=4000) -> bytes:
    return b"".join(map(bytes, encode(
        record, lsn=Lsn(lsn), epoch=Epoch(epoch), stable_end=stable_end, written_at_ns=123)))


@given(records, u64, u64, u64)
def test_a_record_comes_back_as_it_was_written(record, lsn, epoch, stable_end):
    data = encoded(record, lsn, epoch, stable_end)
    found = decode(memoryview(data + b"what follows"), lsn)
    assert isinstance(found, Logged)
    assert found.record == record
    assert (found.lsn, found.epoch, found.stable_end) == (lsn, epoch, stable_end)
    assert found.written_at_ns == 123
    assert found.end == lsn + len(data)
    if isinstance(record, Write):
        at = found.data_at - lsn
        assert data[at : at + len(record.data)] == record.data


@pytest.mark.parametrize("record", SAMPLES)
def test_a_record_cut_anywhere_is_incomplete(record):
    data = encoded(record)
    for cut in range(len(data)):
        found = decode(memoryview(data[:cut]), 4711)
        assert isinstance(found, Incomplete)
        assert cut < found.bytes_needed <= len(data)


@pytest.mark.parametrize("record", SAMPLES)
def test_a_record_with_any_bit_flipped_is_never_valid(record):
    data = encoded(record)
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            assert isinstance(decode(memoryview(flipped), 4711), Bad | Incomplete)


def test_a_record_at_another_position_is_not_a_record():
    data = encoded(SAMPLES[1])
    assert decode(memoryview(data), 4712) == Bad("a record of position 4711")


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_not_a_record(data):
    assert isinstance(decode(memoryview(data), 0), Bad | Incomplete)


def test_a_length_beyond_the_limit_is_bad_not_incomplete():
    data = bytearray(encoded(SAMPLES[1]))
    data[8:12] = (DATA_BYTES_MAX + 1).to_bytes(4, "little")
    assert isinstance(decode(memoryview(data), 4711), Bad)
