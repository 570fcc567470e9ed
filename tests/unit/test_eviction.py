"""The eviction policy against a naive model, and by trace."""

from __future__ import annotations

import tracemalloc
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from filer.cache.eviction import BYTES_PER_ENTRY, Eviction, bytes_to_evict

MIB = 1 << 20
FAR_APART_S = 100.0


class EvictionAgainstModel(RuleBasedStateMachine):
    """The model is a dict of sizes: it knows what is there, not what should go."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = Eviction(ghosts_max=64)
        self.sizes: dict[int, int] = {}
        self.pinned: set[int] = set()
        self.now_s = 0.0

    def entry(self, pick: int) -> int:
        return sorted(self.sizes)[pick % len(self.sizes)]

    @rule(fingerprint=st.integers(0, 50), size=st.integers(0, 4 * MIB))
    def add(self, fingerprint: int, size: int) -> None:
        entry = self.policy.add(fingerprint, size, self.now_s)
        assert entry not in self.sizes
        self.sizes[entry] = size

    @precondition(lambda self: self.sizes)
    @rule(pick=st.integers(0, 1000), size=st.integers(0, 4 * MIB))
    def resize(self, pick: int, size: int) -> None:
        entry = self.entry(pick)
        self.policy.resize(entry, size)
        self.sizes[entry] = size

    @precondition(lambda self: self.sizes)
    @rule(pick=st.integers(0, 1000), later_s=st.floats(0, 100))
    def touch(self, pick: int, later_s: float) -> None:
        self.now_s += later_s
        self.policy.touch(self.entry(pick), self.now_s)

    @precondition(lambda self: self.sizes)
    @rule(pick=st.integers(0, 1000))
    def pin_or_unpin(self, pick: int) -> None:
        self.pinned ^= {self.entry(pick)}

    @precondition(lambda self: self.sizes)
    @rule(pick=st.integers(0, 1000))
    def remove(self, pick: int) -> None:
        entry = self.entry(pick)
        self.policy.remove(entry)
        del self.sizes[entry]
        self.pinned.discard(entry)

    @rule(wanted=st.integers(0, 20 * MIB), count=st.integers(0, 3))
    def evict(self, wanted: int, count: int) -> None:
        victims = self.policy.victims(wanted, self.pinned, count_wanted=count)
        assert len(set(victims)) == len(victims)
        assert not self.pinned & set(victims)
        freed = sum(self.sizes.pop(victim) for victim in victims)
        got_enough = freed >= wanted and len(victims) >= count
        assert got_enough or set(self.sizes) == self.pinned

    @rule()
    def restart(self) -> None:
        survivors = [(entry, entry, size) for entry, size in self.sizes.items()]
        self.policy = Eviction(ghosts_max=64)
        self.policy.restore(survivors)

    @invariant()
    def accounting_is_right(self) -> None:
        assert self.policy.bytes == sum(self.sizes.values())
        assert self.policy.count == len(self.sizes)
        assert all(entry in self.policy for entry in self.sizes)


TestEvictionAgainstModel = EvictionAgainstModel.TestCase
TestEvictionAgainstModel.settings = settings(
    max_examples=40, stateful_step_count=50, deadline=None)


@given(
    used=st.integers(0, 100 * MIB), incoming=st.integers(0, MIB),
    capacity=st.integers(2 * MIB, 100 * MIB), high=st.floats(0.1, 1), low=st.floats(0.01, 1),
)
def test_water_marks_keep_the_cache_below_capacity(
    used: int, incoming: int, capacity: int, high: float, low: float
) -> None:
    low = min(low, high)
    wanted = bytes_to_evict(
        used, incoming, capacity_bytes=capacity, high_water=high, low_water=low)

    assert 0 <= wanted <= used
    if used + incoming <= capacity * high:
        assert wanted == 0
    elif incoming <= capacity * low:
        assert used - wanted + incoming <= capacity * low + 1


def test_no_chunk_is_dropped_before_high_water() -> None:
    assert bytes_to_evict(94, 1, capacity_bytes=100, high_water=0.95, low_water=0.9) == 0
    assert bytes_to_evict(95, 1, capacity_bytes=100, high_water=0.95, low_water=0.9) == 6


class Cache:
    """A cache of *capacity* chunks of one MiB under the policy, for traces."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.policy = Eviction(ghosts_max=1 << 12)
        self.entries: dict[int, int] = {}
        self.names: dict[int, int] = {}

    def use(self, name: int, now_s: float) -> bool:
        """Returns: whether it was a hit."""
        if name in self.entries:
            self.policy.touch(self.entries[name], now_s)
            return True
        if len(self.entries) >= self.capacity:
            for victim in self.policy.victims(MIB):
                del self.entries[self.names.pop(victim)]
        entry = self.policy.add(name, MIB, now_s)
        self.entries[name], self.names[entry] = entry, name
        return False


class LeastRecentlyUsed:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.entries: OrderedDict[int, None] = OrderedDict()

    def use(self, name: int, _now_s: float) -> bool:
        hit = name in self.entries
        self.entries[name] = None
        self.entries.move_to_end(name)
        if len(self.entries) > self.capacity:
            self.entries.popitem(last=False)
        return hit


def hits_of_working_set_after_a_scan(cache: Cache | LeastRecentlyUsed) -> int:
    working_set = range(50)
    for visit in range(4):
        for name in working_set:
            cache.use(name, visit * FAR_APART_S)
    for name in range(1000, 2000):
        cache.use(name, 4 * FAR_APART_S)
    return sum(cache.use(name, 5 * FAR_APART_S) for name in working_set)


def test_a_scan_ten_times_the_cache_leaves_the_working_set_where_lru_loses_it() -> None:
    assert hits_of_working_set_after_a_scan(LeastRecentlyUsed(100)) == 0
    assert hits_of_working_set_after_a_scan(Cache(100)) == 50


def test_reads_of_one_chunk_in_quick_succession_count_as_one_use() -> None:
    cache = Cache(100)
    for name in range(50):
        cache.use(name, 0.0)
        cache.use(name, FAR_APART_S)
    for name in range(1000, 1400):
        for piece in range(4):
            cache.use(name, 2 * FAR_APART_S + piece)

    assert sum(cache.use(name, 3 * FAR_APART_S) for name in range(50)) == 50


def test_a_chunk_dropped_too_early_comes_back_to_stay() -> None:
    cache = Cache(100)
    for name in range(100):
        cache.use(name, 0.0)
    cache.use(1000, 1.0)
    evicted = next(name for name in range(100) if name not in cache.entries)

    cache.use(evicted, 2.0)
    for name in range(2000, 2080):
        cache.use(name, 3.0)

    assert evicted in cache.entries


def test_survivors_of_a_restart_outlive_a_burst_of_new_chunks() -> None:
    policy = Eviction()
    policy.restore((entry, entry, MIB) for entry in range(90))
    new = [policy.add(1000 + i, MIB, 1.0) for i in range(10)]
    new += [policy.add(2000 + i, MIB, 1.0) for i in range(50)]

    assert set(policy.victims(50 * MIB)) <= set(new)


def test_restored_chunks_keep_their_entries_and_the_gaps_are_used() -> None:
    policy = Eviction()
    policy.restore([(5, 55, MIB), (2, 22, MIB)])

    assert {policy.add(1, 0, 0.0) for _ in range(4)} == {0, 1, 3, 4}
    assert policy.add(1, 0, 0.0) == 6


def test_removing_an_entry_twice_is_a_defect() -> None:
    policy = Eviction()
    entry = policy.add(1, MIB, 0.0)
    policy.remove(entry)

    with pytest.raises(AssertionError):
        policy.remove(entry)


def test_a_chunk_costs_no_more_memory_than_promised() -> None:
    count = 50_000
    policy = Eviction()
    tracemalloc.start()
    try:
        for i in range(count):
            policy.add(i * 0x9E3779B97F4A7C15 & (1 << 64) - 1, MIB, 0.0)
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()

    assert used / count < 1.2 * BYTES_PER_ENTRY
