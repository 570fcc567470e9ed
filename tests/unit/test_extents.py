"""The extent map against the plainest model: one log position per byte."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from filer.write_behind.extents import Extent, ExtentMap, pieces

SPAN = 60

writes = st.tuples(st.just("write"), st.integers(0, SPAN - 1), st.integers(1, 20))
truncations = st.tuples(st.just("truncate"), st.integers(0, SPAN), st.just(0))
drops = st.tuples(st.just("drop"), st.integers(0, 40), st.just(0))


def apply_all(operations: list[tuple[str, int, int]]) -> tuple[ExtentMap, list[int | None]]:
    """The map, and the model: for each file byte its log position."""
    extents, model = ExtentMap(chunk_bytes=16), [None] * (SPAN + 20)
    at = 0
    for kind, value, length in operations:
        if kind == "write":
            extents.insert(value, value + length, at)
            for i in range(length):
                model[value + i] = at + i
            at += length
        elif kind == "truncate":
            extents.truncate(value)
            model[value:] = [None] * (len(model) - value)
        else:
            # A flush boundary never falls inside a record, so not inside what one write left.
            boundary = at - at * value // 40
            starts = {e.at for e in extents}
            boundary = max((s for s in starts if s <= boundary), default=0)
            extents.drop_older(boundary)
            covered = {b for e in extents for b in range(e.start, e.end)}
            model = [p if i in covered else None for i, p in enumerate(model)]
            assert all(p is None or p >= boundary for p in model)
    return extents, model


@given(st.lists(writes | truncations | drops, max_size=40))
def test_every_byte_is_where_the_newest_write_put_it(operations):
    extents, model = apply_all(operations)
    seen: list[int | None] = [None] * len(model)
    last_end = 0
    for start, end, at in extents:
        assert last_end <= start < end
        last_end = end
        for i in range(end - start):
            seen[start + i] = at + i
    assert seen == model
    assert extents.byte_count == sum(p is not None for p in model)
    assert extents.end == last_end
    assert extents.extent_count == len(list(extents))


@given(st.lists(writes | truncations, max_size=40), st.integers(0, 80), st.integers(0, 80))
def test_overlapping_returns_exactly_the_dirty_part_of_a_range(operations, start, end):
    extents, model = apply_all(operations)
    found = {
        e.start + i: e.at + i
        for e in extents.overlapping(start, end) for i in range(e.end - e.start)
    }
    assert found == {i: p for i, p in enumerate(model) if p is not None and start <= i < end}


@given(st.lists(writes, max_size=40), st.sampled_from([4, 8, 16]), st.sampled_from([16, 32]))
def test_pieces_cover_all_dirty_bytes_once_without_crossing_a_boundary(operations, piece, chunk):
    extents, _ = apply_all(operations)
    cut = pieces(list(extents), piece, chunk)
    covered = []
    for start, end, parts in cut:
        assert start // piece == (end - 1) // piece
        assert [p.start for p in parts] == [start, *(p.end for p in parts[:-1])]
        assert parts[-1].end == end
        covered += [(b, p.at + b - p.start) for p in parts for b in range(p.start, p.end)]
    assert sorted(covered) == [
        (b, e.at + b - e.start) for e in extents for b in range(e.start, e.end)]


def test_pieces_begin_with_whole_chunks():
    extents = [Extent(5, 8, 0), Extent(16, 32, 100)]
    assert [p.start for p in pieces(extents, 8, 16)] == [16, 24, 5]


def test_a_hundred_thousand_random_writes_stay_small_and_ordered():
    extents = ExtentMap()
    count, size = 100_000, 4096
    for i in range(count):
        start = (i * 48271 % count) * 2 * size
        extents.insert(start, start + size, i * size)
    assert extents.extent_count == len(list(extents)) == count
    assert extents.byte_count == count * size
    assert extents.overlapping(0, 3 * size)[0].end == size
