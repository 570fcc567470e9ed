"""How far to fetch ahead of whom: the read-ahead windows of a volume.

Owns the detection of access patterns and the size of windows; owns no page and no fetch: it names
byte ranges, and the reader fetches what of them is missing.

NFS clients share one handle, so an inode is read by several *streams* at once, and each is
recognised by position: forward, backward, or strided (equal steps).  A window is Linux's
``start, size, async_size``: when less than ``async_size`` of it lies ahead of the reader, the next
window, twice as large, follows it.  Two windows lie ahead at most, so one is at most half of
``window_bytes_max``.

A guess that turns out wrong costs the link twice, so belief must be earned:

- A file read from offset 0 gets 4 MiB at once; elsewhere two reads in a row are needed.
- A stream is judged when it has been idle for a while.  If less than half of what was fetched for
  it was read, the file and the volume become more *patient*: more reads in a row are needed, and
  the first window is smaller.  Every useful stream takes some patience back.
- At most ``UNPROVEN_MAX`` first windows may be open at a time, which bounds what a scan over the
  headers of many files can waste before its streams are judged.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from dataclasses import dataclass, field

from filer.cache.layout import PAGE_BYTES
from filer.ids import InodeId

Range = tuple[int, int]

FIRST_WINDOW_BYTES = 4 << 20
"""About the bandwidth-delay product of 1 Gb/s and 30 ms."""
REORDER_BYTES = 8 << 20
"""The kernel's read-ahead window; its pieces arrive in any order."""
STREAMS_PER_FILE_MAX = 32
STREAMS_MAX = 4096
FILES_MAX = 8192
RECENT_READS = 8
JUDGE_AFTER_S = 10.0
UNPROVEN_MAX = 16
PATIENCE_MAX = 6
DENSITY_MIN = 0.5
"""A forward stream that reads less than this share of what it passes is not sequential."""


class Direction(enum.Enum):
    FORWARD = 1
    BACKWARD = -1
    STRIDED = 0


@dataclass(slots=True, eq=False)
class Stream:
    direction: Direction
    low: int
    high: int
    """``[low, high)`` spans what was read (strided: the last read)."""
    ahead: int
    """How far was asked for: an end (forward), a start (backward), or the last step's start."""
    size: int = 0
    """Of the last window; it is also its async_size."""
    stride: int = 0
    reads: int = 1
    read_bytes: int = 0
    fetched_bytes: int = 0
    used_bytes: int = 0
    """Read after the first window was asked for."""
    used_at_s: float = 0.0
    is_unproven: bool = False
    """Its first window is open and nothing was read since."""

    @property
    def is_useful(self) -> bool:
        return 2 * self.used_bytes >= self.fetched_bytes


@dataclass(slots=True, eq=False)
class _File:
    patience: int
    streams: list[Stream] = field(default_factory=list)
    recent: deque[Range] = field(default_factory=lambda: deque(maxlen=RECENT_READS))
    """Reads that belong to no stream yet."""


class ReadAhead:
    def __init__(
        self, *, window_bytes_max: int, small_file_bytes: int,
        first_window_bytes: int = FIRST_WINDOW_BYTES,
    ) -> None:
        self._size_max = max(window_bytes_max // 2 // PAGE_BYTES * PAGE_BYTES, PAGE_BYTES)
        self._is_off = window_bytes_max < PAGE_BYTES
        self._small_file_bytes = small_file_bytes
        self._first_window_bytes = min(first_window_bytes, self._size_max)
        self._files: OrderedDict[InodeId, _File] = OrderedDict()
        self._streams: OrderedDict[int, tuple[_File, Stream]] = OrderedDict()
        """By id(), least recently used first."""
        self._patience = 0
        self._unproven = 0

    # -- events -------------------------------------------------------------------------------

    def on_read(
        self, inode: InodeId, start: int, end: int, size: int, now_s: float
    ) -> list[Range]:
        """A client reads ``[start, end)`` of a file of *size* bytes.

        Returns: page-aligned ranges worth fetching now, the most urgent first, beyond the pages
        that are being read.
        """
        if self._is_off:
            return []
        self._judge_idle(now_s)
        file = self._file(inode)
        if size <= self._small_file_bytes:
            ranges = self._on_small_read(file, start, end, size, now_s)
        else:
            ranges = self._on_stream_read(file, start, end, size, now_s)
        return _aligned(ranges, start, end, size)

    def on_lost(self, inode: InodeId) -> None:
        """Pages fetched ahead were evicted before they were read: the windows are too large."""
        file = self._files.get(inode)
        for stream in file.streams if file else ():
            stream.size = max(stream.size // 2, PAGE_BYTES)

    def forget(self, inode: InodeId) -> None:
        """The file changed or is gone; its streams prove nothing."""
        file = self._files.pop(inode, None)
        if file is not None:
            for stream in list(file.streams):
                self._remove(file, stream)

    @property
    def stream_count(self) -> int:
        return len(self._streams)

    @property
    def file_count(self) -> int:
        return len(self._files)

    @property
    def unproven_count(self) -> int:
        """First windows of which nothing was read yet."""
        return self._unproven

    @property
    def patience(self) -> int:
        """Reads in a row that a new file must show beyond the usual."""
        return self._patience

    # -- small files --------------------------------------------------------------------------

    def _on_small_read(
        self, file: _File, start: int, end: int, size: int, now_s: float
    ) -> list[Range]:
        """The whole file at its first read; the stream only counts what is read of it."""
        if size <= PAGE_BYTES:
            return []
        if file.streams:
            self._used(file.streams[0], start, end, now_s)
            return []
        file.recent.append((start, end))
        if self._is_doubtful(file, reads=len(file.recent)):
            return []
        stream = Stream(Direction.FORWARD, 0, size, ahead=size, size=size)
        self._add(file, stream, now_s)
        self._used(stream, start, end, now_s)
        self._fetches(stream, size)
        return [(0, size)]

    # -- streams ------------------------------------------------------------------------------

    def _on_stream_read(
        self, file: _File, start: int, end: int, size: int, now_s: float
    ) -> list[Range]:
        stream = self._matching(file, start, end)
        if stream is None:
            stream = self._detected(file, start, end, now_s)
            if stream is None:
                return []
        self._used(stream, start, end, now_s)
        if stream.direction is Direction.FORWARD and self._is_sparse(stream):
            self._judge(file, stream)
            file.recent.append((start, end))
            return []
        if not stream.fetched_bytes and self._is_doubtful(file, reads=stream.reads):
            return []
        return self._next_window(file, stream, size)

    def _matching(self, file: _File, start: int, end: int) -> Stream | None:
        """The stream this read continues; moves it on."""
        for stream in reversed(file.streams):
            if stream.direction is Direction.FORWARD:
                if stream.high - REORDER_BYTES <= start <= stream.high + REORDER_BYTES and (
                    start >= stream.low
                ):
                    stream.high = max(stream.high, end)
                    return stream
            elif stream.direction is Direction.BACKWARD:
                if stream.low - (end - start) <= start and end <= stream.low + REORDER_BYTES and (
                    end <= stream.high
                ):
                    stream.low = min(stream.low, start)
                    return stream
            elif start == stream.low + stream.stride:
                stream.low, stream.high = start, end
                return stream
        return None

    def _detected(
        self, file: _File, start: int, end: int, now_s: float
    ) -> Stream | None:
        """A new stream that this read and those remembered make up."""
        stream = None
        starts = {read[0] for read in file.recent}
        for low, high in reversed(file.recent):
            step = start - low
            if start == high and low != high:
                stream = Stream(Direction.FORWARD, low, end, ahead=end, reads=2)
            elif step and low - step in starts and high - low == end - start:
                if end == low:
                    stream = Stream(Direction.BACKWARD, start, high, ahead=start, reads=3)
                else:
                    stream = Stream(Direction.STRIDED, start, end, ahead=start, reads=3,
                                    stride=step)
            if stream is not None:
                file.recent.remove((low, high))
                stream.read_bytes = high - low
                break
        if stream is None and start == 0:
            stream = Stream(Direction.FORWARD, 0, end, ahead=end)
        if stream is None:
            file.recent.append((start, end))
            return None
        self._add(file, stream, now_s)
        stream.reads -= 1  # the caller counts this read
        return stream

    def _next_window(self, file: _File, stream: Stream, size: int) -> list[Range]:
        if stream.direction is Direction.STRIDED:
            return self._next_strides(file, stream, size)
        is_forward = stream.direction is Direction.FORWARD
        if is_forward:
            stream.ahead = max(stream.ahead, stream.high)
            remaining = stream.ahead - stream.high
        else:
            stream.ahead = min(stream.ahead, stream.low)
            remaining = stream.low - stream.ahead
        if remaining > stream.size:
            return []
        self._grow(file, stream)
        if is_forward:
            low = stream.ahead
            high = min(-(-(low + stream.size) // PAGE_BYTES) * PAGE_BYTES, size)
            stream.ahead = high
        else:
            high = stream.ahead
            low = max((high - stream.size) // PAGE_BYTES * PAGE_BYTES, 0)
            stream.ahead = low
        if low >= high:
            return []
        self._fetches(stream, high - low)
        return [(low, high)]

    def _next_strides(self, file: _File, stream: Stream, size: int) -> list[Range]:
        """The next steps whose pages fill a window."""
        stride, length = stream.stride, stream.high - stream.low
        if (stream.ahead - stream.low) * stride < 0:
            stream.ahead = stream.low
        step_bytes = min(abs(stride), max(length, PAGE_BYTES))
        steps_ahead = (stream.ahead - stream.low) // stride
        if steps_ahead * step_bytes > stream.size:
            return []
        self._grow(file, stream)
        ranges = []
        for _ in range(max(stream.size // step_bytes, 1)):
            low = stream.ahead + stride
            if not 0 <= low < size:
                break
            stream.ahead = low
            ranges.append((low, min(low + length, size)))
            self._fetches(stream, min(length, size - low))
        return ranges

    def _grow(self, file: _File, stream: Stream) -> None:
        if stream.size:
            stream.size = min(2 * stream.size, self._size_max)
        else:
            first = self._first_window_bytes >> min(max(file.patience, self._patience), 2)
            stream.size = max(first, PAGE_BYTES)

    # -- belief -------------------------------------------------------------------------------

    def _is_doubtful(self, file: _File, reads: int) -> bool:
        """Whether a stream of *reads* reads has not earned its first window yet."""
        patience = max(file.patience, self._patience)
        return reads <= patience or (reads <= 1 and self._unproven >= UNPROVEN_MAX)

    @staticmethod
    def _is_sparse(stream: Stream) -> bool:
        span = stream.high - stream.low
        return span > REORDER_BYTES and stream.read_bytes < DENSITY_MIN * (span - REORDER_BYTES)

    def _judge_idle(self, now_s: float) -> None:
        while self._streams:
            file, stream = next(iter(self._streams.values()))
            if now_s - stream.used_at_s < JUDGE_AFTER_S and len(self._streams) <= STREAMS_MAX:
                return
            self._judge(file, stream)

    def _judge(self, file: _File, stream: Stream) -> None:
        """Retire a stream and learn from it."""
        if stream.fetched_bytes:
            change = -1 if stream.is_useful else 1
            file.patience = min(max(file.patience + change, 0), PATIENCE_MAX)
            self._patience = min(max(self._patience + change, 0), PATIENCE_MAX)
        self._remove(file, stream)

    # -- bookkeeping --------------------------------------------------------------------------

    def _file(self, inode: InodeId) -> _File:
        file = self._files.get(inode)
        if file is not None:
            self._files.move_to_end(inode)
            return file
        file = self._files[inode] = _File(self._patience)
        while len(self._files) > FILES_MAX:
            _, oldest = self._files.popitem(last=False)
            for stream in list(oldest.streams):
                self._judge(oldest, stream)
        return file

    def _add(self, file: _File, stream: Stream, now_s: float) -> None:
        stream.used_at_s = now_s
        file.streams.append(stream)
        self._streams[id(stream)] = (file, stream)
        if len(file.streams) > STREAMS_PER_FILE_MAX:
            self._judge(file, min(file.streams, key=lambda s: s.used_at_s))

    def _remove(self, file: _File, stream: Stream) -> None:
        self._unproven -= stream.is_unproven
        file.streams.remove(stream)
        del self._streams[id(stream)]

    def _fetches(self, stream: Stream, count_bytes: int) -> None:
        if not stream.fetched_bytes:
            stream.is_unproven = True
            self._unproven += 1
        stream.fetched_bytes += count_bytes

    def _used(self, stream: Stream, start: int, end: int, now_s: float) -> None:
        self._unproven -= stream.is_unproven
        stream.is_unproven = False
        stream.reads += 1
        stream.read_bytes += end - start
        if stream.fetched_bytes:
            stream.used_bytes += end - start
        stream.used_at_s = now_s
        self._streams.move_to_end(id(stream))


def _aligned(ranges: list[Range], start: int, end: int, size: int) -> list[Range]:
    """Widen to whole pages, merge neighbours, leave out the pages of ``[start, end)``."""
    read_low = start // PAGE_BYTES
    read_high = -(-end // PAGE_BYTES)
    result: list[Range] = []
    for low, high in ranges:
        first, last = low // PAGE_BYTES, -(-high // PAGE_BYTES)
        for a, b in ((first, min(last, read_low)), (max(first, read_high), last)):
            if a >= b:
                continue
            piece = (a * PAGE_BYTES, min(b * PAGE_BYTES, size))
            if result and result[-1][0] <= piece[0] <= result[-1][1]:
                result[-1] = (result[-1][0], max(result[-1][1], piece[1]))
            elif result and piece[0] <= result[-1][0] <= piece[1]:
                result[-1] = (piece[0], max(result[-1][1], piece[1]))
            else:
                result.append(piece)
    return result
