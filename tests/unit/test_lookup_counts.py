"""Lookup counts: what the kernel was given and gave back, at a bounded cost."""

from __future__ import annotations

import tracemalloc

import pytest

from filer.vfs.lookup_counts import LookupCounts


def test_an_inode_is_held_until_all_references_are_given_back():
    counts = LookupCounts()
    counts.increment(7)
    counts.increment(7, 2)

    assert counts.decrement(7, 2) == 1
    assert counts.count(7) == 1
    assert counts.decrement(7, 1) == 0
    assert counts.count(7) == 0
    assert counts.inode_count == 0


def test_more_given_back_than_given_is_a_bug():
    counts = LookupCounts()
    counts.increment(7)
    with pytest.raises(AssertionError):
        counts.decrement(7, 2)


def test_after_a_takeover_the_kernel_gives_back_what_earlier_servers_gave():
    counts = LookupCounts(is_complete=False)
    counts.increment(7)

    assert counts.decrement(7, 5) == 0
    assert counts.decrement(8, 1) == 0
    assert counts.inode_count == 0


def test_an_inode_costs_less_than_100_bytes():
    tracemalloc.start()
    try:
        counts = LookupCounts()
        for inode in range(1 << 40, (1 << 40) + 250_000):
            counts.increment(inode)
        used_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert counts.inode_count == 250_000
    assert used_bytes < 25_000_000
