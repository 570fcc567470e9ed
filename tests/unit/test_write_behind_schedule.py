"""Which file is flushed when."""

from __future__ import annotations

from filer.ids import InodeId
from filer.write_behind.schedule import RETRY_S_FIRST, RETRY_S_MAX, Decision, Schedule

A, B, C = InodeId(1), InodeId(2), InodeId(3)


def ask(schedule: Schedule, now: float, *, is_urgent=False, is_reachable=True) -> Decision:
    return schedule.next(now, is_urgent=is_urgent, is_reachable=is_reachable)


def test_a_file_is_flushed_when_its_delay_is_over_and_not_before():
    schedule = Schedule(delay_s=30, files_at_once=4)
    schedule.dirtied(A, 100)
    assert ask(schedule, 129) == Decision([], 130)
    assert ask(schedule, 130) == Decision([A], None)


def test_further_writes_do_not_postpone_a_flush():
    schedule = Schedule(delay_s=30, files_at_once=4)
    schedule.dirtied(A, 100)
    schedule.dirtied(A, 125)
    assert ask(schedule, 130).start == [A]


def test_the_oldest_goes_first_and_only_so_many_at_once():
    schedule = Schedule(delay_s=30, files_at_once=2)
    for inode, at in ((B, 2), (C, 3), (A, 1)):
        schedule.dirtied(inode, at)
    assert ask(schedule, 100).start == [A, B]
    assert ask(schedule, 100).start == []
    schedule.finished(A, 101, dirty_since=None)
    assert ask(schedule, 101).start == [C]


def test_urgency_ignores_the_delay():
    schedule = Schedule(delay_s=3600, files_at_once=4)
    schedule.dirtied(A, 0)
    assert ask(schedule, 1).start == []
    assert ask(schedule, 1, is_urgent=True).start == [A]


def test_a_forced_file_overtakes_older_ones():
    schedule = Schedule(delay_s=0, files_at_once=1)
    schedule.dirtied(A, 0)
    schedule.dirtied(B, 5)
    schedule.force(B)
    assert ask(schedule, 10).start == [B]


def test_a_file_changed_during_its_flush_is_due_again_after_its_delay():
    schedule = Schedule(delay_s=30, files_at_once=4)
    schedule.dirtied(A, 0)
    assert ask(schedule, 30).start == [A]
    schedule.dirtied(A, 31)
    assert ask(schedule, 31).start == []
    schedule.finished(A, 40, dirty_since=31)
    assert ask(schedule, 40) == Decision([], 61)
    assert ask(schedule, 61).start == [A]


def test_force_during_a_flush_begins_another_one_after_it():
    schedule = Schedule(delay_s=3600, files_at_once=4)
    schedule.dirtied(A, 0)
    schedule.force(A)
    assert ask(schedule, 1).start == [A]
    schedule.force(A)
    assert ask(schedule, 2).start == []
    schedule.finished(A, 3, dirty_since=2)
    assert ask(schedule, 3).start == [A]


def test_a_refused_file_pauses_longer_each_time_up_to_a_limit():
    schedule = Schedule(delay_s=0, files_at_once=4)
    schedule.dirtied(A, 0)
    now, pauses = 0.0, []
    for _ in range(9):
        assert ask(schedule, now).start == [A]
        schedule.failed(A, now)
        decision = ask(schedule, now, is_urgent=True)
        assert decision.start == []
        pauses.append(decision.wake_at - now)
        now = decision.wake_at
    assert pauses[:3] == [RETRY_S_FIRST, 2 * RETRY_S_FIRST, 4 * RETRY_S_FIRST]
    assert pauses[-1] == RETRY_S_MAX


def test_a_refused_file_does_not_delay_others_and_can_be_forced():
    schedule = Schedule(delay_s=0, files_at_once=4)
    schedule.dirtied(A, 0)
    ask(schedule, 0)
    schedule.failed(A, 0)
    schedule.dirtied(B, 0.1)
    assert ask(schedule, 0.2).start == [B]
    schedule.force(A)
    assert ask(schedule, 0.3).start == [A]
    assert schedule.failing() == 0


def test_an_interrupted_flush_pauses_the_whole_volume():
    schedule = Schedule(delay_s=0, files_at_once=4)
    schedule.dirtied(A, 0)
    schedule.dirtied(B, 0)
    assert ask(schedule, 0).start == [A, B]
    schedule.interrupted(A, 0)
    schedule.force(B)
    assert ask(schedule, 0.5) == Decision([], RETRY_S_FIRST)
    assert ask(schedule, RETRY_S_FIRST).start == [A]


def test_an_unreachable_core_filer_gets_one_flush_at_a_time():
    schedule = Schedule(delay_s=0, files_at_once=4)
    for inode in (A, B, C):
        schedule.dirtied(inode, inode)
    assert ask(schedule, 10, is_reachable=False).start == [A]
    assert ask(schedule, 10, is_reachable=False).start == []
    schedule.finished(A, 11, dirty_since=None)
    assert ask(schedule, 11).start == [B, C]


def test_a_discarded_file_is_not_flushed():
    schedule = Schedule(delay_s=0, files_at_once=4)
    schedule.dirtied(A, 0)
    schedule.force(A)
    schedule.forget(A)
    assert ask(schedule, 1, is_urgent=True) == Decision([], None)
    assert schedule.oldest_dirty_at() is None


def test_an_infinite_delay_never_wakes():
    schedule = Schedule(delay_s=float("inf"), files_at_once=4)
    schedule.dirtied(A, 0)
    assert ask(schedule, 1e12) == Decision([], None)
