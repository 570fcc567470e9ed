"""Read-ahead windows: patterns that are recognised, how far they reach, and when to stop."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from filer.cache.layout import PAGE_BYTES
from filer.cache.read_ahead import (
    FILES_MAX,
    FIRST_WINDOW_BYTES,
    JUDGE_AFTER_S,
    STREAMS_MAX,
    STREAMS_PER_FILE_MAX,
    UNPROVEN_MAX,
    Range,
    ReadAhead,
)
from filer.ids import InodeId

MIB = 1 << 20
GIB = 1 << 30
FILE = InodeId(7)
WINDOW_MAX = 64 * MIB


def policy(window: int = WINDOW_MAX, small: int = 4 * MIB) -> ReadAhead:
    return ReadAhead(window_bytes_max=window, small_file_bytes=small)


def pages(ranges: list[Range]) -> set[int]:
    return {p for low, high in ranges for p in range(low // MIB, -(-high // MIB))}


def read_all(
    ahead: ReadAhead, reads: list[Range], *, inode: InodeId = FILE, size: int = GIB,
    now_s: float = 0.0,
) -> set[int]:
    """All pages asked for by *reads*."""
    asked: set[int] = set()
    for start, end in reads:
        asked |= pages(ahead.on_read(inode, start, end, size, now_s))
    return asked


def sequential(start: int, count: int, step: int = MIB) -> list[Range]:
    return [(start + i * step, start + (i + 1) * step) for i in range(count)]


# -- sequential ---------------------------------------------------------------------------------

def test_the_first_read_of_a_file_fetches_four_mib_ahead_at_once() -> None:
    assert policy().on_read(FILE, 0, MIB, GIB, 0.0) == [(MIB, MIB + FIRST_WINDOW_BYTES)]


def test_windows_double_up_to_half_the_limit_each() -> None:
    ahead, sizes = policy(), []
    for start, end in sequential(0, 200):
        sizes += [high - low for low, high in ahead.on_read(FILE, start, end, GIB, 0.0)]

    assert sizes[:5] == [4 * MIB, 8 * MIB, 16 * MIB, 32 * MIB, 32 * MIB]
    assert max(sizes) == WINDOW_MAX // 2


def test_twelve_mib_are_asked_for_after_the_second_read() -> None:
    assert len(read_all(policy(), sequential(0, 2))) >= 12


@given(st.integers(0, 100), st.sampled_from([64 << 10, 128 << 10, MIB, 3 * MIB]))
@settings(max_examples=30, deadline=None)
def test_a_stream_never_reaches_further_than_its_limit(start_mib: int, step: int) -> None:
    ahead, start = policy(), start_mib * MIB
    for low, high in sequential(start, 100, step):
        for _, end in ahead.on_read(FILE, low, high, GIB, 0.0):
            assert end - high <= WINDOW_MAX + PAGE_BYTES


def test_every_page_of_a_sequential_read_is_asked_for_once() -> None:
    ahead, size = policy(), 300 * MIB + 5
    asked: list[int] = []
    for start, end in sequential(0, 300):
        for found in ahead.on_read(FILE, start, end, size, 0.0):
            asked += sorted(pages([found]))

    assert sorted(asked) == list(range(1, 301))


def test_ranges_end_at_the_end_of_the_file() -> None:
    ahead, size = policy(), 10 * MIB + 77
    ranges = [r for start, end in sequential(0, 10)
              for r in ahead.on_read(FILE, start, end, size, 0.0)]

    assert max(high for _, high in ranges) == size


def test_reads_in_the_middle_of_a_file_must_follow_each_other_before_anything_is_fetched() -> None:
    ahead = policy()

    assert ahead.on_read(FILE, 100 * MIB, 101 * MIB, GIB, 0.0) == []
    assert ahead.on_read(FILE, 101 * MIB, 102 * MIB, GIB, 0.0) == [(102 * MIB, 106 * MIB)]


def test_pieces_that_arrive_out_of_order_are_one_stream() -> None:
    """The kernel sends its window of 8 MiB in pieces, and threads of the NFS server shuffle."""
    reads, shuffle = sequential(0, 256), random.Random(1)
    shuffled = []
    for at in range(0, len(reads), 8):
        group = reads[at:at + 8]
        shuffle.shuffle(group)
        shuffled += group
    ahead = policy()
    asked = read_all(ahead, shuffled)

    assert ahead.stream_count <= 2
    assert set(range(16, 256)) <= asked
    assert len(asked) <= 256 + 2 * WINDOW_MAX // MIB


def test_streams_of_many_clients_in_one_file_are_told_apart() -> None:
    ahead = policy()
    starts = [mib * MIB for mib in (0, 90, 210, 333, 500, 610, 777, 900)]
    asked: set[int] = set()
    for step in range(20):
        for start in starts:
            asked |= read_all(ahead, [(start + step * MIB, start + (step + 1) * MIB)])

    assert ahead.stream_count == len(starts)
    for start in starts:
        assert set(range(start // MIB + 3, start // MIB + 30)) <= asked


def test_twenty_clients_in_step_are_one_stream_and_ask_once() -> None:
    ahead, asked = policy(), []
    for start, end in sequential(0, 100):
        for _ in range(20):
            for found in ahead.on_read(FILE, start, end, GIB, 0.0):
                asked += sorted(pages([found]))

    assert ahead.stream_count == 1
    assert len(asked) == len(set(asked))


def test_small_reads_ask_only_for_pages_that_lie_beyond_them() -> None:
    ahead = policy()
    for start, end in sequential(0, 400, 32 << 10):
        for low, high in ahead.on_read(FILE, start, end, GIB, 0.0):
            assert low % PAGE_BYTES == 0
            assert low >= end or high <= start


# -- other patterns -----------------------------------------------------------------------------

def test_backward_reads_are_followed_backwards() -> None:
    ahead = policy()
    reads = [(i * MIB, (i + 1) * MIB) for i in range(500, 470, -1)]

    assert read_all(ahead, reads[:2]) == set()
    asked = read_all(ahead, reads[2:])
    assert set(range(450, 495)) <= asked
    assert max(asked) < 500


def test_backward_reads_stop_at_the_start_of_the_file() -> None:
    asked = read_all(policy(), [(i * MIB, (i + 1) * MIB) for i in range(20, 10, -1)])

    assert min(asked) == 0


@pytest.mark.parametrize("stride", [16 * MIB, -16 * MIB])
def test_strided_reads_fetch_the_steps_and_nothing_between(stride: int) -> None:
    start = 500 * MIB
    reads = [(start + i * stride, start + i * stride + 4096) for i in range(12)]
    asked = read_all(policy(), reads)

    expected = {(start + i * stride) // MIB for i in range(3, 16)}
    assert expected <= asked
    assert all(page * MIB % (16 * MIB) == start % (16 * MIB) for page in asked)


def test_strided_reads_with_a_step_below_the_reordering_distance_stop_the_sequential_window(
) -> None:
    """A stride of 4 MiB from offset 0 looks sequential at first; the gaps give it away."""
    reads = [(i * 4 * MIB, i * 4 * MIB + 256 * 1024) for i in range(200)]
    asked = read_all(policy(), reads)
    touched = {start // MIB for start, _ in reads}

    assert set(range(200, 800, 4)) <= asked
    assert len(asked - touched) < 0.2 * 800


def test_random_reads_fetch_nothing_ahead() -> None:
    ahead, choose = policy(), random.Random(3)
    reads = [(page * MIB, page * MIB + 4096)
             for page in choose.sample(range(1, 100_000), 500)]

    assert len(read_all(ahead, reads, size=100_000 * MIB)) <= 5


# -- small files --------------------------------------------------------------------------------

@pytest.mark.parametrize("start", [0, 2 * MIB])
def test_a_small_file_is_fetched_whole_at_its_first_read(start: int) -> None:
    asked = policy().on_read(FILE, start, start + 4096, 4 * MIB, 0.0)

    assert pages(asked) == {0, 1, 2, 3} - {start // MIB}


def test_a_file_of_one_page_needs_no_read_ahead() -> None:
    assert policy().on_read(FILE, 0, 4096, MIB, 0.0) == []


def test_a_window_of_zero_turns_read_ahead_off() -> None:
    assert read_all(policy(window=0), sequential(0, 50)) == set()
    assert read_all(policy(window=0), [(0, 4096)], size=3 * MIB) == set()


# -- belief -------------------------------------------------------------------------------------

def headers_of_many_files(ahead: ReadAhead, count: int, now_s: float, first: int = 0) -> int:
    return sum(
        len(pages(ahead.on_read(InodeId(first + i), 0, 64 << 10, 200 * MIB, now_s + i / 30)))
        for i in range(count)
    )


def test_a_scan_of_headers_wastes_a_bounded_amount_and_then_nothing() -> None:
    ahead = policy()
    first_scan = headers_of_many_files(ahead, 2000, 0.0)
    assert first_scan <= 2 * UNPROVEN_MAX * FIRST_WINDOW_BYTES // MIB

    assert headers_of_many_files(ahead, 2000, 1000.0, first=10_000) == 0


def test_sequential_files_after_a_scan_of_headers_are_believed_again() -> None:
    ahead = policy()
    headers_of_many_files(ahead, 500, 0.0)
    assert ahead.patience > 0

    now_s = 1000.0
    for inode in range(5000, 5020):
        read_all(ahead, sequential(0, 100), inode=InodeId(inode), now_s=now_s, size=100 * MIB)
        now_s += 2 * JUDGE_AFTER_S

    assert ahead.patience == 0
    assert ahead.on_read(InodeId(9999), 0, MIB, GIB, now_s + 100) != []


def test_sequential_reads_are_followed_even_while_the_volume_is_patient() -> None:
    ahead = policy()
    headers_of_many_files(ahead, 2000, 0.0)

    asked = read_all(ahead, sequential(0, 100), inode=InodeId(77_777), now_s=70.0)
    assert set(range(20, 100)) <= asked


def test_a_file_whose_short_runs_lead_nowhere_gets_smaller_and_later_windows() -> None:
    ahead, choose = policy(), random.Random(5)
    amounts = []
    for run in range(40):
        start = choose.randrange(10, 900) * MIB
        amounts.append(len(read_all(ahead, sequential(start, 2), now_s=run * 2 * JUDGE_AFTER_S)))

    assert amounts[0] == 4
    assert sum(amounts[10:]) == 0


def test_pages_evicted_before_their_use_halve_the_window() -> None:
    ahead = policy()
    read_all(ahead, sequential(0, 100))
    for _ in range(10):
        ahead.on_lost(FILE)
    sizes = [high - low for start, end in sequential(100 * MIB, 200)
             for low, high in ahead.on_read(FILE, start, end, GIB, 0.0)]

    assert sizes[0] <= 2 * MIB


def test_a_forgotten_file_starts_anew() -> None:
    ahead = policy()
    read_all(ahead, sequential(0, 50))
    ahead.forget(FILE)
    ahead.forget(FILE)

    assert ahead.stream_count == 0
    assert ahead.on_read(FILE, 0, MIB, GIB, 0.0) == [(MIB, MIB + FIRST_WINDOW_BYTES)]


# -- bounds -------------------------------------------------------------------------------------

def test_state_is_bounded_however_many_files_and_streams_there_are() -> None:
    ahead = policy()
    for inode in range(3 * FILES_MAX):
        read_all(ahead, sequential(0, 2), inode=InodeId(inode))
    for start in range(0, 900, 10):
        read_all(ahead, sequential(start * MIB, 2))

    assert ahead.file_count <= FILES_MAX
    assert ahead.stream_count <= STREAMS_MAX + STREAMS_PER_FILE_MAX


@given(
    st.lists(st.tuples(
        st.integers(0, 5), st.integers(0, 40 * MIB), st.integers(1, MIB), st.floats(0, 30),
        st.sampled_from(["read", "read", "read", "lost", "forget"]),
    ), max_size=80),
    st.sampled_from([MIB, 3 * MIB + 1, 40 * MIB, 41 * MIB + 5]),
)
@settings(max_examples=150, deadline=None)
def test_any_history_asks_only_for_whole_pages_inside_the_file(
    history: list[tuple[int, int, int, float, str]], size: int
) -> None:
    ahead, now_s = policy(), 0.0
    for inode, start, length, later_s, event in history:
        now_s += later_s
        if event == "lost":
            ahead.on_lost(InodeId(inode))
        elif event == "forget":
            ahead.forget(InodeId(inode))
        elif start < size:
            end = min(start + length, size)
            for low, high in ahead.on_read(InodeId(inode), start, end, size, now_s):
                assert 0 <= low < high <= size
                assert low % PAGE_BYTES == 0
                assert high % PAGE_BYTES == 0 or high == size
                assert not pages([(low, high)]) & pages([(start, end)])
    for inode in range(6):
        ahead.forget(InodeId(inode))
    assert ahead.stream_count == 0
    assert ahead.unproven_count == 0
