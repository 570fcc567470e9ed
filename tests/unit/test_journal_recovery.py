"""Recovery: torn tails are cut, damage stops it, and neither is taken for the other."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filer.errors import Corrupt, Fenced
from filer.ids import Epoch, InodeId, Lsn
from filer.journal.record import SegmentStart, Write, encode
from filer.journal.recovery import FIRST_LSN, Recovered, Recovery

EPOCH = Epoch(5)


class Written:
    """Segments as the log writes them; every record is synced or not."""

    def __init__(self) -> None:
        self.segments: list[tuple[int, bytearray]] = []
        self.end = int(FIRST_LSN)
        self.stable_end = int(FIRST_LSN)
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.writes: list[Write] = []

    def segment(self) -> None:
        self.segments.append((self.end, bytearray()))
        self._append(SegmentStart("n1"))

    def write(self, data: bytes, *, sync: bool = False, epoch: int = EPOCH) -> None:
        record = Write(InodeId(1), len(self.writes), 0, data)
        self.writes.append(record)
        self.starts.append(self.end)
        self._append(record, epoch)
        self.ends.append(self.end)
        if sync:
            self.stable_end = self.end

    def _append(self, record, epoch: int = EPOCH) -> None:
        data = b"".join(map(bytes, encode(
            record, lsn=Lsn(self.end), epoch=Epoch(epoch), stable_end=self.stable_end,
            written_at_ns=0)))
        self.segments[-1][1].extend(data)
        self.end += len(data)


def recover(segments, *, feed_bytes: int = 1 << 20) -> tuple[list[bytes], Recovered]:
    recovery = Recovery(EPOCH)
    found = []
    for index, (first, content) in enumerate(segments):
        following = segments[index + 1][0] if index + 1 < len(segments) else None
        recovery.begin(f"{first:x}", Lsn(first), following)
        for at in range(0, len(content), feed_bytes):
            found += recovery.feed(bytes(content[at : at + feed_bytes]))
        found += recovery.end()
    writes = [bytes(x.record.data) for x in found if isinstance(x.record, Write)]
    return writes, recovery.finish()


def three_segments(*, synced: int) -> Written:
    """Nine writes in three segments, of which the first *synced* are stable."""
    log = Written()
    for number in range(9):
        if number % 3 == 0:
            log.segment()
        log.write(b"bytes %d" % number, sync=number < synced)
    return log


@given(st.integers(1, 100))
def test_a_whole_log_is_read_whole_in_pieces_of_any_size(feed_bytes):
    log = three_segments(synced=9)
    writes, recovered = recover(log.segments, feed_bytes=feed_bytes)
    assert writes == [w.data for w in log.writes]
    assert recovered == Recovered(Lsn(log.end), cut=False)


def test_an_empty_log_begins_at_the_beginning():
    assert recover([]) == ([], Recovered(FIRST_LSN, cut=False))


def test_a_tail_cut_at_any_byte_leaves_the_records_before_it():
    log = three_segments(synced=7)
    first, content = log.segments[-1]
    for cut in range(len(content)):
        writes, recovered = recover([*log.segments[:-1], (first, content[:cut])])
        whole = [w.data for w, end in zip(log.writes, log.ends, strict=True) if end <= first + cut]
        assert writes == whole
        assert recovered.end <= first + cut
        assert recovered.cut == (recovered.end < first + cut)


def test_a_byte_flipped_anywhere_is_cut_off_or_reported_but_never_read():
    log = three_segments(synced=6)
    stable = [w.data for w in log.writes[:6]]
    for index, (first, content) in enumerate(log.segments):
        for position in range(len(content)):
            flipped = bytearray(content)
            flipped[position] ^= 0x40
            segments = [*log.segments[:index], (first, flipped), *log.segments[index + 1 :]]
            if first + position < log.stable_end:
                with pytest.raises(Corrupt) as corrupt:
                    recover(segments)
                assert f"in {first:x} at offset" in str(corrupt.value)
            else:
                writes, recovered = recover(segments, feed_bytes=64)
                assert writes[:6] == stable
                assert writes == [w.data for w in log.writes[: len(writes)]]
                assert recovered.cut
                assert recovered.end <= first + position


def test_a_missing_segment_of_stable_records_is_damage():
    log = three_segments(synced=9)
    log.segment()
    with pytest.raises(Corrupt, match="ends too early"):
        recover([log.segments[0], *log.segments[2:]])


def test_a_missing_segment_that_never_was_stable_is_a_torn_tail():
    log = three_segments(synced=3)
    writes, recovered = recover([log.segments[0], log.segments[2]])
    assert writes == [b"bytes 0", b"bytes 1", b"bytes 2"]
    assert recovered == Recovered(Lsn(log.segments[1][0]), cut=True)


def test_what_a_failed_append_left_behind_is_superseded_by_the_next_segment():
    log = Written()
    log.segment()
    log.write(b"good")
    end = log.end
    log.write(b"failed, its caller was told so")
    log.end = end
    log.writes.pop()
    log.segment()
    log.write(b"repeated")
    writes, recovered = recover(log.segments)
    assert writes == [b"good", b"repeated"]
    assert not recovered.cut


def test_file_bytes_that_look_like_records_are_not_replayed():
    inner = three_segments(synced=9)
    log = Written()
    log.segment()
    log.write(bytes(inner.segments[0][1]) + b"tail")
    first, content = log.segments[0]
    writes, recovered = recover([(first, content[:-1])])
    assert writes == []
    assert recovered.end == log.starts[0]


def test_a_later_epoch_fences():
    log = Written()
    log.segment()
    log.write(b"by our successor", epoch=EPOCH + 1)
    with pytest.raises(Fenced):
        recover(log.segments)
